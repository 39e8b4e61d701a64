"""EWC with Kronecker factors: hold the directions that the protect data uses, not one weight at a time.

    penalty = 1/2 strength sum_layers tr(G D S D^T)          gradient of W: strength G D S,       D = W - W_start [d, k]

    S = mean over positions of x x^T [k, k], x the layer's input
    G = sum over positions of g g^T / supervised tokens [d, d], g the gradient of its output under a random square root
        of the Fisher information of the logits (`hf_ftplus.fisher`)

G (x) S stands for the Fisher information of W per supervised token (KFAC: Martens and Grosse 2015, arXiv:1503.05671;
for continual learning Ritter, Botev, Barber 2018, arXiv:1805.07810), so that penalty / strength is, to second order,
the drift KL(start || now) as far as layers do not act together, nor positions, nor what enters a layer with what comes
back to it: in one layer 0.8 to 2.5 times the penalty. The diagonal sees none of what moves together in one.

LoRA moves W by D = scale (B A - B_start A_start) = L R with L [d, 2r], R [2r, k], so that G L and R S are thin:

    gradient of B = strength scale (G L) (R S A^T)           gradient of A = strength scale (B^T G L) (R S)

What is no Linear (embeddings, norms), the LM head, and matrices larger than `largest` are held by the diagonal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_ftplus import Run, Strategy, hookimpl, setting
from hf_ftplus.errors import DataError, IncompatibleError

if TYPE_CHECKING:
    from torch import Tensor, nn

ftplus_api = 1
logger = logging.getLogger("hf_ftplus")


# ---- the quadratic ---------------------------------------------------------------------------------------------------


def kronecker_penalty(change: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """1/2 tr(G D S D^T) of D [d, k], G [d, d], S [k, k]."""
    return 0.5 * ((outputs @ change @ inputs) * change).sum()


def kronecker_pull(change: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """G D S, the gradient of `kronecker_penalty` at D [d, k]."""
    return outputs @ change @ inputs


def thin_pull(left: Tensor, right: Tensor, outputs: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of D = L R, L [d, n], R [n, k]: the penalty, and the gradients of L [d, n] and R [n, k]; no d x k product."""
    heavy_left, heavy_right = outputs @ left, right @ inputs
    inner_left, inner_right = left.T @ heavy_left, heavy_right @ right.T
    return 0.5 * (inner_left * inner_right).sum(), heavy_left @ inner_right, inner_left @ heavy_right


# ---- the factors -----------------------------------------------------------------------------------------------------


