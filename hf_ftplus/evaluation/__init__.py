"""Measure what a run taught and what it cost: loss, accuracy, drift and each task's own metric, before and after.

tasks       what is measured: rows as tokens, and as questions to ask
scoring     one forward pass -> loss, accuracy and drift of every row
drift       KL to the starting model, without keeping it
metrics     choice by log-likelihood, exact match, F1, ROUGE-L
greedy      what the model answers
statistics  ratios with paired bootstrap intervals (pure functions)
verdict     lost, kept or not resolved: one word, by a fixed rule
results     what was found, and the retention gate
runner      Evaluation: before, after
"""

from ..metric import METRICS
from .greedy import with_answers
from .results import Completion, Kept, Level, TaskResult, retention_gate
from .runner import Evaluation
from .statistics import Estimate, Flips
from .tasks import EvalTask

__all__ = [
    "METRICS",
    "Completion",
    "Estimate",
    "EvalTask",
    "Evaluation",
    "Flips",
    "Kept",
    "Level",
    "TaskResult",
    "retention_gate",
    "with_answers",
]
