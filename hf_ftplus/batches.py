"""Protect and learn data as micro-batches, for strategies that run the model on them themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote
from zlib import crc32

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from . import data
from .errors import StorageError, UsageError, escape
from .examples import Example, collate, tokenize
from .generate import pad_id, self_generate, store
from .model import cache
from .refusals import refuse_answers
from .specs import TaskSpec, as_tasks, is_batches
from .strategy import Run
from .weights import sharded

logger = logging.getLogger("hf_ftplus")

DEFAULT_LENGTH = 1024
"""Where a trainer's arguments know no `max_length`; one that is None cuts nothing."""
CHUNK = 10_000
"""Learn rows looked at at once."""
PROTECT_BATCH = 4
"""Rows in a micro-batch of protect data. Each batch is one sample of every weight's importance: small is steady."""


BLOCK = 64
"""Rows of which those of like length share a micro-batch."""


@dataclass(frozen=True)
class SelfText:
    """Where the text that the starting model writes is kept for a resumed run, whose weights have moved."""

    output: Path
    """The folder of the run."""
    checkpoint: Path | None = None
    """From which a resumed run goes on: what it wrote when it began lies beside it."""

    def rows(self, name: str, write: Callable[[], Dataset], args: TrainingArguments) -> Dataset:
        """What `write` gave when the run began; kept in the folder of the run, too, where that is another.

        Raises:
            StorageError: the run is resumed, and the text is not there.
        """
        file = _own(self.output, name)
        if self.checkpoint is None:
            rows = write()
            if args.process_index == 0:
                store(file, list(rows))
            args.distributed_state.wait_for_everyone()
            return data.load(str(file))
        source = _own(self.checkpoint.absolute().parent, name)
        if not source.is_file():
            raise StorageError(
                f"{source} is missing: the text that the model wrote when this run began, which its trained weights "
                "cannot write again. Put it back, or start a new run."
            )
        rows = data.load(str(source))
        if args.process_index == 0 and file.resolve() != source.resolve():
            store(file, list(rows))
        return rows


def _own(folder: Path, name: str) -> Path:
    return folder / "_self" / f"{quote(name, safe='')}.jsonl"  # what begins so is not pushed to the Hub


def protect_batches(
    protect: Any, run: Run, args: TrainingArguments, written: SelfText | None = None
) -> dict[str, list[dict[str, Tensor]]]:
    """Whatever the user gave as protect data, as micro-batches by task name."""
    if protect is None:
        return {}
    tasks, tokenizer = as_tasks(protect), run.tokenizer
    if tokenizer is None and not all(is_batches(task) for task in tasks.values()):
        raise UsageError(
            "The trainer has no tokenizer to read protect data with. Give it processing_class=tokenizer, or give "
            "protect as ready micro-batches of input_ids and labels."
        )
    length, mode = getattr(args, "max_length", DEFAULT_LENGTH), getattr(args, "truncation_mode", "keep_start")
    first = next((name for name, task in tasks.items() if isinstance(task, TaskSpec) and task.generate), None)
    found = {}
    for name, task in tasks.items():
        if is_batches(task):
            found[name] = task
            continue
        if isinstance(task, TaskSpec) and task.generate:
            refuse_answers(args, "Give protect data that exists instead of self:N.")
            write = partial(
                self_generate,
                run.model,
                tokenizer,
                **task.sampling(),
                seed=seed_of("" if name == first else f"protect {name}", args.seed),
                autocast=run.autocast,
                cache=None if sharded(run.model.parameters()) else cache() / "self",  # all ranks write, or none
            )
            task = written.rows(name, write, args) if written else write()
        elif isinstance(task, TaskSpec):
            task = task.load(args.seed)
        done = tokenize(data.normalise(task, name), tokenizer, length, name, mode)
        if done.dropped:
            logger.warning(
                "%s: nothing is left to protect in %d of %d rows (%.0f %%) at max_length %s: %s",
                name,
                done.dropped,
                done.rows,
                100 * done.dropped / done.rows,
                length,
                done.why(),
            )
        size = min(PROTECT_BATCH, args.per_device_train_batch_size)
        found[name] = collate(by_length(done.examples), pad_id(tokenizer), size)
    return found


def seed_of(use: str, seed: int) -> int:
    """Of the text that the model writes for one use, so that no two are copies; "" (the first) takes the run's own."""
    return seed + crc32(use.encode())