@contextmanager
def factors(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect of every layer, while others run the model forward and backward: [sum g g^T, sum x x^T, positions].

    Positions that no gradient comes to (padding, and what follows the last supervised token) do not count.
    """
    import torch

    from hf_ftplus.fisher import watching

    sums: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        d, k = _shape(layer)
        device = next(layer.parameters()).device
        sums[name] = [torch.zeros(shape, device=device) for shape in ((d, d), (k, k), ())]

    def add(name: str, x: Tensor, g: Tensor) -> None:
        reached = (g != 0).any(1, keepdim=True).float()
        x = x * reached
        found = [g.T @ g, x.T @ x, reached.sum()]
        sums[name] = [one + other for one, other in zip(sums[name], found, strict=True)]

    with watching(layers, add):
        yield sums


def _shape(layer: nn.Module) -> tuple[int, int]:
    return layer.out_features, layer.in_features


# ---- when ------------------------------------------------------------------------------------------------------------


@dataclass
class KFAC(Strategy):
    """EWC with Kronecker factors: hold the directions that the protect data uses, not one weight at a time."""

    name: ClassVar[str] = "kfac"
    judged: ClassVar[dict] = {
        "breaks": {"travels light": "under LoRA its factors are square in the width of a layer, the adapter is thin"}
    }

    strength: float = setting(
        100.0, "what a nat of drift on protect costs, in nats of learn loss", unit="nats per nat", low=0
    )
    rows: int = setting(256, "protect rows per task to estimate the factors on", unit="rows", low=1)
    largest: int = setting(
        8192,
        "matrices with more rows or columns are held by the diagonal, to save memory",
        unit="rows or columns",
        low=1,
    )

    def refuse(self, run: Run | None) -> None:
        """Nothing to protect, adapters whose change of a weight is not scale * B A, and shards."""
        from hf_ftplus.weights import sharded, split

        if run is None or self.strength == 0:
            return
        split(run.model)
        if not run.protect:
            raise DataError(
                "kfac has nothing to protect: no protect data. Type --protect FILE, or --protect self:256 to let the "
                "starting model write it."
            )
        if sharded(run.weights.values()):
            raise IncompatibleError(
                "kfac needs whole matrices, but under FSDP2 the rows of each live on different ranks. Train under DDP "
                "(--accelerate_config multi_gpu), or use --plugin ewc."
            )

    def preview(self, run: Run) -> dict[str, float]:
        """Bytes of factors, starts and diagonals, and protect rows used."""
        self._bind(run)
        squares = sum(d * d + k * k for d, k in map(_shape, self._layers.values()))
        starts = sum(layer.weight.numel() for name, layer in self._layers.items() if name not in self._adapters)
        others = sum(weight.numel() for weight in self._others.values())
        rows = sum(min(self.rows, sum(len(batch["labels"]) for batch in task)) for task in run.protect.values())
        return {"bytes": 4.0 * (squares + starts + 2 * others), "rows": float(rows)}

    def prepare(self, run: Run) -> None:
        """Note the starting weights, and estimate the factors on the protect rows."""
        self.refuse(run)
        self._bind(run)
        if self.strength == 0:
            return
        start = {name: layer.weight.detach().clone() for name, layer in self._plain().items()}
        for name, adapter in self._adapters.items():
            start[f"{name}.lora_A"], start[f"{name}.lora_B"] = adapter.A.detach().clone(), adapter.B.detach().clone()
        start |= {name: weight.detach().clone() for name, weight in self._others.items()}
        self._state = {f"start.{name}": tensor for name, tensor in start.items()} | self._estimated(run)
        self._hold()

    def before_step(self, run: Run) -> None:
        """Add strength * G D S to every gradient."""
        from hf_ftplus.quadratic import pull

        if not self._state:
            return
        drift = [self._held(name, layer) for name, layer in self._plain().items()]
        drift += [self._held_adapter(name) for name in self._adapters]
        figures = pull(self._wells, self.strength, measure=run.measuring)
        if run.measuring:
            self._drift = sum(drift) + (0.0 if figures is None else figures[0])  # stays on the device until logged

    def metrics(self) -> dict[str, float]:
        """Of the last step of the window: `penalty`, nats of learn loss, and `predicted_drift` = penalty / strength."""
        if self._drift is None:
            return {}
        return {"penalty": self.strength * float(self._drift), "predicted_drift": float(self._drift)}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Tensor], run: Run) -> None:
        self._bind(run)
        self._state = {name: tensor.to(run.device) for name, tensor in state.items()}
        if self._state:
            self._hold()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _bind(self, run: Run) -> None:
        """Which weights are held how: Linear layers and LoRA targets by factors, all others by the diagonal."""
        from torch import nn

        from hf_ftplus.logits import causal_lm
        from hf_ftplus.weights import canonical, split

        plain, self._adapters = split(run.model)
        large = [name for name, it in self._adapters.items() if max(it.A.shape[1], it.B.shape[0]) > self.largest]
        if large:
            raise IncompatibleError(
                f"kfac would hold {large[0]}, which has more than {self.largest} rows or columns, and under LoRA there "
                f"is no diagonal to hold it by. Take it out of target_modules, or type --set kfac.largest=N."
            )
        head = causal_lm(run.model).get_output_embeddings()
        ours = {id(weight): name for name, weight in plain.items()}
        self._layers: dict[str, nn.Module] = {name: adapter.layer for name, adapter in self._adapters.items()}
        for name, layer in run.model.named_modules():
            fits = isinstance(layer, nn.Linear) and layer is not head and max(_shape(layer)) <= self.largest
            if fits and id(layer.weight) in ours:
                self._layers[canonical(name)] = layer
        held = {id(layer.weight) for layer in self._plain().values()}
        self._others = {name: weight for name, weight in plain.items() if id(weight) not in held}
        self._state: dict[str, Tensor] = {}
        self._drift: Tensor | None = None

    def _plain(self) -> dict[str, nn.Module]:
        return {name: layer for name, layer in self._layers.items() if name not in self._adapters}

    def _estimated(self, run: Run) -> dict[str, Tensor]:
        """`outputs.NAME` (G), `inputs.NAME` (S) and `diagonal.NAME`, each task counting the same."""
        import torch.distributed as dist

        from hf_ftplus.batches import first_rows
        from hf_ftplus.fisher import fisher

        total: dict[str, Tensor] = {}
        for index, batches in enumerate(run.protect.values()):
            first = first_rows(batches, self.rows)
            with factors(self._layers) as sums:
                found = fisher(run.model, first, self._others, seed=run.seed + index, autocast=run.autocast)
            named = dict(found.named())
            for name, (outputs, inputs, positions) in sums.items():
                for tensor in (outputs, inputs, positions) if dist.is_initialized() else ():
                    dist.all_reduce(tensor)
                named[f"outputs.{name}"] = outputs / found.tokens
                named[f"inputs.{name}"] = inputs / positions.clamp(min=1)
            total = {name: total.get(name, 0) + tensor / len(run.protect) for name, tensor in named.items()}
        held = sum(bool(total[f"outputs.{name}"].any()) for name in self._layers)
        if not held:
            raise DataError(
                "kfac found every factor to be 0: no protect token depends on any layer that is trained. Check that "
                "the protect data has completions."
            )
        logger.info("kfac: %d layers by factors, %d other weights by the diagonal", held, len(self._others))
        return total

    def _hold(self) -> None:
        from hf_ftplus.quadratic import wells
        from hf_ftplus.weights import match

        wanted = [f"{part}.{name}" for name in self._layers for part in ("outputs", "inputs")]
        wanted += [f"start.{name}" for name in self._plain()]
        wanted += [f"start.{name}.lora_{part}" for name in self._adapters for part in "AB"]
        wanted += [f"{part}.{name}" for name in self._others for part in ("start", "diagonal")]
        match(wanted, self._state, "The state of kfac")
        start = {name: self._state[f"start.{name}"] for name in self._others}
        self._wells = wells(self._others, {}, start, self._state)

    def _held(self, name: str, layer: nn.Module) -> Tensor | float:
        """Pull one Linear; its part of the drift."""
        if layer.weight.grad is None:
            return 0.0
        change = layer.weight.detach().float() - self._state[f"start.{name}"].float()
        pull = kronecker_pull(change, self._state[f"outputs.{name}"], self._state[f"inputs.{name}"])
        layer.weight.grad.add_(pull.to(layer.weight.grad.dtype), alpha=self.strength)
        return 0.5 * (pull * change).sum()

    def _held_adapter(self, name: str) -> Tensor | float:
        """Pull A and B of one LoRA target; its part of the drift."""
        import torch

        it, rank = self._adapters[name], self._adapters[name].A.shape[0]
        if it.A.grad is None or it.B.grad is None:
            return 0.0
        start_a, start_b = (self._state[f"start.{name}.lora_{part}"].float() for part in "AB")
        a, b = it.A.detach().float(), it.B.detach().float()
        # scale ((B - B') A + B' (A - A')): the difference of the products would be lost to rounding
        left, right = it.scale * torch.cat([b - start_b, start_b], 1), torch.cat([a, a - start_a])
        drift, of_left, of_right = thin_pull(left, right, self._state[f"outputs.{name}"], self._state[f"inputs.{name}"])
        it.B.grad.add_(of_left[:, :rank].to(it.B.grad.dtype), alpha=self.strength * it.scale)
        it.A.grad.add_((of_right[:rank] + of_right[rank:]).to(it.A.grad.dtype), alpha=self.strength)
        return drift


@hookimpl
def ftplus_strategies() -> list[type[Strategy]]:
    return [KFAC]
