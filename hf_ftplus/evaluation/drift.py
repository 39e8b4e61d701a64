"""Measure how far the model has moved, exactly over the vocabulary, without keeping a second model.

    drift = mean over supervised tokens of KL(start || now) = sum_v p(v) (log p(v) - log q(v)),  p: start, q: now

What the starting model said at a position is a function of its last hidden state there and of its LM head. So `before`
keeps these on the CPU ([tokens, d], not [tokens, V]) and `after` applies the old head to the old states, chunk by
chunk, beside the new ones: 1.2 KB per token for a model of d = 576 in bf16, where the logits are 200 KB.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import IncompatibleError
from ..logits import Head, causal_lm, lm_head


def kl(start: Tensor, now: Tensor) -> Tensor:
    """KL(start || now) of each row of two tables of log-probabilities: [n, V], [n, V] -> [n]."""
    p = start.exp()
    # a token that the start rules out (log p = -inf) adds nothing; NaN is left to be seen
    return torch.where(p == 0, 0.0, p * (start - now)).sum(-1)


def keep_head(model: nn.Module) -> Head:
    """A copy of the LM head on the CPU.

    Copied even if it is frozen: merging an adapter or unfreezing a layer later would change it behind our back, and
    drift would be too small without a word.

    Raises:
        IncompatibleError: an adapter sits on the head, whose weight is then not all of it; better said before training.
    """
    head = lm_head(model).whole()
    if isinstance(causal_lm(model).get_output_embeddings(), BaseTunerLayer):
        raise IncompatibleError(
            "An adapter sits on the LM head, so what the model says cannot be recomputed from the head's weight. "
            "Leave lm_head out of target_modules; modules_to_save=['lm_head'] trains the whole head and is fine."
        )
    return replace(head, weight=_copy(head.weight), bias=None if head.bias is None else _copy(head.bias))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def placed(head: Head, device: torch.device) -> Head:
    """The same head on `device`."""
    return replace(head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))


def same_vocabulary(start: Head, now: Head) -> None:
    """Refuse to compare two models whose tokens differ in number.

    Raises:
        IncompatibleError: names both sizes.
    """
    if start.weight.shape[0] != now.weight.shape[0]:
        raise IncompatibleError(
            f"The vocabulary had {start.weight.shape[0]} tokens before and has {now.weight.shape[0]} now, so drift is "
            "not defined. Resize the embeddings before the first evaluation."
        )
