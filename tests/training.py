"""What tests have beside the trainers of `hf_ftplus.testing.training`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_ftplus import Run, Strategy, setting
from hf_ftplus.testing.tiny import tiny_llama
from hf_ftplus.testing.training import (
    LEARN,
    PROTECT,
    Gradients,
    arguments,
    far,
    first_gradient,
    same,
    sequence,
    trainer,
    weights_of,
)

__all__ = [
    "LEARN", "PROTECT", "TASKS", "Diary", "Gradients", "arguments", "far", "first_gradient", "moved", "same", "sequence", "trainer", "weights_of",
]  # fmt: skip

TASKS = [{**row, "task": "odd" if i % 3 else "even"} for i, row in enumerate(LEARN)]


def moved(it, start: Iterable[torch.Tensor] | None = None) -> float:
    """Distance of the weights from where the tiny model starts."""
    start = start if start is not None else tiny_llama().parameters()
    return (
        sum((a.detach() - b.detach()).square().sum().item() for a, b in zip(it.model.parameters(), start, strict=True))
        ** 0.5
    )


@dataclass
class Diary(Strategy):
    """Writes down when it was called, and with what."""

    name: ClassVar[str] = "diary"
    pages: int = setting(100, "pages to write", unit="pages", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.entries: list[tuple[str, int]] = []
        self.loss_at: list[float] = []

    def note(self, hook: str, run: Run) -> None:
        self.entries.append((hook, run.step))

    def prepare(self, run: Run) -> None:
        self.note("prepare", run)

    def mix(self, run: Run, shares: dict[str, float]) -> dict[str, float]:
        self.note("mix", run)
        return shares

    def token_loss(self, run: Run, batch) -> torch.Tensor:
        self.note("token_loss", run)
        return batch.hidden.sum() * 0.0

    def read_gradients(self, run: Run) -> None:
        self.note("read_gradients", run)

    def before_step(self, run: Run) -> None:
        self.note("before_step", run)

    def after_step(self, run: Run) -> None:
        self.note("after_step", run)

    def finish(self, run: Run) -> None:
        self.note("finish", run)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"entries": torch.tensor(len(self.entries))}

    def load_state_dict(self, state: dict[str, torch.Tensor], run: Run) -> None:
        self.note("load_state_dict", run)

    def metrics(self) -> dict[str, float]:
        return {"entries": float(len(self.entries))}
