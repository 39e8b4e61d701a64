"""What trains under DeepSpeed on two processes of CPUs is what DDP trains; what does not is refused (test_cli_launch.py).

Needs `pip install deepspeed`, which CI does not have: `make deepspeed` runs these where it is.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import two
import yaml
from commands import make_place, words
from evaluation.cases import moved
from tiny import tiny_llama

from hf_ftplus import zero
from hf_ftplus.cli import main
from hf_ftplus.errors import IncompatibleError

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install deepspeed"),
]
SCRIPT = Path(__file__).with_name("zero.py")


ACTING = ("ewc", "si", "both")


@pytest.fixture(scope="module")
def parallel_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def parallel(parallel_folder):
    return two.launch(SCRIPT, "0", parallel_folder, seconds=300)[0]


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request, parallel, parallel_folder, tmp_path_factory):
    """What both ranks have, of ZeRO-1 and ZeRO-2: these runs also look at each step of SGD in fp32 and in bf16."""
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    (folder / "first").symlink_to(parallel_folder / "first")
    return two.launch(SCRIPT, str(request.param), folder, seconds=600)


def test_every_strategy_trains_as_under_ddp(parallel, ranks):
    for rank in ranks:
        assert rank.keys() == parallel.keys()
        assert {name.partition("/")[0] for name in rank} == {"replay", "distill", *ACTING}
        for name, tensor in rank.items():
            assert (tensor - parallel[name]).abs().max() < 1e-6, name


def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(ranks):
    for rank in ranks:
        again = {name: tensor for name, tensor in rank.items() if "/resumed " in name}
        assert {name.partition("/")[0] for name in again} == set(ACTING)
        for name, tensor in again.items():
            assert torch.equal(tensor, rank[name.replace("/resumed ", "/")]), name


def test_under_zero_3_replay_trains_as_under_ddp(parallel, tmp_path):
    first = two.launch(SCRIPT, "3", tmp_path, seconds=300)[0]
    assert {name.partition("/")[0] for name in first} == {"replay"}
    for name, weight in first.items():
        assert (weight - parallel[name]).abs().max() < 1e-6, name


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"version": "0.18.0"}, "DeepSpeed 0.18.0 is installed; strategies that act on gradients need 0.19.8"),
        ({"kind": "BF16_Optimizer"}, "trains with its BF16_Optimizer, whose gradients strategies cannot reach"),
        ({"cpu_offload": True}, "Leave offload_optimizer out"),
        ({"dtype": torch.float16}, "trains in fp16"),
    ],
)
def test_what_keeps_gradients_elsewhere_is_refused(monkeypatch, found, says):
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = object.__new__(type(found["kind"], (), {}) if "kind" in found else DeepSpeedZeroOptimizer)
    optimizer.cpu_offload, optimizer.dtype = found.get("cpu_offload", False), found.get("dtype", torch.bfloat16)
    monkeypatch.setattr(zero.metadata, "version", lambda name: found.get("version", "0.19.8"))
    with pytest.raises(IncompatibleError, match=says):
        zero.refuse(optimizer)


@pytest.mark.parametrize(
    ("stage", "plugin", "rows"), [("zero1", "ewc", "4"), ("zero2", "ewc", "4"), ("zero3", "replay", "0")]
)
def test_the_command_launches_trains_and_goes_on(tmp_path, capfd, stage, plugin, rows):
    place, out = make_place(tmp_path / "place"), tmp_path / "out"
    how = ["--accelerate_config", stage, "--num_processes", "2", "--use_cpu", "true", "--measure_rows", rows]
    line = words(place, out, *how, "--completions", "0", "--save_strategy", "steps", "--save_steps", "2", plugin=plugin)
    assert main(line) == 0
    assert json.loads((out / "ftplus" / "report.json").read_text())["facts"]["processes"] == 2
    weights = (out / "model.safetensors").read_bytes()
    last = max((int(path.name.split("-")[1]), path) for path in out.glob("checkpoint-*"))[1]
    shutil.rmtree(last)
    (out / "ftplus" / "report.json").unlink()
    assert main([*line, "--resume_from_checkpoint", "true"]) == 0
    assert (out / "model.safetensors").read_bytes() == weights


@pytest.mark.fault("B2")
def test_under_zero_3_an_adapter_goes_on_only_with_the_weights_it_was_trained_on(tmp_path, capfd):
    place, out = make_place(tmp_path / "place"), tmp_path / "out"
    how = ["--accelerate_config", "zero3", "--num_processes", "2", "--use_cpu", "true", "--measure_rows", "0"]
    save = ["--use_peft", "true", "--lora_r", "2", "--save_strategy", "steps", "--save_steps", "2", "--max_steps"]
    line = words(place, out, *how, "--completions", "0", *save, plugin="replay")
    assert main([*line, "2"]) == 0
    resume = [*line, "4", "--resume_from_checkpoint", "true"]
    moved(tiny_llama(), by=0.1).save_pretrained(place / "model")
    assert main(resume) == 4
    assert "other weights below the adapter" in capfd.readouterr().err
    tiny_llama().save_pretrained(place / "model")
    assert main(resume) == 0


@pytest.mark.parametrize(("stage", "how"), [(2, "steps with ewc"), (3, "steps without ewc")])
def test_doctor_trains_there_as_a_run_does(tmp_path, capfd, stage, how):
    """Also where the configuration has steps and clipping of its own."""
    own = {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    config = files("trl.accelerate_configs").joinpath(f"zero{stage}.yaml").read_text()
    config = yaml.safe_load(config) | {"mixed_precision": "no"}
    config["deepspeed_config"] |= own
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    line = ["doctor", "--distributed", "--num_processes", "2", "--json", "--accelerate_config"]
    assert main([*line, str(tmp_path / "own.yaml")]) == 0
    facts = json.loads((said := capfd.readouterr().out)[said.index("\n{\n") :])
    assert f"DeepSpeed ZeRO-{stage}" in facts["sharding"]["weights"]
    assert facts["sharding"]["weights"].startswith("on" if stage == 3 else "off")
    assert float(facts["laws"]["as one process"].split()[0]) < 1e-5
    assert how in facts["laws"]["as one process"]


def test_doctor_does_not_try_an_optimizer_in_cpu_memory(tmp_path, capfd):
    config = yaml.safe_load(files("trl.accelerate_configs").joinpath("zero2.yaml").read_text())
    config["deepspeed_config"]["offload_optimizer_device"] = "cpu"
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    line = ["doctor", "--distributed", "--num_processes", "2", "--json", "--accelerate_config"]
    assert main([*line, str(tmp_path / "own.yaml")]) == 0
    assert "the optimizer is in CPU memory" in capfd.readouterr().out
