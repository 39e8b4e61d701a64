"""The files that a page is made of, read: report.json, sequence.json, eval.json, compare.json.

What another program wrote, or a hand changed, is one sentence and never a page with a hole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from ..disk import read_json
from ..errors import DataError
from ..evaluation.results import Completion, TaskResult
from ..evaluation.statistics import Estimate
from ..report import Report
from ..report.matrix import Matrix
from ..report.record import check
from ..report.text import is_number

FORMATS = {"eval": 1, "compare": 1}
"""Of eval.json and compare.json, as they are read here."""
T = TypeVar("T")


@dataclass
class Run:
    """One row of the page."""

    name: str
    report: Report
    file: Path
    against: str = ""
    """The first model of an eval.json, with whose answers its own are compared; of a run, those it started with."""


@dataclass
class Flip:
    """A row that only one of two models has right."""

    row: int
    said: Completion
    """`before` is what the first model answered, `after` what this one did; None where neither wrote anything."""


@dataclass
class Call:
    """What `ftplus eval` says of one task with one model, beside the first."""

    model: str
    task: TaskResult
    verdict: str
    lost: list[Flip]
    """Rows that the first model has right and this one wrong."""
    gained: list[Flip]
    rows_file: str


@dataclass
class Scores:
    """An eval.json. Of a single model nothing is called, and it is itself a run."""

    models: list[str]
    margin: float
    floors: dict[str, float | None]
    """Of each task: how far its score moves by rounding alone."""
    calls: list[list[Call]]
    """Of each model but the first, in the order of the tasks."""
    runs: list[Run]


TAKEN = ("steps", "seconds", "bytes", "peak_bytes")
"""What a candidate took."""


@dataclass
class Candidate:
    """One row of a comparison; means over n seeds."""

    name: str
    n: int
    learning: Estimate
    retention: Estimate
    drift: Estimate
    negative_flips: float | None
    steps: float | None
    seconds: float | None
    bytes: float | None
    peak_bytes: float | None
    front: bool


@dataclass
class Comparison:
    """A compare.json."""

    rows: list[Candidate]
    recommended: str | None
    reason: str
    again: str
    """The command that makes the recommended run once more."""
    command: str
    notes: list[str]
    runs: list[Run] = field(default_factory=list)
    """Of each row a cell that is still there, of one seed for all where there is one: they were asked the same."""


def whole(reader: Callable[[Path], T]) -> Callable[[Path], T]:
    """Anything that a file lacks, or has as another type, as a DataError with its name."""

    @wraps(reader)
    def read(file: Path) -> T:
        try:
            return reader(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file} is no whole {file.name} ({type(error).__name__}: {error}).") from error

    return read


@whole
def matrix(file: Path) -> Matrix:
    found = Matrix.load(file)
    found.table(), found.to_csv()
    return found


@whole
def scores(file: Path) -> Scores:
    found = _of_kind(file, "eval")
    facts = {key: found[key] for key in ("command", "versions", "plan")}
    models = [_text(model["name"]) for model in found["models"]]
    speeds = [_number(model.get("tokens_per_second")) for model in found["models"]]
    floors = {name: _number(floor["score"]) for name, floor in found["noise_floor"].items()}
    calls, runs = [], []
    for model, speed, results in zip(models, speeds, found["results"], strict=True):
        entries = [
            (TaskResult.from_dict({item.name: one[item.name] for item in fields(TaskResult)}), one) for one in results
        ]
        runs.append(
            Run(model, Report([task for task, _ in entries], facts | {"tokens_per_second": speed}), file, models[0])
        )
        check(runs[-1].report)
        calls.append([_call(model, task, one) for task, one in entries])
    return Scores(models, found["plan"]["margin"], floors, calls[1:], runs[1:] or runs)


def _call(model: str, task: TaskResult, found: dict[str, Any]) -> Call:
    lost, gained = ([_flip(row) for row in found[key]] for key in ("right_only_first", "right_only_now"))
    return Call(model, task, found["verdict"] or "", lost, gained, _text(found["rows_file"]))


def _flip(row: dict[str, Any]) -> Flip:
    asked = (_text(row[key]) for key in ("prompt", "expected"))
    answers = (None if row.get(key) is None else _text(row[key]) for key in ("before", "after"))  # not in older files
    return Flip(int(row["row"]), Completion(*asked, *answers))


@whole
def comparison(file: Path) -> Comparison:
    found = _of_kind(file, "compare")
    best = found["recommended"] or {"row": None, "reason": "", "command": ""}
    notes = [*map(_text, found["notes"])]
    if found["left_out"]:
        notes.append(f"Left out for the budget: {'; '.join(found['left_out'])}")
    rows, runs = [], []
    for row in found["rows"]:
        known = {item.name: row[item.name] for item in fields(Candidate)}
        known |= {name: _estimate(row[name]) for name in ("learning", "retention", "drift")}
        rows.append(Candidate(**known))
        for value in (row["n"], *(row[name] for name in ("negative_flips", *TAKEN))):
            _number(value)
        notes += [f"{row['name']}, seed {cell['seed']}: {cell['error']}" for cell in row["cells"] if cell["error"]]
    each = {row["name"]: _finished(row, file.parent) for row in found["rows"]}
    shared = set.intersection(*map(set, filter(None, each.values()))) if any(each.values()) else set()
    for name, reports in each.items():
        if reports:
            seed = min(shared or reports)
            runs.append(Run(f"{name}, seed {seed}", Report.load(reports[seed]), reports[seed]))
    return Comparison(rows, best["row"], best["reason"], best["command"], _text(found["command"]), notes, runs)


def _finished(row: dict[str, Any], folder: Path) -> dict[int, Path]:
    """Reports of a row's finished cells by seed, wherever the whole folder has gone since."""
    found = {}
    for cell in row["cells"]:
        report = folder.joinpath("cells", *Path(cell["folder"]).parts[-2:], "ftplus", "report.json")
        if cell["state"] == "finished" and report.is_file():
            found[cell["seed"]] = report
    return found


def _of_kind(file: Path, kind: str) -> dict[str, Any]:
    found = read_json(file)
    if (found["kind"], found["format"]) != (kind, FORMATS[kind]):
        raise ValueError(f"format {found['format']!r} of {found['kind']!r} instead of {FORMATS[kind]} of {kind!r}")
    return found


def _estimate(found: dict[str, Any]) -> Estimate:
    return Estimate(*(_number(found[end]) for end in ("value", "low", "high")))


def _number(value: Any) -> float | None:
    if value is not None and not is_number(value):
        raise TypeError(f"{value!r} is no number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def renamed(runs: Sequence[Run], prefix: str) -> list[Run]:
    return [replace(run, name=f"{prefix}{run.name}") for run in runs]
