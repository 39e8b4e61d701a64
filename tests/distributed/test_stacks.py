"""Every strategy, and all of them together, on two processes: the update, the state and the rows of one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import two
from tiny import tiny_llama

from hf_ftplus import state

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).with_name("stacks.py")


def module():
    spec = importlib.util.spec_from_file_location("stacks", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def part(found, name):
    return {key.removeprefix(name): tensor for key, tensor in found.items() if key.startswith(name)}


def far(one, other) -> float:
    assert one.keys() == other.keys()
    assert one
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return module().first_run(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the runs of one process."""
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="module")
def one(folder, first):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTPLUS_CACHE", str(folder / "cache"))
        yield module().uninterrupted(folder, first, list(module().STACKS))


@pytest.fixture(scope="module")
def parallel(tmp_path_factory, first):
    return launched("ddp", tmp_path_factory.mktemp("ddp"), first=first)


@pytest.fixture(scope="module")
def shards_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def shards(shards_folder, first, folder, one):
    return launched("fsdp", shards_folder, first=first, one=folder)


def launched(what, here, **links):
    for name, there in links.items():
        (here / name).symlink_to(there)
    return two.launch(SCRIPT, what, here)


def agree(found, one, stack, most):
    """Both ranks hold the same; and what one process holds."""
    for kind in ("weights", "state", "figure"):
        ranks = [part(rank, f"{stack}/{kind}.") for rank in found]
        assert ranks[0].keys() == ranks[1].keys()
        assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0]), kind
    assert far(part(found[0], f"{stack}/weights."), part(one, f"{stack}/weights.")) < most
    for name, truth in part(one, f"{stack}/figure.").items():
        assert torch.allclose(found[0][f"{stack}/figure.{name}"], truth, rtol=1e-3, atol=1e-7), name


@pytest.mark.parametrize("stack", ["all", "LoRA"])
def test_two_processes_give_the_update_of_one(parallel, one, stack):
    agree(parallel, one, stack, 1e-6)


@pytest.mark.fault("D8")
@pytest.mark.parametrize("stack", ["all", "si"])
def test_two_processes_that_hold_shards_give_the_update_of_one(shards, one, stack):
    agree(shards, one, stack, 1e-5)


def test_every_step_has_the_same_rows_on_two_processes_as_on_one(parallel, shards, one):
    steps, rows = module().STEPS, module().ROWS
    truth = one["all/rows"].view(steps, rows)
    for found in (parallel, shards):
        ranks = [rank["all/rows"].view(steps, rows // 2) for rank in found]
        assert torch.equal(torch.cat(ranks, 1), truth)
    assert truth.unique().numel() > rows


def test_every_strategy_of_a_stack_acted(one):
    for figure in ("ewc/penalty", "si/explained", "distill/kl_protect", "distill/kl_learn", "replay/share_of_rows"):
        assert one[f"all/figure.{figure}"][-1] > 3e-5, figure
    assert one["si/figure.si/penalty"][-1] > 1e-4


@pytest.mark.parametrize(("kind", "stack"), [("parallel", "all"), ("parallel", "LoRA"), ("shards", "all")])
def test_two_processes_resume_to_the_same_bits(kind, stack, request):
    for rank in request.getfixturevalue(kind):
        whole, again = part(rank, f"{stack}/"), part(rank, f"resumed {stack}/")
        assert torch.equal(whole.pop("rows")[-len(again["rows"]) :], again.pop("rows"))
        assert whole.keys() == again.keys()
        for name, tensor in whole.items():
            assert torch.equal(again[name], tensor), name


@pytest.mark.fault("B8")
def test_what_two_processes_saved_of_shards_one_process_takes_over(shards, shards_folder, folder):
    """And is what one process saves: a state file does not tell on how many ranks it was written."""
    settings = state.settings_of(module().STACKS["all"]())
    where = f"all/checkpoint-{module().CUT}/ftplus"
    there, here = (state.load_checkpoint(base / where, settings, tiny_llama()) for base in (shards_folder, folder))
    for name in settings:
        assert there[name].keys() == here[name].keys()
        for key, tensor in here[name].items():
            assert torch.allclose(there[name][key], tensor, rtol=1e-4, atol=1e-6), key


def test_what_one_process_saved_two_take_over_in_shards(shards, folder):
    where = folder / f"all/checkpoint-{module().CUT}/ftplus"
    settings = state.settings_of(module().STACKS["all"]())
    saved = state.load_checkpoint(where, settings, tiny_llama())
    for rank in shards:
        for name in ("ewc", "si"):
            taken = part(rank, f"taken over/{name}.")
            assert taken.keys() == saved[name].keys()
            assert all(torch.equal(taken[key], tensor) for key, tensor in saved[name].items())
