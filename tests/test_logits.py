"""Logits at supervised positions are the model's own, whoever wrapped it and however it scales them."""

from __future__ import annotations

import pytest
import torch
from batches import padded, padding_free, random_rows
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_llama
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from hf_ftplus import logits as module
from hf_ftplus.errors import IncompatibleError
from hf_ftplus.fisher import fisher
from hf_ftplus.logits import captured, causal_lm, hidden_states, lm_head, supervised
from hf_ftplus.teacher import Teacher
from hf_ftplus.weights import split

VOCAB = 24
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MODELS = {
    "plain and tied": lambda: tiny_llama(layers=1, vocab=VOCAB),
    "untied": lambda: tiny_llama(layers=1, vocab=VOCAB, tie=False),
    "soft-capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=0.05)),
    "multiplied": lambda: Cohere2ForCausalLM(Cohere2Config(**SIZE, logit_scale=0.25)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZE, logits_scaling=4.0)),
    "capped under another name": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(**SIZE, head_dim=8, lru_width=16, logits_soft_cap=0.05, block_types=("attention",))
    ),
    "below a decoder of its own": lambda: OPTForCausalLM(
        OPTConfig(**SIZE, ffn_dim=16, word_embed_proj_dim=8, max_position_embeddings=64)
    ),
    "with a bias": lambda: PhiForCausalLM(PhiConfig(**SIZE)),
    "under an adapter": lambda: get_peft_model(
        tiny_llama(layers=1, vocab=VOCAB), LoraConfig(r=2, target_modules=["q_proj"])
    ),
}


def batch(size=4):
    return padded(random_rows(size, VOCAB), size)[0]


@pytest.mark.parametrize("kind", MODELS)
def test_head_of_hidden_states_is_what_the_model_says(kind):
    model, rows = MODELS[kind]().eval(), batch()
    if kind == "with a bias":
        torch.nn.init.normal_(model.lm_head.bias)
    with torch.no_grad():
        full = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
        hidden, labels = hidden_states(model, rows)
        found = lm_head(model)(hidden)
    mask = rows["labels"][:, 1:] != -100
    assert torch.equal(labels, rows["labels"][:, 1:][mask])
    assert found.dtype == torch.float32
    assert torch.allclose(found, full[mask].float(), atol=1e-5)


def test_the_tests_models_do_scale():
    """Guards the test above: without the rule the answer would differ."""
    for kind in ("soft-capped", "capped under another name", "multiplied", "divided"):
        head = lm_head(MODELS[kind]())
        assert head.scale != 1 or head.softcap


def test_padding_free_rows_give_the_same_hidden_states():
    model, rows = tiny_llama(layers=1, vocab=VOCAB), random_rows(3, VOCAB)
    with torch.no_grad():
        (one, labels), (other, same) = (
            hidden_states(model, padded(rows, 3)[0]),
            hidden_states(model, padding_free(rows, 3)[0]),
        )
    assert torch.equal(labels, same)
    assert torch.allclose(one, other, atol=1e-5)


def test_chunks_cover_every_position_once(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 5 * VOCAB)
    head = lm_head(tiny_llama(layers=1, vocab=VOCAB))
    hidden = torch.randn(13, 32, generator=torch.Generator().manual_seed(0))
    parts = list(head.chunks(13))
    assert [part.stop - part.start for part in parts[:2]] == [5, 5]
    assert len(parts) == 3
    assert torch.allclose(torch.cat([head(hidden[part]) for part in parts]), head(hidden), atol=1e-6)
    assert list(head.chunks(0)) == []


def test_a_vocabulary_larger_than_a_chunk_goes_one_position_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    assert len(list(lm_head(tiny_llama(layers=1, vocab=VOCAB)).chunks(4))) == 4


def test_gradients_flow_from_hidden_states_into_the_weights():
    model = tiny_llama(layers=1, vocab=VOCAB)
    hidden, _ = hidden_states(model, batch())
    lm_head(model)(hidden).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())


def test_bf16_weights_give_fp32_logits():
    model = tiny_llama(layers=1, vocab=VOCAB, dtype=torch.bfloat16)
    hidden, _ = hidden_states(model, batch())
    assert hidden.dtype == torch.bfloat16
    assert lm_head(model)(hidden).dtype == torch.float32


def test_nothing_supervised_is_nothing():
    rows = batch()
    rows["labels"].fill_(-100)
    hidden, labels = hidden_states(tiny_llama(layers=1, vocab=VOCAB), rows)
    assert hidden.shape == (0, 32)
    assert labels.shape == (0,)


def test_wrappers_are_looked_through():
    model = tiny_llama(layers=1)
    adapted = get_peft_model(tiny_llama(layers=1), LoraConfig(r=2, target_modules=["q_proj"]))
    assert causal_lm(torch.compile(model)) is model
    assert causal_lm(adapted) is adapted.get_base_model()


def test_hooks_are_gone_even_after_an_error():
    model = tiny_llama(layers=1)
    with pytest.raises(ZeroDivisionError), captured(model, print):
        _ = 1 / 0
    assert not model.model._forward_hooks


def test_a_model_without_a_backbone_is_refused_by_name():
    with (
        pytest.raises(IncompatibleError, match="LlamaModel has no backbone"),
        captured(tiny_llama(layers=1).model, print),
    ):
        pass


def test_a_backbone_that_the_forward_pass_goes_by_is_refused_by_name():
    class Alone(type(tiny_llama())):
        def forward(self, input_ids, **kwargs):
            return self.model.embed_tokens(input_ids)

    model = tiny_llama(layers=1, vocab=VOCAB)
    model.__class__ = Alone
    with pytest.raises(IncompatibleError, match="No hidden states were seen of Alone"):
        hidden_states(model, batch())


def test_a_head_that_is_not_the_models_own_is_refused_where_it_is_asked():
    """ModernBertDecoder has a layer between the hidden states and what it calls its output embeddings."""
    small = {**SIZE, "classifier_activation": "gelu", "global_attn_every_n_layers": 1}
    model = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**small)).eval()
    hidden_states(model, batch())
    with pytest.raises(IncompatibleError, match="ModernBertDecoderForCausalLM does not give the model's own logits"):
        hidden_states(model, batch(), check=True)
    for use in (lambda: fisher(model, [batch()], split(model)[0]), lambda: Teacher(model)(batch())):
        with pytest.raises(IncompatibleError, match="does not give the model's own logits"):
            use()


def test_virtual_tokens_are_refused_in_words():
    """Prompt-learning adapters prepend positions, and every label would be matched with another token's state."""
    model = get_peft_model(
        tiny_llama(layers=1, vocab=VOCAB), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    with pytest.raises(IncompatibleError, match="prepend virtual tokens"):
        hidden_states(model, batch())


def test_labels_are_shifted_by_one():
    hidden = torch.arange(8.0).reshape(1, 4, 2)
    found, labels = supervised(hidden, torch.tensor([[-100, 5, -100, 7]]))
    assert torch.equal(found, hidden[0, [0, 2]])
    assert labels.tolist() == [5, 7]
