"""Whatever moment a run is killed at: no committed checkpoint is lost or broken, and it ends with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import make_place, same_file

from hf_ftplus import commit

SCRIPT = Path(__file__).with_name("storm.py")


def run(*words, seconds) -> dict:
    """What the script found; a failure of it is one of the test."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(SCRIPT), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.fault("A1", "A10")
def test_killed_at_any_write_of_a_save_the_last_whole_checkpoint_is_found(tmp_path):
    found = run("points", tmp_path / "out", seconds=300)
    assert found["moments"] > 20
    assert found["older"] > 15  # before the commit
    assert found["newer"] > 2  # after it, while older ones are deleted


@pytest.mark.fault("A1")
@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.storm)])
def test_after_a_storm_of_kills_weights_and_state_are_those_of_a_run_that_nobody_stopped(tmp_path, kills):
    place, steps = make_place(tmp_path), 20 + 5 * kills
    run("storm", place, tmp_path / "whole", 0, steps, seconds=300 + 5 * steps)
    found = run("storm", place, tmp_path / "out", kills, steps, seconds=300 + 60 * kills)
    print(found)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert same_file(whole / "model.safetensors", out / "model.safetensors")
    last = commit.newest(out)
    assert last.name == commit.newest(whole).name
    for name in (
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "ftplus/ewc.safetensors",
        "ftplus/distill.safetensors",
    ):
        assert (
            commit.read_commit(last)["files"][name]["sha256"]
            == commit.read_commit(whole / last.name)["files"][name]["sha256"]
        ), name
    assert len(list(out.glob("_incomplete-*"))) <= 1
    assert not list(out.glob("_damaged-*"))
    assert not list(out.glob("checkpoint-*/**/.*"))
    assert not (out / "_ftplus.lock").exists()
