"""Read when a run is to end before its time, from what the user typed; `stopping.py` then sees to it.

--stop-when learn-plateaus[:PATIENCE[:NATS]]    eval_loss has not fallen by more than NATS per token (absolute; 0)
                                                below its best in PATIENCE evaluations in a row (3)
--stop-when "retention-falls-below X"           a protect task keeps less than X of what the start could do
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import UsageError, nearest

PLATEAU, RETENTION = "learn-plateaus", "retention-falls-below"
CONDITIONS = (PLATEAU, RETENTION)


@dataclass(frozen=True)
class StopWhen:
    """The conditions of a run; None where one was not asked for."""

    patience: int | None = None
    """Evaluations in a row that may pass without a better eval_loss."""
    nats: float = 0.0
    """By how much, in nats per token, eval_loss must fall to be better."""
    retention: float | None = None


def read(texts: Iterable[str]) -> StopWhen:
    """Conditions as the user typed them: `learn-plateaus:3:0.01`, `retention-falls-below 0.95`.

    Raises:
        UsageError: an unknown condition, with the nearest known one; one without its number, out of range, or twice.
    """
    found: dict[str, Any] = {}
    given = set()
    for text in texts:
        name, *numbers = re.split(r"[\s:=]+", str(text).strip())
        if name not in CONDITIONS:
            raise UsageError(
                f"--stop-when {text!r}; expected {PLATEAU} or '{RETENTION} X'.{nearest(name, list(CONDITIONS))}"
            )
        if name in given:
            raise UsageError(f"--stop-when {name} is given twice; give it once.")
        given.add(name)
        found |= _plateau(text, numbers) if name == PLATEAU else _retention(text, numbers)
    return StopWhen(**found)


def _plateau(text: str, numbers: list[str]) -> dict[str, Any]:
    try:
        patience, nats = (*numbers, *("3", "0")[len(numbers) :])
        read = {"patience": int(patience), "nats": float(nats)}
    except ValueError:  # also too many of them
        read = {"patience": 0, "nats": 0.0}
    if read["patience"] < 1 or not 0 <= read["nats"] < math.inf:
        raise UsageError(
            f"--stop-when {text!r}; expected {PLATEAU}[:PATIENCE[:NATS]] with a PATIENCE of 1 evaluation or more and "
            f"NATS per token of 0 or more, such as {PLATEAU}:3."
        )
    return read


def _retention(text: str, numbers: list[str]) -> dict[str, Any]:
    try:
        [share] = map(float, numbers)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UsageError(f"--stop-when {text!r}; expected a share above 0 and up to 1: --stop-when '{RETENTION} 0.95'.")
    return {"retention": share}
