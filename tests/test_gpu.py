"""What only an accelerator can prove. Skipped without one; nothing here has been run on a GPU yet."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama
from training import far, same, trainer, weights_of

from hf_ftplus.facts import most_held

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
pytestmark = gpu


def test_a_step_does_not_wait_for_the_device(tmp_path):
    """Would prove: EWC's before_step launches kernels only; a synchronisation inside it raises."""
    it = trainer(tmp_path, "ewc", use_cpu=False, max_steps=1)
    it.train()
    strategy, run = it.ftplus.strategies[0], it.ftplus.run
    for weight in run.weights.values():
        weight.grad = torch.ones_like(weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for run.measuring in (False, True):
            with torch.no_grad():
                strategy.before_step(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_and_holds(tmp_path, precision):
    """Would prove: gradients are unscaled when the penalty is added, so strength means the same under a loss scaler."""
    held = trainer(tmp_path / "a", ("ewc", {"strength": 1e5}), use_cpu=False, **{precision: True})
    free = trainer(tmp_path / "b", use_cpu=False, **{precision: True})
    held.train(), free.train()
    start = tiny_llama().state_dict()
    moved = [far({k: v.cpu() for k, v in weights_of(it).items()}, start) for it in (held, free)]
    assert 0 < moved[0] < moved[1]


def test_a_report_says_what_the_device_held():
    """Would prove: compare's memory column is that of the GPU."""
    kept = torch.ones(2**20, device="cuda")
    assert most_held(kept.device) >= 4 * kept.numel()


def test_strength_zero_is_bit_identical_on_the_device(tmp_path):
    """Would prove: preparing EWC touches neither weights nor CUDA's random state."""
    zero, plain = (
        trainer(tmp_path / "a", ("ewc", {"strength": 0}), use_cpu=False),
        trainer(tmp_path / "b", use_cpu=False),
    )
    zero.train(), plain.train()
    assert same(weights_of(zero), weights_of(plain))


def test_compiled_and_checkpointed_training_holds(tmp_path):
    """Would prove: torch_compile and both kinds of checkpointing see the same gradients on the device."""
    found = []
    for kwargs in ({}, {"torch_compile": True}, {"gradient_checkpointing": True}):
        it = trainer(tmp_path / str(len(found)), "ewc", use_cpu=False, **kwargs)
        it.train()
        found.append(weights_of(it))
    assert far(found[0], found[1]) < 1e-3
    assert far(found[0], found[2]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_finishing_takes_no_more_memory_than_training(tmp_path, monkeypatch, dtype):
    """Would prove: with Adam's state still there, EWC's last pass has room where training had."""
    model = tiny_llama(hidden=512, layers=4, dtype=dtype)
    it = trainer(tmp_path, "ewc", model=model, use_cpu=False, bf16=dtype == torch.bfloat16)
    ewc, most = it.ftplus.strategies[0], []
    finish = ewc.finish

    def measured(run):
        most.append(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        finish(run)
        most.append(torch.cuda.max_memory_allocated())

    monkeypatch.setattr(ewc, "finish", measured)
    torch.cuda.reset_peak_memory_stats()
    it.train()
    assert most[1] < 1.02 * most[0]
