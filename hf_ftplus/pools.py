"""The rows that training may draw from: tokenised, packed and counted task by task, then put into one dataset.

    together({"sums": rows, "chat": rows})     learn tasks as one dataset with a column `task`
    Pools(learn, protect, pack)                what there is of each task; `mixed(shares, seed)` makes the training set

A row's task is known by its place in the dataset, for collators pass on no column of ours. Protect rows are packed on
their own, as learn rows were: packing before mixing would glue tasks into one row, and fix their shares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
)
from torch import Tensor

from .batches import examples_of
from .errors import DataError, IncompatibleError, UsageError
from .examples import supervised_in
from .formats import IGNORED
from .mixture import MixtureSampler, epoch_counts, shared
from .specs import distinct_names
from .strategy import Task

KEPT = ("input_ids", "labels", "attention_mask", "seq_lengths")
"""Columns that a collator of rows of tokens may want; protect rows are given the same ones."""
CHUNK = 10_000
"""Rows whose labels are held in memory while tokens are counted."""

TOKENS = {"input_ids", "labels"}

Streams = dict[str, IterableDataset]
Batch = dict[str, Tensor]


def learn_tasks(learn: dict[str, Any]) -> dict[str, Dataset] | Streams:
    """What a user may give as `train_dataset={"name": rows, ...}`.

    Raises:
        UsageError: nothing, two tasks of one name, or values that are not all datasets (or all streams).
    """
    if isinstance(learn, (DatasetDict, IterableDatasetDict)):
        raise UsageError(
            f"train_dataset has splits ({', '.join(map(str, learn))}); expected one: data['train']. If they are tasks: "
            "train_dataset=dict(data)."
        )
    distinct_names(str(name) for name in learn)
    kinds = {type(rows).__name__ for rows in learn.values()}
    for kind in (Dataset, IterableDataset):
        if learn and all(isinstance(rows, kind) for rows in learn.values()):
            return {str(name): rows for name, rows in learn.items()}
    raise UsageError(
        f"train_dataset is a dict of {', '.join(sorted(kinds)) or 'nothing'}; expected names of learn tasks with a "
        "datasets.Dataset each, or a streaming IterableDataset each: {'sums': rows, 'chat': rows}."
    )


EVALUATED = ("loss", "mean_token_accuracy", "entropy", "aux_loss")
"""What TRL's trainer tells of an evaluation, of all rows that it is given."""


def together(learn: dict[str, Dataset]) -> Dataset:
    """Learn tasks as one dataset with a column `task`; its first rows are a fair sample of all tasks.

    Raises:
        DataError: a task without rows.
    """
    empty = [name for name, rows in learn.items() if not len(rows)]
    if empty:
        raise DataError(
            f"learn task {empty[0]!r} has no row left with a supervised token after truncation to max_length. Give it "
            "rows, a larger --max_length, or leave it out."
        )
    parts = [_kept(rows).add_column("task", [name] * len(rows)) for name, rows in learn.items()]
    parts = [part if part.features == parts[0].features else part.cast(parts[0].features) for part in parts]
    times = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts])
    return concatenate_datasets(parts).select(np.argsort(times, kind="stable"))


def interleaved(streams: Streams, shares: dict[str, float], seed: int) -> IterableDataset:
    """Streams drawn from at random with the probabilities `shares`; ends where the first of them does."""
    drawn = [name for name, share in shares.items() if share > 0]
    total = sum(shares[name] for name in drawn)
    parts = [_of_tokens(streams[name]) for name in drawn]
    return interleave_datasets(parts, probabilities=[shares[name] / total for name in drawn], seed=seed)


def endless(streams: Streams) -> Streams:
    """Several learn streams start again where they end; a single one ends, and with it an epoch."""
    return dict(streams) if len(streams) == 1 else {name: stream.repeat(None) for name, stream in streams.items()}


