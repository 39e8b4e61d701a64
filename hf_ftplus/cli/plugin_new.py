"""Start a strategy of your own: `ftplus plugin new NAME` writes a distribution that installs, trains and passes."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import click

from .. import __version__
from ..disk import attempt, refuse_full
from ..errors import UsageError

TEMPLATE = Path(__file__).parents[1] / "template"
"""What is written: each file with `.txt` after its name, and `dot-` for a leading dot."""
NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
VERBS = ("new", "test")
"""Words after `ftplus plugin` that are no names."""


@click.command(name="new", short_help="Write a distribution with one strategy.")
@click.argument("name")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Where to.  [./ftplus-NAME]")
@click.option("--author", metavar="NAME", help="Who holds the copyright.  [the authors of ftplus-NAME]")
def new(name: str, out: Path | None, author: str | None) -> None:
    """Write a distribution with one strategy in it, to install, to change and to publish.

    It has an entry point, a strategy of a few lines that works, a test of the laws, README, LICENSE (MIT), a CI file
    and a changelog, and passes its tests as it is.
    """
    name = name.removeprefix("ftplus-")
    check(name)
    if author and (not author.isprintable() or '"' in author or "\\" in author):
        raise UsageError(f"--author {author!r}; expected a name without quotes and backslashes.")
    folder = out or Path(f"ftplus-{name}")
    files = write(folder, name, author or f"the authors of ftplus-{name}")
    for file in files:
        click.echo(f"  {file}")
    click.echo(
        f"\nNext:\n  cd {folder}\n  pip install -e '.[test]'\n  ftplus plugin test {name}\n  pytest\n"
        f"Then put your idea into ftplus_{module(name)}.py.\n"
        "hf-ftplus is on no package index yet: a line of .github/workflows/test.yml says where CI gets it; complete it."
    )


def check(name: str) -> None:
    """Refuse a name that nothing could be published under."""
    from ..plugins import OURS, offers

    if not NAME.fullmatch(name) or name in VERBS:
        raise UsageError(
            f"A strategy cannot be called {name!r}; expected lower-case letters and digits, with - between words, such "
            f"as slow-start{', and neither ' + ' nor '.join(VERBS) if name in VERBS else ''}."
        )
    if name in OURS:
        raise UsageError(f"{name!r} is the strategy of ftplus-{name}, which comes with hf-ftplus. Choose another.")
    taken = [offer for offer in offers() if offer.name == name]
    if taken:
        raise UsageError(
            f"{name!r} is a strategy of {taken[0].distribution} {taken[0].version}, and one name means one strategy. "
            "Choose another."
        )


def write(folder: Path, name: str, author: str) -> list[Path]:
    """Write every file of the template under its own name; returns them, in order.

    Raises:
        StorageError: the folder holds something, or cannot be written.
    """
    refuse_full(folder)
    words = {
        "ftplus_ownidea": f"ftplus_{module(name)}",
        "test_ownidea": f"test_{module(name)}",
        "ownidea": name,
        "OwnIdea": "".join(word.capitalize() for word in re.split("[-_]", name)),
        "THE-AUTHOR": author,
        "THE-YEAR": str(datetime.date.today().year),
        "THE-VERSION": ".".join(__version__.split(".")[:2]),
    }
    written = []
    with attempt(folder, "another: --out DIR"):
        for source in sorted(TEMPLATE.rglob("*.txt")):
            place = str(source.relative_to(TEMPLATE).with_suffix("")).replace("dot-", ".")
            file = folder / _filled(place, words)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_filled(source.read_text(encoding="utf-8"), words), encoding="utf-8")
            written.append(file)
    return written


def module(name: str) -> str:
    """`slow-start` as a part of a Python name."""
    return name.replace("-", "_")


def _filled(text: str, words: dict[str, str]) -> str:
    return re.sub("|".join(words), lambda found: words[found[0]], text)
