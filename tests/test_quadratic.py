"""The pull of a well is the gradient of its penalty, for whole weights and for LoRA, in any precision."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import lora_penalty
from tiny import tiny_llama

from hf_ftplus.quadratic import AdapterWell, Well, inner, pull, starting, state_bytes, wells
from hf_ftplus.weights import Adapter, split


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (600, 500)])  # one piece, and several
def test_the_pull_on_a_weight_is_autograds(dtype, shape):
    start, importance = random(*shape).to(dtype), random(*shape, seed=1).abs()
    weight = torch.nn.Parameter((start + 0.1 * random(*shape, seed=2)).to(dtype))
    wide = weight.detach().float().requires_grad_()
    penalty = 0.5 * (importance * (wide - start.float()).square()).sum()
    penalty.backward()
    weight.grad = torch.zeros_like(weight)
    well = Well(weight, start, importance)
    figures = pull([well], 1.0, True)
    assert torch.allclose(weight.grad.float(), wide.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.allclose(figures, torch.stack([penalty, wide.grad.square().sum(), torch.tensor(0.0)]))


@pytest.mark.parametrize("fresh", [True, False])
def test_the_pull_on_an_adapter_is_autograds_through_the_change_written_out(fresh):
    A, B = torch.nn.Parameter(random(3, 8)), torch.nn.Parameter(random(5, 3, seed=1))
    start = None if fresh else (random(3, 8, seed=2), random(5, 3, seed=3))
    rows, columns = random(5, seed=4).abs(), random(8, seed=5).abs()
    adapter = Adapter(torch.nn.Identity(), A, B, scale=1.7)
    penalty = lora_penalty(adapter, start, rows, columns)
    expected = torch.autograd.grad(penalty, (B, A))
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    well = AdapterWell(adapter, start, rows, columns)
    figures = pull([well], 1.0, True)
    assert torch.allclose(B.grad, expected[0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(A.grad, expected[1], rtol=1e-4, atol=1e-5)
    assert torch.allclose(
        figures, torch.stack([penalty, sum(part.square().sum() for part in expected), torch.tensor(0.0)]), rtol=1e-4
    )


@pytest.mark.parametrize("moved", [1e-4, 1e-2])
def test_the_pull_on_an_adapter_that_has_hardly_moved_is_not_lost_in_rounding(moved):
    """A difference of two large products is all rounding error near the start, where there is most to keep."""
    start = (random(16, 256), random(256, 16, seed=1))
    A, B = (torch.nn.Parameter(it + moved * random(*it.shape, seed=2) * it.std()) for it in start)
    rows, columns = random(256, seed=4).abs(), random(256, seed=5).abs()
    wide = Adapter(torch.nn.Identity(), A.detach().double().requires_grad_(), B.detach().double().requires_grad_(), 1.7)
    penalty = lora_penalty(wide, tuple(it.double() for it in start), rows.double(), columns.double())
    penalty.backward()
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    figures = pull([AdapterWell(Adapter(torch.nn.Identity(), A, B, 1.7), start, rows, columns)], 1.0, True)
    assert figures[0].item() == pytest.approx(penalty.item(), rel=1e-4)
    for ours, exact in ((A.grad, wide.A.grad), (B.grad, wide.B.grad)):
        assert (ours - exact).norm() < 1e-4 * exact.norm()


def test_the_penalty_of_an_adapter_does_not_depend_on_how_its_change_is_split():
    A, B, S = random(3, 8), random(5, 3, seed=1), random(3, 3, seed=2)
    rows, columns = random(5, seed=4).abs(), random(8, seed=5).abs()
    penalty = [
        AdapterWell(
            Adapter(torch.nn.Identity(), torch.nn.Parameter(a), torch.nn.Parameter(b), 2.0), None, rows, columns
        ).penalty()
        for a, b in ((A, B), (S @ A, B @ torch.linalg.inv(S)))
    ]
    assert torch.allclose(*penalty, rtol=1e-3)


def test_state_is_8_bytes_a_weight_and_rows_plus_columns_under_lora():
    model = tiny_llama()
    plain, adapters = split(model)
    assert state_bytes(plain, adapters) == 8 * sum(weight.numel() for weight in model.parameters())
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    plain, adapters = split(adapted)
    assert state_bytes(plain, adapters) == 2 * 4 * (32 + 32)  # two layers
    assert not starting(plain, adapters)  # a fresh adapter needs no start


def test_a_weight_without_gradient_is_left_alone():
    weight = torch.nn.Parameter(random(4))
    assert pull([Well(weight, weight.detach() + 1, torch.ones(4))], 1.0, True) is None
    assert weight.grad is None


def test_wells_cover_modules_saved_whole_beside_the_adapter():
    model = get_peft_model(
        tiny_llama(tie=False), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    plain, adapters = split(model)
    assert set(plain) == {"lm_head.weight"}
    assert len(adapters) == 2
    importance = {"diagonal.lm_head.weight": torch.ones_like(plain["lm_head.weight"])}
    importance |= {f"{kind}.{name}": torch.ones(32) for name in adapters for kind in ("rows", "columns")}
    assert len(wells(plain, adapters, starting(plain, adapters), importance)) == 3


@pytest.mark.parametrize("wells_of", ["weights", "an adapter"])
def test_measuring_changes_no_bit_and_gradients_are_measured_as_found(wells_of):
    found = []
    for measure in (True, False):
        A, B = torch.nn.Parameter(random(30, 800)), torch.nn.Parameter(random(500, 30, seed=1))
        A.grad, B.grad = random(30, 800, seed=6), random(500, 30, seed=7)
        rows, columns = random(500, seed=4).abs(), random(800, seed=5).abs()
        held = {
            "weights": [Well(weight, weight.detach() * 0.9, weight.detach().abs()) for weight in (A, B)],
            "an adapter": [AdapterWell(Adapter(torch.nn.Identity(), A, B, 1.7), None, rows, columns)],
        }[wells_of]
        squares = A.grad.square().sum() + B.grad.square().sum()
        figures = pull(held, 3.0, measure)
        assert (figures is None) == (not measure)
        assert figures is None or torch.allclose(figures[2], squares)
        found.append((A.grad, B.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_weights_that_do_not_lie_in_one_stretch_are_held_too():
    """Transposed views: pieces of one tensor must meet the same pieces of the others."""
    weight = torch.nn.Parameter(random(600, 500).t())
    start, importance = torch.zeros(500, 600), random(500, 600, seed=1).abs()
    weight.grad = torch.zeros(500, 600)
    pull([Well(weight, start, importance)], 2.0, False)
    assert torch.allclose(weight.grad, 2.0 * importance * weight.detach())


def test_a_sum_of_products_is_the_same_wherever_the_numbers_lie():
    """What was read from a file lies otherwise in memory than what was computed."""
    one, other = torch.randn(2, 4099, generator=torch.Generator().manual_seed(0))
    room, found = torch.empty(4099 + 64), set()
    for start in range(17):
        room[start : start + 4099].copy_(one)
        found.add(inner(room[start : start + 4099], other).item())
    assert len(found) == 1
    assert found.pop() == pytest.approx((one.double() @ other.double()).item(), rel=1e-5)
