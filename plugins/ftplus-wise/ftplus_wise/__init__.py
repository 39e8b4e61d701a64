"""End on an average of weights: of the last steps, and between start and result as far back as learning allows.

    average <- decay * average + (1 - decay) * weights           after every step (decay grows from 0: warm-up)
    result   = start + alpha (average - start)                   alpha in 0, 0.1, ..., 1

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT, arXiv:2109.01903): on the line from the start
to the result, what was known comes back faster than what was learnt goes. Both are measured at every alpha, and the one
that loses least on protect is taken, among those that keep at least `keep` of what was learnt.

A LoRA that began at zero is moved along the same line by scaling B, since its change of a weight is scale * B A.

`ftplus repair` (command.py) does the same to models that are trained already.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_ftplus import Run, Strategy, hookimpl, place, setting
from hf_ftplus.errors import DataError, IncompatibleError

if TYPE_CHECKING:
    from torch import Tensor

    from .curve import Point

ftplus_api = 1
logger = logging.getLogger("hf_ftplus")


@dataclass
class Wise(Strategy):
    """Weight averaging: end on an average of the last steps, and as far back toward the start as learning allows."""

    name: ClassVar[str] = "wise"
    judged: ClassVar[dict] = {"from_start": False, "zero": {"decay": 0.0, "keep": 1.0}, "finish": "moves"}

    decay: float = setting(
        0.98, "share of the average that stays at each step; 0 takes the last weights as they are", low=0, high=1
    )
    keep: float = setting(
        0.95,
        "share of what was learnt that must be left when weights go back toward the start; 1: they do not",
        low=0,
        high=1,
    )
    points: int = setting(10, "steps of the line from start to result that are measured", unit="points", low=1)
    rows: int = setting(64, "rows of the learn data, and of each protect task, to measure them on", unit="rows", low=1)

    def refuse(self, run: Run | None) -> None:
        """Nothing to measure what is kept on, and adapters with a past."""
        if run is None or self._off:
            return
        if self.keep < 1 and not run.protect:
            raise DataError(
                "wise goes back toward the start as far as protect data asks for it, and there is none. Type --protect "
                "FILE or --protect self:64, or --set wise.keep=1 to only average the last steps."
            )
        if self.keep < 1:
            _adapters(run)

    def preview(self, run: Run) -> dict[str, float]:
        """Bytes of the start and of the average."""
        copies = (self.decay > 0) + (self.keep < 1)
        return {"bytes": 4.0 * copies * sum(weight.numel() for weight in run.weights.values())}

    def prepare(self, run: Run) -> None:
        self._begin(run)
        before = [it.name for it in run.strategies[: _place(run, self)] if it.overrides("finish")]
        if before and not self._off:
            logger.warning(
                "wise moves the weights after the last step, and %s remembers them before that: what it leaves will "
                "not fit the result. Give wise first: --plugin wise --plugin %s.",
                before[0],
                before[0],
            )
        if self.keep < 1:
            self._start = {name: weight.detach().clone() for name, weight in run.weights.items()}
        if self.decay > 0:
            self._average = {name: weight.detach().float().clone() for name, weight in run.weights.items()}

    def after_step(self, run: Run) -> None:
        from hf_ftplus.weights import local

        decay = min(self.decay, (1 + run.step) / (10 + run.step))
        for name, average in self._average.items():
            local(average).lerp_(local(run.weights[name]).float(), 1 - decay)

    def finish(self, run: Run) -> None:
        """Put the average in place, measure the line from the start to it, and stay at the chosen point."""
        import torch

        from hf_ftplus.weights import ranks

        from .curve import choose, table

        with torch.no_grad():
            for name, average in self._average.items():
                run.weights[name].copy_(average)
            if self.keep == 1:
                return
            ended = {name: weight.detach().clone() for name, weight in run.weights.items()}
            self.points_measured = [
                self._measured(run, ended, step / self.points) for step in range(self.points, -1, -1)
            ]
            chosen = choose(self.points_measured, self.keep)
            self._stand(run, ended, chosen.alpha)
        logger.info("wise:\n%s", table(self.points_measured, chosen))
        if run.memory.write and ranks()[0] == 0:
            run.memory.write.parent.mkdir(parents=True, exist_ok=True)
            file = run.memory.write.parent / "wise.json"
            file.write_text(
                json.dumps({"chosen": chosen.alpha, "points": [vars(it) for it in self.points_measured]}, indent=1)
            )

    def state_dict(self) -> dict[str, Tensor]:
        parts = {"start": self._start, "average": self._average}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor], run: Run) -> None:
        from hf_ftplus.weights import match

        self._begin(run)
        for part, wanted, held in (("start", self.keep < 1, self._start), ("average", self.decay > 0, self._average)):
            names = {name.partition(".")[2] for name in state if name.startswith(f"{part}.")}
            if wanted:
                match(run.weights, names, f"The {part} of wise")
                held.update({name: place(state[f"{part}.{name}"], run.weights[name]) for name in names})

    @property
    def _off(self) -> bool:
        return self.keep == 1 and self.decay == 0

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _begin(self, run: Run) -> None:
        self.refuse(run)
        self._start: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}
        if self.keep < 1 and not len(run.learn(1)):
            raise IncompatibleError(
                "wise asks how much was learnt, but the training rows are no tokens and labels that can be read again "
                "(a stream, DPO). Type --set wise.keep=1 to only average the last steps."
            )

    def _stand(self, run: Run, ended: dict[str, Tensor], alpha: float) -> None:
        """Put the weights at `alpha` of the way from the start."""
        adapters = _adapters(run)
        scaled = {id(adapter.B) for adapter in adapters.values()}
        still = {id(adapter.A) for adapter in adapters.values()}
        for name, weight in run.weights.items():
            if alpha == 1 or id(weight) in still:
                weight.copy_(ended[name])
            elif id(weight) in scaled:
                weight.copy_(alpha * ended[name])
            else:
                weight.copy_(self._start[name].float().lerp(ended[name].float(), alpha))

    def _measured(self, run: Run, ended: dict[str, Tensor], alpha: float) -> Point:
        from .curve import Point, loss

        self._stand(run, ended, alpha)
        learn = run.learn(self.rows)
        protect = {task: loss(run, batches, self.rows) for task, batches in run.protect.items()}
        return Point(alpha, loss(run, learn, self.rows), protect)


def _place(run: Run, strategy: Strategy) -> int:
    return next((i for i, it in enumerate(run.strategies) if it is strategy), 0)


def _adapters(run: Run) -> dict:
    """The LoRA targets, each of which began at zero.

    Raises:
        IncompatibleError: an adapter that is moved otherwise than by scaling B.
    """
    from hf_ftplus.weights import split

    _, adapters = split(run.model)
    if run.step == 0:
        begun = [name for name, adapter in adapters.items() if adapter.B.detach().any()]
        if begun:
            raise IncompatibleError(
                f"wise scales an adapter back toward no change at all, but {begun[0]} was trained before. Merge it "
                "(ftplus merge) and begin a fresh one, or type --set wise.keep=1."
            )
    return adapters


@hookimpl
def ftplus_strategies() -> list[type[Strategy]]:
    return [Wise]
