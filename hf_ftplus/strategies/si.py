"""Synaptic Intelligence: hold each weight by how much moving it lowered the loss of earlier runs.

    omega_i      = -sum over optimizer steps of  g_i * (change of w_i)
    importance_i = relu(omega_i) / ((distance w_i went in the run)^2 + xi)
    penalty      = strength * sum_i importance_i (w_i - w*_i)^2          (Zenke, Poole, Ganguli 2017, eqs. 3 to 5)

g is the gradient of the step (accumulated, reduced, unscaled) as it was before clipping and before any strategy added
to it; what a strategy adds to the loss itself, or to the rows, is part of it. The change is what the optimizer really
did: momentum, Adam's scaling, weight decay and all. For small steps along the true gradient the omegas sum up to the
fall of the loss (`si/explained`); the noise of batches and large steps make the sum larger. xi is `damping` times the
mean square of the distances that weights went, not a number of its own, so that settings mean the same at any learning
rate: at strength 1, undoing what a run did to a weight costs what the run gained by it.

It protects what *earlier* runs learnt. Without `--memory` it records only, and leaves memory; with it, it holds the
weights where this run found them (w*), and records. Across runs importances add up: decay * memory + this run's.

Sums are in fp32 whatever the weights are in. Yet a weight kept in bf16 has 8 bits: changes below half of its last one
never happen, so w stays, and its omega is 0 where an fp32 copy would have learnt. Load such models in fp32 and let bf16
be the precision of the forward pass (`--dtype float32 --bf16`).

LoRA is refused: the loss depends on the change B A of a frozen weight, and omega of that change needs the gradient of
the frozen weight at each of its elements, which LoRA training never makes. Omegas of A and B exist, but mean nothing
beyond this one split of B A into two, and nothing at all once the adapter is merged.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import DataError, IncompatibleError
from ..hookspecs import hookimpl
from ..strategy import Run, Strategy, place, setting

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger("hf_ftplus")


STRENGTH = 0.1
"""If none is given, from facts learnt after reviews on the demo model (examples/benchmarks; three seeds): at 0.1 more
of them are learnt than without (91 and 81 %), and more of all else is kept; at 1, 44 % are learnt (one seed)."""
SAMPLED = 16
"""Elements of each gradient that are looked at again after the first step."""


@dataclass
class SI(Strategy):
    """Synaptic Intelligence: hold each weight by how much moving it taught earlier runs."""

    name: ClassVar[str] = "si"
    judged: ClassVar[dict[str, Any]] = {"second_run": True, "peft": False}

    strength: float = setting(
        STRENGTH, "what undoing a nat that earlier runs learnt costs, in nats of learn loss", unit="nats per nat", low=0
    )
    damping: float = setting(
        0.01,
        "how far a weight must have gone to count in full; keeps those that hardly moved from counting too much",
        unit="mean squared distances of the weights that moved",
        above=0,
    )
    decay: float = setting(1.0, "share of the importances in --memory that still counts in this run", low=0, high=1)

    def refuse(self, run: Run | None) -> None:
        """Adapters, and gradients that are clipped by nobody knows how much."""
        if run is None:
            return
        if getattr(run.model, "peft_config", None):
            raise IncompatibleError(
                "si cannot follow an adapter: the loss depends on the change B A of a frozen weight, whose own "
                "gradient adapter training never makes, and how that change is split into A and B is arbitrary. Use "
                "--plugin ewc, which holds the change itself, or fine-tune all weights."
            )
        refuse_unknown_clipping(run)

    def preview(self, run: Run) -> dict[str, float]:
        """Bytes of state; it needs no protect rows and no time before the first step."""
        self._bind(run)
        each = 12 if run.memory.read else 8
        return {
            "bytes": sum(weight.numel() * (each + weight.element_size()) for weight in run.weights.values()),
            "rows": 0,
            "seconds": 0.0,
        }

    def prepare(self, run: Run) -> None:
        """Note the starting weights, and take the importances that earlier runs left."""
        import torch

        from ..weights import match, warn_of_16_bits

        self._bind(run)
        memory = run.memory.load(self.name, run) if self.decay else None
        if memory is None:
            why = "no --memory of an earlier run" if self.decay else "decay is 0"
            logger.info("si: %s, so nothing is protected in this one; it records for the next", why)
        else:
            match(run.weights, memory, "The memory of si")
        adding = [it.name for it in run.strategies if it.overrides("token_loss") and getattr(it, "strength", 1) != 0]
        if adding:
            logger.info(
                "si: %s adds to the loss, so importances also count what lowered that, not only what was learnt",
                ", ".join(adding),
            )
        warn_of_16_bits(run.weights, "si", "small steps are lost and never counted")
        importance = {}
        if memory is not None:
            importance = {name: place(self.decay * memory[name], weight) for name, weight in run.weights.items()}
        if memory is not None and not any(tensor.any() for tensor in memory.values()):
            raise DataError(
                f"The memory of si in {run.memory.read} is 0 throughout: no weight moved in the run that left it, or "
                "none to any use. Train that run again, or leave --memory out."
            )
        alone = self._alone(run, pulls=bool(importance) and self.strength > 0)
        lines = {}
        for name, weight in run.weights.items():
            zeros, start = torch.zeros_like(weight.detach(), dtype=torch.float32), weight.detach().clone()
            last = start.float().clone() if alone else zeros.clone()
            lines[name] = Line(weight, start, zeros, last, importance.get(name), alone)
        self._hold(lines, importance, alone)

    def read_gradients(self, run: Run) -> None:
        """Go on with the line integral: the gradient of this step, and how far the weights have come."""
        refuse_unknown_clipping(run)
        if self.alone and not self._looked:
            self._sampled = self._sample()
        if not self.alone and not self._in_one_pass(run):
            factor = unclip(run)
            for line in self.lines.values():
                line.read(factor)

    def before_step(self, run: Run) -> None:
        """Add 2 * strength * importance * (w - w*) to every gradient."""
        from ..quadratic import pull

        if self._in_one_pass(run):
            factor = unclip(run)
            for line in self.lines.values():
                line.read(factor, 2 * self.strength)
        elif self.wells and self.strength:
            figures = pull(self.wells, 2 * self.strength, run.measuring)
            self._held = self._held if figures is None else figures

    def after_step(self, run: Run) -> None:
        """Alone, go on with the line integral; at the end of a logging window, sum up what the path explains."""
        import torch

        if self.alone:
            if not self._looked:
                self._refuse_changed()
            factor = unclip(run)
            for line in self.lines.values():
                line.follow(factor)
        if run.measuring:
            self._explained = torch.stack([line.total() for line in self.lines.values()]).sum()

    def finish(self, run: Run) -> None:
        """Leave the importances for the next run: earlier ones, and those of this run's path.

        The optimizer still holds its state, so each weight's go to host memory as they are made; shards stay, to be
        gathered one by one.
        """
        moved, count, explained = self._summed([line.extent() for line in self.lines.values()])
        if not moved:
            logger.warning("si: no weight moved in this run, so it adds nothing to the memory")
        xi = self.damping * moved / max(count, 1) or 1.0
        total = {}
        for name, line in self.lines.items():
            found = line.importance(xi)
            if name in self.importance:
                found.add_(self.importance[name])
            total[name] = found if self._sharded else found.cpu()
        logger.info("si: the path of this run explains %.3f nats of learn loss; xi is %.2g", explained, xi)
        run.memory.save(self.name, total, run)

    def state_dict(self) -> dict[str, Tensor]:
        parts = {
            "start": {name: line.start for name, line in self.lines.items()},
            "omega": {name: line.omega for name, line in self.lines.items()},
            "before" if self.alone else "gradient": {name: line.last for name, line in self.lines.items()},
            "importance": self.importance,
        }
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor], run: Run) -> None:
        from ..weights import match

        self._bind(run)

        def part(kind: str) -> dict[str, Tensor]:
            return {
                name: place(state[f"{kind}.{name}"], weight)
                for name, weight in run.weights.items()
                if f"{kind}.{name}" in state
            }

        alone = any(name.startswith("before.") for name in state)
        start, omega, last, importance = map(part, ("start", "omega", "before" if alone else "gradient", "importance"))
        for found in (start, omega, last, importance or start):
            match(run.weights, found, "The saved state of si")
        lines = {
            name: Line(weight, start[name], omega[name], last[name], importance.get(name), alone)
            for name, weight in run.weights.items()
        }
        self._hold(lines, importance, alone)

    def metrics(self) -> dict[str, float]:
        """explained (nats, since the start); with memory: penalty (nats), grad_ratio = |its gradient| / |task's|."""
        from ..quadratic import beside_task

        found = {}
        if self._explained is not None:
            (found["explained"],) = self._summed([self._explained.reshape(1)])
        if self._held is not None:
            depth, pull_square, task_square = self._summed([self._held])
            found["penalty"] = 2 * self.strength * depth
            found |= beside_task(2 * self.strength, pull_square, task_square)
            self._zeros = 0 if depth else self._zeros + 1
            if self._zeros == 3:
                logger.warning(
                    "si: the penalty stayed 0 for 3 logging windows: no weight that earlier runs used moved. Is the "
                    "learning rate 0, or --memory of a run that trained other weights?"
                )
        self._explained = self._held = None
        return found

    def _sample(self) -> list[Tensor]:
        """A few elements of every gradient."""
        from ..weights import local

        grads = [line.weight.grad for line in self.lines.values()]
        return [local(grad).flatten()[:SAMPLED].clone() for grad in grads if grad is not None]

    def _refuse_changed(self) -> None:
        """Raise, once, where the optimizer left something else in the gradients than the task's."""
        import torch

        pairs = zip(self._sampled, self._sample(), strict=True)
        same = all(torch.allclose(then, now, equal_nan=True) for then, now in pairs)
        self._looked = True
        if not same:
            raise IncompatibleError(
                "The optimizer changes gradients in its step (SGD with nesterov=True does, where foreach is on), so si "
                "cannot read after it what the task said. Make it with foreach=False, or choose another optimizer."
            )

    def _alone(self, run: Run, pulls: bool) -> bool:
        """Whether after a step gradients are still the task's, and weights where the optimizer left them."""
        others = [strategy for strategy in run.strategies if strategy is not self]
        return not pulls and not any(
            other.overrides(moment) for other in others for moment in ("before_step", "after_step")
        )

    def _in_one_pass(self, run: Run) -> bool:
        """Whether reading can wait for before_step: nobody adds to the gradients earlier, and it saves a pass."""
        writers = (strategy for strategy in run.strategies if strategy.overrides("before_step"))
        return next(writers, None) is self and bool(self.wells) and self.strength > 0 and not run.measuring

    def _bind(self, run: Run) -> None:
        from ..weights import sharded

        self._sharded = sharded(run.weights.values())
        self._held = self._explained = None
        self._zeros, self._looked = 0, False

    def _hold(self, lines: dict[str, Line], importance: dict[str, Tensor], alone: bool) -> None:
        from ..quadratic import Well

        self.lines, self.importance, self.alone = lines, importance, alone
        self.wells = [Well(lines[name].weight, lines[name].start, held) for name, held in importance.items()]

    def _summed(self, parts: list[Tensor]) -> list[float]:
        """The parts added up, over all ranks where weights are sharded; waits for the device."""
        import torch

        from ..weights import over_shards

        return over_shards(torch.stack(parts).sum(0), [line.weight for line in self.lines.values()]).tolist()


