"""Put an adapter into its base: one model that needs neither PEFT nor us."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data import reason
from .errors import IncompatibleError, StorageError, UsageError
from .evaluation.found import as_found
from .trained import base_of, load

PROBE = 64
"""Tokens on which the merged model is compared with base and adapter."""
MISSING = 1e-3
"""Part of what the adapter does to the logits that may be lost while all weights are fp32: one of 100 layers that is
left out is more."""
ROUNDING = 32 * torch.finfo(torch.float32).eps
"""Of the largest logit, what fp32 may round away: it shows where the adapter does next to nothing."""


@dataclass(frozen=True)
class Merged:
    """What was written."""

    folder: Path
    weights: int
    difference: float
    """How far its logits are at most from those of base and adapter in fp32: what its precision rounds away."""
    moved: float
    """How far the adapter had moved the base's logits at most."""


def merge(name: str, out: Path, dtype: str = "auto", device: str | None = None) -> Merged:
    """Write base + adapter of the folder `name` to `out`, after proof that it says the same.

    Merged and proven in fp32, and rounded to `dtype` ("auto": as the base was saved) once, at the end.

    Raises:
        UsageError: there is no adapter in `name`.
        IncompatibleError: the adapter cannot be merged, or the merged model says something else.
        StorageError: `out` holds something, or cannot be written.
    """
    if base_of(name) is None:
        raise UsageError(f"{name} holds no adapter (adapter_config.json): nothing to merge.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"--out {out} is not an empty folder. Choose another.")
    it = load(name, dtype, device)
    if getattr(it.model.config, "quantization_config", None):
        raise IncompatibleError(
            f"The base of {name}, {base_of(name)}, is quantised; what is merged into it would be rounded to a few "
            "bits. Name the unquantised model as base_model_name_or_path in adapter_config.json."
        )
    precision = {_plain(key): weight.dtype for key, weight in it.model.named_parameters()}
    kept = it.model.get_base_model().dtype
    _round(it.model, {}, torch.float32)
    ids = torch.arange(PROBE).remainder(it.model.config.get_text_config().vocab_size)[None].to(it.model.device)
    with as_found(it.model):
        wanted = _logits(it.model, ids)
        with it.model.disable_adapter():
            moved = _apart(_logits(it.model, ids), wanted)
        whole = _merged(it.model, name)
        lost = _apart(_logits(whole, ids), wanted)
        if not lost <= MISSING * moved + ROUNDING * wanted.abs().max().item():
            raise IncompatibleError(
                f"The merged model differs from base and adapter by {lost:.3g} in a logit, where the adapter itself "
                f"moved none by more than {moved:.3g}; expected next to no difference. Nothing was written. Serve the "
                "adapter with PEFT instead."
            )
        _round(whole, precision, kept)
        difference = _apart(_logits(whole, ids), wanted)
    if moved and not difference < moved:
        raise IncompatibleError(
            f"Rounding the merged weights to {whole.dtype} moves the logits by {difference:.3g}, more than the adapter "
            f"did ({moved:.3g}). Nothing was written. Type --dtype float32."
        )
    if getattr(whole, "peft_config", None) is not None:
        del whole.peft_config
    try:
        whole.save_pretrained(out)
        it.tokenizer.save_pretrained(out)
    except OSError as error:
        raise StorageError(f"--out {out} cannot be written: {error.strerror or error}. Choose another.") from error
    return Merged(out, sum(weight.numel() for weight in whole.parameters()), difference, moved)


def _merged(model: Any, name: str) -> Any:
    try:
        return model.merge_and_unload(safe_merge=True).eval()
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        kind = model.active_peft_config.peft_type.value
        raise IncompatibleError(f"The adapter of {name} ({kind}) cannot be merged: {reason(error)}") from error


def _plain(name: str) -> str:
    """The name that a weight of the base has without PEFT's wrappers."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")


def _round(model: nn.Module, precision: dict[str, torch.dtype], otherwise: torch.dtype) -> None:
    """Give every weight the precision of its name; buffers stay as they are."""
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(precision.get(name, otherwise))


def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits[:, -ids.shape[1] :].float()  # without those of virtual tokens


def _apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()
