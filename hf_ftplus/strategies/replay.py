"""Replay: train on protect rows, too, at an exact share; what is rehearsed is kept.

    share s of rows:     an epoch has N learn rows and N s / (1 - s) protect rows
    share s of tokens:   as many protect rows as carry s of all supervised tokens, at the mean length of each task

Every learn row still comes once in an epoch: replay adds rows, and an epoch grows by s / (1 - s); with max_steps, steps
are counted as ever, and s of them goes to protect rows. Rows are spread evenly, so that every optimizer step holds its
share (`mixture.py`). One step costs what it costs without replay.

It is the best replicated remedy, and the cheapest (TRACE 2023: backward transfer +2.6 % where plain fine-tuning loses
8.3 %), with text that the model wrote itself nearly as good as real rows (Marek 2026). It keeps what is replayed, not
more: TRACE's rows of other tasks did not save GSM8K.

The default is one row in eight. On a four-task toy replay kept .60, .86, .93 and .98 of all tasks at 1, 5, 10 and 25 %,
plain .40; an eighth lies where the curve flattens, costs a seventh more steps, and divides the usual batch sizes, so
that each step of 8, 16, 32 rows holds exactly 1, 2, 4. Shares are of rows by default, as in those figures. The trainer
weighs every supervised token alike: where protect rows are much longer than learn rows, `unit=tokens` says what you
mean. The logged table has both. Of `messages` the assistant's turns are rehearsed, of prompt and completion the
completion, and nothing else (`examples.py`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from ..errors import DataError, UsageError
from ..hookspecs import hookimpl
from ..strategy import Run, Strategy, Task, setting

logger = logging.getLogger("hf_ftplus")

LITTLE = 0.01
"""Shares below this are said to suffice for large pre-trained models only (Scialom 2022, Béthune 2025)."""


@dataclass
class Replay(Strategy):
    """Replay: mix protect rows, the user's or self-written, into the training rows at an exact share."""

    name: ClassVar[str] = "replay"

    share: float = setting(
        0.125,
        "share of training that goes to protect rows; 0 trains plainly",
        unit="of all rows or tokens",
        low=0,
        high=0.9,
    )
    unit: str = setting(
        "rows", "what the share counts: training rows, or their supervised tokens", choices=("rows", "tokens")
    )
    divide: str = setting(
        "equal", "how protect tasks divide the share: alike, or by their size", choices=("equal", "size")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks: dict[str, Task] = {}

    def refuse(self, run: Run | None) -> None:
        """A share of tokens that a later strategy would change: it counts those of the rows mixed before."""
        if run is None or self.unit == "rows" or self.share == 0:
            return
        last = [strategy.name for strategy in run.strategies if strategy.overrides("mix")][-1]
        if last != self.name:
            raise UsageError(
                f"replay.unit is 'tokens', and {last} mixes the rows anew after replay has counted theirs. Give replay "
                f"last: --plugin {last} --plugin replay; or type --set replay.unit=rows."
            )

    def mix(self, run: Run, shares: dict[str, float]) -> dict[str, float]:
        """Take `share` off the top for the protect tasks; whatever else was mixed keeps its proportions."""
        first, self.tasks = not self.tasks, run.tasks
        protect = {name: task for name, task in run.tasks.items() if task.role == "protect"}
        if self.share == 0:
            return shares
        if not protect:
            raise DataError(
                "replay has nothing to replay: no protect data. Type --protect FILE, or --protect self:256 to let the "
                "starting model write it."
            )
        if first and self.share < LITTLE:
            logger.warning(
                "replay: a share of %g is little; evidence for less than 1 %% is of large models.", self.share
            )
        length = self._lengths(run.tasks)
        parts = {
            name: (task.rows or 0) * length[name] if self.divide == "size" else 1.0 for name, task in protect.items()
        }
        return rehearsed(shares, self.share, parts, length)

    def _lengths(self, tasks: dict[str, Task]) -> dict[str, float]:
        """What a row of each task weighs: 1, or its mean number of supervised tokens."""
        if self.unit == "rows":
            return dict.fromkeys(tasks, 1.0)
        for name, task in tasks.items():
            if task.tokens is None:
                raise UsageError(
                    f"replay.unit is 'tokens', but those of {name!r} cannot be counted (a stream, or rows without "
                    "labels). Type --set replay.unit=rows."
                )
        return {name: task.tokens / task.rows for name, task in tasks.items()}

    def preview(self, run: Run) -> dict[str, float]:
        """It holds nothing and computes nothing."""
        return {
            "bytes": 0,
            "rows": sum(task.rows or 0 for task in self.tasks.values() if task.role == "protect"),
            "seconds": 0,
        }

    def metrics(self) -> dict[str, float]:
        """share_of_rows and share_of_tokens: what protect rows take of an epoch (tokens: of the first)."""
        from ..mixture import realised

        protect = [name for name, task in self.tasks.items() if task.role == "protect"]
        found = {"share_of_rows": realised(self.tasks), "share_of_tokens": realised(self.tasks, tokens=True)}
        return {key: sum(shares[name] for name in protect) for key, shares in found.items() if shares}


def rehearsed(
    shares: dict[str, float], share: float, parts: dict[str, float], length: dict[str, float]
) -> dict[str, float]:
    """Shares of rows such that `share` of what rows weigh is the protect tasks', divided as `parts`.

    With w_t the length of a row of task t, p_t = (1 - s) shares_t / sum_u(shares_u w_u) + s parts_t / (sum parts w_t),
    normalised; for w = 1 that is (1 - s) shares_t + s parts_t / sum parts.

    Args:
        shares: of rows, before; sums to 1.
        share: s, of the weight of all rows.
        parts: what each protect task takes of it, in any unit.
        length: weight of a row of each task, such as its supervised tokens.
    """
    mean, whole = sum(shares[task] * length[task] for task in shares), sum(parts.values())
    found = {task: (1 - share) * shares[task] / mean for task in shares}
    for task, part in parts.items():
        found[task] += share * part / whole / length[task]
    total = sum(found.values())
    return {task: value / total for task, value in found.items()}


@hookimpl
def ftplus_strategies() -> list[type[Strategy]]:
    """The strategies of this module."""
    return [Replay]
