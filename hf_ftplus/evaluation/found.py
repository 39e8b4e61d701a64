"""Use a model for measuring and give it back exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..generate import private_rng
from ..logits import causal_lm


def bare(model: nn.Module) -> nn.Module:
    """The Hugging Face or PEFT model inside torch.compile and DDP: the one whose hooks fire and that can generate."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its input; with a device map, not where its last layer is."""
    return causal_lm(model).get_input_embeddings().weight.device


@contextmanager
def as_found(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Evaluation mode without gradients; modes, generation settings and global generators are as found afterwards.

    `no_grad` rather than `inference_mode`: a rotary cache that a model grows in inference mode cannot be trained with.
    """
    inner = causal_lm(model)
    modes = [(module, module.training) for module in model.modules()]
    settings = inner.generation_config
    try:
        model.eval()
        with torch.no_grad(), private_rng(device_of(model), seed):
            yield
    finally:
        inner.generation_config = settings
        for module, mode in modes:
            module.training = mode
