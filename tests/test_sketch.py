"""A sketch is the same for the same weights in whatever precision and wrapping, and another one after a gentle step."""

from __future__ import annotations

import copy

import pytest
import torch
from batches import padded, random_rows
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ftplus.sketch import ELEMENTS, compare, sketch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LORA = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def base(dtype=FP32, seed=0):
    return tiny_llama(seed, layers=3, hidden=64, dtype=dtype)


def adapted(model=None, size=0.1, **settings):
    """A model with an adapter whose factors are all `size`."""
    model = get_peft_model(model or base(), LoraConfig(**{**LORA, **settings}))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, size, generator=generator)
    return model


def differing(one, other):
    return compare(sketch(one), sketch(other)).differing


def stepped(model, lr, steps=1):
    """A copy after some steps of AdamW."""
    child = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW([weight for weight in child.parameters() if weight.requires_grad], lr=lr)
    for step in range(steps):
        child(**padded(random_rows(4, 384, seed=step), 4)[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return child


# ---- the same --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("now", [FP32, BF16, FP16])
@pytest.mark.parametrize("then", [FP32, BF16, FP16])
def test_saved_and_loaded_in_another_precision_is_the_same(tmp_path, then, now):
    model = base(then)
    model.save_pretrained(tmp_path)
    assert differing(model, type(model).from_pretrained(tmp_path, dtype=now)) == 0
    assert differing(model, copy.deepcopy(model).to(now).float()) == 0


def test_wrapped_and_frozen_is_the_same():
    model = base()
    assert differing(model, torch.compile(base().requires_grad_(False))) == 0
    assert differing(model, get_peft_model(base(), LoraConfig(**LORA))) == 0
    assert differing(model, get_peft_model(base(), LoraConfig(**LORA, modules_to_save=["norm"]))) == 0


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("size", [0.001, 0.3])
def test_an_adapter_is_the_same_on_its_base_in_any_precision(tmp_path, dtype, size):
    model = adapted(size=size)
    model.save_pretrained(tmp_path)
    assert differing(model, PeftModel.from_pretrained(base(dtype), tmp_path, is_trainable=True)) == 0
    assert differing(PeftModel.from_pretrained(base(dtype), tmp_path), model) == 0


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("cast", [FP32, BF16], ids=["adapter in fp32", "adapter in bf16"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["base in fp32", "base in bf16"])
@pytest.mark.parametrize("size", [0.001, 0.3])
def test_a_merged_adapter_is_the_same(dtype, cast, size, safe):
    model = adapted(base(dtype), size)
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(cast) if "lora_" in name else weight.data
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    assert differing(model, merged) == 0
    assert differing(model, copy.deepcopy(merged).to(BF16)) == 0
    assert differing(model, get_peft_model(merged, LoraConfig(**LORA))) == 0  # the next run's own adapter, still zero
    model.merge_adapter(safe_merge=safe)
    assert differing(model, merged) == 0


def test_a_merged_adapter_of_weights_that_stand_on_their_side_is_the_same():
    """GPT-2 keeps its weights as [in, out]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))
    model = adapted(gpt, target_modules=["c_attn"], fan_in_fan_out=True)
    assert differing(model, copy.deepcopy(model).merge_and_unload()) == 0


# ---- not the same ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("now", [FP32, BF16])
@pytest.mark.parametrize("then", [FP32, BF16])
def test_one_gentle_step_is_seen_in_any_precision(then, now):
    child = stepped(base(), 1e-5)
    assert differing(base(then), copy.deepcopy(child).to(now)) >= 10
    assert differing(stepped(base(), 2e-5), child) >= 10


def test_one_gentle_step_of_weights_that_train_in_bf16_is_seen():
    assert differing(base(BF16), stepped(base(BF16), 1e-5)) >= 5


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_few_gentle_steps_of_an_adapter_are_seen(dtype):
    model = adapted()
    child = stepped(model, 1e-4, steps=3)
    assert differing(model, child) >= 10
    assert differing(model, copy.deepcopy(child).merge_and_unload().to(dtype)) >= 5
    assert differing(model, adapted(size=0.11)) >= 100
    assert differing(model, base()) >= 100


@pytest.mark.parametrize(
    "other",
    [
        lambda: base(seed=1),
        lambda: tiny_llama(layers=3, hidden=32),
        lambda: tiny_llama(layers=2, hidden=64),
        lambda: tiny_llama(layers=3, hidden=64, tie=False),
    ],
    ids=["seed", "width", "depth", "untied"],
)
def test_another_model_is_another(other):
    assert differing(base(), other()) >= ELEMENTS


def test_a_model_that_broke_is_another():
    model = base()
    model.model.norm.weight.data.fill_(torch.nan)
    assert differing(base(), model) == ELEMENTS
