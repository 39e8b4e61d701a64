"""`ftplus report`: one page from a run or a sequence, or several side by side."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from ..errors import UsageError


@click.command()
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The page, ending in .html. [beside the report of one DIR; ./report.html for several]",
)
def report(folders: tuple[Path, ...], out: Path | None) -> None:
    """Make the page of a run or a sequence again, or join several on one: what each learnt against what it kept.

    \b
    ftplus report out/ewc                          # out/ewc/ftplus/report.html, report.md, report.csv
    ftplus report out/plain out/ewc --out both.html
    """
    if out and (out.is_dir() or out.suffix != ".html"):
        wanted = out / "report.html" if out.is_dir() else out.with_suffix(".html")
        raise UsageError(f"--out {out}: expected a file that ends in .html, such as {wanted}")
    from ..page import find, write

    found = find(folders)
    file = out or (found.files[0].parent if len(found.files) == 1 else Path()) / "report.html"
    words = ["ftplus", "report", *map(str, folders), *(["--out", str(out)] if out else [])]
    click.echo(write(found, file, shlex.join(words)))
