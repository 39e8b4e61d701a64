"""Models and tokenizers known by what they hold."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

SAYS_NOTHING = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Keys of a configuration that do not change what a model says."""


def fingerprint(model: nn.Module) -> str:
    """sha256 over the name, shape, dtype and every byte of the model's weights and buffers, wherever they lie.

    About a second per GB. Under FSDP2 every rank must call it, since each tensor is gathered in turn.
    """
    return fingerprint_of(model.state_dict())


def fingerprint_of(tensors: dict[str, Any]) -> str:
    """The same over some of the tensors of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):  # extra state of a quantised layer
            continue
        tensor = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for piece in tensor.reshape(-1).split(2**24):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def architecture(model: nn.Module) -> str:
    """How a model computes with its weights, as JSON: its configuration without names, versions and dtypes, and the
    scaling of LoRA adapters that act. Models of the same weights differ in it, by another scaling of positions or
    logits.
    """

    def told(value: Any) -> Any:
        return (
            {key: told(item) for key, item in value.items() if key not in SAYS_NOTHING}
            if isinstance(value, dict)
            else value
        )

    config = getattr(model, "config", None)
    found = told(config.to_dict()) if config is not None else {}
    scaled = {
        name: [layer.scaling.get(adapter) for adapter in layer.active_adapters]
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and not layer.disable_adapters
    }
    return json.dumps({**found, **({"scaling": scaled} if scaled else {})}, sort_keys=True, default=str)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over vocabulary, merges, special tokens and chat template."""
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    if tokenizer.is_fast:  # left behind by the last call that padded or truncated
        vocabulary |= {"padding": None, "truncation": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = json.dumps([vocabulary, special, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()
