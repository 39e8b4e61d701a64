"""What was found: means over seeds, the Pareto front of learning against retention, and one row to take.

    learning     score after - score before on the learn tasks, mean over them; score: the task's metric, or token
                 accuracy where it has none; from -1 to 1
    retention    after / before on the protect tasks (on what is measured, where none is protected), mean over them
    front        no other row learns as much and keeps as much, and more of one of them
    recommended  of the rows that learn as much as the best but for an allowance, the one that keeps most; or the
                 cheapest of those that cannot be told apart from it

The allowance is 5 % of what the best learns; with three seeds or more, half of its interval where that is wider, but
never above a quarter of what it learns: so no row is recommended that learnt nothing, however noisy the best is.

A row cannot be told apart from the one that keeps most where that one keeps at most 1 point more, or what one of the
measured answers is worth if that is more: by the low end of the interval of their difference, paired by seed, with
three seeds in common, and by the difference itself with fewer. A difference above 5 points always tells them apart.
Cheapest is what takes fewest seconds; among those within a tenth of
it, what holds fewest bytes; then what keeps most.

Intervals are Student's t over seeds, 95 %: what another seed would have given. None with one seed, or where seeds
agree. A row whose figure lacks in one of its cells has none; tasks that one cell lacks (a retention over nothing) are
left out of all means.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import t as student

from ..evaluation.statistics import LEVEL, NOT_MEASURED, Estimate
from .candidates import Row
from .cells import Cell

if TYPE_CHECKING:
    from ..evaluation.results import TaskResult
    from ..report import Report

MARGIN = 0.05
"""Of what the best row learns: a difference that nobody would mind."""
MOST = 0.25
"""Of what the best row learns: above it no noise excuses learning less."""
SAME = 0.01
"""Of retention: a point, less than which nobody would pay for."""
APART = 0.05
"""Of retention: as much is told apart, whatever the noise."""
TINY = 1e-9
"""An answer's worth, however it is rounded."""
QUICK = 1.1
"""Times the fewest seconds: as fast, by a clock."""
FEWEST = 3
"""Seeds from which their interval may widen the margin; that of two is nine times their distance."""
CHOSEN = (
    "The row was taken because of the figures shown, so it looks a little better than it is. Score its model on other "
    "rows, too: ftplus eval OUTPUT --measure chat=OTHER.jsonl"
)
FIGURES = ("learning", "learn_loss", "retention", "drift")


@dataclass
class Judged:
    """One row of the table."""

    row: Row
    cells: list[Cell]
    n: int = 0
    learning: Estimate = NOT_MEASURED
    learn_loss: Estimate = NOT_MEASURED
    retention: Estimate = NOT_MEASURED
    drift: Estimate = NOT_MEASURED
    negative_flips: float | None = None
    steps: float | None = None
    seconds: float | None = None
    bytes: float | None = None
    peak_bytes: float | None = None
    answer: float = 0.0
    """What one measured answer more is worth, of retention."""
    front: bool = False
    each: dict[int, dict[str, float | None]] = field(default_factory=dict)
    """Figures of each finished cell by its seed."""


@dataclass
class Judgement:
    rows: list[Judged]
    best: Judged | None
    reason: str
    """Why it is recommended, or why nothing is."""
    notes: list[str]


def judge(rows: Sequence[Row], cells: Sequence[Cell]) -> Judgement:
    """All rows with what is known of them."""
    reports = {id(cell): cell.report() for cell in cells if cell.state == "finished"}
    tasks, notes = comparable(list(reports.values()))
    found = [_judged(row, [cell for cell in cells if cell.row is row], reports, tasks) for row in rows]
    for item in found:
        item.front = on_front(item, found)
    counts = {item.n for item in found if item.n}
    if len(counts) > 1:
        notes.append("Rows have different numbers of seeds (n), so part of a difference may be the seeds'.")
    if counts and max(counts) < FEWEST:
        notes.append(
            f"{max(counts)} of {FEWEST} seeds: too few to tell what another seed would give. Type --seeds {FEWEST}."
        )
    taken = sorted({item.steps for item in found if item.steps is not None})
    if len(taken) > 1:
        notes.append(
            f"Rows took {taken[0]:g} to {taken[-1]:g} steps, which may be part of a difference: replay adds rows to an "
            "epoch, and stop_when ends early. max_steps gives all as many."
        )
    best, reason = recommended(found)
    if best and sum(map(complete, found)) > 1:
        notes.append(CHOSEN)
    compared = [task for report in reports.values() for task in report.tasks if task.name in tasks]
    notes += sorted({f"{task.name}: {note}" for task in compared for note in task.notes})
    if mixed := mixed_versions([report.facts.get("versions", {}) for report in reports.values()]):
        notes.append(f"Cells were run with different versions, which may be part of a difference: {mixed}.")
    return Judgement(found, best, reason, notes)


