"""Keep what one model did on one task, whole or not at all, as soon as it is there.

A cell is a JSON file: sums of every row, its score and its answer. No weights, no hidden states.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import disk
from ..evaluation.runner import Moment
from ..evaluation.scoring import Scores
from ..report.record import strict


@dataclass(frozen=True)
class Cells:
    """A folder of them, each under the digest of what it comes from."""

    folder: Path

    def get(self, key: str) -> Any:
        """What was kept, or None; half a file, or one of somebody else, was never kept."""
        try:
            return disk.read_json(self._file(key))
        except (OSError, ValueError):
            return None

    def put(self, key: str, value: Any) -> None:
        text = json.dumps(strict(value), ensure_ascii=False, allow_nan=False)
        with disk.attempt(self._file(key), "another --cache"):
            disk.write(self._file(key), text)

    def moment(self, key: str) -> Moment | None:
        found = self.get(key)
        try:
            return None if found is None else read(found)
        except (KeyError, TypeError, ValueError):
            return None

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def written(moment: Moment) -> dict[str, Any]:
    """A moment as plain values; what is not finite becomes None."""
    scores = moment.scores
    return {
        "nll": scores.nll,
        "tokens": scores.tokens,
        "correct": scores.correct,
        "kl": scores.kl,
        "score": moment.metric,
        "answers": moment.said,
        "likelihoods": moment.likelihoods,
        "unread": moment.unread,
        "seconds": moment.seconds,
    }


def read(found: dict[str, Any]) -> Moment:
    """The inverse; None becomes NaN again."""
    answers, likelihoods, seconds, unread = (found[key] for key in ("answers", "likelihoods", "seconds", "unread"))
    tokens, correct = (np.array(found[name], np.int64) for name in ("tokens", "correct"))
    nll, kl, score = (None if found[name] is None else np.array(found[name], float) for name in ("nll", "kl", "score"))
    for column in (nll, correct, kl, score, answers, likelihoods):
        if column is not None and len(column) != len(tokens):
            raise ValueError(f"{len(column)} values for {len(tokens)} rows")
    scores = Scores(nll, tokens, correct, kl)
    return Moment(scores, score, unread, said=answers, likelihoods=likelihoods, seconds=seconds)
