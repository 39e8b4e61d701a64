"""`ftplus sft` in several processes: started as `trl sft` would, ended with the code and the sentence of its ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from commands import command, make_place, same_file, stopped, words

from hf_ftplus.cli import launch, main
from hf_ftplus.interrupt import ONE_PRESS

TWO = [
    "--num_processes", "2", "--num_machines", "1", "--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip
NO_PORT = ["--main_process_port", "0"]  # of nobody else
STEPS = ["--max_steps", "40", "--save_strategy", "no", "--measure_rows", "0", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


def on_cpu(place, out, *more):
    few = ["--measure_rows", "4", "--completions", "0", "--ddp_timeout", "60", "--use_cpu", "true"]
    return words(place, out, *few, *more)


def run(line) -> subprocess.CompletedProcess:
    return subprocess.run(line, capture_output=True, text=True, timeout=150, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.fault("D9")
def test_zero_3_is_refused_before_anything_is_launched(place, tmp_path, capsys, monkeypatch):
    from accelerate.commands import launch as accelerate

    monkeypatch.setattr(accelerate, "launch_command", lambda args: (_ for _ in ()).throw(ValueError("launched")))
    for stage, code, says in (
        ("zero3", 4, "zero2, fsdp2 or multi_gpu"),
        ("zero2", 2, "launched"),
        ("zero1", 2, "launched"),
    ):
        line = words(place, tmp_path / "out", "--accelerate_config", stage, "--num_processes", "2")
        assert main(line) == code
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launch", "more", "found"),
    [
        ("zero2", (), "no"),  # its configuration says bf16
        ("zero2", ("--bf16", "true"), "bf16"),
        ("zero2", ("--fp16", "true"), "fp16"),
        ("zero2", ("--fp16", "true", "--mixed_precision", "fp16"), "fp16"),
        ("multi_gpu", (), "no"),
        ("multi_gpu", ("--bf16", "true"), None),  # as it is configured, which the Trainer takes
        ("multi_gpu", ("--mixed_precision", "fp16"), "fp16"),
    ],
)
def test_accelerate_is_told_the_precision_of_the_trainer(place, tmp_path, monkeypatch, launch, more, found):
    from accelerate.commands import launch as accelerate

    seen = []
    monkeypatch.setattr(accelerate, "launch_command", lambda args: seen.append(args.mixed_precision))
    monkeypatch.setattr("hf_ftplus.cli.sft.has_bf16", lambda on_cpu: False)
    main(words(place, tmp_path / "out", "--accelerate_config", launch, "--num_processes", "2", *more))
    assert seen == [found]


def test_two_precisions_are_refused_where_deepspeed_would_fail(place, tmp_path, capsys):
    line = words(place, tmp_path / "out", "--accelerate_config", "zero2", "--bf16", "true", "--mixed_precision", "fp16")
    assert main(line) == 2
    assert "the Trainer trains in bf16; DeepSpeed wants both alike. Leave it out" in capsys.readouterr().err


def test_what_reads_the_head_is_refused_under_zero_3_alone(place, tmp_path, capsys, monkeypatch):
    from accelerate.commands import launch as accelerate

    distill = words(place, tmp_path / "out", "--num_processes", "2", plugin="distill")
    assert main([*distill, "--accelerate_config", "zero3"]) == 4
    assert "distill reads the LM head outside of the model's forward pass" in capsys.readouterr().err
    monkeypatch.setattr(accelerate, "launch_command", lambda args: (_ for _ in ()).throw(ValueError("launched")))
    assert main([*distill, "--accelerate_config", "zero2"]) == 2
    assert "launched" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "protect", "says"),
    [
        (4, "protect.jsonl", "Type --measure-rows 0"),
        (0, "self:8", "exists instead of self:N"),
        (0, "protect.jsonl", ""),
    ],
)
def test_zero_3_cannot_be_measured_and_writes_nothing(rows, protect, says):
    from types import SimpleNamespace

    from hf_ftplus.errors import IncompatibleError
    from hf_ftplus.refusals import refuse_zero3
    from hf_ftplus.specs import TaskSpec

    spec = TaskSpec.parse(protect)
    plugin = SimpleNamespace(zero_stage=3)
    config = SimpleNamespace(training=SimpleNamespace(deepspeed_plugin=plugin), measure_rows=rows, protect=[spec])
    if not says:
        refuse_zero3(config)
        return
    with pytest.raises(IncompatibleError, match=says):
        refuse_zero3(config)
    plugin.zero_stage = 2
    refuse_zero3(config)


@pytest.mark.parametrize(
    ("rows", "protect", "says"),
    [("4", "protect.jsonl", "Type --measure-rows 0"), ("0", "self:8", "exists instead of self:N")],
)
def test_nothing_is_asked_of_a_model_that_reads_rows_in_parts(
    place, tmp_path, capsys, monkeypatch, rows, protect, says
):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    assert main(words(place, tmp_path / "out", "--measure_rows", rows, protect=protect)) == 4
    error = capsys.readouterr().err
    assert "Under context parallelism (cp_size: 2)" in error
    assert says in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("typed", [["--accelerate_config", "fsdp2"], ["--accelerate-config=fsdp2"]])
def test_a_configuration_that_is_typed_wins_over_yaml(place, tmp_path, monkeypatch, typed):
    from accelerate.commands import launch as accelerate

    seen = []
    monkeypatch.setattr(accelerate, "launch_command", seen.append)
    (tmp_path / "run.yaml").write_text("accelerate_config: multi_gpu\nnum_processes: 2\n")
    assert main(words(place, tmp_path / "out", "--config", str(tmp_path / "run.yaml"), *typed)) == 1
    assert seen[0].config_file.endswith("fsdp2.yaml")


def test_switches_of_accelerate_may_stand_in_yaml(place, tmp_path, monkeypatch, capsys):
    from accelerate.commands import launch as accelerate

    seen = []
    monkeypatch.setattr(accelerate, "launch_command", seen.append)
    (tmp_path / "run.yaml").write_text("use_fsdp: true\nmulti_gpu: false\nnum_processes: 2\n")
    assert main(words(place, tmp_path / "out", "--config", str(tmp_path / "run.yaml"))) == 1  # no rank said anything
    (args,) = seen
    assert (args.use_fsdp, args.multi_gpu, args.num_processes, args.training_script) == (True, False, 2, "hf_ftplus")
    (tmp_path / "run.yaml").write_text("use_fsdp: often\n")
    assert main(words(place, tmp_path / "out", "--config", str(tmp_path / "run.yaml"))) == 2
    assert "use_fsdp: often in the YAML file; expected true or false" in capsys.readouterr().err


def test_bad_flags_of_accelerate_are_one_line(place, tmp_path, capsys):
    for flags, says in (
        (["--accelerate_config", "zero9"], "fsdp2, multi_gpu, single_gpu, zero1, zero2, zero3). Did you mean 'zero"),
        (["--num_processes", "many"], "invalid int value: 'many'"),
        (["--multi_gpu", "--num_processes", "1"], "at least 2 processes"),
    ):
        assert main(words(place, tmp_path / "out", *flags)) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("devices", "use_cpu", "config", "why"),
    [
        (0, False, False, ""),
        (1, False, False, ""),
        (4, False, False, "4 devices"),
        (4, True, False, ""),
        (1, False, True, "accelerate's configuration"),
    ],
)
def test_without_a_launch_flag_it_starts_as_many_processes_as_trl_sft(
    monkeypatch, tmp_path, devices, use_cpu, config, why
):
    """Only the count of devices is made up here: no machine with several has run this."""
    from accelerate.commands.config import config_args

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "default_config.yaml"))
    if config:
        (tmp_path / "default_config.yaml").write_text("num_processes: 1\n")
    assert launch.expected(use_cpu).startswith(why)
    assert bool(launch.expected(use_cpu)) == bool(why)


@pytest.mark.parametrize(
    ("said", "crash", "asked", "code"),
    [
        ([(0, ""), (0, "")], (0, ""), 0, 0),
        ([(3, "no rows"), (3, "no rows")], (3, "..."), 0, 3),
        ([(1, "connection lost"), (3, "no rows")], (1, "..."), 0, 3),
        ([(3, "no rows")], (-15, "ended by torchrun"), 0, 143),
        ([(1, "connection lost")], (-9, "killed"), 0, 137),
        ([(0, "")], (1, "..."), 0, 1),
        ([], (2, "..."), 0, 2),
        ([], (0, ""), 0, 1),
        ([(130, "interrupted"), (1, "connection lost")], (130, "..."), signal.SIGINT, 130),
        ([], (-9, "killed"), signal.SIGINT, 130),
        ([(6, "disk full")], (6, "..."), signal.SIGTERM, 6),
        ([(0, ""), (0, "")], (0, ""), signal.SIGINT, 0),
    ],
)
def test_the_code_that_says_most_reaches_the_shell(said, crash, asked, code):
    ended, sentence = launch.ending(said, crash, asked)
    assert ended == code
    assert bool(sentence) == bool(code)


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The folder of a run in two processes that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = run(command(*on_cpu(place, out, *STEPS, *TWO)))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def two_processes_held(out) -> bool:
    facts = json.loads((out / "ftplus" / "report.json").read_text())["facts"]
    return facts["processes"] == 2 and facts["strategies"]["ewc"]["penalty"] > 0


ABORTS = """
import atexit, os, sys
class Thread:
    def __del__(self):
        os.abort()  # as gloo's threads may, when the interpreter is torn down
