"""The whole product: every built-in strategy and the default pairs, whole weights and LoRA, one process and two, ended
at every kind of step in every way, and twice: not one byte differs from the run that nobody stopped.

`make exact`: each run, and each part of one, is a process of its own, or two. They are forked, so nothing may train in
the process of the tests.
"""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from exact import CODES, EARLIER, EPOCH, KINDS, STEPS, STOPPED, differing, logs, make, part

from hf_ftplus import Strategy, commit

pytestmark = [
    pytest.mark.exact,
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),  # Python 3.12: it has threads, and forks
]
CUTS = ((1,), (3,), (EPOCH - 1,), (EPOCH,), (EPOCH + 1,), (STEPS - 1,), (2, EPOCH + 1))
WORLDS = [pytest.param(1, id="1 process"), pytest.param(2, id="2 processes", marks=pytest.mark.dist)]
each_world = pytest.mark.parametrize("world", WORLDS)
each_kind = pytest.mark.parametrize("kind", [kind for kind, (strategies, _) in KINDS.items() if strategies])


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What libraries look up once in a process, its children need not look up again."""
    for kind in ("multitask + ewc, LoRA", "replay + distill, LoRA"):
        make(tmp_path_factory.mktemp("warm"), kind)
    gc.collect()
    gc.freeze()  # what the children share they leave alone; `quick_collection` gives it back


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the uninterrupted run of a kind, made once, with a checkpoint of each step."""
    found = {}

    def of(kind, world):
        if (kind, world) not in found:
            found[kind, world] = tmp_path_factory.mktemp("whole")
            part(found[kind, world], kind, world, saves=range(1, STEPS + 1))
        return found[kind, world]

    return of


@pytest.fixture(scope="module")
def total():
    found = Counter()
    yield found
    print(f"\n{found['cells']} cells, {found['compared']:,} bytes compared, {found['differing']} differing bytes")


def resumed(folder, kind, world, how, cuts):
    for cut in cuts:
        part(folder, kind, world, how, cut)
    part(folder, kind, world)


def unlike_at_any_cut(folder, kind, world, how, whole, total):
    """Cuts -> what differed after them, and in how many bytes."""
    found = {}
    for cuts in CUTS:
        out = folder / "-".join(map(str, cuts))
        out.mkdir()
        resumed(out, kind, world, how, cuts)
        compared, unlike = differing(out, whole, cuts[-1])
        total.update(cells=1, compared=compared, differing=sum(unlike.values()))
        found |= {cuts: unlike} if unlike else {}
        shutil.rmtree(out)
    return found


@pytest.mark.fault("A1", "A2", "A3")
@each_world
@pytest.mark.parametrize("how", CODES)
@each_kind
def test_ended_anywhere_in_any_way_and_resumed_it_is_the_run_that_nobody_stopped(
    whole, total, tmp_path, kind, world, how
):
    assert unlike_at_any_cut(tmp_path, kind, world, how, whole(kind, world), total) == {}


@each_world
@pytest.mark.parametrize("kind", ["ewc", "si"])
def test_a_run_with_the_memory_of_an_earlier_one_is_that_run_too(whole, total, tmp_path, monkeypatch, kind, world):
    monkeypatch.setitem(EARLIER, again := f"{kind}, again", whole(kind, world))
    monkeypatch.setitem(KINDS, again, KINDS[kind])
    truth = whole(again, world)
    assert unlike_at_any_cut(tmp_path, again, world, STOPPED, truth, total) == {}
    assert logs(truth)[-1][f"{kind}/penalty"] > 0


# ---- controls --------------------------------------------------------------------------------------------------------


@each_world
@each_kind
def test_without_any_part_it_is_refused_and_would_be_another_run(whole, tmp_path, monkeypatch, kind, world):
    """What is compared does depend on each of them."""
    there = whole(kind, world)
    states = [file.relative_to(there / "checkpoint-3") for file in there.glob("checkpoint-3/ftplus/*.safetensors")]
    for lost in ("optimizer.pt", "scheduler.pt", "rng_state*.pth", *map(str, states)):
        folder = tmp_path / lost.replace("/", "-")
        cut = shutil.copytree(there / "checkpoint-3", folder / "from" / "checkpoint-3")
        for file in cut.glob(lost):
            file.unlink()
        with pytest.raises(AssertionError, match=r"StorageError.* is missing"):
            part(folder, kind, world, named=cut)
        (cut / commit.COMMIT).unlink()  # one that another program wrote
        with pytest.raises(AssertionError, match=r"(Incompatible|Storage)Error.* (lacks the|is missing)"):
            part(folder, kind, world, named=cut)
        if Path(lost) not in states:
            with monkeypatch.context() as patch:
                patch.setattr(commit, "lacks", lambda checkpoint: "")
                part(folder, kind, world, named=cut)
            assert differing(folder, there, 3)[1], lost


@dataclass
class Momentum(Strategy):
    """Adds what is left of earlier gradients, and keeps it in its state; or forgets to."""

    name: ClassVar[str] = "momentum"

    def __post_init__(self):
        super().__post_init__()
        self.left, self.forgets = {}, False

    def read_gradients(self, run):
        for name, weight in run.weights.items():
            self.left[name] = 0.5 * self.left.get(name, torch.zeros_like(weight)) + weight.grad
            weight.grad.copy_(self.left[name])

    def state_dict(self):
        return dict(list(self.left.items())[self.forgets :])

    def load_state_dict(self, state, run):
        self.left = state


@each_world
@pytest.mark.parametrize("forgets", [False, True])
def test_a_strategy_that_forgets_one_tensor_of_its_state_is_another_run(tmp_path, monkeypatch, world, forgets):
    strategy = Momentum()
    strategy.forgets = forgets
    monkeypatch.setitem(KINDS, "momentum", ((strategy,), False))
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    part(tmp_path / "whole", "momentum", world, saves=range(1, STEPS + 1))
    resumed(tmp_path / "cut", "momentum", world, STOPPED, (3,))
    _, unlike = differing(tmp_path / "cut", tmp_path / "whole", 3)
    assert (f"checkpoint-{STEPS}/model.safetensors" in unlike) == forgets
    assert bool(unlike) == forgets
