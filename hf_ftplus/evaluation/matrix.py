"""What a sequence of stages did to every task, from the matrix R of scores after each stage.

R[i, j] is the score on task j (learnt in stage j) after stage i: T + 1 rows for T tasks, row 0 before the first stage.
Below, tasks and stages count from 1 as in the papers, so that R[j, j] is task j right after it was learnt; in the
arrays task j is column j - 1. Every figure is in the unit of R, is a mean over tasks, and is None ("not measured",
never 0) where it is undefined (T = 1) or needs an entry that is NaN.

Scores are better when higher. The same functions read a matrix of losses, where the signs turn: a positive BWT is then
forgetting, in nats per token, and a negative FWT is help; `forgetting` wants the losses negated, since it looks for
the best.

    ACC         accuracy               how good the last model is on all tasks
    BWT         backward_transfer      what later stages did to a task since it was learnt; negative is forgetting
    FWT         forward_transfer       what earlier stages did for a task before it was learnt
    forgetting  forgetting             what was lost since a task stood best
    LA          learning_accuracy      how well each stage learnt its own task

None of them says much alone: a model that learns nothing has a BWT of 0. Read BWT beside LA.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def accuracy(R: ArrayLike) -> float | None:
    """ACC = 1/T sum_j R[T, j]  (Lopez-Paz & Ranzato 2017, eq. 2)."""
    return _mean(_square(R)[-1])


def backward_transfer(R: ArrayLike) -> float | None:
    """BWT = 1/(T-1) sum_{j<T} (R[T, j] - R[j, j])  (Lopez-Paz & Ranzato 2017, eq. 3).

    The mean is over the T - 1 tasks that have a later stage, as in the paper's formula; the paper's code divides by T.
    """
    R = _square(R)
    return _mean((R[-1] - _learnt(R))[:-1])


def forward_transfer(R: ArrayLike) -> float | None:
    """FWT = 1/(T-1) sum_{j>1} (R[j-1, j] - R[0, j])  (Lopez-Paz & Ranzato 2017, eq. 4).

    The paper compares with a model of random weights; here it is the model before the first stage, which knows things.
    """
    R = _square(R)
    return _mean(np.diagonal(R, offset=0)[1:] - R[0, 1:])


def forgetting(R: ArrayLike) -> float | None:
    """F = 1/(T-1) sum_{j<T} (max_{1<=i<T} R[i, j] - R[T, j])  (Chaudhry 2018, eq. 3).

    The best is looked for after every stage but the last, before the task was learnt too; never before the first stage.
    Negative where the last stage made earlier tasks better than they ever were.
    """
    R = _square(R)
    best = R[1:-1, :-1].max(axis=0) if len(R) > 2 else R[0, :0]  # NaN if any entry is: what was not seen may be best
    return _mean(best - R[-1, :-1])


def learning_accuracy(R: ArrayLike) -> float | None:
    """LA = 1/T sum_j R[j, j]  (Riemer 2019)."""
    return _mean(_learnt(_square(R)))


def summary(R: ArrayLike, losses: bool = False) -> dict[str, float | None]:
    """All five, by the names in which the field knows them.

    Args:
        R: [T + 1, T]; None and NaN are "not measured".
        losses: R is in nats per token and better when lower; forgetting is then the rise over the lowest loss.
    """
    R = _square(R)
    return {
        "ACC": accuracy(R),
        "BWT": backward_transfer(R),
        "FWT": forward_transfer(R),
        "forgetting": forgetting(-R if losses else R),
        "LA": learning_accuracy(R),
    }


def _square(R: ArrayLike) -> NDArray:
    """R in float64, None as NaN.

    Raises:
        ValueError: not one row more than columns.
    """
    R = np.asarray(R, dtype=np.float64)
    if R.ndim != 2 or R.shape[0] != R.shape[1] + 1 or not R.shape[1]:
        raise ValueError(
            f"R has the shape {list(R.shape)}; expected [T + 1, T]: a row before the first stage, then one a stage."
        )
    return R


def _learnt(R: NDArray) -> NDArray:
    """R[j, j]: each task after its own stage."""
    return np.diagonal(R, offset=-1)


def _mean(values: NDArray) -> float | None:
    found = float(values.mean()) if values.size else np.nan
    return found if np.isfinite(found) else None
