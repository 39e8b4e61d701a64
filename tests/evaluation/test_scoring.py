"""Claims about scores and drift: what they are by definition, however the rows are batched."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from evaluation.cases import brute_force, brute_force_kl, moved, sibling
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ftplus import logits as logits_module
from hf_ftplus.errors import IncompatibleError
from hf_ftplus.evaluation.drift import keep_head, kl
from hf_ftplus.evaluation.found import as_found
from hf_ftplus.evaluation.scoring import Start, score
from hf_ftplus.examples import tokenize


@pytest.fixture
def examples(chat_rows, tokenizer):
    return tokenize(chat_rows, tokenizer, None, "chat").examples


def scored(model, examples, batch_size=4, **kwargs):
    with as_found(model):
        return score(model, examples, batch_size, **kwargs)


def start_of(model, examples, batch_size=4) -> Start:
    return Start(keep_head(model), scored(model, examples, batch_size, keep_hidden=True).hidden)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize("tie", [True, False])
def test_loss_and_accuracy_are_those_of_each_row_alone_whatever_the_batch_and_its_padding(examples, batch_size, tie):
    model = moved(tiny_llama(tie=tie), by=0.2)
    found = scored(model, examples, batch_size)
    truth = brute_force(model, examples)
    np.testing.assert_allclose(found.nll, [nll for nll, _, _ in truth], rtol=1e-5)
    assert found.tokens.tolist() == [tokens for _, tokens, _ in truth]
    assert found.correct.tolist() == [correct for _, _, correct in truth]


def test_the_chunks_of_the_head_change_nothing(examples, monkeypatch):
    model = tiny_llama()
    whole = scored(model, examples)
    monkeypatch.setattr(logits_module, "CHUNK", 7 * model.config.vocab_size)
    pieces = scored(model, examples)
    np.testing.assert_allclose(pieces.nll, whole.nll, rtol=1e-6)
    assert pieces.correct.tolist() == whole.correct.tolist()


def test_a_model_without_logits_to_keep_is_scored_the_same_way(examples):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=256, bos_token_id=1, eos_token_id=3)
    model = GPT2LMHeadModel(config).eval()
    np.testing.assert_allclose(scored(model, examples).nll, [r[0] for r in brute_force(model, examples)], rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("tie", [True, False])
def test_drift_is_the_divergence_between_two_models_that_were_both_kept(examples, batch_size, tie):
    model = tiny_llama(tie=tie)
    start = start_of(model, examples, batch_size)
    before = copy.deepcopy(model)
    moved(model)  # in place: the head that was kept must not follow
    found = scored(model, examples, batch_size, start=start)
    np.testing.assert_allclose(found.kl, brute_force_kl(before, model, examples), rtol=1e-4)
    assert found.kl.min() > 0


def test_drift_of_a_lora_model_is_that_to_its_base(examples):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    start = start_of(model, examples)
    moved(model, by=0.3, only_trainable=True)
    found = scored(model, examples, start=start)
    base = tiny_llama()  # the same seed: the base before any adapter
    np.testing.assert_allclose(found.kl, brute_force_kl(base, model, examples), rtol=1e-3)
    assert found.kl.sum() > 1e-3


def test_drift_survives_a_merge_into_the_weights_that_were_frozen_at_the_start(examples):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(tie=False), config)
    start = start_of(model, examples)
    moved(model, by=0.2, only_trainable=True)
    apart = scored(model, examples, start=start).kl
    merged = scored(model.merge_and_unload(), examples, start=start).kl
    np.testing.assert_allclose(merged, apart, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
def test_drift_is_exactly_zero_before_anything_moved(examples, dtype, tie):
    model = tiny_llama(tie=tie, dtype=dtype)
    start = start_of(model, examples)
    assert start.hidden[0].dtype == dtype
    assert scored(model, examples, start=start).kl.tolist() == [0.0] * len(examples)


def test_bf16_scores_are_close_to_those_in_fp32(examples):
    model = tiny_llama()
    exact = scored(model, examples)
    rounded = scored(copy.deepcopy(model).bfloat16(), examples)
    np.testing.assert_allclose(rounded.nll, exact.nll, rtol=0.01)


def test_a_token_that_the_start_rules_out_adds_nothing_and_a_broken_model_shows():
    start = torch.tensor([[0.5, 0.5, 0.0]]).log()
    now = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert kl(start, now).item() == pytest.approx(0.5 * np.log(2))
    assert kl(start, start).item() == 0
    assert kl(start, torch.full((1, 3), torch.nan)).isnan().all()


def test_autocast_reaches_the_forward_pass(examples):
    seen = []

    def autocast():
        seen.append(1)
        return torch.autocast("cpu", torch.bfloat16)

    model = tiny_llama()
    found = scored(model, examples, batch_size=8, autocast=autocast)
    assert len(seen) == -(-len(examples) // 8)
    np.testing.assert_allclose(found.nll, scored(model, examples).nll, rtol=0.01)
    assert not np.array_equal(found.nll, scored(model, examples, batch_size=8).nll)


def test_a_head_that_is_scaled_unseen_is_refused_by_name(examples):
    class Scaled(type(tiny_llama())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 3
            return out

    model = tiny_llama()
    model.__class__ = Scaled
    with pytest.raises(IncompatibleError, match="The LM head of Scaled does not give the model's own logits"):
        scored(model, examples)


def test_another_vocabulary_is_refused_with_both_sizes(examples):
    model = tiny_llama()
    start = start_of(model, examples)
    size = model.config.vocab_size
    with pytest.raises(IncompatibleError, match=f"had {size} tokens before and has {size + 8} now"):
        scored(tiny_llama(vocab=size + 8), examples, start=start)


def test_the_models_own_kl_has_a_direction(examples):
    """Forward KL, start || now: the other direction is another number."""
    model, other = tiny_llama(), sibling(tiny_llama(), by=0.3)
    forward = scored(other, examples, start=start_of(model, examples)).kl.sum()
    backward = scored(model, examples, start=start_of(other, examples)).kl.sum()
    assert forward != pytest.approx(backward, rel=1e-3)
