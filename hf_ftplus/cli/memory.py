"""`ftplus memory make|push|pull`: what is worth protecting in a model, computed once and given to others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .generate import device_option, dtype_option

if TYPE_CHECKING:
    from ..shared.base import Base

FORMS = ("full", "lora")
out_option = click.option(
    "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="An empty folder, or none."
)


@click.group()
def memory() -> None:
    """Make, publish and fetch what EWC needs to protect a model: others need no data.

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
    "--batch_size", default=4, show_default=True, type=click.IntRange(1), help="Rows at once; few are steady."
)
@click.option("--bf16", is_flag=True, help="Mixed precision, as in training.")
@click.option("--seed", default=0, show_default=True, help="Of the estimate, and of self-written text.")
@dtype_option
@device_option
def make(model: str, protect: tuple[str, ...], out: Path, **how: Any) -> None:
    """Estimate how much each weight matters for what is protected, once."""
    import logging
    import sys

    from transformers.utils import logging as transformers_logging

    from ..shared.hub import verify
    from ..shared.made import make

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    logging.getLogger("hf_ftplus").setLevel(logging.WARNING)
    base = make(model, list(protect), out, **how)
    size = sum(verify(out).values()) / 1e6
    click.echo(f"{size:.1f} MB in {out}: {'; '.join(base.protect)}.")
    _next(base, out)


@memory.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--base", metavar="NAME", help="Name on the Hub of the model that it is of, or that the run saved.")
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
    click.echo(f"{sum(verify(out).values()) / 1e6:.1f} MB in {out}, verified.")
    _next(base, out)


def _next(base: Base, folder: Path) -> None:
    from .plugins import plain

    words = f"--memory {folder} --model_name_or_path {plain(base.name)}"
    words += " --use_peft" if base.form == "lora" else ""
    click.echo(f"Train with it: ftplus sft --plugin ewc {words} --max_grad_norm 0 --dataset_name YOUR_DATA")
