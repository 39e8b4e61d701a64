"""Distillation pulls towards what the teacher says, exactly, at any layout; and the teacher is not the student."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
import time
import weakref
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from batches import padded, padding_free, random_rows
from peft import LoraConfig, get_peft_model
from reference import bucketed, distillation, drift
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from training import LEARN, PROTECT, far, first_gradient, same, sequence, trainer, weights_of
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from hf_ftplus import EWC, Replay, StrategyCallback, attach, divergence, logits
from hf_ftplus.answers import Answers, examples_in, key_of
from hf_ftplus.batches import learn_batches
from hf_ftplus.beside import Examples, beside, tokens_of_rows
from hf_ftplus.divergence import bucketed_kl, forward_kl, likeliest
from hf_ftplus.errors import DataError, IncompatibleError, UsageError
from hf_ftplus.logits import Head, captured, hidden_states, lm_head, supervised
from hf_ftplus.strategies.distill import Distill
from hf_ftplus.strategy import Batch, Memory, Run
from hf_ftplus.teacher import AdapterOff, Frozen, Other, Teacher, adapter_is_zero, copied, prove, same_tokens
from hf_ftplus.testing import check_strategy, law_acts, law_remembers, law_same_anywhere, law_silent_at_zero
from hf_ftplus.weights import trainable

VOCAB = 384
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
MODELS = {
    "plain and tied": lambda: tiny_llama(layers=1),
    "untied": lambda: tiny_llama(layers=1, tie=False),
    "soft-capped (Gemma2)": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.3, attn_implementation="eager")
    ),
    "multiplied (Cohere)": lambda: Cohere2ForCausalLM(Cohere2Config(**SMALL, logit_scale=3.0)),
    "divided (Granite)": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=0.25)),
    "with a bias (Phi)": lambda: PhiForCausalLM(PhiConfig(**SMALL)),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A folder with another, larger model over the student's tokens."""
    folder = tmp_path_factory.mktemp("other")
    tiny_llama(seed=1, hidden=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def shaken(model, size=0.1, seed=3):
    """The same model elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainable(model).values():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=size)
    return model


def lora(model=None, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model or tiny_llama(), LoraConfig(**LORA, **kwargs))


def run_of(model, protect=None, learn=(), **kwargs):
    return Run(
        model, trainable(model), {"it": protect} if protect else {}, lambda rows: list(learn), torch.device("cpu"), 0,
        Memory(), tokenizer=tiny_tokenizer(), **kwargs,
    )  # fmt: skip


def batch_of(model, inputs):
    """What the trainer hands to `token_loss`."""
    hidden, labels = hidden_states(model, inputs)
    return Batch(inputs, hidden, labels, lm_head(model))


def gradients(loss, model):
    found = torch.autograd.grad(loss, list(trainable(model).values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(trainable(model), found, strict=True) if gradient is not None}


def close(one, other, rel=1e-4):
    assert one.keys() == other.keys()
    largest = max(tensor.abs().max() for tensor in other.values())
    assert largest > 0
    for name in other:
        assert (one[name] - other[name]).abs().max() <= rel * largest, name


# ---- the divergence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["ours", "TRL's kernels"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", MODELS)
def test_value_and_gradient_are_those_of_full_logits(kind, temperature, route, monkeypatch):
    """Scaling and soft-capping change both; TRL's kernels are tried in their torch form, as on a CPU."""
    monkeypatch.setattr(divergence, "ELEMENTS", 5 * VOCAB)
    monkeypatch.setattr(divergence, "fused", lambda device: route != "ours")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = shaken(MODELS[kind]().eval(), 0.2, seed=1)
        student = shaken(copy.deepcopy(teacher), 0.2)
    rows = padded(random_rows(4, VOCAB), 4)
    hidden, _ = hidden_states(student, rows[0])
    with torch.no_grad():
        said, _ = hidden_states(teacher, rows[0])
    total, kl = forward_kl(hidden, lm_head(student), said, lm_head(teacher), temperature=temperature)
    expected = distillation(teacher, student, rows, temperature)
    assert expected > 0.1
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (temperature**2 * kl.sum()).item() == pytest.approx(expected.item(), rel=1e-4)
    assert not kl.requires_grad
    close(gradients(3 * total, student), gradients(3 * expected, student))


def test_the_tests_models_do_scale():
    """Guards the test above: without scaling and capping the answer differs."""
    rows = padded(random_rows(4, VOCAB), 4)[0]
    for kind in MODELS:
        student = shaken(MODELS[kind]().eval())
        hidden, _ = hidden_states(student, rows)
        head = lm_head(student)
        bare = Head(head.weight, head.bias)
        differs = forward_kl(hidden, head, hidden.detach(), bare)[0] > 1e-4
        assert differs == any(word in kind for word in ("capped", "multiplied", "divided")), kind


@pytest.mark.parametrize("route", ["ours", "TRL's kernels"])
def test_each_token_counts_what_its_weight_says(route, monkeypatch):
    monkeypatch.setattr(divergence, "fused", lambda device: route != "ours")
    hidden, said = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
    head = Head(torch.randn(VOCAB, 8, generator=torch.Generator().manual_seed(1)))
    weights = torch.arange(7.0)
    hidden.requires_grad_()
    total, kl = forward_kl(hidden, head, said, head, weights=weights)
    assert total.item() == pytest.approx((weights * kl).sum().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(total, hidden)
    for n in range(7):
        (alone,) = torch.autograd.grad(forward_kl(hidden, head, said, head)[0], hidden)
        assert torch.allclose(gradient[n], n * alone[n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("route", ["ours", "TRL's kernels"])
def test_agreement_is_exactly_zero_and_so_is_its_gradient(route, monkeypatch):
    monkeypatch.setattr(divergence, "fused", lambda device: route != "ours")
    hidden = torch.randn(9, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    head = Head(torch.randn(VOCAB, 8, generator=torch.Generator().manual_seed(1)))
    total, _ = forward_kl(hidden, head, hidden.detach(), head)
    assert total.item() == 0
    assert not torch.autograd.grad(total, hidden)[0].any()


def test_a_divergence_far_below_rounding_is_still_right():
    """1e-10 nats, where the textbook sum gives 1e-7 on either side of zero."""
    generator = torch.Generator().manual_seed(0)
    said = torch.randn(64, 8, generator=generator)
    hidden = said + 1e-6 * torch.randn(64, 8, generator=generator)
    head = Head(torch.randn(VOCAB, 8, generator=generator))
    found = forward_kl(hidden, head, said, head)[1]
    p, q = ((states.double() @ head.weight.double().T).log_softmax(-1) for states in (said, hidden))
    exact = (p.exp() * (p - q)).sum(-1)
    assert exact.mean() < 1e-10
    assert (found >= 0).all()
    assert found.mean().item() == pytest.approx(exact.mean().item(), rel=0.1)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_a_token_that_the_teacher_ruled_out_does_not_overflow(temperature):
    """log q - log p of 90 and more, where p e^x is 0 times infinity; the KL is small, and so is the gradient."""
    said = torch.tensor([[0.0, -95.0, -200.0], [0.0, -40.0, -50.0], [0.0, -1.0, -30.0]])
    hidden = torch.tensor([[0.0, -3.0, -3.0], [0.0, 0.0, -1.0], [0.0, -2.0, 5.0]], requires_grad=True)
    head = Head(torch.eye(3))
    p, q = ((states.double() / temperature).log_softmax(-1) for states in (said, hidden.detach()))
    exact = (p.exp() * (p - q)).sum(-1)
    total, found = forward_kl(hidden, head, said, head, temperature=temperature)
    assert found.tolist() == pytest.approx(exact.tolist(), rel=1e-4)
    assert torch.autograd.grad(total, hidden)[0].isfinite().all()
    kept = bucketed_kl(hidden, head, *likeliest(said, head, 2, temperature=temperature), temperature=temperature)[1]
    assert kept.tolist() == pytest.approx(exact.tolist(), rel=1e-3)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that anything makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("kept", [False, True], ids=["live", "kept"])
def test_no_tensor_is_larger_than_a_chunk_of_logits_forward_or_backward(kept, monkeypatch):
    monkeypatch.setattr(divergence, "ELEMENTS", 8 * VOCAB)
    hidden, said = torch.randn(2, 200, 4)
    head = Head(torch.randn(VOCAB, 4, requires_grad=True))
    answers = likeliest(said, head, 5)
    hidden.requires_grad_()
    with Largest() as seen:
        total, _ = bucketed_kl(hidden, head, *answers) if kept else forward_kl(hidden, head, said, head)
        total.backward()
    assert hidden.grad.any()
    assert head.weight.grad.any()
    assert seen.numel == 8 * VOCAB  # all logits would be 200 * VOCAB


def test_bf16_autocast_changes_little():
    generator = torch.Generator().manual_seed(0)
    said = torch.randn(50, 16, generator=generator)
    hidden = said + 0.3 * torch.randn(50, 16, generator=generator)
    head = Head(torch.randn(VOCAB, 16, generator=generator) * 0.3)
    found = []
    for autocast in (False, True):
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total, _ = forward_kl(leaf, head, said, head)
        found.append((total.item(), torch.autograd.grad(total, leaf)[0]))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.03)
    assert torch.nn.functional.cosine_similarity(found[0][1].flatten(), found[1][1].flatten(), dim=0) > 0.999


# ---- the kept answers ------------------------------------------------------------------------------------------------


def test_tokens_in_one_bucket_hide_a_difference_and_never_add_one():
    """Value and gradient against the definition; at k = V the bucket is empty and the KL exact."""
    generator = torch.Generator().manual_seed(0)
    said = torch.randn(6, 8, generator=generator)
    hidden = (said + 0.5 * torch.randn(6, 8, generator=generator)).requires_grad_()
    weight = torch.randn(40, 8, generator=generator).requires_grad_()
    head = Head(weight)
    exact = forward_kl(hidden, head, said, head)[1]
    before = torch.zeros(6)
    for count in (1, 4, 16, 39, 40, 100):
        tokens, log_probs = likeliest(said, head, count, temperature=1.5)
        total, kl = bucketed_kl(hidden, head, tokens, log_probs, temperature=1.5)
        p, q = (((states @ weight.T) / 1.5).softmax(-1) for states in (said, hidden))
        expected = bucketed(p.detach(), q, tokens)
        assert torch.allclose(kl, expected, rtol=2e-2, atol=1e-4)  # fp16 on disk
        for one, another in zip(
            torch.autograd.grad(total, [hidden, weight]),
            torch.autograd.grad(1.5**2 * expected.sum(), [hidden, weight]),
            strict=True,
        ):
            assert (one - another).abs().max() < 5e-3 * another.abs().max()
        plain = bucketed_kl(hidden, head, *likeliest(said, head, count))[1]
        assert (plain >= before - 1e-3).all()
        assert (plain <= exact + 1e-3).all()
        before = plain
    assert torch.allclose(before, exact, rtol=1e-2, atol=1e-4)


def test_a_sure_teacher_and_a_sure_student_leave_no_rounding_error():
    """The tail holds 1e-9: taken as 1 - the rest it would be nothing but rounding."""
    head = Head(torch.eye(20) * 20)
    said, hidden = torch.zeros(1, 20), torch.zeros(1, 20)
    said[0, 3], hidden[0, 3] = 1.0, 1.05
    answers = likeliest(said, head, 1)
    leaf = hidden.requires_grad_()
    total, kl = bucketed_kl(leaf, head, *answers)
    p, q = ((states.double() @ head.weight.double().T).softmax(-1) for states in (said, hidden))
    assert kl.item() == pytest.approx(bucketed(p, q, answers[0]).item(), rel=0.05)
    assert torch.autograd.grad(total, leaf)[0].isfinite().all()


def test_rows_that_are_more_than_tokens_are_not_told_apart_by_them():
    """Two images with one question would share an answer."""
    (batch,) = padded(random_rows(2, VOCAB), 2)
    with pytest.raises(IncompatibleError, match=r"these also have pixel_values.*cache=false"):
        examples_in({**batch, "pixel_values": torch.zeros(2, 3, 4, 4)})


def test_an_example_has_the_same_key_in_any_batch():
    rows = random_rows(5, VOCAB)
    layouts = [padded(rows, 5), padded(rows, 2), padding_free(rows, 5), padding_free(rows, 2)]
    left = padded(rows, 5)[0]
    left = {key: torch.stack([row.roll(-int((~m.bool()).sum())) for row, m in zip(t.flip(1), left["attention_mask"], strict=True)]).flip(1) for key, t in left.items()}  # fmt: skip
    layouts.append([left])
    keys = [[key_of(example) for batch in batches for example in examples_in(batch)] for batches in layouts]
    assert all(found == keys[0] for found in keys[:4])
    assert len(set(keys[0])) == 5
    changed = padded([(rows[0][0], rows[0][1].clone().fill_(-100)), *rows[1:]], 5)
    assert key_of(examples_in(changed[0])[0]) != keys[0][0]
    whole = [(ids, ids.clone()) for ids, _ in rows]  # plain text: a first label that nothing predicts
    assert examples_in(padded(whole, 5)[0]) == examples_in(padding_free(whole, 5)[0])


def test_answers_come_back_in_the_order_of_the_labels(tmp_path):
    rows = random_rows(6, VOCAB)
    model = tiny_llama()
    store = Answers(tmp_path / "store")
    for batch in padded(rows[:4], 2):
        assert store.lacks(batch)
        store.add(batch, *likeliest(*Teacher(model)(batch), 3))
    store.write()
    shuffled = [rows[i] for i in (3, 0, 2, 1)]
    for batch in (padded(shuffled, 4)[0], padding_free(shuffled, 4)[0]):
        expected = likeliest(*Teacher(model)(padded(shuffled, 4)[0]), 3)
        found = Answers(tmp_path / "store").to(examples_in(batch), torch.device("cpu"))
        assert torch.equal(found[0], expected[0])
        assert torch.allclose(found[1], expected[1], atol=1e-2)
    with pytest.raises(IncompatibleError, match=r"was not there when distill asked.*cache=false"):
        store.to(examples_in(padded(rows, 6)[0]), torch.device("cpu"))


def test_a_damaged_file_of_answers_is_asked_again(tmp_path, caplog):
    (batch,) = padded(random_rows(2, VOCAB), 2)
    store = Answers(tmp_path)
    store.add(batch, *likeliest(*Teacher(tiny_llama())(batch), 3))
    store.write()
    (path,) = tmp_path.glob("part-*")
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING, "hf_ftplus"):
        assert Answers(tmp_path).lacks(batch)
    assert "is damaged" in caplog.text


# ---- teachers --------------------------------------------------------------------------------------------------------


def says(teacher, batch):
    hidden, head = teacher(batch)
    return head(hidden).log_softmax(-1)


BATCH = padded(random_rows(4, VOCAB, seed=8), 4)[0]


@pytest.mark.parametrize(
    "kind", ["full", "untied", "frozen layer", "LoRA", "LoRA that begins elsewhere", "LoRA and norms"]
)
def test_the_teacher_says_what_the_starting_model_said_however_far_the_student_went(kind):
    model = tiny_llama(tie=kind != "untied")
    if kind == "frozen layer":
        model.model.layers[0].requires_grad_(False)
    if "LoRA" in kind:
        model = lora(model)
    if kind == "LoRA that begins elsewhere":
        shaken(model)
    if kind == "LoRA and norms":
        model.base_model.model.model.norm.weight.requires_grad_(True)
    strategy = Distill(on="learn")
    before = says(Teacher(model), BATCH)
    strategy.prepare(run_of(model))
    assert isinstance(strategy.source, AdapterOff if kind == "LoRA" else Frozen)
    shaken(model.train(), 0.3)
    assert torch.equal(says(strategy.source, BATCH), before)
    assert (says(Teacher(model), BATCH) - before).abs().max() > 0.01
    assert strategy.state_dict().keys() == (set() if kind == "LoRA" else {f"start.{name}" for name in trainable(model)})


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_smaller_copy_says_nearly_the_same_and_one_layer_at_a_time_is_restored(dtype):
    """Drift of the copy itself: 3e-6 nats per token in bf16, 5e-5 in int8, on the tiny model."""
    model = tiny_llama()
    run = run_of(model)
    strategy = Distill(on="learn", teacher_dtype=dtype)
    strategy.prepare(run)
    before, after = says(Teacher(model), BATCH), says(strategy.source, BATCH)
    kl = (before.exp() * (before - after)).sum(-1).mean()
    assert 0 < kl < {"bfloat16": 1e-5, "int8": 2e-4}[dtype]
    seen = Counter()
    layers = model.model.layers
    hooks = [
        layer.register_forward_hook(
            lambda module, *_, layer=layer: seen.update(any(w.requires_grad for w in it.parameters()) for it in layers)
        )
        for layer in layers
    ]
    says(strategy.source, BATCH)
    assert seen[False] <= 2 * len(layers)
    assert seen[True] >= 2
    for hook in hooks:
        hook.remove()
    assert all(weight is run.weights[name] for name, weight in trainable(model).items())
    held = sum(tensor.numel() * tensor.element_size() for tensor in strategy.state_dict().values())
    assert held < {"bfloat16": 0.51, "int8": 0.38}[dtype] * 4 * sum(weight.numel() for weight in model.parameters())
    assert strategy.preview(run)["bytes"] == held


def test_int8_keeps_the_largest_weight_of_each_row_and_rounds_the_others():
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.54, 0.013], [0.0, 0.0, 0.0]]))
    copies = copied({"w": weight}, "int8", "same")
    assert copies["start.w"].tolist() == [[50, -127, 1], [0, 0, 0]]
    assert copies["scale.w"][0].item() == pytest.approx(0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a copy kept off the device wants a device")
def test_a_copy_on_the_cpu_is_sent_layer_by_layer():
    """Would prove that the answers are the same and that no more than a layer and the embeddings are held twice."""
    model = tiny_llama().cuda()
    strategy = Distill(on="learn", teacher_device="cpu")
    strategy.prepare(run_of(model))
    assert {tensor.device.type for tensor in strategy.state_dict().values()} == {"cpu"}
    before = says(Teacher(model), BATCH)
    shaken(model.cpu(), 0.3).cuda()
    assert torch.equal(says(strategy.source, BATCH), before)


@pytest.mark.parametrize("dtype", ["same", "bfloat16", "int8"])
def test_weights_go_to_the_cpu_one_by_one(dtype):
    """A device that is imagined, by tensors without content: what is new there, and lives, at any time."""
    new, most = weakref.WeakSet(), 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal most
            output = function(*args, **(kwargs or {}))
            aliases = function is torch.ops.aten.detach.default
            if isinstance(output, torch.Tensor) and output.device.type == "xpu" and not aliases:
                new.add(output)
            most = max(most, len(new))
            return output

    with FakeTensorMode():
        weights = {f"w{n}": torch.nn.Parameter(torch.zeros(4, 4, device="xpu:0")) for n in range(12)}
        with Watch():
            copies = copied(weights, dtype, "cpu")
    assert {copy.device.type for copy in copies.values()} == {"cpu"}
    assert most <= {"same": 0, "bfloat16": 1, "int8": 4}[dtype]


def test_a_copy_kept_on_the_cpu_is_the_same_copy_where_all_is_on_the_cpu():
    one, other = (Distill(on="learn", teacher_device=place) for place in ("same", "cpu"))
    model = tiny_llama()
    one.prepare(run_of(model)), other.prepare(run_of(model))
    assert same(one.state_dict(), other.state_dict())


def test_asking_leaves_the_student_as_it_was_even_when_it_fails():
    model = lora(lora_dropout=0.5).train()
    model.base_model.model.model.layers[0].eval()
    teacher = AdapterOff(model)
    modes, wanted = [m.training for m in model.modules()], [w.requires_grad for w in model.parameters()]
    random_numbers, hooks = torch.get_rng_state(), [len(m._forward_hooks) for m in model.modules()]
    first = says(teacher, BATCH)
    assert torch.equal(first, says(teacher, BATCH))  # no dropout
    with pytest.raises(IndexError):
        teacher({**BATCH, "input_ids": BATCH["input_ids"] + VOCAB})
    assert [m.training for m in model.modules()] == modes
    assert [w.requires_grad for w in model.parameters()] == wanted
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert not any(layer._disable_adapters for layer in teacher.layers)
    full = tiny_llama()
    frozen = Frozen(full, trainable(full), copied(trainable(full), "int8", "same"))
    own = list(full.parameters())
    with pytest.raises(IndexError):
        frozen({**BATCH, "input_ids": BATCH["input_ids"] + VOCAB})
    assert all(one is other for one, other in zip(own, full.parameters(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in full.modules())


def test_the_live_student_in_disguise_is_refused(tmp_path):
    model = trainer(tmp_path).model
    weights = trainable(model)
    prove(Frozen(model, weights, copied(weights, "same", "same")), weights)
    for live in (Teacher(model), Frozen(model, weights, {f"start.{name}": w.detach() for name, w in weights.items()})):
        with pytest.raises(IncompatibleError, match=r"is the live student.*cache=true"):
            prove(live, weights)


def test_a_deep_copy_of_a_patched_model_is_refused(tmp_path):
    """TRL puts a forward over the model's own, and a copy of it still calls the original."""
    model = trainer(tmp_path).model
    away = shaken(copy.deepcopy(model))
    assert torch.equal(away(**BATCH).loss, model(**BATCH).loss)
    with pytest.raises(IncompatibleError, match=r"without running its own layers.*distill\.teacher=FOLDER"):
        prove(Other(away.requires_grad_(False)), trainable(model))


def test_a_forward_that_calls_the_student_behind_a_copys_back_is_refused():
    model = tiny_llama()
    disguised = copy.deepcopy(model).requires_grad_(False)
    disguised.model.layers[0].forward = model.model.layers[0].forward
    with pytest.raises(IncompatibleError, match=r"depends on 9 of 20 trained weights \(model.layers.0"):
        prove(Other(disguised), trainable(model))


def test_an_adapter_is_zero_only_if_all_that_trains_is():
    assert adapter_is_zero(lora(), trainable(lora()))
    away = shaken(lora())
    assert not adapter_is_zero(away, trainable(away))
    assert not adapter_is_zero(tiny_llama(), trainable(tiny_llama()))
    for kwargs in ({"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}):
        model = lora(tiny_llama(tie=False), task_type="CAUSAL_LM", **kwargs)
        if kwargs == {"bias": "lora_only"}:
            continue  # Llama has none; the weights above would be the same
        assert not adapter_is_zero(model, trainable(model)), kwargs


# ---- another model as the teacher ------------------------------------------------------------------------------------


def test_another_vocabulary_is_refused_with_its_first_differing_token(tmp_path):
    words = tiny_tokenizer()
    swapped = tiny_tokenizer()
    state = swapped.backend_tokenizer.to_str().replace('"<|im_start|>"', '"<|begin|>"')
    swapped._tokenizer = type(swapped.backend_tokenizer).from_str(state)
    assert len(words.get_vocab()) == len(swapped.get_vocab())  # sizes alone prove nothing
    with pytest.raises(
        IncompatibleError, match=r"'big' has other tokens: 2 means '<\|begin\|>' to it and '<\|im_start"
    ):
        same_tokens(words, swapped, "big")
    more = tiny_tokenizer()
    more.add_tokens(["<extra>"])
    with pytest.raises(IncompatibleError, match=r"means nothing to it and '<extra>' to the student \(1 of"):
        same_tokens(more, words, "big")
    with pytest.raises(UsageError, match="no tokenizer"):
        same_tokens(None, words, "big")
    same_tokens(words, tiny_tokenizer(), "big")
    swapped.save_pretrained(tmp_path), tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(IncompatibleError, match="has other tokens"):
        Distill(on="learn", teacher=str(tmp_path)).prepare(run_of(tiny_llama()))


@pytest.mark.parametrize("longer", ["teacher", "student"])
def test_a_padded_head_is_cut_to_the_tokens_that_both_know(tmp_path, longer):
    sizes = {"teacher": len(tiny_tokenizer()), "student": len(tiny_tokenizer())} | {longer: 400}
    tiny_llama(seed=1, vocab=sizes["teacher"]).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = tiny_llama(vocab=sizes["student"])
    strategy = Distill(on="learn", strength=1.0, teacher=str(tmp_path))
    strategy.prepare(run_of(model))
    batch = padded(random_rows(3, 300), 3)[0]
    found = strategy.token_loss(run_of(model), batch_of(model, batch))
    n = len(tiny_tokenizer())
    p, q = ((says_raw(it, batch)[:, :n]).log_softmax(-1) for it in (strategy.source.model, model))
    assert found.item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4)
    assert gradients(found, model)


def says_raw(model, batch):
    hidden, _ = hidden_states(model, batch)
    return lm_head(model)(hidden).detach()


def test_a_head_too_short_for_its_tokens_is_refused(tmp_path):
    tiny_llama(vocab=300).save_pretrained(tmp_path), tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(IncompatibleError, match=r"300 rows .* tokenizer of \d+ tokens"):
        Distill(on="learn", teacher=str(tmp_path)).prepare(run_of(tiny_llama()))


def test_a_teacher_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"No model at|cannot load the teacher"):
        Distill(on="learn", teacher=str(tmp_path / "none")).prepare(run_of(tiny_llama()))


def test_another_models_cost_is_foreseen_from_its_config(other):
    strategy = Distill(on="learn", teacher=other)
    foreseen = strategy.preview(run_of(tiny_llama()))["bytes"]
    strategy.prepare(run_of(tiny_llama()))
    assert foreseen == strategy.source.bytes() > 100_000


@pytest.mark.parametrize("settings", [{"teacher_dtype": "int8"}, {"teacher_device": "cpu"}])
def test_copies_are_for_the_starting_model(settings):
    with pytest.raises(UsageError, match=r"for a copy of the starting model.*cache=true"):
        Distill(teacher="big", **settings)


# ---- on learn tokens, in real training -------------------------------------------------------------------------------


LAYOUTS = {
    "8 rows at once": {"per_device_train_batch_size": 8},
    "2 rows four times": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "padding-free": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "padding_free": True, "max_length": None},
    "packed": {"per_device_train_batch_size": 8, "packing": True},
    "wrapped": {"per_device_train_batch_size": 8, "packing": True, "packing_strategy": "wrapped"},
    "checkpointed": {"per_device_train_batch_size": 8, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "checkpointed, reentrant": {"per_device_train_batch_size": 8, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_adds_the_gradient_of_the_mean_kl_per_learn_token(tmp_path, layout, other):
    """With another model as the teacher, so that there is a gradient from the start."""
    text = layout in ("padding-free", "packed", "wrapped")
    learn = [{"text": row["prompt"] + row["completion"]} for row in LEARN[:8]] if text else LEARN[:8]
    distill = Distill(on="learn", strength=0.5, teacher=other, temperature=2.0)
    found, it = first_gradient(tmp_path, distill, learn=learn, **LAYOUTS[layout])
    examples = [example for row in it.train_dataset for example in examples_in(it.data_collator([row]))]
    batches = padded([(torch.tensor(e["input_ids"]), torch.tensor(e["labels"])) for e in examples], 1)
    student, teacher = tiny_llama(), tiny_llama(seed=1, hidden=64)
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    task = sum(student(**batch).loss * (batch["labels"][:, 1:] != -100).sum() for batch in batches)
    plain = gradients(task / tokens, student)
    expected = gradients(0.5 * distillation(teacher, student, batches, 2.0) / tokens, student)
    close({name: found[name] - plain[name] for name in found}, expected, rel=1e-3)


@pytest.mark.parametrize("cache", [False, True], ids=["live", "cached"])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if "(" in kind])
def test_training_does_so_with_heads_that_scale_or_cap(tmp_path, kind, cache):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = shaken(MODELS[kind]().eval(), 0.2, seed=1)
    shaken(copy.deepcopy(model), 0.2).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    other = type(model).from_pretrained(tmp_path / "other", attn_implementation="eager").eval()
    how = {"learn": LEARN[:8], "per_device_train_batch_size": 8}
    distill = Distill(on="learn", strength=0.5, teacher=str(tmp_path / "other"), cache=cache, top_k=VOCAB - 1)
    found, it = first_gradient(tmp_path / "one", distill, model=copy.deepcopy(model), **how)
    plain, _ = first_gradient(tmp_path / "two", model=copy.deepcopy(model), **how)
    examples = [example for row in it.train_dataset for example in examples_in(it.data_collator([row]))]
    batches = padded([(torch.tensor(e["input_ids"]), torch.tensor(e["labels"])) for e in examples], 1)
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    expected = gradients(0.5 * distillation(other, model, batches, 1.0) / tokens, model)
    close({name: found[name] - plain[name] for name in found}, expected, rel=1e-2 if cache else 1e-3)


def test_the_logged_kl_is_the_drift_and_the_penalty_its_price(tmp_path):
    it = trainer(tmp_path, Distill(on="learn", strength=3.0), max_steps=2, logging_steps=1, learn=LEARN[:8], per_device_train_batch_size=8, max_grad_norm=0.0)  # fmt: skip
    once = trainer(tmp_path / "once", max_steps=1, learn=LEARN[:8], per_device_train_batch_size=8, max_grad_norm=0.0, lr_scheduler_type="constant")  # fmt: skip
    it.args.lr_scheduler_type = once.args.lr_scheduler_type
    it.train(), once.train()
    first, second = [log for log in it.state.log_history if "distill/kl_learn" in log]
    assert first["distill/kl_learn"] == 0
    batch = it.data_collator([it.train_dataset[i] for i in range(8)])
    measured = drift(tiny_llama(), once.model.eval(), [dict(batch)])
    assert measured > 1e-3
    assert second["distill/kl_learn"] == pytest.approx(measured, rel=1e-3)
    assert second["distill/penalty"] == pytest.approx(3 * measured, rel=1e-3)


def test_the_penalty_is_what_the_loss_got(tmp_path):
    """Two tasks, of which each counts alike however long its rows are: not the mean over their tokens."""
    short, long = PROTECT[:4], [{"prompt": "Tell. ", "completion": "Once there was a dog who slept. " * 4}] * 4
    how = {"max_steps": 3, "logging_steps": 3, "max_grad_norm": 0.0, "protect": {"short": short, "long": long}}
    it = trainer(tmp_path, Distill(on="protect", strength=2.0, share=1.0), **how)
    added, tokens, ask = 0.0, 0, Distill.token_loss

    def asked(strategy, run, batch):
        nonlocal added, tokens
        loss = ask(strategy, run, batch)
        added, tokens = added + loss.item(), tokens + len(batch.labels)
        return loss

    it.ftplus.strategies[0].token_loss = partial(asked, it.ftplus.strategies[0])
    it.train()
    log = next(log for log in it.state.log_history if "distill/penalty" in log)
    assert log["distill/penalty"] == pytest.approx(added / tokens, rel=1e-4)
    assert log["distill/penalty"] != pytest.approx(2 * log["distill/kl_protect"], rel=0.02)


def test_the_student_drops_out_and_the_teacher_does_not():
    model = tiny_llama()
    model.config.attention_dropout = 0.3
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    strategy, run = Distill(on="learn", strength=1.0), run_of(model.train())
    strategy.prepare(run)
    torch.manual_seed(0)
    batch = batch_of(model, BATCH)
    state = torch.get_rng_state()
    assert strategy.token_loss(run, batch) > 0.01  # not agreement: the student is as it trains
    assert torch.equal(torch.get_rng_state(), state)
    assert strategy.source(BATCH)[0].eq(strategy.source(BATCH)[0]).all()


def test_nothing_supervised_adds_nothing(other):
    model = tiny_llama()
    strategy, run = Distill(on="learn", strength=1.0, teacher=other), run_of(model)
    strategy.prepare(run)
    blank = {**BATCH, "labels": torch.full_like(BATCH["labels"], -100)}
    loss = strategy.token_loss(run, batch_of(model, blank))
    assert loss.item() == 0
    loss.backward()


# ---- on protect tokens -----------------------------------------------------------------------------------------------


def task(name="it", count=20):
    return Examples(name, [{"input_ids": [i, i], "labels": [-100, i]} for i in range(count)], 1.0)


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0, 2.5])
def test_the_rows_beside_a_step_are_the_same_however_it_is_split(share):
    tasks = [task("a"), task("b")]
    for step in range(20):
        whole = beside(7, step, range(8), share, tasks)
        assert abs(len(whole) - 8 * share) <= 1
        for size in (1, 2, 4):
            parts = [beside(7, step, range(at, at + size), share, tasks) for at in range(0, 8, size)]
            joined = [(at * size + row, *rest) for at, part in enumerate(parts) for row, *rest in part]
            assert joined == whole


def test_over_many_steps_tasks_are_drawn_alike_and_so_are_their_rows():
    few, many = task("few", 5), task("many", 50)
    drawn = [example for step in range(4000) for _, example, _ in beside(0, step, range(4), 0.25, [few, many])]
    assert len(drawn) == 4000
    counts = [Counter(example["labels"][1] for example in drawn if any(example is it for it in one.examples)) for one in (few, many)]  # fmt: skip
    assert counts[0].total() == pytest.approx(2000, abs=4 * 32)
    assert [len(count) for count in counts] == [5, 50]
    assert max(counts[0].values()) < 1.3 * min(counts[0].values())
    again = [example for step in range(100) for _, example, _ in beside(1, step, range(4), 0.25, [few, many])]
    assert again != drawn[:100]


def test_what_a_micro_batch_adds_is_strength_times_the_kl_of_the_rows_beside_it():
    start = tiny_llama()
    protect = padded(random_rows(6, VOCAB, seed=4), 2)
    model = tiny_llama()
    strategy, run = Distill(strength=5.0, share=0.5), run_of(model, protect)
    strategy.prepare(run)
    assert strategy.protecting
    assert not strategy.learning
    shaken(model)
    run.step = 3
    inputs = padded(random_rows(8, VOCAB, seed=6), 8)[0]
    found = strategy.token_loss(run, batch_of(model, inputs))
    each = [(batch["labels"][:, 1:] != -100).sum().item() for batch in protect]
    mean = sum(each) / 6
    expected = torch.zeros(())
    drawn = beside(run.seed, 3, range(8), 0.5, strategy.tasks)
    assert len(drawn) == 4
    for row, example, _ in drawn:
        learn_tokens = (inputs["labels"][row, 1:] != -100).sum()
        alone = padded([(torch.tensor(example["input_ids"]), torch.tensor(example["labels"]))], 1)
        expected = expected + 5.0 / 0.5 * learn_tokens * distillation(start, model, alone) / mean
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    close(gradients(found, model), gradients(expected, model), rel=1e-3)


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_padding_behind_padding_free_rows_is_no_row(multiple):
    """TRL gives it position 0, like the first token of a row."""
    rows = random_rows(3, VOCAB, seed=6)
    (inputs,) = padding_free(rows, 3)
    pad = -inputs["input_ids"].shape[1] % multiple
    inputs = {
        key: torch.nn.functional.pad(value, (0, pad), value=-100 if key == "labels" else 0)
        for key, value in inputs.items()
        if key != "attention_mask"
    }
    assert tokens_of_rows(inputs).tolist() == tokens_of_rows(padded(rows, 3)[0]).tolist()


def test_padding_free_rows_have_the_same_rows_beside_them_as_padded_ones():
    """Packing lays a micro-batch out as one long row; the learn rows in it count all the same."""
    rows, protect = random_rows(8, VOCAB, seed=6), padded(random_rows(6, VOCAB, seed=4), 2)
    model, found = tiny_llama(), []
    for inputs in (padded(rows, 8)[0], padding_free(rows, 8)[0]):
        strategy, run = Distill(strength=5.0, share=0.5), run_of(model, protect)
        strategy.prepare(run)
        with torch.no_grad():
            for weight, start in zip(model.parameters(), tiny_llama().parameters(), strict=True):
                weight.copy_(start)
        shaken(model)
        found.append(strategy.token_loss(run, batch_of(model, inputs)).item())
        with torch.no_grad():
            for weight, start in zip(model.parameters(), tiny_llama().parameters(), strict=True):
                weight.copy_(start)
    assert found[0] > 0.1
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_smaller_last_micro_batch_takes_the_places_that_are_left():
    strategy, run = Distill(), run_of(tiny_llama(), padded(random_rows(2, VOCAB), 2))
    strategy.prepare(run)
    assert [strategy._place(run, rows) for rows in (8, 8, 3)] == [0, 8, 16]
    run.step = 1
    assert strategy._place(run, 8) == 0


@pytest.mark.parametrize("settings", [{}, {"cache": True, "top_k": VOCAB}], ids=["live", "kept"])
def test_the_start_is_its_own_equal_in_bf16(tmp_path, settings):
    """Student and teacher go through the same precision, whether the teacher answers now or did before."""
    model = tiny_llama(tie=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)  # an opinionated head, whose logits bf16 rounds by whole units
    it = trainer(
        tmp_path,
        Distill(on="both", **settings),
        model=model,
        bf16=True,
        learning_rate=0.0,
        max_steps=2,
        max_grad_norm=0.0,
    )
    it.train()
    (log,) = [log for log in it.state.log_history if "distill/kl_learn" in log]
    assert log["distill/kl_learn"] < 1e-6
    assert log["distill/kl_protect"] < 1e-6


def test_the_teacher_is_proven_in_the_precision_that_it_is_asked_in():
    model, seen = tiny_llama(), []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    Distill(on="learn").prepare(run_of(model, autocast=partial(torch.autocast, "cpu", torch.bfloat16)))
    assert seen == [True]


def test_replayed_rows_are_asked_about_too(tmp_path):
    it = trainer(tmp_path, Replay(share=0.25), Distill(on="learn", cache=True))
    it.train()
    assert it.state.global_step == 6


def test_a_teacher_that_is_not_there_is_named(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    run = run_of(tiny_llama(), [BATCH])
    for ask in (Distill(teacher=str(folder)).preview, Distill(teacher=str(folder)).prepare):
        with pytest.raises(DataError, match="distill cannot load the teacher"):
            ask(run)


def test_in_expectation_it_is_the_mean_kl_per_protect_token_for_each_learn_token():
    start, model = tiny_llama(), tiny_llama()
    tasks = {
        "short": padded(random_rows(3, VOCAB, seed=4), 3),
        "long": padded(random_rows(9, VOCAB, longest=30, seed=5), 3),
    }
    run = run_of(model)
    run.protect = tasks
    strategy = Distill(strength=1.0, share=1.0)
    strategy.prepare(run)
    shaken(model, 0.05)
    inputs = padded(random_rows(8, VOCAB, seed=6), 8)[0]
    batch = batch_of(model, inputs)
    found = []
    for run.step in range(60):
        with torch.no_grad():
            found.append(strategy.token_loss(run, batch).item() / len(batch.labels))
    expected = sum(drift(start, model, batches) for batches in tasks.values()) / 2
    spread = torch.tensor(found).std().item() / 60**0.5
    assert sum(found) / 60 == pytest.approx(expected, abs=4 * spread)
    assert spread < 0.1 * expected


@pytest.mark.parametrize("layout", [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {"per_device_train_batch_size": 8, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}], ids=["2 rows four times", "reentrant"])  # fmt: skip
def test_training_is_the_same_at_any_layout(tmp_path, layout):
    """With a strength and a rate at which what the strategy does is 1,000 times the difference."""
    how = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 3}
    ends = []
    for folder, strategies, kwargs in (
        ("a", [Distill(strength=30.0, share=0.5)], {"per_device_train_batch_size": 8}),
        ("b", [Distill(strength=30.0, share=0.5)], layout),
        ("c", [], {"per_device_train_batch_size": 8}),
    ):
        it = trainer(tmp_path / folder, *strategies, **how, **kwargs)
        it.train()
        ends.append(weights_of(it))
    assert far(ends[0], ends[2]) > 1e-3
    assert far(ends[0], ends[1]) < 1e-6


def test_padding_free_protect_batches_are_taken_apart():
    rows = random_rows(5, VOCAB)
    one, other = (Examples.of("it", batches) for batches in (padded(rows, 5), padding_free(rows, 3)))
    assert one == other


# ---- what it is for --------------------------------------------------------------------------------------------------


def test_with_its_defaults_it_keeps_what_was_known_and_learns_as_much(tmp_path):
    """Measured over two seeds: plain 6.0 and 0.5 nats; on protect 0.55 and 0.37; on learn 2.7 and 0.67."""
    plain, protect, learn = (
        sequence(tmp_path / name, *strategy, max_grad_norm=0.0)[1:]
        for name, strategy in (("plain", []), ("protect", [Distill()]), ("learn", [Distill(on="learn")]))
    )
    assert plain[0] > 4
    assert protect[0] < 0.8
    assert protect[1] < plain[1] + 0.1
    assert learn[0] < 0.6 * plain[0]
    assert learn[1] < plain[1] + 0.4


def test_it_composes_with_ewc(tmp_path):
    ends = []
    for folder, strategies in (
        ("d", ["distill"]),
        ("e", [EWC(strength=1000)]),
        ("both", ["distill", EWC(strength=1000)]),
    ):
        it = trainer(tmp_path / folder, *strategies)
        it.train()
        ends.append(weights_of(it))
    assert far(ends[2], ends[0]) > 1e-4
    assert far(ends[2], ends[1]) > 1e-4


# ---- cache -----------------------------------------------------------------------------------------------------------


def test_kept_answers_train_as_the_live_teacher_does_when_all_tokens_are_kept(tmp_path):
    how = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    live = trainer(tmp_path / "live", Distill(on="both", strength=10.0, share=0.5), **how)
    kept = trainer(tmp_path / "kept", Distill(on="both", strength=10.0, share=0.5, cache=True, top_k=VOCAB), **how)
    plain = trainer(tmp_path / "plain", **how)
    for it in (live, kept, plain):
        it.train()
    effect = far(weights_of(live), weights_of(plain))
    assert effect > 1e-3
    assert far(weights_of(live), weights_of(kept)) < 0.02 * effect
    assert kept.ftplus.strategies[0].source is None


def files(folder):
    return sorted((path.name, path.stat().st_mtime_ns) for path in (folder / "cache" / "teacher").rglob("part-*"))


def test_the_teacher_is_asked_once_whatever_the_order_the_layout_and_the_adapter(tmp_path):
    """Full fine-tuning and a fresh LoRA adapter start from the same model."""
    protect, learn = random_rows(5, VOCAB), random_rows(7, VOCAB, seed=1)

    def prepare(model, protect, learn, **settings):
        strategy = Distill(on="both", cache=True, **settings)
        strategy.prepare(run_of(model, protect, learn))
        assert strategy.source is None
        assert sum(tensor.numel() for tensor in strategy.state_dict().values()) < 100
        return files(tmp_path)

    first = prepare(tiny_llama(), padded(protect, 2), padded(learn, 3))
    assert len(first) == 1
    assert prepare(tiny_llama(), padding_free(protect[::-1], 3), padded(learn[::-1], 2)) == first
    assert prepare(lora(), padded(protect, 5), padded(learn, 7)) == first
    assert len(prepare(tiny_llama(), padded(protect, 2), padded(random_rows(8, VOCAB, seed=1), 3))) == 2
    assert len(prepare(shaken(tiny_llama()), padded(protect, 2), padded(learn, 3))) == 3
    turned = tiny_llama()  # the same weights, and positions that turn otherwise
    turned.config.rope_parameters = {**turned.config.rope_parameters, "rope_theta": 100.0}
    assert len(prepare(turned, padded(protect, 2), padded(learn, 3))) == 4
    assert len(prepare(tiny_llama(), padded(protect, 2), padded(learn, 3), temperature=2.0)) == 5
    assert len(prepare(tiny_llama(), padded(protect, 2), padded(learn, 3), top_k=8)) == 6
    assert type(Distill(cache=True)._starting(run_of(tiny_llama()))) is Teacher  # asked as it stands, not copied


def test_packed_rows_find_their_answers(tmp_path):
    learn = [{"text": row["prompt"] + row["completion"]} for row in LEARN]
    ends = []
    for name, strategies in (("live", [Distill(on="learn", strength=10)]), ("kept", [Distill(on="learn", strength=10, cache=True, top_k=VOCAB)])):  # fmt: skip
        it = trainer(tmp_path / name, *strategies, learn=learn, packing=True, per_device_train_batch_size=2, optim="sgd", learning_rate=0.05, max_grad_norm=0.0)  # fmt: skip
        it.train()
        ends.append(weights_of(it))
    assert far(*ends) < 1e-4


def test_a_larger_teacher_leaves_before_training_and_is_not_needed_to_go_on(tmp_path, other):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    settings = {"on": "learn", "cache": True, "teacher": other}
    it = trainer(tmp_path / "run", Distill(**settings), **saving)
    it.train()
    strategy = it.ftplus.strategies[0]
    assert strategy.source is None
    assert sum(tensor.numel() for tensor in strategy.state_dict().values()) < 100
    again = trainer(tmp_path / "run", Distill(**settings), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert same(weights_of(it), weights_of(again))


def test_going_on_without_the_kept_answers_is_refused(tmp_path, monkeypatch):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path / "run", Distill(on="learn", cache=True), **saving).train()
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(IncompatibleError, match=r"lacks the teacher's answers to 6 of 6 micro-batches.*FTPLUS_CACHE"):
        trainer(tmp_path / "run", Distill(on="learn", cache=True), **saving).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
        )


