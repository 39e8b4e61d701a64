"""Protect and learn data as micro-batches, for strategies that run the model on them themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from . import data
from .errors import UsageError
from .generate import self_generate
from .model import cache
from .strategy import Run

DEFAULT_LENGTH = 1024
PROTECT_BATCH = 4
"""Rows in a micro-batch of protect data. Each batch is one sample of every weight's importance: small is steady."""


def protect_batches(
    protect: Any, run: Run, args: TrainingArguments, tokenizer: Any
) -> dict[str, list[dict[str, Tensor]]]:
    """Whatever the user gave as protect data, as micro-batches by task name."""
    if protect is None:
        return {}
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    tasks = data.as_tasks(protect)
    if tokenizer is None and not all(data.is_batches(task) for task in tasks.values()):
        raise UsageError(
            "The trainer has no tokenizer to read protect data with. Give it processing_class=tokenizer, or give "
            "protect as ready micro-batches of input_ids and labels."
        )
    length = getattr(args, "max_length", None) or DEFAULT_LENGTH
    found = {}
    for name, task in tasks.items():
        if data.is_batches(task):
            found[name] = task
            continue
        if isinstance(task, data.TaskSpec) and task.generate:
            task = self_generate(run.model, tokenizer, task.generate, seed=args.seed, cache=cache() / "self")
        elif isinstance(task, data.TaskSpec):
            task = data.load(task.source, task.split)
        examples = by_length(data.tokenize(data.normalise(task, name), tokenizer, length, name).examples)
        found[name] = data.collate(examples, pad_id(tokenizer), min(PROTECT_BATCH, args.per_device_train_batch_size))
    return found


def by_length(examples: list[data.Example], block: int = 64) -> list[data.Example]:
    """Rows of like length side by side, to save padding; within blocks, so that the first rows stay a fair sample."""
    blocks = (examples[start : start + block] for start in range(0, len(examples), block))
    return [example for part in blocks for example in sorted(part, key=lambda example: len(example["input_ids"]))]


def learn_batches(dataloader: Any, batch_size: int, rows: int) -> list[dict[str, Tensor]]:
    """Micro-batches of the first `rows` training rows; none when the rows are not tokens and labels (DPO, streams)."""
    dataset = getattr(dataloader, "dataset", None)
    if not hasattr(dataset, "__len__"):  # a stream; torch gives every dataset a __getitem__
        return []
    rows = min(rows, len(dataset))
    starts = range(0, rows, batch_size)
    batches = (dataloader.collate_fn([dataset[i] for i in range(s, min(s + batch_size, rows))]) for s in starts)
    kept = [{k: v for k, v in batch.items() if isinstance(v, Tensor)} for batch in batches]
    return kept if all({"input_ids", "labels"} <= batch.keys() for batch in kept) else []


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


def pad_id(tokenizer: Any) -> int:
    """The padding token's id; any id serves, since pads are masked and unsupervised."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return found if isinstance(found, int) else 0
