"""Score a task in its own terms: the right one of several answers, or the right answer written out.

Both give 1 or 0 per row. Neither looks for a substring, and an empty answer is never right.
"""

from __future__ import annotations

import math
import unicodedata
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..examples import tokenize
from .scoring import Autocast, score
from .tasks import EvalTask, answered, expected


def choice(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: EvalTask,
    batch_size: int,
    autocast: Autocast = nullcontext,
) -> NDArray:
    """1 where the right choice has the highest log-likelihood as the answer to the row's question.

    The log-probabilities of a choice's tokens, its end of turn among them, are summed and not divided by their number:
    that is the probability that the model gives this very answer, and since the end counts, a choice that begins
    another one has no head start. Choices are never truncated.
    """
    rows = [(i, answered(row, option)) for i, row in enumerate(task.rows) for option in row["choices"]]
    examples = tokenize([row for _, row in rows], tokenizer, None, f"{task.name} (choices)").examples
    found = score(model, examples, batch_size, autocast=autocast, label=f"{task.name}: choices")
    likelihoods: list[list[float]] = [[] for _ in task.rows]
    for (i, _), nll in zip(rows, found.nll.tolist(), strict=True):
        likelihoods[i].append(-nll)
    return np.array([_right(row, found) for row, found in zip(task.rows, likelihoods, strict=True)], float)


def _right(row: dict, likelihoods: list[float]) -> bool:
    if not all(map(math.isfinite, likelihoods)):
        return False
    best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    return row["choices"][best] == expected(row)


def exact_match(answers: list[str], task: EvalTask) -> NDArray:
    """1 where the answer is the expected one, after `normalise`."""
    pairs = zip(answers, task.rows, strict=True)
    return np.array([matches(answer, expected(row)) for answer, row in pairs], float)


def matches(answer: str, wanted: str) -> bool:
    """Whether two texts are the same answer. An empty one is never right, whatever was expected."""
    answer = normalise(answer)
    return bool(answer) and answer == normalise(wanted)


def normalise(text: str) -> str:
    """Letter case, runs of white space, Unicode spelling and punctuation at the end do not make an answer wrong."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .,;:!?\u2026")
