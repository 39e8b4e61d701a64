"""`ftplus init`: four questions, or their flags, and a commented YAML that `ftplus sft --config` takes as it is."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import click

from ..advice import LORA_RATE, LORA_SHARE
from ..errors import StorageError, UsageError

MARK = "# Written by `ftplus init`"
"""How the file begins; `ftplus` alone looks for it."""
FILES = (".jsonl", ".json", ".csv", ".parquet")
KINDS = ("cpu", "small", "large")
HARDWARE = "cpu, small (one GPU, LoRA), large (one GPU, all weights), or the number of GPUs"
MEANT = {"gpu": "small"}
"""Another word for one of these."""
QUESTIONS = {
    "model": ("Which model? A folder, a name on the Hub, or demo", "demo"),
    "learn": ("What shall it learn? A .jsonl, .json, .csv or .parquet file, or a name on the Hub", "learn.jsonl"),
    "protect": (
        "What must it not forget? A file, a name on the Hub, or self:64x48 (the model writes 64 rows of up to 48 "
        "tokens itself)",
        "self:64x48",
    ),
    "hardware": (f"On what? {HARDWARE}", "small"),
}
"""What is asked, and what is proposed (on what: `here` says)."""
SELF = re.compile(r"self:\d+(x\d+)?")
BYTES = {"ewc": 8, "distill": 4}
"""Held for each trained weight, in full fine-tuning."""


@click.command()
@click.option("--model", "--model_name_or_path", metavar="MODEL", help=QUESTIONS["model"][0] + ".")
@click.option("--learn", "--dataset_name", metavar="DATA", help=QUESTIONS["learn"][0] + ".")
@click.option("--protect", multiple=True, metavar="[NAME=]DATA[:SPLIT]", help=QUESTIONS["protect"][0] + ". Repeatable.")
@click.option("--hardware", metavar="WHAT", help=HARDWARE + ".")
@click.option(
    "--out",
    default="run.yaml",
    show_default=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where it is written; - prints it.",
)
def init(model: str | None, learn: str | None, protect: tuple[str, ...], hardware: str | None, out: Path) -> None:
    """Write the YAML of a run: four questions, or their flags."""
    from ..disk import writable, write

    if str(out) != "-":
        if out.exists():
            raise StorageError(f"{out} exists; expected a new file. Type --out OTHER.yaml.")
        writable(out.parent, "--out")
    given = {"model": model, "learn": learn, "protect": list(protect) or None, "hardware": hardware}
    missing = [name for name, answer in given.items() if not answer]
    if missing and not sys.stdin.isatty():
        raise UsageError(
            f"This is not a terminal, so nothing can be asked. Type {' '.join(f'--{name} ...' for name in missing)}."
        )
    for name in missing:
        question, proposed = QUESTIONS[name]
        proposed = here() if name == "hardware" else proposed
        answer = click.prompt(question, default=proposed, err=True, value_proc=CHECKS.get(name, str.strip))
        given[name] = [answer] if name == "protect" else answer
    text = written(**given, file="run.yaml" if str(out) == "-" else str(out))
    if str(out) == "-":
        click.echo(text, nl=False)
        return
    write(out, text)
    for name in [given["learn"], *(spec.partition("=")[2] or spec for spec in given["protect"])]:
        if Path(name).suffix in FILES and not Path(name).exists():
            click.echo(f'{name} is not there yet: one row a line, {{"prompt": ..., "completion": ...}}.', err=True)
    click.echo(f"Wrote {out}. Next: ftplus data preview --config {out}")


def here() -> str:
    """What to propose on this machine; PyTorch, which would know, takes seconds to ask."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return "small" if apple or shutil.which("nvidia-smi") or shutil.which("rocm-smi") else "cpu"


def meant(hardware: str) -> str:
    """A word for hardware as it is written here.

    Raises:
        UsageError: it is none.
    """
    word = hardware.strip().lower()
    word = MEANT.get(word, word)
    if word in KINDS or (word.isdecimal() and int(word) > 0):
        return word
    raise UsageError(f"--hardware {hardware!r}; expected {HARDWARE}.")


def named(protect: str) -> str:
    """Data to protect, as it was typed.

    Raises:
        UsageError: `self` without a number of rows.
    """
    source = protect.strip().rpartition("=")[2]
    if source.partition(":")[0] == "self" and not SELF.fullmatch(source):
        raise UsageError(f"--protect {protect!r}; expected self:64, or self:64x48 for answers of 48 tokens.")
    return protect.strip()


def asking(check: Callable[[str], str]) -> Callable[[str], str]:
    """The same check for `click.prompt`, which says what is wrong and asks again."""

    def checked(answer: str) -> str:
        try:
            return check(answer)
        except UsageError as error:
            raise click.BadParameter(str(error)) from error

    return checked


