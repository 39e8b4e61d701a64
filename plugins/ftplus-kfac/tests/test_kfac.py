"""kfac keeps the laws, its factors and gradients are those of a slow loop, and it predicts drift better than EWC."""

from __future__ import annotations

import pytest
import torch
from ftplus_kfac import KFAC, factors, kronecker_penalty, kronecker_pull, thin_pull
from peft import LoraConfig, get_peft_model

from hf_ftplus import EWC, plugins, testing
from hf_ftplus.errors import DataError, IncompatibleError
from hf_ftplus.fisher import backward_logits
from hf_ftplus.testing import check_strategy
from hf_ftplus.testing.alive import Alive
from hf_ftplus.testing.tiny import tiny_llama
from hf_ftplus.testing.training import LEARN, PROTECT, sequence, trainer
from hf_ftplus.weights import split


def test_it_keeps_every_law_and_says_why_it_does_not_travel_light_under_lora():
    check_strategy(KFAC())
    assert "square in the width" in KFAC.judged["breaks"]["travels light"]
    check_strategy(KFAC(), laws=[testing.law_travels_light], peft=False, breaks={})


def test_it_remembers_and_is_silent_at_zero():
    laws = [testing.law_introduces_itself, testing.law_silent_at_zero, testing.law_remembers]
    check_strategy(KFAC(), laws=laws, peft=False, processes=False)


# ---- slow truths -----------------------------------------------------------------------------------------------------


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def test_the_pull_is_the_gradient_of_the_penalty_as_a_sum_over_pairs_of_weights():
    change, outputs, inputs = random(4, 3).requires_grad_(), random(4, 4), random(3, 3)
    outputs, inputs = outputs @ outputs.T, inputs @ inputs.T
    fisher = torch.kron(outputs, inputs)  # of the weights row by row
    wanted = 0.5 * change.flatten() @ fisher @ change.flatten()
    wanted.backward()
    torch.testing.assert_close(kronecker_penalty(change, outputs, inputs), wanted)
    torch.testing.assert_close(kronecker_pull(change.detach(), outputs, inputs), change.grad)


def test_the_thin_pull_is_the_whole_one():
    left, right = random(5, 2).requires_grad_(), random(2, 3).requires_grad_()
    outputs, inputs = random(5, 5, seed=1), random(3, 3, seed=1)
    outputs, inputs = outputs @ outputs.T, inputs @ inputs.T
    wanted = kronecker_penalty(left @ right, outputs, inputs)
    wanted.backward()
    penalty, of_left, of_right = thin_pull(left.detach(), right.detach(), outputs, inputs)
    torch.testing.assert_close(penalty, wanted)
    torch.testing.assert_close(of_left, left.grad)
    torch.testing.assert_close(of_right, right.grad)


def test_an_adapter_that_was_trained_before_is_pulled_exactly_however_little_it_moved(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    it = trainer(tmp_path, KFAC(), model=model, max_steps=1, learning_rate=0.0)
    it.train()
    strategy = it.ftplus.strategies[0]
    drift, total = 0.0, 0.0
    with torch.no_grad():
        for name, adapter in strategy._adapters.items():
            for seed, weight in enumerate((adapter.A, adapter.B)):
                weight.add_(1e-5 * random(*weight.shape, seed=seed)), setattr(weight, "grad", torch.zeros_like(weight))
            drift += strategy._held_adapter(name).double()
            b, a = adapter.B.double(), adapter.A.double()
            old_b, old_a = (strategy._state[f"start.{name}.lora_{part}"].double() for part in "BA")
            factors = (strategy._state[f"{part}.{name}"].double() for part in ("outputs", "inputs"))
            total += kronecker_penalty(adapter.scale * (b @ a - old_b @ old_a), *factors)
    torch.testing.assert_close(drift, total, rtol=1e-4, atol=0.0)


def protect_batch(tmp_path):
    it = trainer(tmp_path, learn=PROTECT[:6], per_device_train_batch_size=6)
    return dict(next(iter(it.get_train_dataloader())))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
def test_factors_are_sums_over_positions_that_a_gradient_reaches(tmp_path, bf16):
    """In fp32, also of the inputs and gradients that autocast makes bf16."""
    model, batch = tiny_llama(), protect_batch(tmp_path)
    layer = model.model.layers[1].mlp.gate_proj
    seen, gradients = [], []

    def look(module, args, output):
        seen.append(args[0].detach())
        output.register_hook(lambda gradient: gradients.append(gradient))

    layer.register_forward_hook(look)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), factors({"it": layer}) as sums:
        backward_logits(model, batch, "sign", torch.Generator().manual_seed(3))
    outputs, inputs, positions = 0, 0, 0
    for x, g in zip(seen[0].flatten(0, 1).float(), gradients[0].flatten(0, 1).float(), strict=True):
        if g.any():
            outputs, inputs, positions = outputs + torch.outer(g, g), inputs + torch.outer(x, x), positions + 1
    assert 0 < positions < batch["input_ids"].numel()
    torch.testing.assert_close(sums["it"], [outputs, inputs, torch.tensor(float(positions))])
    assert len(layer._forward_hooks) == 1  # of this test
    assert gradients[0].dtype == (torch.bfloat16 if bf16 else torch.float32)


