"""`ftplus repair`: a model that forgot, moved back toward its base as far as what it learnt allows."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hf_ftplus.cli.generate import device_option, dtype_option
from hf_ftplus.compat import no_bars_unseen
from hf_ftplus.errors import DataError, UsageError


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--base", metavar="MODEL", help="What it was trained from; an adapter names its own.")
@click.option("--learn", required=True, metavar="DATA", help="Held-out rows of what it learnt.")
@click.option(
    "--protect",
    multiple=True,
    metavar="[NAME=]DATA",
    help="Rows of what it should know again, or self:64. Repeatable.  [required]",
)
@click.option(
    "--keep",
    default=0.9,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Share of what was learnt that must be left.",
)
@click.option(
    "--points", default=10, show_default=True, type=click.IntRange(1), help="Steps from the model to its base."
)
@click.option(
    "--mitigation",
    default=0.75,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Of an adapter: share of its intruder dimensions to take away; 0 does not try.",
)
@click.option("--rows", default=64, show_default=True, type=click.IntRange(1), help="Rows of each task.")
@click.option(
    "--max_length", default=1024, show_default=True, type=click.IntRange(2), help="Tokens of a row that are read."
)
@click.option("--seed", default=42, show_default=True, type=int, help="Of rows that the base writes.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Write the repaired model here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@dtype_option
@device_option
def repair(
    model: str, base: str | None, learn: str, protect: tuple[str, ...], keep: float, points: int, mitigation: float,
    rows: int, max_length: int, seed: int, out: Path | None, as_json: bool, dtype: str, device: str | None,
) -> None:  # fmt: skip
    """Measure a trained model at every point between itself and its base, and take the best.

    The best loses least on protect, of those that keep enough of what was learnt. Nothing is trained. Of a LoRA, PEFT's
    reduction of intruder dimensions is tried, too.

    \b
    ftplus repair OUTPUT --base Qwen/Qwen3-0.6B --learn held_out.jsonl --protect chat=chat.jsonl --out REPAIRED
    ftplus repair ADAPTER --learn held_out.jsonl --protect self:64 --out REPAIRED
    """
    if not protect:
        raise DataError(
            "There is nothing to repair for. Type --protect FILE, or --protect self:64: the base writes it."
        )

    from hf_ftplus.specs import TaskSpec, distinct_names, parse_all

    from .curve import table
    from .repair import repair as mend
    from .repair import shown

    no_bars_unseen()
    spec, kept = TaskSpec.parse(learn), parse_all(protect)
    if spec.generate:
        raise UsageError("--learn self:N is what the base says already. Give held-out rows of what the model learnt.")
    distinct_names([spec.name, *(it.name for it in kept)])
    found = mend(
        model, base, spec, kept, points=points, keep=keep, mitigation=mitigation, rows=rows, max_length=max_length,
        seed=seed, dtype=dtype, device=device, out=out,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(list(shown(found)), indent=1))
        return
    click.echo(table(found.points, found.chosen))
    before, after = found.points[0], found.chosen
    click.echo(
        "\nlearn: loss in nats per token; learnt: share of the model's fall that is left; then each protect task.\n"
        f"Protect loss {before.lost:.4f} before, {after.lost:.4f} after; the base has {found.points[points].lost:.4f}."
    )
    if out:
        measured = " ".join(f"--measure {it}" for it in [spec, *kept] if not it.generate)
        click.echo(f"Written to {out}. With intervals: ftplus eval {model} {out} {measured}")
