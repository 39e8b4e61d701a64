"""One table for a run, one for several runs beside each other, and the answers side by side, in 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..evaluation.results import Completion, TaskResult
from ..evaluation.statistics import NOT_MEASURED, Estimate
from .text import MISSING, interval, label, number, pair, percent, retention, shown, size

ORDER = {"learn": 0, "protect": 1, "measure": 2}
COLOURS = {"learn": "cyan", "protect": "green", "measure": ""}
NOTE = "loss and drift in nats per token; retention = after / before, 95 % interval over n rows; n/m = not measured"

Results = Sequence[TaskResult]


def table(results: Results, facts: Mapping[str, Any] | None = None) -> RenderableType:
    """A run: each task with loss, token accuracy, metric, drift and retention, and what every strategy cost."""
    grid = grid_of("task", "loss", "token acc. %", "metric %", "drift", "retention")
    for column in grid.columns[1:]:
        column.no_wrap = True
    for result in ordered(results):
        add(
            grid,
            _task(result),
            pair(result.before.loss, result.after.loss),
            pair(result.before.token_accuracy, result.after.token_accuracy, percentage=True),
            _metric(result),
            number(result.drift.value),
            _retention(result),
        )
    lines = [Text(NOTE, style="dim"), *_notes(results), *_costs(facts or {})]
    if facts and facts.get("stopped"):
        lines.append(label(facts["stopped"], "yellow", characters=300))
    return Group(grid, *lines)


def completions_view(results: Results) -> RenderableType:
    """What the model answered before and after, side by side."""
    parts = [_answers(result, result.completions) for result in ordered(results) if result.completions]
    return Group(*parts)


def joined_table(runs: Mapping[str, Results], costs: Mapping[str, Mapping[str, Any]] | None = None) -> RenderableType:
    """Several runs from one start: a row for each task, columns `start`, then each run; costs such as seconds below.

    `costs` maps a run to named figures: `{"ewc": {"seconds": 61.2, "bytes": 1_070_000_000}}`.
    """
    grid = grid_of("task", "start", *runs)
    grid.columns[0].no_wrap = True
    tasks = {result.name: result for results in runs.values() for result in results}
    for task in ordered(tasks.values()):
        found = [next((r for r in results if r.name == task.name), None) for results in runs.values()]
        add(grid, _figures(task), _at_start(task, found), *(_at_end(task, result) for result in found))
    _add_costs(grid, list(runs), costs or {})
    return Group(grid, Text(NOTE, style="dim"))


def joined_completions(runs: Mapping[str, Results]) -> RenderableType:
    """The same questions answered by the starting model and by the model of each run."""
    parts: list[RenderableType] = []
    first = next(iter(runs.values()), [])
    for task in ordered(first):
        others = {run: {r.name: r for r in results}.get(task.name) for run, results in runs.items()}
        grid = grid_of(task.name, "start", *runs, lines=True, ratio=True)
        for said in by_prompt(list(others.values())):
            asked = next(item for item in said if item)
            add(grid, shown(asked.prompt), shown(asked.before), *(shown(item and item.after) for item in said))
        parts += [grid] if grid.row_count else []
    return Group(*parts)


def by_prompt(results: Sequence[TaskResult | None]) -> list[list[Completion | None]]:
    """Every prompt that any of several runs was asked, with what each answered; None where it was not asked."""
    each = [{(item.prompt, item.expected): item for item in result.completions} if result else {} for result in results]
    return [[of.get(asked) for of in each] for asked in dict.fromkeys(asked for of in each for asked in of)]


# ---- cells ---------------------------------------------------------------------------------------------------------


def grid_of(*titles: str, lines: bool = False, ratio: bool = False) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 1 if lines else 0, 0), header_style="bold", expand=ratio)
    for title in titles:
        grid.add_column(label(title), overflow="fold", ratio=1 if ratio else None)
    return grid


def add(grid: Table, *cells: str | Text) -> None:
    """A row of plain text: rich would read a string as markup."""
    grid.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def ordered(results: Any) -> list[TaskResult]:
    return sorted(results, key=lambda result: ORDER.get(result.role, len(ORDER)))


def _task(result: TaskResult) -> Text:
    what = Text(f"{result.role}, n={result.rows}", COLOURS.get(result.role, ""))
    return Text("\n").join([label(result.name, "bold"), what])


def _figures(task: TaskResult) -> Text:
    """The task on one line, then the names of the figures whose values stand beside them."""
    what = Text(f" {task.role}, {task.rows} rows", COLOURS.get(task.role, ""))
    names = [*([f"{words_of(task.metric)} %"] if task.metric else []), "loss", "drift"]
    lines = [label(task.name, "bold", 20) + what, *(label(f"  {name}", "dim") for name in names)]
    return Text("\n").join(lines)


def _metric(result: TaskResult) -> str:
    if result.metric is None:
        return "-"
    moved = f"\n+{result.flips.positive} -{result.flips.negative} rows" if result.flips else ""
    return f"{pair(result.before.metric, result.after.metric, percentage=True)}\n{words_of(result.metric)}{moved}"


def _retention(result: TaskResult) -> str:
    return f"{retention(result)}\n{interval(result.retention)}".rstrip()


def words_of(name: str | None) -> str:
    return (name or "").replace("_", " ")


def _at_start(task: TaskResult, found: Sequence[TaskResult | None]) -> str:
    known = next((r.before for r in found if r and r.before.loss.measured), None)
    return _cell(task, known.metric if known else NOT_MEASURED, known.loss if known else NOT_MEASURED, "")


def _at_end(task: TaskResult, result: TaskResult | None) -> str:
    if result is None:
        return _cell(task, NOT_MEASURED, NOT_MEASURED, MISSING)
    return _cell(task, result.after.metric, result.after.loss, number(result.drift.value))


def _cell(task: TaskResult, metric: Estimate, loss: Estimate, drift: str) -> str:
    figures = [percent(metric.value)] if task.metric else []
    return "\n".join(["", *figures, number(loss.value), drift])


def _add_costs(grid: Table, runs: list[str], costs: Mapping[str, Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for cost in costs.values() for name in cost))
    if names:
        grid.add_section()
    for name in names:
        cells = (_cost(name, costs.get(run, {}).get(name)) for run in runs)
        add(grid, label(name, "dim"), "", *cells)


def _cost(name: str, value: Any) -> str:
    if value is None:
        return MISSING
    if "bytes" in name:
        return size(value)
    return number(value, 1) if isinstance(value, float) else str(label(value))


def _notes(results: Results) -> list[Text]:
    return [
        Text.assemble(label(result.name), ": ", label(note, characters=200), style="yellow")
        for result in results
        for note in result.notes
    ]


def _costs(facts: Mapping[str, Any]) -> list[Text]:
    """`ewc: 12.1 s, 1.1 GB of state` for each strategy among the facts."""
    found = []
    for name, cost in dict(facts.get("strategies") or {}).items():
        parts: list[str] = []
        if isinstance(cost, Mapping) and cost.get("seconds") is not None:
            parts.append(f"{number(cost['seconds'], 1)} s")
        if isinstance(cost, Mapping) and cost.get("bytes") is not None:
            parts.append(f"{size(cost['bytes'])} of state")
        found += [Text.assemble(label(name), ": ", ", ".join(parts), style="dim")] if parts else []
    return found


def _answers(result: TaskResult, items: Sequence[Completion]) -> Table:
    grid = grid_of(result.name, "before", "after", lines=True, ratio=True)
    for item in items:
        add(grid, shown(item.prompt), shown(item.before), shown(item.after))
    return grid
