"""What a run measures before and after: rows kept apart from those that are trained on or protect, as far as can be."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from datasets import Dataset

from . import data
from .config import RunConfig
from .errors import DataError, FTPlusError
from .evaluation import EvalTask, with_answers
from .evaluation.tasks import Role
from .examples import text_tokenizer
from .precision import autocast
from .row_checks import places, spread
from .rows import Rows, of_training
from .trainer import SFTTrainer

HELD_OUT = 5
"""One row in so many of a protect set is measured and never used to protect."""
ANSWERED_TOGETHER = 16

logger = logging.getLogger("hf_ftplus")


def keep_apart(rows: Rows, config: RunConfig) -> None:
    """Give every task rows to be measured on, which neither protect nor are trained on where that can be."""
    known = {*rows.measured, *config.unmeasured}
    for name in [name for name in rows.protect if name not in known]:
        rows.protect[name], rows.measured[name] = hold_out(rows.protect[name], config.measure_rows)
        if rows.protect[name] is rows.measured[name]:
            few = f"measured on the rows that protect it; holding some out takes {HELD_OUT}, there are "
            _note(rows, config, name, f"{few}{len(rows.protect[name])}.")
    for name in [name for name in config.learns if name not in known]:
        if not config.tasks and rows.test is not None:
            rows.measured[name] = rows.test
            continue
        rows.measured[name] = rows.learn[name] if config.tasks else rows.learn
        if not isinstance(rows.measured[name], Dataset):
            continue
        instead = "measure: DATA in the task" if config.tasks else "--measure learn=DATA"
        _note(rows, config, name, f"measured on trained rows; for held-out ones give {instead}.")


def _note(rows: Rows, config: RunConfig, name: str, note: str) -> None:
    if config.measure_rows:
        rows.notes[name] = note


def hold_out(rows: Dataset, most: int) -> tuple[Dataset, Dataset]:
    """(rows that protect, rows that are measured): every fifth row, at most `most`; too few rows serve as both."""
    measured = min(most, len(rows) // HELD_OUT)
    if not measured:
        return rows, rows
    chosen = set(places(len(rows), measured))
    return rows.select([i for i in range(len(rows)) if i not in chosen]), rows.select(sorted(chosen))


def tasks(rows: Rows, config: RunConfig, trainer: SFTTrainer) -> Iterator[EvalTask]:
    """What is measured before and after: learn first, then protect, then the rest."""
    learn, protect = config.learns, [spec.name for spec in config.protect]
    order = [name for name in dict.fromkeys([*learn, *protect, *rows.measured]) if name in rows.measured]
    for name in order if config.measure_rows else ():
        found = rows.measured[name]
        if not isinstance(found, Dataset):
            instead = "measure: DATA in the task" if config.tasks else f"--measure {name}=DATA"
            logger.warning("%s is a stream and is not measured; give %s.", name, instead)
            continue
        if found.column_names == ["prompt"] and trainer.state.global_step:  # resumed under FSDP
            logger.warning("%s is not measured: the model that could answer its questions has moved on.", name)
            continue
        role = "learn" if name in learn else "protect" if name in protect else "measure"
        try:
            task = _task(name, role, found, config, trainer)
        except FTPlusError as error:  # TRL may train on rows that cannot be measured
            if role != "learn" or asked_for(name, config):
                raise
            logger.warning("%s is not measured: %s", name, error)
            continue
        if name in rows.notes:
            logger.warning("%s: %s", name, rows.notes[name])
            task.notes.append(rows.notes[name])
        yield task


def _task(name: str, role: Role, rows: Dataset, config: RunConfig, trainer: SFTTrainer) -> EvalTask:
    through = of_training(config)(0) if name == "learn" and not config.tasks else None
    found = data.normalise(spread(rows, config.measure_rows), name, through)
    found = answered(name, found, trainer) if found.column_names == ["prompt"] else found
    tokenizer, args, metric = text_tokenizer(trainer.processing_class), trainer.args, config.metrics.get(name)
    return EvalTask.of(name, role, found, tokenizer, args.max_length, metric, args.truncation_mode)


def asked_for(name: str, config: RunConfig) -> bool:
    """Whether somebody said that a learn task is to be measured: with which rows, or how it is scored."""
    return name in config.metrics or name in [spec.name for spec in config.measure]


def answered(name: str, questions: Dataset, trainer: SFTTrainer) -> Dataset:
    """Questions with the starting model's own greedy answers as the reference."""
    rows = with_answers(
        trainer.model,
        text_tokenizer(trainer.processing_class),
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
