"""`ftplus merge`: adapter and base as one model that can be deployed."""

from __future__ import annotations

from pathlib import Path

import click

from ..compat import no_bars_unseen
from .generate import device_option, dtype_option


@click.command()
@click.option(
    "--model",
    "--model_name_or_path",
    "name",
    required=True,
    metavar="ADAPTER",
    help="The folder that `ftplus sft --use_peft` wrote, or an adapter's name on the Hub.",
)
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="An empty folder, or none.")
@dtype_option
@device_option
def merge(name: str, out: Path, dtype: str, device: str | None) -> None:
    """Write an adapter and its base as one model.

    A base that was trained on in 4 or 8 bits (QLoRA) is loaded unquantised. Both are merged in fp32, which takes 4
    bytes of memory a weight, compared there with base and adapter, and rounded to --dtype once.
    """
    from ..merged import merge

    no_bars_unseen()
    done = merge(name, out, dtype, device)
    click.echo(
        f"{done.weights / 1e6:.1f} M weights in {done.dtype} in {done.folder}. The adapter moves the base's logits by "
        f"at most {done.moved:.2g}, rounding the merged weights by {done.rounded:.2g}: {done.lost:.1%} of that."
        + (" --dtype float32 keeps all of it." if done.lost > 0.1 else "")
    )
