"""A quadratic well around the starting weights: 1/2 sum_i importance_i (w_i - start_i)^2, and its gradient, in place.

Shared by every strategy that holds weights by importance. Weights that train themselves are held one by one. A LoRA
target W [d, k] moves by scale * B A, so it is that change which is held, with importance_ij = rows_i * columns_j / sum
of rows, through r x r products only:

    1/2 sum_ij importance_ij (L R)_ij^2 = 1/2 tr[(L^T diag(rows) L) (R diag(columns / sum) R^T)]
    L = [scale * (B - B_start), scale * B_start]  [d, 2r]        R = [A; A - A_start]  [2r, k]

which is scale * (B A - B_start A_start) without the difference of two large products, of which nothing is left after
rounding (TF32, and fp32 near the start).

All arithmetic is in fp32 whatever the weights are in, on this rank's shards, without waiting for the device.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .strategy import place
from .weights import Adapter, canonical, local, over_shards, sharded

logger = logging.getLogger("hf_ftplus")

PIECE, DEVICE_PIECE = 2**17, 2**26
"""Weights handled at a time: on a CPU few enough that temporaries stay in its cache, elsewhere that they take no more
than a quarter of a GB each."""


@dataclass
class Well:
    """Holds one weight."""

    weight: nn.Parameter
    start: Tensor
    importance: Tensor

    def __post_init__(self) -> None:
        self._cut = Cut(self.weight, self.start, self.importance)

    def add(self, strength: float, measure: bool) -> list[Tensor]:
        """Add strength * importance * (w - start) to the gradient, if there is one; return its figures (see `pull`)."""
        figures = []
        if self.weight.grad is not None:
            for g, room, w, s, f in self._cut.along(self.weight.grad):
                moved = torch.sub(w.float(), s.float(), out=room)
                if measure:
                    change = moved * f
                    figures.append(torch.stack([0.5 * inner(change, moved), inner(change, change), inner(g, g)]))
                g.addcmul_(moved, f, value=strength)
        return figures


@dataclass
class AdapterWell:
    """Holds the change that one LoRA target makes to its frozen weight."""

    adapter: Adapter
    start: tuple[Tensor, Tensor] | None
    rows: Tensor
    columns: Tensor
    """Importances of rows [d] and columns [k]; `columns` sum to one."""

    def _pulls(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(gradient, pull) of A and of B."""
        left, right = self._factors()
        rank, scale = self.adapter.A.shape[0], self.adapter.scale
        weighed_left, weighed_right = self.rows.unsqueeze(1) * left, right * self.columns
        if self.adapter.B.grad is not None:
            yield local(self.adapter.B.grad), weighed_left @ (scale * (weighed_right @ right.T)[:, :rank])
        if self.adapter.A.grad is not None:
            inner_left = left.T @ weighed_left
            inner_left = inner_left if self.start is None else inner_left[:rank] + inner_left[rank:]  # scale * B
            yield local(self.adapter.A.grad), inner_left @ weighed_right

    def add(self, strength: float, measure: bool) -> list[Tensor]:
        """Add strength * pull to the gradients of A and B; return their figures (see `pull`)."""
        found = list(self._pulls())
        figures = []
        if measure and found:
            squares = [torch.stack([inner(change, change), inner(gradient, gradient)]) for gradient, change in found]
            figures = [torch.cat([self.penalty().reshape(1), sum(squares)])]
        for gradient, change in found:
            gradient.add_(change, alpha=strength)
        return figures

    def penalty(self) -> Tensor:
        left, right = self._factors()
        return 0.5 * torch.sum((left.T @ (self.rows.unsqueeze(1) * left)) * ((right * self.columns) @ right.T).T)

    def _factors(self) -> tuple[Tensor, Tensor]:
        B, A, scale = self.adapter.B.detach().float(), self.adapter.A.detach().float(), self.adapter.scale
        if self.start is None:
            return scale * B, A
        start_A, start_B = (tensor.float() for tensor in self.start)
        return scale * torch.cat([B - start_B, start_B], 1), torch.cat([A, A - start_A])