def mixed_versions(each: Sequence[dict[str, str]]) -> str:
    """`torch 2.12.0 and 2.13.0`: what differs between runs, if anything; what some lack was installed since."""
    common = set.intersection(*map(set, each)) if each else set()
    found = {name: sorted({versions[name] for versions in each}) for name in sorted(common)}
    return ", ".join(f"{name} {' and '.join(seen)}" for name, seen in found.items() if len(seen) > 1)


def _judged(row: Row, cells: list[Cell], reports: dict[int, Report], tasks: dict[str, str]) -> Judged:
    done = [cell for cell in cells if id(cell) in reports]
    found = Judged(row, cells, len(done))
    found.each = {cell.seed: figures(reports[id(cell)], tasks) for cell in done}
    column = {name: [each[name] for each in found.each.values()] for name in (*FIGURES, "negative_flips", "bytes")}
    for name in FIGURES:
        setattr(found, name, over_seeds(column[name]))
    found.negative_flips, found.bytes = _mean(column["negative_flips"]), _mean(column["bytes"])
    found.answer = max((_answer(reports[id(cell)], tasks) for cell in done), default=0.0)
    found.steps = _mean([reports[id(cell)].facts.get("steps") for cell in done])
    whole = [reports[id(cell)].facts["seconds"] for cell in done if not cell.kept.get("resumed", True)]
    found.seconds = _mean([sum(spent.values()) for spent in whole])
    found.peak_bytes = max((peak for cell in done if (peak := cell.peak_bytes())), default=None)
    return found


def comparable(reports: Sequence[Report]) -> tuple[dict[str, str], list[str]]:
    """Tasks by name with `learn` or `keep`, of which every report has the figure; and a note for each that lacks."""
    kept_role = "protect" if any(task.role == "protect" for report in reports for task in report.tasks) else "measure"
    meant = {"learn": "learn", kept_role: "keep"}
    named: dict[str, str] = {}
    for report in reports:
        named |= {task.name: meant[task.role] for task in report.tasks if task.role in meant}
    notes = []
    for name, use in list(named.items()):
        values = [_figure(task, use) for report in reports for task in report.tasks if task.name == name]
        if len(values) < len(reports) or None in values:
            what = "learning" if use == "learn" else "retention"
            why = "is not measured, or undefined (nothing was right at the start), in some cell"
            notes.append(f"{name} is left out: its {what} {why}.")
            del named[name]
    return named, notes


def _figure(task: TaskResult, use: str) -> float | None:
    return (task.change_of_score if use == "learn" else task.retention).value


def figures(report: Report, tasks: dict[str, str]) -> dict[str, float | None]:
    """Of one run, over the tasks that all runs have."""
    learn = [task for task in report.tasks if tasks.get(task.name) == "learn"]
    keep = [task for task in report.tasks if tasks.get(task.name) == "keep"]
    flips = [task.flips.negative for task in keep if task.flips]
    costs = report.facts.get("strategies") or {}
    return {
        "learning": _mean([_figure(task, "learn") for task in learn]),
        "learn_loss": _mean([task.after.loss.value for task in learn]),
        "retention": _mean([_figure(task, "keep") for task in keep]),
        "drift": _mean([task.drift.value for task in keep]),
        "negative_flips": sum(flips) if flips else None,
        "bytes": sum(cost["bytes"] for cost in costs.values()),
    }


