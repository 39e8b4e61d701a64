"""`ftplus compare`: several remedies on the same data, and which of them to take."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from ..config import read_yaml
from ..disk import locked, writable
from ..errors import UsageError
from .sft import take_environment


class Compare(click.Command):
    """Keeps the words of the command line, to say what to type."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["words"] = list(args)
        return super().parse_args(ctx, args)


@click.command(cls=Compare)
@click.option("--config", "config_file", metavar="FILE", help="The run that all candidates share, as for `ftplus sft`.")
@click.option(
    "--plugins",
    multiple=True,
    metavar="NAME[,NAME...]",
    help="Candidates: none, ewc, ewc:strength=100, replay+distill. Repeatable.",
)
@click.option(
    "--strengths", metavar="auto|X[,X...]", help="Of every strategy that has one; auto: its own times 0.1, 1, 10."
)
@click.option("--learning-rates", metavar="X[,X...]", help="Of none. [the config's times 1/4, 1/2, 1]")
@click.option(
    "--seeds", default=3, show_default=True, type=click.IntRange(1), help="Runs of every row, each with a seed."
)
@click.option(
    "--budget",
    metavar="TIME",
    help="Of the whole comparison, failed and stopped cells included: start none that would end after it. 2h, 90m.",
)
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path), help="Cells and figures. [the config's output_dir-compare]"
)
@click.option("--yes", is_flag=True, help="Start also what will take more than half an hour.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the tables.")
@click.pass_context
def compare(
    ctx: click.Context, config_file: str | None, plugins: tuple[str, ...], strengths: str | None,
    learning_rates: str | None, seeds: int, budget: str | None, out: Path | None, yes: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train every candidate on the same data and seeds, for as many steps or epochs, and recommend one.

    Each cell, a candidate with a seed, is an `ftplus sft` run of its own below DIR. Typed again, it goes on where it
    stopped; finished cells are kept, also for a table with more candidates or seeds.

    \b
    ftplus compare --config run.yaml --plugins none,ewc,replay,replay+distill --seeds 3 --budget 2h
    ftplus compare --config run.yaml --plugins none,ewc --strengths auto --learning-rates 1e-5,5e-5
    """
    if not config_file:
        raise UsageError("There is no config. Type --config run.yaml: what `ftplus sft --config` takes.")
    if not plugins:
        raise UsageError("There are no candidates. Type --plugins none,ewc,replay; `ftplus plugins` lists all.")
    given = read_yaml(config_file)
    take_environment(given)  # before the libraries that read it are imported
    from ..compared.plan import seconds_of

    limit = None if budget is None else seconds_of(budget)
    words = ["ftplus", "compare", *ctx.meta["words"]]
    out = out or Path(f"{str(given.get('output_dir', '')).rstrip('/')}-compare".lstrip("-")).expanduser()

    from rich.console import Console

    from ..compared.runner import Asked, compare, failed
    from ..compared.saved import save
    from ..compared.shown import table
    from ..output import no_empty_folder
    from ..page import leave_page

    console = Console(highlight=False, stderr=as_json)
    again = shlex.join([*words, "--yes"])
    with no_empty_folder(out, unless_done=True):
        out = writable(out, "--out")
        asked = Asked(given, plugins, out, seeds, strengths, learning_rates, limit, yes, again)
        with locked(out, "--out"):
            found = compare(asked, console.print, lambda said: click.echo(said, err=True))
            facts = save(found, out, shlex.join(words))
            leave_page(out / "compare.json")
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        console.print(table(found))
        if facts["recommended"]:
            click.echo(facts["recommended"]["command"])  # on one line, to be copied
        click.echo(f"All figures: {out / 'compare.json'}", err=True)
    if error := failed(found):
        raise error
