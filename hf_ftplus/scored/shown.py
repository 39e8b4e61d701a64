"""The table of `ftplus eval`: every task with every model, and one word for what became of it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ..evaluation.statistics import Estimate
from ..report.table import COLOURS, add, grid_of, words_of
from ..report.text import label, number, percent, short
from .judged import Judged, Judgement, speeds

STYLES = {"lost": "bold red", "gained": "bold green", "kept": "green", "not resolved": "yellow", "not measured": "dim"}
WIDTHS = {"loss": 6, "score": 5, "change": 18, "drift": 6, "verdict": 12, "flips": 7}
LONGEST = 24
"""Characters of a model's name on one line."""
NOTE = (
    "score in %; change in points against the first model, 95 % interval over rows; loss and drift in nats per token; "
    "flips -2 +1: 2 rows right only with the first model, 1 with this; each verdict stands alone; n/m: not measured"
)

SPEED = (
    "tokens/s: prompts included, without loading, a first batch, metrics and answers; the first model keeps its hidden "
    "states, the others compute drift from them, so compare these with each other"
)


def table(judgement: Judgement) -> RenderableType:
    """A block for each task with a line for each model, in 80 columns."""
    scored, parts = judgement.scored, []
    names = short(scored.plan.models)
    for i, floor in enumerate(judgement.floors):
        first = judgement.models[0][i].result
        what = f" {first.role}, {first.rows} rows; score: {words_of(first.retention_of)}"
        noise = "" if floor["score"] is None else f"; noise floor {percent(floor['score'])}"
        parts.append(label(first.name, "bold", 30) + Text(what + noise, COLOURS.get(first.role, "")))
        grid = grid_of("", *WIDTHS)
        grid.columns[0].max_width = min(max(map(len, names)), LONGEST)
        for column, width in zip(grid.columns[1:], WIDTHS.values(), strict=True):
            column.min_width, column.no_wrap = width, True
        for name, model in zip(names, judgement.models, strict=True):
            add(grid, label(name), *_cells(model[i]))
        parts.append(grid)
    known = [f"{name} {speed:,.0f}" for name, speed in zip(names, speeds(scored), strict=True) if speed]
    parts += [label(f"tokens/s: {', '.join(known)}", "dim", 300)] if known else []
    return Group(*parts, *_notes(judgement), Text(f"{NOTE}; {SPEED}" if known else NOTE, style="dim"))


def _cells(judged: Judged) -> list[str | Text]:
    result = judged.result
    figures = [number(result.after.loss.value), percent(result.kept[1].value)]
    if judged.verdict is None:
        return [*figures, "", "", "", ""]
    flips = f"-{result.flips.negative} +{result.flips.positive}" if result.flips else ""
    word = Text(judged.verdict, STYLES[judged.verdict])
    return [*figures, _change(judged.change), number(result.drift.value), word, flips]


def _change(change: Estimate) -> str:
    """`-17.2 [-20, -14]`, in points."""
    sign = "+" if (change.value or 0) > 0 else ""
    ends = "" if change.low is None else f" [{_end(change.low)}, {_end(change.high)}]"
    return f"{sign}{percent(change.value)}{ends}"


def _end(value: float) -> str:
    return number(100 * value, 0 if abs(value) >= 0.1 else 1)


def _notes(judgement: Judgement) -> list[Text]:
    """What was noted of any model, once."""
    results = [judged.result for model in judgement.models for judged in model]
    found = dict.fromkeys((result.name, note) for result in results for note in result.notes)
    return [Text.assemble(label(name), ": ", label(note, characters=200), style="yellow") for name, note in found]
