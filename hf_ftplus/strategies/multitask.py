"""Multi-task sampling: how much of training each learn task gets.

With e_t rows of task t, B rows that the run draws in all, and p_t the share of task t:

    proportional   p_t ~ e_t                              every row as often: plain shuffling
    equal          p_t ~ 1
    temperature    p_t ~ min(e_t, K)^(1/T)                T = 1 proportional, T -> inf equal (mT5; seqio caps first)
    cap            p_t ~ min(e_t, K)                      examples-proportional with limit K (T5, section 3.5.2)
    unimax         from the smallest task to the largest, U_t = min(B_left / tasks_left, N e_t); p_t ~ U_t
                                                          (UniMax, Chung 2023, algorithm 1: equal, at most N epochs)
    weights        p_t ~ what you say

Whatever the mode, `max_epochs` keeps any row from coming more often in the whole run, and gives the rest to the others.
An epoch is as long as without: as many rows as there are learn rows. Rows of a task are drawn without repetition until
all were seen, and tasks are spread evenly over the steps (`mixture.py`).

Learn tasks are the values of a column `task`, or the names of `SFTTrainer(train_dataset={"sums": rows, "chat": rows})`,
which also packs each task on its own. Give `multitask` before `replay`: replay then takes its share off the top.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import DataError, UsageError, nearest
from ..hookspecs import hookimpl
from ..strategy import Run, Strategy, Task, setting

logger = logging.getLogger("hf_ftplus")

MODES = ("temperature", "proportional", "equal", "cap", "unimax", "weights")
TEMPERATURE = 2.0
UNIMAX_EPOCHS = 4.0
"""Epochs over a task that UniMax allows when `max_epochs` says nothing."""


@dataclass
class MultiTask(Strategy):
    """Multi-task sampler: share training between several learn tasks."""

    name: ClassVar[str] = "multitask"
    judged: ClassVar[dict[str, Any]] = {"tasks": 2, "zero": {"mode": "proportional"}}

    mode: str | None = setting(
        None,
        "how shares follow from the tasks' sizes; left out: weights if there are any, else temperature",
        choices=MODES,
    )
    temperature: float | None = setting(
        None,
        f"of mode temperature: 1 is proportional, large is equal; left out: {TEMPERATURE:g}",
        unit="T of rows^(1/T)",
        above=0,
    )
    cap: int | None = setting(
        None, "rows that a task counts for at most, in modes cap and temperature", unit="rows", low=1
    )
    max_epochs: float | None = setting(
        None, "how often a row may come in the whole run; unimax takes 4 when left out", unit="epochs", above=0
    )
    weights: str = setting("", "fixed weights of all learn tasks, such as sums=2,chat=1; sets mode weights")

    def __post_init__(self) -> None:
        if isinstance(self.weights, dict):  # as YAML and Python say it
            self.weights = ",".join(f"{task}={weight}" for task, weight in self.weights.items())
        super().__post_init__()
        self.tasks: dict[str, Task] = {}
        self._given = parse(self.weights)
        if self._given and self.mode not in (None, "weights"):
            raise UsageError(
                f"multitask.weights is {self.weights!r} and multitask.mode {self.mode!r}; expected one of the two. "
                "Leave the mode out to use the weights."
            )
        self.mode = self.mode or ("weights" if self._given else "temperature")
        if self.mode == "weights" and not self._given:
            raise UsageError("multitask.mode is 'weights', but there are none. Type --set multitask.weights=a=2,b=1.")
        if self.mode == "cap" and self.cap is None:
            raise UsageError("multitask.mode is 'cap', but there is none. Type --set multitask.cap=3000.")
        for name, modes in (("temperature", ("temperature",)), ("cap", ("temperature", "cap"))):
            if getattr(self, name) is not None and self.mode not in modes:
                raise UsageError(
                    f"multitask.{name} is {getattr(self, name):g}, but does nothing in mode {self.mode!r}; expected "
                    f"mode {' or '.join(modes)}. Leave one of the two out."
                )

    def mix(self, run: Run, shares: dict[str, float]) -> dict[str, float]:
        """Share what the learn tasks have between them anew; protect tasks keep theirs."""
        self.tasks = run.tasks
        sizes = {name: task.rows for name, task in run.tasks.items() if task.role == "learn"}
        if len(sizes) == 1:
            raise DataError(
                f"multitask found one learn task, {next(iter(sizes))!r}; expected several. Give the learn data a "
                "column 'task' that names the task of each row; or, and with packing always, give the tasks by name: "
                "SFTTrainer(train_dataset={'sums': rows, 'chat': rows})."
            )
        total = sum(shares[task] for task in sizes)
        found = self._proportions(sizes, run.rows)
        return {task: total * found[task] if task in found else share for task, share in shares.items()}

    def _proportions(self, sizes: dict[str, int | None], budget: float) -> dict[str, float]:
        """Share of each learn task in the learn rows."""
        if self.mode == "weights":
            check_names(self._given, list(sizes))
        if any(size is None for size in sizes.values()):
            if self.mode not in ("equal", "weights") or self.max_epochs is not None:
                raise UsageError(
                    "multitask cannot count the rows of streams. Type --set multitask.mode=equal or "
                    "multitask.weights=a=2,b=1, without max_epochs."
                )
        elif self.max_epochs is not None and budget > self.max_epochs * sum(sizes.values()) * (1 + 1e-9):
            raise UsageError(
                f"multitask.max_epochs is {self.max_epochs:g}, but a run of {budget:g} rows is "
                f"{budget / sum(sizes.values()):.3g} epochs over all {sum(sizes.values())} rows there are. Raise it to "
                "that or more, or train for fewer steps."
            )
        if self.mode == "unimax":
            times = self.max_epochs or UNIMAX_EPOCHS
            found = unimax(sizes, budget, times)
            return limited(found, most_of(sizes, budget, times)) if budget <= times * sum(sizes.values()) else found
        found = {
            "proportional": lambda: tempered(sizes, 1.0),
            "equal": lambda: normalised(dict.fromkeys(sizes, 1.0)),
            "temperature": lambda: tempered(sizes, self.temperature or TEMPERATURE, self.cap),
            "cap": lambda: tempered(sizes, 1.0, self.cap),
            "weights": lambda: normalised({task: self._given[task] for task in sizes}),
        }[self.mode]()
        if self.max_epochs is None:
            return found
        return limited(found, most_of(sizes, budget, self.max_epochs))

    def metrics(self) -> dict[str, float]:
        """rows/TASK and tokens/TASK: what each task takes of an epoch (tokens: of the first)."""
        from ..mixture import realised

        rows, tokens = realised(self.tasks), realised(self.tasks, tokens=True)
        return {f"rows/{task}": share for task, share in rows.items()} | {
            f"tokens/{task}": share for task, share in tokens.items()
        }


def normalised(weights: dict[str, float]) -> dict[str, float]:
    """Weights as shares that sum to 1."""
    total = sum(weights.values())
    return {task: weight / total for task, weight in weights.items()}


def tempered(sizes: dict[str, int], temperature: float, cap: int | None = None) -> dict[str, float]:
    """p_t ~ min(e_t, K)^(1/T): T5's examples-proportional mixing with limit K, then temperature, as seqio does it."""
    return normalised({task: min(size, cap or size) ** (1 / temperature) for task, size in sizes.items()})


