"""What a Trainer must do so that its training rows come from several tasks.

    MixingMixin     asks the strategies for the mixture, and draws the training rows by it
    TasksMixin      SFTTrainer(train_dataset={"sums": rows, "chat": rows}): each task prepared and packed on its own

Both go into trainers (`trainer.py`); every override calls `super()`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from .errors import DataError, FTPlusError, IncompatibleError, PluginError, escape, reason
from .mixture import MixtureSampler, table
from .pools import KEPT, Pools, endless, interleaved, learn_tasks, together
from .refusals import zero_stage
from .specs import TaskSpec, as_tasks
from .strategy import Run

logger = logging.getLogger("hf_ftplus")

TRIED = 64
"""Protect rows among which one of another length is looked for."""


class MixingMixin:
    """Training rows in the shares that strategies ask for. `self.ftplus` runs the strategies (see `trainer.py`)."""

    _mixture: MixtureSampler | None = None
    _streams: dict[str, IterableDataset] | None = None
    """Streamed learn rows by task, where several were given."""

    def _mix(self, given: dict[str, float] | None = None) -> None:
        """Ask the strategies for the mixture, and draw training rows by it, unless it is the one there is.

        Args:
            given: shares of tasks that strategies start from.
        """
        tasks = as_tasks(self.ftplus.protect).values() if self.is_fsdp_enabled else ()
        if any(isinstance(task, TaskSpec) and task.generate for task in tasks):
            raise IncompatibleError(
                "Rows are mixed before training starts, and under FSDP the model can write none until then. Give "
                "protect data that exists instead of self:N."
            )
        on_its_device(self)
        run = self.ftplus.setup(self.model, self.args, self.processing_class, None)
        pack = partial(packed, args=self.args) if getattr(self.args, "packing", False) else None
        pools = Pools(self._streams or self.train_dataset, run.protect, pack)
        rows = sum(task.rows or 0 for task in pools.tasks.values() if task.role == "learn")
        run.tasks, planned = pools.tasks, planned_rows(self.args, rows)
        plain, given = pools.shares(), pools.shares(given)
        if self.args.max_steps > 0:  # which are for protect rows, too
            run.rows = 1.0
            several = sum(1 for _ in self.ftplus.acting("mix")) > 1
            first = self._asked(run, given, plain) if several and run.protect else given
            planned *= sum(first[name] for name, task in run.tasks.items() if task.role == "learn")
        run.rows = planned
        shares = self._asked(run, given, plain)
        if any(abs(shares[task] - plain[task]) > 1e-9 for task in plain):
            self._set_signature_columns_if_needed()
            refuse_mixing(self.args, pools, self._signature_columns)
            self.train_dataset, self._mixture = pools.mixed(shares, seed_of_order(self.args))
            self.ftplus.learn_rows = rows or None
            if self._mixture is not None and run.protect:
                refuse_collator(self.data_collator, self._remove_unused_columns(self.train_dataset), rows)
        epoch = sum(task.drawn for task in run.tasks.values())
        logger.info(table(run.tasks, planned_rows(self.args, epoch) / epoch))

    def _asked(self, run: Run, shares: dict[str, float], plain: dict[str, float]) -> dict[str, float]:
        """Shares of tasks once every strategy has had its turn."""
        for strategy in self.ftplus.acting("mix"):
            shares = self.ftplus.call(strategy, "mix", run, dict(shares))
            check_shares(strategy.name, shares, plain)
        return shares

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        if self._mixture is not None:
            # accelerate (1.15) does not reach a sampler below the two layers of several processes and skipped batches,
            # so that a run that is resumed within a later epoch would have the rows of the first
            self._mixture.set_epoch(epoch)
        super()._run_epoch(model, epoch, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        # of dispatched batches only the first process draws
        if self._mixture is not None and not self._mixture.begun and not self.accelerator.dispatch_batches:
            raise IncompatibleError(
                f"Rows are drawn in another order than that of the mixture: this {type(self).__name__} has a "
                "get_train_dataloader, or a _get_train_sampler, of its own. Call super() there."
            )
        return super().training_step(*args, **kwargs)

    def num_examples(self, dataloader: Any) -> int:
        """Rows of an epoch: of a mixture those that are drawn, not all that there are."""
        found = super().num_examples(dataloader)
        return len(self._mixture) if self._mixture is not None and found == len(self.train_dataset) else found

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self._mixture if self._mixture is not None else super()._get_train_sampler(*args, **kwargs)


class TasksMixin:
    """An SFTTrainer that takes `train_dataset={"name": dataset, ...}`.

    TRL packs all training rows together and masks prompts as its first row needs it; here each task is prepared as if
    it were alone.
    """

    _learn: dict[str, Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        if isinstance(given.get("train_dataset"), dict):
            self._learn = learn_tasks(given["train_dataset"])
            given["train_dataset"] = leading(self._learn)
        super().__init__(**given)
        if self._learn is not None:  # TRL was told to skip preparation
            self.train_dataset = self._put_together(self._learn, self.args)

    def _prepare_dataset(self, dataset: Any, tokenizer: Any, args: Any, *more: Any, **kwargs: Any) -> Any:
        prepare = super()._prepare_dataset
        if self._learn is None or dataset is not leading(self._learn):
            return prepare(dataset, tokenizer, args, *more, **kwargs)
        if args.assistant_only_loss:
            refuse_without_assistant(self._learn)
        learn = {}
        for name, rows in self._learn.items():
            with preparing(name):
                learn[name] = prepare(rows, tokenizer, args, *more, **kwargs)
        return self._put_together(learn, args)

    def _put_together(self, learn: dict[str, Any], args: TrainingArguments) -> Dataset | IterableDataset:
        self._learn = None
        if all(isinstance(rows, Dataset) for rows in learn.values()):
            return together(learn)
        self._streams = learn
        return interleaved(endless(learn), dict.fromkeys(learn, 1.0), seed_of_order(args))


def as_trained(rows: Dataset, name: str, tokenizer: Any, args: TrainingArguments) -> Dataset:
    """Rows of one learn task as an SFTTrainer would make them, without one: `input_ids` and `labels`, not yet cut.

    Raises:
        DataError: TRL cannot prepare them.
    """
    whole = copy(args)
    whole.max_length, whole.shuffle_dataset = None, False
    # all that the method asks of its trainer; of rows without completions it masks nothing either way
    alone = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss=args.completion_only_loss in (None, True)
    )
    with preparing(name):
        if args.assistant_only_loss:
            refuse_without_assistant({name: rows})
            if not has_generation_markers(tokenizer.chat_template or ""):
                alone.chat_template = get_training_chat_template(tokenizer)
        return trl.SFTTrainer._prepare_dataset(alone, rows, tokenizer, whole, False, None, name)


@contextmanager
def preparing(name: str) -> Iterator[None]:
    """Put the name of the task on whatever a tokenizer or a chat template raises."""
    try:
        yield
    except (FTPlusError, OSError):  # the disk's errors are not of the rows
        raise
    except Exception as error:
        raise DataError(f"Learn task {escape(name)!r}: TRL cannot make tokens of it: {reason(error)}") from error


def leading(learn: dict[str, Any]) -> Any:
    """The task that TRL sees first: one with completions, if any, for then prompts are masked in every task."""
    asked = [rows for rows in learn.values() if {"prompt", "completion"} <= next(iter(rows), {}).keys()]
    return [*asked, *learn.values()][0]


def refuse_without_assistant(learn: dict[str, Any]) -> None:
    """Raise for a task without turns of an assistant, for which TRL looks in the first task only."""
    for name, rows in learn.items():
        row = next(iter(rows), {})
        if "input_ids" not in row and not trl.is_conversational(row):
            raise IncompatibleError(
                f"assistant_only_loss learns turns of an assistant, but rows of learn task {name!r} are no "
                "conversations. Give them as messages, or set assistant_only_loss=False."
            )


def on_its_device(trainer: Trainer) -> None:
    """Put the model where it will train, before anything is asked of it.

    Under DeepSpeed, or with bf16_full_eval, the Trainer does so only when training starts: until then a model would
    write and be measured on the CPU, in another precision than after it.
    """
    apart = trainer.is_fsdp_enabled or trainer.is_model_parallel or zero_stage(trainer.args) == 3
    apart = apart or getattr(trainer, "is_distributed_loading_by_transformers", False)
    waits = not trainer.place_model_on_device and trainer.args.place_model_on_device is not False
    if waits and not apart and not getattr(trainer.model, "is_quantized", False):
        trainer._move_model_to_device(trainer.model, trainer.args.device)


def refuse_mixing(args: TrainingArguments, pools: Pools, wanted: Iterable[str] | None) -> None:
    """Raise where the order or the columns of the training rows are not ours to choose.

    Args:
        args: of the trainer.
        pools: its rows.
        wanted: columns that its model takes.

    Raises:
        IncompatibleError: another sampling strategy, or columns that protect rows do not have.
    """
    order = getattr(args, "train_sampling_strategy", "random")
    if order != "random":
        raise IncompatibleError(
            f"train_sampling_strategy {order!r} chooses the order of training rows, and so does a mixture of tasks. "
            "Leave it at 'random'."
        )
    lost = [name for name in pools.columns if name in (wanted or ()) and name not in KEPT]
    if pools.mixable and lost:
        raise IncompatibleError(
            f"The model is given {', '.join(lost)} of each training row, which protect rows do not have. Expected rows "
            f"of {', '.join(KEPT[:3])} alone."
        )


def refuse_collator(collate: Any, rows: Dataset, learnt: int) -> None:
    """Raise where micro-batches cannot hold a learn row beside a protect row of another length.

    Args:
        collate: what makes micro-batches of rows.
        rows: `learnt` learn rows, and protect rows behind them.
        learnt: how many.
    """
    first = rows[0]
    others = (rows[place] for place in range(learnt, min(len(rows), learnt + TRIED)))
    other = next((row for row in others if len(row["input_ids"]) != len(first["input_ids"])), None)
    try:
        if other is not None:
            with torch.random.fork_rng(devices=[]):  # a collator that masks at random takes nothing from training
                collate([first, other])
    except (ValueError, RuntimeError, TypeError) as error:
        raise IncompatibleError(
            f"{getattr(collate, '__name__', type(collate).__name__)} makes no micro-batch of rows of "
            f"{len(first['input_ids'])} and {len(other['input_ids'])} tokens, so protect rows cannot be mixed in "
            f"({reason(error)}) Give the trainer a data_collator that pads, such as DataCollatorForSeq2Seq(tokenizer)."
        ) from error


def check_shares(name: str, shares: dict[str, float], start: dict[str, float]) -> None:
    """Shares are over the known tasks, none negative, and sum to one."""
    if shares.keys() != start.keys() or min(shares.values()) < 0 or not abs(sum(shares.values()) - 1) <= 1e-6:
        raise PluginError(f"{name}.mix returned {shares}; expected shares of {list(start)} that are >= 0 and sum to 1.")


def packed(rows: Dataset, name: str, args: TrainingArguments) -> Dataset:
    """Rows packed as TRL packs training rows; shuffled before, for rows of like length come side by side."""
    rows = rows.shuffle(seed=args.seed)
    return trl.pack_dataset(rows, args.max_length, args.packing_strategy, {"desc": f"Packing {name} dataset"})


def planned_rows(args: TrainingArguments, epoch: float) -> float:
    """Rows that training draws in all, with `epoch` rows in an epoch."""
    if args.max_steps <= 0:
        return args.num_train_epochs * epoch
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def seed_of_order(args: TrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed
