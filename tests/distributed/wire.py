"""What two gloo processes really send in a training step, and hold; started by test_scaling.py as `wire.py WHAT ...`.

The profiler sees each collective with the shapes of its buffers, also those that DDP starts from C++.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import tiny_llama
from torch import Tensor
from training import PROTECT, trainer
from transformers import TrainerCallback
from two import meet, part

from hf_ftplus.strategies.distill import Distill
from hf_ftplus.weights import local


class Sent(TrainerCallback):
    """Elements of the buffers of each kind of collective in the last step."""

    def __init__(self) -> None:
        self.elements: dict[str, int] = {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
            self.profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps:
            return
        self.profile.stop()
        for event in self.profile.events():
            if event.name.startswith("gloo:"):
                sizes = sum(math.prod(shape) for shape in event.input_shapes if shape)
                kind = event.name.removeprefix("gloo:")
                self.elements[kind] = self.elements.get(kind, 0) + sizes


def held(it) -> dict[str, float]:
    """Bytes of this rank, by what they hold."""
    weights = [local(weight) for weight in it.model.parameters()]
    states = [local(t) for s in it.optimizer.optimizer.state.values() for t in s.values() if t.numel() > 1]
    sizes = {"weights": weights, "optimizer": states}
    return {name: float(sum(t.numel() * t.element_size() for t in tensors)) for name, tensors in sizes.items()}


def step(folder: Path, *strategies, tie: bool = False, **kwargs) -> dict[str, Tensor]:
    sent = Sent()
    it = trainer(
        folder, *strategies, model=tiny_llama(tie=tie), max_steps=2, per_device_train_batch_size=2, logging_steps=1,
        protect=PROTECT[:4] if strategies else None, callbacks=[sent], ddp_timeout=60, **kwargs,
    )  # fmt: skip
    it.train()
    figures = {**held(it), **sent.elements}
    for strategy in it.ftplus.strategies if it.ftplus else ():
        tensors = [local(tensor) for tensor in strategy.state_dict().values()]
        figures[f"state.{strategy.name}"] = sum(t.numel() * t.element_size() for t in tensors)
    return {name: torch.tensor(float(value)) for name, value in figures.items()}


def ddp(folder: Path) -> dict[str, Tensor]:
    return {f"plain/{name}": figure for name, figure in step(folder).items()}


def fsdp(folder: Path) -> dict[str, Tensor]:
    from accelerate import PartialState
    from sharded import FSDP2, as_on_gpus

    os.environ |= FSDP2
    PartialState.__init__ = as_on_gpus
    runs = {
        "plain": step(folder),
        "tied": step(folder, tie=True),
        "accumulated": step(folder, gradient_accumulation_steps=2),
        "all": step(folder, "ewc", "si"),
        "distill": step(folder, Distill(on="protect", share=1.0, cache=True)),
    }
    return {f"{run}/{name}": figure for run, found in runs.items() for name, figure in found.items()}


if __name__ == "__main__":
    what, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    os.environ["FTPLUS_CACHE"] = str(folder / "cache")
    meet(folder, rank)
    save_file({"ddp": ddp, "fsdp": fsdp}[what](folder), folder / f"rank{rank}.safetensors")
    part()
