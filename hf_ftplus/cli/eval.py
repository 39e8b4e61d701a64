"""`ftplus eval`: score models on the same rows, and say what each kept, lost and gained against the first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..compat import no_bars_unseen
from ..config import OPTIONS, merge, read_yaml
from ..disk import writable
from ..errors import UsageError, nearest
from .generate import device_option, dtype_option
from .sft import take_environment, with_options

if TYPE_CHECKING:
    from ..scored.plan import Plan

NUMBERS = {"seed": (42, 0), "max_length": (1024, 2), "measure_rows": (64, 1), "completions": (3, 0)}
"""Default and least value; the defaults are those of `ftplus sft`."""


HELP = {
    "measure": "A task: a file, a Hub name, or self:64, which the first model writes. Repeatable.",
    "protect": "A task that is to be kept, on the rows that `ftplus sft` would measure. Repeatable.",
    "metric": next(option.help for option in OPTIONS if option.name == "metric"),
    "measure_rows": "Rows per task, the same for all models; 64 if left out.",
}
OF_SFT = [
    replace(option, help=HELP[option.name], kind=click.IntRange(1) if option.kind is int else option.kind)
    for option in OPTIONS
    if option.name in HELP
]
"""Options that mean here what they mean to `ftplus sft`."""


@click.command(name="eval")
@click.argument("models", metavar="MODEL [MODEL...]", nargs=-1)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="YAML with tasks:, protect:, measure: and the like; a run's own will do.",
)
@with_options(OF_SFT)
@click.option(
    "--lm-eval",
    metavar="TASK[,TASK...]",
    help="Tasks of lm-evaluation-harness, --measure-rows of each. Repeatable.",
    multiple=True,
)
@click.option(
    "--lm-eval-include",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="YAML files of your own tasks for --lm-eval.",
)
@click.option(
    "--export",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Write the tasks for lm-evaluation-harness there; without MODEL nothing else is done.",
)
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep eval.json, every row with its answer, and a page here; typed later, nothing is measured again.",
)
@click.option(
    "--cache",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="What was measured before. [~/.cache/ftplus/eval]",
)
@click.option(
    "--margin",
    default=5.0,
    show_default=True,
    metavar="POINTS",
    help="A change of score that counts as none: kept lies within it.",
)
@click.option("--batch_size", default=8, show_default=True, type=click.IntRange(1), help="Rows scored at once.")
@click.option(
    "--completions",
    metavar="N",
    type=click.IntRange(0),
    help="Answers of each task that the page shows; 3 if left out.",
)
@click.option("--max_length", type=click.IntRange(2), help="Tokens of a row that are read; 1024 if left out.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    help="Of drawn templates and written rows; 42 if left out, as for `ftplus sft`.",
)
@dtype_option
@device_option
def eval(
    models: tuple[str, ...], config_file: str | None, out: Path | None, cache: Path | None, margin: float,
    completions: int | None, max_length: int | None, seed: int | None, batch_size: int, dtype: str, device: str | None,
    lm_eval: tuple[str, ...], lm_eval_include: Path | None, export: Path | None, **flags: Any,
) -> None:  # fmt: skip
    """Score models on the same rows, and compare each with the first.

    MODEL is a folder that `ftplus sft` wrote (a model, an adapter, one of its checkpoints), the name of either on the
    Hub, or demo.

    \b
    ftplus eval demo OUTPUT --measure chat=chat.jsonl --measure quiz=quiz.jsonl --metric quiz=exact_match
    ftplus eval BASE OUTPUT OUTPUT/checkpoint-* --config run.yaml --out scores
    ftplus eval --config run.yaml --export tasks
    """
    if not models and not export:
        raise UsageError(
            "There is no model. Type ftplus eval MODEL [MODEL...] --measure NAME=DATA, the first to compare with."
        )
    if lm_eval_include and not lm_eval:
        raise UsageError(
            f"--lm-eval-include {lm_eval_include} does nothing without --lm-eval TASK. Type that, too, or leave it out."
        )
    if not 0 < margin <= 100:
        raise UsageError(f"--margin is {margin:g}; expected more than 0, and at most 100 points.")
    yaml = take_environment(read_yaml(config_file))
    ours, rest = merge(flags, yaml)
    typed = {"seed": seed, "max_length": max_length, "measure_rows": flags["measure_rows"], "completions": completions}
    how = {key: _whole(key, typed[key] if typed[key] is not None else yaml.get(key)) for key in NUMBERS}
    if typed["max_length"] is None and "max_length" in yaml and yaml["max_length"] is None:
        how["max_length"] = None  # the run of this file cut nothing either
    for folder, flag in ((out, "--out"), (cache, "--cache"), (export, "--export")):
        if folder:
            writable(folder, flag)

    from ..model import cache as own
    from ..scored.cells import Cells
    from ..scored.harness import load
    from ..scored.plan import Plan, asked

    _check(rest)
    no_bars_unseen()
    names = [name.strip() for text in lm_eval for name in text.split(",") if name.strip()]
    tasks = asked(ours, others=bool(names), text=rest.get("dataset_text_field"))
    benchmarks = load(names, lm_eval_include, how["measure_rows"]) if names else []
    if {"dataset_name", "datasets"} & rest.keys() and "learn" not in [task.name for task in tasks]:
        click.echo("What the run learnt is not scored. To score it, too, type --measure learn=DATA.", err=True)
    plan = Plan(list(models), tasks, batch_size=batch_size, dtype=dtype, device=device, margin=margin / 100, **how)
    if export:
        from ..scored.export import export as write

        names = ",".join(write(plan, export))
        click.echo(f"For the harness: lm-eval run --include_path {export} --tasks {names}", err=True)
    if models:
        run(plan, Cells(cache or writable(own() / "eval", "--cache")), out, benchmarks)


def run(plan: Plan, kept: Any, out: Path | None, benchmarks: list[Any]) -> None:
    """Measure, show, keep."""
    from rich.console import Console

    from ..page import leave_page
    from ..scored.judged import judge, save
    from ..scored.measuring import measure
    from ..scored.shown import table

    try:
        scored = measure(plan, kept, lambda said: click.echo(said, err=True), benchmarks)
    except KeyboardInterrupt:
        click.echo("What was measured is kept; the same command goes on.", err=True)
        raise
    cells = sum(map(len, [*scored.moments, *scored.outcomes, scored.again, scored.outcomes_again]))
    click.echo(f"{scored.measured} of {cells} cells measured now, the others before.", err=True)
    judgement = judge(scored)
    Console(highlight=False).print(table(judgement))
    if out:
        file = save(judgement, out)
        click.echo(f"All figures, and the rows behind them: {file}", err=True)
        leave_page(file)
    else:
        click.echo(
            "Type the same with --out DIR for a page, eval.json, and the answer to every row behind these scores; "
            "nothing is measured again.",
            err=True,
        )


def _whole(key: str, value: Any) -> int:
    default, least = NUMBERS[key]
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{key}: {value!r}; expected a whole number of {least} or more.")
    return value


def _check(rest: dict[str, Any]) -> None:
    """Raise for a key of the YAML file that neither we nor `ftplus sft` know."""
    if not rest:
        return
    from .sft import yaml_keys

    known = yaml_keys()
    for key in rest:
        if key not in known:
            raise UsageError(f"Unknown key {key!r} in the YAML file.{nearest(key, known)} See `ftplus eval --help`.")
