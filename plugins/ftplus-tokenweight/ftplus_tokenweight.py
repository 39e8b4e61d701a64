"""Learn less from the tokens that would damage the model most: EAFT, STM or FLOW weights on the learn loss.

    loss = mean_t w_t l_t,     l_t = -log p(token t)             plain fine-tuning: w_t = 1

- `eaft`: w = (H / ln 20)^power, H the entropy of the 20 likeliest tokens, renormalised. Where the model is sure and the
  label says otherwise, w is near 0: such "confident conflicts" move weights far. Nothing to prepare.
  (Diao et al. 2026, arXiv:2601.02151)
- `stm`: w = 1 where the starting model gave the token a perplexity of at most `threshold`, else 0.
  (Wu et al. 2025, "Mitigating Forgetting in LLM Fine-Tuning via Low-Perplexity Token Learning", arXiv:2501.14315)
- `flow`: w = exp(-L / median L) for all tokens of a row, L the mean loss of the starting model on it: rows that it
  finds easy count for more. (Sanyal et al. 2025, "Upweighting Easy Samples in Fine-Tuning", arXiv:2502.02797)

The trainer computes the plain loss; what is added here is weight * sum_t (w_t - 1) l_t.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_ftplus import Batch, Run, Strategy, hookimpl, setting
from hf_ftplus.errors import IncompatibleError

if TYPE_CHECKING:
    from torch import Tensor

ftplus_api = 1
logger = logging.getLogger("hf_ftplus")

TOP = 20
"""Likeliest tokens that the entropy of `eaft` is taken over."""
ALL = 2**62
"""More rows than there are."""


# ---- the weights -----------------------------------------------------------------------------------------------------


def eaft_weights(logits: Tensor, power: float = 1.0) -> Tensor:
    """(entropy of the 20 likeliest tokens / ln 20)^power: logits [n, V] -> [n], between 0 and 1."""
    top = logits.float().topk(min(TOP, logits.shape[-1]), -1).values.log_softmax(-1)
    entropy = -(top.exp() * top).sum(-1)
    return (entropy / math.log(top.shape[-1])).clamp(0, 1) ** power


def stm_weights(nll: Tensor, threshold: float = 2.5) -> Tensor:
    """1 where exp(nll) is at most the threshold, else 0: nats of the starting model [n] -> [n]."""
    return (nll.exp() <= threshold).to(nll.dtype)


def flow_weights(losses: Tensor) -> Tensor:
    """exp(-loss / median loss): mean nats per token of the starting model on each row [rows] -> [rows]."""
    return (-losses / losses.quantile(0.5).clamp(min=1e-8)).exp()


# ---- when ------------------------------------------------------------------------------------------------------------


@dataclass
class TokenWeight(Strategy):
    """Learn less from the tokens that would damage the model most (EAFT, STM or FLOW); needs nothing to protect."""

    name: ClassVar[str] = "tokenweight"
    judged: ClassVar[dict] = {"from_start": False}  # the loss is another one from the first step on

    rule: str = setting(
        "eaft",
        "what makes a token count: eaft, that the model is unsure; stm, that the starting model found it easy; flow, "
        "that it found the row easy",
        choices=("eaft", "stm", "flow"),
    )
    weight: float = setting(1.0, "how far that counts: 0 is the plain loss, 1 the reweighted one", low=0, high=1)
    power: float = setting(1.0, "eaft: above 1 spares even more of what the model is sure of", unit="exponent", above=0)
    threshold: float = setting(
        2.5, "stm: tokens above it are not learnt at all", unit="perplexity of the starting model", above=1
    )

    def prepare(self, run: Run) -> None:
        """Ask the starting model about every learn row, where the rule wants to know."""
        self._begin(run)
        if self.rule == "eaft" or self.weight == 0:
            return
        keys, counts, nll = _asked(run)
        if not len(keys):
            raise IncompatibleError(
                f"tokenweight.rule={self.rule} asks the starting model about every learn row, but the training rows "
                "are no tokens and labels that can be read beforehand (a stream, DPO). Type --set "
                "tokenweight.rule=eaft."
            )
        self._keep(keys, counts, self._weights(nll, counts))
        logger.info("tokenweight: %s gives learn tokens a mean weight of %.2f", self.rule, self._mean())

    def token_loss(self, run: Run, batch: Batch) -> Tensor:
        import torch
        from torch.utils.checkpoint import checkpoint

        if self.weight == 0 or not len(batch.labels):
            return batch.hidden.sum() * 0.0
        known = None if self.rule == "eaft" else self._of(batch).to(batch.hidden.device)
        learnt = self._learnt(batch) if known is None and self._replayed else None
        total, size = batch.hidden.sum() * 0.0, max(1, 2**25 // _vocabulary(batch))
        for start in range(0, len(batch.labels), size):
            part = slice(start, start + size)
            given = None if known is None else known[part]
            ours = None if learnt is None else learnt[part]
            # logits are made again on the way back: to keep those of every chunk is what runs out of memory
            with run.autocast():  # as the task loss is computed
                extra, weights = checkpoint(
                    self._extra, batch.logits, batch.hidden[part], batch.labels[part], given, ours, use_reentrant=False
                )
            total = total + extra
            seen = torch.stack([weights.sum(), weights.new_full((), len(weights))])
            self._seen = self._seen.to(seen.device) + seen  # stays on the device until it is logged
        return self.weight * total

    def metrics(self) -> dict[str, float]:
        """`mean_weight`: of the supervised tokens of the window; 1 is plain fine-tuning."""
        weights, tokens = self._seen.tolist()
        self._seen.zero_()
        return {"mean_weight": weights / tokens} if tokens else {}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._rows)

    def load_state_dict(self, state: dict[str, Tensor], run: Run) -> None:
        self._begin(run)
        if state:
            self._keep(state["keys"], state["counts"], state["weights"])

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _extra(
        self, logits_of: object, hidden: Tensor, labels: Tensor, known: Tensor | None, learnt: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(sum of (w - 1) nll, w [n]) of some supervised positions: w as `known`, else eaft's where `learnt`."""
        from torch.nn.functional import cross_entropy

        logits = logits_of(hidden)
        weights = eaft_weights(logits.detach(), self.power) if known is None else known
        weights = weights if learnt is None else weights.where(learnt, 1.0)
        nll = cross_entropy(logits.float(), labels, reduction="none")
        return ((weights - 1) * nll).sum(), weights.detach()

    def _weights(self, nll: Tensor, counts: Tensor) -> Tensor:
        """Of every supervised token of the learn rows, in their order."""
        if self.rule == "stm":
            return stm_weights(nll, self.threshold)
        import torch

        rows = torch.stack([part.mean() for part in nll.split(counts.tolist())])
        return flow_weights(rows).repeat_interleave(counts)

    def _begin(self, run: Run) -> None:
        import torch

        self._seen = torch.zeros(2)
        self._rows: dict[str, Tensor] = {}
        mixed = [name for name, task in run.tasks.items() if task.role == "protect" and task.drawn]
        batches = [batch for name in mixed for batch in run.protect[name]]
        self._replayed = {key for batch in batches for key, _ in _documents(batch)}

    def _keep(self, keys: Tensor, counts: Tensor, weights: Tensor) -> None:
        keys, counts, weights = keys.cpu(), counts.cpu(), weights.float().cpu()
        self._rows = {"keys": keys, "counts": counts, "weights": weights}
        self._found = dict(zip(keys.tolist(), weights.split(counts.tolist()), strict=True))

    def _mean(self) -> float:
        return self._rows["weights"].mean().item()

    def _learnt(self, batch: Batch) -> Tensor:
        """Whether each supervised token of a micro-batch is of a learn row, and not of a replayed one."""
        import torch

        parts = [torch.full((count,), key not in self._replayed) for key, count in _documents(batch.inputs)]
        return torch.cat(parts).to(batch.hidden.device)

    def _of(self, batch: Batch) -> Tensor:
        """The weight of each supervised token of a micro-batch; 1 in rows that were not asked about (replayed ones)."""
        import torch

        parts = []
        for key, count in _documents(batch.inputs):
            found = self._found.get(key)
            parts.append(found if found is not None and len(found) == count else torch.ones(count))
        return torch.cat(parts)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _asked(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Of every document of the learn rows: its key, how many of its tokens are supervised, and their nats [tokens].

    Ranks share the rows, unless the model is sharded (FSDP2) and every forward pass takes all of them.
    """
    import torch
    import torch.distributed as dist

    from hf_ftplus.logits import evaluating
    from hf_ftplus.weights import ranks, sharded

    rank, world = (0, 1) if sharded(run.weights.values()) else ranks()
    batches = run.learn(ALL)
    mine: list[tuple[int, list[tuple[int, int]], list[float]]] = []
    with torch.no_grad(), evaluating(run.model), run.autocast():
        for index in range(rank, len(batches), world):
            batch = {key: value.to(run.device) for key, value in batches[index].items()}
            mine.append((index, list(_documents(batch)), _nats(run, batch).tolist()))
    if world > 1:
        everyone: list = [None] * world
        dist.all_gather_object(everyone, mine)
        mine = sorted(item for share in everyone for item in share)
    documents = [document for _, found, _ in mine for document in found]
    documents = [(key, count) for key, count in documents if count]  # no supervised token, nothing to weigh
    keys, counts = (torch.tensor([item[i] for item in documents], dtype=torch.long) for i in (0, 1))
    return keys, counts, torch.tensor([value for _, _, nats in mine for value in nats])


def _nats(run: Run, batch: dict[str, Tensor]) -> Tensor:
    """-log p of every supervised token of a micro-batch [N]."""
    import torch
    from torch.nn.functional import cross_entropy

    from hf_ftplus.logits import hidden_states, lm_head

    hidden, labels = hidden_states(run.model, batch)
    head = lm_head(run.model).whole()
    parts = [
        cross_entropy(head(hidden[part]).float(), labels[part], reduction="none") for part in head.chunks(len(labels))
    ]
    return torch.cat(parts).cpu() if parts else torch.zeros(0)


def _documents(inputs: dict[str, Tensor]) -> Iterator[tuple[int, int]]:
    """(key, supervised tokens) of each document of a micro-batch: a row without its padding, or a part of a packed row.

    The key is a hash of its tokens, so that a document is known again in whatever batch it comes.
    """
    ids, labels = inputs["input_ids"].cpu(), inputs["labels"].cpu()
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    for row in range(len(ids)):
        if mask is not None and mask.dim() == 2:
            keep = mask[row].cpu().bool()
            yield _key(ids[row][keep]), int((labels[row, 1:] != -100).sum())
            continue
        starts = [0] if positions is None else (positions[row].cpu() == 0).nonzero().flatten().tolist() or [0]
        for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            yield _key(ids[row, start:end]), int((labels[row, max(start, 1) : end] != -100).sum())


def _key(ids: Tensor) -> int:
    digest = hashlib.blake2b(ids.numpy().astype("int64").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _vocabulary(batch: Batch) -> int:
    return batch.logits(batch.hidden[:1].detach()).shape[-1]


@hookimpl
def ftplus_strategies() -> list[type[Strategy]]:
    return [TokenWeight]
