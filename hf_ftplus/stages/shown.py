"""What a sequence says of itself: the plan before it starts, and what it leaves on disk that nobody needs."""

from __future__ import annotations

import shlex

import click

from .plan import Plan


def show(plan: Plan, counts: dict[str, str]) -> None:
    """`--dry-run`: what each stage trains on, with what, and what it hands on."""
    for stage in plan.stages:
        config, training, before = stage.config, stage.config.training, plan.before(stage)
        steps = f"{training.max_steps} steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"
        start = f"the model of {before.name}" if before else config.model.model_name_or_path
        click.echo(f"{stage.folder}\n  learn     {counts[stage.name]} rows, {steps}, from {start}")
        for strategy in config.strategies:
            given = f"  with its memory of {before.name}" if strategy.name in stage.remembers else ""
            given = "  nothing to protect yet" if strategy.name in stage.rests else given
            click.echo(f"  strategy  {strategy!r}{given}")
        if config.protect:
            click.echo(f"  protect   {', '.join(map(str, config.protect))}")
        if not plan.is_last(stage):
            after = plan.stages[stage.number]
            model = "its adapter merged into the model" if config.model.use_peft else "its model"
            memory = f", memory of {', '.join(after.remembers)}" if after.remembers else ""
            click.echo(f"  hands on  {model}{memory}{f', {plan.keep} rows' if plan.keep else ''}")
    click.echo(f"measured at the start and after each stage: {', '.join(plan.measure)}")
    for note in plan.notes:
        click.echo(note)
    click.echo(f"Dry run: nothing was trained, nothing written to {plan.out}.")


def say_what_is_left(plan: Plan) -> None:
    """Checkpoints hold the optimizer's state, twice the size of the model, and are of no use to a finished stage."""
    found = {stage.folder: [*stage.folder.glob("checkpoint-*/**/*")] for stage in plan.stages}
    if size := sum(file.stat().st_size for files in found.values() for file in files if file.is_file()):
        where = " ".join(f"{shlex.quote(str(folder))}/checkpoint-*" for folder, files in found.items() if files)
        click.echo(f"Checkpoints take {size / 1e9:.2g} GB, and no stage needs them any more: rm -r {where}", err=True)
