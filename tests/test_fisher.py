"""The Fisher estimators against enumeration, at any batch layout, in any precision, leaving no trace."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from batches import padded, padding_free, random_rows
from peft import LoraConfig, get_peft_model
from reference import drift, empirical_fisher, exact_fisher
from tiny import tiny_llama

from hf_ftplus.errors import DataError, IncompatibleError
from hf_ftplus.fisher import FEW_TOKENS, backward_logits, fisher, random_signs, row_column_sums
from hf_ftplus.testing.alive import Alive
from hf_ftplus.weights import lora, split, trainable

VOCAB = 24


def small(**kwargs):
    """A model whose every next token can be enumerated, with weights large enough to have opinions."""
    model = tiny_llama(layers=1, hidden=16, heads=2, vocab=VOCAB, **kwargs)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    return model


def flat(tensors):
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def mean_of_draws(model, batches, draws, estimator="sign", **kwargs):
    found = [
        flat(fisher(model, batches, trainable(model), estimator=estimator, seed=s, **kwargs).diagonal)
        for s in range(draws)
    ]
    return torch.stack(found).mean(0)


@pytest.fixture(scope="module")
def truth():
    model, rows = small(), random_rows(6, VOCAB)
    return model, rows, flat(exact_fisher(model, padded(rows, 1), trainable(model)))


@pytest.mark.parametrize("layout", ["batch of 1", "padded", "padding-free"])
def test_random_signs_converge_to_the_exact_fisher_at_any_layout(truth, layout):
    model, rows, exact = truth
    batches = {"batch of 1": padded(rows, 1), "padded": padded(rows, 6), "padding-free": padding_free(rows, 3)}[layout]
    found = mean_of_draws(model, batches, 300)
    assert found.sum() / exact.sum() == pytest.approx(1, abs=0.05)
    assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.97


def test_sampled_labels_converge_too(truth):
    model, rows, exact = truth
    found = mean_of_draws(model, padded(rows, 6), 600, "sampled")
    assert found.sum() / exact.sum() == pytest.approx(1, abs=0.1)


def test_squaring_the_gradient_of_a_mean_would_be_caught(truth):
    """The usual mistake under-scales by the number of tokens; the tolerance above is far tighter than that."""
    _model, rows, exact = truth
    tokens = sum(int((labels[1:] != -100).sum()) for _, labels in rows)
    assert exact.sum() / tokens < 0.5 * exact.sum()


def test_empirical_is_per_example(truth):
    model, rows, _ = truth
    found = fisher(model, padded(rows, 4), trainable(model), estimator="empirical").diagonal
    assert torch.allclose(flat(found), flat(empirical_fisher(model, padded(rows, 1), trainable(model))), rtol=1e-4)


def test_empirical_refuses_padding_free_rows():
    model = small()
    with pytest.raises(IncompatibleError, match=r"ewc\.fisher=sign"):
        fisher(model, padding_free(random_rows(2, VOCAB), 2), trainable(model), estimator="empirical")


def test_half_d_F_d_is_the_drift_for_a_small_step(truth):
    model, rows, exact = truth
    moved = small()
    ratios = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            steps = {}
            for (name, weight), origin in zip(trainable(moved).items(), model.parameters(), strict=True):
                steps[name] = 2e-3 * torch.randn(weight.shape, generator=generator)
                weight.copy_(origin + steps[name])
        predicted = 0.5 * (exact * flat(steps).square()).sum().item()
        ratios.append(predicted / drift(model, moved, padded(rows, 6)))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.25)  # the diagonal is right on average over directions


def test_a_tied_embedding_is_squared_once_as_a_whole(truth):
    model, *_ = truth
    assert "lm_head.weight" not in trainable(model)
    assert "model.embed_tokens.weight" in trainable(model)


def test_softcapped_and_scaled_heads_are_followed():
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    size = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**size, head_dim=8, final_logit_softcapping=0.5)),
        GraniteForCausalLM(GraniteConfig(**size, logits_scaling=0.25)),
    ):
        model.eval()
        batches = padded(random_rows(3, VOCAB), 3)
        found = mean_of_draws(model, batches, 150)
        assert found.sum() / flat(exact_fisher(model, batches, trainable(model))).sum() == pytest.approx(1, abs=0.1)


def test_row_and_column_sums_under_lora_are_those_of_the_full_weights():
    base, rows = small(tie=False), random_rows(4, VOCAB, longest=8)
    name = "model.layers.0.mlp.down_proj"
    exact = exact_fisher(base, padded(rows, 4), {name: base.get_submodule(name).weight})[name]
    adapted = get_peft_model(small(tie=False), LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=True))
    plain, adapters = split(adapted)
    assert not plain
    assert list(adapters) == [name]
    draws = [fisher(adapted, padded(rows, 2), plain, adapters, seed=s) for s in range(300)]
    for kind, dim in (("rows", 1), ("columns", 0)):
        found = torch.stack([getattr(draw, kind)[name] for draw in draws]).mean(0).double()
        assert found.sum() / exact.sum() == pytest.approx(1, abs=0.06)
        assert torch.nn.functional.cosine_similarity(found, exact.sum(dim), dim=0) > 0.98


def test_row_and_column_sums_are_exact_for_few_tokens_and_unbiased_for_many():
    model = get_peft_model(tiny_llama(layers=1), LoraConfig(r=2, target_modules=["q_proj"]))
    adapters = lora(model)
    layer = next(iter(adapters.values())).layer
    x = torch.randn(2 * FEW_TOKENS, 32, generator=torch.Generator().manual_seed(0))
    delta = torch.randn(2 * FEW_TOKENS, 32, generator=torch.Generator().manual_seed(1))

    def sums(tokens, draws):
        with row_column_sums(adapters, torch.Generator().manual_seed(2)) as found:
            for _ in range(draws):
                layer(x[:tokens]).backward(delta[:tokens])
        return [total / draws for total in next(iter(found.values()))]

    for tokens, draws, tolerance in ((FEW_TOKENS, 1, 1e-4), (2 * FEW_TOKENS, 400, 0.1)):
        squared = (delta[:tokens].T @ x[:tokens]).square()
        for found, exact in zip(sums(tokens, draws), (squared.sum(1), squared.sum(0)), strict=True):
            torch.testing.assert_close(found, exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize("tokens", [FEW_TOKENS, 2 * FEW_TOKENS])
def test_autocast_leaves_products_of_row_and_column_sums_in_fp32(tokens):
    """Given the same inputs and gradients in bf16; in bf16 they were off by half a per cent."""
    adapters = lora(get_peft_model(tiny_llama(layers=1), LoraConfig(r=2, target_modules=["q_proj"])))
    layer = next(iter(adapters.values())).layer
    x, delta = (torch.randn(tokens, 32, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))

    def sums(autocast):
        with autocast, row_column_sums(adapters, torch.Generator().manual_seed(2)) as found:
            output = layer(x.float())
            output.backward(delta.to(output.dtype))
        return output.dtype, next(iter(found.values()))

    kind, found = sums(torch.autocast("cpu", torch.bfloat16))
    _, exact = sums(nullcontext())
    assert kind == torch.bfloat16
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


@pytest.mark.fault("B7")
def test_bf16_weights_are_accumulated_in_fp32_and_close_to_fp32(truth):
    model, rows, _ = truth
    half = small().to(torch.bfloat16)
    found = fisher(half, padded(rows, 2), trainable(half))
    assert all(tensor.dtype == torch.float32 for tensor in found.diagonal.values())
    whole = fisher(model, padded(rows, 2), trainable(model))
    assert torch.nn.functional.cosine_similarity(flat(found.diagonal), flat(whole.diagonal), dim=0) > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_changes_little_also_where_no_loss_is_scaled(truth, dtype):
    model, rows, _ = truth
    whole = fisher(model, padded(rows, 2), trainable(model)).diagonal
    found = fisher(model, padded(rows, 2), trainable(model), autocast=partial(torch.autocast, "cpu", dtype)).diagonal
    assert torch.nn.functional.cosine_similarity(flat(found), flat(whole), dim=0) > 0.999
    assert flat(found).sum() / flat(whole).sum() == pytest.approx(1, abs=0.02)


def test_checkpointed_layers_give_the_same_fisher(truth):
    model, rows, _ = truth
    plain = flat(fisher(model, padded(rows, 3), trainable(model)).diagonal)
    for reentrant in (False, True):
        saving = small().train()
        saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            saving.enable_input_require_grads()
        assert torch.allclose(flat(fisher(saving, padded(rows, 3), trainable(saving)).diagonal), plain, rtol=1e-5)


def on_every_layer(reentrant=None):
    """LoRA on all layers of a deep model; they checkpoint, `reentrant` or not, unless it is None."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(layers=12), LoraConfig(r=2, target_modules="all-linear")).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("autocast", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["fp32", "bf16"])
