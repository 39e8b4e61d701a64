"""The story of one run: measure, fine-tune with strategies, measure again, say what was learnt and what was kept."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import torch
from accelerate.utils import parse_flag_from_env
from datasets import disable_progress_bars
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from . import compat, stopping
from .callback import RESCUED, STATE_FOLDER, give_back_memory
from .config import RunConfig
from .configured import sft_trainer
from .errors import IncompatibleError, PluginError, RetentionError, StorageError
from .evaluation import Evaluation, Kept, retention_gate
from .examples import text_tokenizer
from .facts import count_memory_anew, facts
from .finished import MEASURING, finished, measured_otherwise
from .foreseen import refuse_foreseen
from .interrupt import SaveOnInterrupt
from .measured import keep_apart, tasks
from .mixing import on_its_device
from .model import resolve, to_train
from .output import (
    REPORT,
    alone,
    claim,
    no_empty_folder,
    on_the_disk,
    refuse_full_disk,
    resume_point,
    settle,
    warn_of_little_room,
)
from .page import leave_card, leave_page, warned
from .precision import autocast
from .refusals import refuse, refuse_fsdp, refuse_parted, refuse_several_devices, refuse_zero3
from .report import Report
from .report.tracked import hold_open, track
from .row_checks import check_supervised
from .rows import Rows, add_written, find
from .shared import base
from .shared.hub import said_of
from .trained import pinned
from .trainer import SFTTrainer, refuse_not_finite
from .weights import full_shape
from .zero import unseen

logger = logging.getLogger("hf_ftplus")

LESS = "Lower --per_device_eval_batch_size or --measure_rows."
"""What to type where measuring takes too much memory."""


def sft(config: RunConfig) -> Report:
    """Fine-tune as the configuration says; print, save and return the report.

    Raises:
        FTPlusError: see the exit codes in `errors.py`; RetentionError when all is saved but too little was kept.
    """
    speak(config)
    keep_secret(config)
    if report := already_done(config):  # asked first: what is done may stand where nothing can be written
        return report
    with alone(config):
        return already_done(config) or _sft(config)


def _sft(config: RunConfig) -> Report:
    seconds: dict[str, float] = {}
    count_memory_anew(config.training.device)
    with timed(seconds, "preparing"), no_empty_folder(config.training.output_dir, unless_done=True):
        claim(config)
        settle(config)
        trainer, rows = prepare(config)
        start = Start(config, trainer, rows, seconds)
        trainer.add_callback(start)
        stopping.watch(config, start, trainer)
        unwritten = {spec.name: spec for spec in config.protect} if start.late else None
        trainer.install(config.strategies, rows.protect or unwritten or None, config.memory, config.shares)
        if trainer.ftplus:
            trainer.ftplus.told = True  # when its rows were found
    if not start.late:
        start.measure()
    close_trackers = hold_open(trainer)
    with timed(seconds, "training"):
        train(trainer, config)
    with timed(seconds, "saving"), on_the_disk(f"The trained model could not be saved in {config.training.output_dir}"):
        trainer.save_model(config.training.output_dir, _internal_call=True)  # else it pushes, before there is a report
    let_go_of_optimizer(trainer)
    with timed(seconds, "measuring after"):
        results = start.evaluation.after(trainer.model)
    report = Report(results, facts(config, trainer, seconds, start.step))
    if trainer.is_world_process_zero():
        file = report.save(Path(config.training.output_dir) / REPORT)
        report.show()
    with warned("no tracker got the figures after training"):  # all is saved; a network may fail after hours
        track(trainer, results, "after")
        close_trackers()
    if trainer.is_world_process_zero():
        leave_page(file)
        leave_card(file, trainer)
    if config.training.push_to_hub:
        push(trainer, config)
    trainer.accelerator.wait_for_everyone()  # a launcher ends all processes when the first fails, as by the gate below
    compat.end(trainer)
    judge(config, results)
    return report


def prepare(config: RunConfig) -> tuple[SFTTrainer, Rows]:
    """Data, then model and trainer, then what the model writes itself; cheap refusals first."""
    refuse_several_devices(config.strategies, config.training)
    refuse(config.strategies, config.training)
    refuse_zero3(config)
    refuse_parted(config)
    to_train(config.model.model_name_or_path)
    refuse_foreseen(config, config.strategies)
    if config.memory is not None:
        base.check(config.memory, pinned(config.model.model_name_or_path, config.model.model_revision))
    warn_of_idle(config)
    rows = find(config)
    trainer = stopping.trainer_of(config, rows, sft_trainer)
    on_its_device(trainer)
    check_supervised(rows.learn, trainer)
    if trainer.is_fsdp_enabled:
        refuse_fsdp(config, trainer)
    else:
        warn_unsharded(trainer)
        add_written(rows, config, trainer)
    keep_apart(rows, config)
    return trainer, rows


def push(trainer: SFTTrainer, config: RunConfig) -> None:
    """Model, card, report and memory to the Hub.

    Raises:
        StorageError: the Hub refused them, or is not to be reached; all is saved, and says how to try again.
    """
    out, repo = config.training.output_dir, trainer.hub_model_id or config.training.hub_model_id
    memory = Path(out, STATE_FOLDER, "memory")
    if memory.is_dir() and trainer.is_world_process_zero():
        base.write(memory, base.of_run(repo, Path(out)))
    if config.completions:
        logger.warning(
            "%s goes to %s, too: a report with %d rows of each task and the answers to them. --completions 0 leaves "
            "them out.",
            Path(out, STATE_FOLDER),
            repo,
            config.completions,
        )
    with said_of(repo, f" All is saved in {out}; push it later: hf upload {repo} {out}"):
        trainer.push_to_hub(dataset_name=config.script.dataset_name)


class Start(TrainerCallback):
    """What is asked of the starting model before strategies prepare: its figures, and what preparing will cost.

    Under FSDP no process holds a whole model until training starts. There it is asked then, by all ranks together, and
    also for the rows that it writes itself; a run that is resumed there has lost its start, and measures the end alone.
    """

    def __init__(self, config: RunConfig, trainer: SFTTrainer, rows: Rows, seconds: dict[str, float]) -> None:
        self.config, self.trainer, self.rows, self.seconds = config, trainer, rows, seconds
        self.late, self.begun, self.measured = trainer.is_fsdp_enabled, False, []
        self.step = 0
        """At which training began, or was resumed."""
        if not self.late:
            self.load()

    def load(self) -> None:
        """Read what is measured into tokens."""
        self.evaluation = Evaluation(
            tasks(self.rows, self.config, self.trainer),
            text_tokenizer(self.trainer.processing_class),
            batch_size=self.config.training.per_device_eval_batch_size,
            seed=self.config.training.seed,
            completions=self.config.completions,
            autocast=autocast(self.trainer.args),
        )

    def measure(self) -> None:
        with timed(self.seconds, "measuring before"):
            self.measured = self.evaluation.before(self.trainer.model)

    def kept(self) -> dict[str, Kept]:
        """How the protect tasks stand while training lasts."""
        with timed(self.seconds, "measuring on the way"):
            return self.evaluation.kept(self.trainer.model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self.step, strategies = state.global_step, self.trainer.ftplus
        fresh = self.step == 0
        if self.late:
            add_written(self.rows, self.config, self.trainer)
            keep_apart(self.rows, self.config)
            self.load()
            if strategies:
                strategies.protect = self.rows.protect or None
            if fresh:
                self.measure()
            elif self.config.measure_rows:
                logger.warning("resumed under FSDP: the model has moved on, so its start is not measured")
        if fresh:
            track(self.trainer, self.measured, "before")
        for name, cost in costs(self.trainer, train_dataloader) if fresh else ():
            logger.info("%s: %s", name, in_words(cost))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.begun and state.is_world_process_zero:  # strategies have prepared: what they will save is there
            warn_of_little_room(self.trainer, Path(args.output_dir))
            (Path(args.output_dir) / REPORT).unlink(missing_ok=True)  # of a shorter run: it would call this one done
        self.begun = True


def costs(trainer: SFTTrainer, train_dataloader: Any = None) -> Iterator[tuple[str, dict[str, float]]]:
    """What preparing will cost each strategy."""
    strategies = trainer.ftplus
    if strategies is None:
        return
    run = strategies.setup(trainer.model, trainer.args, trainer.processing_class, train_dataloader)
    strategies.protect = run.protect or None  # as micro-batches, not to be made again when training starts
    for strategy in strategies.strategies:
        with unseen(getattr(trainer.optimizer, "optimizer", None)):
            cost = strategies.call(strategy, "preview", run)
        yield strategy.name, cost


def warn_of_idle(config: RunConfig) -> None:
    """Say which settings do nothing; a stage of a sequence or a candidate may go without their use on purpose."""
    model, usual = config.model, type(config.model)()
    names = [name for name in vars(model) if name.startswith(("lora_", "use_dora", "use_rslora"))]
    idle = [f"--{name}" for name in names if getattr(model, name) != getattr(usual, name)]
    if idle and not model.use_peft:
        logger.warning("%s: nothing without --use_peft, and all weights are trained", ", ".join(idle))
    if model.model_revision != usual.model_revision and os.path.isdir(resolve(model.model_name_or_path)):
        logger.warning("--model_revision: nothing for %s, a folder, which has none", model.model_name_or_path)
    if config.protect and not config.strategies and not config.shares:
        names = ", ".join(spec.name for spec in config.protect)
        logger.info("--protect (%s): only measured, for there is no --plugin (ewc, distill, replay)", names)
    if config.memory is not None and not any(strategy.overrides("finish") for strategy in config.strategies):
        logger.warning("--memory: no strategy of this run reads one; --plugin ewc and --plugin si do")


def warn_unsharded(trainer: SFTTrainer) -> None:
    """Say that FSDP was asked for where accelerate leaves it out without a word: on CPUs."""
    if trainer.args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        logger.warning(
            "FSDP was asked for, but accelerate shards on no CPU: each of %d processes holds the whole model and all "
            "strategy state (DDP). Results are the same, memory is not; `ftplus doctor --distributed` shows it.",
            trainer.args.world_size,
        )


def train(trainer: SFTTrainer, config: RunConfig) -> None:
    """Train, or go on from a checkpoint. Ctrl-C finishes the step, saves, and is raised again."""
    interrupt = SaveOnInterrupt()
    trainer.add_callback(interrupt)
    refuse_full_disk(trainer, Path(config.training.output_dir))
    try:
        trainer.train(resume_from_checkpoint=resume_point(config))
        refuse_not_finite(trainer.model, trainer.state.global_step)  # of the last step, which no loss followed
    except torch.OutOfMemoryError as error:
        raise out_of_memory(trainer, error, config.go_on) from error
    except StorageError as error:
        ended = trainer.state.global_step >= trainer.state.max_steps > 0  # its last checkpoint failed
        if ended and RESCUED not in str(error):  # else a strategy's `finish` failed, and the callback has saved it
            with suppress(OSError, RuntimeError, SafetensorError):
                trainer.save_model(config.training.output_dir, _internal_call=True)  # and pushes nothing
                error.args = (f"{error} {RESCUED} {config.training.output_dir}.",)
        raise
    except KeyboardInterrupt:
        if interrupt.saved and trainer.is_world_process_zero():
            click.echo(f"Saved checkpoint-{trainer.state.global_step}. Go on with {config.go_on}.", err=True)
        raise
    finally:
        interrupt.restore()


def out_of_memory(trainer: SFTTrainer, error: Exception, go_on: str) -> IncompatibleError:
    """What was full, what strategies hold of it, and what to type."""
    held: dict[str, int] = {}
    with suppress(PluginError):  # before it was prepared, a strategy may hold nothing yet
        held = trainer.ftplus.bytes() if trainer.ftplus else {}
    weights = sum(full_shape(weight).numel() for weight in trainer.model.parameters() if weight.requires_grad)
    each = ((name, size / 1e6, size / weights) for name, size in held.items())
    holds = "".join(f" {name} holds {mega:,.1f} MB, {per:.1f} bytes per trained weight." for name, mega, per in each)
    step = trainer.state.global_step
    if trainer.control.should_training_stop:  # what follows: strategies finish, the last checkpoint is written
        return IncompatibleError(
            f"Out of memory after the last step, {step}: {first_line(error)}{holds} Checkpoints are intact. Free some "
            f"memory, and go on with {go_on}."
        )
    return IncompatibleError(
        f"Out of memory at step {step + 1}: {first_line(error)}{holds} Lower --per_device_train_batch_size (and raise "
        "--gradient_accumulation_steps), or type --gradient_checkpointing true, or --use_peft. Checkpoints are intact."
    )


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def let_go_of_optimizer(trainer: SFTTrainer) -> None:
    """Measuring needs none of its state, which under Adam is twice the size of the trained weights."""
    for holder in (trainer, trainer.callback_handler):
        holder.optimizer = holder.lr_scheduler = None
    trainer.accelerator.free_memory()
    give_back_memory()


def keep_secret(config: RunConfig) -> None:
    """Hand the Hub's token to the Hub's own library: the Trainer writes its arguments, token included, to files."""
    if token := config.training.hub_token:
        os.environ["HF_TOKEN"] = token
        config.training.hub_token = None


def already_done(config: RunConfig) -> Report | None:
    """The report of a run that is asked to go on and has nothing left to do; nothing is written.

    Raises:
        StorageError: another run ended there.
        RetentionError: its retention gate did not pass, then as now.
    """
    report = finished(config)
    if report is None:
        return None
    if config.training.process_index == 0:
        file = Path(config.training.output_dir) / REPORT
        more = " More: --max_steps N." if any(Path(config.training.output_dir).glob("checkpoint-*")) else ""
        click.echo(f"Already complete: {report.facts.get('steps')} steps, {file}.{more}", err=True)
        if other := measured_otherwise(config, report):
            command = f"ftplus eval BASE {config.training.output_dir} {' '.join(MEASURING[key] for key in other)}"
            click.echo(f"It is not measured again with another {' and '.join(other)}: type {command}", err=True)
        if config.training.push_to_hub:
            click.echo(f"Nothing was pushed. To push it: hf upload REPO {config.training.output_dir}", err=True)
    judge(config, report.tasks)
    return report


def judge(config: RunConfig, results: list[Any]) -> None:
    gate = config.fail_if_retention_below
    if gate is not None and (lost := retention_gate(results, gate)):
        raise RetentionError("\n".join(lost))


def in_words(cost: dict[str, float]) -> str:
    """The cost preview of a strategy as a phrase."""
    said = {
        "bytes": f"{cost.get('bytes', 0) / 1e6:.1f} MB of state",
        "rows": f"{cost.get('rows', 0):.0f} protect rows",
        "seconds": f"about {cost.get('seconds', 0):.0f} s before the first step",
    }
    return ", ".join(words for name, words in said.items() if name in cost) or "no cost stated"


def speak(config: RunConfig) -> None:
    """Show our own progress on stderr, on the first process."""
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO if config.training.process_index == 0 else logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
        transformers_logging.disable_progress_bar()
        config.training.disable_tqdm = True


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds to those of a stage, less those of stages inside it; it is named where memory runs out."""
    begin, before = time.perf_counter(), sum(seconds.values())
    try:
        yield
    except torch.OutOfMemoryError as error:
        less = LESS if stage.startswith("measuring") else "Free some memory, or choose a smaller model."
        there = " The trained model is saved." if stage == "measuring after" else ""
        raise IncompatibleError(f"Out of memory while {stage}: {first_line(error)} {less}{there}") from error
    inside = sum(seconds.values()) - before
    seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - begin - inside, 2)
