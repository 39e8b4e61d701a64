"""What rows must be to serve for what they are given: refused, or at least said, before anything trains on them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from datasets.features.features import require_decoding

from . import conditions
from .batches import say_learnt
from .config import RunConfig
from .data import normalise
from .errors import DataError, FTPlusError, UsageError, escape, nearest
from .evaluation import EvalTask
from .examples import text_tokenizer, tokenize
from .formats import IGNORED, Row
from .mixture import epoch_counts, shared
from .pools import EVALUATED

if TYPE_CHECKING:
    from .trainer import SFTTrainer

logger = logging.getLogger("hf_ftplus")


def check_supervised(learn: Any, trainer: SFTTrainer) -> None:
    """Something must be left to learn from, of each task; what carries loss is said, and what truncation dropped.

    Raises:
        DataError: nothing is left, or tokens that the model does not have.
    """
    kept, given = trainer.train_dataset, learn if isinstance(learn, dict) else {"learn": learn}
    if not isinstance(kept, Dataset) or not all(isinstance(part, Dataset) for part in given.values()):
        return
    embedding = trainer.model.get_input_embeddings()
    for wrapped in ("base_layer", "original_module"):  # by PEFT: a LoRA on it, or tokens of it that train
        embedding = getattr(embedding, wrapped, embedding)
    for name, part in given.items():
        refuse_foreign(name, part, getattr(embedding, "num_embeddings", math.inf))
    found = by_task(kept) if isinstance(learn, dict) else {"learn": kept}
    for name, part in given.items():
        own = found.get(name, kept.select([]))
        share = share_supervised(own)
        if not len(own) or share == 0:
            raise DataError(
                f"{escape(name)}: none of {len(part)} rows has a supervised token left after truncation to max_length "
                f"{trainer.args.max_length}. Type a larger --max_length."
            )
        if math.isfinite(share):
            rows = f"{len(own)} row{'s' * (len(own) != 1)}"
            logger.info("%s: %s, %.0f %% of the tokens carry loss", escape(name), rows, 100 * share)
        if len(own) < len(part) and not trainer.args.packing:
            logger.warning(dropped(name, part, len(part) - len(own), trainer))


def parts(learn: Any) -> list[Any]:
    """The rows of each task; of all of them, where there is but one."""
    return list(learn.values()) if isinstance(learn, dict) else [learn]


def row_count(learn: Any) -> int | None:
    """Rows; None where any of them is streamed."""
    sized = all(hasattr(part, "__len__") for part in parts(learn))
    return sum(map(len, parts(learn))) if sized else None


def len_of(rows: Any) -> str:
    """`96`, or `streamed`."""
    count = row_count(rows)
    return "streamed" if count is None else str(count)


def by_task(learn: Any) -> dict[str, Any]:
    """Training rows of each task, if they say which they belong to; else all of them."""
    if not isinstance(learn, Dataset) or "task" not in learn.column_names:
        return {"learn": learn}
    owners = list(learn["task"])
    return {
        name: learn.select([i for i, owner in enumerate(owners) if owner == name]) for name in dict.fromkeys(owners)
    }


def refuse_foreign(name: str, rows: Dataset, size: float) -> None:
    """Raise for tokens that are not among so many: a GPU would stop at them without a word of why."""
    for column, low in (("input_ids", 0), ("labels", IGNORED)):
        if column not in rows.column_names or not _of_tokens(rows.features[column]):
            continue
        for part, table in enumerate(rows.select_columns(column).with_format("arrow").iter(TOGETHER)):
            for row, ids in enumerate(table[column].to_numpy(zero_copy_only=False), part * TOGETHER + 1):
                bad = () if ids is None else ids[(ids >= size) | (ids < 0) & (ids != low)]
                if len(bad):
                    raise DataError(
                        f"{escape(name)}, row {row}: {column!r} holds {bad[0]}; the model has {size} tokens."
                    )


def _of_tokens(feature: Any) -> bool:
    return "int" in str(getattr(getattr(feature, "feature", None), "dtype", ""))


TOGETHER = 1000
"""Rows that are looked at at a time."""


def refuse_missing(rows: Dataset, columns: Iterable[str]) -> None:
    """Raise where nothing stands in a column that is trained on, of rows that nobody looked through as they were read.
    Empty text is something: TRL trains on it.
    """
    for name in sorted(columns):
        places: list[int] = []
        for part, table in enumerate(rows.select_columns(name).with_format("arrow").iter(TOGETHER)):
            column = table[name].combine_chunks()
            missing = column.is_null().to_numpy(zero_copy_only=False)
            if name == "messages" and hasattr(column, "value_lengths"):
                missing = missing | (column.value_lengths().to_numpy(zero_copy_only=False) == 0)
            places += (np.flatnonzero(missing) + part * TOGETHER).tolist()
        if places:
            numbers = ", ".join(str(place + 1) for place in places[:20]) + ", ..." * (len(places) > 20)
            raise DataError(
                f"learn: {name!r} is missing in {len(places)} of {len(rows)} rows (rows {numbers}). Fill them in, or "
                "leave those rows out."
            )


def refuse_little_shares(learn: dict[str, Any], given: dict[str, float]) -> None:
    """Raise for a share of training that is less than one row, as far as rows can be counted before they are packed."""
    if not all(isinstance(rows, Dataset) for rows in learn.values()):
        return
    sizes = {name: len(rows) for name, rows in learn.items()}
    epoch_counts(shared(dict.fromkeys(given, 0) | sizes, given), sizes)


LOOKED_THROUGH = 20_000
"""Rows up to which those that do not train are looked up by their numbers."""


def dropped(name: str, part: Dataset, lost: int, trainer: SFTTrainer) -> str:
    """How many rows of a task do not train, why, and which."""
    length, mode, tokenizer = trainer.args.max_length, trainer.args.truncation_mode, trainer.processing_class
    line = f"{escape(name)}: {lost} of {len(part)} rows ({lost / len(part):.0%}) do not train at max_length {length}"
    if len(part) <= LOOKED_THROUGH:
        with suppress(FTPlusError):  # rows that TRL reads and we do not
            found = tokenize(normalise(part, name), text_tokenizer(tokenizer), length, name, mode)
            line += f": {found.why()}" if found.dropped == lost else ""
    return f"{line}. Type a larger --max_length, or shorten the prompts."


def refuse_idle(config: RunConfig) -> None:
    """Raise for settings of `dataset_name` that would do nothing to tasks."""
    script, training = config.script, config.training
    for key, unset, instead in (
        ("dataset_config", script.dataset_config is None, "config: NAME to the tasks"),
        ("dataset_streaming", not script.dataset_streaming, "streaming: true to the tasks"),
        ("dataset_train_split", script.dataset_train_split == "train", "split: NAME to the tasks"),
        ("dataset_test_split", script.dataset_test_split == "test", "measure: DATA to the tasks"),
        ("dataset_text_field", training.dataset_text_field == "text", "columns: {text: NAME} to the tasks"),
    ):
        if not unset:
            raise UsageError(f"{key} does nothing beside tasks. Leave it out, and give {instead}.")


def refuse_endless(config: RunConfig) -> None:
    """Raise where learn rows are a stream and nothing says how many steps to take, which the Trainer would ask late."""
    if config.tasks:
        streams = [f"tasks.{escape(task.name)}, streaming" for task in config.tasks if task.streaming]
    elif config.mixture.datasets:
        streams = ["streaming"] if config.mixture.streaming else []
    else:
        streams = ["dataset_streaming"] if config.script.dataset_streaming else []
    if streams and config.training.max_steps <= 0:
        raise UsageError(f"{streams[0]}: a stream has no end; type --max_steps N.")


def refuse_one_task(config: RunConfig, learn: Any) -> None:
    """Raise before the model loads where `multitask` would find one task alone."""
    chosen = "multitask" in [strategy.name for strategy in config.strategies]
    several = len(learn) > 1 if isinstance(learn, dict) else "task" in (learn.column_names or ())
    if chosen and not several:
        raise DataError(
            "multitask shares training between several learn tasks, and finds one. Declare several under tasks: in "
            "YAML, or give every row a column 'task' that names its task (the key datasets: keeps one, and adds none)."
        )


def refuse_questions(name: str, protect: Dataset) -> None:
    if protect.column_names == ["prompt"]:
        raise DataError(
            f"--protect {name}: its rows are questions without completions, which say nothing about what to keep. "
            "Give rows with completions, or measure with them: --measure."
        )


def evaluated(tests: dict[str, Dataset], config: RunConfig) -> Any:
    """What the Trainer evaluates: the rows of the only task, as eval_loss; or of several by name, as eval_NAME_loss.

    Raises:
        UsageError: see `best_figure`.
    """
    own = [f"eval_{name}_loss" for name in tests]
    return tests[config.learns[0]] if best_figure(config, own) not in own and len(config.learns) == 1 else tests


def best_figure(config: RunConfig, own: Sequence[str] = ()) -> str:
    """The figure that tells the best model: of all rows that are evaluated, or of the tasks' `own`.

    Raises:
        UsageError: there will be no such figure.
    """
    best = config.training.metric_for_best_model or "loss"
    best, known = best if best.startswith("eval_") else f"eval_{best}", [f"eval_{name}" for name in EVALUATED] + [*own]
    if best not in known:
        raise UsageError(
            f"metric_for_best_model {escape(best)} is no figure of an evaluation.{nearest(best, known)} "
            f"Expected one of {', '.join(map(escape, known))}."
        )
    return best


def refuse_unevaluated(config: RunConfig) -> None:
    """Raise, before the model loads, where the Trainer is to evaluate and no rows are held out for it."""
    if config.training.eval_strategy == "no" or conditions.read(config.stop_when).patience is not None:
        return
    where = "measure: DATA to a learn task" if config.tasks else "data with a test split (--dataset_test_split)"
    raise DataError(
        f"eval_strategy {config.training.eval_strategy.value} needs learn rows that are not trained on, with their "
        f"completions. Give {where}, or leave eval_strategy out."
    )


def check_metric(name: str, rows: Any, metric: str | None) -> None:
    """Raise where rows cannot be scored as was asked for, which measuring would find once the model is there."""
    if not isinstance(rows, Dataset) or not (metric or "choices" in rows.column_names):
        return
    found = list(rows)
    EvalTask(name, "measure", found, found, metric or ("choice" if all(row["choices"] for row in found) else None))


def sayings(learn: Any, read: Callable[[Row], Row]) -> set[int]:
    """What the learn rows say, `read` as they are trained on, each as a number; a stream's are not known."""
    found = [_undecoded(part) for part in parts(learn) if isinstance(part, Dataset)]
    return {said(read(row)) for part in found for row in part} - {NOTHING}


