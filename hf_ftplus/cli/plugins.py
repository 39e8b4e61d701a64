"""See which strategies are installed and where from, and every setting of one of them: `ftplus plugins [NAME]`.

`ftplus plugin new` and `ftplus plugin test` are for those who write one. Both words mean the same command, so nobody
has to remember which of them is spelt with an s.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import types
import typing
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..plugins import Offer, Plugin
    from ..strategy import Setting, Strategy

COLOURS = {"ok": "green", "blocked": "yellow", "failed": "red"}


AUTHORS = {"new": "plugin_new", "test": "plugin_test"}
"""Subcommands, and the modules that they are in."""

NO_PLUGIN = click.option(
    "--no-plugin", "blocked", multiple=True, metavar="NAME", help="Leave out a plugin or a distribution."
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Plugins(click.Group):
    """`plugins`, `plugins NAME`, and the commands for authors, each imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(AUTHORS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in AUTHORS:
            return None
        return getattr(importlib.import_module(f"{__package__}.{AUTHORS[cmd_name]}"), cmd_name)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from .completion import beginning, strategies

        return [*super().shell_complete(ctx, incomplete), *beginning(strategies(), incomplete)]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, args) if args[0] in AUTHORS else (ctx.info_name, show, args)


@click.group(cls=Plugins, invoke_without_command=True, subcommand_metavar="[NAME | new NAME | test NAME]")
@NO_PLUGIN
@AS_JSON
@click.pass_context
def plugins(ctx: click.Context, blocked: tuple[str, ...], as_json: bool) -> None:
    """List the strategies that are installed; with NAME (or ./file.py), show the settings of one.

    To write one of your own: `new` makes a distribution that works, `test` says which laws a strategy breaks.
    `ftplus plugin` is the same command.
    """
    if ctx.invoked_subcommand is not None:
        ctx.obj = {"blocked": blocked, "as_json": as_json}
        return
    from .. import plugins as found

    rows = found.discover(blocked=blocked)
    if as_json:
        click.echo(json.dumps([in_full(row) for row in rows], indent=2))
    else:
        _show_table(rows, found.commands())


@click.command()
@click.argument("name")
@NO_PLUGIN
@AS_JSON
@click.pass_context
def show(ctx: click.Context, name: str, blocked: tuple[str, ...], as_json: bool) -> None:
    """Show the settings of one strategy."""
    from .. import plugins as found

    before = ctx.obj if isinstance(ctx.obj, dict) else {"blocked": (), "as_json": False}
    strategy = found.load(name, blocked=(*before["blocked"], *blocked))
    facts = describe(strategy, *found.origin(strategy))
    if as_json or before["as_json"]:
        click.echo(json.dumps(facts, indent=2, default=str))
    else:
        _show_strategy(strategy, facts, name if name.endswith(".py") else strategy.name)


def in_full(row: Plugin) -> dict[str, Any]:
    """A row for JSON: also the API that it was written for, the hooks of each strategy, and what it requires."""
    from .. import plugins as found

    classes = [found.load(f"{row.distribution}:{name}") for name in row.strategies]
    return {
        **dataclasses.asdict(row),
        "help": row.help,
        "api": _api(row.distribution, row.name),
        "hooks": {strategy.name: hooks(strategy) for strategy in classes},
        "requires": requires(row.distribution),
    }


def hooks(strategy: type[Strategy]) -> list[str]:
    """The methods of a strategy that it does not leave to the host."""
    from ..contract import HOOKS
    from ..strategy import Strategy as Base

    return [name for name in HOOKS if getattr(strategy, name) is not getattr(Base, name)]


def requires(distribution: str) -> list[str]:
    """What a distribution says that it needs; nothing where a strategy is of a file."""
    try:
        return metadata.requires(distribution) or []
    except (metadata.PackageNotFoundError, ValueError):  # of a file, or of nobody
        return []


def _api(distribution: str, name: str) -> int | None:
    """The plugin API that a module says it was written for; None where it does not say, or cannot be found."""
    from ..contract import written_for
    from ..hookspecs import API, HOST
    from ..plugins import offers

    if distribution == HOST:
        return API
    wanted = [offer.value for offer in offers() if (offer.distribution, offer.name) == (distribution, name)]
    try:
        return written_for(wanted[0]) if wanted else None
    except Exception:  # of a stranger: the package that holds the module may raise anything
        return None


def describe(strategy: type[Strategy], distribution: str, version: str) -> dict[str, Any]:
    """What a strategy says about itself, ready for JSON."""
    from ..plugins import headline
    from ..strategy import settings

    return {
        "name": strategy.name,
        "distribution": distribution,
        "version": version,
        "help": headline(strategy),
        "api": _api(distribution, strategy.name),
        "hooks": hooks(strategy),
        "requires": requires(distribution),
        "description": inspect.cleandoc(strategy.__doc__ or "") if headline(strategy) else "",
        "settings": [
            {
                "name": item.name,
                "type": type_name(item.type),
                "default": item.default,
                "unit": item.unit,
                "range": allowed(item),
                "help": item.help,
            }
            for item in settings(strategy)
        ],
    }


def type_name(kind: Any) -> str:
    """`float`, or `float | None` however it was written."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(type_name(item) for item in typing.get_args(kind))
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))


def allowed(item: Setting) -> str:
    """The values a setting takes, in words, also when it takes any of its type."""
    anything = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
    kinds = type_name(item.type).split(" | ")
    words = item.range() or " or ".join(anything.get(kind, kind) for kind in kinds if kind != "None")
    return words + (" or none" if "None" in kinds else "")


def _show_table(rows: list[Plugin], commands: list[Offer]) -> None:
    from rich.table import Table

    if not rows:
        click.echo("No plugins. hf-ftplus itself is not installed, only imported: pip install -e . in its folder.")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("plugin", "distribution", "status"):
        table.add_column(title, overflow="fold")
    table.add_column("what it does", overflow="fold", min_width=30)
    for row in rows:
        for name, help in (row.strategies or {row.name: ""}).items():
            colour = COLOURS[row.status]
            published = f"{row.distribution} {row.version}"
            table.add_row(plain(name), plain(published), plain(row.status, colour), plain(row.reason or help))
    _console().print(table)
    for command in commands:
        click.echo(f"ftplus {command.name} comes with {command.distribution} {command.version}.")
    click.echo("One of them: ftplus plugins NAME\nYour own: ftplus plugin new NAME, ftplus plugin test NAME|PATH")


def _show_strategy(strategy: type[Strategy], facts: dict[str, Any], typed: str) -> None:
    from rich.padding import Padding
    from rich.text import Text

    console = _console()
    published = f"{facts['distribution']} {facts['version']}".strip()
    console.print(Text.assemble(plain(strategy.name, "bold"), "  ", plain(published, "dim")))
    if facts["description"]:
        console.print()
        console.print(plain(reflow(facts["description"])))
    console.print("\n[bold]settings[/bold]" if facts["settings"] else "\nIt has no settings.")
    for item in facts["settings"]:
        limits = ", ".join(part for part in (item["unit"], item["range"]) if part)
        line = Text.assemble(plain(f"{item['name']} = {item['default']}", "bold"), "  ", plain(limits, "dim"))
        console.print(Padding(line, (0, 0, 0, 2), expand=False))
        console.print(Padding(plain(item["help"]), (0, 0, 0, 6), expand=False))
    example = next((item for item in facts["settings"] if item["default"] is not None), None)
    if example:
        console.print()
        setting = f"{strategy.name}.{example['name']}={example['default']}"
        console.print(plain(f"ftplus sft --plugin {typed} --set {setting} ..."), soft_wrap=True)


def reflow(text: str) -> str:
    """Paragraphs on one line each, so that the terminal breaks them; what is indented (a formula) stays as it is."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(item if re.search(r"^ ", item, re.M) else " ".join(item.split()) for item in paragraphs)


def plain(text: object, style: str = "") -> Text:
    """Text of a plugin as it is written: no markup, no emoji codes, no control characters reach the terminal."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else " " for c in str(text)), style=style)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)
