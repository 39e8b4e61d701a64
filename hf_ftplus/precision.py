"""Mixed precision as the Trainer has it: for forward passes of our own, and the loss scale of fp16."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers import TrainingArguments


def autocast(args: TrainingArguments) -> Callable[[], AbstractContextManager]:
    """Mixed precision for forward passes of our own, as in training: what was measured before it compares with after.

    Under fp16, too, where nobody scales the gradients of the Fisher pass: those of single tokens are large enough.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)  # accelerate's, too
    return partial(torch.autocast, args.device.type, dtype) if dtype else nullcontext


def scale_of(optimizer: Any) -> float | None:
    """fp16's loss scale; None without one. Waits for the device."""
    scaler = getattr(optimizer, "scaler", None)
    return None if scaler is None else scaler.get_scale()


def unscale(optimizer: Any) -> None:
    """Take fp16's loss scale off the gradients, if the Trainer has not done so to clip or to measure them."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None:
        try:
            scaler.unscale_(optimizer.optimizer)
        except RuntimeError as error:
            if "already been called" not in str(error):
                raise
