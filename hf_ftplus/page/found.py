"""Find what a page is made of: the reports of runs, the matrices of sequences, what was scored and compared."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from ..report import Report
from ..report.matrix import Matrix
from ..report.text import short
from .read import Comparison, Run, Scores, comparison, matrix, renamed, scores

KINDS = "report.json, sequence.json, eval.json or compare.json"
PARTS = {"cells": "compare.json", "rows": "eval.json"}
"""Folders that lie beside such a file."""


@dataclass
class Found:
    """Everything that one page shows."""

    runs: list[Run] = field(default_factory=list)
    sequences: dict[str, Matrix] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    """What was given: a report.json, sequence.json, eval.json or compare.json each."""
    scores: dict[str, Scores] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)


def find(given: Iterable[Path]) -> Found:
    """The runs in these folders (or files), in the order given, under names that tell them apart.

    Raises:
        DataError: nothing there, or damaged, or of another format.
    """
    files = list({file.resolve(): file for file in (_file(Path(path)) for path in given)}.values())
    found = Found(files=files)
    for file, name in zip(files, _names(files), strict=True):
        prefix = "" if len(files) == 1 else f"{name}: "
        if file.name == "eval.json":
            found.scores[name] = scores(file)
            found.runs += renamed(found.scores[name].runs, prefix)
        elif file.name == "compare.json":
            found.comparisons[name] = comparison(file)
            found.runs += renamed(found.comparisons[name].runs, prefix)
        elif file.name == "sequence.json":
            found.sequences[name] = matrix(file)
            found.runs += renamed(_stages(file, found.sequences[name]), prefix)
        else:
            found.runs.append(Run(name, Report.load(file), file))
    return found


def _stages(file: Path, found: Matrix) -> list[Run]:
    """The stages of a sequence.json that have ended."""
    reports = [(stage, file.parent / f"{i:02d}-{stage}/ftplus/report.json") for i, stage in enumerate(found.stages, 1)]
    return [Run(stage, _own(Report.load(report), stage), report) for stage, report in reports if report.is_file()]


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
        raise DataError(f"{path} is no {KINDS}; expected one of them, or the folder of a run.")
    if not path.is_dir():
        raise DataError(f"{path} does not exist; expected the folder of a run or a sequence.")
    for inside in ("sequence.json", "ftplus/report.json", "report.json", "eval.json", "compare.json"):
        if (path / inside).is_file():
            return path / inside
    raise DataError(f"{path} holds no ftplus/{KINDS}; expected what a finished run left.{_hint(path)}")


def _hint(path: Path) -> str:
    """What to type instead: the comparison or evaluation that the folder is part of, or the runs below it."""
    whole = path.absolute()
    for part in (whole, whole.parent):
        name = PARTS.get(part.name)
        if name and (part.parent / name).is_file():
            given = part.parent if path.is_absolute() else os.path.relpath(part.parent)
            return f" {name} lies above it: ftplus report {shlex.quote(str(given))}"
    for runs in ("*", "*/*", "cells/*/*"):
        if below := sorted(file.parents[1] for file in path.glob(f"{runs}/ftplus/report.json")):
            return f" Runs lie below it: ftplus report {shlex.join(map(str, below))}"
    return ""


def _names(files: list[Path]) -> list[str]:
    """The ends of their folders' paths that tell them apart: `plain` and `ewc` of out/plain and out/ewc."""
    parents = [file.resolve().parent for file in files]
    folders = [parent.parent if parent.name == "ftplus" else parent for parent in parents]
    apart = len(set(folders)) == len(folders)
    return short([str(folder) for folder in folders]) if apart else [str(file) for file in files]
