"""Next-token logits at supervised positions only, from one forward pass and in chunks.

Training on today's TRL never builds logits, and a full [batch, length, vocabulary] tensor is what runs out of memory
first. Here the forward pass stops at the last hidden states; the LM head is then applied to the positions that predict
a supervised token, as many at a time as fit.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import IncompatibleError
from .formats import IGNORED

CHUNK = 2**25
"""Logits held at a time (elements): 128 MB in fp32."""


class UnseenError(IncompatibleError):
    """A forward pass went by the model's own layers."""


@dataclass(frozen=True)
class Head:
    """The LM head as a function: hidden states [n, d] -> logits [n, V] in fp32, with the model's scaling."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        head = self.whole()
        logits = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def whole(self) -> Head:
        """The same head with shards (FSDP2) gathered, whose gradients are averaged over ranks on their way back.

        Every rank must gather, and run backward through it, equally often: do so once, not for each chunk.
        """
        return replace(self, weight=_whole(self.weight), bias=_whole(self.bias))

    def chunks(self, positions: int, elements: int | None = None) -> Iterator[slice]:
        """Slices over `positions` rows, each with at most so many logits (left out: CHUNK)."""
        size = max(1, (elements or CHUNK) // self.weight.shape[0])
        return (slice(start, start + size) for start in range(0, positions, size))


def _whole(tensor: Tensor | None) -> Tensor | None:
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def bare(model: nn.Module) -> nn.Module:
    """The Hugging Face or PEFT model inside torch.compile and DDP: the one whose hooks fire and that can generate."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def causal_lm(model: nn.Module) -> nn.Module:
    """The Hugging Face causal LM inside DDP, torch.compile and PEFT wrappers."""
    while hasattr(model := bare(model), "get_base_model"):
        model = model.get_base_model()
    return model