def _answer(report: Report, tasks: dict[str, str]) -> float:
    """What one right answer more is worth to the mean retention, where a task is scored by its answers."""
    keep = [task for task in report.tasks if tasks.get(task.name) == "keep"]
    worth = [1 / (task.rows * task.before.metric.value) for task in keep if task.metric]
    return max(worth) / len(keep) if worth else 0.0


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is missing, or there is none."""
    return fmean(values) if values and None not in values else None


def over_seeds(values: Sequence[float | None]) -> Estimate:
    """The mean of one figure per seed, and its t-interval; none where seeds agree to the last digit, as shares of few
    rows do: that three said the same does not make it certain."""
    mean = _mean(values)
    if mean is None or len(set(values)) < 2:
        return Estimate(mean)
    half = student.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return Estimate(mean, mean - float(half), mean + float(half))


# ---- which to take -------------------------------------------------------------------------------------------------


def complete(item: Judged) -> bool:
    return item.learning.value is not None and item.retention.value is not None


def on_front(item: Judged, others: Sequence[Judged]) -> bool:
    """Whether no other row is at least as good in both and better in one, by the means."""
    return complete(item) and not any(complete(other) and _beats(other, item) for other in others)


def _beats(one: Judged, other: Judged) -> bool:
    a, b = ((it.learning.value, it.retention.value) for it in (one, other))
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def allowance(best: Judged) -> float:
    """How much less than the best a row may learn."""
    margin = MARGIN * best.learning.value
    if best.n < FEWEST or best.learning.low is None:
        return margin
    return min(max(margin, best.learning.value - best.learning.low), MOST * best.learning.value)


def recommended(rows: Sequence[Judged]) -> tuple[Judged | None, str]:
    """A row and the reason in a sentence; None and why not."""
    known = [item for item in rows if complete(item)]
    if not known:
        return None, "Nothing is recommended: no row has both a figure of learning and one of retention."
    top = max(known, key=lambda item: item.learning.value)
    if top.learning.value <= 0:
        said = "no row learnt anything, so keeping says nothing. Train longer, or at a higher learning rate."
        return None, f"Nothing is recommended: {said}"
    room = allowance(top)
    near = [item for item in known if item.learning.value >= top.learning.value - room]
    firm = max(near, key=lambda item: item.retention.value)
    best = cheapest([item for item in near if alike(firm, item)])
    learnt, kept = f"{100 * best.learning.value:+.1f} points", f"{100 * best.retention.value:.1f} %"
    hint = "" if best.n >= FEWEST else f"; on {best.n} seed{'s' * (best.n > 1)} a hint, not a result"
    if len(near) == 1:
        return best, f"{best.row.name} keeps {kept}, and no other row learns nearly as much ({learnt}){hint}."
    most = f"the most ({top.row.name}, {100 * top.learning.value:+.1f})"
    others = f"of the {len(near)} rows that learn within {100 * room:.1f} points of {most}"
    if best.retention.value < firm.retention.value:
        apart = f"cannot be told apart from {firm.row.name} ({100 * firm.retention.value:.1f} %) and costs less"
        return best, f"{best.row.name} keeps {kept}, {apart}, {others}; it learns {learnt}{hint}."
    return best, f"{best.row.name} keeps most, {kept}, {others}; it learns {learnt}{hint}."


def alike(most: Judged, other: Judged) -> bool:
    """Whether a row cannot be told apart from the one that keeps most; see above."""
    more, answer = most.retention.value - other.retention.value, max(most.answer, other.answer)
    same = max(SAME, min(answer + TINY, APART))  # a row that forgot is told apart, however few answers there are
    shared = [seed for seed in most.each if seed in other.each]
    if len(shared) >= FEWEST:
        paired = over_seeds([most.each[seed]["retention"] - other.each[seed]["retention"] for seed in shared])
        least = paired.value if paired.low is None else paired.low
        return more <= APART and least <= same
    return more <= same


def cheapest(rows: Sequence[Judged]) -> Judged:
    """By seconds, bytes and retention; a cost that was not measured counts as the highest."""
    fewest = min(_cost(item.seconds) for item in rows)
    quick = [item for item in rows if _cost(item.seconds) <= QUICK * fewest]
    return min(quick, key=lambda item: (_cost(item.bytes), -item.retention.value))


def _cost(measured: float | None) -> float:
    return float("inf") if measured is None else measured


def reproduced(best: Judged) -> str:
    """The command that makes the run of its first finished seed again, elsewhere."""
    first = next(cell for cell in best.cells if cell.state == "finished")
    line = shlex.join(["ftplus", "sft", "--config", str(first.stage.file), "--output_dir", "again"])
    alone = first.kept.get("device") is not None  # one of several: on all of them its batch would be larger
    return f"CUDA_VISIBLE_DEVICES=0 {line}" if alone else line
