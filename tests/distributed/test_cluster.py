"""`ftplus doctor --distributed`: what it sees of two processes is what they do, and what is wrong is said."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import command
from training import trainer

from hf_ftplus import cluster, trial
from hf_ftplus.cli import launch, main
from hf_ftplus.errors import IncompatibleError

SHARDED = Path(__file__).with_name("sharded.py")


def doctor(line, tmp_path):
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "FTPLUS_CACHE": str(tmp_path)}
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment)


def apart(facts) -> float:
    return float(facts["laws"]["as one process"].split()[0])


@pytest.mark.dist
def test_two_processes_are_launched_and_train_as_one(tmp_path):
    done = doctor(
        command("doctor", "--distributed", "--json", "--num_processes", "2", "--main_process_port", "0"), tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout[done.stdout.index("{") :])
    assert facts["ranks"]["ranks"].startswith("2 on 1 machine")
    assert facts["ranks"]["backend"] == "gloo"
    assert facts["ranks"]["cache folder"] == "seen by all ranks"
    assert facts["sharding"]["weights"].startswith("off")
    assert facts["laws"]["same on all ranks"].startswith("yes")
    assert apart(facts) < 1e-5
    assert "GB/s" in facts["wire"]["bandwidth"]
    assert not list(tmp_path.glob("doctor-*"))


@pytest.mark.dist
def test_shards_are_seen_and_train_as_one(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SHARDED)]
    done = doctor([*torchrun, "doctor", "--distributed", "--json"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout[done.stdout.index("{") :])
    assert facts["sharding"]["weights"].startswith("on: FSDP2, a rank holds 5")
    assert facts["laws"]["same on all ranks"].startswith("yes")
    assert apart(facts) < 1e-5


@pytest.fixture
def alone(tmp_path):
    """A group of one process, which is what collectives need."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield SimpleNamespace(num_processes=1, mixed_precision="no", device=torch.device("cpu"))
    torch.distributed.destroy_process_group()


def test_an_update_that_is_not_that_of_one_process_is_a_fault(alone):
    start = {"weights.a": torch.zeros(3), "weights.b": torch.zeros(3)}
    one = {name: torch.ones(3) for name in start}
    for off, faults in ((1e-6, 0), (1e-3, 1), (float("nan"), 1)):
        found = cluster.Found()
        trial.compared({**one, "weights.b": torch.ones(3) + off}, one, start, 1e-4, "with ewc", found)
        assert len(found.faults) == faults, off


def test_fsdp_that_was_asked_for_and_left_out_is_a_fault(alone, monkeypatch, tmp_path):
    it = trainer(tmp_path, protect=None)
    found = cluster.Found()
    assert trial.held(it, found)["weights"] == "off: every rank holds all"
    assert not found.faults
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    trial.held(it, found)
    assert "accelerate shards on no CPU" in found.faults[0]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is here")
def test_a_launcher_that_lacks_deepspeed_is_one_sentence(capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(["doctor", "--distributed", "--num_processes", "2", "--accelerate_config", "zero2"]) == 4
    assert "DeepSpeed is not installed" in capsys.readouterr().err


def test_one_process_is_no_cluster(monkeypatch, capsys):
    monkeypatch.setattr(launch, "expected", lambda use_cpu: "")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(["doctor", "--distributed"]) == 2
    assert "--num_processes N" in capsys.readouterr().err
    with pytest.raises(IncompatibleError, match="one process only"):
        cluster.meet()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--distributed", "--num_proceses", "2"], "Did you mean 'num_processes'"),
        (["--num_processes", "2"], "go with --distributed"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, says, capsys):
    assert main(["doctor", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_launch_that_strategies_refuse_is_a_fault(alone, monkeypatch):
    def refused(*args):
        raise IncompatibleError("FSDP version 1 flattens weights into one. Set fsdp_version: 2.")

    monkeypatch.setattr(trial, "run", refused)
    trial.see(alone, found := cluster.Found())
    assert found.faults == ["FSDP version 1 flattens weights into one. Set fsdp_version: 2"]
    assert "laws" not in found.facts
