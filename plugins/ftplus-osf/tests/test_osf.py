"""osf keeps the laws; AdamW leaks out of PEFT's OSF, and nothing leaks where osf puts weights back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from ftplus_osf import OSF, clear, pin, top
from peft import LoraConfig, OSFConfig
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ftplus import plugins, testing
from hf_ftplus.errors import IncompatibleError
from hf_ftplus.testing import check_strategy
from hf_ftplus.testing.tiny import tiny_llama, tiny_tokenizer
from hf_ftplus.testing.training import LEARN, arguments, trainer

STEPS = {"max_steps": 30, "learning_rate": 5e-3, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
TARGETS = ["q_proj", "up_proj", "down_proj"]  # square, tall and wide


def test_it_keeps_every_law():
    check_strategy(OSF())


def test_it_remembers_and_is_silent_at_zero():
    laws = [testing.law_introduces_itself, testing.law_silent_at_zero, testing.law_remembers]
    check_strategy(OSF(), laws=laws, peft=False, processes=False)


def test_the_python_of_its_page_runs(tmp_path):
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    data = {"learn": Dataset.from_list(LEARN), "tokenizer": tiny_tokenizer()}
    known = {"model": tiny_llama(), "args": arguments(tmp_path, max_steps=2), **data}
    exec(compile(block, "README.md", "exec"), known)
    known["trainer"].train()
    assert known["trainer"].state.global_step == 2


# ---- the projections, slowly -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)], ids=str)
def test_pinning_is_the_nearest_weight_with_the_frozen_directions(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    left, values, right = top(start, 0.5)
    moved = start + torch.randn(shape, generator=generator)
    change = moved - start
    free = (torch.eye(shape[0]) - left @ left.T) @ change @ (torch.eye(shape[1]) - right.T @ right)  # by projectors
    square = pin(moved, left, values, right)
    torch.testing.assert_close(moved, start + free, rtol=0, atol=1e-5)
    assert square.item() == pytest.approx((change - free).square().sum().item(), rel=1e-4)
    assert pin(moved, left, values, right) < 1e-9  # once is enough


def test_clearing_leaves_no_part_along_the_directions():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(7, 3, generator=generator)).Q.T
    factor = torch.randn(2, 7, generator=generator)
    wanted = factor @ (torch.eye(7) - directions.T @ directions)
    clear(factor, directions)
    torch.testing.assert_close(factor, wanted)


# ---- leaks -----------------------------------------------------------------------------------------------------------


def leak(it, start) -> float:
    """The largest share, over matrices, of the energy of the change that lies in the top half of the directions."""
    worst, moved = 0.0, 0
    model = it.model.merge_and_unload() if hasattr(it.model, "merge_and_unload") else it.model
    trained = model.state_dict()
    for name, before in start.state_dict().items():
        if not any(f"{target}.weight" in name for target in TARGETS):
            continue
        change = (trained[name].double() - before.double()).float()
        left, _, right = top(before, 0.5)
        outside = change - left @ (left.T @ change)
        outside = outside - outside @ right.T @ right
        worst, moved = max(worst, 1 - (outside.square().sum() / change.square().sum()).item()), moved + 1
    assert moved == 6
    return worst


@pytest.mark.parametrize("kind", ["full", "OSFConfig", "LoRA"])
def test_nothing_leaks_into_the_frozen_directions(tmp_path, kind):
    peft = {
        "full": None,
        "OSFConfig": OSFConfig(target_modules=TARGETS),
        "LoRA": LoraConfig(r=4, target_modules=TARGETS),
    }[kind]
    held = trainer(tmp_path / "held", OSF(), peft_config=peft, **STEPS)
    held.train()
    assert leak(held, tiny_llama()) < 1e-6
    plain = trainer(tmp_path / "plain", peft_config=peft, **STEPS)
    plain.train()
    assert leak(plain, tiny_llama()) > (0.01 if kind == "OSFConfig" else 0.3)  # PEFT's projects gradients
    assert held.state.log_history[-2]["osf/removed"] > 0


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_gpt2_keeps_its_directions_too(tmp_path, kind):
    """Its weights lie as [in, out], and the square ones do not tell."""

    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=64))

    targets = ["c_attn", "attn.c_proj"]
    peft = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True) if kind == "LoRA" else None
    it = trainer(tmp_path, OSF(), model=gpt2(), peft_config=peft, **STEPS | {"max_steps": 5})
    it.train()
    model = it.model.merge_and_unload() if peft else it.model
    for target in targets:
        was, now = (each.transformer.h[0].get_submodule(f"attn.{target[-6:]}").weight.T for each in (gpt2(), model))
        left, _, right = top(was, 0.5)
        change = (now - was).detach()
        assert change.norm() > 0.05
        assert (left.T @ change).norm() < 1e-4 * change.norm()
        assert (change @ right.T).norm() < 1e-4 * change.norm()


def test_a_model_without_a_linear_layer_to_train_is_refused(tmp_path):
    model = tiny_llama()
    for name, weight in model.named_parameters():
        weight.requires_grad_("norm" in name)
    with pytest.raises(IncompatibleError, match="none of LlamaForCausalLM trains"):
        trainer(tmp_path, OSF(), model=model)


def test_it_learns_beside_what_stays(tmp_path):
    held = trainer(tmp_path, OSF(share=0.25), **STEPS)
    held.train()
    assert held.state.log_history[-2]["loss"] < 0.6 * held.state.log_history[0]["loss"]


# ---- what it refuses -------------------------------------------------------------------------------------------------


def test_an_adapter_that_was_trained_without_it_is_refused(tmp_path):
    before = trainer(tmp_path / "before", peft_config=LoraConfig(r=4, target_modules=TARGETS), max_steps=2)
    before.train()
    with pytest.raises(IncompatibleError, match=r"was trained without that. Merge it \(ftplus merge\)"):
        trainer(tmp_path / "after", OSF(), model=before.model)


def test_dora_is_refused(tmp_path):
    with pytest.raises(IncompatibleError, match="Use plain LoRA or rsLoRA, or full fine-tuning"):
        trainer(tmp_path, OSF(), peft_config=LoraConfig(r=4, use_dora=True, target_modules=TARGETS))


def test_the_command_line_finds_it():
    assert plugins.load("osf") is OSF