def starting(plain: dict[str, nn.Parameter], adapters: dict[str, Adapter]) -> dict[str, Tensor]:
    """A copy of where the weights stand. A fresh adapter (B = 0) changes nothing, so nothing is kept of it."""
    start = {name: weight.detach().clone() for name, weight in plain.items()}
    for name, adapter in adapters.items():
        if adapter.B.detach().any():
            start[f"{name}.lora_A"], start[f"{name}.lora_B"] = adapter.A.detach().clone(), adapter.B.detach().clone()
    return start


def wells(
    plain: dict[str, nn.Parameter],
    adapters: dict[str, Adapter],
    start: dict[str, Tensor],
    importance: dict[str, Tensor],
) -> list[Well | AdapterWell]:
    """One well for each weight and LoRA target; `importance` is named as `fisher.Fisher.named` names it."""
    held: list[Well | AdapterWell] = [
        Well(weight, start[name], importance[f"diagonal.{name}"]) for name, weight in plain.items()
    ]
    for name, adapter in adapters.items():
        rows, columns = importance[f"rows.{name}"], importance[f"columns.{name}"]
        origin = (start[f"{name}.lora_A"], start[f"{name}.lora_B"]) if f"{name}.lora_A" in start else None
        held.append(AdapterWell(adapter, origin, rows, columns / columns.sum().clamp(min=1e-38)))
    return held


def importance_names(plain: dict[str, nn.Parameter], adapters: dict[str, Adapter]) -> list[str]:
    """The names that a complete set of importances has."""
    return [f"diagonal.{name}" for name in plain] + [
        f"{kind}.{name}" for kind in ("rows", "columns") for name in adapters
    ]


def no_importance(plain: dict[str, nn.Parameter], adapters: dict[str, Adapter]) -> dict[str, Tensor]:
    """A complete set of importances, all 0: where nothing is to be held yet."""
    found = {f"diagonal.{name}": torch.zeros_like(weight, dtype=torch.float32) for name, weight in plain.items()}
    for name, adapter in adapters.items():
        found[f"rows.{name}"] = torch.zeros(adapter.B.shape[0], device=adapter.B.device)
        found[f"columns.{name}"] = torch.zeros(adapter.A.shape[1], device=adapter.A.device)
    return found


def fitted(
    importance: dict[str, Tensor], plain: dict[str, nn.Parameter], adapters: dict[str, Adapter], model: nn.Module
) -> dict[str, Tensor]:
    """What of a memory serves what this run trains, in fp32.

    A LoRA target takes the row and column sums of the importances of its whole weight, where those are remembered;
    what is remembered of weights that are frozen here is left out, and said. What is still missing or unknown stays so.
    """
    found = dict(importance)
    for name, adapter in adapters.items():
        whole = found.pop(f"diagonal.{name}.weight", None)
        if whole is not None and f"rows.{name}" not in found:
            whole = whole.float().T if getattr(adapter.layer, "fan_in_fan_out", False) else whole.float()  # GPT-2's
            found[f"rows.{name}"], found[f"columns.{name}"] = whole.sum(1), whole.sum(0)
    known = {canonical(name) for name, _ in model.named_parameters()}
    wanted = set(importance_names(plain, adapters))
    idle = {f"diagonal.{name}" for name in known}
    idle |= {f"{kind}.{name.removesuffix('.weight')}" for name in known for kind in ("rows", "columns")}
    frozen = {name.partition(".")[2].removesuffix(".weight") for name in (found.keys() & idle) - wanted}
    if frozen:
        logger.info("memory: what it says of %d weights that this run does not train ends here", len(frozen))
    return {name: tensor.float() for name, tensor in found.items() if name in wanted or name not in idle}


def share_held(plain: dict[str, nn.Parameter], adapters: dict[str, Adapter], importance: dict[str, Tensor]) -> float:
    """Share of the weights whose importance is above 0, over all shards."""
    number = sum(weight.numel() for weight in plain.values())
    held = sum(int(local(importance[f"diagonal.{name}"]).count_nonzero()) for name in plain)
    if sharded(plain.values()):
        held = int(over_shards(torch.tensor(held, device=next(iter(plain.values())).device), plain.values()))
    for name, adapter in adapters.items():
        number += adapter.B.shape[0] * adapter.A.shape[1]
        held += int(importance[f"rows.{name}"].count_nonzero() * importance[f"columns.{name}"].count_nonzero())
    return held / number


