"""Find the rows of a run and check them, before the model loads and once it can write its own. See `measured.py`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset

from . import data
from .batches import SelfText, seed_of
from .config import RunConfig
from .errors import DataError, FTPlusError, UsageError, escape, reason
from .examples import text_tokenizer
from .files import is_local
from .formats import Row
from .generate import self_generate
from .model import cache
from .precision import autocast
from .row_checks import (
    best_figure,
    check_metric,
    evaluated,
    measured_and_learnt,
    refuse_endless,
    refuse_idle,
    refuse_little_shares,
    refuse_missing,
    refuse_one_task,
    refuse_questions,
    refuse_unevaluated,
    sayings,
    spread,
    warn_of_learnt,
    warn_of_protected,
    without,
)
from .specs import TaskSpec
from .trainer import SFTTrainer

NATIVE = ({"messages"}, {"prompt", "completion"}, {"input_ids"}, {"images"}, {"image"})
"""Columns that TRL itself understands, and prefers to its text field; such learn data reaches it untouched."""

logger = logging.getLogger("hf_ftplus")


@dataclass
class Rows:
    """The rows of a run, by what they are for."""

    learn: Any
    """A dataset or a stream, or the datasets of several tasks by name."""
    test: Any
    """The test split of the learn data, if it has one; of several tasks those that have other rows to measure."""
    protect: dict[str, Dataset] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """What the report says about the rows that a task is measured on."""


def find(config: RunConfig) -> Rows:
    """The rows that exist before the model does.

    Raises:
        DataError: rows that are missing, malformed, or cannot serve for what they are given: all of them at once.
    """
    rows, faults = gather(config)
    if faults:
        raise together(faults)
    return rows


def gather(config: RunConfig) -> tuple[Rows, list[FTPlusError]]:
    """The rows that can be read, and everything that is wrong with the others."""
    rows, faults = Rows({}, None), []
    declared, seed = {task.name: task for task in config.tasks}, config.training.seed
    with noting(faults):
        refuse_endless(config)
    if declared:
        rows.learn = declared_rows(config, faults)
    else:
        with noting(faults):
            rows.learn, rows.test = learn_rows(config)
            best_figure(config)
    for specs, found in ((config.measure, rows.measured), (config.protect, rows.protect)):
        for spec in specs:
            with noting(faults, spec.name if spec.name in declared else ""):
                spec = replace(spec, through=of_training(config)) if spec.name == "learn" and not declared else spec
                found |= {} if spec.generate else {spec.name: spec.load(seed)}
    for name, task in rows.protect.items():
        with noting(faults, name if name in declared else ""):
            refuse_questions(name, task)
    learn = rows.learn if declared else {}
    given = [spec.name for spec in config.measure]
    if not declared and "learn" in config.metrics and "learn" not in given and config.measure_rows:
        with noting(faults):
            learn = as_measured(rows, config)
    for name, found in {**learn, **rows.protect, **rows.measured}.items():
        with noting(faults, name if name in declared else ""):
            if config.measure_rows and name not in config.unmeasured:
                check_metric(name, found, config.metrics.get(name))
    if declared:
        tests = {name: rows.measured[name] for name in config.learns if name in rows.measured}
        tests = {name: found for name, found in tests.items() if found.column_names != ["prompt"]}
        with noting(faults):
            rows.test = evaluated(tests, config) if tests else None
    if rows.test is None and not faults:
        with noting(faults):
            refuse_unevaluated(config)
    if config.shares and not faults:
        with noting(faults):
            refuse_little_shares(rows.learn, config.shares)
    split = {} if declared or rows.test is None else {"learn": rows.test}
    measured = {**split, **rows.measured} if config.measure_rows else {}
    read = (lambda row: row) if declared else of_training(config)(0)
    learnt = sayings(rows.learn, read) if rows.protect or measured else set()
    warn_of_learnt(learnt, rows.protect)
    rows.notes |= measured_and_learnt(measured, learnt, config.measure_rows, read)
    warn_of_protected(rows.measured, rows.protect, config.measure_rows)
    return rows, faults


@contextmanager
def noting(faults: list[FTPlusError], task: str = "") -> Iterator[None]:
    """Note what is wrong, with the name of a declared task on every line, and go on."""
    try:
        yield
    except FTPlusError as error:
        if task:
            lines = (f"tasks.{escape(task)}: {line}" for line in str(error).splitlines())
            error.args = ("\n".join(lines),)
        faults.append(error)


def together(faults: list[FTPlusError]) -> FTPlusError:
    """All of them as one error; of one kind if they are."""
    if len(faults) == 1:
        return faults[0]
    kinds = {type(fault) for fault in faults}
    return (kinds.pop() if len(kinds) == 1 else DataError)("\n".join(map(str, faults)))


def learn_rows(config: RunConfig) -> tuple[Any, Dataset | None]:
    """The learn data as `trl sft` finds it (or a local file), and its test split if it has one; or tasks by name."""
    script, mixture = config.script, config.mixture
    if config.tasks:
        faults: list[FTPlusError] = []
        learn = declared_rows(config, faults)
        if faults:
            raise together(faults)
        return learn, None
    if mixture.datasets:
        from trl import get_dataset

        try:
            with numpy_seed(config.training.seed):  # test_split_size: the same split in every process, and again
                splits = get_dataset(mixture)
        except Exception as error:  # as below, and what TRL refuses of the mixture
            raise DataError(
                f"datasets: {reason(error).rstrip('.')}. Expected entries with path: NAME on the Hub, or path: "
                "json with data_files: FILE."
            ) from error
    elif is_local(script.dataset_name) or os.path.isfile(script.dataset_name):
        if script.dataset_config:
            raise UsageError(
                f"--dataset_config is of datasets on the Hub, and {script.dataset_name} is a local file; leave it out."
            )
        read = data.stream if script.dataset_streaming else data.load
        found = read(script.dataset_name, through=of_training(config)(0), named=True)
        field = config.training.dataset_text_field
        there = field != "text" and "text" in (found.column_names or next(iter(found)))
        splits = {"train": found.rename_column("text", field) if there else found}  # where TRL looks for it
    else:
        try:
            splits = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
        except Exception as error:  # whatever its readers, fsspec or the network raise
            spec = TaskSpec.parse(script.dataset_name)
            hint = f" Type --dataset_name {spec.source} --dataset_train_split '{spec.split}'." if spec.split else ""
            raise DataError(f"--dataset_name {script.dataset_name}: {reason(error)}{hint}") from error
    train, test = split_of(splits, "train", script), split_of(splits, "test", script)
    train, test = as_trl_reads(train, config), None if test is None else as_trl_reads(test, config)
    refuse_one_task(config, train)
    return train, test


@contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """Inside, numpy's global generator, which `train_test_split` asks for a seed, begins with this one."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


