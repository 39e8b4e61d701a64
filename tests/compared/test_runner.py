"""Claims about which cell runs where, by a runner that trains nothing; and where a real one puts its process."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace as Asked

import pytest

from hf_ftplus.compared import runner as compared
from hf_ftplus.compared.candidates import Row
from hf_ftplus.compared.cells import Cell
from hf_ftplus.compared.processes import Runner
from hf_ftplus.compared.runner import compare, gpus, run
from hf_ftplus.errors import StorageError
from hf_ftplus.stages.plan import Stage


class Pretended:
    """A runner whose cells end at once; the first two wait for each other, so that both devices have one."""

    def __init__(self, fails=(), broken=()):
        self.fails, self.broken = fails, broken
        self.ended, self.ran, self.known = False, [], []
        self.meet = threading.Barrier(2)

    def know(self, cell):
        self.known.append(cell.name)

    def run(self, cell, device):
        self.ran.append((cell.name, device))
        if len(self.ran) <= 2:
            self.meet.wait(10)
        if cell.row.name in self.broken:
            raise StorageError("The disk is full.")
        cell.state, cell.error = ("failed", "Oh.") if cell.row.name in self.fails else ("finished", "")


def cells_of(folder, *names):
    return [Cell(Row(name, 1e-3), 42, Stage(1, name, folder / name, {})) for name in names]


def finished(folder, name, seconds):
    [made] = cells_of(folder, name)
    (made.stage.folder / "ftplus").mkdir(parents=True)
    made.keep(resumed=False, seconds=seconds, peak_bytes=None, code=0)
    made.state = "finished"
    return made


def test_two_devices_run_every_cell_that_is_left_once(tmp_path):
    cells, said, runner = [finished(tmp_path, "done", 1.0), *cells_of(tmp_path, *"abcde")], [], Pretended()
    run(cells, ["0", "1"], runner, None, None, said.append)
    assert runner.known == ["done, seed 42"]
    assert sorted(name for name, _ in runner.ran) == [f"{name}, seed 42" for name in "abcde"]
    assert {device for _, device in runner.ran[:2]} == {"0", "1"}
    assert {cell.state for cell in cells} == {"finished"}
    assert sum(" on GPU 0" in line for line in said) + sum(" on GPU 1" in line for line in said) == 5


def test_a_cell_that_fails_is_said_and_both_devices_go_on(tmp_path):
    cells, said = cells_of(tmp_path, *"abcd"), []
    run(cells, ["0", "1"], Pretended(fails="b"), None, None, said.append)
    assert [cell.state for cell in cells] == ["finished", "failed", "finished", "finished"]
    assert "  failed: Oh." in said


def test_a_fault_of_this_process_starts_no_more_cells_and_is_raised(tmp_path):
    cells, runner = cells_of(tmp_path, *"abcdef"), Pretended(broken="abcdef")
    with pytest.raises(StorageError, match="The disk is full"):
        run(cells, ["0", "1"], runner, None, None, print)
    assert len(runner.ran) == 2


@pytest.mark.parametrize(("room", "state"), [(60, "finished"), (20, "left out")])
def test_a_budget_leaves_out_what_would_end_after_it_on_either_device(tmp_path, room, state):
    cells = [finished(tmp_path, "done", 30.0), *cells_of(tmp_path, *"abcd")]
    run(cells, ["0", "1"], Pretended(), None, time.monotonic() + room, print)
    assert [cell.state for cell in cells[1:]] == [state] * 4


def test_a_cell_sees_the_device_that_it_is_given_and_else_what_this_process_sees(tmp_path, monkeypatch):
    shell = tmp_path / "python"
    shell.write_text('#!/bin/sh\necho "devices: $CUDA_VISIBLE_DEVICES"\n')
    shell.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shell))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    reads = {"tasks": [], "protect": [], "measure": [], "script": Asked(dataset_name=""), "mixture": Asked(datasets=[])}
    reads["model"] = Asked(model_name_or_path="of/the-hub")
    cells = cells_of(tmp_path, "one", "two")
    for cell, device in zip(cells, ["7", None], strict=True):
        cell.stage.config = Asked(**reads)  # no data
        Runner().run(cell, device)
    assert [cell.log.read_text() for cell in cells] == ["devices: 7\n", "devices: 5,7\n"]
    assert [cell.state for cell in cells] == ["failed"] * 2  # it left no report


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [(0, "", [None]), (1, "3", [None]), (2, "", ["0", "1"]), (2, " 5, 7", ["5", "7"])],
)
def test_devices_have_the_names_that_this_process_was_given(monkeypatch, count, visible, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus() == expected


def test_the_probe_has_a_device_as_cells_will(tmp_path, monkeypatch):
    """Left to itself it would train on all of them, and promise the time of that."""

    def probed(*given):
        raise StorageError(f"probed on {given[-1]}")

    several = Asked(training=Asked(use_cpu=False))
    for name, value in {
        "configured": lambda given: (several, False), "rows": lambda *_: [], "cells": lambda *_: [],
        "check": lambda *_: None, "gpus": lambda: ["3", "4"], "probed": probed,
    }.items():  # fmt: skip
        monkeypatch.setattr(f"hf_ftplus.compared.runner.{name}", value)
    with pytest.raises(StorageError, match="probed on 3"):
        compare(compared.Asked({}, (), tmp_path), print, print)
