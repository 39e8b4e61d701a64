"""The formulas of scaling.py on two gloo processes: what a rank holds and sends, by the profiler's count."""

from __future__ import annotations

from pathlib import Path

import pytest
import two
from tiny import tiny_llama

from hf_ftplus import scaling
from hf_ftplus.as_if import numbers
from hf_ftplus.scaling import Layout

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).with_name("wire.py")
SMALL = 64
"""Numbers of a step beside its weights: token counts, the signal that ranks agree on, logged figures."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    found = {}
    for what in ("ddp", "fsdp"):
        (rank, _) = two.launch(SCRIPT, what, tmp_path_factory.mktemp(what))
        found |= {f"{what} {name}": float(figure) for name, figure in rank.items()}
    return found


def layout(sharding, **kwargs):
    return Layout(world=2, sharding=sharding, bf16=False, **kwargs)


def test_ddp_reduces_each_gradient_once_and_holds_all(measured):
    model = numbers(tiny_llama(tie=False))
    held, sent = scaling.memory(model, layout("ddp")), scaling.wire(model, layout("ddp"))
    assert measured["ddp plain/weights"] == held["weights"]
    assert measured["ddp plain/optimizer"] == held["optimizer"]
    reduced = sum(sent.values()) / (2 * layout("ddp").ring * 4)
    assert reduced <= measured["ddp plain/all_reduce"] <= reduced + SMALL


@pytest.mark.parametrize("tie", [False, True])
def test_shards_hold_a_half_gather_twice_and_scatter_once(measured, tie):
    run, model = "fsdp tied" if tie else "fsdp plain", numbers(tiny_llama(tie=tie))
    held, sent = scaling.memory(model, layout("fsdp2")), scaling.wire(model, layout("fsdp2"))
    assert measured[f"{run}/weights"] == held["weights"]
    assert measured[f"{run}/optimizer"] == held["optimizer"]
    gathered = sent["weights"] / 4  # a rank of two sends its half
    assert gathered <= measured[f"{run}/all_gather"] <= gathered + SMALL
    scattered = sent["gradients"] / (layout("fsdp2").ring * 4)  # gloo reduces all of a buffer
    assert scattered <= measured[f"{run}/all_reduce"] <= scattered + SMALL


def test_accumulation_gathers_for_each_micro_batch_and_scatters_once(measured):
    sent = scaling.wire(numbers(tiny_llama(tie=False)), layout("fsdp2", accumulation=2))
    assert 0 <= measured["fsdp accumulated/all_gather"] - sent["weights"] / 4 <= SMALL
    assert measured["fsdp accumulated/all_reduce"] == measured["fsdp plain/all_reduce"]


def test_ewc_and_si_hold_shards_and_send_nothing(measured):
    model = numbers(tiny_llama(tie=False))
    assert measured["fsdp all/state.ewc"] == 8 * model.trained / 2
    assert measured["fsdp all/state.si"] == 12 * model.trained / 2
    for kind in ("all_gather", "all_reduce"):
        assert measured[f"fsdp all/{kind}"] <= measured[f"fsdp plain/{kind}"] + SMALL


def test_distill_on_protect_gathers_for_a_pass_of_its_own(measured):
    model = numbers(tiny_llama(tie=False))
    cost = scaling.distill(model, layout("fsdp2"), 0, share=1.0, cache=True, on=("protect",), lora=False)
    more = measured["fsdp distill/all_gather"] - measured["fsdp plain/all_gather"]
    assert abs(more - cost.wire / 4) <= SMALL
