"""Slow, obvious truths for the evaluation: one row at a time, the full table of logits, two models kept."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


@torch.no_grad()
def row_logits(model: nn.Module, example: dict) -> tuple[Tensor, Tensor]:
    """Logits that predict a supervised token, and these tokens."""
    logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1].float()
    labels = torch.tensor(example["labels"])[1:]
    return logits[labels != -100], labels[labels != -100]


def brute_force(model: nn.Module, examples: list[dict]) -> list[tuple[float, int, int]]:
    """(nll, tokens, correct) of each row."""
    rows = []
    for example in examples:
        logits, labels = row_logits(model, example)
        nll = nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        rows.append((nll, len(labels), int((logits.argmax(-1) == labels).sum())))
    return rows


def brute_force_kl(start: nn.Module, now: nn.Module, examples: list[dict]) -> list[float]:
    """KL(start || now), summed over the supervised tokens of each row."""
    rows = []
    for example in examples:
        p, q = (row_logits(model, example)[0].double().softmax(-1) for model in (start, now))
        rows.append((p * (p.log() - q.log())).sum().item())
    return rows


@torch.no_grad()
def moved(model: nn.Module, by: float = 0.05, seed: int = 3, only_trainable: bool = False) -> nn.Module:
    """Another model: the same one, each weight moved at random, in place."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad or not only_trainable:
            weight.add_((by * torch.randn(weight.shape, generator=generator)).to(weight.dtype))
    return model


def sibling(model: nn.Module, by: float = 0.05) -> nn.Module:
    return moved(copy.deepcopy(model), by)