def supervised_tokens(rows: Dataset) -> np.ndarray:
    """Tokens of each row that carry loss: labels other than -100, but the first of the row, or of each document that is
    packed into it, which nothing predicts: [rows]."""
    counts, packed = [np.empty(0, dtype=np.int64)], "seq_lengths" in rows.column_names
    columns = ["labels", *(["seq_lengths"] if packed else [])]
    for batch in rows.select_columns(columns).with_format("arrow").iter(CHUNK):
        labels = batch["labels"].combine_chunks()
        lengths = labels.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        ends = lengths.cumsum()
        carries = labels.flatten().to_numpy(zero_copy_only=False) != IGNORED
        carries[(ends - lengths)[lengths > 0]] = False
        if packed:
            inside = batch["seq_lengths"].combine_chunks().flatten().to_numpy(zero_copy_only=False).cumsum()
            carries[inside[inside < len(carries)]] = False
        before = np.concatenate([[0], carries.cumsum()])
        counts.append(before[ends] - before[ends - lengths])
    return np.concatenate(counts)


class Pools:
    """Learn and protect rows by task, and what there is of each.

    Args:
        learn: the training set as the Trainer has it, or streams by task.
        protect: micro-batches by task.
        pack: packs tokenised rows as the learn rows were packed; None where they were not.

    Raises:
        UsageError: a learn and a protect task of one name.
        DataError: protect rows that cannot be told apart, or carry no loss.
    """

    def __init__(
        self,
        learn: Any,
        protect: dict[str, list[Batch]],
        pack: Callable[[Dataset, str], Dataset] | None = None,
    ) -> None:
        streams = {"learn": learn} if isinstance(learn, IterableDataset) else learn if isinstance(learn, dict) else {}
        self.columns = _columns(next(iter(streams.values()), learn))
        self.mixable = set(self.columns) >= TOKENS and bool(streams or isinstance(learn, Dataset))
        self.learn = _kept(learn) if self.mixable and not streams else None
        self.streams: Streams = {name: _of_tokens(stream) for name, stream in streams.items()} if self.mixable else {}
        counted = hasattr(learn, "__len__") and not streams
        if counted and not len(learn):
            raise DataError(
                "learn has no row with a supervised token; expected some. Is --max_length too short for it?"
            )
        owners = _owners(learn) if counted else []
        names = list(streams) or list(dict.fromkeys(owners)) or ["learn"]
        for name in names:
            if name in protect:
                raise UsageError(
                    f"A learn task and a protect task are both called {name!r}; expected distinct names. Name the "
                    "protect data otherwise: --protect OTHER=DATA, or protect={'other': rows}."
                )
        like = self.learn if self.learn is not None else next(iter(self.streams.values()), None)
        self.protect = {name: _protect_rows(name, batches, like, pack) for name, batches in protect.items()}
        owners += [name for name, rows in self.protect.items() for _ in range(len(rows))]
        self.owners = np.array(owners, dtype=object)
        self.tokens = self._count() if self.learn is not None else None
        self.tasks = {name: self._task(name, "learn", counted) for name in names}
        self.tasks |= {name: self._task(name, "protect") for name in protect}

    def _count(self) -> np.ndarray:
        """Supervised tokens of every row, learn rows first."""
        return np.concatenate([supervised_tokens(rows) for rows in (self.learn, *self.protect.values())])

    def _task(self, name: str, role: str, counted: bool = True) -> Task:
        rows = int((self.owners == name).sum()) if counted else None
        tokens = None if self.tokens is None else int(self.tokens[self.owners == name].sum())
        if role == "protect":
            return Task(role, rows, tokens, drawn_tokens=None if tokens is None else 0.0)
        return Task(role, rows, tokens, drawn=float(rows) if counted else 1.0, drawn_tokens=tokens)

    def shares(self, given: dict[str, float] | None = None) -> dict[str, float]:
        """Share of each task in training: as given; learn rows divide the rest in proportion (streams alike)."""
        return shared({name: task.drawn for name, task in self.tasks.items()}, given or {})

    def mixed(self, shares: dict[str, float], seed: int) -> tuple[Dataset | IterableDataset, MixtureSampler | None]:
        """The training set in the given shares, and the order it is drawn in (a stream has its own).

        Raises:
            IncompatibleError: the learn rows are not tokens with labels.
            DataError: a share so small that its task gets no row.
        """
        if not self.mixable:
            raise IncompatibleError(
                "Tasks are mixed as rows of input_ids and labels, in a datasets.Dataset, as an SFTTrainer makes them. "
                f"The training rows of this trainer have {', '.join(self.columns) or 'no columns'}."
            )
        if self.streams:
            return self._interleaved(shares, seed), None
        learn = {name: task.rows for name, task in self.tasks.items() if task.role == "learn"}
        sampler = MixtureSampler(self.owners, epoch_counts(shares, learn), seed, apart=set(self.protect))
        first = np.fromiter(sampler, dtype=np.int64)
        sampler.begun = False
        for name, task in self.tasks.items():
            task.drawn = float(sampler.counts[name])
            task.drawn_tokens = float(self.tokens[first][self.owners[first] == name].sum())
        return concatenate_datasets([self.learn, *self.protect.values()]), sampler

    def _interleaved(self, shares: dict[str, float], seed: int) -> IterableDataset:
        for name, task in self.tasks.items():
            task.drawn = shares[name]
        streams = endless(self.streams)
        for name, rows in self.protect.items():
            streams[name] = rows.shuffle(seed=seed).to_iterable_dataset().repeat(None)
        return interleaved(streams, shares, seed)


