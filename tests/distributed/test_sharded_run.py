"""`ftplus sft` under FSDP2 on two gloo processes: measured, protected with its own words, saved and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import make_place, same_file, words
from evaluation.cases import moved
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_ftplus.data import load
from hf_ftplus.evaluation import EvalTask, Evaluation
from hf_ftplus.measured import hold_out

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).with_name("sharded.py")


def sharded(place, out, *more):
    few = [
        "--measure_rows", "4", "--completions", "1", "--ddp_timeout", "60", "--use_cpu", "true", "--bf16", "false",
        "--learning_rate", "1e-2",
    ]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    asked = ["--protect", "self:10", "--measure", f"asked={place / 'asked.jsonl'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*torchrun, *words(place, out, *few, *asked, *more)],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "ftplus" / "report.json").read_text())


def test_a_sharded_run_is_measured_as_a_whole_model_is_and_resumes_to_the_same_weights(tmp_path):
    place, out = make_place(tmp_path / "place"), tmp_path / "out"
    moved(tiny_llama(), by=0.3).save_pretrained(place / "model")  # one that has something to say
    (place / "asked.jsonl").write_text('{"prompt": "What is 1 and 2? "}\n{"prompt": "What is 1 and 3? "}\n')
    found = {task["name"]: task for task in sharded(place, out)["tasks"]}

    assert found["asked"]["before"]["token_accuracy"]["value"] > found["protect"]["before"]["token_accuracy"]["value"]
    assert found["self"]["rows"] == 2
    _, measured = hold_out(load(str(place / "protect.jsonl")), 4)
    alone = Evaluation([EvalTask.of("protect", "protect", measured, tiny_tokenizer())], tiny_tokenizer(), completions=0)
    alone.before(AutoModelForCausalLM.from_pretrained(place / "model"))
    [truth] = alone.after(AutoModelForCausalLM.from_pretrained(out))
    for when in ("before", "after"):
        assert found["protect"][when]["loss"]["value"] == pytest.approx(getattr(truth, when).loss.value, rel=1e-4)
    assert found["protect"]["drift"]["value"] == pytest.approx(truth.drift.value, rel=1e-2)
    assert truth.drift.value > 1e-4

    whole = out.rename(tmp_path / "whole")
    start = ["--resume_from_checkpoint", str(whole / "checkpoint-2")]
    resumed = {task["name"]: task for task in sharded(place, out, *start)["tasks"]}
    assert (out / "_self" / "self.jsonl").read_bytes() == (whole / "_self" / "self.jsonl").read_bytes()
    assert same_file(whole / "model.safetensors", out / "model.safetensors")
    assert resumed["protect"]["before"]["loss"]["value"] is None
    assert resumed["protect"]["after"]["loss"] == found["protect"]["after"]["loss"]
    assert "asked" not in resumed  # its reference was what the starting model answered