def placed(
    tensors: dict[str, Tensor], plain: dict[str, nn.Parameter], adapters: dict[str, Adapter], prefix: str = ""
) -> dict[str, Tensor]:
    """Whole tensors read from disk, each on the device and in the sharding of the weight it belongs to."""
    device = next(iter((*plain.values(), *(adapter.A for adapter in adapters.values())))).device
    likes = {f"{prefix}{name}": weight for name, weight in plain.items()}
    return {
        name: place(tensor, likes[name]) if name in likes else tensor.to(device) for name, tensor in tensors.items()
    }


def state_bytes(plain: dict[str, nn.Parameter], adapters: dict[str, Adapter]) -> int:
    """Memory of start and importances: 4 bytes + a copy per weight; d + k numbers per LoRA target."""
    held = sum(weight.numel() * (4 + weight.element_size()) for weight in plain.values())
    return held + sum(4 * (adapter.A.shape[1] + adapter.B.shape[0]) for adapter in adapters.values())


def pull(held: list[Well | AdapterWell], strength: float, measure: bool) -> Tensor | None:
    """Add strength * importance * (w - start) to every gradient.

    Returns, if it shall `measure`, [1/2 sum importance d^2, |importance d|^2, |gradient as found|^2], d = w - start, of
    this rank's shards and left on the device; else None.
    """
    figures = [figure for well in held for figure in well.add(strength, measure)]
    return torch.stack(figures).sum(0) if figures else None


def beside_task(strength: float, pull_square: float, task_square: float) -> dict[str, float]:
    """grad_ratio = |strength * pull| / |task gradient|; nothing where that is not finite, and fp16 skips the step."""
    if not math.isfinite(task_square):
        return {}
    return {"grad_ratio": strength * (pull_square / task_square) ** 0.5 if task_square else 0.0}


class Cut:
    """The same stretches of tensors of one shape that stay where they are; whole where they are not contiguous.

    The views are made once. Making them anew at every step took as long as a fifth of the arithmetic.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._found: tuple[int, bool] | None = None
        self._size = 0
        """Of a stretch; 0 where tensors are taken whole."""
        self._views: list[tuple[Tensor | None, ...]] = []

    def along(self, passing: Tensor) -> Iterator[tuple[Tensor | None, ...]]:
        """In turn: a stretch of `passing`, which may be another tensor each time; room for a temporary of its shape
        where that saves an allocation, else None; the stretches of the tensors."""
        passing = local(passing)
        found = local(self._tensors[0]).data_ptr(), passing.is_contiguous()
        if found != self._found:
            self._found, self._views = found, self._made(passing)
        stretches = passing.view(-1).split(self._size) if self._size else (passing,)
        for stretch, views in zip(stretches, self._views, strict=True):
            yield stretch, *views

    def _made(self, passing: Tensor) -> list[tuple[Tensor | None, ...]]:
        tensors = [local(tensor) for tensor in self._tensors]
        if not all(tensor.is_contiguous() for tensor in (passing, *tensors)):
            self._size = 0
            return [(None, *tensors)]
        on_cpu = all(tensor.device.type == "cpu" for tensor in (passing, *tensors))
        self._size = PIECE if on_cpu else DEVICE_PIECE
        cut = zip(*(tensor.view(-1).split(self._size) for tensor in tensors), strict=True)
        return [(scratch()[: len(views[0])] if on_cpu else None, *views) for views in cut]


@functools.cache
def scratch() -> Tensor:
    """Room for a temporary on a CPU, one for all, so that it stays in the cache."""
    return torch.empty(PIECE)


def inner(one: Tensor, other: Tensor) -> Tensor:
    """Sum of products in fp32: a scalar.

    Not `torch.dot`, which on a CPU rounds by where in memory the numbers lie: a resumed run would log other figures.
    """
    return (one.float() * other.float()).sum()