def _columns(rows: Any) -> list[str]:
    """The columns of a dataset; of a stream that does not know them, those of its first row."""
    if isinstance(rows, IterableDataset) and rows.column_names is None:
        return list(next(iter(rows), {}))
    return list(getattr(rows, "column_names", None) or ())


def _kept(rows: Any) -> Any:
    """The columns that a collator of rows of tokens may want."""
    return rows.select_columns([name for name in KEPT if name in _columns(rows)])


def _of_tokens(stream: IterableDataset) -> IterableDataset:
    """The same, of one type: what a stream holds is guessed from its first row, which differs between streams."""
    kept = _kept(stream)
    return kept.cast(Features({name: List(Value("int64")) for name in _columns(kept)})) if _columns(kept) else stream


def _owners(learn: Any) -> list[str]:
    """The task of each learn row: its column `task`, if that holds words.

    Raises:
        DataError: a row whose `task` is empty.
    """
    feature = learn.features.get("task") if isinstance(learn, Dataset) else None
    if isinstance(feature, ClassLabel):
        return feature.int2str(list(learn["task"]))
    if not isinstance(feature, Value) or "string" not in feature.dtype:
        return ["learn"] * len(learn)
    owners = list(learn["task"])
    missing = next((row for row, owner in enumerate(owners, 1) if not owner), None)
    if missing is not None:
        raise DataError(f"learn, row {missing}: its task is empty; expected a name in every row, or no column 'task'.")
    return owners


def _protect_rows(
    name: str, batches: list[Batch], like: Any, pack: Callable[[Dataset, str], Dataset] | None
) -> Dataset:
    """Protect rows with the columns and types of the learn rows, packed if those are."""
    if any("position_ids" in batch for batch in batches):
        raise DataError(
            f"protect task {name!r} is padding-free micro-batches, whose rows cannot be told apart to be mixed into "
            "training. Give rows (a dataset, a file), or padded micro-batches."
        )
    examples = examples_of(batches)
    if not any(map(supervised_in, examples)):
        raise DataError(f"protect task {name!r}: no token of its {len(examples)} rows carries loss.")
    rows = Dataset.from_list(examples)
    if like is None:
        return rows
    if pack is not None:
        rows = pack(rows, name)
    else:
        lengths = [len(example["input_ids"]) for example in examples]
        rows = rows.add_column("attention_mask", [[1] * length for length in lengths])
        rows = rows.add_column("seq_lengths", [[length] for length in lengths])
    rows = rows.select_columns(_columns(like))
    return rows if like.features is None or rows.features == like.features else rows.cast(like.features)
