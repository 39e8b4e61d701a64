"""The same figures as CSV for a spreadsheet and as Markdown for a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..report.matrix import Matrix
from ..report.text import csv_text, label
from .found import Found
from .read import Comparison, Run, Scores
from .tables import blocks, figures, matrix_rows, overview
from .verdicts import called, compared, lines_of_comparison, lines_of_scores, said

COLUMNS = ("run", "task", "role", "rows", "figure", "moment", "value", "low", "high")
MOMENTS = ("start", "end", "change")
MARK = "<!-- written by ftplus report -->"


def to_csv(found: Found) -> str:
    """A line for each number, unrounded; shares from 0 to 1. What was not measured is an empty cell."""
    return csv_text([COLUMNS, *_lines(found)])


def _lines(found: Found) -> Iterable[tuple[Any, ...]]:
    for run in found.runs:
        for task in run.report.tasks:
            for figure in figures(task):
                moments = {"start": figure.start, "end": figure.end, "change": figure.change}
                for moment, estimate in moments.items():
                    if moment == "end" or figure.key not in ("drift", "retention"):
                        name = task.metric if figure.key == "metric" else figure.key
                        ends = (estimate.value, estimate.low, estimate.high)
                        yield (run.name, task.name, task.role, task.rows, name, moment, *ends)
    for name, matrix in found.sequences.items():
        for i, after in enumerate(("start", *matrix.stages)):
            for task, scores, losses in matrix.columns():
                for figure, values in (("score", scores), ("loss", losses)):
                    moment = f"after {after}" if i else after
                    yield (name, task, "", matrix.rows.get(task), figure, moment, values[i], None, None)
    several = len(found.files) > 1
    for name, scores in found.scores.items():
        yield from lines_of_scores(f"{name}: " if several else "", scores)
    for name, comparison in found.comparisons.items():
        yield from lines_of_comparison(f"{name}: " if several else "", comparison)


def to_markdown(found: Found, command: str) -> str:
    """What was concluded, overview, matrices, then a table for each task."""
    view, parts = (
        overview(found.runs),
        [MARK, "# What was learnt, what was kept", f"`{label(command, characters=2000).plain.replace('`', '')}`"],
    )
    for comparison in found.comparisons.values():
        parts += _comparison(comparison)
    for scores in found.scores.values():
        parts += _verdicts(scores)
    if found.runs:
        heads = [f"{escaped(name)}: {key}{' %' if key == 'score' else ''}, n={n}" for name, key, _, n in view["heads"]]
        rows = [
            [f"{row['place']} {escaped(row['run'])}", *map(said, row["cells"]), *(row[key] for key in view["costs"])]
            for row in view["rows"]
        ]
        parts.append(_table(["run", *heads, *view["costs"].values()], rows))
    for name, matrix in found.sequences.items():
        parts += [f"## {escaped(name)}", *_matrix(matrix)]
    return "\n\n".join([*parts, *_tasks(found.runs, "##")]) + "\n"


def to_card(run: Run) -> str:
    """The section of a model card: what this model learnt, and what it kept of the one it started from."""
    parts = [
        "## What was learnt, what was kept",
        "Measured by hf_ftplus on the same rows before training (start) and after it (end). Loss, and drift, the KL "
        "from the starting model, are in nats per token; retention is end / start.",
    ]
    return "\n\n".join([*parts, *_tasks([run], "###")]) + "\n"


def _tasks(runs: list[Run], heading: str) -> Iterable[str]:
    """A table for each task; runs are named where there are several."""
    several = len(runs) > 1
    for block in blocks(runs):
        rows = [
            [
                escaped(group["name"]),
                *([f"{row['place']} {escaped(row['run'])}"] if several else []),
                *(said(row[at]) for at in MOMENTS),
            ]
            for group in block["groups"]
            for row in group["rows"]
        ]
        yield f"{heading} {escaped(block['name'])}"
        yield f"{escaped(block['role'])}, {block['n']}, 95 % intervals over rows"
        yield _table(["figure", *(["run"] if several else []), *MOMENTS], rows)
        yield from map(escaped, block["notes"])


def _matrix(matrix: Matrix) -> list[str]:
    heads = [f"{escaped(name)}, n={matrix.rows.get(name, 'n/m')}" for name, _, _ in matrix.columns()]
    rows = [
        [escaped(row["after"]), *(f"{cell['score']} ({cell['loss']})" for cell in row["cells"])]
        for row in matrix_rows(matrix)
    ]
    return [
        "Score in %, loss in nats per token in brackets.",
        _table(["after", *heads], rows),
        *map(escaped, matrix.notes),
    ]


def _verdicts(scores: Scores) -> list[str]:
    view = called(scores)
    if not view["rows"]:
        return []
    rows = [
        [escaped(row["task"]), str(row["n"]), row["start"], row["floor"]]
        + [f"{escaped(verdict)} {said(change)}" for verdict, change in row["cells"]]
        for row in view["rows"]
    ]
    heads = ["task", "n", f"{escaped(view['first'])}, score %", "noise floor", *map(escaped, view["models"])]
    return [f"Change of score in points, margin {view['margin']}, 95 % intervals over rows.", _table(heads, rows)]


def _comparison(found: Comparison) -> list[str]:
    view = compared(found)
    keys = ("drift", "flips", "steps", "seconds", "bytes", "peak")
    rows = [
        [f"{row['place']} {escaped(row['name'])}{' **recommended**' if row['best'] else ''}", str(row["n"])]
        + ["yes" if row["front"] else "", said(row["learning"]), said(row["retention"])]
        + [row[key] if isinstance(row[key], str) else said(row[key]) for key in keys]
        for row in view["rows"]
    ]
    heads = ["candidate", "seeds", "front", "learnt, points", "kept %", *keys[:4], "state", "memory"]
    again = [f"`{view['again'].replace('`', '')}`"] if view["again"] else []
    made = f"Made by {escaped(view['command'])}; {view['n']}, 95 % intervals over seeds."
    return [escaped(view["reason"]), *again, _table(heads, rows), made, *map(escaped, view["notes"])]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: Any) -> str:
    """Text of the data as Markdown that shows it: no markup, no link, no new cell or line."""
    shown = label(text, characters=300).plain
    inline = re.sub(r"([\\`*_\[\]<>|~$@&!#])", r"\\\1", shown).replace("://", "\\://").replace("www.", "www\\.")
    return re.sub(r"^(\s*\d*)([-+=.)])", r"\1\\\2", inline)