CHECKS = {"hardware": asking(meant), "protect": asking(named)}


def written(model: str, learn: str, protect: list[str], hardware: str, file: str) -> str:
    """The YAML.

    Raises:
        UsageError: no such hardware.
    """
    import yaml

    def plain(value: object) -> str:
        return (
            yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
            .removesuffix("\n...\n")
            .strip()
        )

    hardware, protect = meant(hardware), [named(spec) for spec in protect]
    adapter = hardware == "small"
    own = all((spec.partition("=")[2] or spec).startswith("self:") for spec in protect)
    strategies, rate = _strategies(adapter, own), float(LORA_RATE) if adapter else "1.0e-4"
    lines = [
        f"{MARK}. Look at the rows, then at the cost, then train; flags win over what stands here:",
        "#",
        f"#     ftplus data preview --config {file}",
        f"#     ftplus sft --config {file} --dry-run",
        f"#     ftplus sft --config {file}",
        "",
        "# a folder, a name on the Hub, or demo (135 M weights; `ftplus doctor` says whether it is there)",
        f"model_name_or_path: {plain(model)}",
        "",
        "# what it learns: prompt and completion, messages, alpaca, sharegpt or text (several: `ftplus data --help`)",
        f"dataset_name: {plain(learn)}",
        "",
        "# what it must not forget, never mixed into what it learns; NAME=FILE, NAME=self:N, as many as you like",
        f"protect: {plain(protect)}",
        "# measured before and after, and never trained on; learn=FILE is held-out rows of what it learns",
        "# measure: { learn: learn_held_out.jsonl }",
        "",
        *strategies,
        "",
        *_hardware(hardware, [line.split()[1].rstrip(":") for line in strategies if line.startswith("  - ")]),
        "",
        "num_train_epochs: 3",
        f"learning_rate: {rate} # the first thing to vary; larger models want less",
        "# ends early once nothing more is learnt, or too much is lost",
        "# stop_when: [learn-plateaus, retention-falls-below 0.95]",
        "logging_steps: 10",
        "report_to: none # or trackio, wandb, tensorboard",
        "output_dir: out",
    ]
    return "\n".join(lines) + "\n"


def _strategies(adapter: bool, written: bool) -> list[str]:
    """What `ftplus advise` recommends: under an adapter, with rows that the model has `written` itself, with others."""
    clip = "max_grad_norm: 0.0 # clipping comes before the penalty, and would make a strength weigh more than it says"
    ewc = "ewc holds each weight as firmly as `protect` depends on it: more strength learns less and forgets less"
    if adapter:
        return [
            "# distill keeps saying what the starting model says on `protect`, one of its rows beside sixteen to",
            "# learn; its teacher is the base with the adapter switched off: no second model",
            "plugins:",
            f"  - distill: {{ share: {LORA_SHARE} }}",
        ]
    if written:
        return [
            "# replay trains on `protect`, one of its rows beside fifteen to learn;",
            f"# {ewc}",
            "plugins:",
            "  - replay: { share: 0.0625 }",
            "  - ewc: { strength: 3000 }",
            clip,
            "padding_free: true # rows one behind another: those of `protect` are long, and padding to them would cost",
            "max_length: null # without padding TRL cuts no row, and wants that said",
        ]
    return [
        "# distill keeps saying what the starting model says on `protect`, two of its rows beside sixteen to learn;",
        f"# {ewc}",
        "plugins:",
        "  - distill: { share: 0.125 }",
        "  - ewc: { strength: 10000 }",
        clip,
    ]


def _hardware(what: str, strategies: list[str]) -> list[str]:
    if what == "cpu":
        return [
            "use_cpu: true",
            "gradient_checkpointing: false # takes a third more time to save memory",
            *_batch(8, 2),
        ]
    if what == "small":
        return [
            "use_peft: true # LoRA: trains a part in a hundred of the weights; `ftplus merge` makes one model of it",
            "lora_r: 16",
            "lora_target_modules: all-linear",
            "# load_in_4bit: true # QLoRA, with bitsandbytes: a quarter of the memory for the base",
            *_batch(4, 4),
        ]
    if what == "large":
        more = [f"{BYTES[name]} more for {name}" for name in strategies if name in BYTES]
        return [
            f"# all weights: {', '.join(['16 bytes a weight for weights, gradients and Adam', *more])}",
            *_batch(8, 2),
        ]
    unless = " (not with self:N and replay)" if "replay" in strategies else ""
    return [
        f"num_processes: {int(what)} # starts itself through accelerate",
        f"accelerate_config: multi_gpu # a whole model on each; fsdp2 spreads it{unless}",
        *_batch(8, 1),
    ]


def _batch(rows: int, steps: int) -> list[str]:
    return [f"per_device_train_batch_size: {rows}", f"gradient_accumulation_steps: {steps}"]
