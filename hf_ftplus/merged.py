"""Put an adapter into its base: one model that needs neither PEFT nor us."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .data import reason
from .errors import IncompatibleError, StorageError, UsageError
from .evaluation.found import as_found
from .trained import base_of, load

PROBE = 64
"""Tokens on which the merged model is compared with base and adapter."""
ROUNDING = 32
"""Rounding errors of the weights' precision, relative to the largest logit, that merging may make. A weight is rounded
once more when B A is added to it; 32 layers of such errors, all of one sign, come to as much."""


@dataclass(frozen=True)
class Merged:
    """What was written, and how far its logits are from those of base and adapter."""

    folder: Path
    weights: int
    difference: float
    largest: float


def merge(name: str, out: Path, dtype: str = "auto", device: str | None = None) -> Merged:
    """Write base + adapter of the folder `name` to `out`, after proof that it says the same.

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
    ids = torch.arange(PROBE).remainder(it.model.config.get_text_config().vocab_size)[None].to(it.model.device)
    with as_found(it.model):
        before = it.model(input_ids=ids).logits.float()
        try:
            whole = it.model.merge_and_unload(safe_merge=True)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            kind = it.model.active_peft_config.peft_type.value
            raise IncompatibleError(f"The adapter of {name} ({kind}) cannot be merged: {reason(error)}") from error
        after = whole.eval()(input_ids=ids).logits.float()
    difference, largest = (after - before).abs().max().item(), before.abs().max().item()
    if not difference <= ROUNDING * torch.finfo(whole.dtype).eps * largest:
        raise IncompatibleError(
            f"The merged model differs from base and adapter by {difference:.3g} in a logit (the largest is "
            f"{largest:.3g}), more than {whole.dtype} rounds away. Nothing was written. Try --dtype float32."
        )
    if getattr(whole, "peft_config", None) is not None:
        del whole.peft_config
    try:
        whole.save_pretrained(out)
        it.tokenizer.save_pretrained(out)
    except OSError as error:
        raise StorageError(f"--out {out} cannot be written: {error.strerror or error}. Choose another.") from error
    return Merged(out, sum(weight.numel() for weight in whole.parameters()), difference, largest)