def test_checkpointed_layers_give_the_same_row_and_column_sums(autocast):
    batches, found = padded(random_rows(6, 384), 3), []
    for reentrant in (None, False, True):
        model = on_every_layer(reentrant)
        found.append(dict(fisher(model, batches, *split(model), autocast=autocast).named()))
    assert len(found[0]) == 2 * 12 * 7
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_it_holds_no_more_than_a_training_step(reentrant):
    """Inputs of all 84 targets were held until the backward pass came to them: 2.4 times as much."""
    model, batch = on_every_layer(reentrant), padded(random_rows(16, 384, longest=32), 16)[0]
    with Alive() as step:
        backward_logits(model, batch, "sign", torch.Generator())
    model.zero_grad()
    with Alive() as found:
        fisher(model, [batch], *split(model))
    assert 0 < found.most < 1.1 * step.most
    assert found.now == 0


def test_a_layers_output_may_be_changed_in_place_under_lora():
    model = get_peft_model(tiny_llama(layers=1), LoraConfig(r=2, target_modules=["up_proj"]))
    layer = next(iter(lora(model).values())).layer
    found = []
    for twice in (lambda output: output * 2, lambda output: output.mul_(2)):
        with row_column_sums(lora(model), torch.Generator()) as sums:
            twice(layer(torch.ones(2, 32))).sum().backward()
        found.append(next(iter(sums.values())))
    torch.testing.assert_close(*found)


def test_it_leaves_no_trace():
    model = small().train()
    model.config.attention_dropout = 0.5
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fisher(model, padded(random_rows(3, VOCAB), 2), trainable(model))
    assert torch.equal(torch.rand(4), expected)
    assert model.training
    assert all((weight.grad == 1).all() for weight in model.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.fault("D2")
def test_no_supervised_token_and_broken_weights_are_refused():
    model, batches = small(), padded(random_rows(2, VOCAB), 2)
    blank = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches]
    with pytest.raises(DataError, match="No supervised token"):
        fisher(model, blank, trainable(model))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(IncompatibleError, match="not finite"):
        fisher(model, batches, trainable(model))


def test_random_signs_are_fair_and_independent():
    signs = random_signs(torch.Size([4000, 19]), torch.Generator().manual_seed(0))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    covariance = signs.T @ signs / len(signs)
    assert (covariance - torch.eye(19)).abs().max() < 0.08
    assert signs.mean(0).abs().max() < 0.06
