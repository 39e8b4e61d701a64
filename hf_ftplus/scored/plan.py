"""What `ftplus eval` is asked for, and the rows that exist before any model loads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset

from ..config import DEFAULTS, metrics_of
from ..errors import FTPlusError, UsageError
from ..evaluation.tasks import Role
from ..evaluation.verdict import MARGIN
from ..measured import HELD_OUT, hold_out
from ..row_checks import spread
from ..rows import noting, of_column, together
from ..specs import TaskSpec, distinct_names, parse_all
from ..tasks import read


@dataclass(frozen=True)
class Asked:
    """One task: where its rows are, and how they are scored."""

    name: str
    role: Role
    spec: TaskSpec
    metric: str | None = None
    own: bool = False
    """Whether a run would learn these rows, or protect with them, too."""
    use: str = ""
    """Of the rows that the first model writes itself, as a run calls it."""


@dataclass(frozen=True)
class Plan:
    """Models, tasks, and how they are measured."""

    models: list[str]
    tasks: list[Asked]
    measure_rows: int = 64
    seed: int = 42
    max_length: int | None = 1024
    batch_size: int = 8
    dtype: str = "auto"
    device: str | None = None
    margin: float = MARGIN
    completions: int = DEFAULTS["completions"]


@dataclass
class Found:
    """The rows of a task, as far as they exist."""

    asked: Asked
    rows: Dataset | None = None
    """None: the first model writes them."""
    notes: list[str] = field(default_factory=list)

    @property
    def unanswered(self) -> bool:
        """Whether the rows are questions alone, measured against what the first model answers."""
        return self.rows is not None and self.rows.column_names == ["prompt"]


def asked(ours: dict[str, Any], others: bool = False, text: str | None = None) -> list[Asked]:
    """Every task under `tasks:`, `protect:` and `measure:` and of the flags of that name.

    Args:
        ours: options as `config.merge` gives them.
        others: something is measured beside these, so there need be none.
        text: the column that a run without `tasks:` learns, its `dataset_text_field`.

    Raises:
        UsageError: no task, a bad one, or a metric for none.
    """
    tasks, faults = read(ours.get("tasks"), shared=False)
    if faults:
        raise UsageError("\n".join(faults))
    protect, measure = parse_all(ours.get("protect", ())), parse_all(ours.get("measure", ()))
    distinct_names([*(task.name for task in tasks), *(spec.name for spec in protect)])
    roles = {"learn": "learn"} | {task.name: task.role for task in tasks} | {spec.name: "protect" for spec in protect}
    own = {task.name: task.spec for task in tasks if task.measure} | {spec.name: spec for spec in protect}
    other = {task.name: task.measure for task in tasks if isinstance(task.measure, TaskSpec)}
    other |= {spec.name: spec for spec in measure}
    if text and not tasks and "learn" in other:
        other["learn"] = replace(other["learn"], through=of_column(text))
    names = list(dict.fromkeys([*own, *other]))
    if not (names or others):
        raise UsageError("There is nothing to measure. Type --measure NAME=DATA, or --config FILE with tasks: in it.")
    metrics = {task.name: task.metric for task in tasks} | metrics_of(ours.get("metric", ()), names)
    written = next((name for name, spec in own.items() if spec.generate), None)
    return [
        Asked(
            name,
            roles.get(name, "measure"),
            other.get(name) or own[name],
            metrics.get(name),
            name not in other,
            f"measure {name}" if name in other else "" if name == written else f"protect {name}",
        )
        for name in names
    ]


def find(plan: Plan) -> list[Found]:
    """The rows of every task.

    Raises:
        DataError: rows that are missing or malformed, of all tasks at once.
    """
    found: list[Found] = []
    faults: list[FTPlusError] = []
    for task in plan.tasks:
        with noting(faults):
            if task.spec.generate:
                found.append(Found(task))
            else:
                found.append(chosen(task, task.spec.load(plan.seed), plan.measure_rows))
    if faults:
        raise together(faults)
    return found


def chosen(task: Asked, rows: Dataset, most: int) -> Found:
    """At most `most` rows, evenly over the whole; of rows that protect those that a run would hold out."""
    notes = []
    if task.own and task.role == "protect":
        total, (_, rows) = len(rows), hold_out(rows, most)
        few = f"measured on rows that may have protected: holding some out takes {HELD_OUT}, there are {total}."
        notes = [few] if len(rows) == total else []
    elif task.own:
        notes = ["measured on rows that may have been trained on; for held-out ones give measure: DATA in the task."]
    return Found(task, spread(rows, most), notes)
