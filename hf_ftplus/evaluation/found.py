"""Use a model for measuring and give it back exactly as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..generate import private_rng
from ..logits import causal_lm, evaluating, reshard

logger = logging.getLogger("hf_ftplus")


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its input; with a device map, not where its last layer is."""
    return causal_lm(model).get_input_embeddings().weight.device


@contextmanager
def as_found(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Evaluation mode without gradients; modes, shards, generation settings and generators are as found afterwards.

    `no_grad` rather than `inference_mode`: a rotary cache that a model grows in inference mode cannot be trained with.
    """
    inner = causal_lm(model)
    settings = inner.generation_config
    try:
        with evaluating(model), torch.no_grad(), private_rng(device_of(model), seed):
            yield
    finally:
        inner.generation_config = settings
        reshard(model)


def warn_of_cut(lengths: list[int], room: int, label: str) -> None:
    """Say how many sequences are longer than `room` tokens; of those the end is read, where the answer is due."""
    if long := sum(length > room for length in lengths):
        logger.warning(
            "%s: %d of %d rows are read from their last %d tokens only: the model has no positions for more.",
            label,
            long,
            len(lengths),
            room,
        )