def test_under_checkpointing_factors_hold_no_more_inputs_than_a_training_step():
    model = get_peft_model(tiny_llama(layers=12), LoraConfig(r=2, target_modules="all-linear")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    batch, most = testing.tiny_batches(0, 16, 16)[0], []
    for layers in ({}, {name: adapter.layer for name, adapter in split(model)[1].items()}):
        model.zero_grad()
        with Alive() as alive, factors(layers) as sums:
            backward_logits(model, batch, "sign", torch.Generator())
        most.append(alive.most - sum(tensor.nbytes for found in sums.values() for tensor in found))
    assert most[1] < 1.2 * most[0]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_the_gradient_that_is_added_is_that_of_the_penalty_by_autograd(tmp_path, lora):
    peft = LoraConfig(r=3, target_modules=["q_proj", "down_proj"]) if lora else None
    it = trainer(tmp_path, KFAC(strength=7.0), peft_config=peft, max_steps=3, logging_steps=3)
    it.train()
    strategy, run = it.ftplus.strategies[0], it.ftplus.run
    for weight in run.weights.values():
        weight.grad = torch.zeros_like(weight)
    with torch.no_grad():
        strategy.before_step(run)
    added = {name: weight.grad.clone() for name, weight in run.weights.items()}
    state, total = strategy.state_dict(), 0.0
    with torch.enable_grad():
        for name, layer in strategy._layers.items():
            if lora:
                adapter, start = strategy._adapters[name], [state[f"start.{name}.lora_{part}"] for part in "BA"]
                change = adapter.scale * (adapter.B @ adapter.A - start[0] @ start[1])
            else:
                change = layer.weight - state[f"start.{name}"]
            total = total + kronecker_penalty(change, state[f"outputs.{name}"], state[f"inputs.{name}"])
        for name, weight in strategy._others.items():
            total = total + 0.5 * (state[f"diagonal.{name}"] * (weight - state[f"start.{name}"]).square()).sum()
        wanted = torch.autograd.grad(7.0 * total, list(run.weights.values()), allow_unused=True)
    assert total > 0
    for (name, gradient), true in zip(added.items(), wanted, strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-4, atol=1e-7, msg=name)
    assert next(log for log in it.state.log_history if "kfac/penalty" in log)["kfac/predicted_drift"] > 0


def drift(start, now, batch) -> float:
    """KL(start || now) per supervised token."""
    on = batch["labels"][:, 1:] != -100
    one, other = (
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)[on]
        for model in (start, now)
    )
    return (one.exp() * (one - other)).sum(-1).mean().item()


def alike(model):
    copy = tiny_llama()
    copy.load_state_dict(model.state_dict())
    return copy


def test_it_predicts_drift_better_than_the_diagonal_does(tmp_path):
    """After some steps of plain training, which move weights together: the diagonal sees a small part of the drift."""
    taught = trainer(tmp_path / "a", learn=PROTECT, max_steps=60, learning_rate=1e-2, per_device_train_batch_size=8)
    taught.train()
    start = alike(taught.model)
    predicted = {}
    for strategy in (KFAC(strength=1e-9), EWC(strength=1e-9)):
        model = alike(start)
        it = trainer(tmp_path / strategy.name, strategy, model=model, protect=PROTECT, max_steps=2, learning_rate=3e-4,
                     logging_steps=1, max_grad_norm=0.0, optim="sgd")  # fmt: skip
        it.train()
        run, found = it.ftplus.run, it.ftplus.strategies[0]
        for weight in run.weights.values():
            weight.grad = torch.zeros_like(weight)
        with torch.no_grad():
            found.before_step(run)
        predicted[strategy.name] = found.metrics()["predicted_drift"]
        true = drift(start, model.eval(), protect_batch(tmp_path / "b"))
    assert true > 0
    far = {name: abs(torch.tensor(value / true).log().item()) for name, value in predicted.items()}
    assert far["kfac"] < far["ewc"], (predicted, true)


def test_at_the_same_learning_it_keeps_more_than_the_diagonal(tmp_path):
    known, kept, learnt = sequence(tmp_path / "kfac", KFAC(), max_grad_norm=0.0)
    _, kept_by_ewc, learnt_by_ewc = sequence(tmp_path / "ewc", EWC(strength=100), max_grad_norm=0.0)
    assert learnt < learnt_by_ewc + 0.05
    assert kept - known < 0.6 * (kept_by_ewc - known)


# ---- what it refuses -------------------------------------------------------------------------------------------------


def test_nothing_to_protect_and_layers_that_are_too_large_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"kfac has nothing to protect.*--protect self:256"):
        trainer(tmp_path, KFAC(), protect=None)
    peft = LoraConfig(r=3, target_modules=["down_proj"])
    it = trainer(tmp_path, KFAC(largest=40), peft_config=peft, max_steps=1)
    with pytest.raises(IncompatibleError, match=r"down_proj, which has more than 40 rows or columns"):
        it.train()


def test_matrices_that_are_too_large_are_held_by_the_diagonal(tmp_path):
    it = trainer(tmp_path, KFAC(largest=40), max_steps=1, learn=LEARN[:8])
    it.train()
    state = it.ftplus.strategies[0].state_dict()
    assert "outputs.model.layers.0.self_attn.q_proj" in state
    assert "diagonal.model.layers.0.mlp.down_proj.weight" in state
    assert "diagonal.model.embed_tokens.weight" in state  # which the LM head is, too


def test_the_command_line_finds_it():
    assert plugins.load("kfac") is KFAC
