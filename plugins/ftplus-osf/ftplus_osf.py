"""Fine-tune beside what the weights do most: the top singular directions of every matrix stay exactly as they are.

    W = U S V + rest,   U [d, r], V [r, k] the top r directions          after every step:   U^T W = S V,   W V^T = U S

That is orthogonal subspace fine-tuning (Nayak et al. 2025, "Sculpting Subspaces", arXiv:2504.07097). To project the
gradient, as PEFT's OSF does, is not enough: Adam rescales it element by element, which turns it back into the frozen
directions, and weight decay shrinks them. So it is the weight that is put back, after `optimizer.step()`.

- full fine-tuning: every Linear but the LM head. No SVD parametrisation is trained: all weights with the two equations
  above are exactly those that U_low S_low V_low can reach, so pinning W gives the same model at the memory of W.
- a fresh LoRA or rsLoRA: B stays orthogonal to U, A to V, so that the change B A touches neither (as OPLoRA,
  arXiv:2510.13003, has it in the forward pass).
- PEFT's `OSFConfig`: U_low and V_low are put back to where their projected gradients would have kept them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from hf_ftplus import Run, Strategy, hookimpl, setting
from hf_ftplus.errors import IncompatibleError

if TYPE_CHECKING:
    from torch import Tensor, nn

ftplus_api = 1


# ---- the projections -------------------------------------------------------------------------------------------------


def top(weight: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """The top `share` of the singular triples of W [d, k], at least one: U [d, r], S [r], V [r, k], in fp32."""
    import torch

    left, values, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    rank = max(1, round(share * len(values)))
    return left[:, :rank].contiguous(), values[:rank].contiguous(), right[:rank].contiguous()


def pin(weight: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """Change W, in place, as little as makes U^T W = S V and W V^T = U S; returns the squared norm of the change."""
    whole = weight.float()
    rows = left.T @ whole - values[:, None] * right
    whole = whole - left @ rows
    columns = whole @ right.T - left * values  # what the first line did stays: U^T columns = 0
    weight.copy_(whole - columns @ right)
    return rows.square().sum() + columns.square().sum()


def clear(factor: Tensor, directions: Tensor) -> Tensor:
    """Take what lies along orthonormal `directions` [r, k] out of the rows of `factor` [n, k], in place; its square."""
    inside = factor.float() @ directions.T
    factor.copy_(factor.float() - inside @ directions)
    return inside.square().sum()


# ---- when ------------------------------------------------------------------------------------------------------------


@dataclass
class OSF(Strategy):
    """Orthogonal subspace fine-tuning: what the weights do most stays exactly as it is; needs nothing to protect."""

    name: ClassVar[str] = "osf"
    judged: ClassVar[dict] = {"from_start": False}  # weights go back after the very first step

    share: float = setting(
        0.5,
        "share of the singular directions of each matrix that stay; more keeps more and learns less; 0 lets all move. "
        "Of an OSFConfig, its effective_rank says it",
        low=0,
        high=1,
    )

    def refuse(self, run: Run | None) -> None:
        """Adapters whose change of a weight is neither B A nor PEFT's OSF, trained ones, and shards."""
        if run is None or self.share == 0:
            return
        _refuse_shards(run)
        if _osf_layers(run.model):
            return
        from hf_ftplus.weights import split

        _, adapters = split(run.model)
        if next(_matrices(run.model), None) is None:
            raise IncompatibleError(
                f"osf keeps directions of linear layers, and none of {type(run.model).__name__} trains beside the LM "
                "head. Fine-tune all weights, or use LoRA on linear layers: --lora_target_modules all-linear."
            )
        trained = [name for name, adapter in adapters.items() if adapter.B.detach().any()]
        if trained:
            raise IncompatibleError(
                f"osf keeps the change of an adapter away from frozen directions from its first step on, but "
                f"{trained[0]} was trained without that. Merge it (ftplus merge) and begin a fresh one."
            )

    def preview(self, run: Run) -> dict[str, float]:
        """Bytes of the directions that stay."""
        if self.share == 0 or _osf_layers(run.model):
            return {"bytes": 0.0}
        shapes = [matrix.shape for _, matrix in _matrices(run.model)]
        return {"bytes": 4.0 * sum((d + k + 1) * max(1, round(self.share * min(d, k))) for d, k in shapes)}

    def prepare(self, run: Run) -> None:
        self.refuse(run)
        self._directions: dict[str, Tensor] = {}
        if self.share and not _osf_layers(run.model):
            self._directions = _decomposed(_matrices(run.model), self.share)
        self._bind(run)

    def after_step(self, run: Run) -> None:
        """Put back what the optimizer moved inside the frozen directions."""
        if not self._pins:
            return
        removed = sum(pinned() for pinned in self._pins)
        self._removed = removed if run.measuring else self._removed

    def metrics(self) -> dict[str, float]:
        """`removed`: norm of what the last optimizer step put into frozen directions, and was put back."""
        return {} if self._removed is None else {"removed": float(self._removed) ** 0.5}

    def state_dict(self) -> dict[str, Tensor]:
        # below an adapter the frozen matrix is still there to take them from
        return {} if self._adapted else dict(self._directions)

    def load_state_dict(self, state: dict[str, Tensor], run: Run) -> None:
        _refuse_shards(run)
        self._directions = {name: tensor.to(run.device) for name, tensor in state.items()}
        if self.share and not state and not _osf_layers(run.model):
            self._directions = _decomposed(_matrices(run.model), self.share)
        self._bind(run)

    def _bind(self, run: Run) -> None:
        """What is to be done after each step, in order."""
        from hf_ftplus.weights import lora

        self._removed, self._pins, self._adapted = None, [], False
        if self.share == 0:
            return
        layers, adapters = _osf_layers(run.model), lora(run.model)
        self._adapted = bool(layers or adapters)
        pins: list[Callable[[], Tensor]] = []
        for layer, key in layers:
            pins += [partial(_put_back, layer, key, factor) for factor in ("U_low", "V_low")]
        for name, weight in () if layers else _matrices(run.model):
            left, values, right = (self._directions[f"{part}.{name}"] for part in ("left", "values", "right"))
            if name in adapters:
                pins += [partial(clear, adapters[name].B.T, left.T), partial(clear, adapters[name].A, right)]
            else:
                pins.append(partial(pin, weight, left, values, right))
        self._pins = pins


