"""`ftplus advise`: which strategy to begin with, in four situations."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from ..advice import TABLE


@click.command()
@click.argument("situation", required=False, type=click.Choice([item.key for item in TABLE]))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def advise(situation: str | None, as_json: bool) -> None:
    """Say which strategy to begin with: have protect data, have none, a sequence, a small machine."""
    rows = [item for item in TABLE if situation in (None, item.key)]
    if as_json:
        click.echo(json.dumps([asdict(item) for item in rows], indent=2))
        return
    for item in rows:
        click.secho(f"{item.situation} ({item.key})", bold=True)
        click.echo(f"  {item.take}")
        click.echo(click.wrap_text(item.why, 80, "      ", "      "))
        click.echo()
    click.echo("A file with all of it, commented: ftplus init. What is best on your own data: ftplus compare.")
