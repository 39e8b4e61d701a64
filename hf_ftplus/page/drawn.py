"""Which plots the data of these runs has, each with its caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..report.text import is_number, label
from . import plots
from .read import Comparison, Run
from .tables import mapping, mixture, of_task, spent, tasks_of
from .verdicts import seeds

MOST_PANELS = 8
ON_THE_WAY = ("penalty", "predicted_drift", "drift", "explained", "kl_learn", "kl_protect")
"""What strategies log that is worth following, by the last part of its name."""


def figures(runs: list[Run]) -> dict[str, list[dict[str, Any]]]:
    """By section: `learning`, `steps`, `mixture`, `costs`. Empty where matplotlib, or the data, is missing."""
    if not plots.available():
        return {}
    sections = {"learning": _learning, "steps": _steps, "mixture": _mixture, "costs": _costs}
    return {name: found for name, make in sections.items() if (found := make(runs))}


def of_comparison(found: Comparison) -> list[dict[str, Any]]:
    """Learning against retention, means over seeds; empty where matplotlib, or every figure, is missing."""
    known = [
        (place, row) for place, row in enumerate(found.rows, 1) if row.learning.measured and row.retention.measured
    ]
    if not known or not plots.available():
        return []
    points = [(place, row.retention, row.learning) for place, row in known]
    front = [place for place, row in known if row.front]
    name = "Candidates: what each learnt against what it kept"
    svg = plots.learning_and_retention(points, [], name, "learnt, points of score", front)
    n = f"{seeds(found.rows)}; bars: 95 % t-intervals over seeds; the dashed line joins the Pareto front"
    return [_figure(svg, "learning against retention", "learning", n)]


def _figure(svg: str, title: str, definition: str, n: str = "", keys: Sequence[str] = ()) -> dict[str, Any]:
    """`keys`: what the colours stand for, where they are not runs."""
    return {"svg": svg, "title": title, "definition": definition, "n": n, "keys": [label(key).plain for key in keys]}


def _learning(runs: list[Run]) -> list[dict[str, Any]]:
    """A panel for each learn task with each protect task."""
    tasks, found = tasks_of(runs), []
    pairs = [(a, b) for a in tasks if a.role == "learn" for b in tasks if b.role == "protect"]
    for learn, protect in pairs[:MOST_PANELS]:
        kept = {place: task.retention for place, _, task in of_task(runs, protect.name)}
        learnt = {place: task.kept for place, _, task in of_task(runs, learn.name) if place in kept}
        points = [
            (place, kept[place], after)
            for place, (_, after) in learnt.items()
            if kept[place].measured and after.measured
        ]
        if points:
            starts = {before.value for before, _ in learnt.values() if before.measured and len(runs) == 1}
            names = label(learn.name).plain, label(protect.name).plain
            svg = plots.learning_and_retention(points, sorted(starts), "{}: learnt against kept of {}".format(*names))
            n = f"n = {learn.rows} rows of {names[0]}, {protect.rows} of {names[1]}; bars: 95 % intervals over rows"
            found.append(_figure(svg, "{}, and what is kept of {}".format(*names), "retention", n))
    return found


def _steps(runs: list[Run]) -> list[dict[str, Any]]:
    """A panel for each figure that was logged on the way, as often as it was logged."""
    lines: dict[str, list[tuple[int, list[tuple[float, float]]]]] = {}
    for place, run in enumerate(runs, start=1):
        series: dict[str, list[tuple[float, float]]] = {}
        history = run.report.facts.get("history")
        for log in history if isinstance(history, list) else []:
            step = mapping(log).get("step")
            for key, value in mapping(log).items():
                if is_number(step) and is_number(value) and _followed(key):
                    series.setdefault(key, []).append((step, value))
        for key, points in series.items():
            if len(points) > 1:
                lines.setdefault(key, []).append((place, points))
    found = []
    for key, of_runs in sorted(lines.items(), key=lambda item: item[0] != "loss")[:MOST_PANELS]:
        name, logs = label(key).plain, max(len(points) for _, points in of_runs)
        title = "training loss" if key == "loss" else name
        svg = plots.over_steps(of_runs, f"{title} over steps")
        found.append(_figure(svg, title, "steps_figure", f"n = {logs} logged values, no interval: each was seen once"))
    return found


def _followed(key: str) -> bool:
    first, _, last = key.rpartition("/")
    return key == "loss" or (bool(first) and (last in ON_THE_WAY or first in ("retention", "drift")))


def _mixture(runs: list[Run]) -> list[dict[str, Any]]:
    rows, tasks = [], []
    for place, run in enumerate(runs, start=1):
        for of, shares in mixture(run.report.facts).items():
            tasks += [task for task in shares if task not in tasks]
            rows.append((f"{place} {label(of, characters=20).plain}", shares))
    if not rows:
        return []
    parts = [(name, [100 * shares.get(task, 0.0) for task in tasks]) for name, shares in rows]
    svg = plots.bars(parts, "% of the training stream", "Share of each task in what was trained on")
    return [_figure(svg, "share of each task", "mixture", f"n = {len(runs)} runs, every row counted", tasks)]


def _costs(runs: list[Run]) -> list[dict[str, Any]]:
    seconds = [spent(run.report.facts) for run in runs]
    stages = list(dict.fromkeys(stage for of in seconds for stage in of))
    if not stages:
        return []
    rows = [(str(place), [of.get(stage, 0.0) for stage in stages]) for place, of in enumerate(seconds, start=1)]
    svg = plots.bars(rows, "seconds", "Seconds of each stage of each run")
    return [_figure(svg, "seconds of each stage", "seconds", f"n = {len(runs)} runs, each timed once", stages)]
