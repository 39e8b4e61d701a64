"""Claims about fingerprints: one bit, one shape, one blank of a template more, and it is another."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from hf_ftplus.fingerprint import architecture, fingerprint, tokenizer_fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fingerprint_sees_every_bit(dtype, model):
    model.to(dtype)
    before = fingerprint(model)
    assert fingerprint(tiny_llama(dtype=dtype)) == before
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.view(-1)[-1:].view(torch.uint8)[:1].bitwise_xor_(1)
    assert fingerprint(model) != before


def test_the_fingerprint_sees_dtype_shape_and_sign_of_zero():
    one, other = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False)
    torch.nn.init.zeros_(one.weight), torch.nn.init.zeros_(other.weight)
    seen = {fingerprint(one), fingerprint(other)}
    seen.add(fingerprint(one.bfloat16()))
    with torch.no_grad():
        one.weight[0, 0] = -0.0
    seen.add(fingerprint(one))
    assert len(seen) == 4


def test_the_tokenizer_fingerprint_sees_the_template_and_forgets_the_last_padding(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template += " "
    assert tokenizer_fingerprint(tokenizer) != before


def test_the_architecture_sees_how_an_adapter_is_scaled_while_it_acts():
    def adapted(alpha):
        return get_peft_model(tiny_llama(), LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"]))

    one, other = adapted(2), adapted(4)
    assert architecture(one) != architecture(other)
    with one.disable_adapter(), other.disable_adapter():
        assert architecture(one) == architecture(other) == architecture(tiny_llama())
