"""EWC on two gloo processes, data-parallel and sharded, is EWC on one."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
import two
from tiny import tiny_llama
from transformers import LlamaForCausalLM

from hf_ftplus.sketch import compare, sketch

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).with_name("ranks.py")


launch = partial(two.launch, SCRIPT)


def alone():
    spec = importlib.util.spec_from_file_location("ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def far(one, other) -> float:
    assert one.keys() == other.keys()
    assert one
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def part(found, name):
    return {key.removeprefix(name): tensor for key, tensor in found.items() if key.startswith(name)}


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """Both ranks' results, and one process's."""
    return launch("ddp", tmp_path_factory.mktemp("two")), alone().everywhere(tmp_path_factory.mktemp("one"), 8)


def test_ranks_agree_bit_for_bit_on_weights_and_state(parallel):
    (first, second), _ = parallel
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_two_processes_train_as_one_does_on_the_same_rows(parallel, kind):
    (first, _), one = parallel
    assert far(part(first, f"{kind}/weights."), part(one[kind], "weights.")) < 1e-6


def test_all_ranks_stop_at_the_same_step(parallel):
    (first, second), _ = parallel
    assert first["stopping/step"] == second["stopping/step"] == 3


def test_a_rank_that_looks_later_goes_on_from_where_the_first_does(parallel):
    """By then what was never finished has another name."""
    (first, second), _ = parallel
    assert first["settled"]
    assert second["settled"]


def test_ddp_with_reentrant_checkpointing_works_and_gives_the_same(parallel):
    """A penalty in the loss uses parameters outside the forward pass, and DDP then marks a variable ready twice."""
    (first, _), one = parallel
    assert far(part(first, "reentrant checkpointing/weights."), part(one["full"], "weights.")) < 1e-6


@pytest.mark.parametrize("estimator", ["empirical", "sign"])
@pytest.mark.parametrize("kind", ["fisher", "fisher of LoRA"])
def test_each_rank_does_its_share_of_the_fisher_and_the_sum_is_the_same(parallel, kind, estimator):
    (first, _), one = parallel
    two = part(first, f"{kind}/{estimator}.")
    for name, tensor in part(one[kind], f"{estimator}.").items():
        assert torch.allclose(two[name], tensor, rtol=1e-4, atol=1e-9), name


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    module, model = alone(), tiny_llama()
    one = module.importances(model) | module.held(model, tmp_path_factory.mktemp("one"))
    one |= module.of_teacher(module.lora()) | module.written(model, seed=0)
    for kind in module.MODELS:
        one |= {f"{kind}.{name}": tensor for name, tensor in module.of_head(kind).items()}
    return launch("fsdp", tmp_path_factory.mktemp("two")), one


def test_the_empirical_fisher_of_a_sharded_model_is_that_of_a_whole_one(sharded):
    """Sharding sums gradients over ranks before anybody can square them; examples must still be squared apart."""
    (first, _), one = sharded
    for name, tensor in part(one, "empirical.").items():
        assert torch.allclose(part(first, "empirical.")[name], tensor, rtol=1e-4, atol=1e-8), name


def test_the_random_sign_fisher_of_a_sharded_model_has_the_same_trace(sharded):
    """Two ranks' batches are squared together, which is unbiased and not equal; five rows leave some noise."""
    (first, _), one = sharded
    traces = [sum(tensor.double().sum().item() for tensor in part(found, "sign.").values()) for found in (first, one)]
    assert traces[0] == pytest.approx(traces[1], rel=0.3)


@pytest.mark.parametrize("what", ["empirical.", "loss."])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_head_may_be_sharded_again_before_the_backward_pass(sharded, kind, what):
    """The head is then gathered by hand, and its gradient must be reduced as FSDP's own is."""
    (first, _), one = sharded
    for name, tensor in part(one, f"{kind}.{what}").items():
        assert (part(first, f"{kind}.{what}")[name] - tensor).norm() < 1e-5 * tensor.norm(), name


@pytest.mark.parametrize("what", ["teacher.kl", "teacher.gradient"])
def test_a_teacher_hands_out_its_head_in_one_piece(sharded, what):
    """Kernels take no shards, and ranks with unlike numbers of chunks would wait for one another."""
    (first, second), one = sharded
    for found in (first, second):
        assert torch.allclose(found[what], one[what], rtol=1e-4, atol=1e-7)
        assert found[what].any()


def test_ranks_of_a_sharded_model_write_what_the_first_one_draws(sharded):
    """With unlike draws they would end at unlike lengths, and wait for one another."""
    (first, second), one = sharded
    assert torch.equal(first["written"], one["written"])
    assert torch.equal(second["written"], one["written"])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Where FSDP2 through accelerate wrote, and both ranks' results."""
    folder = tmp_path_factory.mktemp("outputs")
    return folder, launch("outputs", folder)


@pytest.mark.fault("B2")
def test_weights_below_an_adapter_are_told_before_they_are_sharded(outputs):
    alike = alone().origin.frozen(alone().lora())
    assert {bytes(rank["below an adapter"].tolist()).decode() for rank in outputs[1]} == {alike}


def test_what_needs_the_head_trains_a_sharded_model_as_a_whole_one(tmp_path, outputs):
    folder, (first, second) = outputs
    saved = dict(LlamaForCausalLM.from_pretrained(folder).named_parameters())  # when all failed in the end
    assert far(part(first, "rescued."), saved) == 0
    assert far(saved, dict(tiny_llama().named_parameters())) > 1e-4
    one = alone().on_outputs(tmp_path / "one", 8)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for kind in ("tied", "untied"):
        for name in ("small", "ewc"):
            assert far(part(first, f"{kind}.{name}."), part(one, f"{kind}.{name}.")) < 1e-6
        assert far(part(one, f"{kind}.small."), part(one, f"{kind}.ewc.")) > 1e-4
        assert far(part(one, f"{kind}.small."), part(one, f"{kind}.deaf.")) == 0
        assert far(part(first, f"{kind}.small."), part(first, f"{kind}.deaf.")) > 1e-4


def test_the_sketch_of_a_sharded_model_is_that_of_a_whole_one(sharded):
    for found in sharded[0]:
        assert part(found, "sketch.").keys() == sketch(tiny_llama()).keys()
        assert compare(sketch(tiny_llama()), part(found, "sketch.")).differing == 0


@pytest.mark.fault("D8")
@pytest.mark.parametrize("what", ["pull.", "figure.", "saved."])
def test_pulls_figures_and_saved_state_of_a_sharded_model_are_those_of_a_whole_one(sharded, what):
    (first, second), one = sharded
    for found in (first, second):
        for name, tensor in part(one, what).items():
            assert torch.allclose(part(found, what)[name], tensor, rtol=1e-3, atol=1e-7), name


@pytest.mark.parametrize("what", ["pull.", "figure.", "saved."])
def test_weights_that_every_rank_holds_alike_count_once(sharded, what):
    """HSDP: a sum over all ranks would count each replica."""
    (first, second), one = sharded
    for found in (first, second):
        for name, tensor in part(one, what).items():
            assert torch.allclose(part(found, f"copies.{what}")[name], tensor, rtol=1e-3, atol=1e-7), name


@pytest.mark.fault("D8")
def test_a_sharded_model_resumes_from_gathered_state_bit_for_bit(sharded):
    (first, _), _ = sharded
    before, after = part(first, "pull."), part(first, "pull after resume.")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(tensor.any() for tensor in before.values())
