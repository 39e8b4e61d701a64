"""EWC: hold each weight in proportion to how much the protected behaviour depends on it.

    penalty = 1/2 * strength * sum_i F_i (w_i - w*_i)^2          (Kirkpatrick 2017, eq. 3; online: Schwarz 2018, eq. 9)

F is the Fisher information per supervised token at the starting weights w* (`fisher.py`), so that penalty / strength
is, to second order, the drift KL(start || now) in nats per protect token that weights would make which moved each on
its own: at random. Training moves them together, along directions that the diagonal does not see, and the drift is a
multiple of that. The gradient strength * F * (w - w*) is added once per optimizer step, in closed form, after
accumulation, reduction and (but under DeepSpeed) clipping: no autograd graph over the weights, and the same strength at
any batch layout.

LoRA moves a weight through scale * B A, so the penalty is on that change, never on A and B, whose split is arbitrary
and whose Fisher is zero on a fresh adapter (`quadratic.py`).

Across runs (`--memory`) the importances add up: F <- decay * F of the memory + F of this run's protect data. What was
remembered of whole weights serves an adapter, too.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import DataError, IncompatibleError
from ..formats import IGNORED
from ..hookspecs import hookimpl
from ..strategy import Run, Strategy, setting

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("hf_ftplus")

FULL, LORA = 10_000.0, 1_000.0
"""Strengths if none is given, from the demo's facts in 60 steps (examples/benchmarks). Unclipped, full fine-tuning
learns 94 % at 30,000 and loses 0.09 nats where plain loses 1.17; LoRA learns 85 % at 1,000 and loses 0.19 (plain 1.25),
47 % at 10,000, 5 % at 30,000. Clipping to 1 makes any of them act ten times as hard."""


@dataclass
class EWC(Strategy):
    """Elastic weight consolidation: hold each weight as firmly as the protect data depends on it."""

    name: ClassVar[str] = "ewc"

    strength: float | None = setting(
        None,
        f"what a nat of drift on protect, as the diagonal sees it, costs, in nats of learn loss; left out: {FULL:g} in "
        f"full fine-tuning, {LORA:g} with LoRA",
        unit="nats per nat",
        low=0,
    )
    fisher: str = setting("sign", "how importances are estimated", choices=("sign", "sampled", "empirical"))
    rows: int = setting(
        256, "protect rows per task to estimate importances on; more is steadier and slower", unit="rows", low=1
    )
    decay: float = setting(1.0, "share of the importances in --memory that still counts in this run", low=0, high=1)
    remember: bool = setting(True, "leave the next run the importances of what this run learnt, too (one more pass)")
    first: bool = setting(
        False, "the first of several runs: where there is nothing to protect yet, only remember what this run learns"
    )

    def refuse(self, run: Run | None) -> None:
        """Nothing to protect, and adapters whose change of a weight is not scale * B A."""
        from ..refusals import refuse_encoder_decoder
        from ..weights import split

        if run is None:
            return
        split(run.model)
        refuse_encoder_decoder(run.model, [self.name])
        if not (run.protect or run.memory.read or (self.first and self.remember)):
            raise DataError(
                "ewc has nothing to protect: no protect data and no memory of an earlier run. Type --protect FILE, or "
                "--protect self:256 to let the starting model write it; or, in the first of several runs, --set "
                "ewc.first=true to only remember what it learns."
            )

    def _usual_strength(self, lora: bool, protects: bool) -> float:
        return self.strength if self.strength is not None else LORA if lora else FULL

    def preview(self, run: Run) -> dict[str, float]:
        """Bytes of state, protect rows used, and seconds of the Fisher pass (extrapolated from a micro-batch)."""
        from ..batches import first_rows
        from ..quadratic import state_bytes
        from ..weights import ranks

        self._bind(run)
        batches = [batch for task in run.protect.values() for batch in first_rows(task, self.rows)]
        begin = time.perf_counter()
        if batches:
            self._importance(run, {"preview": batches[:1]})
        world = 1 if self.fisher == "empirical" else ranks()[1]  # which shares out the rows of each micro-batch
        seconds = (time.perf_counter() - begin) * -(-len(batches) // world)
        return {"bytes": state_bytes(self.plain, self.adapters), "rows": _rows(batches), "seconds": seconds}

    def prepare(self, run: Run) -> None:
        """Note the starting weights and estimate how much the protect data depends on each."""
        from ..quadratic import fitted, no_importance, placed, starting
        from ..weights import warn_of_16_bits

        self.refuse(run)
        self._bind(run)
        memory = run.memory.load(self.name, run)
        if not run.protect and memory is None:
            logger.info("ewc: nothing to protect yet; what this run learns is remembered for the next")
            memory = no_importance(self.plain, self.adapters)
        if self.remember and run.memory.write:
            self._check_learnt(run.learn(self.rows))
        memory = fitted(memory or {}, self.plain, self.adapters, run.model)
        importance = memory if self.decay == 1 else {name: self.decay * tensor for name, tensor in memory.items()}
        importance = placed(importance, self.plain, self.adapters, "diagonal.")
        if run.protect:
            from ..batches import first_rows

            tasks = {task: first_rows(batches, self.rows) for task, batches in run.protect.items()}
            logger.info("ewc: Fisher of %d protect rows", sum(map(_rows, tasks.values())))
            importance = _added(importance, self._importance(run, tasks))
        warn_of_16_bits(run.weights, "ewc", "a pull that is small beside its gradient is rounded away")
        self._hold(starting(self.plain, self.adapters), importance)

    def before_step(self, run: Run) -> None:
        """Add strength * F * (w - w*) to every gradient."""
        from ..quadratic import pull

        if self.strength == 0 or not self.held:
            return
        measured = pull(self.wells, self.force, run.measuring)
        self._measured = self._measured if measured is None else measured

    def finish(self, run: Run) -> None:
        """Leave the importances for the next run, with those of what this run learnt.

        The optimizer still holds its state, so those of before wait in host memory: nothing is held beside those of
        what was learnt, which take their room.
        """
        from ..quadratic import wells

        learnt = run.learn(self.rows) if self.remember and run.memory.write else []
        if not learnt:
            run.memory.save(self.name, self.importance, run)
            return
        devices = {name: tensor.device for name, tensor in self.importance.items()}
        self.wells, self.importance = [], {name: tensor.cpu() for name, tensor in self.importance.items()}
        run.memory.save(self.name, _added(self._importance(run, {"learn": learnt}), self.importance), run)
        self.importance = {name: tensor.to(devices[name]) for name, tensor in self.importance.items()}
        self.wells = wells(self.plain, self.adapters, self.start, self.importance)

    def state_dict(self) -> dict[str, Tensor]:
        parts = {"importance": self.importance, "start": self.start}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor], run: Run) -> None:
        from ..quadratic import placed

        self._bind(run)
        start = {name.removeprefix("start."): tensor for name, tensor in state.items() if name.startswith("start.")}
        importance = {
            name.removeprefix("importance."): t for name, t in state.items() if name.startswith("importance.")
        }
        self._hold(placed(start, self.plain, self.adapters), placed(importance, self.plain, self.adapters, "diagonal."))

    def metrics(self) -> dict[str, float]:
        """Of the last step of the window.

        penalty (nats); predicted_drift = penalty / strength; grad_ratio = |penalty gradient| / |task gradient|;
        held_weights: share of the trained weights whose importance is not 0.
        """
        from ..quadratic import beside_task
        from ..weights import over_shards

        if self._measured is None:
            return {}
        drift, pull_square, task_square = over_shards(self._measured, self.plain.values()).tolist()
        self._measured, self._zeros = None, 0 if drift else self._zeros + 1
        if self._zeros == 3:
            logger.warning(
                "ewc: the penalty stayed 0 for 3 logging windows: no held weight moved. Is the learning rate 0, or "
                "does everything that trains lie outside the protected weights?"
            )
        return {
            "penalty": self.force * drift,
            "predicted_drift": drift,
            **beside_task(self.force, pull_square, task_square),
            "held_weights": self.held,
        }

    def _check_learnt(self, batches: list[dict[str, Tensor]]) -> None:
        """Refuse before training what `finish` could not look back on after it."""
        advice = "leave remember out (--set ewc.remember=false)"
        if not batches:
            logger.warning(
                "ewc: the training rows are not tokens and labels, so the next run gets no importances of what this "
                "one learns, only those of the protect data"
            )
        elif not any((batch["labels"][:, 1:] != IGNORED).any() for batch in batches):
            raise DataError(
                f"ewc would remember what the first {self.rows} training rows teach, but none of their tokens is "
                f"supervised. Shuffle the rows, look at more of them (--set ewc.rows=N), or {advice}."
            )
        elif self.fisher == "empirical" and any("position_ids" in batch for batch in batches):
            raise IncompatibleError(
                "ewc would remember what is learnt with fisher='empirical', one example at a time, but packed and "
                f"padding-free training rows hold several. Type --set ewc.fisher=sign, or {advice}."
            )

    def _bind(self, run: Run) -> None:
        from ..weights import sharded, split

        self.plain, self.adapters = split(run.model)
        self.force = self._usual_strength(bool(self.adapters), bool(run.protect))
        self._measured, self._zeros = None, 0
        if sharded(adapter.A for adapter in self.adapters.values()):
            raise IncompatibleError(
                "ewc cannot hold a LoRA adapter under FSDP2: the rows of A and B live on different ranks. Train the "
                "adapter under DDP (--accelerate_config multi_gpu), or fine-tune all weights under FSDP2."
            )

    def _hold(self, start: dict[str, Tensor], importance: dict[str, Tensor]) -> None:
        from ..quadratic import importance_names, share_held, wells
        from ..weights import match

        match(importance_names(self.plain, self.adapters), importance, "The memory of ewc")
        self.held = share_held(self.plain, self.adapters, importance)
        if not self.held and not self.first:
            raise DataError(
                "ewc found every importance to be 0: no protect token depends on any trainable weight. Check that the "
                "protect data has completions, and that the adapter sits on layers the model uses."
            )
        self.start, self.importance = start, importance
        self.wells = wells(self.plain, self.adapters, start, importance)

    def _importance(self, run: Run, tasks: dict[str, list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        """Fisher per token; each task counts the same, however many tokens it has."""
        from tqdm.auto import tqdm

        from ..fisher import fisher

        total: dict[str, Tensor] = {}
        for index, (task, batches) in enumerate(tasks.items()):
            found = fisher(
                run.model,
                batches,
                self.plain,
                self.adapters,
                estimator=self.fisher,
                seed=run.seed + index,
                autocast=run.autocast,
                progress=lambda items, task=task: tqdm(items, desc=f"Fisher of {task}", disable=None, leave=False),
            )
            total = _added(total, {name: tensor.div_(len(tasks)) for name, tensor in found.named()})
        return total


def _rows(batches: list[dict[str, Tensor]]) -> int:
    return sum(len(batch["labels"]) for batch in batches)


def _added(total: dict[str, Tensor], part: dict[str, Tensor]) -> dict[str, Tensor]:
    """`total` with `part`, which may lie on another device, added to its tensors in place."""
    for name, tensor in part.items():
        total[name] = total[name].add_(tensor.to(total[name].device)) if name in total else tensor
    return total


@hookimpl
def ftplus_strategies() -> list[type[Strategy]]:
    """The strategies of this module."""
    return [EWC]
