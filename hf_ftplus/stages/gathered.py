"""What all stages measure of a stage with `tasks:`: rows of each task, through its templates, and of all together.

Only the stage itself knows the templates. So the rows that it measures are written before the first stage begins, and
the other stages read them as any `measure:` (OUT/measured).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StorageError, UsageError, escape
from ..row_checks import spread
from ..specs import TaskSpec
from ..tasks import TaskConfig
from .reservoir import divided, there, write

if TYPE_CHECKING:
    from .plan import Plan, Stage

TEMPLATES = ("columns", "template", "templates", "completion", "choices", "chat", "metric", "config")
"""Keys of a task that decide how its rows are measured, beside which they are."""


@dataclass
class Gathered:
    """Rows of one task, or of all tasks of a stage together, which then has as many of each."""

    stage: Stage
    specs: list[TaskSpec]
    file: Path
    decides: dict[str, Any] = field(default_factory=dict)
    """What its rows and their score depend on, to tell two tasks of one name apart."""

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Those that the stage itself measures; of several tasks in turns."""
        config = self.stage.config
        found = dict(enumerate(spec.load(config.training.seed) for spec in self.specs))
        shares = divided(config.measure_rows, {place: len(rows) for place, rows in found.items()})
        turns = zip_longest(*(map(there, spread(found[place], shares[place])) for place in found if shares[place]))
        return [row for row in chain.from_iterable(turns) if row]

    def keep(self, anew: bool) -> None:
        if anew or not self.file.is_file():
            write(self.rows, self.file)

    def refuse_other(self) -> None:
        """Refuse to go on with other rows than stages before measured.

        Raises:
            StorageError: names the data, or the file that cannot be read.
        """
        if not self.file.is_file():
            return
        try:
            with self.file.open(encoding="utf-8", newline="\n") as lines:
                same = [json.loads(line) for line in lines] == self.rows
        except (OSError, ValueError) as error:
            raise StorageError(f"{self.file} cannot be read ({error}). Remove it: it is made again.") from None
        if not same:
            sources = ", ".join(spec.source for spec in self.specs)
            raise StorageError(
                f"{sources}, its templates or the seed changed since earlier stages measured it ({self.file}). Put "
                "back what was there to go on, or choose a new output_dir."
            )


def gather(plan: Plan, stage: Stage, given: dict[str, str]) -> None:
    """Add to what all measure what a stage with `tasks:` does: each of them, and under its own name all together.

    Args:
        given: what is measured anyway, by name.

    Raises:
        UsageError: a task that has the name of a stage, of what is measured anyway, or of a stage's own data.
    """
    learn = [task for task in stage.tasks if task.role == "learn"]
    for task in learn:
        if task.name in (*plan.names, "learn"):
            raise UsageError(f"Its task {task.name!r} has the name of a stage, or of its data. Give it another.")
        if task.name in given:
            raise UsageError(
                f"{task.name!r} stands under measure: and tasks:. Write measure: {given[task.name]} in the task alone."
            )
        if len(learn) > 1 and task.name not in plan.gathered and (spec := _measured(task)):
            plan.gathered[task.name] = Gathered(stage, [spec], _file(plan, task.name), _decides(task, stage))
            plan.metrics |= {task.name: task.metric} if task.metric else {}
            if task.measure is True:
                name = escape(task.name)
                plan.notes.append(f"{name} is measured on trained rows; for others, in its entry: measure: DATA.")
    specs = [_measured(task) for task in learn]
    if specs and None not in specs and stage.name not in given:
        plan.gathered[stage.name] = Gathered(stage, specs, _file(plan, stage.name))
        if (metric := learn[0].metric) and {task.metric for task in learn} == {metric}:
            plan.metrics.setdefault(stage.name, metric)


def refuse_namesakes(plan: Plan, stage: Stage) -> None:
    """Refuse a task that has the name of one in another stage, and is not measured as that one is.

    Raises:
        UsageError: names both stages, and what differs.
    """
    for task in stage.tasks:
        other = plan.gathered.get(task.name)
        if other is None or other.stage is stage:
            continue
        here = _decides(task, stage)
        differs = [key for key in here.keys() | other.decides.keys() if here.get(key) != other.decides.get(key)]
        if task.role != "learn" or differs:
            said = "protects here" if task.role != "learn" else f"differs in {', '.join(sorted(differs))}"
            raise UsageError(
                f"Its task {task.name!r} is learnt in {other.stage.name!r}, too, and {said}: there can be one column "
                "of a name. Give it another."
            )


def refuse_kinds(plan: Plan, stage: Stage, learn: Any, measured: dict[str, Any]) -> None:
    """Refuse tasks whose rows no one file can hold, where they are to be kept or measured together.

    Args:
        learn: rows of each task, by its name, if there are several.
        measured: rows of each task that are held out, by its name.

    Raises:
        UsageError: names the kind of each.
    """
    if not isinstance(learn, dict):
        return
    together = [{**learn, **{name: measured[name] for name in learn.keys() & measured.keys()}}]
    for rows in together * (stage.name in plan.gathered) + [learn] * bool(plan.keep and not plan.is_last(stage)):
        kinds = {task: _kind(next(iter(found))) for task, found in rows.items()}
        if len(set(kinds.values())) > 1:
            said = "; ".join(f"{escape(task)}: {kind}" for task, kind in kinds.items())
            raise UsageError(
                f"Rows of its tasks are of different kinds ({said}), which cannot be kept or measured in one file. A "
                "task with a template gives messages, or strings if it says chat: false. Or type keep: 0, and measure: "
                f"{{{stage.name}: DATA}}"
            )


def told(plan: Plan, stage: Stage) -> Iterator[Gathered]:
    """What was gathered of a stage."""
    yield from (it for it in plan.gathered.values() if it.stage is stage)


def _measured(task: TaskConfig) -> TaskSpec | None:
    """Its rows, if any are held out, or are there to be measured, too."""
    spec = task.measure if isinstance(task.measure, TaskSpec) else task.spec if task.measure else None
    return None if spec is None or spec.generate or (spec is task.spec and task.streaming) else spec


def _kind(row: dict[str, Any]) -> str:
    found = {key: row[key] for key in ("messages", "prompt", "completion", "text") if row.get(key) is not None}
    form = "strings" if all(isinstance(value, str) for value in found.values()) else "messages"
    return f"{form} ({', '.join(found)})"


def _decides(task: TaskConfig, stage: Stage) -> dict[str, Any]:
    spec = _measured(task)
    found = {key: task.given[key] for key in TEMPLATES if key in task.given}
    drawn = {"seed": stage.yaml.get("seed")} if len(found.get("templates", ())) > 1 else {}
    return {**found, **drawn, "measure": spec and (spec.source, spec.split)}


def _file(plan: Plan, name: str) -> Path:
    number = len(plan.gathered) + 1  # two names may look alike in a folder
    return plan.out / "measured" / f"{number:02}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:60]}.jsonl"
