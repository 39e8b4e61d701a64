"""Estimate once what EWC needs to protect a model, for whoever trains it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from ..callback import StrategyCallback
from ..disk import refuse_full
from ..model import to_train
from ..specs import TaskSpec, parse_all
from ..strategies.ewc import EWC
from ..strategy import Memory
from ..trained import load
from . import base
from .base import Base

STORED = {"full": torch.bfloat16, "lora": torch.float32}
"""Importances of single weights need their size, not their digits: rounding changes each by 0.4 % at most."""


def make(
    model: str,
    protect: list[str],
    folder: Path,
    *,
    form: str = "full",
    rows: int = 256,
    max_length: int = 1024,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str | None = None,
    bf16: bool = False,
    seed: int = 0,
) -> Base:
    """Estimate the importances of EWC on protect data and write them into `folder`.

    Args:
        model: a folder, a Hub name, or demo; no adapter.
        protect: as for `--protect`.
        form: `full`: two bytes for each weight, for full fine-tuning and for adapters on any layer. `lora`: row and
            column sums of every linear layer, d + k numbers for d x k weights, for adapters alone.
        rows, max_length, batch_size: of the protect data, up to 4 in a batch; smaller batches are steadier.

    Raises:
        StorageError: the folder holds something, or cannot be made.
        DataError, UsageError: no such model or data.
    """
    specs = parse_all(protect)
    refuse_full(folder)
    to_train(model)
    found = load(model, dtype, device)
    args = TrainingArguments(
        str(folder), use_cpu=found.model.device.type == "cpu", bf16=bf16, seed=seed, report_to="none",
        per_device_train_batch_size=batch_size,
    )  # fmt: skip
    args.max_length = max_length  # as TRL's arguments have it
    ewc = EWC(rows=rows, remember=False)
    callback = StrategyCallback(ewc, protect={spec.name: spec for spec in specs})
    run = callback.setup(adapted(found.model) if form == "lora" else found.model, args, found.tokenizer, None)
    ewc.prepare(run)
    importance = {name: tensor.to(STORED[form]) for name, tensor in ewc.importance.items()}
    Memory(write=folder).save(ewc.name, importance, run)
    used = {name: min(rows, sum(len(batch["labels"]) for batch in part)) for name, part in run.protect.items()}
    words = tuple(f"{public(spec)}, {used[spec.name]} rows" for spec in specs)
    known = base.look(model, form=form, protect=words)
    base.write(folder, known)
    return known


def public(spec: TaskSpec) -> TaskSpec:
    """What protects, as others may read it: of a file of one's own only the name."""
    source = Path(spec.source).expanduser()
    return replace(spec, source=source.name) if source.exists() else spec


def adapted(model: Any) -> Any:
    """The model with the smallest adapter that covers every linear layer: EWC then keeps sums over rows and columns."""
    return get_peft_model(model, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
