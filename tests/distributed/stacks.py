"""Every strategy and their stacks in a trainer, on one process, two (DDP), and two that hold shards (FSDP2).

Started by test_stacks.py as `stacks.py WHAT FOLDER RANK`.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import Tensor
from training import LEARN, PROTECT, TASKS, trainer
from two import meet, part

from hf_ftplus import EWC, Run, state
from hf_ftplus.strategies.distill import Distill
from hf_ftplus.strategies.multitask import MultiTask
from hf_ftplus.strategies.replay import Replay
from hf_ftplus.strategies.si import SI
from hf_ftplus.strategy import Memory
from hf_ftplus.tensorfile import whole
from hf_ftplus.weights import trainable

STEPS, CUT, ROWS = 4, 3, 8
"""Of every run; the step it is stopped after, within its second epoch; rows of a step on all ranks together."""


def ewc() -> EWC:
    return EWC(strength=100.0, fisher="empirical", rows=8)


def distill(*, cache: bool) -> Distill:
    return Distill(on="both", share=0.5, strength=10.0, cache=cache)


STACKS: dict[str, Callable[[], list]] = {
    "all": lambda: [MultiTask(mode="equal"), Replay(share=0.25), ewc(), SI(), distill(cache=True)],
    "si": lambda: [SI(strength=0.1)],
    "LoRA": lambda: [Replay(share=0.25), ewc(), distill(cache=False)],
}
"""Each strategy on its own has its law of two processes (`hf_ftplus.testing`); here is what they do together, what SI
does with the memory of a first run, and what a checkpoint must hold. Shards take distill's answers from a cache."""
LEARNT = {"all": TASKS[:12], "si": LEARN, "LoRA": LEARN[:12]}


def model(stack: str, first: Path) -> torch.nn.Module:
    """The starting model: for SI the one that a first run ended with."""
    made = tiny_llama()
    if stack == "si":
        made.load_state_dict(load_file(first / "weights.safetensors"), strict=False)
    if stack == "LoRA":
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = get_peft_model(made, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    return made


def first_run(folder: Path) -> Path:
    """A run of SI that leaves memory, on one process."""
    it = trainer(folder, SI(), protect=None, max_steps=3)
    it.train()
    weights = {name: weight.detach().contiguous() for name, weight in trainable(it.model).items()}
    save_file(weights, folder / "weights.safetensors")
    return folder


def train(stack: str, out: Path, first: Path, resume: str | None = None, shards: bool = False):
    """A finished run; the rows that this rank collated; and what was found."""
    rows: list[int] = []
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    it = trainer(
        out, *STACKS[stack](), model=model(stack, first), protect=PROTECT[:6], max_steps=STEPS,
        learn=LEARNT[stack], memory=first / "ftplus/memory" if stack == "si" else None,
        per_device_train_batch_size=ROWS // world, learning_rate=0.1, adam_epsilon=1.0, max_grad_norm=0.5, logging_steps=1,
        lr_scheduler_type="constant", save_strategy="steps", save_steps=CUT, save_total_limit=4, ddp_timeout=60,
    )  # fmt: skip
    step = it.training_step

    def seen(module: torch.nn.Module, inputs: dict[str, Tensor], *args: Tensor) -> Tensor:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            rows.append(zlib.crc32(repr(ids[mask.bool()].tolist()).encode()))
        return step(module, inputs, *args)

    it.training_step = seen
    it.train(resume_from_checkpoint=resume)
    if shards:
        from torch.distributed.tensor import DTensor

        held = list(it.model.parameters())
        held += [t for s in it.ftplus.strategies if s.name in ("ewc", "si") for t in s.state_dict().values()]
        assert all(isinstance(one, DTensor) and one.to_local().numel() < one.numel() for one in held)
    return it, torch.tensor(rows)


def outcome(it, rows: Tensor) -> dict[str, Tensor]:
    """Weights, state of each strategy, rows and figures."""
    found = {f"weights.{name}": whole(weight) for name, weight in trainable(it.model).items()}
    for strategy in it.ftplus.strategies:
        found |= {f"state.{strategy.name}.{name}": whole(t) for name, t in strategy.state_dict().items()}
    logs = [log for log in it.state.log_history if "loss" in log]
    figures = {key for log in logs for key in log if "/" in key or key == "loss"}
    found |= {f"figure.{key}": torch.tensor([log.get(key, 0.0) for log in logs]) for key in sorted(figures)}
    return {name: tensor.clone() for name, tensor in found.items()} | {"rows": rows}


def uninterrupted(folder: Path, first: Path, stacks: list[str], shards: bool = False) -> dict[str, Tensor]:
    found = {}
    for stack in stacks:
        done = outcome(*train(stack, folder / stack.replace(" ", "-"), first, shards=shards))
        found |= {f"{stack}/{name}": tensor for name, tensor in done.items()}
    return found


def resumed(folder: Path, first: Path, stacks: list[str], shards: bool = False) -> dict[str, Tensor]:
    """From the checkpoints that `uninterrupted` left."""
    found = {}
    for stack in stacks:
        out = folder / stack.replace(" ", "-")
        done = outcome(*train(stack, out, first, str(out / f"checkpoint-{CUT}"), shards))
        found |= {f"resumed {stack}/{name}": tensor for name, tensor in done.items()}
    return found


def ddp(folder: Path) -> dict[str, Tensor]:
    stacks = ["all", "LoRA"]
    return uninterrupted(folder, folder / "first", stacks) | resumed(folder, folder / "first", stacks)


def fsdp(folder: Path) -> dict[str, Tensor]:
    from accelerate import PartialState
    from sharded import FSDP2, as_on_gpus

    os.environ |= FSDP2
    PartialState.__init__ = as_on_gpus
    stacks = ["all", "si"]
    found = uninterrupted(folder, folder / "first", stacks, shards=True)
    return found | resumed(folder, folder / "first", ["all"], shards=True) | taken_over(folder / "one" / "all")


def taken_over(out: Path) -> dict[str, Tensor]:
    """What EWC and SI hold of a checkpoint that one process wrote."""
    from ranks import shards
    from torch.distributed.tensor import DTensor

    it = shards(tiny_llama())
    run = Run(it, trainable(it), {}, lambda rows: [], torch.device("cpu"), 0, Memory())
    states = state.load_checkpoint(out / f"checkpoint-{CUT}/ftplus", state.settings_of(STACKS["all"]()), it, CUT)
    found = {}
    for strategy in (ewc(), SI()):
        strategy.load_state_dict(states[strategy.name], run)
        assert all(isinstance(tensor, DTensor) for tensor in strategy.state_dict().values())
        found |= {f"taken over/{strategy.name}.{k}": whole(t).clone() for k, t in strategy.state_dict().items()}
    return found


if __name__ == "__main__":
    what, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    os.environ["FTPLUS_CACHE"] = str(folder / "cache")
    meet(folder, rank)
    save_file({"ddp": ddp, "fsdp": fsdp}[what](folder), folder / f"rank{rank}.safetensors")
    part()
