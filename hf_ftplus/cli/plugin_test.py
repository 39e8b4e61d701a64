"""Find out which laws a strategy breaks: `ftplus plugin test NAME|PATH`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from ..errors import PluginError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..strategy import Strategy
    from ..testing import Verdict


@click.command(name="test")
@click.argument("name", metavar="NAME|PATH")
@click.option("--set", "changes", multiple=True, metavar="SETTING=VALUE", help="A setting to judge it by. Repeatable.")
@click.option(
    "--zero", multiple=True, metavar="SETTING=VALUE", help="What turns it off.  [strength, share or weight = 0]"
)
@click.option("--second-run", is_flag=True, help="Judge it with the memory of a first run: a first one only records.")
@click.option("--acts-at-start", is_flag=True, help="It is meant to act before any weight has moved.")
@click.option("--tasks", type=click.IntRange(2), metavar="N", help="Learn rows of N tasks, in a column `task`.")
@click.option("--no-lora", is_flag=True, help="Judge it on full fine-tuning alone.")
@click.option("--distributed", is_flag=True, help="Also train on two processes (gloo).")
@click.option("--law", "only", multiple=True, metavar="LAW", help="Only this law, as 'acts'. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def test(
    name: str, changes: tuple[str, ...], zero: tuple[str, ...], second_run: bool, acts_at_start: bool,
    tasks: int | None, no_lora: bool, distributed: bool, only: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Judge a strategy by the laws that all strategies keep, on a tiny model, on the CPU, without network.

    NAME is installed; PATH is a file of Python, or the folder of a distribution that need not be. Exits with 7 if a law
    is broken.
    """
    from ..plugins import find, resolve

    classes = find(name)
    strategies = [resolve(kind, _values(changes)) for kind in classes]
    laws = _laws(only)
    world = {"second_run": second_run, "learn": _rows_of(tasks)}
    asked = {"from_start": False if acts_at_start else None, "zero": _values(zero) or None, "processes": distributed}
    reports = [_judged(strategy, not no_lora, laws, world, asked, as_json) for strategy in strategies]
    if as_json:
        click.echo(json.dumps(reports, indent=2))
    broken = {report["strategy"]: [law["law"] for law in report["laws"] if not law["kept"]] for report in reports}
    if any(broken.values()):
        said = "; ".join(f"{strategy} breaks {', '.join(laws)}" for strategy, laws in broken.items() if laws)
        raise PluginError(f"{said}. The reason and the fix stand above.")


def _judged(
    strategy: Strategy, lora: bool, laws: list[Any] | None, world: dict[str, Any], asked: dict[str, Any], silent: bool
) -> dict[str, Any]:
    """The verdicts on one strategy, shown as they come."""
    from ..plugins import origin
    from ..testing import judge
    from ..testing.judged import refused_lora

    published = " ".join(origin(type(strategy))).strip()
    found: list[Verdict] = []
    with _silence():
        refused = refused_lora(strategy, **world) if lora else ""
        for verdict in judge(strategy, laws=laws, peft=lora and not refused, **world, **asked):
            found.append(verdict)
            if not silent and sys.stderr.isatty():
                click.echo(f"\r{len(found)} laws tried", nl=False, err=True)
    if not silent and sys.stderr.isatty():
        click.echo("\r" + " " * 16 + "\r", nl=False, err=True)
    if not silent:
        _show(strategy, published, found, refused)
    return {
        "strategy": strategy.name,
        "settings": repr(strategy),
        "published": published,
        "lora": "not judged" if not lora else refused or "judged",
        "two_processes": asked["processes"],
        "laws": [dataclasses.asdict(verdict) for verdict in found],
    }


def _show(strategy: Strategy, published: str, found: list[Verdict], refused: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from .plugins import plain

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("law", "", "what was found, and how to mend it"):
        table.add_column(title, overflow="fold")
    for verdict in found:
        kept = plain("kept", "green") if verdict.kept else plain("broken", "red")
        table.add_row(plain(verdict.law), kept, plain(verdict.found))
        if verdict.fix:
            table.add_row("", "", plain(verdict.fix, "italic"))
    console = Console(highlight=False)
    console.print(plain(f"{strategy!r}  {published}"), soft_wrap=True)
    console.print(table)
    kept = sum(verdict.kept for verdict in found)
    console.print(f"{kept} of {len(found)} laws kept, in {sum(verdict.seconds for verdict in found):.0f} s.")
    if refused:
        console.print(plain(f"Not judged on a LoRA adapter, which it refuses: {refused}"), soft_wrap=True)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The laws train dozens of tiny models: what each of them would say is not for the author."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    ours, level, bars = logging.getLogger("hf_ftplus"), transformers_logging.get_verbosity(), sys.stderr.isatty()
    ours_level = ours.level
    try:
        ours.setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.setLevel(ours_level)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _laws(only: tuple[str, ...]) -> list[Any] | None:
    from ..errors import nearest
    from ..testing import LAWS

    known = {law.__name__.removeprefix("law_").replace("_", " "): law for law in LAWS}
    for word in only:
        if word not in known:
            raise UsageError(f"--law {word!r} is none.{nearest(word, list(known))} Laws: {', '.join(known)}.")
    return [known[word] for word in only] or None


def _rows_of(tasks: int | None) -> Any:
    """Learn rows of several tasks; None for the usual ones."""
    from ..testing import tiny_rows

    if tasks is None:
        return None
    rows = tiny_rows(seed=0)
    return rows.add_column("task", [f"task {i % tasks + 1}" for i in range(len(rows))])


def _values(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`strength=0.1` as `{"strength": "0.1"}`; settings cast it."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UsageError(f"{pair!r}; expected SETTING=VALUE, as in strength=0.1.")
        found[key.rpartition(".")[2]] = value.strip()
    return found