def by_length(examples: list[Example]) -> list[Example]:
    """Rows of like length side by side, to save padding, in groups that come in any order, so that the first rows stay
    a fair sample. The order is the same for micro-batches of any size, or strategies would draw others.
    """
    found: list[Example] = []
    for start in range(0, len(examples), BLOCK):
        part = sorted(examples[start : start + BLOCK], key=lambda example: len(example["input_ids"]))
        groups = [part[place : place + PROTECT_BATCH] for place in range(0, len(part), PROTECT_BATCH)]
        short = [groups.pop()] if len(groups[-1]) < PROTECT_BATCH else []
        Random(start).shuffle(groups)
        found += [example for group in groups + short for example in group]
    return found


@dataclass(frozen=True)
class LearnBatches(Sequence):
    """Micro-batches of the first `rows` rows of a dataset, each made when it is asked for: no set is held whole."""

    dataset: Any
    collate: Callable[[list[Any]], dict[str, Any]]
    size: int
    rows: int

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = range(0, self.rows, self.size)[index]
        with torch.random.fork_rng(devices=[]):  # a collator that masks at random takes nothing from training
            batch = self.collate([self.dataset[i] for i in range(start, min(start + self.size, self.rows))])
        tensors = batch.items() if isinstance(batch, Mapping) else ()  # of GRPO, a list of rows
        return {key: value for key, value in tensors if isinstance(value, Tensor)}


def learn_batches(dataloader: Any, batch_size: int, rows: int) -> Sequence[dict[str, Tensor]]:
    """Micro-batches of the first `rows` training rows; none when the rows are not tokens and labels (DPO, streams)."""
    dataset = getattr(dataloader, "dataset", None)
    # torch gives every dataset a __getitem__, and accelerate every shard of a stream a __len__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return []
    batches = LearnBatches(dataset, dataloader.collate_fn, batch_size, min(rows, len(dataset)))
    return batches if batches and {"input_ids", "labels"} <= batches[0].keys() else []


def first_rows(batches: Sequence[dict[str, Tensor]], rows: int) -> list[dict[str, Tensor]]:
    """Micro-batches holding the first `rows` rows."""
    kept = []
    for batch in batches:
        if rows <= 0:
            break
        kept.append({key: value[:rows] for key, value in batch.items()})
        rows -= len(batch["labels"])
    return kept


def examples_of(batches: list[dict[str, Tensor]]) -> list[dict[str, list[int]]]:
    """Micro-batches taken apart into unpadded `input_ids` and `labels`."""
    rows = []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        rows += [
            {"input_ids": ids[keep].tolist(), "labels": labels[keep].tolist()}
            for ids, labels, keep in zip(batch["input_ids"], batch["labels"], mask, strict=True)
        ]
    return rows


def say_learnt(name: str, same: int, rows: int) -> None:
    """Say that `same` of the rows of a protect task are learnt, too: what is being learnt cannot tell what was lost."""
    if same:
        logger.warning(
            "%s: %d of its %d protect rows are learnt, too, word for word. Take them out of one of the two.",
            escape(name),
            same,
            rows,
        )


def warn_of_learnt_tokens(learn: Any, rows: int | None, protect: dict[str, list[dict[str, Tensor]]]) -> None:
    """Say which protect tasks hold learn rows, where both are tokens already (`row_checks.warn_of_learnt` reads words).

    Args:
        learn: what is trained on; anything but a dataset of tokens is left alone.
        rows: that are learnt, with which it begins; None: all.
        protect: micro-batches by task.
    """
    if not protect or not isinstance(learn, Dataset) or "input_ids" not in learn.column_names:
        return
    known = rows_of_tokens(learn if rows is None else learn.select(range(rows)))
    for name, batches in protect.items():
        found = [hash(np.array(example["input_ids"], np.int64).tobytes()) in known for example in examples_of(batches)]
        say_learnt(name, sum(found), len(found))


def rows_of_tokens(learn: Dataset) -> set[int]:
    """A number for the token ids of every row, packed ones taken apart."""
    packed, known = "seq_lengths" in learn.column_names, set()
    columns = ["input_ids", "seq_lengths"] if packed else ["input_ids"]
    for batch in learn.select_columns(columns).with_format("arrow").iter(CHUNK):
        ids = batch["input_ids"].combine_chunks()
        lengths = batch["seq_lengths"].combine_chunks().flatten() if packed else ids.value_lengths()
        ends = lengths.to_numpy(zero_copy_only=False).cumsum()[:-1]
        tokens = ids.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        known |= {hash(part.tobytes()) for part in np.split(tokens, ends)}
    return known


def same_batches(one: dict[str, list[dict[str, Tensor]]], other: dict[str, list[dict[str, Tensor]]]) -> bool:
    """Whether two protect sets hold the same rows."""
    apart = [{name: examples_of(batches) for name, batches in tasks.items()} for tasks in (one, other)]
    return apart[0] == apart[1]
