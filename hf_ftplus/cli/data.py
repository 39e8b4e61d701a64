"""`ftplus data preview` and `ftplus data check`: the words of `ftplus sft`, its rows looked at and no model loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ..config import OPTIONS, read_yaml
from ..errors import DataError, FTPlusError
from ..task_keys import KEYS
from .sft import Sft, configured, take_environment, with_options

if TYPE_CHECKING:
    from ..config import RunConfig


class Data(click.Group):
    """Lists the keys of a task after its commands: they have no flag whose help could say what they do."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Keys of a task under tasks: in YAML"):
            formatter.write_dl([(name, key.help) for name, key in KEYS.items()])


@click.group(cls=Data)
def data() -> None:
    """Look at rows as the model will see them, and find every fault, before any model loads.

    Both commands take the words of `ftplus sft`. Tasks are declared in the file given to --config:

    \b
    tasks:
      - name: summaries
        dataset: notes.jsonl
        template: "Summarise: {{ text }}"
        completion: "{{ headline }}"
      - {name: chat, dataset: "self:64", role: protect, share: 0.1}
    """


def words_of_sft(function: Callable[..., None]) -> Any:
    """A command that takes what `ftplus sft` does."""
    for decorate in (
        click.pass_context,
        click.option("--dry-run", is_flag=True, hidden=True, expose_value=False),
        click.option("--config", "config_file", metavar="FILE", help="The YAML file of the run."),
        with_options(OPTIONS),
        data.command(cls=Sft, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}),
    ):
        function = decorate(function)
    return function


@words_of_sft
@click.option("--rows", type=click.IntRange(0), default=3, show_default=True, metavar="N", help="Rows of each task.")
def preview(ctx: click.Context, config_file: str | None, rows: int, **flags: Any) -> None:
    """Show rows as the model will see them, and count tokens.

    What is learnt in a row stands between «».
    """
    config, _, _ = configured(flags, ctx.args, take_environment(read_yaml(config_file)))
    from .. import preview as looking
    from ..rows import find

    quiet(config)
    found, tokenizer = find(config), looking.load_tokenizer(config)
    for see in looking.tasks_of(found, config, tokenizer, rows):
        task = see()
        click.echo(task)
        for number, row in enumerate(task.shown, 1):
            click.echo(f"  {number}  {looking.marked(row, tokenizer)}")


@words_of_sft
def check(ctx: click.Context, config_file: str | None, **flags: Any) -> None:
    """Find every fault of every task at once.

    Without any, it counts the rows and tokens of each task. Its exit code is 3 if there is one.
    """
    from ..tasks import read

    yaml = take_environment(read_yaml(config_file))
    tasks, faults = read(yaml.pop("tasks", None))
    lines: list[str] = []
    try:
        config, _, _ = configured(flags, ctx.args, yaml | ({"tasks": tasks} if tasks else {}))
        lines, more = look(config)
        faults += more
    except FTPlusError as error:
        if not faults:
            raise
        faults += [str(error)] if tasks else []
    if faults:
        raise DataError("\n".join(faults))
    for line in lines:
        click.echo(line)


def look(config: RunConfig) -> tuple[list[str], list[str]]:
    """A line for each task, and what is wrong with any of them."""
    from .. import preview as looking
    from ..rows import gather, noting

    quiet(config)
    rows, faults = gather(config)
    lines: list[str] = []
    with noting(faults):
        for see in looking.tasks_of(rows, config, looking.load_tokenizer(config)):
            with noting(faults):
                lines.append(str(see()))
    return lines, [str(fault) for fault in faults]


def quiet(config: RunConfig) -> None:
    """Warnings on stderr, no progress bars where nobody watches."""
    from ..run import speak

    speak(config)
    logging.getLogger("hf_ftplus").setLevel(logging.WARNING)
