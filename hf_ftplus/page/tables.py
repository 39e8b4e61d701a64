"""Figures of runs as cells of text: what the page, the Markdown and the CSV all say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..evaluation.results import TaskResult
from ..evaluation.statistics import NOT_MEASURED, Estimate
from ..report.matrix import Matrix
from ..report.table import ordered, words_of
from ..report.text import MISSING, UNDEFINED, is_number, label, number, percent, size
from .read import Run


@dataclass(frozen=True)
class Figure:
    """One figure of one task in one run. `factor` is 100 where it is shown in percent."""

    key: str
    """Its entry in `definitions.py`."""
    name: str
    factor: int
    start: Estimate = NOT_MEASURED
    end: Estimate = NOT_MEASURED
    change: Estimate = NOT_MEASURED
    instead: str = ""
    """What `end` says where it has no number."""


@dataclass(frozen=True)
class Cell:
    value: str
    interval: str = ""


def cell(estimate: Estimate, factor: int = 1, instead: str = "", signed: bool = False) -> Cell:
    """`52.0` and `[48.1, 55.9]`; n/m is never 0."""
    if estimate.value is None:
        return Cell(instead or MISSING)
    show = percent if factor == 100 else number
    text = show(estimate.value)
    if signed and estimate.value > 0 and text.strip("0."):
        text = f"+{text}"
    if estimate.low is None or estimate.high is None:
        return Cell(text)
    return Cell(text, f"[{show(estimate.low)}, {show(estimate.high)}]")


def figures(task: TaskResult) -> list[Figure]:
    """All that a report knows of a task, in the order of the page."""
    found = [Figure("token_accuracy", "token accuracy %", 100, *_moments(task, "token_accuracy"))]
    if task.metric:
        found.insert(0, Figure("metric", f"{label(words_of(task.metric)).plain} %", 100, *_moments(task, "metric")))
    return [
        *found,
        Figure("loss", "loss, nats per token", 1, *_moments(task, "loss")),
        Figure("drift", "drift, nats per token", 1, end=task.drift),
        Figure("retention", "retention", 1, end=task.retention, instead=UNDEFINED if task.undefined else ""),
    ]


def _moments(task: TaskResult, name: str) -> list[Estimate]:
    return [getattr(moment, name) for moment in (task.before, task.after, task.change)]


def tasks_of(runs: list[Run]) -> list[TaskResult]:
    """Each task once, as the first run that has it, before all as one that learns it; learn, protect, measure."""
    found: dict[str, TaskResult] = {}
    for task in ordered(task for run in runs for task in run.report.tasks):
        found.setdefault(task.name, task)
    return list(found.values())


def of_task(runs: list[Run], name: str) -> Iterator[tuple[int, Run, TaskResult]]:
    """The runs that have the task, numbered from 1 as on the page."""
    for place, run in enumerate(runs, start=1):
        for task in run.report.tasks:
            if task.name == name:
                yield place, run, task


def blocks(runs: list[Run]) -> list[dict[str, Any]]:
    """A table for each task: for each figure, a row for each run with start, end and change."""
    found = []
    for first in tasks_of(runs):
        rows = list(of_task(runs, first.name))
        groups: dict[str, dict[str, Any]] = {}
        for place, run, task in rows:
            for figure in figures(task):
                group = groups.setdefault(figure.name, {"name": figure.name, "key": figure.key, "rows": []})
                change = cell(figure.change, figure.factor, signed=True)
                both = figure.key not in ("drift", "retention")
                group["rows"].append(
                    {
                        "place": place,
                        "run": label(run.name).plain,
                        "start": cell(figure.start, figure.factor) if both else Cell(""),
                        "end": cell(figure.end, figure.factor, figure.instead),
                        "change": change if both else Cell(""),
                    }
                )
        flips = [(place, label(run.name).plain, task.flips) for place, run, task in rows if task.flips]
        sizes = {(task.rows, task.tokens) for _, _, task in rows}
        notes = dict.fromkeys(label(note, characters=300).plain for _, _, task in rows for note in task.notes)
        if len(sizes) > 1:
            said = "; ".join(f"{place}: {task.rows} rows, {task.tokens} tokens" for place, _, task in rows)
            notes[f"Not measured on the same rows ({said}): these figures cannot be compared."] = None
        found.append(
            {
                "name": label(first.name).plain,
                "role": label(first.role).plain,
                "n": f"n = {first.rows} rows, {first.tokens} tokens" if len(sizes) == 1 else "n differs, see below",
                "groups": sorted(groups.values(), key=lambda group: ORDER.index(group["key"])),
                "flips": flips,
                "notes": list(notes),
            }
        )
    return found


ORDER = ["metric", "token_accuracy", "loss", "drift", "retention"]


COSTS = {"steps": "steps", "seconds": "seconds", "bytes": "state", "speed": "tokens/s"}
"""Columns of an overview by their keys."""


def overview(runs: list[Run]) -> dict[str, Any]:
    """One row for each run: what it learnt, what it kept, and what it cost where any of them says."""
    every = tasks_of(runs)
    tasks = [task for task in every if task.role in ("learn", "protect")] or every
    heads = [(label(t.name).plain, "score" if t.role == "learn" else "retention", t.role, t.rows) for t in tasks]
    rows = []
    for place, run in enumerate(runs, start=1):
        own = {task.name: task for task in run.report.tasks}
        cells = [_headline(own.get(task.name), task.role) for task in tasks]
        rows.append({"place": place, "run": label(run.name).plain, "cells": cells, **costs(run.report.facts)})
    known = {key: name for key, name in COSTS.items() if any(row[key] != MISSING for row in rows)}
    return {"heads": heads, "rows": rows, "costs": known}


def _headline(task: TaskResult | None, role: str) -> Cell:
    if task is None:
        return Cell(MISSING)
    if role == "learn":
        return cell(task.kept[1], 100)
    return cell(task.retention, 1, UNDEFINED if task.undefined else "")


def costs(facts: Mapping[str, Any]) -> dict[str, str]:
    """Steps, seconds and bytes of state in words, and how fast a model was scored."""
    seconds, held = spent(facts), list(of_strategies(facts, "bytes").values())
    steps, speed = facts.get("steps"), facts.get("tokens_per_second")
    return {
        "steps": str(steps) if is_number(steps) else MISSING,
        "seconds": number(sum(seconds.values()), 1) + since(facts) if seconds else MISSING,
        "speed": number(speed, 0) if is_number(speed) else MISSING,
        "bytes": size(sum(held)) if held else "0 B" if facts.get("strategies") == {} else MISSING,
    }


def since(facts: Mapping[str, Any]) -> str:
    """Of which steps the seconds are, where a run was resumed: those before it are not known any more."""
    step = facts.get("resumed_at")
    return f" since step {step}" if is_number(step) else ""


def spent(facts: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each stage."""
    return {name: value for name, value in mapping(facts.get("seconds")).items() if is_number(value)}