gloo = Thread()
from hf_ftplus.cli import main
code = main()
atexit.register(print, "trainer ended")
sys.exit(code)
"""


@pytest.mark.parametrize(("word", "code"), [("--version", 0), ("tarin", 2)])
def test_a_process_of_a_launch_ends_with_its_code_whatever_threads_it_leaves(word, code):
    for rank, ends in ((None, -signal.SIGABRT), ("0", code)):
        environment = {**os.environ, **({"LOCAL_RANK": rank} if rank else {})}
        line = [sys.executable, "-c", ABORTS, word]
        done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode == ends, done.stderr
        assert "trainer ended" in done.stdout


@pytest.mark.dist
def test_flags_of_accelerate_launch_two_processes(whole):
    assert two_processes_held(whole)


@pytest.mark.dist
@pytest.mark.parametrize("way", ["accelerate.commands.launch", "torch.distributed.run"])
def test_two_processes_may_be_launched_from_outside(place, tmp_path, way):
    options = TWO if way.startswith("accelerate") else ["--standalone", "--nproc_per_node", "2"]
    line = [sys.executable, "-m", way, *options, "-m", "hf_ftplus", *on_cpu(place, tmp_path / "out")]
    done = run(line)
    assert done.returncode == 0, done.stderr[-3000:]
    assert two_processes_held(tmp_path / "out")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("config", "code", "more", "says"),
    [
        ("multi_gpu", 3, ["--max_length", "3"], "supervised token"),
        ("fsdp2", 5, ["--fail-if-retention-below", "1e9"], "protect: retention"),
        ("single_gpu", 3, ["--max_length", "3", "--quiet"], "supervised token"),
    ],
)
def test_a_named_config_launches_and_exit_codes_reach_the_shell_with_one_sentence(
    place, tmp_path, config, code, more, says
):
    """And FSDP, which accelerate leaves out on CPUs without a word, is missed."""
    two = [] if config == "single_gpu" else [*TWO[:2], *NO_PORT]
    done = run(command(*on_cpu(place, tmp_path / "out", *more), "--accelerate_config", config, *two))
    assert done.returncode == code, done.stderr[-3000:]
    assert done.stderr.count(says) == 1
    assert done.stderr.count("accelerate shards on no CPU: each of 2 processes") == (config == "fsdp2")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "ftplus" / "report.json").is_file() == (code == 5)


@pytest.mark.fault("A3")
@pytest.mark.dist
def test_ctrl_c_saves_on_all_ranks_and_a_resumed_run_ends_with_the_same_weights(place, whole, tmp_path):
    cut = tmp_path / "cut"
    line = command(*on_cpu(place, cut, *STEPS, *TWO))
    ended, error = stopped(line, lambda pid: os.killpg(pid, signal.SIGINT))
    assert ended == 130, error
    assert error.count("--resume_from_checkpoint true") == 1
    assert "Traceback" not in error
    (saved,) = cut.glob("checkpoint-*")
    for name in (
        "ftplus/manifest.json",
        "ftplus/ewc.safetensors",
        "rng_state_0.pth",
        "rng_state_1.pth",
        "optimizer.pt",
    ):
        assert (saved / name).is_file()
    assert int(saved.name.removeprefix("checkpoint-")) < 40
    done = run([*line, "--resume_from_checkpoint", "true"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert same_file(whole / "model.safetensors", cut / "model.safetensors")


@pytest.mark.fault("A3")
@pytest.mark.dist
def test_a_signal_to_one_rank_alone_saves_on_all_of_them(place, tmp_path):
    steps = [*STEPS, "--max_steps", "4000", *TWO]

    def one(pid):
        psutil.Process(pid).children()[1].terminate()

    ended, error = stopped(command(*on_cpu(place, tmp_path / "out", *steps)), one, seconds=60)
    assert ended == 143, error
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    assert (saved / "ftplus" / "manifest.json").is_file()


@pytest.mark.fault("A2")
@pytest.mark.dist
def test_a_second_ctrl_c_stops_at_once_also_a_rank_that_hangs(place, tmp_path):
    steps = [*STEPS, "--max_steps", "4000", *TWO]

    def twice(pid):
        psutil.Process(pid).children()[1].suspend()  # never again reaches the end of a step
        os.killpg(pid, signal.SIGINT)
        time.sleep(ONE_PRESS + 0.2)
        os.killpg(pid, signal.SIGINT)

    ended, error = stopped(command(*on_cpu(place, tmp_path / "out", *steps)), twice, seconds=30)
    assert ended == 130, error
    assert not list((tmp_path / "out").glob("checkpoint-*"))