# ---- matrices --------------------------------------------------------------------------------------------------------


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Canonical module name and W [d, k] of every Linear (or GPT-2's Conv1D) that training moves, itself or through
    B A; not the LM head.

    One at a time: below an adapter it may be packed to a few bits, and all of them unpacked are a second model.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from hf_ftplus.logits import causal_lm
    from hf_ftplus.weights import canonical, lora

    head = causal_lm(model).get_output_embeddings()
    for name, adapter in lora(model).items():
        frozen = _frozen(adapter.layer.get_base_layer())
        yield name, frozen.T if adapter.layer.fan_in_fan_out else frozen
    for name, layer in model.named_modules():
        fits = isinstance(layer, (nn.Linear, Conv1D)) and layer is not head and "lora_" not in name
        if fits and layer.weight.requires_grad:
            yield canonical(name), layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def _frozen(layer: nn.Module) -> Tensor:
    """The weight below an adapter, also of one that is packed to a few bits."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer)


def _decomposed(matrices: Iterable[tuple[str, Tensor]], share: float) -> dict[str, Tensor]:
    """`left.NAME`, `values.NAME` and `right.NAME` of every matrix, the same on every rank."""
    import torch.distributed as dist

    found = {}
    for name, weight in matrices:
        for part, tensor in zip(("left", "values", "right"), top(weight, share), strict=True):
            if dist.is_initialized():
                dist.broadcast(tensor, src=0)  # an SVD has signs to choose
            found[f"{part}.{name}"] = tensor
    return found


def _osf_layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Layers of PEFT's OSF, each with its active adapter."""
    from peft.tuners.osf.layer import OSFLayer

    return [
        (layer, key)
        for layer in model.modules()
        if isinstance(layer, OSFLayer)
        for key in layer.active_adapters
        if key in layer.osf_svd_params
    ]


def _put_back(layer: nn.Module, key: str, factor: str) -> Tensor:
    """Project U_low [d, n] or V_low [n, k] of PEFT's OSF out of the frozen directions; the square of what was there.

    From 0.21 on PEFT keeps the frozen directions only of the factor that is not square; of the other, what it began
    with spans all the rest.
    """
    part = factor[0]
    held = getattr(layer, f"_osf_{part}_high")
    weight = layer.osf_svd_params[key][factor]
    rows = weight.T if part == "U" else weight
    if key in held:
        return clear(rows, (held[key].T if part == "U" else held[key]).float())
    began = getattr(layer, f"_osf_{part}_low_init")[key]
    basis = (began.T if part == "U" else began).float()
    inside = rows.float() @ basis.T @ basis
    removed = (rows.float() - inside).square().sum()
    rows.copy_(inside)
    return removed


def _refuse_shards(run: Run) -> None:
    from hf_ftplus.weights import sharded

    if sharded(run.weights.values()):
        raise IncompatibleError(
            "osf needs whole matrices, but under FSDP2 the rows of each live on different ranks. Train under DDP "
            "(--accelerate_config multi_gpu)."
        )


@hookimpl
def ftplus_strategies() -> list[type[Strategy]]:
    return [OSF]
