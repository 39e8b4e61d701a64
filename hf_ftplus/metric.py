"""What a task can be scored by beside its loss: the one table of metrics, light enough to be read before torch is.

    choice         the right one of the row's `choices` is the likeliest answer                1 or 0
    exact_match    the answer that the model writes is the expected one; also called exact     1 or 0
    f1             words that the two have in common, as SQuAD counts them                     0 to 1
    rouge          their longest common sequence of words: ROUGE-L, F-measure                  0 to 1

After a metric of written answers may stand a pattern: with `exact_match:answer is (.+)` the answer is what its first
group holds where it matches last. `evaluation/metrics.py` computes what is named here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

from .errors import UsageError, nearest


@dataclass(frozen=True)
class Metric:
    """One way to score a row between 0 and 1."""

    name: str
    written: bool = True
    """Whether the model must write its answer for it."""
    graded: bool = False
    """Whether a row may be partly right: it then is never simply right or wrong."""
    package: str = ""
    """What must be installed, from the extra `metrics`."""
    pattern: str = ""
    """A regular expression that finds the answer in what the model writes; empty: the answer is all of it."""


METRICS = {
    metric.name: metric
    for metric in (
        Metric("choice", written=False),
        Metric("exact_match"),
        Metric("f1", graded=True, package="torchmetrics"),
        Metric("rouge", graded=True, package="torchmetrics"),
    )
}


ALIASES = {"exact": "exact_match"}


def parse(text: str, found: str) -> Metric:
    """The metric that `NAME` or `NAME:PATTERN` asks for.

    Args:
        text: what the user gave.
        found: how the message of an error begins, such as `--metric 'quiz=f2'`.

    Raises:
        UsageError: an unknown name, with the nearest known one; a package that is not installed; a pattern that is
            none, holds no group, or stands after a metric that reads no answers.
    """
    name, colon, pattern = str(text).partition(":")
    name = ALIASES.get(name, name)
    if name not in METRICS:
        raise UsageError(f"{found}; expected one of {', '.join(METRICS)}.{nearest(name, list(METRICS))}")
    metric = METRICS[name]
    if metric.package and find_spec(metric.package) is None:
        raise UsageError(f"{found}; {name} needs {metric.package}. Type: pip install 'hf-ftplus[metrics]'")
    if not colon:
        return metric
    if not metric.written:
        raise UsageError(f"{found}; {name} takes no pattern, for the model writes no answer. Type {name} alone.")
    _check(pattern, name, found)
    return replace(metric, pattern=pattern)


def _check(pattern: str, name: str, found: str) -> None:
    import regex

    example = f"Type, for one, '{name}:answer is (.+)'."
    try:
        groups = regex.compile(pattern).groups
    except regex.error as error:
        raise UsageError(f"{found}; {pattern!r} is no regular expression: {error}. {example}") from None
    if not groups:
        raise UsageError(f"{found}; {pattern!r} has no group (...) to say which part is the answer. {example}")
