"""What the shell completes: files wherever a value may be one, strategies by name, and the flags of `trl sft`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem

FILES = re.compile(r"\b(FILE|YAML|DATA|DIR|MODEL|ADAPTER|PATH)\b")
"""In a metavar: the value may be a file or a folder."""
TRL = {
    "trl": ("trainer/base_config.py", "trainer/sft_config.py", "trainer/model_config.py", "scripts/utils.py"),
    "transformers": ("training_args.py",),
}
"""Where the flags of `trl sft` are declared: making its parser takes seconds."""
NOT_FLAGS = ("DatasetConfig",)
"""A class there whose fields are keys of YAML alone."""


def teach(command: click.Command) -> click.Command:
    """Make a command, and those below it, complete files and strategies."""
    for name in command.list_commands(click.Context(command)) if isinstance(command, click.Group) else ():
        teach(command.get_command(click.Context(command), name))
    for param in command.params:
        words = _words(param)
        if words or FILES.search(param.metavar or ""):
            param.shell_complete = lambda ctx, incomplete, words=words: chosen(words() if words else (), incomplete)
    if not isinstance(command, click.Group):
        flags = command.shell_complete
        command.shell_complete = lambda ctx, incomplete: (
            flags(ctx, incomplete) if incomplete.startswith("-") else chosen((), incomplete)
        )
    return command


def chosen(words: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """Those of `words` that begin so; files where none does: bash shows only one kind."""
    return beginning(words, incomplete) or [CompletionItem(incomplete, type="file")]


def beginning(words: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _words(param: click.Parameter) -> Callable[[], Iterable[str]] | None:
    """What gives the values that a parameter is known to take."""
    if param.name == "hardware":
        from .init import KINDS

        return lambda: KINDS
    named = isinstance(param, click.Option) and param.name in ("plugin", "no_plugin", "blocked")
    return strategies if named or param.metavar == "NAME|PATH" else None


def strategies() -> list[str]:
    """Names of what is installed; nothing is imported."""
    from ..plugins import offers

    return sorted({offer.name for offer in offers()})


def flags_of_trl() -> list[str]:
    """Every flag of `trl sft`, read from the sources that declare it."""
    return list(dict.fromkeys(_declared()))


def _declared() -> Iterator[str]:
    for package, files in TRL.items():
        found = importlib.util.find_spec(package)  # which does not import it
        for file in files if found and found.origin else ():
            source = Path(found.origin).parent / file
            yield from _fields(source.read_text(encoding="utf-8")) if source.is_file() else ()


def _fields(source: str) -> Iterator[str]:
    _, *classes = re.split(r"^class (\w+)", source, flags=re.M)
    for name, body in zip(classes[::2], classes[1::2], strict=True):
        if name not in NOT_FLAGS:
            yield from (f"--{field}" for field in re.findall(r"^    ([a-z]\w*): [^\n]+ = (?:field\(|\w)", body, re.M))
