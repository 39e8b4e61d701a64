"""Find out which laws a strategy breaks: `ftplus plugin test NAME|PATH`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import click

from ..errors import PluginError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..strategy import Strategy
    from ..testing import Verdict

LAW, WORD = 17, 7
"""Widths of the columns: the longest name of a law, the longest word on it."""


@click.command(name="test", short_help="Say which laws a strategy breaks.")
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

    NAME is installed; PATH is a file of Python, or the folder of a distribution that need not be. What a strategy does
    otherwise, and means to, its class declares (`judged`: see plugins/README.md); what is typed here goes before it.
    Exits with 7 if a law is broken.
    """
    from ..plugins import find, resolve

    warnings.filterwarnings("default", "plugin API . will drop", DeprecationWarning)  # its author looks on
    strategies = [resolve(kind, values(changes)) for kind in find(name)]
    laws = laws_called(only)
    asked = {
        "from_start": False if acts_at_start else None,
        "zero": values(zero) or None,
        "second_run": second_run or None,
        "tasks": tasks,
        "peft": False if no_lora else None,
    }
    reports = [_judged(strategy, laws, asked, distributed, as_json) for strategy in strategies]
    if as_json:
        click.echo(json.dumps(reports, indent=2))
    broken = {
        report["strategy"]: [law["law"] for law in report["laws"] if not (law["kept"] or law["excuse"])]
        for report in reports
    }
    if any(broken.values()):
        said = "; ".join(f"{strategy} breaks {', '.join(laws)}" for strategy, laws in broken.items() if laws)
        raise PluginError(f"{said}. The reason and the fix stand above.")


def _judged(
    strategy: Strategy, laws: list[Any] | None, asked: dict[str, Any], distributed: bool, silent: bool
) -> dict[str, Any]:
    """The verdicts on one strategy, each shown as it comes."""
    from ..plugins import origin
    from ..testing import judge
    from ..testing.declared import expected
    from ..testing.judged import refused_lora

    published = " ".join(origin(type(strategy))).strip()
    lora = expected(strategy, **asked).get("peft", True)
    shown, begin = None if silent else Shown(strategy, published), time.perf_counter()
    with _silence():
        refused = refused_lora(strategy, **asked) if lora else ""
        found: list[Verdict] = []
        for verdict in judge(strategy, laws=laws, processes=distributed, **{**asked, "peft": lora and not refused}):
            found.append(verdict)
            if shown:
                shown.verdict(verdict)
    if shown:
        shown.end(found, refused, time.perf_counter() - begin)
    return {
        "strategy": strategy.name,
        "settings": repr(strategy),
        "published": published,
        "lora": "not judged" if not lora else refused or "judged",
        "two_processes": distributed,
        "laws": [dataclasses.asdict(verdict) for verdict in found],
    }


class Shown:
    """What the terminal says while the laws are tried: a line for each as soon as it is known."""

    def __init__(self, strategy: Strategy, published: str) -> None:
        from rich.console import Console

        from .plugins import plain

        self.console, self.plain = Console(highlight=False), plain
        self.console.print(plain(f"{strategy!r}  {published}"), soft_wrap=True)

    def verdict(self, verdict: Verdict) -> None:
        from rich.table import Table

        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=LAW)
        table.add_column(width=WORD)
        table.add_column(overflow="fold")
        word = self.plain("kept", "green") if verdict.kept else self.plain("broken", "red")
        if verdict.excuse and not verdict.kept:
            word = self.plain("excused", "yellow")
        table.add_row(self.plain(verdict.law), word, self.plain(verdict.found))
        for more in (verdict.fix, "" if verdict.kept else verdict.excuse):
            if more:
                table.add_row("", "", self.plain(more, "italic"))
        self.console.print(table)

    def end(self, found: list[Verdict], refused: str, seconds: float) -> None:
        kept = sum(verdict.kept for verdict in found)
        excused = sum(not verdict.kept and not verdict.counts for verdict in found)
        said = f", {excused} broken knowingly" if excused else ""
        self.console.print(f"{kept} of {len(found)} laws kept{said}, in {seconds:.0f} s.")
        if refused:
            text = f"Not judged on a LoRA adapter, which it refuses: {refused}"
            self.console.print(self.plain(text), soft_wrap=True)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The laws train dozens of tiny models: what each of them would say is not for the author."""
    import logging

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


def laws_called(only: Sequence[str]) -> list[Any] | None:
    """The laws of these names; None for all."""
    from ..errors import nearest
    from ..testing.declared import named

    known = named()
    for word in only:
        if word not in known:
            raise UsageError(f"--law {word!r} is none.{nearest(word, list(known))} Laws: {', '.join(known)}.")
    return [known[word] for word in only] or None


def values(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`strength=0.1` as `{"strength": "0.1"}`; settings cast it."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UsageError(f"{pair!r}; expected SETTING=VALUE, as in strength=0.1.")
        found[key.rpartition(".")[2]] = value.strip()
    return found