@dataclass
class Line:
    """The line integral along the path of one weight, with d_t = w_t - start, in one of two ways:

        omega = -sum_t g_t (d_{t+1} - d_t)                                   `follow`, after a step
              = sum_t (g_t - g_{t-1}) d_t  -  g_T d_{T+1}        g_0 = 0     `read`, before it: summed by parts

    The first is shorter. The second needs no gradient once the step is made, when it may be no longer the task's, and
    counts to a step whatever moves the weights until the next. Both take one pass a step and one tensor beside the sum,
    and a skipped step changes nothing: its d_{t+1} is d_t.
    """

    weight: nn.Parameter
    start: Tensor
    omega: Tensor
    """The sum so far; by parts without the last term."""
    last: Tensor
    """By parts g of the last step, whose term is open until the next, or the end; else the weight as it left it."""

    earlier: Tensor | None = None
    """Importance in earlier runs."""
    followed: bool = False
    """The first way."""

    def __post_init__(self) -> None:
        from ..quadratic import Cut

        held = (self.weight, self.start, self.omega, self.last, self.earlier)
        self._cut = Cut(*(tensor for tensor in held if tensor is not None))

    def follow(self, unclip: float | Tensor) -> None:
        """Take the step that was just made along its gradient, times `unclip`; what is not finite counts as 0."""
        import torch

        if self.weight.grad is None:
            self.last.copy_(self.weight.detach())
            return
        for gradient, room, w, _, omega, before, *_ in self._cut.along(self.weight.grad):
            moved, g, times = torch.sub(w.float(), before, out=room), gradient.float(), unclip
            if not isinstance(unclip, float):
                g, times = (g * unclip).nan_to_num_(0.0, 0.0, 0.0), 1.0
            omega.addcmul_(moved, g, value=-times)
            before.copy_(w)

    def read(self, unclip: float | Tensor, strength: float = 0.0) -> None:
        """Take the gradient of a step that is about to be made, times `unclip`; what is not finite counts as 0. Above a
        strength of 0, add strength * earlier importance * d to the gradient as well."""
        import torch

        given = self.weight.grad if self.weight.grad is not None else torch.zeros_like(self.weight)
        for gradient, room, w, start, omega, last, *earlier in self._cut.along(given):
            moved, g, times = torch.sub(w.float(), start.float(), out=room), gradient.float(), unclip
            if not isinstance(unclip, float):
                g, times = (g * unclip).nan_to_num_(0.0, 0.0, 0.0), 1.0
            omega.addcmul_(moved, torch.sub(last, g, alpha=times), value=-1)
            torch.mul(g, times, out=last)
            if strength:
                gradient.addcmul_(moved, *earlier, value=strength)

    def total(self) -> Tensor:
        """omega, summed over this rank's shard: a scalar."""
        from ..quadratic import inner
        from ..weights import local

        if self.followed:
            return local(self.omega).sum()
        return sum(
            omega.sum() - inner(last, w.float() - start.float())
            for last, _, w, start, omega, *_ in self._cut.along(self.last)
        )

    def extent(self) -> Tensor:
        """[squared distance, how many weights moved, omega], summed over this rank's shard."""
        import torch

        from ..weights import local

        moved = local(self._moved())
        return torch.stack([moved.square().sum(), moved.count_nonzero().float(), self.total()])

    def closed(self) -> Tensor:
        """omega up to where the weight stands, placed as the weight is."""
        return self.omega if self.followed else self.omega - self.last * self._moved()

    def importance(self, xi: float) -> Tensor:
        """relu(omega) / (d^2 + xi), placed as the weight is."""
        return self.closed().relu() / (self._moved().square() + xi)

    def _moved(self) -> Tensor:
        return self.weight.detach().float() - self.start.float()


def refuse_unknown_clipping(run: Run) -> None:
    """Raise where gradients are clipped and nobody says by how much."""
    if run.clip is None:
        raise IncompatibleError(
            "si needs the gradients as they were before clipping, but a callback cannot know by how much they were "
            "clipped. Use hf_ftplus.attach(trainer, 'si', ...) or hf_ftplus.SFTTrainer(..., strategies=['si']), or "
            "set max_grad_norm=0 (--max_grad_norm 0)."
        )


def unclip(run: Run) -> float | Tensor:
    """What undoes the clipping of this step. A number, which makes for a shorter pass, on a CPU, where nobody waits for
    it and no step is skipped for gradients that are not finite."""
    import torch

    clip = torch.as_tensor(run.clip.full_tensor() if hasattr(run.clip, "full_tensor") else run.clip)
    return 1.0 / clip.item() if run.device.type == "cpu" and clip > 0 else 1.0 / clip


@hookimpl
def ftplus_strategies() -> list[type[Strategy]]:
    """The strategies of this module."""
    return [SI]
