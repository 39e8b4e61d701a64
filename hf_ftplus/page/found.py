"""Read what a page is made of: the reports of runs, the matrices of sequences, the comparisons of `ftplus eval`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..disk import read_json
from ..errors import DataError
from ..evaluation.results import TaskResult
from ..report import Report
from ..report.matrix import Matrix
from ..report.record import check

EVAL_FORMAT = 1
"""Of the eval.json that is read here."""


@dataclass
class Run:
    """One row of the page."""

    name: str
    report: Report
    file: Path


@dataclass
class Found:
    """Everything that one page shows."""

    runs: list[Run] = field(default_factory=list)
    sequences: dict[str, Matrix] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    """What was given: a report.json, sequence.json or eval.json each."""


def find(given: Iterable[Path]) -> Found:
    """The runs in these folders (or files), in the order given, under names that tell them apart.

    Raises:
        DataError: nothing there, or damaged, or of another format.
    """
    files = list({file.resolve(): file for file in (_file(Path(path)) for path in given)}.values())
    found = Found(files=files)
    for file, name in zip(files, _names(files), strict=True):
        if file.name == "eval.json":
            found.runs += models(file, "" if len(files) == 1 else f"{name}: ")
            continue
        if file.name != "sequence.json":
            found.runs.append(Run(name, Report.load(file), file))
            continue
        found.sequences[name] = matrix = _matrix(file)
        for number, stage in enumerate(matrix.stages, start=1):
            report = file.parent / f"{number:02d}-{stage}" / "ftplus" / "report.json"
            if report.is_file():
                shown = stage if len(files) == 1 else f"{name}: {stage}"
                found.runs.append(Run(shown, _own(Report.load(report), stage), report))
    return found


def _matrix(file: Path) -> Matrix:
    matrix = Matrix.load(file)
    try:
        matrix.table(), matrix.to_csv()
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{file} is not a whole sequence.json ({type(error).__name__}: {error}).") from error
    return matrix


def models(file: Path, prefix: str) -> list[Run]:
    """Every model of an eval.json but the first, which is the start of all others."""
    try:
        found = read_json(file)
        if (found["kind"], found["format"]) != ("eval", EVAL_FORMAT):
            raise ValueError(f"format {found['format']!r} instead of {EVAL_FORMAT}")
        facts = {key: found[key] for key in ("command", "versions", "plan")}
        runs = []
        for model, results in list(zip(found["models"], found["results"], strict=True))[1:]:
            tasks = []
            for result in results:
                task = TaskResult.from_dict({item.name: result[item.name] for item in fields(TaskResult)})
                task.notes.append(f"{model['name']}: {result['verdict']}.")
                tasks.append(task)
            runs.append(Run(f"{prefix}{model['name']}", Report(tasks, facts), file))
            check(runs[-1].report)
        return runs
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is no whole eval.json ({type(error).__name__}: {error}).") from error


def _own(report: Report, stage: str) -> Report:
    """With what the stage learnt under the name that all other stages, and the matrix, know it by."""
    learnt = [task for task in report.tasks if task.role == "learn"]
    if len(learnt) == 1 and stage not in (task.name for task in report.tasks):
        learnt[0].name = stage
    return report


def _file(path: Path) -> Path:
    if path.is_file():
        if path.suffix == ".json":
            return path
        raise DataError(
            f"{path} is no report.json, sequence.json or eval.json; expected one of them, or the folder of a run."
        )
    if not path.is_dir():
        raise DataError(f"{path} does not exist; expected the folder of a run or a sequence.")
    for inside in ("sequence.json", "ftplus/report.json", "report.json", "eval.json"):
        if (path / inside).is_file():
            return path / inside
    below = sorted(file.parents[1] for file in path.glob("*/ftplus/report.json"))
    hint = f" Runs lie below it: ftplus report {shlex.join(map(str, below))}" if below else ""
    raise DataError(
        f"{path} holds no ftplus/report.json, sequence.json or eval.json; expected what a finished run left.{hint}"
    )


def _names(files: list[Path]) -> list[str]:
    """The ends of their folders' paths that tell them apart: `plain` and `ewc` of out/plain and out/ewc."""
    parents = [file.resolve().parent for file in files]
    folders = [parent.parent if parent.name == "ftplus" else parent for parent in parents]
    for parts in range(1, max((len(folder.parts) for folder in folders), default=1) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(file) for file in files]
