"""Which protect rows stand beside which learn rows, by a rule that knows only seed, step and place.

A loss on protect tokens reads `share` of a protect row for each learn row. Drawn by the place of the learn row among
all rows of the optimizer step, these are the same at any split of the step into micro-batches and processes, and after
a resume; but where rows are packed, so that processes hold different numbers of them at a time: places are then guessed
from a process's own, and two of them may draw alike.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .answers import examples_in
from .errors import DataError
from .examples import Example, collate, sent, supervised_in
from .formats import IGNORED


@dataclass
class Examples:
    """The examples of one protect task that have a token to compare at."""

    name: str
    examples: list[Example]
    tokens: float
    """Supervised tokens of a mean example."""

    @classmethod
    def of(cls, name: str, batches: list[dict[str, Tensor]]) -> Examples:
        examples = [example for batch in batches for example in examples_in(batch) if supervised_in(example)]
        if not examples:
            raise DataError(
                f"The protect task {name!r} has no supervised token; expected completions that survive truncation."
            )
        return cls(name, examples, sum(map(supervised_in, examples)) / len(examples))


def beside(
    seed: int, step: int, places: range, share: float, tasks: list[Examples]
) -> list[tuple[int, Example, float]]:
    """Protect rows that stand beside the learn rows at `places` of an optimizer step.

    `share` of a row for each learn row, evenly spread, so that a step of R rows has share * R of them to within one.

    Returns:
        (learn row, counted from the first of `places`; protect example; tokens of a mean example of its task).
    """
    phase = random.Random(f"{seed} {step}").random()
    drawn = []
    for row, place in enumerate(places):
        for number in range(math.floor(place * share + phase), math.floor((place + 1) * share + phase)):
            dice = random.Random(f"{seed} {step} {number}")
            task = dice.choice(tasks)
            drawn.append((row, dice.choice(task.examples), task.tokens))
    return drawn


def tokens_of_rows(inputs: dict[str, Any]) -> Tensor:
    """Supervised tokens of each learn row of a micro-batch: [rows].

    Padding-free rows lie behind one another in one and are told apart where positions start again; how many there are
    is then only known once the device has said so.
    """
    labels, positions = inputs["labels"], inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None:
        return (labels[:, 1:] != IGNORED).sum(1)
    positions = positions.expand_as(labels).flatten()
    # behind the last token that is not the first of its row there is only padding, of position 0
    within = (positions > 0).flip(0).cumsum(0).flip(0) > 0
    starts = (positions == 0) & within
    owner = starts.cumsum(0) - 1
    predicted = (labels.flatten() != IGNORED) & ~starts
    return torch.zeros(int(owner[-1]) + 1, dtype=torch.long, device=labels.device).index_add_(
        0, owner, predicted.long()
    )


def collated(examples: list[Example], device: torch.device) -> dict[str, Tensor]:
    """One micro-batch of examples, on its way to `device`."""
    (batch,) = collate(examples, 0, len(examples))
    return {key: sent(tensor, device) for key, tensor in batch.items()}


def one_seed(*numbers: int) -> int:
    """A seed out of several numbers."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(63)
