"""Find the rows of a run, check them, and keep apart what is learnt, what protects, and what is measured."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from . import data
from .batches import DEFAULT_LENGTH, SelfText
from .callback import autocast
from .config import RunConfig
from .errors import DataError
from .evaluation import EvalTask, reshard, with_answers
from .generate import self_generate
from .model import cache
from .trainer import SFTTrainer

HELD_OUT = 5
"""One row in so many of a protect set is measured and never used to protect."""
ANSWERED_TOGETHER = 16
NATIVE = ({"messages"}, {"prompt", "completion"}, {"input_ids"}, {"prompt"}, {"images"}, {"image"})
"""Columns that TRL itself understands; such learn data reaches it untouched."""

logger = logging.getLogger("hf_ftplus")


@dataclass
class Rows:
    """The rows of a run, by what they are for."""

    learn: Any
    test: Dataset | None
    """The test split of the learn data, if it has one."""
    protect: dict[str, Dataset] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """What the report says about the rows that a task is measured on."""


def find(config: RunConfig) -> Rows:
    """The rows that exist before the model does.

    Raises:
        DataError: rows that are missing, malformed, or cannot serve for what they are given.
    """
    rows = Rows(*learn_rows(config))
    for specs, found in ((config.measure, rows.measured), (config.protect, rows.protect)):
        found |= {spec.name: data.load(spec.source, spec.split) for spec in specs if not spec.generate}
    for name, task in rows.protect.items():
        if task.column_names == ["prompt"]:
            raise DataError(
                f"--protect {name}: its rows are questions without completions, which say nothing about what to keep. "
                "Give rows with completions, or measure with them: --measure."
            )
    return rows


def learn_rows(config: RunConfig) -> tuple[Any, Dataset | None]:
    """The learn data as `trl sft` finds it (or a local file), and its test split if it has one."""
    script, mixture = config.script, config.mixture
    if mixture.datasets:
        from trl import get_dataset

        splits = get_dataset(mixture)
    elif Path(script.dataset_name).suffix in data.READERS:
        splits = {script.dataset_train_split: data.load(script.dataset_name)}
    else:
        try:
            splits = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
        except Exception as error:  # whatever its readers, fsspec or the network raise
            raise DataError(f"--dataset_name {script.dataset_name}: {data.reason(error)}") from error
    if script.dataset_train_split not in splits:
        raise DataError(
            f"{script.dataset_name} has no split {script.dataset_train_split!r}; it has {', '.join(splits)}."
        )
    train, test = splits[script.dataset_train_split], splits.get(script.dataset_test_split)
    return as_trl_reads(train, config), None if test is None else as_trl_reads(test, config)


def as_trl_reads(rows: Any, config: RunConfig) -> Any:
    """Rows in a format that TRL knows are left alone; alpaca and sharegpt become such."""
    columns = set(rows.column_names or ())
    known = any(native <= columns for native in NATIVE) or config.training.dataset_text_field in columns
    return rows if known or not isinstance(rows, Dataset) else data.normalise(rows, "learn")


def check_supervised(learn: Any, trainer: SFTTrainer) -> None:
    """Something must be left to learn from; what truncation dropped is said."""
    kept = trainer.train_dataset
    if not isinstance(kept, Dataset) or not isinstance(learn, Dataset):
        return
    if not len(kept) or share_supervised(kept) == 0:
        raise DataError(
            f"learn: none of {len(learn)} rows has a supervised token left after truncation to max_length "
            f"{trainer.args.max_length}. Type a larger --max_length."
        )
    if len(kept) < len(learn) and not trainer.args.packing:
        logger.warning(
            "learn: %d of %d rows lost all supervised tokens to truncation.", len(learn) - len(kept), len(learn)
        )


def share_supervised(dataset: Any) -> float:
    """Share of tokens that carry loss, over the first thousand rows that have any, else over all."""
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        return float("nan")
    for rows in (dataset.select(range(min(1000, len(dataset)))), dataset):
        labels = [label for row in rows["labels"] for label in row]
        if any(label != -100 for label in labels):
            return sum(label != -100 for label in labels) / len(labels)
    return 0.0


# ---- what the starting model writes itself ---------------------------------------------------------------------------


def write(rows: Rows, config: RunConfig, trainer: SFTTrainer) -> None:
    """Add the rows of every `self:N`."""
    for specs, found in ((config.protect, rows.protect), (config.measure, rows.measured)):
        for spec in specs:
            if spec.generate and (config.strategies or spec.name not in rows.measured):
                found[spec.name] = written(spec, config, trainer)


def written(spec: data.TaskSpec, config: RunConfig, trainer: SFTTrainer) -> Dataset:
    """The first process writes, the others read its cache."""
    how = {"seed": config.training.seed, "autocast": autocast(trainer.args)}
    if trainer.is_fsdp_enabled:
        return _written_together(spec, config, trainer, how)
    with trainer.args.main_process_first(local=False):
        return self_generate(trainer.model, tokenizer_of(trainer), spec.generate, cache=cache() / "self", **how)


def _written_together(spec: data.TaskSpec, config: RunConfig, trainer: SFTTrainer, how: dict[str, Any]) -> Dataset:
    """Every rank runs every forward pass of a sharded model, from one seed; what the first has written counts."""
    kept = SelfText(Path(config.training.output_dir), again=trainer.state.global_step > 0)
    write = partial(self_generate, trainer.model, tokenizer_of(trainer), spec.generate, **how)
    found = kept.rows(spec.name, write, trainer.args)
    reshard(trainer.model)
    return found


# ---- what is measured ------------------------------------------------------------------------------------------------


def keep_apart(rows: Rows, config: RunConfig) -> None:
    """Give every task rows to be measured on, which neither protect nor are trained on where that can be."""
    for name in [name for name in rows.protect if name not in rows.measured]:
        rows.protect[name], rows.measured[name] = hold_out(rows.protect[name], config.measure_rows)
        if rows.protect[name] is rows.measured[name]:
            few = f"measured on the rows that protect it; holding some out takes {HELD_OUT}, there are "
            _note(rows, config, name, f"{few}{len(rows.protect[name])}.")
    if "learn" not in rows.measured:
        rows.measured["learn"] = rows.learn if rows.test is None else rows.test
        if rows.test is None:
            _note(rows, config, "learn", "measured on trained rows; for held-out ones give --measure learn=DATA.")


def _note(rows: Rows, config: RunConfig, name: str, note: str) -> None:
    if config.measure_rows:
        rows.notes[name] = note
        logger.warning("%s: %s", name, note)


def hold_out(rows: Dataset, most: int) -> tuple[Dataset, Dataset]:
    """(rows that protect, rows that are measured): every fifth row, at most `most`; too few rows serve as both."""
    measured = min(most, len(rows) // HELD_OUT)
    if not measured:
        return rows, rows
    chosen = set(places(len(rows), measured))
    return rows.select([i for i in range(len(rows)) if i not in chosen]), rows.select(sorted(chosen))


def spread(rows: Dataset, most: int) -> Dataset:
    """At most `most` rows, evenly over the whole."""
    return rows if len(rows) <= most else rows.select(places(len(rows), most))


def places(length: int, count: int) -> list[int]:
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def tasks(rows: Rows, config: RunConfig, trainer: SFTTrainer) -> Iterator[EvalTask]:
    """What is measured before and after: learn first, then protect, then the rest."""
    protect = [spec.name for spec in config.protect]
    order = ["learn", *protect, *(name for name in rows.measured if name != "learn" and name not in protect)]
    tokenizer = tokenizer_of(trainer)
    for name in order if config.measure_rows else ():
        found = rows.measured[name]
        if not isinstance(found, Dataset):
            logger.warning("%s is a stream and is not measured; give --measure %s=DATA.", name, name)
            continue
        text = config.training.dataset_text_field
        if name == "learn" and text != "text" and text in found.column_names:
            found = found.select_columns([text]).rename_column(text, "text")
        found = data.normalise(spread(found, config.measure_rows), name)
        if found.column_names == ["prompt"]:
            if trainer.state.global_step:  # resumed under FSDP
                logger.warning("%s is not measured: the model that could answer its questions has moved on.", name)
                continue
            found = answered(name, found, trainer)
        role = "learn" if name == "learn" else "protect" if name in protect else "measure"
        length = trainer.args.max_length or DEFAULT_LENGTH
        task = EvalTask.of(name, role, found, tokenizer, length, config.metrics.get(name))
        task.notes += [rows.notes[name]] if name in rows.notes else []
        yield task


def answered(name: str, questions: Dataset, trainer: SFTTrainer) -> Dataset:
    """Questions with the starting model's own greedy answers as the reference."""
    rows = with_answers(
        trainer.model,
        tokenizer_of(trainer),
        list(questions),
        batch_size=ANSWERED_TOGETHER,
        autocast=autocast(trainer.args),
    )
    if not rows:
        raise DataError(
            f"{name}: the starting model answers none of the {len(questions)} questions, nothing to measure. "
            "Give rows with a completion, or a model that was trained to answer."
        )
    return Dataset.from_list(rows)


def tokenizer_of(trainer: SFTTrainer) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