def _undecoded(rows: Dataset) -> Dataset:
    """Without what takes time to decode: images, say."""
    return rows.select_columns([name for name, kind in rows.features.items() if not require_decoding(kind)])


def warn_of_learnt(learnt: set[int], protect: dict[str, Dataset]) -> None:
    """Say which protect tasks hold learn rows: what is being learnt cannot tell what was forgotten."""
    for name, task in protect.items():
        say_learnt(name, sum(said(row) in learnt for row in task), len(task))


def measured_and_learnt(
    measured: dict[str, Any], learnt: set[int], most: int, read: Callable[[Row], Row]
) -> dict[str, str]:
    """What a report must say of tasks whose measured rows are trained on: learnt by heart is not learnt.

    Args:
        measured: rows to measure, by task.
        learnt: what the learn rows say.
        most: rows of a task that are measured.
        read: makes of a row what is trained on.
    """
    notes = {}
    for name, task in measured.items():
        rows = spread(task, most) if isinstance(task, Dataset) else []
        if same := sum(said(read(row)) in learnt for row in rows):
            notes[name] = f"{same} of its {len(rows)} measured rows are trained on, word for word."
    return notes


def warn_of_protected(measured: dict[str, Dataset], protect: dict[str, Dataset], most: int) -> None:
    """Say which measured tasks hold protect rows: what is held on to row by row is kept better than the skill.

    Args:
        measured: rows to measure.
        protect: rows that protect.
        most: rows of a task that are measured.
    """
    known = {said(row) for task in protect.values() for row in task}
    for name, task in measured.items() if known else ():
        task = spread(task, most)
        same = sum(said(row) in known for row in task)
        if same:
            logger.warning(
                "%s: %d of its %d measured rows protect, too, word for word, and will look better kept than others. "
                "Measure other rows.",
                escape(name),
                same,
                len(task),
            )


