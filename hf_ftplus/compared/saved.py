"""A comparison as files: compare.json for programs, compare.csv for a spreadsheet.

compare.json (format 1):
    command, versions        how it was made
    rows                     a list of: name, learning_rate, plugins (as in YAML), n (finished cells); learning,
                             learn_loss, retention, drift (value, low, high); negative_flips (rows right before and
                             wrong now, mean over seeds), steps, seconds (of a run, all of it), bytes (of strategies'
                             state), peak_bytes (of the device; without one, of the process); front; cells: seed, state,
                             folder, error, learning, retention
    recommended              row, reason, command; null where nothing can be recommended
    left_out                 names of cells that were not run
    notes
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import disk
from ..report.record import strict
from ..report.text import csv_text
from .judged import FIGURES, Judged, Judgement, reproduced

FORMAT = 1
"""Of compare.json: raised when a reader of older ones would misread newer ones."""


def to_dict(found: Judgement, command: str) -> dict[str, Any]:
    """compare.json, as the docstring above says."""
    from ..facts import versions

    best = found.best
    return strict(
        {
            "format": FORMAT,
            "kind": "compare",
            "command": command,
            "versions": versions(),
            "rows": [_row(item) for item in found.rows],
            "recommended": best and {"row": best.row.name, "reason": found.reason, "command": reproduced(best)},
            "left_out": [cell.name for item in found.rows for cell in item.cells if cell.state == "left out"],
            "notes": [*found.notes, *([] if best else [found.reason])],
        }
    )


def _row(item: Judged) -> dict[str, Any]:
    facts = {
        name: getattr(item, name)
        for name in (*FIGURES, "negative_flips", "steps", "seconds", "bytes", "peak_bytes", "front")
    }
    cells = [
        {"seed": cell.seed, "state": cell.state, "folder": str(cell.stage.folder), "error": cell.error or None}
        | {name: item.each.get(cell.seed, {}).get(name) for name in ("learning", "retention")}
        for cell in item.cells
    ]
    row = item.row
    return {
        "name": row.name,
        "learning_rate": row.learning_rate,
        "plugins": row.plugins,
        "n": item.n,
        **facts,
        "cells": cells,
    }


def to_csv(found: Judgement) -> str:
    """A line for each row, unrounded; what was not measured is an empty cell."""
    ends = [f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")]
    lines = [["row", "n", *ends, "negative_flips", "steps", "seconds", "bytes", "peak_bytes", "front", "recommended"]]
    for item in found.rows:
        values = [value for name in FIGURES for value in vars(getattr(item, name)).values()]
        costs = [item.negative_flips, item.steps, item.seconds, item.bytes, item.peak_bytes]
        lines.append([item.row.name, item.n, *values, *costs, int(item.front), int(item is found.best)])
    return csv_text(lines)


def save(found: Judgement, out: Path, command: str) -> dict[str, Any]:
    """Write compare.json and compare.csv, each whole or not at all; what the first one holds.

    Raises:
        StorageError: the folder cannot be written.
    """
    facts = to_dict(found, command)
    texts = {
        "compare.json": json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "compare.csv": to_csv(found),
    }
    with disk.attempt(f"--out {out}", "another folder"):
        for name, text in texts.items():
            disk.write(out / name, text)
    return facts