def split_of(splits: Any, use: str, script: Any) -> Any:
    """What `--dataset_train_split` or `--dataset_test_split` names; None if there is nothing to test on.

    Raises:
        DataError: it is not there.
    """
    split, source = getattr(script, f"dataset_{use}_split"), script.dataset_name or "The mixture"
    if split in splits:
        return splits[split]
    if use == split == "test":
        return None
    what = f"Type --dataset_{use}_split NAME."
    if {*"[+"} & {*split}:
        if all(isinstance(rows, Dataset) for rows in splits.values()):
            return data.sliced(splits, split, source)
        what = "A stream has no slices: name one of these, or do not stream."
    raise DataError(f"{source} has no split {split!r}; it has {', '.join(splits)}. {what}")


def as_measured(rows: Rows, config: RunConfig) -> dict[str, Dataset]:
    """The rows that the one learn task of a run without `tasks:` is measured on, if nothing else is given."""
    found = rows.learn if rows.test is None else rows.test
    if not isinstance(found, Dataset):
        return {}
    return {"learn": data.normalise(spread(found, config.measure_rows), "learn", of_training(config)(0))}


def declared_rows(config: RunConfig, faults: list[FTPlusError]) -> dict[str, Dataset]:
    """The rows of every learn task under `tasks:` that can be read."""
    with noting(faults):
        refuse_idle(config)
    learn = {}
    for task in config.tasks:
        with noting(faults, task.name):
            reads = task.role == "learn" and not task.spec.generate
            learn |= {task.name: task.load(config.training.seed)} if reads else {}
    if not faults:
        with noting(faults):
            refuse_one_task(config, learn)
    return learn