def positions(model: nn.Module) -> int:
    """How many tokens the model reads, its answer included."""
    config = causal_lm(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def lm_head(model: nn.Module) -> Head:
    """The LM head of `model` with the scaling rules of its config (Gemma soft-caps; Cohere and Granite scale).

    Raises:
        IncompatibleError: the model has no output embeddings to read.
    """
    inner = causal_lm(model)
    layer = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if layer is None or not hasattr(layer, "weight"):
        raise IncompatibleError(
            f"{type(inner).__name__} has no LM head (get_output_embeddings() is None); expected a causal LM."
        )
    if hasattr(layer, "base_layer") and not hasattr(layer, "modules_to_save"):
        raise IncompatibleError(
            "The LM head carries an adapter, which logits from its weight would leave out (TRL refuses it for the same "
            "reason). Take 'lm_head' out of target_modules, or train it whole: modules_to_save=['lm_head']."
        )
    config = inner.config.get_text_config()
    scale = _first_of(config, "logit_scale", "output_multiplier", "lm_head_multiplier")
    if scale is None and (divisor := _first_of(config, "logits_scaling")) is not None:
        # HyperCLOVA X multiplies by what Granite and MiniCPM3 divide by
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    # the last two: RecurrentGemma, xLSTM
    softcap = _first_of(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return Head(layer.weight, getattr(layer, "bias", None), 1.0 if scale is None else scale, softcap)


def _first_of(config: Any, *names: str) -> Any:
    """The first of these settings that a config has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def stay_whole(model: nn.Module) -> None:
    """Make FSDP2 keep the weights above the layers for a backward pass that starts at the hidden states.

    It lets go of them after the forward pass, and takes them back when the backward pass comes to the model's output.
    """
    for module in (model, causal_lm(model).get_output_embeddings()):
        if hasattr(module, "unshard"):
            module.unshard()


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP2 gathered for a forward pass. The last layers stay whole after it, waiting for a backward.

    Until then their weights are other tensors than those that train, in the precision of the forward pass.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def hidden_states(model: nn.Module, batch: dict[str, Tensor], check: bool = False) -> tuple[Tensor, Tensor]:
    """Last hidden states that predict a supervised token, and those tokens: ([N, d], [N]).

    `batch` holds `input_ids` [B, T], `labels` [B, T] (unshifted, -100 where unsupervised) and whatever else the
    forward pass takes (`attention_mask`, or `position_ids` for padding-free rows). Keeps the graph unless the caller
    turned gradients off; before a backward pass from here call `stay_whole`.

    Args:
        check: whether to see that the LM head gives the model's own logits.

    Raises:
        IncompatibleError: it does not, or the model saw more positions than there are labels.
        UnseenError: the forward pass went by the model's own layers.
    """
    states, logits = forward(model, batch)
    if check:
        refuse_other_logits(model, lm_head(model), states, logits)
    return supervised(states, batch["labels"])


def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Last hidden states [B, T, d], and the model's own logits at the last position [B, V]."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if "logits_to_keep" in inspect.signature(type(causal_lm(model)).forward).parameters:
        inputs["logits_to_keep"] = 1  # the full logits would only be thrown away
    seen: list[Tensor] = []
    with captured(model, seen.append):
        output = model(**inputs, use_cache=False)
    if not seen:
        raise UnseenError(
            f"No hidden states were seen of {type(causal_lm(model)).__name__}: its forward pass goes by its backbone, "
            "or something replaced it (Unsloth, Liger). Expected an AutoModelForCausalLM as transformers makes it."
        )
    return seen[-1], output.logits[:, -1]


@torch.no_grad()
def refuse_other_logits(model: nn.Module, head: Head, states: Tensor, logits: Tensor) -> None:
    """Raise where head(hidden) is not what the model says: what is made of a head that is scaled, adapted or left out
    unseen would mislead."""
    ours, own = head(states[:, -1].to(head.weight.device)), logits.float().to(head.weight.device)
    known = own.isfinite() & ours.isfinite()
    own, ours = own[known], ours[known]
    if not own.numel():  # a broken model is reported as such, from its loss
        return
    off = (own - ours).abs().max()
    # 5 %: far above what bf16 and autocast round away (0.4 % each), far below any factor or adapter that was missed
    if off > 0.05 * own.abs().max() + 1e-3:
        raise IncompatibleError(
            f"The LM head of {type(causal_lm(model)).__name__} does not give the model's own logits (off by "
            f"{off.item():.3g}): the model changes them in a way that is not known here, or an adapter sits on the "
            "head. Expected a plain LM head; leave lm_head out of the adapter's target_modules."
        )


def supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [B, T, d] and labels [B, T], shifted by one and cut to supervised positions: ([N, d], [N]).

    Raises:
        IncompatibleError: the model saw more positions than there are labels.
    """
    if hidden.shape[1] != labels.shape[1]:
        raise IncompatibleError(
            f"The model ran over {hidden.shape[1]} positions for {labels.shape[1]} labels, as adapters that prepend "
            "virtual tokens do (prompt tuning, prefix tuning, p-tuning). Use LoRA or full fine-tuning."
        )
    predicts = nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
    places = predicts.flatten().nonzero()[:, 0]  # the one moment that a GPU is waited for
    return hidden.flatten(0, 1).index_select(0, places), labels.flatten().index_select(0, places + 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for the block; every module's own mode comes back after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def captured(model: nn.Module, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Give `keep` the last hidden states of every forward pass inside the block; those that it gets last in a pass are
    what the LM head reads.

    Raises:
        IncompatibleError: there is no backbone to look at.
    """
    inner = causal_lm(model)
    if inner.base_model is inner:
        raise IncompatibleError(
            f"{type(inner).__name__} has no backbone below its LM head; expected an AutoModelForCausalLM."
        )
    # OPT asks the decoder below its backbone, and the backbone never; what others call so may be the LM head
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    below = any(module is decoder for module in inner.base_model.modules())
    places = [inner.base_model, *([decoder] if below and decoder is not inner.base_model else [])]

    def look(module: nn.Module, args: object, output: object) -> None:
        keep(output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0])

    hooks = [place.register_forward_hook(look) for place in places]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
