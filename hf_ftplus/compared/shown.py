"""The tables of `ftplus compare`: what it will do, and what it found."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from ..evaluation.statistics import Estimate
from ..report.table import add, grid_of
from ..report.text import MISSING, label, number, percent, size
from .candidates import Row
from .cells import Cell
from .judged import Judgement
from .plan import STEPS, Probe, duration, forecast, spent, total

NOTE = (
    "learnt: change of score on learn, in points; kept: after / before on protect, in %; means over n seeds, 95 % "
    "t-interval over seeds; flips: protect rows right before and wrong now; state: of strategies; * on the Pareto "
    "front; > recommended; n/m: not measured"
)


def plan(
    rows: Sequence[Row], cells: Sequence[Cell], probe: Probe | None, devices: int, limit: float | None
) -> RenderableType:
    """Rows with the cells that are finished and to run, what one takes, and where that number comes from."""
    grid = grid_of("candidate", "cells", "done", "each", "memory", "from")
    for row in rows:
        own = [cell for cell in cells if cell.row is row]
        told = forecast(own[0], cells, probe)
        done = sum(cell.state == "finished" for cell in own)
        memory = MISSING if told.bytes is None else size(told.bytes)
        add(grid, label(row.name, "bold"), str(len(own)), str(done), duration(told.seconds), memory, label(told.source))
    left = sum(cell.state != "finished" for cell in cells)
    said = f"{left} of {len(cells)} cells to run"
    if left:
        said += f", about {duration(total(cells, probe, devices))}" + (f" on {devices} devices" if devices > 1 else "")
    if limit:
        said += f"; no cell starts that would end after {duration(limit)}"
        said += f", of which {duration(gone)} are spent" if (gone := spent(cells, devices)) else ""
    notes = [Text("memory: of the GPU; without one, of the process", style="dim")]
    if probe:
        what = f"the probe: {STEPS} steps of {probe.cell.row.name}; what other strategies add is not in it"
        notes.append(label(what, "dim", 300))
    return Group(grid, *notes, Text(said))


def table(found: Judgement) -> RenderableType:
    """Learning against retention with what it cost; then what failed, what was left out, and what to take."""
    grid = grid_of("", "candidate", "n", "learnt", "kept %", "flips", "seconds", "state")
    for column in grid.columns[2:]:
        column.no_wrap = True
    for item in found.rows:
        mark = (">" if item is found.best else " ") + ("*" if item.front else " ")
        style = "bold green" if item is found.best else ""
        learnt, kept = _with_ends(item.learning, sign=True), _with_ends(item.retention)
        flips = MISSING if item.negative_flips is None else number(item.negative_flips, 1)
        held = MISSING if item.bytes is None else size(item.bytes)
        name = label(item.row.name, style)
        add(grid, Text(mark, style), name, str(item.n), learnt, kept, flips, number(item.seconds, 1), held)
    return Group(grid, Text(NOTE, style="dim"), *_not_finished(found), Text(), label(found.reason, "bold", 600))


def _with_ends(estimate: Estimate, sign: bool = False) -> str:
    """`+12.3` and below it `[10.1, 14.5]`."""
    plus = "+" if sign and (estimate.value or 0) > 0 else ""
    ends = "" if estimate.low is None else f"\n[{percent(estimate.low)}, {percent(estimate.high)}]"
    return f"{plus}{percent(estimate.value)}{ends}"


def _not_finished(found: Judgement) -> list[Text]:
    cells = [cell for item in found.rows for cell in item.cells]
    said = [label(f"{cell.name}: {cell.error}", "red", 600) for cell in cells if cell.state == "failed"]
    left = [cell.name for cell in cells if cell.state == "left out"]
    if left:
        said.append(label(f"Left out for the budget: {'; '.join(left)}", "yellow", 2000))
    return said + [label(note, "yellow", 300) for note in found.notes]
