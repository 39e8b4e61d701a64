"""Stopped anywhere and resumed, a run is the run that nobody stopped: every byte of every later checkpoint.

Compared are weights, optimizer, schedule, random generators and the state of every strategy, at each step after the cut,
and what was logged. What takes longer is in test_exact_everywhere.py.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
from pathlib import Path

import pytest
from commands import make_place, same_file, words
from exact import EPOCH, STEPS, comparable, held, make

from hf_ftplus import commit
from hf_ftplus.cli import main
from hf_ftplus.errors import IncompatibleError, StorageError
from hf_ftplus.interrupt import SaveOnInterrupt
from hf_ftplus.trainer import SFTTrainer

TRIED = ["plain", "ewc", "si", "distill", "distill + ewc", "replay + ewc"]
TRIED += [f"{kind}, LoRA" for kind in ("plain", "ewc", "distill", "distill + ewc")]


def logged(it) -> list:
    """But for the summary at the end, which is of a part."""
    return [comparable(log) for log in it.state.log_history[:-1]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of a kind, made once: its folder, and what it logged."""
    found = {}

    def of(kind):
        if kind not in found:
            folder = tmp_path_factory.mktemp("whole")
            it = make(folder, kind)
            it.train()
            found[kind] = folder, logged(it)
        return found[kind]

    return of


@pytest.mark.fault("A2")
@pytest.mark.parametrize(
    ("kind", "cut"),
    [(kind, cut) for kind in TRIED for cut in (1, EPOCH)]
    + [("distill + ewc, LoRA", cut) for cut in (3, EPOCH - 1, EPOCH + 1, STEPS - 1)],
)
def test_resumed_at_any_step_it_is_the_run_that_nobody_stopped(whole, tmp_path, kind, cut):
    folder, logs = whole(kind)
    it = make(tmp_path, kind)
    it.train(resume_from_checkpoint=str(folder / f"checkpoint-{cut}"))
    for step in range(cut + 1, STEPS + 1):
        assert held(tmp_path, step) == held(folder, step), step
        assert not held(folder, step).items() <= held(folder, step - 1).items()  # a step changes something
    assert logged(it) == logs


def test_cut_twice_it_is_still_that_run(whole, tmp_path):
    folder, _ = whole("distill + ewc")
    make(tmp_path / "one", "distill + ewc").train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    make(tmp_path / "two", "distill + ewc").train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-7"))
    assert held(tmp_path / "two", STEPS) == held(folder, STEPS)


@pytest.mark.fault("A2")
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_while_it_accumulates_it_ends_the_step_and_saves_it(whole, tmp_path, number, half):
    kind, micro = "distill + ewc, LoRA", []
    folder, _ = whole(kind)

    class Told(SFTTrainer):
        def training_step(self, *args, **kwargs):
            micro.append(self.state.global_step)
            if len(micro) == 2 * 3 + half + 1:
                os.kill(os.getpid(), number)
            return super().training_step(*args, **kwargs)

    it, interrupt = make(tmp_path, kind, cls=Told, save_strategy="no"), SaveOnInterrupt()
    it.add_callback(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            it.train()
    finally:
        interrupt.restore()
    assert raised.value.args == (128 + number,)
    assert held(tmp_path, 4) == held(folder, 4)
    make(tmp_path, kind).train(resume_from_checkpoint=True)
    assert held(tmp_path, STEPS) == held(folder, STEPS)


@pytest.mark.parametrize("lost", ["rng_state.pth", "optimizer.pt", "scheduler.pt", "ftplus/ewc.safetensors"])
def test_without_any_part_it_is_refused_and_would_be_another_run(whole, tmp_path, monkeypatch, lost):
    """The control: what is compared above does depend on each of them."""
    kind = "distill + ewc, LoRA"
    folder, _ = whole(kind)
    cut = Path(shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3"))
    (cut / lost).unlink()
    with pytest.raises(StorageError, match=f"{lost} is missing"):
        make(tmp_path, kind).train(resume_from_checkpoint=str(cut))
    (cut / commit.COMMIT).unlink()  # one that another program wrote
    with pytest.raises((IncompatibleError, StorageError), match=r"lacks the|is missing"):
        make(tmp_path, kind).train(resume_from_checkpoint=str(cut))
    if lost.endswith(".safetensors"):
        return
    monkeypatch.setattr(commit, "lacks", lambda checkpoint: "")
    make(tmp_path, kind).train(resume_from_checkpoint=str(cut))
    assert held(tmp_path, STEPS) != held(folder, STEPS)


# ---- before the first step -------------------------------------------------------------------------------------------


@pytest.mark.fault("A2")
@pytest.mark.parametrize("moment", ["hf_ftplus.fisher.fisher", "hf_ftplus.generate._says_something"])
def test_interrupted_before_the_first_step_the_same_command_begins_again(tmp_path, monkeypatch, moment):
    """While it looks at what is protected (the first call is for the cost), and while it writes that."""
    place = make_place(tmp_path)
    few = ["--measure_rows", "0", "--max_length", "400", "--resume_from_checkpoint", "auto"]
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "one"))
    assert main(words(place, tmp_path / "whole", *few, protect="self:4")) == 0
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "other"))
    module, _, name = moment.rpartition(".")
    before, calls = getattr(importlib.import_module(module), name), []

    def told(*args, **kwargs):
        calls.append(name)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return before(*args, **kwargs)

    monkeypatch.setattr(moment, told)
    assert main(words(place, tmp_path / "out", *few, protect="self:4")) == 130
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert main(words(place, tmp_path / "out", *few, protect="self:4")) == 0
    assert len(calls) > 2
    assert same_file(tmp_path / "whole" / "model.safetensors", tmp_path / "out" / "model.safetensors")
