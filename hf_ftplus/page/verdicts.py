"""What `ftplus eval` and `ftplus compare` concluded, as cells of text: for the page, the Markdown and the CSV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..report.text import MISSING, label, number, percent, size
from .answers import cut, differences
from .read import TAKEN, Call, Candidate, Comparison, Flip, Scores
from .tables import Cell, cell

MOST_FLIPS = 10
"""Rows shown of each task, model and direction; all of them are in the file named there."""
MOST_ON_A_PAGE = 2000
"""Rows shown of all of them together, or one of each."""
CHARACTERS = 400
"""Of a prompt or an answer, at most."""


def called(scores: Scores) -> dict[str, Any]:
    """Every task with a cell for each model: its verdict, and the change of score that it rests on."""
    rows = []
    for calls in zip(*scores.calls, strict=True):
        task = calls[0].task
        floor = scores.floors.get(task.name)
        cells = [(call.verdict, cell(call.task.change_of_score, 100, signed=True)) for call in calls]
        start, noise = percent(task.kept[0].value), percent(floor)
        rows.append({"task": label(task.name).plain, "n": task.rows, "start": start, "floor": noise, "cells": cells})
    return {
        "first": label(scores.models[0]).plain,
        "models": [label(name).plain for name in scores.models[1:]],
        "margin": f"{100 * scores.margin:g}",
        "rows": rows,
    }


def lengths(scores: Iterable[Scores]) -> list[int]:
    """How many rows one page shows of each task, model and direction that has any."""
    found = [len(rows) for one in scores for _, _, rows in _flipped(one)]
    most = max(1, min(MOST_FLIPS, MOST_ON_A_PAGE // max(1, len(found))))
    return [min(most, rows) for rows in found]


def flips(scores: Scores, most: int, characters: int) -> list[dict[str, Any]]:
    """Rows that only one model has right, with what both answered; marked is where they differ."""
    characters = min(CHARACTERS, characters)
    return [
        {
            "what": f"{label(call.task.name).plain} with {label(call.model).plain}: {len(rows)} {word}",
            "items": [_item(flip, (scores.models[0], call.model), characters) for flip in rows[:most]],
            "more": len(rows) - most,
            "file": label(call.rows_file, characters=300).plain,
        }
        for call, word, rows in _flipped(scores)
    ]


def _flipped(scores: Scores) -> Iterator[tuple[Call, str, list[Flip]]]:
    for calls in scores.calls:
        for call in calls:
            for word, rows in (("lost", call.lost), ("gained", call.gained)):
                if rows:
                    yield call, word, rows


def _item(flip: Flip, models: tuple[str, str], characters: int) -> dict[str, Any]:
    said = flip.said
    sides = differences(said.before, said.after, characters)
    cells = [(label(name).plain, side) for name, side in zip(models, sides, strict=True)]
    return {
        "row": flip.row,
        "prompt": cut(said.prompt, characters),
        "expected": cut(said.expected, characters),
        "cells": [] if said.before is said.after is None else cells,
    }


def compared(found: Comparison) -> dict[str, Any]:
    """Every candidate with what it learnt, kept and cost; the recommended one is marked."""
    rows = [
        {
            "place": place,
            "name": label(row.name).plain,
            "n": row.n,
            "learning": cell(row.learning, 100, signed=True),
            "retention": cell(row.retention, 100),
            "drift": cell(row.drift),
            "flips": number(row.negative_flips, 1),
            "steps": MISSING if row.steps is None else f"{row.steps:g}",
            "seconds": number(row.seconds, 1),
            "bytes": MISSING if row.bytes is None else size(row.bytes),
            "peak": MISSING if row.peak_bytes is None else size(row.peak_bytes),
            "front": row.front,
            "best": row.name == found.recommended,
        }
        for place, row in enumerate(found.rows, start=1)
    ]
    return {
        "rows": rows,
        "reason": label(found.reason, characters=600).plain,
        "again": label(found.again, characters=2000).plain,
        "command": label(found.command, characters=2000).plain,
        "notes": [label(note, characters=600).plain for note in found.notes],
        "n": seeds(found.rows),
    }


def seeds(rows: list[Candidate]) -> str:
    """`n = 3 seeds`, or of each row where they differ."""
    counts = [row.n for row in rows]
    if len(set(counts)) == 1:
        return f"n = {counts[0]} seed{'' if counts[0] == 1 else 's'}"
    return f"n = {', '.join(map(str, counts))} seeds"


def lines_of_scores(name: str, scores: Scores) -> Iterator[tuple[Any, ...]]:
    """For the CSV: verdict and noise floor. The change itself stands with the figures of the run."""
    for calls in scores.calls:
        for call in calls:
            task = call.task
            yield (f"{name}{call.model}", task.name, task.role, task.rows, "verdict", call.verdict, None, None, None)
    for task, floor in scores.floors.items():
        yield (f"{name}{scores.models[0]}", task, "", None, "noise_floor", "again", floor, None, None)


def lines_of_comparison(name: str, found: Comparison) -> Iterator[tuple[Any, ...]]:
    """For the CSV: `rows` are seeds here."""
    for row in found.rows:
        moment = "recommended" if row.name == found.recommended else "front" if row.front else ""
        for figure in ("learning", "retention", "drift"):
            estimate = getattr(row, figure)
            yield (f"{name}{row.name}", "", "", row.n, figure, moment, estimate.value, estimate.low, estimate.high)
        for figure in ("negative_flips", *TAKEN):
            yield (f"{name}{row.name}", "", "", row.n, figure, moment, getattr(row, figure), None, None)


def said(value: Cell) -> str:
    return f"{value.value} {value.interval}".strip()