def without(measured: Dataset, protect: dict[str, Dataset], name: str) -> Dataset:
    """The rows of a task that protect nothing.

    Raises:
        DataError: there are none.
    """
    known = {said(row) for task in protect.values() for row in task}
    kept = [i for i, row in enumerate(measured) if said(row) not in known]
    if len(kept) == len(measured):
        return measured
    if not kept:
        raise DataError(
            f"--measure {escape(name)}: each of the {len(measured)} rows that the model wrote protects, too, word for "
            "word; nothing is left to measure. Ask for more of them, or for fewer to protect."
        )
    lost = len(measured) - len(kept)
    logger.warning("%s: %d of %d rows protect, too, and are not measured.", escape(name), lost, len(measured))
    return measured.select(kept)


def spread(rows: Dataset, most: int) -> Dataset:
    """At most `most` rows, evenly over the whole: those of a task that are measured."""
    return rows if len(rows) <= most else rows.select(places(len(rows), most))


def places(length: int, count: int) -> list[int]:
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def said(row: Row) -> int:
    """What a row says, in whatever format, as a number to compare by."""
    parts = row["messages"] if "messages" in row else [row.get(key) for key in ("prompt", "completion")]
    parts = [row.get("text") or row.get("input_ids")] if parts == [None, None] else parts
    parts = [turn for part in parts for turn in (part if isinstance(part, list) else [part])]
    return hash(tuple(str(turn["content"] if isinstance(turn, dict) else turn).strip() for turn in parts))


NOTHING = said({})


def share_supervised(dataset: Any) -> float:
    """Share of tokens that carry loss, over the first thousand rows that have any, else over all."""
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        return float("nan")
    for rows in (dataset.select(range(min(1000, len(dataset)))), dataset):
        labels = [label for row in rows["labels"] for label in row]
        if any(label != IGNORED for label in labels):
            return sum(label != IGNORED for label in labels) / len(labels)
    return 0.0
