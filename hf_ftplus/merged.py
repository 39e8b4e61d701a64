"""Put an adapter into its base: one model that needs neither PEFT nor us."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .disk import refuse_full
from .errors import IncompatibleError, StorageError, UsageError, reason
from .evaluation.found import as_found
from .logits import positions
from .trained import Trained, base_of, load, weights

PROBE = 64
"""Tokens on which the merged model is compared with base and adapter, spread over the vocabulary: an adapter may have
changed the embeddings of the last ones alone."""
MISSING = 1e-3
"""Part of what the adapter does to the logits that may be lost while all weights are fp32: one of 100 layers that is
left out is more."""
ROUNDING = 32 * torch.finfo(torch.float32).eps
"""Of the largest logit, what fp32 may round away: it shows where the adapter does next to nothing."""
ROUNDED_AWAY = 0.5
"""Part of what the adapter does to the logits that rounding the merged weights may move. An adapter that rounding
swallows whole stands at 1, give or take what fp32 rounds."""


@dataclass(frozen=True)
class Merged:
    """What was written."""

    folder: Path
    weights: int
    dtype: str
    """Of most weights."""
    moved: float
    """How far the adapter had moved the base's logits at most."""
    rounded: float
    """How far they went when the merged weights were rounded. All logits are computed in fp32: few bits there would add
    to it."""

    @property
    def lost(self) -> float:
        """Beside what the adapter had done."""
        return self.rounded / self.moved if self.moved else 0.0


class RoundedAwayError(IncompatibleError):
    """Few bits would lose too much of what an adapter did."""

    def __init__(self, message: str, merged: Merged | None = None) -> None:
        super().__init__(message)
        self.merged = merged
        """What would have been written."""


def merge(
    name: str, out: Path, dtype: str = "auto", device: str | None = None, tolerance: float = ROUNDED_AWAY
) -> Merged:
    """Write base + adapter of the folder `name` to `out`, after proof that it says the same.

    Merged and proven in fp32, and its weights rounded to `dtype` ("auto": as the base was saved) once, at the end.

    Args:
        name: the folder of an adapter.
        out: an empty folder, or none.
        dtype: of the weights that are written.
        device: where it is merged; the accelerator if there is one, if left out.
        tolerance: how far rounding may move the logits, as a part of how far the adapter did.

    Raises:
        UsageError: there is no adapter in `name`.
        RoundedAwayError: it would move them by more.
        IncompatibleError: the adapter cannot be merged, or the merged model says something else.
        StorageError: `out` holds something, or cannot be written.
    """
    if base_of(name) is None:
        found = "holds no adapter (adapter_config.json)" if os.path.isdir(name) or "/" in name else "is no folder"
        raise UsageError(f"{name} {found}: nothing to merge. Expected what `ftplus sft --use_peft` wrote.")
    refuse_full(out)
    it = load(name, "auto", device)  # rounded once: when all is added up
    if getattr(it.model.config, "quantization_config", None):
        raise IncompatibleError(
            f"The base of {name}, {base_of(name)}, is quantised; what is merged into it would be rounded to a few "
            "bits. Name the unquantised model as base_model_name_or_path in adapter_config.json."
        )
    own = it.model.get_base_model().dtype
    kept = own if dtype == "auto" else getattr(torch, dtype)
    each = {_plain(key): weight.dtype for key, weight in it.model.named_parameters()}
    held = set(getattr(it.model.get_base_model(), "_keep_in_fp32_modules_strict", None) or ())
    precision = {
        key: found if found != own or held.intersection(key.split(".")) else kept for key, found in each.items()
    }
    whole, moved, rounded = _proven(it, name, precision, kept)
    size, bits = sum(weight.numel() for weight in whole.parameters()), str(kept).removeprefix("torch.")
    done = Merged(out, size, bits, moved, rounded)
    if not done.lost < tolerance:
        raise RoundedAwayError(
            f"Rounding the merged weights to {bits} moves the logits by {rounded:.3g}, where the adapter did by "
            f"{moved:.3g}: too much of it would be lost. Nothing was written. Type --dtype float32.",
            done,
        )
    if getattr(whole, "peft_config", None) is not None:
        del whole.peft_config
    with _removed_after_an_error(out):
        whole.save_pretrained(out)
        it.tokenizer.save_pretrained(out)
        _check_what_was_written(whole, out)
    return done


def _proven(it: Trained, name: str, precision: dict[str, torch.dtype], kept: torch.dtype) -> tuple[Any, float, float]:
    """The merged model, rounded; by how much the adapter moved its logits, and by how much rounding did.

    Raises:
        IncompatibleError: it says something else than base and adapter.
    """
    _round(it.model, {}, torch.float32)
    last = it.model.get_input_embeddings().weight.shape[0] - 1
    ids = torch.linspace(0, last, min(PROBE, positions(it.model))).long()[None].to(it.model.device)
    with as_found(it.model), _whole_products():
        wanted = _logits(it.model, ids)
        with it.model.disable_adapter():
            moved = _apart(_logits(it.model, ids), wanted)
        whole = _merged(it.model, name)
        exact = _logits(whole, ids)
        lost = _apart(exact, wanted)
        if not lost <= MISSING * moved + ROUNDING * wanted.abs().max().item():
            raise IncompatibleError(
                f"The merged model differs from base and adapter by {lost:.3g} in a logit, where the adapter itself "
                f"moved none by more than {moved:.3g}; expected next to no difference. Nothing was written. Serve the "
                "adapter with PEFT instead."
            )
        _round(whole, precision, kept)
        _round(whole, {}, torch.float32)  # for the figure alone: what was rounded off is gone
        rounded = _apart(_logits(whole, ids), exact)
        _round(whole, precision, kept)
    return whole, moved, rounded


@contextmanager
def _whole_products() -> Iterator[None]:
    """Matrix products in fp32 throughout, where TF32 would round what is compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _removed_after_an_error(out: Path) -> Iterator[None]:
    """Nothing that was refused stays in the folder, which was empty before, or was not there."""
    there = out.exists()
    try:
        yield
    except BaseException as error:
        for path in out.iterdir() if out.is_dir() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if out.is_dir() and not there:
            out.rmdir()
        if isinstance(error, OSError):
            raise StorageError(f"--out {out} cannot be written: {error.strerror or error}. Choose another.") from error
        raise


def _check_what_was_written(whole: nn.Module, out: Path) -> None:
    """Read the model back: saving ties, splits and renames weights, and must not lose any."""
    wanted, there = whole.state_dict(), weights(str(out)).state_dict()
    names = wanted.keys() | there.keys()
    lost = [name for name in sorted(names) if not _same(wanted.get(name), there.get(name))]
    if lost:
        raise IncompatibleError(
            f"{len(lost)} of {len(names)} weights are read back from {out} otherwise than they were merged, such as "
            f"{lost[0]}. Nothing was left there. Serve the adapter with PEFT instead."
        )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Equal in value: a base that mixes precisions may be read in the wider one."""
    return one is not None and other is not None and torch.equal(one.cpu().double(), other.cpu().double())


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
