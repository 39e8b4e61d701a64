"""Micro-batches of random tokens with prompts unsupervised, padded or padding-free."""

from __future__ import annotations

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def random_rows(count: int, vocab: int, longest: int = 9, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, labels) of varied lengths; the first two tokens are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(5, longest + 1, (), generator=generator))
        ids = torch.randint(4, vocab, (length,), generator=generator)
        labels = ids.clone()
        labels[:2] = -100
        rows.append((ids, labels))
    return rows


def padded(rows: list[tuple[Tensor, Tensor]], size: int) -> list[Batch]:
    batches = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        longest = max(len(ids) for ids, _ in part)
        batch = {
            key: torch.full((len(part), longest), fill)
            for key, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0))
        }
        for i, (ids, labels) in enumerate(part):
            batch["input_ids"][i, : len(ids)], batch["labels"][i, : len(ids)] = ids, labels
            batch["attention_mask"][i, : len(ids)] = 1
        batches.append(batch)
    return batches


def padding_free(rows: list[tuple[Tensor, Tensor]], size: int) -> list[Batch]:
    """Several rows behind one another in one, told apart by position ids; a row's first label never counts."""
    batches = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        labels = [torch.cat([torch.tensor([-100]), labels[1:]]) for _, labels in part]
        batches.append(
            {
                "input_ids": torch.cat([ids for ids, _ in part]).unsqueeze(0),
                "labels": torch.cat(labels).unsqueeze(0),
                "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in part]).unsqueeze(0),
            }
        )
    return batches
