"""Fine-tune close to the start: L2-SP pulls every weight back to its starting value, all with the same force.

    penalty = 1/2 strength sum (weight - start)^2            gradient = strength (weight - start)

Li, Grandvalet, Davoine 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks"
(arXiv:1802.01483). It needs no data to protect and one copy of the trainable weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_ftplus import Run, Strategy, hookimpl, place, setting
from hf_ftplus.errors import IncompatibleError

if TYPE_CHECKING:
    import torch


def l2sp_gradient(weight: torch.Tensor, start: torch.Tensor, strength: float) -> torch.Tensor:
    """strength (weight - start), the gradient of 1/2 strength (weight - start)^2."""
    return strength * (weight.detach() - start)


@dataclass
class L2SP(Strategy):
    """Pull the weights back to where they started, each with the same force.

    It protects nothing in particular: a weight that matters is held no harder than one that does not. Under LoRA it
    acts on the factors, so it holds A and B near their start rather than the change of the weight itself.
    """

    name: ClassVar[str] = "l2sp"

    strength: float = setting(
        0.01, "how hard the weights are pulled back; 0 lets them go", unit="nats per squared distance", low=0
    )

    def prepare(self, run: Run) -> None:
        self._start = {name: weight.detach().clone() for name, weight in run.weights.items()}
        self._penalty = 0.0

    def before_step(self, run: Run) -> None:
        if self.strength == 0:
            return  # adding 0 x distance would turn -0.0 into 0.0
        if run.measuring:
            self._penalty = self._measure(run)  # stays on the device until it is logged
        for name, weight in run.weights.items():
            if weight.grad is not None:
                weight.grad.add_(l2sp_gradient(weight, self._start[name], self.strength))

    def metrics(self) -> dict[str, float]:
        """`penalty`: what this strategy would add to the loss."""
        return {"penalty": float(self._penalty)} if self.strength else {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._start)

    def load_state_dict(self, state: dict[str, torch.Tensor], run: Run) -> None:
        missing = [
            name for name, weight in run.weights.items() if name not in state or state[name].shape != weight.shape
        ]
        if missing:
            raise IncompatibleError(
                f"l2sp: the saved start does not fit {len(missing)} of {len(run.weights)} weights, "
                f"the first of them {missing[0]}. Resume with the model and adapter of the first run."
            )
        self._start = {name: place(state[name], weight) for name, weight in run.weights.items()}
        self._penalty = 0.0

    def _measure(self, run: Run) -> torch.Tensor:
        distances = [
            (weight.detach() - self._start[name]).float().square().sum() for name, weight in run.weights.items()
        ]
        total = 0.5 * self.strength * sum(distances)
        return total.full_tensor() if hasattr(total, "full_tensor") else total  # FSDP2: each rank holds a part


@hookimpl
def ftplus_strategies() -> list[type[Strategy]]:
    return [L2SP]
