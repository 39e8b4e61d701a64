"""What all stages measure of a stage with `tasks:`: rows of each task, through its templates, and of all together.

Only the stage itself knows the templates. So the rows that it measures are written before the first stage begins, and
the other stages read them as any `measure:` (OUT/measured).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Gathered:
    """Rows of one task, or of all tasks of a stage together, which then has as many of each."""

    stage: Stage
    specs: list[TaskSpec]
    file: Path
    metric: str | None
    given: Any
    """What its YAML says, to tell two tasks of one name apart."""

    def rows(self) -> list[dict[str, Any]]:
        """Those that the stage itself measures; of several tasks in turns."""
        config = self.stage.config
        found = dict(enumerate(spec.load(config.training.seed) for spec in self.specs))
        shares = divided(config.measure_rows, {place: len(rows) for place, rows in found.items()})
        turns = zip_longest(*(map(there, spread(found[place], shares[place])) for place in found if shares[place]))
        return [row for row in chain.from_iterable(turns) if row]

    def keep(self) -> None:
        write(self.rows(), self.file)

    def refuse_other(self) -> None:
        """Refuse to go on with other rows than finished stages measured.

        Raises:
            StorageError: names the data.
        """
        if not self.file.is_file():
            return
        with self.file.open(encoding="utf-8", newline="\n") as lines:
            if [json.loads(line) for line in lines] == self.rows():
                return
        sources = ", ".join(spec.source for spec in self.specs)
        raise StorageError(
            f"{sources} changed since earlier stages measured it ({self.file}). Put back what it held to go on, or "
            "choose a new output_dir."
        )


def gather(plan: Plan, stage: Stage, given: dict[str, str]) -> Iterator[tuple[str, Gathered]]:
    """What a stage with `tasks:` adds to what all measure, by its name.

    Args:
        given: what is measured anyway, by name.

    Raises:
        UsageError: a task whose name is that of a stage, of what is measured anyway, or of another task elsewhere.
    """
    learn = [task for task in stage.tasks if task.role == "learn"]
    specs = {task.name: _measured(task) for task in learn}
    for task in learn:
        if task.name in plan.names:
            raise UsageError(f"Its task {task.name!r} has the name of a stage. Give it another.")
        if task.name in given and task.name not in plan.gathered:
            raise UsageError(f"Its task {task.name!r} stands under measure:, too. Leave it out there; all measure it.")
        if specs[task.name] is None:
            continue
        found = Gathered(stage, [specs[task.name]], _file(plan, task.name), task.metric, _looks(task))
        other = plan.gathered.get(task.name, found)
        if other.given != found.given:
            raise UsageError(
                f"Its task {task.name!r} is not measured as that of {other.stage.name!r} is. Give one of them another "
                "name, or both the same measure: and templates."
            )
        if other is found:
            yield task.name, found
        if task.measure is True:
            plan.notes.append(f"{task.name} is measured on trained rows; for others, in its entry: measure: DATA.")
    if learn and stage.name not in given and None not in specs.values():
        metric = learn[0].metric if len({task.metric for task in learn}) == 1 else None
        yield stage.name, Gathered(stage, [*specs.values()], _file(plan, stage.name), metric, None)


def refuse_namesakes(plan: Plan, stage: Stage) -> None:
    """Refuse a task that protects under the name of one that is learnt: it would be measured on other rows.

    Raises:
        UsageError: names both stages.
    """
    for task in stage.tasks:
        if task.role != "learn" and task.name in plan.gathered:
            raise UsageError(
                f"Its task {task.name!r} protects, and is learnt in {plan.gathered[task.name].stage.name!r}. Give it "
                "another name, or leave it out and type keep: N, which protects rows of finished stages."
            )


def _measured(task: TaskConfig) -> TaskSpec | None:
    """Its rows, if any are held out, or are there to be measured, too."""
    spec = task.measure if isinstance(task.measure, TaskSpec) else task.spec if task.measure else None
    return None if spec is None or spec.generate or (spec is task.spec and task.streaming) else spec


def refuse_kinds(plan: Plan, stage: Stage, learn: Any) -> None:
    """Refuse tasks whose rows no one file can hold, where they are to be kept or measured together.

    Args:
        learn: rows of each task, by its name, if there are several.

    Raises:
        UsageError: names the kind of each.
    """
    kept = plan.keep and not plan.is_last(stage)
    if not isinstance(learn, dict) or not (kept or stage.name in plan.gathered):
        return
    kinds = {task: _kind(next(iter(rows))) for task, rows in learn.items()}
    if len(set(kinds.values())) > 1:
        said = "; ".join(f"{escape(task)}: {kind}" for task, kind in kinds.items())
        raise UsageError(
            f"Rows of its tasks are of different kinds ({said}), which cannot be kept or measured in one file. A task "
            f"with a template gives messages, or strings if it says chat: false. Or type keep: 0, and measure: "
            f"{{{stage.name}: DATA}}"
        )


def _kind(row: dict[str, Any]) -> str:
    found = {key: row[key] for key in ("messages", "prompt", "completion", "text") if row.get(key) is not None}
    form = "strings" if all(isinstance(value, str) for value in found.values()) else "messages"
    return f"{form} ({', '.join(found)})"


def _looks(task: TaskConfig) -> dict[str, Any]:
    """All that decides what is measured of it, and how."""
    return {key: value for key, value in task.given.items() if key not in ("share", "streaming")}


def _file(plan: Plan, name: str) -> Path:
    number = len(plan.gathered) + 1  # two names may look alike in a folder
    return plan.out / "measured" / f"{number:02}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:60]}.jsonl"
