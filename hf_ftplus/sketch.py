"""Tell whether two models have the same weights, from a few numbers of each: memory is for one model only.

A sketch holds up to 64 elements of every weight, at fixed places. The same weights saved in bf16 are the same sketch
rounded to bf16, element by element. Weights that trained on are not, so no difference is allowed: a step of AdamW at
1e-5 is far below what bf16 can show of most weights, and yet carries some across a rounding border. On the demo model
(17,408 elements) its bf16 copy differs in none; after one such step all differ in fp32, 933 of them in bf16 still, and
299 where training itself is in bf16.

What a LoRA adapter adds to its weight, scale * B A, is kept beside the weight: an adapter is the same on its base, in
any precision of that base, and merged into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .weights import canonical, full_shape, local

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

Sketch = dict[str, Tensor]
EMPTY = torch.empty(0)

ELEMENTS = 64
"""Of each weight; 17,000 numbers for a model of 272 weights."""
CHANGE = " + scale * B A"
"""Follows the name of the weight that an adapter changes."""
MERGING = 0.01
"""Share of a change, and of a tenth of the largest, that merging may round away: in bf16 PEFT rounds B A and its
product with scale to 2^-9 each, and TF32 rounds every term to 2^-11."""


class Comparison(NamedTuple):
    """How many of the sampled weights differ."""

    differing: int
    sampled: int
    precision: torch.dtype
    """In which they were compared: the coarser of the two models'."""


def sketch(model: nn.Module) -> Sketch:
    """Some elements of every weight by canonical name, in fp32 on the CPU; every rank must call it, if sharded."""
    found: Sketch = {}
    factors: set[int] = set()
    for name, layer in model.named_modules():
        for key in getattr(layer, "lora_A", ()):
            if not isinstance(layer.lora_A[key], nn.Linear) or layer.lora_variant.get(key) is not None:
                continue  # DoRA and its like: their factors are weights as any other
            factors |= {id(layer.lora_A[key].weight), id(layer.lora_B[key].weight)}
            change = _change(layer, key)
            if key in layer.active_adapters and key not in layer.merged_adapters and change.any():
                changed = f"{canonical(name)}.weight{CHANGE}"
                found[changed] = found.get(changed, 0) + change
    for name, weight in model.named_parameters():
        if id(weight) not in factors and ".original_module." not in name and full_shape(weight).numel():
            found[canonical(name)] = _elements(weight, _places(full_shape(weight)))
    return found


def compare(then: Sketch, now: Sketch) -> Comparison:
    """None differ if `now` is the model of `then`: saved, loaded, wrapped, sharded or merged since, but not trained."""
    if not _compare(_base(then), _base(now)).differing:
        return _compare(then, now)  # nothing was merged, so nothing is to be excused
    (one, here), (other, there) = _merged(then), _merged(now)
    return _compare(one, other, here, there)


def _compare(then: Sketch, now: Sketch, *doubts: Sketch) -> Comparison:
    """Element by element, in the coarser precision; `doubts` are differences that merging excuses."""
    kind = next(
        (kind for kind in (torch.bfloat16, torch.float16) if _fits(then, kind) or _fits(now, kind)), torch.float32
    )
    differing = sampled = 0
    for name in {**then, **now}:
        one, other = then.get(name, EMPTY), now.get(name, EMPTY)
        sampled += max(len(one), len(other))
        if one.shape != other.shape:
            differing += max(len(one), len(other))
            continue
        slack = sum(doubt[name] for doubt in doubts if name in doubt)
        precision = torch.float32 if name.endswith(CHANGE) else kind
        low, high, found = (part.to(precision) for part in (one - slack, one + slack, other))  # rounding keeps order
        differing += int((~((low <= found) & (found <= high))).sum())
    return Comparison(differing, sampled, kind)


def _fits(sketch: Sketch, kind: torch.dtype) -> bool:
    """Whether no weight says more than `kind` can: the model is, or was once saved, in that precision."""
    return all(torch.equal(part.to(kind).float(), part) for part in _base(sketch).values())


def _base(sketch: Sketch) -> Sketch:
    """The weights below the adapters."""
    return {name: part for name, part in sketch.items() if not name.endswith(CHANGE)}


def _merged(sketch: Sketch) -> tuple[Sketch, Sketch]:
    """The same model with its adapters merged, and by how much that rounds."""
    merged, doubt = _base(sketch), {}
    for name, change in sketch.items():
        weight = name.removesuffix(CHANGE)
        if weight != name and weight in merged and merged[weight].shape == change.shape:
            size = change.abs()
            merged[weight], doubt[weight] = merged[weight] + change, MERGING * size.clamp(min=size.max() / 10)
    return merged, doubt


def _change(layer: LoraLayer, key: str) -> Tensor:
    """What one adapter adds to the sampled elements of its weight."""
    A, B = layer.lora_A[key].weight, layer.lora_B[key].weight
    turned = getattr(layer, "fan_in_fan_out", False)  # GPT-2 keeps its weights as [in, out]
    (r, k), (d, _) = full_shape(A), full_shape(B)
    row, column = reversed(_places((k, d))) if turned else _places((d, k))
    rank = torch.arange(r).repeat(len(row))
    left = _elements(B, (row.repeat_interleave(r), rank))
    right = _elements(A, (rank, column.repeat_interleave(r)))
    return layer.scaling[key] * (left * right).view(len(row), -1).sum(1)


def _places(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Indices of the elements looked at, spread by the golden ratio so that they share no row or column."""
    size = torch.Size(shape).numel()
    steps = torch.arange(min(ELEMENTS, size), dtype=torch.float64)
    flat = steps if size <= ELEMENTS else steps * ((5**0.5 - 1) / 2) % 1 * size
    return torch.unravel_index(flat.long(), shape) if shape else ()


def _elements(weight: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    """`weight[index]` in fp32 on the CPU; what another rank's shard holds comes from there."""
    if hasattr(weight, "ds_shape"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([weight]):  # of ZeRO-3
            return local(weight)[tuple(index)].float().reshape(-1).cpu()
    part = local(weight)
    if not hasattr(weight, "to_local"):
        return part[tuple(index)].float().reshape(-1).cpu()
    (chunk,) = weight.__create_chunk_list__()
    index = [places - offset for places, offset in zip(index, chunk.offsets, strict=True)]
    inside = [(places >= 0) & (places < size) for places, size in zip(index, chunk.sizes, strict=True)]
    here = torch.stack(inside).all(0)
    found = torch.full((len(here),), -torch.inf, device=part.device)
    found[here.to(part.device)] = part[tuple(places[here] for places in index)].float()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.cpu()