def test_learn_rows_are_asked_about_a_micro_batch_at_a_time():
    """However many there are: what was asked about is let go."""
    alive, most = weakref.WeakSet(), 0

    def collate(rows):
        nonlocal most
        (batch,) = padded(rows, len(rows))
        alive.add(batch["input_ids"])
        most = max(most, len(alive))
        return batch

    loader = SimpleNamespace(dataset=random_rows(40, VOCAB), collate_fn=collate)
    run = run_of(tiny_llama())
    run.learn = lambda rows: learn_batches(loader, 2, rows)
    strategy = Distill(on="learn", cache=True)
    strategy.prepare(run)
    assert len(run.learn(7)) == 4
    assert sum(len(batch["labels"]) for batch in run.learn(7)) == 7
    assert not any(strategy.answers.lacks(batch) for batch in run.learn(40))
    assert most <= 3


def test_a_micro_batch_that_has_its_answers_is_looked_at_once(monkeypatch):
    looked, lacks = [], Answers.lacks
    monkeypatch.setattr(Answers, "lacks", lambda self, batch: looked.append(batch) or lacks(self, batch))
    some, more = padded(random_rows(3, VOCAB), 1), padded(random_rows(5, VOCAB), 1)
    for protect, looks in ((some, 2 * 3), (more, 5 + 2), (more, 5)):  # all, and again those that were asked about
        looked.clear()
        Distill(cache=True).prepare(run_of(tiny_llama(), protect))
        assert len(looked) == looks


