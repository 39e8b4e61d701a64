"""Which run a checkpoint is of: compared before a Trainer loads any of it, for most of what differs it would not see.

Same shapes with another base model, tokenizer, adapter, order of rows or size of batches all load, and train on to
something that neither run would have become.
"""

from __future__ import annotations

import hashlib
import json
import logging
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from .errors import IncompatibleError
from .generate import tokenizer_fingerprint
from .sketch import sketch
from .state import identity, same_identity
from .weights import canonical

logger = logging.getLogger("hf_ftplus")

ROWS = 64
"""Training rows that are compared, spread over all of them."""
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
SAID = {
    "tokenizer": "another tokenizer or chat template",
    "frozen": "other weights below the adapter (another base model, or another dtype)",
    "rows": "other training rows, or another number or order of them",
    "seed": "another seed",
    "batch": "another number of rows per step",
}


def origin(trainer: Any) -> dict[str, Any]:
    """What a checkpoint of this trainer keeps about its run; asked before anything is loaded or wrapped."""
    args, tokenizer = trainer.args, getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    placed = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # weights may not be there yet
    return {
        "model": identity(trainer.model),
        "frozen": None if placed else frozen(trainer.model),
        "tokenizer": tokenizer_fingerprint(tokenizer) if hasattr(tokenizer, "special_tokens_map") else None,
        "rows": rows(trainer.train_dataset, getattr(trainer.ftplus, "learn_rows", None)),
        "seed": [args.seed, args.data_seed],
        "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "split": [args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size],
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def frozen(model: torch.nn.Module) -> str | None:
    """Digest of some elements of each weight that a checkpoint does not bring; None where it brings all."""
    held = {canonical(name): weight.dtype for name, weight in model.named_parameters() if not weight.requires_grad}
    if not held or not getattr(model, "peft_config", None):  # without an adapter frozen weights are saved, too
        return None
    found = hashlib.sha256()
    for name, part in sorted(sketch(model).items()):
        if name in held and held[name].is_floating_point:
            found.update(f"{name} {held[name]}\n".encode() + part.numpy().tobytes())
    return found.hexdigest()


def rows(dataset: Any, first: int | None = None) -> dict[str, Any] | None:
    """Number and digest of the (first) rows of a dataset; None for a stream, or for what is not of `datasets`."""
    if not isinstance(dataset, Dataset):
        return None
    count = min(len(dataset), first or len(dataset))
    found, table = hashlib.sha256(), dataset.with_format("arrow")
    for place in sorted({i * (count - 1) // max(ROWS - 1, 1) for i in range(ROWS)}) if count else ():
        found.update(json.dumps(table[place : place + 1].to_pylist(), default=repr, sort_keys=True).encode())
    return {"count": count, "digest": found.hexdigest()}


def refuse_other(then: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """Raise where a checkpoint is not of the run that is to go on from it.

    Args:
        then: what `origin` gave when it was written; empty if it was not asked.
        now: the same of the run.

    Raises:
        IncompatibleError: names what differs, and both ways on.
    """
    if not then:
        return
    if "model" in then:
        same_identity(then["model"], now["model"], checkpoint)
    differ = [key for key in SAID if then.get(key) is not None and now[key] is not None and then[key] != now[key]]
    if differ:
        raise IncompatibleError(
            f"{checkpoint} was written with {'; '.join(_said(key, then[key], now[key]) for key in differ)}. Put back "
            f"what it was to go on, or start a new run from its weights: --model_name_or_path {checkpoint}"
        )
    before = then.get("versions", {})
    notes = [] if then.get("split") == now["split"] else ["the rows of a step shared out otherwise"]
    changed = {name: found for name, found in now["versions"].items() if before.get(name) != found}
    notes += [f"{name} {before.get(name)}, not {found}" for name, found in changed.items()]
    if notes:
        logger.warning("%s was written with %s: the run goes on, but not bit for bit.", checkpoint, ", ".join(notes))


def _said(key: str, then: Any, now: Any) -> str:
    if key in ("seed", "batch"):
        return f"{SAID[key]} ({then} there, {now} here)"
    if key == "rows" and then.get("count") != now["count"]:
        return f"{SAID[key]} ({then.get('count')} there, {now['count']} here)"
    return SAID[key]
