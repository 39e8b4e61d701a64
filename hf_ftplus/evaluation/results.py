"""What an evaluation found, ready for a table, for JSON and for the retention gate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import UsageError
from .statistics import NOT_MEASURED, Estimate, Flips


@dataclass(frozen=True)
class Level:
    """The figures of one task at one moment, or the change of each."""

    loss: Estimate = NOT_MEASURED
    """Nats per supervised token."""
    token_accuracy: Estimate = NOT_MEASURED
    metric: Estimate = NOT_MEASURED


NOTHING = Level()


@dataclass
class Completion:
    """One question, the answer of the data, and the model's greedy answers; None where none was asked for."""

    prompt: str
    expected: str
    before: str | None = None
    after: str | None = None


@dataclass
class TaskResult:
    """Everything measured on one task. A figure that is None was not measured, or is undefined (see `notes`)."""

    name: str
    role: str
    rows: int
    tokens: int
    metric: str | None = None
    before: Level = NOTHING
    after: Level = NOTHING
    change: Level = NOTHING
    """after - before, paired by row."""
    drift: Estimate = NOT_MEASURED
    """Mean KL(start || now), nats per token."""
    retention: Estimate = NOT_MEASURED
    """after / before of the metric; of token accuracy where the task has no metric."""
    flips: Flips | None = None
    completions: list[Completion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def retention_of(self) -> str:
        return self.metric or "token_accuracy"

    @property
    def kept(self) -> tuple[Estimate, Estimate]:
        """Before and after of the figure that retention compares."""
        return self.score(self.before), self.score(self.after)

    @property
    def change_of_score(self) -> Estimate:
        """Of that figure."""
        return self.score(self.change)

    def score(self, level: Level) -> Estimate:
        """Of one moment: the task's metric, or token accuracy where it has none."""
        return level.metric if self.metric else level.token_accuracy

    @property
    def undefined(self) -> bool:
        """Whether retention has no value because there was nothing to keep."""
        return self.kept[0].value == 0 and self.kept[1].measured

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for strict JSON."""
        return {**asdict(self), "retention_of": self.retention_of}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> TaskResult:
        """The inverse of `to_dict`."""
        facts = {key: value for key, value in facts.items() if key != "retention_of"}
        for name in ("before", "after", "change"):
            facts[name] = Level(**{key: Estimate(**value) for key, value in facts[name].items()})
        for name in ("drift", "retention"):
            facts[name] = Estimate(**facts[name])
        facts["flips"] = Flips(**facts["flips"]) if facts["flips"] else None
        facts["completions"] = [Completion(**item) for item in facts["completions"]]
        return cls(**facts)


@dataclass(frozen=True)
class Kept:
    """What a protect task keeps while training lasts."""

    figure: str
    """The name of the figure that is compared."""
    before: float
    now: float
    drift: float | None = None
    """In nats per token; None where the figure comes without the forward pass that has it."""

    @property
    def share(self) -> float:
        return self.now / self.before

    def __str__(self) -> str:
        return f"{self.share:.3f} of its {self.figure.replace('_', ' ')} ({self.before:.3f} -> {self.now:.3f})"


def retention_gate(results: Iterable[TaskResult], threshold: float) -> list[str]:
    """One sentence for each protect task whose retention is below `threshold`; an empty list means that it held.

    Judged by the point estimate; the sentence shows the interval. A retention that was not measured or is undefined
    cannot pass: a gate that nobody looked through is not open.
    """
    if not (math.isfinite(threshold) and threshold > 0):
        raise UsageError(f"The retention threshold is {threshold}; expected a number above 0, such as 0.95.")
    protected = [result for result in results if result.role == "protect"]
    if not protected:
        return ["No protect task was measured, so there is no retention to hold. Name one with --protect."]
    return [_failure(result, threshold) for result in protected if not _holds(result.retention, threshold)]


def _holds(retention: Estimate, threshold: float) -> bool:
    return retention.value is not None and retention.value >= threshold


def _failure(result: TaskResult, threshold: float) -> str:
    what = result.retention_of.replace("_", " ")
    before, after = (figure.value for figure in result.kept)
    if result.undefined:
        return f"{result.name}: retention is undefined, {what} was 0 before; protect what the model can do."
    if result.retention.value is None:
        return f"{result.name}: retention was not measured ({what}); expected at least {threshold:g}."
    interval = ""
    if result.retention.low is not None:
        interval = f" [{result.retention.low:.3f}, {result.retention.high:.3f}]"
    down = math.floor(round(1000 * result.retention.value, 6)) / 1000  # rounded up, it might read as what was expected
    return (
        f"{result.name}: retention {down:.3f}{interval} ({what} {before:.3f} -> {after:.3f}); "
        f"expected at least {threshold:g}."
    )