def unimax(sizes: dict[str, int], budget: float, epochs: float) -> dict[str, float]:
    """UniMax (Chung 2023, algorithm 1): what is left of the budget is shared alike, no task gets more than N epochs.

    A budget beyond N epochs over everything makes all tasks proportional, and each of them repeats alike.
    """
    given: dict[str, float] = {}
    for task in sorted(sizes, key=lambda task: (sizes[task], task)):
        alike = (budget - sum(given.values())) / (len(sizes) - len(given))
        given[task] = min(alike, epochs * sizes[task])
    return normalised({task: given[task] for task in sizes})


def most_of(sizes: dict[str, int], budget: float, times: float) -> dict[str, float]:
    """The largest share at which each row of a task comes at most so many times in the whole run: in whole rows an
    epoch, for an epoch has no parts of a row, and all of a run are alike."""
    rows = sum(sizes.values())
    return {task: math.floor(times * size * rows / budget + 1e-9) / rows for task, size in sizes.items()}


def limited(shares: dict[str, float], most: dict[str, float]) -> dict[str, float]:
    """Shares of which none exceeds its `most`; what one may not take goes to the others in proportion.

    Raises:
        UsageError: the tasks that have a share at all may not take everything between them.
    """
    able = sum(most[task] for task, share in shares.items() if share > 0)
    if able < 1 - 1e-9:
        raise UsageError(
            f"multitask.max_epochs lets the tasks with a weight above 0 take {able:.1%} of the run, which leaves rows "
            "for nobody. Raise max_epochs, give other tasks a weight, or train for fewer steps."
        )
    full: set[str] = set()
    found = dict(shares)
    while over := {task for task in shares if task not in full and found[task] > most[task] * (1 + 1e-12)}:
        full |= over
        rest = {task: share for task, share in shares.items() if task not in full and share > 0}
        free, wanted = max(0.0, 1 - sum(most[task] for task in full)), sum(rest.values())
        found = {task: most[task] if task in full else shares[task] * free / (wanted or 1) for task in shares}
    return normalised(found)


def parse(weights: str) -> dict[str, float]:
    """`a=2,b=1` as numbers by task; names may hold an equals sign.

    Raises:
        UsageError: an entry that is no NAME=NUMBER, a negative weight, a name given twice, or weights that sum to 0.
    """
    found: dict[str, float] = {}
    for entry in filter(None, map(str.strip, weights.split(","))):
        task, _, number = entry.rpartition("=")
        task = task.strip()
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not task or not 0 <= weight < math.inf or task in found:
            raise UsageError(
                f"multitask.weights holds {entry!r}; expected each learn task once, as NAME=WEIGHT with a number of 0 "
                "or more: sums=2,chat=1."
            )
        found[task] = weight
    if found and sum(found.values()) == 0:
        raise UsageError(f"multitask.weights is {weights!r}, which sums to 0; expected a weight above 0.")
    return found


def check_names(weights: dict[str, float], tasks: list[str]) -> None:
    """Every learn task has a weight, and every weight a learn task.

    Raises:
        UsageError: names the first that has not, with the nearest known name.
    """
    known = ", ".join(tasks)
    for task in weights:
        if task not in tasks:
            raise UsageError(f"multitask.weights: no learn task {task!r}.{nearest(task, tasks)} Learn tasks: {known}.")
    for task in tasks:
        if task not in weights:
            raise UsageError(f"multitask.weights leaves out {task!r}; to train without it, add {task}=0.")


@hookimpl
def ftplus_strategies() -> list[type[Strategy]]:
    """The strategies of this module."""
    return [MultiTask]
