"""Get loss, accuracy and drift of every row from one forward pass per micro-batch, without a full table of logits.

The figures are sums per row, in fp32 from the LM head on (also where the forward pass runs under autocast), so that
means, intervals and pairs can be made of them later.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..examples import Example, collate
from ..formats import IGNORED
from ..logits import Head, forward, lm_head, refuse_other_logits, reshard, supervised
from .drift import kl, placed, same_vocabulary
from .found import device_of

Autocast = Callable[[], AbstractContextManager]


@dataclass
class Scores:
    """Sums over the supervised tokens of each row, in the order of the examples."""

    nll: NDArray
    tokens: NDArray
    correct: NDArray
    """Tokens that the model would have chosen itself."""
    kl: NDArray | None = None
    """KL(start || now), if the start was given."""
    hidden: list[Tensor] = field(default_factory=list, repr=False)
    """Last hidden states of each micro-batch, on the CPU, if asked for."""


@dataclass(frozen=True)
class Start:
    """What the starting model said: its head, and its hidden states in the micro-batches of one task."""

    head: Head
    hidden: list[Tensor]


def score(
    model: nn.Module,
    examples: list[Example],
    batch_size: int,
    *,
    start: Start | None = None,
    keep_hidden: bool = False,
    autocast: Autocast = nullcontext,
    label: str = "score",
) -> Scores:
    """Score every example. The caller sees to the mode of the model and to gradients (`as_found`).

    Examples of similar length share a micro-batch, the same ones in every call with the same examples.

    Raises:
        IncompatibleError: the LM head does not give the logits that the model gives, or the vocabulary changed.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    reshard(model)
    device, head = device_of(model), lm_head(model).whole()
    now = placed(start.head, head.weight.device) if start else None
    if now:
        same_vocabulary(now, head)
    sums = torch.zeros(len(examples), 4, dtype=torch.float64)
    hidden: list[Tensor] = []
    with tqdm(total=len(examples), desc=label, unit="row", disable=None, leave=False) as bar:
        for n, batch in enumerate(collate([examples[i] for i in order], 0, batch_size)):
            batch = {key: value.to(device) for key, value in batch.items()}
            with autocast():
                states, logits = forward(model, batch)
            if n == 0:
                refuse_other_logits(model, head, states, logits)
            states, targets = supervised(states.to(head.weight.device), batch["labels"].to(head.weight.device))
            figures = _figures(head, states, targets, now, start.hidden[n] if start else None)
            rows = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0].cpu()
            sums.index_add_(0, torch.tensor(order)[n * batch_size + rows], figures.cpu().double())
            if keep_hidden:
                hidden.append(states.to("cpu", copy=True))
            bar.update(len(batch["labels"]))
    nll, tokens, correct, divergence = sums.numpy().T
    return Scores(nll, tokens.astype(np.int64), correct.astype(np.int64), divergence if start else None, hidden)


def _figures(head: Head, hidden: Tensor, targets: Tensor, then: Head | None, old: Tensor | None) -> Tensor:
    """[n, 4]: negative log-likelihood, one, chosen by the model or not, KL to the start; of each supervised token."""
    parts = [torch.empty(0, 4, device=hidden.device)]
    for part in head.chunks(len(targets)):
        logp, labels = head(hidden[part]).log_softmax(-1), targets[part]
        nll = -logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        correct = (logp.argmax(-1) == labels).float()
        moved = kl(then(old[part].to(logp.device)).log_softmax(-1), logp) if then else torch.zeros_like(nll)
        parts.append(torch.stack([nll, torch.ones_like(nll), correct, moved], -1))
    return torch.cat(parts)
