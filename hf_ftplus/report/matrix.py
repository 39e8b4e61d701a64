"""The matrix of a sequence: every task after every stage, as a table, as JSON and as CSV.

    R[0]    before the first stage         R[i]    after stage i
    columns: the task of each stage, in their order; then whatever else was measured in all of them

The score of a task is its own metric where it has one (choice, exact match, ...), else token accuracy, which the
metrics below are means of; losses are kept beside it, in nats per token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.text import Text

from ..disk import read_json, write
from ..errors import DataError, StorageError
from ..evaluation import matrix
from ..evaluation.results import Level, TaskResult
from .record import Report, strict
from .table import add, grid_of, words_of
from .text import csv_text, label, number, percent

FORMAT = 1
NOTE = (
    "score in %, loss in nats per token; ACC at the end, LA right after learning, BWT since then, FWT before it (from "
    "the start); for scores a negative BWT is forgetting, for losses a positive one; n/m = not measured"
)

Figures = list[list[float | None]]


@dataclass
class Matrix:
    """R of T stages, as far as they have run: T + 1 rows, those that are still to come all None."""

    stages: list[str]
    others: list[str]
    """Measured in every stage, and no part of the metrics: what none learns, and each task of one that has several."""
    score: Figures
    """[T + 1, T]: 1 is best."""
    loss: Figures
    """[T + 1, T]: nats per token."""
    other_score: Figures = field(default_factory=list)
    """[T + 1, others]."""
    other_loss: Figures = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    """What the score of each task is."""
    rows: dict[str, int] = field(default_factory=dict)
    """Rows that each task is measured on."""
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, stages: list[str], others: list[str], own: list[str], reports: Sequence[Report]) -> Matrix:
        """Read it out of the reports of the stages that have run.

        Args:
            stages: their names, which are those of their tasks.
            others: what else was measured.
            own: the name under which each stage measures its own task.
            reports: of the first stages, in their order.
        """
        found: list[dict[str, TaskResult]] = []
        for stage, mine, report in zip(stages, own, reports, strict=False):
            results = {task.name: task for task in report.tasks}
            found.append({**results, stage: results[mine]} if mine in results else results)
        moments = [{name: task.before for name, task in found[0].items()}] if found else [{}]
        moments += [{name: task.after for name, task in results.items()} for results in found]
        first = found[0] if found else {}
        moments += [{}] * (len(stages) + 1 - len(moments))

        def figures(names: list[str], loss: bool) -> Figures:
            return [[_figure(moment.get(name), first.get(name), loss) for name in names] for moment in moments]

        return cls(
            stages,
            others,
            figures(stages, False),
            figures(stages, True),
            figures(others, False),
            figures(others, True),
            {name: first[name].retention_of for name in (*stages, *others) if name in first},
            {name: first[name].rows for name in (*stages, *others) if name in first},
            [*_incomparable([*stages, *others], stages, found)],
        )

    def summary(self, losses: bool = False) -> dict[str, float | None]:
        """ACC, BWT, FWT, forgetting and LA (`evaluation/matrix.py`) of the scores, or of the losses."""
        return matrix.summary(self.loss if losses else self.score, losses)

    def to_dict(self) -> dict[str, object]:
        """Plain types, ready for strict JSON."""
        summary = {"score": self.summary(), "loss": self.summary(losses=True)}
        return strict({"format": FORMAT, **asdict(self), "summary": summary})

    def save(self, folder: str | Path) -> Path:
        """Write `sequence.json` and `sequence.csv`.

        Raises:
            StorageError: the folder cannot be written.
        """
        path = Path(folder) / "sequence.json"
        try:
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
            write(path, text)
            write(path.with_suffix(".csv"), self.to_csv())
        except OSError as error:
            raise StorageError(f"Cannot write {path} ({error.strerror}). Choose another output_dir.") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Matrix:
        """Read the `sequence.json` that `save` wrote.

        Raises:
            DataError: missing, not JSON, or of another version.
        """
        try:
            found = read_json(Path(path))
            if found.pop("format") != FORMAT:
                raise ValueError("another format")
            found.pop("summary")
            return cls(**found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no sequence.json of format {FORMAT} ({error}).") from error

    def to_csv(self) -> str:
        """One line for each stage and task: after,task,score,loss."""
        lines = [
            (after, name, scores[i], losses[i])
            for i, after in enumerate(("", *self.stages))
            for name, scores, losses in self.columns()
        ]
        return csv_text([("after", "task", "score", "loss"), *lines])

    def show(self, console: Console | None = None) -> None:
        """Print the table and what follows from it."""
        (console or Console(highlight=False)).print(self.table())

    def table(self) -> RenderableType:
        """A row before the first stage and one after each; of every task the score above the loss."""
        columns = list(self.columns())
        grid = grid_of("after", *(name for name, _, _ in columns))
        names = [words_of(self.metrics.get(name, "score")).replace("accuracy", "acc.") for name, _, _ in columns]
        add(grid, "", *(Text(f"{words} %\nloss", style="dim") for words in names))
        for i, after in enumerate(("the start", *self.stages)):
            cells = []
            for j, (_, scores, losses) in enumerate(columns):
                learnt = i > 0 and i == j + 1
                cells.append(Text(f"{percent(scores[i])}\n{number(losses[i])}", style="bold" if learnt else ""))
            add(grid, label(after, "bold"), *cells)
        lines = [Text(_line("score", self.summary(), 100, 1)), Text(_line("loss", self.summary(True), 1, 3))]
        notes = [label(note, "yellow", 200) for note in self.notes]
        return Group(grid, *lines, Text(NOTE, style="dim"), *notes)

    def columns(self) -> list[tuple[str, list[float | None], list[float | None]]]:
        """Name, scores and losses of every task, [T + 1] each."""
        names, scores, losses = (
            [*self.stages, *self.others],
            [[*a, *b] for a, b in zip(self.score, self.other_score, strict=True)],
            [[*a, *b] for a, b in zip(self.loss, self.other_loss, strict=True)],
        )
        return list(zip(names, map(list, zip(*scores, strict=True)), map(list, zip(*losses, strict=True)), strict=True))


def _figure(level: Level | None, task: TaskResult | None, loss: bool) -> float | None:
    if level is None or task is None:
        return None
    return (level.loss if loss else task.score(level)).value


def _incomparable(names: list[str], stages: list[str], found: list[dict[str, TaskResult]]) -> list[str]:
    """What makes two entries of a column figures of different things."""
    notes = []
    for name in names:
        seen = {stage: results[name] for stage, results in zip(stages, found, strict=False) if name in results}
        facts = {stage: (task.rows, task.tokens, task.metric) for stage, task in seen.items()}
        first = next(iter(facts.items()), None)
        for stage, these in facts.items():
            if these != first[1]:
                notes.append(
                    f"{name} is measured on {these[0]} rows with {these[1]} tokens in {stage}, on {first[1][0]} with "
                    f"{first[1][1]} in {first[0]}: these figures cannot be compared (another max_length or template?)."
                )
    return notes


def _line(what: str, summary: dict[str, float | None], factor: float, digits: int) -> str:
    """`score  ACC 42.2  BWT -8.1  ...`"""
    said = (f"{name} {number(None if value is None else factor * value, digits)}" for name, value in summary.items())
    return f"{what:7}" + "  ".join(said)
