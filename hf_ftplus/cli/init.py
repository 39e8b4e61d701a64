"""`ftplus init`: four questions, or their flags, and a commented YAML that `ftplus sft --config` takes as it is."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..errors import StorageError, UsageError

MARK = "# Written by `ftplus init`"
"""How the file begins; `ftplus` alone looks for it."""
FILES = (".jsonl", ".json", ".csv", ".parquet")
HARDWARE = "cpu, small (one GPU, LoRA), large (one GPU, all weights), or the number of GPUs"
QUESTIONS = {
    "model": ("Which model? A folder, a name on the Hub, or demo", "demo"),
    "learn": ("What shall it learn? A .jsonl, .json, .csv or .parquet file, or a name on the Hub", "learn.jsonl"),
    "protect": ("What must it not forget? A file, a name on the Hub, or self:64x48: it writes it itself", "self:64x48"),
    "hardware": (f"On what? {HARDWARE}", "small"),
}
"""What is asked, and what is proposed."""


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
    from ..disk import replace, writable

    if str(out) != "-":
        if out.exists():
            raise StorageError(f"{out} exists; expected a new file. Type --out OTHER.yaml.")
        writable(out.parent, "--out")
    given = {"model": model, "learn": learn, "protect": list(protect) or None, "hardware": hardware}
    missing = [name for name, answer in given.items() if not answer]
    if missing and not sys.stdin.isatty():
        raise UsageError(f"Nobody can be asked here. Type {' '.join(f'--{name} ...' for name in missing)}.")
    for name in missing:
        question, proposed = QUESTIONS[name]
        answer = click.prompt(question, default=proposed, err=True)
        given[name] = [answer] if name == "protect" else answer
    text = written(**given, file="run.yaml" if str(out) == "-" else str(out))
    if str(out) == "-":
        click.echo(text, nl=False)
        return
    replace(out, lambda file: file.write_text(text, encoding="utf-8"))
    for name in [given["learn"], *(spec.partition("=")[2] or spec for spec in given["protect"])]:
        if Path(name).suffix in FILES and not Path(name).exists():
            click.echo(f'{name} is not there yet: one row a line, {{"prompt": ..., "completion": ...}}.', err=True)
    click.echo(f"Wrote {out}. Next: ftplus data preview --config {out}")


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

    adapter = hardware == "small"
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
        *_strategies(adapter, written=all((spec.partition("=")[2] or spec).startswith("self:") for spec in protect)),
        "",
        *_hardware(hardware),
        "",
        "num_train_epochs: 3",
        f"learning_rate: {'1.0e-3' if adapter else '1.0e-4'} # the first thing to vary; larger models want less",
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
        return [f"# {ewc}", "plugins:", "  - ewc: { strength: 1000 }", clip]
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


def _hardware(what: str) -> list[str]:
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
        return [
            "# all weights: 16 bytes a weight for weights, gradients and Adam, 8 more for ewc, 4 for distill",
            *_batch(8, 2),
        ]
    if what.isdecimal() and int(what) > 0:
        return [
            f"num_processes: {int(what)} # starts itself through accelerate",
            "accelerate_config: multi_gpu # a whole model on each; fsdp2 spreads it (not with self:N and replay)",
            *_batch(8, 1),
        ]
    raise UsageError(f"--hardware {what!r}; expected {HARDWARE}.")


def _batch(rows: int, steps: int) -> list[str]:
    return [f"per_device_train_batch_size: {rows}", f"gradient_accumulation_steps: {steps}"]
