"""End a run when going on no longer pays: learning has levelled off, or what is protected is being lost.

`--stop-when` (conditions.py) is judged whenever the Trainer evaluates (eval_strategy, eval_steps), or every tenth of
the run where nobody said when, or said the end. Looking leaves no trace: until a run stops its weights are, bit for
bit, those of a run without conditions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .conditions import PLATEAU, RETENTION, read
from .config import RunConfig
from .errors import DataError, IncompatibleError
from .logits import evaluating
from .row_checks import spread
from .rows import Rows, as_trl_reads
from .trainer import SFTTrainer

TENTH = 0.1
"""Share of a run between two looks at it, where nobody said when."""
MOST = 512
"""Held-out rows of a task that are evaluated then."""

logger = logging.getLogger("hf_ftplus")


# ---- learning has levelled off ---------------------------------------------------------------------------------------


def trainer_of(config: RunConfig, rows: Rows, make: Callable[..., SFTTrainer]) -> SFTTrainer:
    """The trainer of a run, which evaluates and stops as learn-plateaus wants it, if that was asked for.

    Args:
        config: of the run; its TrainingArguments are completed.
        rows: of the run.
        make: makes a trainer from `config`, learn rows and what is evaluated on.

    Raises:
        DataError: there are no learn rows to evaluate on but those that are trained on.
    """
    wanted = read(config.stop_when)
    if wanted.patience is None:
        return make(config, rows.learn, rows.test)
    held_out, args = held_out_rows(config, rows), config.training
    if args.metric_for_best_model is None:  # the best loss is remembered; loading the best model stays a wish of yours
        args.metric_for_best_model, args.greater_is_better = "loss", False
    ours = args.eval_strategy == IntervalStrategy.NO
    if ours:
        args.eval_strategy, args.eval_steps, args.do_eval = IntervalStrategy.STEPS, TENTH, True
        held_out = _few(held_out)
    trainer = make(config, rows.learn, held_out)
    trainer.add_callback(LearnPlateaus(wanted.patience, wanted.nats))
    if ours:
        trainer.add_callback(Undisturbed())
    return trainer


def held_out_rows(config: RunConfig, rows: Rows) -> Any:
    """Learn rows that are not trained on: the test split, or those that are measured."""
    found = rows.test
    if found is None and isinstance(rows.measured.get("learn"), Dataset):
        found = as_trl_reads(rows.measured["learn"], config)
    if found is None or getattr(found, "column_names", None) == ["prompt"]:
        where = "measure: DATA to a learn task" if config.tasks else "--measure learn=DATA, or data with a test split"
        raise DataError(
            f"--stop-when {PLATEAU} needs learn rows that are not trained on, with their completions. Give {where}."
        )
    return found


def _few(held_out: Any) -> Any:
    if isinstance(held_out, dict):
        return {name: _few(rows) for name, rows in held_out.items()}
    return spread(held_out, MOST) if isinstance(held_out, Dataset) else held_out


class LearnPlateaus(EarlyStoppingCallback):
    """transformers' own early stopping, which goes on counting where a resumed run left off."""

    stopped: str | None = None
    """Why training ended before its time."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # not super(): all it does is to warn of load_best_model_at_end. The Trainer restores no callback by default,
        # and fails to save one that the checkpoint does not know.
        left = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = left["attributes"]["early_stopping_patience_counter"]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            self.stopped = f"{_stopped(state)} before it was resumed ({PLATEAU})"
            control.should_training_stop = True
        every = f"{state.eval_steps} steps" if args.eval_strategy == IntervalStrategy.STEPS else "epoch"
        logger.info("%s: evaluating every %s, patience %d", PLATEAU, every, self.early_stopping_patience)
        looks = evaluations_before_the_end(args, state) + args.eval_on_start
        if looks <= self.early_stopping_patience:
            logger.warning(
                "%s cannot end this run: it takes %d evaluations before the last step, and there are %d. Evaluate more "
                "often (eval_steps), or be less patient.",
                PLATEAU,
                self.early_stopping_patience + 1,
                looks,
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        name = "eval_" + args.metric_for_best_model.removeprefix("eval_")
        if name not in metrics:  # of another task
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)
        evaluations = self.early_stopping_patience_counter
        if evaluations >= self.early_stopping_patience and state.global_step < state.max_steps:
            least = f" by more than {self.early_stopping_threshold:g}" if self.early_stopping_threshold else ""
            self.stopped = (
                f"{_stopped(state)}: {name} is {metrics[name]:.4g}, and did not get better{least} in {evaluations} "
                f"evaluations in a row ({PLATEAU})"
            )
            logger.info(self.stopped)


class Undisturbed(TrainerCallback):
    """Give back the numbers that the Trainer's evaluation draws, where it would not evaluate without us.

    A data loader draws a seed when it starts; dropout would have drawn that number next.
    """

    _generator: torch.Tensor | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._generator = torch.get_rng_state() if control.should_evaluate else None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._generator is not None:
            torch.set_rng_state(self._generator)


# ---- what is protected is being lost ---------------------------------------------------------------------------------


class RetentionFalls(TrainerCallback):
    """Look at every protect task while training lasts; save and stop when one keeps too little.

    Args:
        share: of its figure at the start that a task must keep.
        start: has the `evaluation` that measured the start, once training begins, and `kept()`, which looks again.
        trainer: logs the figures, as `retention/TASK`, and `drift/TASK` where the same forward passes have it.
    """

    stopped: str | None = None

    def __init__(self, share: float, start: Any, trainer: SFTTrainer) -> None:
        self.share, self.start, self.trainer = share, start, trainer
        self._looked = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.every = max(1, math.ceil(TENTH * state.max_steps))
        self.ours = args.eval_strategy == IntervalStrategy.NO
        if not self.ours and not evaluations_before_the_end(args, state):
            logger.warning(
                "eval_strategy evaluates at the end alone, which stops nothing: %s looks by itself", RETENTION
            )
            self.ours = True
        judged = self.start.evaluation.judged()
        if not judged:
            raise IncompatibleError(
                f"--stop-when {RETENTION} can judge no protect task: the start was not measured (a run resumed under "
                "FSDP), or got no token right. Leave the condition out, or protect what the model can do."
            )
        when = f"every {self.every} steps" if self.ours else "at every evaluation"
        logger.info("%s %g: looking at %s %s", RETENTION, self.share, ", ".join(judged), when)
        if state.global_step:  # what was resumed may have been stopped
            self._look(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ours = self.ours and state.global_step % self.every == 0
        if (control.should_evaluate or ours) and self._looked < state.global_step < state.max_steps:
            self._looked = state.global_step
            self._look(args, state, control)

    on_epoch_end = on_step_end

    def _look(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        kept = self.start.kept()
        shares = {name: figure.share for name, figure in kept.items()}
        if args.world_size > 1:  # those of the first rank, so that all stop or none
            shares = broadcast_object_list([shares])[0]
        logs = control.should_log  # which logging takes back, though the loss is still to be logged
        with evaluating(self.trainer.model):  # TRL would otherwise log and forget its figures of training
            drifts = {f"drift/{name}": figure.drift for name, figure in kept.items() if figure.drift is not None}
            self.trainer.log({f"retention/{name}": share for name, share in shares.items()} | drifts)
        control.should_log = logs
        lost = min(shares, key=shares.__getitem__)
        if shares[lost] < self.share:
            control.should_training_stop = control.should_save = True
            self.stopped = f"{_stopped(state)}: {lost} keeps {kept[lost]}, less than {self.share:g} ({RETENTION})"
            logger.info(self.stopped)


def evaluations_before_the_end(args: TrainingArguments, state: TrainerState) -> int:
    """How often the Trainer evaluates before its last step; none by epochs of a stream, whose length nobody knows."""
    if args.eval_strategy == IntervalStrategy.STEPS:
        last, first = (state.max_steps - 1) // state.eval_steps, math.ceil(args.eval_delay / state.eval_steps)
    else:  # the epochs of a stream are endless, those of data at most as many as its steps
        epochs = state.num_train_epochs if state.num_train_epochs <= state.max_steps else 1
        last, first = epochs - 1, math.ceil(args.eval_delay)
    return max(0, last - max(1, first) + 1)


def _stopped(state: TrainerState) -> str:
    return f"stopped at step {state.global_step} of {state.max_steps}"


def watch(config: RunConfig, start: Any, trainer: SFTTrainer) -> None:
    """Stop when retention falls, if that was asked for."""
    share = read(config.stop_when).retention
    if share is not None:
        trainer.add_callback(RetentionFalls(share, start, trainer))


def why_stopped(trainer: SFTTrainer) -> str | None:
    """Why training ended before its time, if a condition ended it."""
    found = (getattr(callback, "stopped", None) for callback in trainer.callback_handler.callbacks)
    return next((why for why in found if why), None)
