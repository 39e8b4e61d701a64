"""Rows of several tasks in exact shares, evenly spread, the same stream on every rank, resumable at any batch.

An epoch holds as many learn rows as there are, and protect rows beside them: with one learn task each of its rows comes
once, whatever is replayed, and an epoch of N learn rows with a share s of protect rows has N / (1 - s) rows. Counts are
whole numbers by largest remainder.

Within an epoch rows are spread, not shuffled: any window of consecutive rows, and so every optimizer step of whatever
batch size, accumulation and number of processes, holds its share of protect rows to within one row. Within a task rows
are drawn without repetition until all were seen, across epochs; then again in another order.

The stream is a function of (seed, epoch) alone, so a resumed run needs no state and every rank draws the same one.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from .errors import DataError, IncompatibleError, escape
from .strategy import Task

SHOWN = 20
"""Tasks that the logged table lists."""


def allocate(shares: dict[str, float], rows: int) -> dict[str, int]:
    """`rows` split by `shares` (which sum to 1) in whole numbers, by largest remainder."""
    exact = {task: share * rows for task, share in shares.items()}
    counts = {task: int(value) for task, value in exact.items()}
    by_remainder = sorted(exact, key=lambda task: (counts[task] - exact[task], task))
    for task in by_remainder[: rows - sum(counts.values())]:
        counts[task] += 1
    return counts


def shared(sizes: dict[str, float], given: dict[str, float]) -> dict[str, float]:
    """Shares of tasks: as given; the others divide the rest by their sizes."""
    rest, free = 1 - sum(given.values()), sum(size for name, size in sizes.items() if name not in given)
    return {name: given[name] if name in given else rest * size / (free or 1) for name, size in sizes.items()}


def epoch_counts(shares: dict[str, float], learn: dict[str, int]) -> dict[str, int]:
    """Rows of each task in an epoch: as many learn rows as there are, protect rows in proportion beside them.

    Args:
        shares: share of each task; sums to 1.
        learn: rows of each learn task; the other tasks protect.

    Raises:
        DataError: a task with a share would get no row at all; names it and the least share that gives one.
    """
    rows, part = sum(learn.values()), sum(shares[task] for task in learn)
    protect = {task: share for task, share in shares.items() if task not in learn}
    rest = sum(protect.values())
    if part == 0:
        return dict.fromkeys(learn, 0) | allocate({task: share / rest for task, share in protect.items()}, rows)
    counts = allocate({task: shares[task] / part for task in learn}, rows)
    beside = int(rows * rest / part + 0.5)
    counts |= allocate({task: share / (rest or 1) for task, share in protect.items()}, beside)
    for task, count in counts.items():
        if shares[task] > 0 and not count:
            total = sum(counts.values())
            raise DataError(
                f"Task {task!r} would get no row: its share of {shares[task]:.2g} of an epoch of {total} rows is less "
                f"than one. Give it {1 / total:.2g} or more, or more learn rows."
            )
    return counts


def spread(counts: Sequence[int], generator: torch.Generator) -> np.ndarray:
    """Which of the tasks 0, 1, ... stands at each of `sum(counts)` places, each spaced evenly: [places].

    Row j of task i stands at time (j + phase_i) / counts_i, with one random phase per task (systematic sampling). Of
    two tasks, any window of K places then holds its share of K, rounded down or up; of more, to within two or three.
    """
    phases = torch.rand(len(counts), generator=generator, dtype=torch.float64).tolist()
    times = [(np.arange(count) + phase) / max(count, 1) for count, phase in zip(counts, phases, strict=True)]
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners[np.argsort(np.concatenate(times), kind="stable")]


class MixtureSampler(Sampler[int]):
    """Row indices of one epoch, with as many rows of each task as `counts` says.

    Args:
        owners: the task of each row of the dataset.
        counts: rows of each task in an epoch.
        seed: of every order drawn.
        apart: tasks (those that protect) that are spaced against all the others first, so that windows hold their
            share together to within one row, however many tasks there are.
    """

    def __init__(self, owners: Sequence[str], counts: dict[str, int], seed: int, apart: Collection[str] = ()) -> None:
        owners = np.asarray(owners)
        self.members = {task: np.flatnonzero(owners == task) for task in counts}
        self.counts, self.seed, self.epoch, self.begun = counts, seed, 0, False
        self.groups = [[task for task in counts if (task in apart) == inside] for inside in (False, True)]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[int]:
        self.begun = True
        generator = self._generator("order", self.epoch)
        groups = [group for group in self.groups if group]
        outer = spread([sum(self.counts[task] for task in group) for group in groups], generator)
        drawn = np.empty(len(self), dtype=np.int64)
        for number, group in enumerate(groups):
            places = np.flatnonzero(outer == number)
            inner = spread([self.counts[task] for task in group], generator)
            for i, task in enumerate(group):
                drawn[places[inner == i]] = self._draw(task)
        return iter(drawn.tolist())

    def _draw(self, task: str) -> np.ndarray:
        """This epoch's slice of an endless chain of permutations of the task's rows."""
        members, count = self.members[task], self.counts[task]
        start, chosen = self.epoch * count, [np.empty(0, dtype=np.int64)]
        done = 0
        while done < count:
            lap, offset = divmod(start + done, len(members))
            order = torch.randperm(len(members), generator=self._generator(task, lap)).numpy()
            chosen.append(members[order[offset : offset + count - done]])
            done += len(chosen[-1])
        return np.concatenate(chosen)

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        mixed = (self.seed * 1_000_003 + zlib.crc32(purpose.encode())) * 1_000_003 + number
        return torch.Generator().manual_seed(mixed % 2**63)


# ---- what was drawn, said and kept -----------------------------------------------------------------------------------


def realised(tasks: dict[str, Task], *, tokens: bool = False) -> dict[str, float]:
    """Share of each task in the rows (or supervised tokens) that an epoch draws."""
    drawn = {name: (task.drawn_tokens if tokens else task.drawn) or 0.0 for name, task in tasks.items()}
    total = sum(drawn.values())
    return {name: value / total for name, value in drawn.items()} if total else {}


def table(tasks: dict[str, Task], epochs: float) -> str:
    """What an epoch draws of each task, and how often a row of it comes in a run of so many epochs.

    Rows and shares are exact; tokens are those of the first epoch, and change a little from one to the next.
    """
    rows, tokens = realised(tasks), realised(tasks, tokens=True)
    streamed = any(task.rows is None for task in tasks.values())
    lines = [("task", "role", "rows", "an epoch", "% of rows", "% of tokens", "each seen")]
    for name, task in list(tasks.items())[:SHOWN]:
        counts = ("", "") if streamed else (f"{task.drawn:.0f}", f"{task.drawn * epochs / (task.rows or 1):.2f}")
        lines.append(
            (
                escape(name),
                task.role,
                "stream" if task.rows is None else str(task.rows),
                counts[0],
                f"{100 * rows.get(name, 0):.2f}",
                f"{100 * tokens[name]:.2f}" if tokens else "",
                counts[1],
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    sides = "<<" + ">" * (len(widths) - 2)
    shown = ["  ".join(map("{:{}{}}".format, line, sides, widths)).rstrip() for line in lines]
    more = [f"... and {len(tasks) - SHOWN} more"] if len(tasks) > SHOWN else []
    return "\n".join(["mixture:", *shown, *more])


def rows_drawn(tasks: dict[str, Task]) -> dict[str, list[float]]:
    """The mixture as a checkpoint keeps it: of each task, rows there are (-1: a stream) and rows (or share) drawn."""
    return {name: [-1 if task.rows is None else task.rows, task.drawn] for name, task in tasks.items()}


def check_drawn(was: dict[str, list[float]] | None, tasks: dict[str, Task]) -> None:
    """A resumed run goes on with the mixture that it began with, which `rows_drawn` described.

    Raises:
        IncompatibleError: other tasks, other rows or other shares; names the first difference. Or nobody described it.
    """
    now = rows_drawn(tasks)
    if was is None and now:
        raise IncompatibleError(
            f"The checkpoint does not say which rows of {', '.join(map(escape, now))} it had drawn, so they would not "
            "go on where they stopped. Resume from one that this version wrote, or start a new run."
        )
    was = was or {}
    for name in dict.fromkeys([*was, *now]):
        if was.get(name) == now.get(name):
            continue
        had, has = (f"{s[name][1]:g} of {s[name][0]:g} rows" if name in s else "no row" for s in (was, now))
        raise IncompatibleError(
            f"The checkpoint drew {had} of task {escape(name)!r} in an epoch, this run draws {has}, so its rows "
            "would not go on where they stopped. Resume with the same data and settings, or start a new run."
        )
