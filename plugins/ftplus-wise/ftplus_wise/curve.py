"""The retention curve: what is lost on protect at each point between start and result, and which point to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ftplus import Run
from hf_ftplus.batches import first_rows
from hf_ftplus.logits import evaluating, hidden_states, lm_head, reshard


@dataclass(frozen=True)
class Point:
    """Losses (nats per token) somewhere between start (alpha 0) and result (alpha 1), or of a repair of the result."""

    alpha: float
    learn: float
    protect: dict[str, float]
    name: str = ""

    @property
    def lost(self) -> float:
        """Mean loss over the protect tasks, all alike."""
        return sum(self.protect.values()) / len(self.protect)

    def __str__(self) -> str:
        return self.name or f"alpha {self.alpha:g}"


def learnt(point: Point, points: Sequence[Point]) -> float | None:
    """Share of what the result learnt that is left at `point`; None where the result learnt nothing."""
    start, end = _ends(points)
    fall = start.learn - end.learn
    return (start.learn - point.learn) / fall if fall > 0 else None


def choose(points: Sequence[Point], keep: float) -> Point:
    """The point with the lowest protect loss of those that keep at least the share `keep` of what was learnt.

    The result itself always does; it is also the answer where nothing was learnt, since there is nothing to weigh.
    """
    _, end = _ends(points)
    shares = {id(point): learnt(point, points) for point in points}
    fit = [point for point in points if point is end or (shares[id(point)] or 0) >= keep]
    return min(fit, key=lambda point: (point.lost, -point.alpha)) if shares[id(end)] is not None else end


def table(points: Sequence[Point], chosen: Point) -> str:
    """Every point on a line, the chosen one marked."""
    tasks = list(points[0].protect)
    lines = [f"{'':18} {'learn':>8} {'learnt':>7}  " + " ".join(f"{task[:12]:>12}" for task in tasks)]
    for point in points:
        share = learnt(point, points)
        left = "-" if share is None else f"{share:.0%}"
        losses = " ".join(f"{point.protect[task]:12.4f}" for task in tasks)
        lines.append(f"{point!s:18} {point.learn:8.4f} {left:>7}  {losses}{'  <- taken' if point is chosen else ''}")
    return "\n".join(lines)


def _ends(points: Sequence[Point]) -> tuple[Point, Point]:
    plain = [point for point in points if not point.name]
    return min(plain, key=lambda point: point.alpha), max(plain, key=lambda point: point.alpha)


@torch.no_grad()
def loss(run: Run, batches: Sequence[dict[str, Tensor]], rows: int) -> float:
    """Nats per supervised token over the first `rows` rows, without dropout; the model is left as found."""
    total, tokens = 0.0, 0
    reshard(run.model)  # FSDP2 keeps the last layers whole after a pass, as they were then
    with evaluating(run.model):
        for batch in first_rows(batches, rows):
            part = {key: value.to(run.device) for key, value in batch.items()}
            with run.autocast():
                hidden, labels = hidden_states(run.model, part)
                head = lm_head(run.model).whole()
                for piece in head.chunks(len(labels)):
                    logits = head(hidden[piece]).float()
                    total += torch.nn.functional.cross_entropy(logits, labels[piece], reduction="sum").item()
            tokens += len(labels)
    reshard(run.model)
    return total / max(tokens, 1)