def test_streamed_rows_cannot_be_asked_about_beforehand():
    with pytest.raises(DataError, match=r"streamed or not tokenised. Set cache=false"):
        Distill(on="learn", cache=True).prepare(run_of(tiny_llama()))


def test_the_preview_says_what_the_answers_will_take(tmp_path):
    protect = padded(random_rows(6, VOCAB), 3)
    strategy, run = Distill(cache=True, top_k=8), run_of(tiny_llama(), protect)
    preview = strategy.preview(run)
    assert preview["rows"] == 6
    assert 0 < preview["seconds"] < 60
    strategy.prepare(run)
    held = [part[name] for part in strategy.answers._parts for name in ("tokens", "log_probs")]
    assert preview["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in held)


# ---- stopping and going on, refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"teacher_dtype": "int8"}, {"on": "both"}], ids=str)
def test_a_copy_of_the_start_travels_in_the_checkpoint(tmp_path, settings):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    it = trainer(tmp_path, Distill(strength=5, **settings), **saving)
    it.train()
    again = trainer(tmp_path, Distill(strength=5, **settings), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights_of(it), weights_of(again))
    assert same(it.ftplus.strategies[0].state_dict(), again.ftplus.strategies[0].state_dict())


def test_going_on_without_a_copy_is_refused():
    with pytest.raises(IncompatibleError, match="holds no copy of the starting weights"):
        Distill(on="learn").load_state_dict({}, run_of(tiny_llama()))
    strategy = Distill(on="learn")
    strategy.load_state_dict({}, run_of(shaken(lora())))
    assert isinstance(strategy.source, AdapterOff)


def test_no_protect_data_is_refused_or_means_learn_tokens():
    with pytest.raises(DataError, match=r"--protect self:256.*distill\.on=learn"):
        Distill(on="protect").prepare(run_of(tiny_llama()))
    strategy = Distill()
    strategy.prepare(run_of(tiny_llama()))
    assert strategy.strengths == {"learn": 0.3}
    strategy.prepare(run_of(tiny_llama(), padded(random_rows(2, VOCAB), 2)))
    assert strategy.strengths == {"protect": 3.0}
    unsupervised = padded([(ids, torch.full_like(ids, -100)) for ids, _ in random_rows(2, VOCAB)], 2)
    with pytest.raises(DataError, match="'it' has no supervised token"):
        Distill().prepare(run_of(tiny_llama(), unsupervised))


@pytest.mark.parametrize(
    ("settings", "protects", "usual"),
    [
        ({}, True, 3.0),
        ({}, False, 0.3),
        ({"on": "learn"}, True, 0.3),
        ({"on": "both"}, True, None),
        ({"on": "both", "strength": 2.0}, True, 2.0),
    ],
)
def test_it_has_a_usual_strength_where_it_acts_on_one_kind_of_token(settings, protects, usual):
    assert Distill(**settings)._usual_strength(False, protects) == usual


def test_a_callback_cannot_serve_it():
    with pytest.raises(IncompatibleError, match=r"distill uses token_loss, which a callback cannot serve.*attach"):
        StrategyCallback("distill", protect=PROTECT)


def test_it_is_found_by_name_and_attached_to_any_trainer(tmp_path):
    import trl

    it = attach(trainer(tmp_path, cls=trl.SFTTrainer), ("distill", {"on": "learn"}))
    it.train()
    assert any("distill/kl_learn" in log for log in it.state.log_history)


@pytest.mark.parametrize("setting", [{"strength": -1}, {"temperature": 0}, {"share": 0}, {"top_k": 0}, {"on": "all"}, {"teacher_dtype": "int4"}], ids=str)  # fmt: skip
def test_bad_settings_are_refused_by_name(setting):
    with pytest.raises(UsageError, match=rf"distill\.{next(iter(setting))} is "):
        Distill(**setting)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="TRL's kernels are compiled for an accelerator")
