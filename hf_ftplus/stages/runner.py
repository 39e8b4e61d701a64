"""The story of a sequence: check all stages, run what is left of each, hand on, and make the matrix."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from .. import disk
from ..config import without_secrets
from ..errors import RetentionError, UsageError
from ..strategy import Strategy, settings
from .digests import note_data, refuse_other_data, see_data
from .gathered import refuse_kinds
from .handover import hand_on, handed_on, left_by, memory_to_come, note_measured, stage_yaml, storing
from .plan import Plan, Stage, read, within
from .resuming import (
    begun,
    clear,
    last_checkpoint,
    refuse_changed,
    refuse_foreign,
    refuse_orphan,
    refuse_other_pool,
)
from .shown import say_what_is_left, show

if TYPE_CHECKING:
    from ..report import Report
    from ..report.matrix import Matrix

GO_ON = "the same command"
INTERRUPTED = (130, 143)


def sequence(source: str | Path | Mapping[str, Any], dry_run: bool = False) -> Matrix | None:
    """Run the stages of a YAML file (or of a mapping with the same keys), or what is left of them.

    Args:
        source: every key of `ftplus sft --config`, shared by all stages; `stages`, each with a name and whatever it
            changes; and `keep`, the rows kept of every finished task.
        dry_run: check everything and show the plan; nothing is trained or written, and nothing returned.

    Returns:
        R[i, j], the score on task j after stage i, with what follows from it; printed, and saved after every stage.

    Raises:
        FTPlusError: see the exit codes in `errors.py`; with the name of the stage. All stages are checked before the
            first one trains.
        KeyboardInterrupt: Ctrl-C; the stage has saved, and the same call goes on.
    """
    if "LOCAL_RANK" in os.environ:
        raise UsageError(
            "A sequence starts the processes of each stage itself. Type it without a launcher, and put num_processes: "
            "N (or another key of `accelerate launch`) into the YAML."
        )
    plan = read(source)
    counts = check(plan)
    if dry_run:
        show(plan, counts)
        return None
    with disk.locked(plan.out, "output_dir"):
        return _run_all(plan)


def _run_all(plan: Plan) -> Matrix:
    from ..run import judge

    for note in plan.notes:
        click.echo(note, err=True)
    for gathered in plan.gathered.values():
        with storing(gathered.file):
            gathered.keep(anew=not any(map(begun, plan.stages)))
    for stage in plan.stages:
        with within(stage):
            refuse_other_data(stage)  # rows of it that were made again, too
    reports: list[Report] = []
    try:
        for stage in plan.stages:
            with within(stage):
                reports.append(run(plan, stage))
                matrix = kept(plan, reports)
                judge(stage.config, reports[-1].tasks)  # of a finished one, too, or the same command passes it by
                hand_on(plan, stage)
        matrix.show()
    finally:
        if reports:
            from ..page import leave_page

            leave_page(plan.out / "sequence.json")
    say_what_is_left(plan)
    return matrix


def check(plan: Plan) -> dict[str, str]:
    """Read the data of every stage, and see that settings go together, before anything trains.

    Returns the number of learn rows of each stage, in words.

    Raises:
        FTPlusError: with the name of the stage.
    """
    from datasets import Dataset

    from ..foreseen import refuse_foreseen
    from ..model import DEMO, to_train
    from ..refusals import refuse
    from ..row_checks import check_metric, len_of, parts, row_count
    from ..rows import find
    from .reservoir import pool

    counts = {}
    if (model := plan.stages[0].config.model.model_name_or_path) != DEMO:  # which may yet have to be made
        to_train(model)
    for stage in plan.stages:
        config = stage.config
        with within(stage):
            refuse_foreign(stage)
            refuse_orphan(plan, stage)
            refuse_changed(stage, stage_yaml(plan, stage, *handed_on(plan, stage)))
            refuse_other_data(stage)
            see_data(stage, plan.files)
            if not stage.report.is_file():  # what taught a finished one may be gone
                known = [it for it in config.strategies if not _waits(plan, stage, it)]
                refuse(known, config.training)
                refuse_foreseen(replace(config, memory=config.memory or memory_to_come(plan, stage)), known)
            protect = [spec for spec in config.protect if spec.source not in plan.files]
            rows = find(replace(config, protect=protect, measure=_new(plan, stage)))
            for name, found in rows.measured.items():
                if found.column_names == ["prompt"] and name in (stage.measured_as, *plan.measure):
                    _only_questions(plan, stage, name)
            learn = parts(rows.learn)
            if plan.keep and not plan.is_last(stage) and any(task.streaming for task in config.tasks):
                raise UsageError(
                    "Which rows of a streamed task were trained on is not known, so none can be kept of it. Type keep: "
                    "0, or leave streaming out of its tasks."
                )
            refuse_kinds(plan, stage, rows.learn, rows.measured)
            for name in [it for it, gathered in plan.gathered.items() if gathered.stage is stage]:
                check_metric(name, Dataset.from_list(plan.gathered[name].rows), plan.metrics.get(name))
            if plan.keep and isinstance(learn[0], Dataset):
                pool(learn[0].select([0]), config, 1, 0, stage.name)
            refuse_other_pool(plan, stage, row_count(rows.learn))
            note_measured(plan, stage)
            counts[stage.name] = " + ".join(map(len_of, learn))
    for gathered in plan.gathered.values() if any(map(begun, plan.stages)) else ():
        gathered.refuse_other()
    return counts


def _waits(plan: Plan, stage: Stage, strategy: Strategy) -> bool:
    """Whether a setting (a teacher) is a model that an earlier stage is yet to leave; it is looked at when this begins.

    Raises:
        UsageError: it lies in the folder of an earlier stage, which will not leave it.
    """
    for item in settings(type(strategy)):
        value = getattr(strategy, item.name)
        path = Path(value).expanduser().absolute() if isinstance(value, str) else Path()
        for earlier in plan.stages[: stage.number - 1]:
            if not path.is_relative_to(earlier.folder.absolute()) or path.exists():
                continue
            if path != left_by(earlier).absolute():  # a checkpoint may be gone by then
                raise UsageError(
                    f"{strategy.name}.{item.name} is {value!r}, which {earlier.name!r} will not leave there; expected "
                    f"the model that it does: {left_by(earlier)}"
                )
            return True
    return False


def _new(plan: Plan, stage: Stage) -> list[Any]:
    """What no stage before has measured: its own task, those under `tasks:`, and in the first what all measure."""
    own = {stage.measured_as, *(task.name for task in stage.tasks)}
    elsewhere = {*(plan.names if stage.number == 1 else plan.measure)} - own
    found = [spec for spec in stage.config.measure if spec.name not in elsewhere and spec.source not in plan.files]
    plan.incomparable |= {spec.name for spec in found if spec.generate}
    return found


def _only_questions(plan: Plan, stage: Stage, name: str) -> None:
    if name in (stage.measured_as, *(task.name for task in stage.tasks)):
        name = stage.name if name == "learn" else name
        raise UsageError(
            f"measure: {name} has questions without completions. What each stage's starting model answers cannot "
            "tell how well it was learnt; expected rows with completions."
        )
    plan.incomparable.add(name)
    plan.notes.append(f"{name} has questions without completions: measured in each stage, left out of the matrix.")


# ---- one stage -------------------------------------------------------------------------------------------------------


def run(plan: Plan, stage: Stage) -> Report:
    """One stage from wherever it stands; its report."""
    from ..callback import give_back_memory
    from ..report import Report

    found = stage_yaml(plan, stage, *handed_on(plan, stage))
    which = f"Stage {stage.number} of {len(plan.stages)}, {stage.name}"
    if stage.report.is_file():
        click.echo(f"{which}: finished before.", err=True)
        return Report.load(
            stage.report, "Remove it, and type the same again: the stage goes on from its last checkpoint."
        )
    checkpoint = last_checkpoint(stage)
    click.echo(f"{which}: {stage.folder}{f', on from {checkpoint.name}' if checkpoint else ''}", err=True)
    with storing(stage.file), disk.locked(stage.folder, "output_dir"):  # a stage may outlive its sequence
        if not checkpoint:
            clear(plan, stage)
        text = yaml.safe_dump(without_secrets(found), sort_keys=False, allow_unicode=True)
        refuse_other_data(stage)  # once more: the stages before it may have taken hours
        if not checkpoint:
            note_data(stage)
        disk.write(stage.file, text)
    try:
        train(stage, found, checkpoint)
    except (RetentionError, KeyboardInterrupt, click.ClickException) as error:  # the last: of launched processes
        code = getattr(error, "exit_code", INTERRUPTED[0])
        if code in INTERRUPTED:
            click.echo(f"Stopped in stage {stage.name}; {GO_ON} goes on.", err=True)
        if code != RetentionError.exit_code:  # then all is saved: judged when the matrix is, too
            raise
    finally:
        give_back_memory()
    return Report.load(stage.report)


def train(stage: Stage, found: dict[str, Any], checkpoint: Path | None) -> None:
    """The stage as `ftplus sft` runs it; in processes of its own where its YAML, or the machine, asks for several."""
    from accelerate.utils import patch_environment

    from ..cli import launch
    from ..cli.sft import configured
    from ..run import sft

    config, asked, _ = configured({}, (), found)
    if asked or launch.expected(config.training.use_cpu):
        more = ["--resume_from_checkpoint", str(checkpoint)] if checkpoint else []
        token = found.get("hub_token")  # which stands in no file, nor on a command line that others can see
        with patch_environment(**({"HF_TOKEN": token} if token else {})):
            again = ["sft", "--config", str(stage.file), *more]
            launch.start(asked, again, config.strategies, launch.precision_of(config.training))
        return
    config.training.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
    config.go_on = GO_ON
    sft(config)


def kept(plan: Plan, reports: list[Report]) -> Matrix:
    """The matrix of the stages that have run, on disk."""
    from ..report.matrix import Matrix

    matrix = Matrix.of(plan.names, plan.others, [stage.measured_as for stage in plan.stages], reports)
    matrix.notes = [*plan.notes, *matrix.notes]
    matrix.save(plan.out)
    return matrix
