"""Uses all that plugin API 1 offered on its first day. Do not touch it: see README.md beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import click

from hf_ftplus import Batch, Memory, Run, Strategy, hookimpl, setting
from hf_ftplus.errors import DataError, FTPlusError, IncompatibleError, PluginError, StorageError, UsageError

if TYPE_CHECKING:
    import torch

ftplus_api = 1


@dataclass
class Frozen(Strategy):
    """Pull weights to their start, logits to zero, and rows from protect."""

    name: ClassVar[str] = "frozen"

    strength: float = setting(0.1, "how hard it pulls", unit="nats per squared distance", low=0)
    share: float | None = setting(None, "share of protect rows", above=0, high=1)
    mode: str = setting("both", "what it pulls", choices=("both", "weights"))
    rows: int = setting(8, "learn rows to look at", unit="rows", low=1)
    loud: bool = setting(False, "say more")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.calls: list[str] = []
        if self.mode == "weights" and self.loud:
            raise UsageError("frozen.loud says nothing about weights.")

    def refuse(self, run: Run | None) -> None:
        self.calls.append("refuse")
        if run is not None and not run.weights:
            raise IncompatibleError("no weights")

    def mix(self, run: Run, shares: dict[str, float]) -> dict[str, float]:
        self.calls.append("mix")
        if self.share is None:
            return shares
        found = {name: task.role for name, task in run.tasks.items()}
        if not set(shares) <= set(found):
            raise DataError("a share without a task")
        protect = [name for name in shares if found[name] == "protect"]
        return {
            name: self.share / len(protect) if name in protect else shares[name] * (1 - self.share) for name in shares
        }

    def preview(self, run: Run) -> dict[str, float]:
        return {"bytes": 4.0 * sum(weight.numel() for weight in run.weights.values()), "rows": 0.0, "seconds": 0.0}

    def prepare(self, run: Run) -> None:
        self.calls.append("prepare")
        self.start = {name: weight.detach().clone() for name, weight in run.weights.items()}
        self.steps = 0
        self.earlier = run.memory.load(self.name, run) if isinstance(run.memory, Memory) else None
        with run.autocast():
            self.seen = sum(int((batch["labels"] != -100).sum()) for batch in run.learn(self.rows))
        known = (run.model, run.protect, run.device, run.seed, run.tokenizer, run.strategies, run.measuring, run.rows)
        self.known = len(known)

    def token_loss(self, run: Run, batch: Batch) -> torch.Tensor:
        if self.strength == 0 or self.mode == "weights":
            return batch.hidden.sum() * 0.0
        if batch.labels.shape[0] != batch.hidden.shape[0] or "input_ids" not in batch.inputs:
            raise PluginError("a batch without its labels")
        return 0.01 * self.strength * batch.logits(batch.hidden).square().sum()

    def read_gradients(self, run: Run) -> None:
        self.clip = run.clip

    def before_step(self, run: Run) -> None:
        self.rate = run.learning_rate
        for name, weight in run.weights.items():
            if weight.grad is not None and self.strength:
                weight.grad.add_(weight.detach() - self.start[name], alpha=self.strength)

    def after_step(self, run: Run) -> None:
        self.steps = run.step + 1

    def finish(self, run: Run) -> None:
        self.calls.append("finish")
        run.memory.save(self.name, self.start, run)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.start)

    def load_state_dict(self, state: dict[str, torch.Tensor], run: Run) -> None:
        self.calls.append("load_state_dict")
        self.start = {name: state[name].to(weight) for name, weight in run.weights.items()}

    def metrics(self) -> dict[str, float]:
        return {"steps": float(self.steps), "acts": float(self.overrides("before_step"))}


@hookimpl
def ftplus_strategies() -> list[type[Strategy]]:
    return [Frozen]


@click.command()
@click.option("--fail", is_flag=True)
def frozen(fail: bool) -> None:
    """Say hello, or fail as a command of ours does."""
    if fail:
        raise StorageError("frozen found no room. Make some.") if issubclass(StorageError, FTPlusError) else None
    click.echo("hello from ftplus-frozen")