def test_compiled_kernels_agree_with_ours():
    """Would prove that TRL's Triton kernels are what the tests above hold them to be."""
    assert divergence.fused(torch.device("cuda"))
    hidden, said = torch.randn(2, 50, 64, device="cuda")
    head = Head(torch.randn(VOCAB, 64, device="cuda"), scale=0.5, softcap=2.0)
    found = []
    for device in ("cuda", "cpu"):
        leaf = hidden.to(device).requires_grad_()
        there = Head(head.weight.to(device), scale=0.5, softcap=2.0)
        total, _ = forward_kl(leaf, there, said.to(device), there, temperature=2.0)
        found.append((total.item(), torch.autograd.grad(total, leaf)[0].cpu()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)


# ---- two processes ---------------------------------------------------------------------------------------------------


SHARDED = {
    "LoRA": (True, {"on": "both"}),
    "full, kept answers": (False, {"on": "both", "cache": True}),
    "an idle rank": (False, {"on": "protect", "cache": True, "share": 0.125}),
}


def sharded_gradients(rank=0, world=1):
    """Gradients of one step over 8 learn rows, split over ranks of an FSDP2 model away from its start."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    found = {}
    learn = padded(random_rows(8, VOCAB, seed=3), 8)[0]
    mine = {key: tensor[rank * 8 // world : (rank + 1) * 8 // world] for key, tensor in learn.items()}
    for name, (adapter, settings) in SHARDED.items():
        model = lora() if adapter else tiny_llama()
        if world > 1:
            mesh = init_device_mesh("cpu", (world,))
            for layer in logits.causal_lm(model).model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh, reshard_after_forward=True)
        strategy = Distill(**{"strength": 20.0, "share": 0.5, **settings})
        run = run_of(model, padded(random_rows(5, VOCAB, seed=9), 3), [learn])
        strategy.prepare(run)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in run.weights.values():
                noise = torch.randn(weight.shape, generator=generator) * 0.1
                sharded = isinstance(weight, DTensor)
                weight.add_(distribute_tensor(noise, weight.device_mesh, weight.placements) if sharded else noise)
        for module in model.train().modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # as after a step: what was gathered for `prepare` is of before
        run.step = 3
        seen: list[torch.Tensor] = []
        with captured(model, seen.append):
            out = model(**{key: tensor for key, tensor in mine.items() if key != "labels"}, use_cache=False)
        hidden, labels = supervised(seen[-1], mine["labels"])
        loss = strategy.token_loss(run, Batch(mine, hidden, labels, lm_head(model).whole()))
        (loss * world / (learn["labels"][:, 1:] != -100).sum() + 0.0 * out.logits.sum()).backward()
        for key, weight in run.weights.items():
            gradient = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
            found[f"{name}/{key}"] = gradient.clone()
        found |= {f"{name}/{key}": torch.tensor(value) for key, value in strategy.metrics().items()}
    return found


def one_rank(folder: Path, rank: int) -> None:
    """What each of two gloo processes does."""
    torch.set_num_threads(1)
    os.environ["FTPLUS_CACHE"] = str(folder / "cache")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    save_file(sharded_gradients(rank, 2), folder / f"rank{rank}.safetensors")
    full = tiny_llama()
    full.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(IncompatibleError, match=r"reentrant gradient checkpointing DDP.*use_reentrant"):
        Distill().prepare(run_of(full, [BATCH]))
    Distill(on="learn").prepare(run_of(full))
    time.sleep(rank)  # the second one looks when the first has written: what is lacking is decided once, for both
    Distill(cache=True).prepare(run_of(tiny_llama(), padded(random_rows(3, VOCAB, seed=11), 1)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.dist
def test_a_model_in_shards_on_two_processes_has_the_gradients_of_a_whole_one(tmp_path):
    ranks = []
    try:
        for rank in range(2):
            code = f"import test_distill, pathlib; test_distill.one_rank(pathlib.Path({str(tmp_path)!r}), {rank})"
            path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            ranks.append(
                subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, **pipes)
            )
        for process in ranks:
            errors = process.communicate(timeout=120)[1]
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    one, *both = sharded_gradients(), *(load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    for name in SHARDED:
        for found in both:
            close(
                {key: tensor for key, tensor in found.items() if key.startswith(name)},
                {key: tensor for key, tensor in one.items() if key.startswith(name)},
                rel=1e-5,
            )


def test_a_frozen_copy_of_a_model_in_shards_is_refused(tmp_path):
    """FSDP2 would put the live shards back into the module before the teacher has read its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = tiny_llama()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(IncompatibleError, match=r"FSDP2 gathers its own shards.*cache=true"):
            Distill(on="learn").prepare(run_of(model))
        saved = copied(trainable(tiny_llama()), "same", "same")  # by a run whose weights were whole
        with pytest.raises(IncompatibleError, match=r"FSDP2 gathers its own shards.*cache=true"):
            Distill(on="learn").load_state_dict(saved, run_of(model))
    finally:
        torch.distributed.destroy_process_group()


# ---- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.dist
def test_it_keeps_the_laws():
    check_strategy(Distill())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "laws"),
    [
        ({"on": "learn"}, (law_acts, law_same_anywhere)),
        ({"on": "both", "cache": True}, (law_silent_at_zero, law_remembers)),
    ],
    ids=["learn", "kept answers"],
)
def test_it_keeps_the_laws_in_other_ways(settings, laws):
    check_strategy(Distill(**settings), laws=laws, processes=False)
