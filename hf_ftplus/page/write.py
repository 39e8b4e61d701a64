"""Put the page together and write it whole, with its Markdown and CSV."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .. import disk
from ..errors import StorageError, escape
from ..report.table import by_prompt
from ..report.text import MISSING, label, number, percent
from . import drawn, plots
from .answers import cut, differences, plain
from .definitions import DEFINITIONS
from .flat import COLUMNS, MARK, to_card, to_csv, to_markdown
from .found import Found, find
from .read import Run
from .tables import blocks, mapping, matrix_rows, mixture, of_strategies, of_task, overview, spent, tasks_of
from .verdicts import called, compared, flips, lengths

if TYPE_CHECKING:
    from ..evaluation.results import Completion
    from ..trainer import SFTTrainer

HERE = Path(__file__).parent
MOST_BYTES = 3_000_000
"""Of a page; answers are cut until it fits."""
PLOTS = "pip install 'hf-ftplus[report]'"


def leave_page(file: Path) -> None:
    """The page of a report.json, sequence.json, eval.json or compare.json, beside it."""
    with warned("no page could be made"):
        made = write(find([file]), file.with_name("report.html"), f"ftplus report {shlex.quote(str(file))}")
        click.echo(f"Page: {made}", err=True)


def leave_card(file: Path, trainer: SFTTrainer) -> None:
    """The model card of the run of a report.json, with what it kept."""
    with warned("no model card could be made"):
        trainer.kept = to_card(find([file]).runs[0])
        name = trainer.args.hub_model_id or str(Path(trainer.args.output_dir).resolve())
        trainer.create_model_card(model_name=Path(name).name)


@contextmanager
def warned(what: str) -> Iterator[None]:
    """A fault of a template, a plotting library, a tracker or a disk costs a warning, never the run: all is saved."""
    try:
        yield
    except Exception as error:
        click.echo(f"warning: {what} ({type(error).__name__}: {error}).", err=True)


def write(found: Found, file: Path, command: str) -> Path:
    """Write `file` (.html), and beside it the same as .md and .csv.

    Args:
        command: what makes this page again.

    Raises:
        StorageError: the folder cannot be written, or a file of that name is not ours.
    """
    texts = {file: page(found, command)}
    texts |= {file.with_suffix(".md"): to_markdown(found, command), file.with_suffix(".csv"): to_csv(found)}
    with disk.attempt(file, "another --out"):
        for path in texts:
            _refuse_foreign(path)
        for path, text in texts.items():
            disk.write(path, text)
    return file


def _refuse_foreign(path: Path) -> None:
    marks = {".html": '<meta name="generator" content="ftplus', ".md": MARK, ".csv": ",".join(COLUMNS)}
    if path.exists() and marks[path.suffix] not in path.read_bytes()[:1000].decode("utf-8", "replace"):
        raise StorageError(f"{path} is there already, and not from `ftplus report`. Choose another --out.")


def page(found: Found, command: str) -> str:
    """One HTML file of at most 3 MB, for which answers are cut, that asks nothing of any network."""
    flipped = lengths(found.scores.values())
    count = sum(len(task.completions) for run in found.runs for task in run.report.tasks) + sum(flipped)
    characters = min(2000, max(60, 500_000 // max(1, count)))
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html.jinja")
    shown = _context(found, command)
    while True:
        sides = {
            "answers": answers(found.runs, characters),
            "flips": [flips(scores, max(flipped, default=1), characters) for scores in found.scores.values()],
        }
        html = template.render(**shown, **sides, characters=characters)
        size = len(html.encode())
        if size < MOST_BYTES or characters <= 20:
            return html
        characters = max(20, min(characters // 2, characters * MOST_BYTES // size))


def _context(found: Found, command: str) -> dict[str, Any]:
    return {
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "version": metadata.version("hf-ftplus"),
        "command": label(command, characters=2000).plain,
        "names": [label(run.name).plain for run in found.runs],
        "overview": overview(found.runs),
        "blocks": blocks(found.runs),
        "sequences": [_sequence(name, matrix) for name, matrix in found.sequences.items()],
        "comparisons": [compared(one) | {"figures": drawn.of_comparison(one)} for one in found.comparisons.values()],
        "verdicts": [called(one) for one in found.scores.values()],
        "figures": drawn.figures(found.runs),
        "plots_from": "" if plots.available() else PLOTS,
        "mixtures": [_mixture(place, run) for place, run in enumerate(found.runs, 1) if mixture(run.report.facts)],
        "made": [_made(run) for run in found.runs],
        "definitions": DEFINITIONS,
        "colours": plots.COLOURS,
    }


def _sequence(name: str, matrix: Any) -> dict[str, Any]:
    heads = [(label(task).plain, label(matrix.rows.get(task, MISSING)).plain) for task, _, _ in matrix.columns()]
    factors = ((matrix.summary(), 100, 1), (matrix.summary(losses=True), 1, 3))
    scores, losses = (
        {key: number(None if value is None else factor * value, digits) for key, value in summary.items()}
        for summary, factor, digits in factors
    )
    notes = [label(note, characters=300).plain for note in matrix.notes]
    metrics = [(key, scores[key], losses[key]) for key in scores]
    return {"name": label(name).plain, "heads": heads, "rows": matrix_rows(matrix), "metrics": metrics, "notes": notes}


def _mixture(place: int, run: Run) -> dict[str, Any]:
    shares = mixture(run.report.facts)
    tasks = list(dict.fromkeys(task for of in shares.values() for task in of))
    parts = [shares.get(of, {}) for of in ("rows", "tokens")]
    rows = [(label(task).plain, *(percent(part.get(task)) for part in parts)) for task in tasks]
    return {"place": place, "run": label(run.name).plain, "rows": rows}


def _made(run: Run) -> dict[str, Any]:
    """How a run was made: the command, and everything that shaped it."""
    facts = mapping(run.report.facts)
    words = facts.get("command")
    command = shlex.join(map(str, words)) if isinstance(words, list) else "not kept in this report"
    kept = {key: value for key, value in facts.items() if key not in ("command", "history")}
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    lines = [escape(line, 500) for line in text.splitlines()]
    held = of_strategies(facts, "bytes")
    return {
        "name": label(run.name).plain,
        "command": escape(command, 4000),
        "facts": "\n".join(lines[:2000]),
        "seconds": [(label(stage).plain, f"{value:.1f}") for stage, value in spent(facts).items()],
        "bytes": [(label(name).plain, f"{value / 1e6:.1f} MB") for name, value in held.items()],
        "stopped": label(facts["stopped"], characters=300).plain if facts.get("stopped") else "",
    }


def answers(runs: list[Run], characters: int) -> list[dict[str, Any]]:
    """By task, each prompt with what was expected and what every model said; marked is what training changed."""
    found = []
    for first in tasks_of(runs):
        rows = [(place, run, task) for place, run, task in of_task(runs, first.name) if task.completions]
        items = [_item(rows, said, characters) for said in by_prompt([task for _, _, task in rows])]
        if items:
            found.append({"name": label(first.name).plain, "role": label(first.role).plain, "items": items})
    return found


def _item(rows: list[Any], said: list[Completion | None], characters: int) -> dict[str, Any]:
    """One prompt, with the runs that were asked it. The start stands there once where all begin with the same answer,
    else before each."""
    first = next(item for item in said if item)
    same = all(item is None or item.before == first.before for item in said)
    cells = []
    for (place, run, _), item in zip(rows, said, strict=True):
        if item is None:
            continue
        name = label(run.name).plain if len(rows) > 1 or run.against else "after"
        began = label(run.against).plain or "start"
        before, after = differences(item.before, item.after, characters)
        if (not cells or not same) and not (run.against and item.before is None):  # the first model stands alone
            start = before if len(rows) == 1 or not same else plain(item.before, characters)
            cells.append((began if same else f"{place} {name}: {began}", start))
        cells.append((f"{place} {name}" if len(rows) > 1 else name, after))
    return {
        "row": None,
        "prompt": cut(first.prompt, characters),
        "expected": cut(first.expected, characters),
        "cells": cells,
    }
