"""The weights that training moves, under names that do not depend on who wrapped the model.

DDP, FSDP, torch.compile, checkpointing and PEFT each put a word of their own into parameter names. Penalties, memory
and checkpoints are matched by the *canonical* name, which has none of them; a name that matches nothing would be a
penalty of zero in silence, so anything below a full match is an error (`match`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import IncompatibleError

logger = logging.getLogger("hf_ftplus")

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_BASE_LAYER = re.compile(r"\.base_layer(?!(\.base_layer)*\.lora_)(?=\.|$)")
_ADAPTER_NAME = re.compile(r"\b(lora_(?:A|B|magnitude_vector))\.[^.]+(?=\.)")
_SAVED_MODULE = re.compile(r"\.modules_to_save\.[^.]+")


def canonical(name: str) -> str:
    """Parameter or module name without the words that DDP, FSDP, compile, checkpointing and PEFT put in.

    Adapters of two parameters of one module lie in one another (PEFT's `target_parameters`): those inside keep theirs.
    """
    parts = [part for part in _BASE_LAYER.sub("", name).split(".") if part not in _WRAPPERS]
    while parts and (parts[0] == "module" or parts[:2] == ["base_model", "model"]):
        parts = parts[1:] if parts[0] == "module" else parts[2:]
    return _SAVED_MODULE.sub("", _ADAPTER_NAME.sub(r"\1", ".".join(parts)))


def warn_of_16_bits(weights: dict[str, nn.Parameter], who: str, what: str) -> None:
    """Say what is lost where weights, and so their gradients, have no fp32 master."""
    half = sum(weight.dtype in (torch.bfloat16, torch.float16) for weight in weights.values())
    if half:
        logger.warning(
            "%s: %d of %d weights are kept in 16 bits, where %s; load the model in fp32 (--dtype float32), --bf16 can "
            "stay",
            *(who, half, len(weights), what),
        )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter, for every parameter that training moves; tied weights appear once.

    Raises:
        IncompatibleError: nothing is trainable, or two parameters share a canonical name.
    """
    found: dict[str, nn.Parameter] = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if canonical(name) in found:
            raise IncompatibleError(
                f"Two trainable weights are both called {canonical(name)!r}; expected one active adapter. "
                "Delete or freeze the other adapter."
            )
        found[canonical(name)] = weight
    if not found:
        raise IncompatibleError("No weight of the model is trainable; expected at least one with requires_grad.")
    return found


def full_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight, also where DeepSpeed ZeRO-3 keeps it in parts and shows none of it."""
    return getattr(weight, "ds_shape", weight.shape)


def ranks() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor (FSDP2), sharing its memory; any other tensor as it is."""
    with torch.no_grad():
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


def sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is a DTensor: FSDP2 holds a part of it on each rank."""
    return any(hasattr(tensor, "to_local") for tensor in tensors)


def over_shards(total: Tensor, weights: Iterable[Tensor]) -> Tensor:
    """What every rank found of its shards of `weights`, summed up in place; shards that several ranks hold alike (HSDP)
    count once. Of weights that are whole, `total` as it is.
    """
    first = next(iter(weights), None)
    for dimension, placement in enumerate(getattr(first, "placements", ())):
        if placement.is_shard():
            torch.distributed.all_reduce(total, group=first.device_mesh.get_group(dimension))
    return total


def match(expected: Iterable[str], found: Iterable[str], what: str) -> None:
    """Demand that two sets of names are equal.

    Raises:
        IncompatibleError: lists up to ten names that one side lacks.
    """
    expected, found = set(expected), set(found)
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        raise IncompatibleError(
            f"{what} fits {len(expected & found)} of {len(expected)} trainable weights of this model."
            + (f" Missing there: {_some(missing)}." if missing else "")
            + (f" Unknown here: {_some(extra)}." if extra else "")
            + " Use the model and adapter settings it was made with."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


@dataclass(frozen=True)
class Adapter:
    """One LoRA target: the layer computes W x + scale * B A x, with A [r, k], B [d, r] trained and W [d, k] frozen."""

    layer: nn.Module
    A: nn.Parameter
    B: nn.Parameter
    scale: float


def split(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Adapter]]:
    """Trainable weights of two kinds: those that are moved themselves, and LoRA targets that are moved through B A.

    Raises:
        IncompatibleError: a trainable weight belongs to an adapter whose change of the weight is not scale * B A
            (DoRA, experts of a mixture, AdaLoRA, OFT, IA3, prompt learning, ...), or the adapter is merged.
    """
    plain, adapters = trainable(model), lora(model)
    inside = {id(weight) for adapter in adapters.values() for weight in (adapter.A, adapter.B)}
    plain = {name: weight for name, weight in plain.items() if id(weight) not in inside}
    added = _added(model)
    strange = [name for name, weight in plain.items() if id(weight) in added or "lora_" in name]
    if strange or is_prompt_learning(model):
        raise IncompatibleError(
            f"The adapter trains {_some(strange) or 'a prompt'}, which does not change a weight by scale * B A (DoRA, "
            "LoRA bias, LoRA of a mixture's experts and adapters other than LoRA). Use plain LoRA or rsLoRA, or full "
            "fine-tuning."
        )
    return plain, adapters


def _added(model: nn.Module) -> set[int]:
    """Ids of what PEFT's layers add to a model; not of those that are trained in the place of weights of its own."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    layers = [layer for layer in layers if not isinstance(layer, (LNTuningLayer, TrainableTokensLayer))]
    parts = [getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names]
    return {id(weight) for part in parts if isinstance(part, nn.Module) for weight in part.parameters()}


def lora(model: nn.Module) -> dict[str, Adapter]:
    """Canonical module name -> LoRA target, for every layer with exactly one active, trainable, unmerged adapter."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    found = {}
    for name, layer in model.named_modules():
        active = [key for key in layer.active_adapters if key in layer.lora_A] if isinstance(layer, LoraLayer) else []
        if not active or not isinstance(layer.lora_A[active[0]], nn.Linear):
            continue  # AdaLoRA, convolutions, embeddings: `split` names what is left over
        if isinstance(layer, ParamWrapper) and not isinstance(layer.get_base_layer(), nn.Linear):
            continue  # of all experts of a mixture at once, say, of which no token sees the whole
        key = active[0]
        if not layer.lora_A[key].weight.requires_grad:
            continue
        if len(active) > 1 or layer.merged:
            raise IncompatibleError(
                f"{canonical(name)} has {'a merged adapter' if layer.merged else f'{len(active)} active adapters'}; "
                "expected one, unmerged. Call model.unmerge_adapter(), or model.set_adapter(NAME)."
            )
        if layer.lora_variant.get(key) is not None:
            continue  # DoRA and its like
        found[canonical(name)] = Adapter(layer, layer.lora_A[key].weight, layer.lora_B[key].weight, layer.scaling[key])
    return found


def is_prompt_learning(model: nn.Module) -> bool:
    """Whether an adapter puts virtual tokens before those of each row."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
