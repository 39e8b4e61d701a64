"""`ftplus memory make|push|pull`: what is worth protecting in a model, computed once and given to others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..compat import no_bars_unseen
from .generate import device_option, dtype_option

FORMS = ("full", "lora")
out_option = click.option(
    "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="An empty folder, or none."
)


@click.group()
def memory() -> None:
    """Make, publish or download EWC importances, so that others can protect a model without your data.

    \b
    ftplus memory make --model demo --protect self:256 --out memory
    ftplus memory push memory YOU/NAME
    ftplus memory pull YOU/NAME --out memory
    ftplus sft --plugin ewc --memory memory --model demo --dataset_name learn.jsonl --max_grad_norm 0
    """


@memory.command()
@click.option(
    "--model", "--model_name_or_path", "model", required=True, metavar="MODEL", help="A folder, a Hub name, or demo."
)
@click.option(
    "--protect",
    multiple=True,
    required=True,
    metavar="[NAME=]DATA[:SPLIT]",
    help="What must not be forgotten: a file, a Hub name, self:256, or self:256x48 (answers of 48 tokens). Repeatable.",
)
@out_option
@click.option(
    "--for",
    "form",
    type=click.Choice(FORMS),
    default="full",
    show_default=True,
    help="full: 2 bytes a weight, for all weights and adapters; lora: d + k numbers a layer, for adapters alone.",
)
@click.option("--rows", default=256, show_default=True, type=click.IntRange(1), help="Rows of each task that are used.")
@click.option("--max_length", default=1024, show_default=True, type=click.IntRange(2), help="Tokens of a row.")
@click.option(
    "--batch_size",
    default=4,
    show_default=True,
    type=click.IntRange(1, 4),
    help="Rows at once; smaller batches give steadier estimates.",
)
@click.option("--bf16", is_flag=True, help="Mixed precision, as in training.")
@click.option("--seed", default=0, show_default=True, help="Of the estimate, and of self-written text.")
@dtype_option
@device_option
def make(model: str, protect: tuple[str, ...], out: Path, **how: Any) -> None:
    """Estimate how much each weight matters for what is protected, once."""
    import logging

    from ..shared.hub import verify
    from ..shared.made import make

    no_bars_unseen()
    logging.getLogger("hf_ftplus").setLevel(logging.WARNING)
    base = make(model, list(protect), out, **how)
    sizes = verify(out)
    click.echo(f"{sum(sizes.values()) / 1e6:.1f} MB in {out}: {'; '.join(base.protect)}.")
    click.echo(f"Train with it: {base.command(str(out), sizes)}")


@memory.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--base", metavar="OWNER/NAME", help="Name on the Hub of the model that it is of, or that the run saved.")
@click.option("--private", is_flag=True, help="Make the repository private.")
def push(folder: Path, repo: str, base: str | None, private: bool) -> None:
    """Upload a memory to the Hub, with a card that says what it is of."""
    from ..shared.hub import push

    click.echo(push(folder, repo, base=base, private=private))


@memory.command()
@click.argument("repo", metavar="OWNER/NAME")
@out_option
@click.option("--revision", metavar="REV", help="Branch, tag or commit.")
def pull(repo: str, out: Path, revision: str | None) -> None:
    """Download a memory, and verify every byte of it."""
    from ..shared.hub import pull, verify

    base = pull(repo, out, revision=revision)
    sizes = verify(out)
    click.echo(f"{sum(sizes.values()) / 1e6:.1f} MB in {out}, verified.")
    click.echo(f"Train with it: {base.command(str(out), sizes)}")
