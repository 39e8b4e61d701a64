"""Rows of several tasks in exact shares, the same stream on every rank, resumable at any batch.

Each epoch holds a fixed number of rows, split over the tasks by largest remainder. Within a task rows are drawn without
repetition until all were seen, across epochs; then again in another order. The stream is a function of (seed, epoch)
alone, so a resumed run needs no state and every rank draws the same one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def allocate(shares: dict[str, float], rows: int) -> dict[str, int]:
    """`rows` split by `shares` (which sum to 1) in whole numbers, by largest remainder."""
    exact = {task: share * rows for task, share in shares.items()}
    counts = {task: int(value) for task, value in exact.items()}
    by_remainder = sorted(exact, key=lambda task: (counts[task] - exact[task], task))
    for task in by_remainder[: rows - sum(counts.values())]:
        counts[task] += 1
    return counts


class MixtureSampler(Sampler[int]):
    """Row indices of one epoch, `rows` of them, in the given shares.

    Args:
        tasks: the task of each row of the dataset.
        shares: share of each task in the rows drawn; sums to 1.
        rows: rows in an epoch.
        seed: of every order drawn.
    """

    def __init__(self, tasks: Sequence[str], shares: dict[str, float], rows: int, seed: int) -> None:
        self.members = {task: [i for i, owner in enumerate(tasks) if owner == task] for task in shares}
        self.counts = allocate(shares, rows)
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        drawn = [index for task in self.members for index in self._draw(task)]
        order = torch.randperm(len(drawn), generator=self._generator("order", self.epoch))
        return (drawn[i] for i in order.tolist())

    def _draw(self, task: str) -> list[int]:
        """This epoch's slice of an endless chain of permutations of the task's rows."""
        members, count = self.members[task], self.counts[task]
        start, chosen = self.epoch * count, []
        while len(chosen) < count:
            lap, offset = divmod(start + len(chosen), len(members))
            order = torch.randperm(len(members), generator=self._generator(task, lap))
            chosen += [members[i] for i in order[offset : offset + count - len(chosen)].tolist()]
        return chosen

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        mixed = (self.seed * 1_000_003 + zlib.crc32(purpose.encode())) * 1_000_003 + number
        return torch.Generator().manual_seed(mixed % 2**63)
