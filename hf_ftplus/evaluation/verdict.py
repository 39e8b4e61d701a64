"""Say in one word what became of a task, by a rule that was fixed before anybody looked.

Compared are two models on the same rows: score after - score before, with its 95 % interval over rows.

    not measured    there is no difference: a figure is missing, or not finite
    lost, gained    the interval leaves out 0, and the difference is larger than the noise floor
    kept            the interval lies within the margin around 0, and so does the noise floor
    not resolved    none of these: too few rows to tell

The noise floor is what the first model differs from itself by when it reads the same rows in other batches, whose
rounding is another one: the far end of the interval of that difference. Under 8 rows nothing is called. `kept` takes as
many as leave room within the margin for a flip that was not seen (54 rows at a margin of 0.05: that none of ten flipped
says little about the eleventh), and a first model whose score is above the margin: else there is nothing to keep.

Two equal models, of which either might have scored what the other did, are called `lost` in at most 2.5 % of
comparisons, and `gained` in as many; models that are equal in the mean alone, of graded scores that rarely fall far and
often rise a little, more often. Each verdict stands alone: nothing is corrected for how many tasks and models are
compared.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from .statistics import Estimate, Z

Verdict = Literal["kept", "lost", "gained", "not resolved", "not measured"]
MARGIN = 0.05
"""Of a score from 0 to 1: five points."""
FEWEST = 8


def verdict(before: Estimate, change: Estimate, floor: float | None, rows: int, margin: float = MARGIN) -> Verdict:
    """The word for a change of score.

    Args:
        before: the score of the first model, from 0 to 1.
        change: after - before, higher is better.
        floor: what the score of one model differs from itself by; None if that was not measured.
        rows: compared.
        margin: a change that nobody would mind.
    """
    if None in (before.value, change.value, floor):
        return "not measured"
    if change.low is None or rows < FEWEST:
        return "not resolved"
    if abs(change.value) > floor and (change.high < 0 or change.low > 0):
        return "lost" if change.high < 0 else "gained"
    inside = max(-change.low, change.high, floor) <= margin
    return "kept" if inside and before.value > margin and rows >= rows_to_keep(margin) else "not resolved"


def rows_to_keep(margin: float = MARGIN) -> int:
    """Rows from which none that flipped is an interval (`statistics.change_of_share`) within the margin."""
    return int(np.ceil(Z * np.sqrt(2) / margin)) - 2


def noise_floor(again: Estimate) -> float | None:
    """The most that a model may differ from itself by, from the interval of what it did."""
    if again.value is None:
        return None
    return max(abs(end) for end in (again.value, again.low, again.high) if end is not None)
