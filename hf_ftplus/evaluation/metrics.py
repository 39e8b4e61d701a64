"""Score a task in its own terms: the right one of several answers, or the right answer written out.

Each gives a number from 0 to 1 per row (`metric.METRICS` says which grade). None looks for a substring, and an empty
answer scores 0, also where nothing was expected.
"""

from __future__ import annotations

import math
import unicodedata
from collections import deque
from contextlib import nullcontext

import numpy as np
import regex
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..examples import tokenize
from ..logits import positions
from ..metric import Metric
from .found import warn_of_cut
from .scoring import Autocast, score
from .tasks import EvalTask, answered, expected

SECONDS = 1.0
"""A pattern that takes longer over one answer, as `(a+)+b` may take for ever, has found nothing in it."""


def likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: EvalTask,
    batch_size: int,
    autocast: Autocast = nullcontext,
) -> list[list[float]]:
    """The log-likelihood, in nats, of each choice as the answer to its row's question.

    The log-probabilities of a choice's tokens, its end of turn among them, are summed and not divided by their number:
    that is the probability that the model gives this very answer, and since the end counts, a choice that begins
    another one has no head start. Choices are never truncated, but questions that leave them no positions are.
    """
    rows = [(i, answered(row, option)) for i, row in enumerate(task.rows) for option in row["choices"]]
    examples = tokenize([row for _, row in rows], tokenizer, None, f"{task.name} (choices)").examples
    room, label = positions(model), f"{task.name}: choices"
    warn_of_cut([len(example["input_ids"]) for example in examples], room, label)
    examples = [{key: ids[-room:] for key, ids in example.items()} for example in examples]
    scored = score(model, examples, batch_size, autocast=autocast, label=label)
    found: list[list[float]] = [[] for _ in task.rows]
    for (i, _), nll in zip(rows, scored.nll.tolist(), strict=True):
        found[i].append(-nll)
    return found


def picked(task: EvalTask, found: list[list[float]]) -> list[str | None]:
    """The likeliest choice of each row; None where a likelihood is not finite, or several choices are the likeliest, as
    to a model to which all tokens are alike."""
    return [_likeliest(row["choices"], each) for row, each in zip(task.rows, found, strict=True)]


def _likeliest(choices: list[str], found: list[float]) -> str | None:
    if not all(map(math.isfinite, found)) or found.count(max(found)) > 1:
        return None
    return choices[found.index(max(found))]


def right(picks: list[str | None], task: EvalTask) -> NDArray:
    """1 where what was picked is the right choice."""
    return np.array([pick == expected(row) for pick, row in zip(picks, task.rows, strict=True)], float)


def written(answers: list[str], task: EvalTask) -> tuple[NDArray, int]:
    """The score of each written answer, and in how many of them the metric's pattern found nothing."""
    pairs = zip(answers, task.rows, strict=True)
    found = [graded(answer, expected(row), task.scored_by) for answer, row in pairs]
    return np.array([score or 0.0 for score in found]), found.count(None)


def graded(answer: str, wanted: str, metric: Metric) -> float | None:
    """The score of one written answer, from 0 to 1; None where the metric's pattern finds nothing in it.

    The pattern reads the expected answer as well, where it matches there: a reference may end in "the answer is 42".
    """
    said, part = extracted(answer, metric.pattern), extracted(wanted, metric.pattern)
    return None if said is None else float(SCORES[metric.name](said, wanted if part is None else part))


def extracted(text: str, pattern: str) -> str | None:
    """What the first group of `pattern` holds where it matches last; None where it does not. No pattern: the text."""
    if not pattern:
        return text
    try:
        last = deque(regex.finditer(pattern, text, timeout=SECONDS), maxlen=1)
    except TimeoutError:
        return None
    return last[0].group(1) if last else None


def matches(answer: str, wanted: str) -> bool:
    """Whether two texts are the same answer. An empty one is never right, whatever was expected."""
    answer = normalise(answer)
    return bool(answer) and answer == normalise(wanted)


def f1(answer: str, wanted: str) -> float:
    """2 PR / (P + R) over words in common, as SQuAD counts them: no case, no ASCII punctuation, no a, an, the."""
    from torchmetrics.functional.text import squad

    def score(reference: str) -> float:
        said = {"prediction_text": answer, "id": ""}
        return float(squad(said, {"answers": {"text": [reference]}, "id": ""})["f1"]) / 100

    return 0.0 if score("") else score(wanted)  # SQuAD credits nothing said where nothing was expected


def rouge(answer: str, wanted: str) -> float:
    """2 PR / (P + R) over the longest common sequence of words (ROUGE-L); no case, no punctuation, no stemming."""
    from torchmetrics.functional.text import rouge_score

    found = rouge_score(answer, wanted, rouge_keys="rougeL", normalizer=_letters, tokenizer=_words)
    return float(found["rougeL_fmeasure"])


def _letters(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def _words(text: str) -> list[str]:
    """ROUGE's own words for English; its [a-z0-9] would tear others apart, and find none in Greek."""
    return regex.findall(r"[^\W_]+", text)


SCORES = {"exact_match": matches, "f1": f1, "rouge": rouge}
"""Metrics of a written answer: (answer, expected) -> 0 to 1."""


def normalise(text: str) -> str:
    """Letter case, runs of white space, Unicode spelling and punctuation at the end do not make an answer wrong."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .,;:!?\u2026")
