"""`ftplus generate`: try a trained model on prompts of your own, beside another model if you like."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..compat import no_bars_unseen
from ..disk import attempt, write
from ..errors import StorageError, UsageError

if TYPE_CHECKING:
    from ..asked import Answered
    from ..trained import Trained

BASE = "base"

dtype_option = click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the weights; auto: as they were saved.",
)
device_option = click.option("--device", help="Such as cuda:1 or cpu; the accelerator if there is one.")


@click.command()
@click.option(
    "--model",
    "--model_name_or_path",
    "name",
    required=True,
    metavar="MODEL",
    help="What `ftplus sft` wrote: a model, or an adapter; the name of either on the Hub; or demo.",
)
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Repeatable; - reads a prompt from each line of stdin."
)
@click.option(
    "--file",
    metavar="FILE",
    help="Prompts: .jsonl, .json, .csv, .parquet (`prompt`, maybe `completion`; or `messages`), .txt (one a line).",
)
@click.option(
    "--compare-with",
    metavar="MODEL",
    help="Answer with this model, too, side by side; base: what the run started from.",
)
@click.option("--max_new_tokens", default=128, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token; more draws more freely.",
)
@click.option(
    "--top_p",
    default=1.0,
    show_default=True,
    help="Draw among the likeliest tokens with this much probability.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Of what is drawn.")
@click.option("--batch_size", default=8, show_default=True, type=click.IntRange(1), help="Prompts answered at once.")
@click.option("--system", metavar="TEXT", help="A system message before each chat.")
@click.option("--no-chat", is_flag=True, help="Give text to the model as it is, without its chat template.")
@click.option(
    "--out", metavar="FILE.jsonl", type=click.Path(path_type=Path), help="Also write prompts and answers here."
)
@dtype_option
@device_option
def generate(
    name: str, prompts: tuple[str, ...], file: str | None, compare_with: str | None, out: Path | None,
    system: str | None, no_chat: bool, dtype: str, device: str | None, **how: Any,
) -> None:  # fmt: skip
    """Answer prompts with a trained model.

    \b
    ftplus generate --model OUTPUT --prompt "What does Norvane make?"
    ftplus generate --model OUTPUT --file prompts.jsonl --compare-with base --out answers.jsonl
    """
    typed = list(_typed(prompts, ask_stdin=not prompts and not file))
    if out and out.is_dir():
        raise StorageError(f"--out {out} is a folder; expected a file to write, such as answers.jsonl.")
    if out and out.exists():
        raise StorageError(f"--out {out} is there already. Choose another file, or remove it.")
    if out:
        _make_room(out)
    if how["temperature"] and not 0.01 <= how["temperature"] <= 100:  # less divides logits by next to nothing
        raise UsageError(f"--temperature is {how['temperature']:g}; expected 0, or 0.01 to 100.")
    if not 0 < how["top_p"] <= 1:
        raise UsageError(f"--top_p is {how['top_p']:g}; expected more than 0, and at most 1.")
    if how["top_p"] < 1 and not how["temperature"]:
        raise UsageError("--top_p does nothing at temperature 0, which takes the likeliest token. Add --temperature 1.")

    from ..asked import How, ask, questions_of
    from ..trained import load, tokenizer_of

    no_bars_unseen()
    names = [name, *([_other(name, compare_with)] if compare_with else [])]
    chats = [bool(tokenizer_of(each or name).chat_template) for each in names]
    rows = [
        questions_of(typed, file, each or BASE, chat, system, not no_chat)
        for each, chat in zip(names, chats, strict=True)
    ]
    models = [load(name, dtype, device)]
    models += [load(each, dtype, device) if each else models[0].base() for each in names[1:]]
    if compare_with:
        _say_who_reads_text(models, no_chat)
    answered = []
    for item in ask(models, rows, How(**how)):
        _show(item, models)
        answered.append(item)
    if compare_with:
        differ = sum(item.answers[0] != item.answers[1] for item in answered)
        click.echo(f"{differ} of {len(answered)} answers differ.")
    if out:
        _write(answered, models, out)


def _typed(prompts: tuple[str, ...], ask_stdin: bool) -> Iterator[str]:
    """Prompts of the command line; `-`, or none at all with something piped in, stands for the lines of stdin."""
    piped = ask_stdin and not sys.stdin.isatty()
    for prompt in ("-",) if piped else prompts:
        if prompt == "-":
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        else:
            yield prompt


def _other(name: str, compared: str) -> str | None:
    """The model to compare `name` with; None for its own base, which is the same with the adapter switched off."""
    from ..trained import base_of, began_with, resolve

    base = base_of(name)
    if base and (compared == BASE or resolve(compared) == base):
        return None
    return began_with(name) if compared == BASE else compared


def _say_who_reads_text(models: list[Trained], no_chat: bool) -> None:
    """Where one of two models has a chat template, the other is asked otherwise, and may answer otherwise for that."""
    without = [model.name for model in models if not model.tokenizer.chat_template]
    if len(without) == 1 and not no_chat:
        click.echo(f"{without[0]} has no chat template: it reads each prompt as text, not as a user's turn.", err=True)


def _show(item: Answered, models: list[Trained]) -> None:
    """One question with its answers: below each other, or side by side for two models."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..report.text import label, shown

    console = Console(highlight=False)
    long = {"characters": 100_000, "lines": 1000}
    console.print(Text("> ").append_text(shown(item.prompt, **long)), style="bold")
    if item.expected:
        console.print(Text("expected: ").append_text(shown(item.expected, **long)), style="dim")
    if len(models) == 1:
        console.print(shown(item.answers[0], **long), "", sep="\n")
        return
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True, header_style="cyan")
    for model in models:
        grid.add_column(label(model.name), overflow="fold", ratio=1)
    grid.add_row(*(shown(answer, **long) for answer in item.answers))
    console.print(grid, "")


def _make_room(out: Path) -> None:
    """See before anything loads that `out` can be written."""
    with attempt(f"--out {out}", "another file"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write(out, "")
        out.unlink()


def _write(answered: list[Answered], models: list[Trained], out: Path) -> None:
    lines = [
        json.dumps(
            {"prompt": item.prompt, "completion": item.answers[0], "model": models[0].name}
            | ({"expected": item.expected} if item.expected else {})
            | ({"compared": item.answers[1], "compared_with": models[1].name} if len(models) > 1 else {}),
            ensure_ascii=False,
        )
        for item in answered
    ]
    with attempt(f"--out {out}", "another file"):
        write(out, "\n".join(lines) + "\n")
    click.echo(f"{len(lines)} answers written to {out}", err=True)
