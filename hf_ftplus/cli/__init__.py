"""The command line: `ftplus sft`, `ftplus sequence`, ...; each command is imported when it is called.

Whatever goes wrong ends in one red line on stderr and the exit code of the error. The traceback is for `--debug`.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from .. import compat
from ..errors import FTPlusError, UsageError, nearest

COMMANDS = {
    "init": "Write the YAML of a run: four questions, or their flags.",
    "advise": "Say which strategy to begin with, in four situations.",
    "sft": "Fine-tune as `trl sft` does, and keep what the model knows.",
    "sequence": "Train one stage after another; every task is measured after each.",
    "data": "Look at the rows of a run, or find every fault in them, before any model loads.",
    "compare": "Train with several strategies on the same data, and say which to take.",
    "eval": "Score models on the same rows: what each kept, lost and gained.",
    "report": "Make the page of a run again, or join several on one.",
    "generate": "Try a trained model on prompts of your own, beside another one.",
    "merge": "Put an adapter into its base: one model to deploy.",
    "memory": "Make, publish or download EWC importances, so that others can protect a model without your data.",
    "plugins": "List strategies, or the settings of one; plugin new, plugin test: write your own.",
    "doctor": "Show versions, devices, and which fast paths are active.",
}

ALIASES = {"plugin": "plugins"}

MEANT = {"train": "sft", "finetune": "sft", "fine-tune": "sft"}
"""What others call a command."""

ELSEWHERE = {"repair": "ftplus-wise"}
"""Commands of plugins that are kept in the repository."""

RANKS = "FTPLUS_RANKS"
"""Environment variable: the folder in which launched processes leave how they ended (launch.py)."""


COMPLETES = "_FTPLUS_COMPLETE"
"""Environment variable: set by the shell while it asks what could be typed."""


class Commands(click.Group):
    """A group that knows its commands by name and imports `hf_ftplus.cli.NAME` for the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if COMPLETES in os.environ:
            from .completion import teach

            found = self._found(cmd_name)
            return found and teach(found)
        return self._found(cmd_name)

    def _found(self, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            from ..plugins import load_command  # of a command `ftplus WORD` that a plugin brings

            return load_command(cmd_name)
        import logging  # not for `ftplus --help`, as all of the standard library that takes milliseconds

        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of what nothing here calls
        return getattr(importlib.import_module(f"{__name__}.{cmd_name}"), cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if not _of_sft(error.option_name):
                raise
            name = error.option_name
            raise UsageError(f"{name} is a flag of ftplus sft. Type ftplus sft {name} ...") from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        args = [ALIASES.get(args[0], args[0]), *args[1:]]
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise UsageError(_unknown(args[0]))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):  # from the table above: help must not import what it lists
            formatter.write_dl(list(COMMANDS.items()))


def _of_sft(flag: str) -> bool:
    from ..config import OPTIONS
    from .completion import flags_of_trl

    return flag.replace("-", "_") in {f"__{option.name}" for option in OPTIONS} | {
        known.replace("-", "_") for known in (*flags_of_trl(), "--model", "--config")
    }


def _unknown(word: str) -> str:
    if owner := ELSEWHERE.get(word):
        return f"ftplus {word} comes with {owner}. In a clone: pip install ./plugins/{owner}."
    known = list(COMMANDS)
    meant = f" Did you mean {MEANT[word]!r}?" if word in MEANT else nearest(word, known)
    return f"No command {word!r}.{meant} Commands: {', '.join(known)}."


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from importlib import metadata

        click.echo(f"ftplus {metadata.version('hf-ftplus')}")
        ctx.exit()


def _dashes(flag: str) -> str:
    """Flags of every command may be written with underscores, as TRL's are."""
    return flag.replace("_", "-")


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _dashes},
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Fine-tune without forgetting, on the trainer you already use.

    \b
    ftplus sft --plugin ewc --model demo --dataset_name learn.jsonl --protect old.jsonl --max_grad_norm 0

    Without a command: what to type next.
    """
    if ctx.invoked_subcommand is None:
        from .begin import next_steps

        click.echo(next_steps())


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code is 0, that of the error, 130 after Ctrl-C, or 143 after SIGTERM."""
    code = 1
    if args is None and "LOCAL_RANK" in os.environ:
        atexit.register(lambda: compat.leave(code))  # the first one registered is the last one called
    try:
        code = _run(list(sys.argv[1:] if args is None else args))
    except SystemExit as error:  # of what a command calls
        code = error.code if isinstance(error.code, int) else 1
        raise
    return code


def _run(args: list[str]) -> int:
    words, debug = _take_debug(args)
    compat.quiet()
    try:
        result = cli.main(words, prog_name="ftplus", standalone_mode=False, obj=debug)
        return _end(result if isinstance(result, int) else 0)
    except (click.Abort, KeyboardInterrupt) as error:
        said = (error.__cause__ or error).args  # click turns KeyboardInterrupt into Abort; SIGTERM has put 143 in it
        return _end(next((code for code in said if isinstance(code, int)), 130), "interrupted", debug)
    except BrokenPipeError:  # `ftplus plugins | head`: nobody reads on, and that is no error of ours
        _close_stdout()
        return 1
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return _end(error.exit_code, error.format_message(), debug)
    except FTPlusError as error:
        return _end(error.exit_code, str(error), debug)
    except Exception as error:
        where = "" if debug else f" The traceback is in {_keep_traceback()}."
        return _end(1, f"{type(error).__name__}: {error}.{where}", debug)


def _take_debug(words: list[str]) -> tuple[list[str], bool]:
    """Take our bare `--debug` out, wherever it stands; `--debug underflow_overflow` is a flag of transformers."""
    last = len(words)
    ours = {
        place
        for place, word in enumerate(words)
        if word == "--debug" and (place + 1 == last or words[place + 1].startswith("-") or words[place + 1] in COMMANDS)
    }
    return [word for place, word in enumerate(words) if place not in ours], bool(ours)


def _end(code: int, sentence: str = "", debug: bool = False) -> int:
    """Say how the command ended, or leave it to the process that launched this one, which says it once for all."""
    if debug and code:
        import traceback

        traceback.print_exc()
    if RANKS in os.environ:
        import json

        file = Path(os.environ[RANKS]) / os.environ.get("RANK", "0")
        file.write_text(json.dumps([code, sentence]), encoding="utf-8")
    elif code:
        click.secho(f"ftplus: error: {sentence}", fg="red", err=True)
    return code


def _keep_traceback() -> str:
    """An error that nobody foresaw, perhaps hours into a run: keep its traceback in a file."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="ftplus-", suffix=".txt", delete=False, encoding="utf-8") as file:
        traceback.print_exc(file=file)
    return file.name


def _close_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit raises once more