def of_strategies(facts: Mapping[str, Any], figure: str) -> dict[str, float]:
    """One figure of every strategy that has it."""
    found = {name: mapping(cost).get(figure) for name, cost in mapping(facts.get("strategies")).items()}
    return {name: value for name, value in found.items() if is_number(value)}


def mixture(facts: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What each task really took: {"rows": {"a": 0.5, ...}, "tokens": {...}}; {} where nothing was mixed."""
    found: dict[str, dict[str, float]] = {}
    for cost in mapping(facts.get("strategies")).values():
        for key, value in mapping(cost).items():
            of, _, task = key.partition("/")
            if is_number(value) and of in ("rows", "tokens") and task:
                found.setdefault(of, {})[task] = value
            elif is_number(value) and key.startswith("share_of_"):
                found.setdefault(key.removeprefix("share_of_"), {"learn": 1 - value})["protect"] = value
    return found


def matrix_rows(matrix: Matrix) -> list[dict[str, Any]]:
    """Each moment with its cells; `heat` is the score from 0 to 1."""
    rows = []
    for i, after in enumerate(("the start", *matrix.stages)):
        cells = [
            {
                "score": percent(scores[i]),
                "loss": number(losses[i]),
                "heat": None if scores[i] is None else round(min(1.0, max(0.0, scores[i])), 3),
                "learnt": i > 0 and i == j + 1,
            }
            for j, (_, scores, losses) in enumerate(matrix.columns())
        ]
        rows.append({"after": label(after).plain, "cells": cells})
    return rows


def mapping(value: Any) -> Mapping[str, Any]:
    """Facts are the caller's: what is no mapping has nothing to show."""
    return value if isinstance(value, Mapping) else {}