def as_trl_reads(rows: Any, config: RunConfig) -> Any:
    """Rows in a format that TRL knows are left alone; alpaca and sharegpt become such.

    Raises:
        DataError: rows in no format, or questions alone.
    """
    columns = set(rows.column_names or ())
    stray = "prompt" in columns and not columns & {"completion", "input_ids", "images", "image"}
    columns -= {"prompt"} if stray else set()  # TRL would look for its completion in vain
    formats = (*NATIVE, {config.training.dataset_text_field})
    known = next((native for native in formats if native <= columns), None)
    if known and isinstance(rows, Dataset):
        refuse_missing(rows, known)
    if not isinstance(rows, Dataset) or known:
        return rows.remove_columns("prompt") if stray and known else rows
    found = data.normalise(rows, "learn", named=True)
    if {"prompt", "completion"} & set(found.column_names) == {"prompt"}:
        raise DataError("learn: its rows are questions without completions; expected a column 'completion' to learn.")
    return found


def of_training(config: RunConfig) -> Callable[[int], Callable[[Row], Row]]:
    """For learn rows that are not read by TRL: its text field alone, where that is what TRL would train on."""
    return of_column(config.training.dataset_text_field)


def of_column(text: str) -> Callable[[int], Callable[[Row], Row]]:
    return lambda seed: partial(trained_on, text=text)


def trained_on(row: Row, text: str) -> Row:
    other = "conversations" in row or any(native <= row.keys() for native in NATIVE)
    return row if other or text not in row else {"text": row[text]}


# ---- what the starting model writes itself ---------------------------------------------------------------------------


def add_written(rows: Rows, config: RunConfig, trainer: SFTTrainer) -> None:
    """Add the rows of every `self:N`; what is measured of them is nothing that protects."""
    first = next((spec.name for spec in config.protect if spec.generate), None)
    for spec in config.protect:
        used = config.strategies or spec.name in config.shares
        if spec.generate and (used or spec.name not in (*rows.measured, *config.unmeasured)):
            use = "" if spec.name == first else f"protect {spec.name}"
            rows.protect[spec.name] = written(spec, use, config, trainer)
    for spec in config.measure:
        if spec.generate:
            found = written(spec, f"measure {spec.name}", config, trainer)
            rows.measured[spec.name] = without(found, rows.protect, spec.name)


def written(spec: TaskSpec, use: str, config: RunConfig, trainer: SFTTrainer) -> Dataset:
    """The first process writes, the others read its cache. Each `use` has rows of its own; "" those of the seed."""
    how = {**spec.sampling(), "seed": seed_of(use, config.training.seed), "autocast": autocast(trainer.args)}
    if trainer.is_fsdp_enabled:  # every rank runs every forward pass, from one seed; what the first has written counts
        checkpoint = Path(config.training.resume_from_checkpoint) if trainer.state.global_step else None
        kept = SelfText(Path(config.training.output_dir), checkpoint)
        write = partial(self_generate, trainer.model, text_tokenizer(trainer.processing_class), **how)
        return kept.rows(use or spec.name, write, trainer.args)
    with trainer.args.main_process_first(local=False):
        return self_generate(trainer.model, text_tokenizer(trainer.processing_class), cache=cache() / "self", **how)
