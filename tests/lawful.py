"""Small strategies, one for each hook, that keep the laws; in a module, so that a second process finds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_ftplus import Batch, Run, Strategy, setting


@dataclass
class L2SP(Strategy):
    """Pull the weights back to where they started."""

    name: ClassVar[str] = "l2sp"
    strength: float = setting(0.1, "pull towards the starting weights", unit="loss per squared distance", low=0)

    def prepare(self, run: Run) -> None:
        self.start = {name: weight.detach().clone() for name, weight in run.weights.items()}

    def before_step(self, run: Run) -> None:
        for name, weight in run.weights.items():
            if weight.grad is not None:
                weight.grad.add_(weight.detach() - self.start[name], alpha=self.strength)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.start)

    def load_state_dict(self, state: dict[str, torch.Tensor], run: Run) -> None:
        self.start = state


@dataclass
class SmallLogits(Strategy):
    """Pull logits towards zero: a loss on outputs."""

    name: ClassVar[str] = "small"
    strength: float = setting(0.1, "pull of logits towards zero", unit="nats per squared logit", low=0)

    def token_loss(self, run: Run, batch: Batch) -> torch.Tensor:
        return self.strength * batch.logits(batch.hidden).square().sum()


@dataclass
class Quarter(Strategy):
    """Draw a share of the training rows from protect."""

    name: ClassVar[str] = "quarter"
    share: float = setting(0.25, "share of protect rows", low=0, high=1)

    def mix(self, run: Run, shares: dict[str, float]) -> dict[str, float]:
        protect = [task for task in shares if task != "learn"]
        return {"learn": 1 - self.share, **{task: self.share / len(protect) for task in protect}}


@dataclass
class Path(Strategy):
    """Hold weights by how much moving them helped an earlier run; records only in the first."""

    name: ClassVar[str] = "path"
    strength: float = setting(100.0, "how firmly they are held", unit="loss per importance", low=0)

    def prepare(self, run: Run) -> None:
        memory = run.memory.load(self.name, run)
        self.held = memory if memory else {}
        self.start = {name: weight.detach().clone() for name, weight in run.weights.items()}
        self.path = {name: torch.zeros_like(weight) for name, weight in run.weights.items()}

    def before_step(self, run: Run) -> None:
        self.before = {
            name: (weight.detach().clone(), weight.grad.clone())
            for name, weight in run.weights.items()
            if weight.grad is not None
        }
        for name, importance in self.held.items():
            run.weights[name].grad.add_(importance * (run.weights[name] - self.start[name]), alpha=self.strength)

    def after_step(self, run: Run) -> None:
        for name, (weight, gradient) in self.before.items():
            self.path[name] -= gradient * (run.weights[name] - weight)

    def finish(self, run: Run) -> None:
        run.memory.save(self.name, {name: path.clamp(min=0) for name, path in self.path.items()}, run)

    def state_dict(self) -> dict[str, torch.Tensor]:
        parts = {"held": self.held, "start": self.start, "path": self.path}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor], run: Run) -> None:
        for part in ("held", "start", "path"):
            setattr(
                self,
                part,
                {key.removeprefix(f"{part}."): tensor for key, tensor in state.items() if key.startswith(f"{part}.")},
            )


@dataclass
class Lopsided(L2SP):
    """Pulls elsewhere on every rank."""

    name: ClassVar[str] = "lopsided"

    def before_step(self, run: Run) -> None:
        super().before_step(run)
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            for weight in run.weights.values():
                weight.grad.add_(0.01)


@dataclass
class Deaf(SmallLogits):
    """Asks the head on the first rank alone, as if no other had a supervised token."""

    name: ClassVar[str] = "deaf"

    def token_loss(self, run: Run, batch: Batch) -> torch.Tensor:
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        return super().token_loss(run, batch) if first else 0.0 * batch.hidden.sum()


@dataclass
class Sorry(Strategy):
    """Fails when all is done."""

    name: ClassVar[str] = "sorry"
    error: ClassVar[type[BaseException]] = KeyError

    def finish(self, run: Run) -> None:
        raise self.error("lost")
