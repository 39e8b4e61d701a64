"""Slow, obvious truths that the fast code is tested against."""

from __future__ import annotations

import itertools
import re
import string

import torch
from torch import Tensor, nn

ARTICLES = ("a", "an", "the")


def supervised_logits(model: nn.Module, row: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Full-forward logits [N, V] that predict the supervised tokens [N] of a batch of one row."""
    logits = model(row["input_ids"], attention_mask=row["attention_mask"]).logits[0, :-1]
    targets = row["labels"][0, 1:]
    return logits[targets != -100].float(), targets[targets != -100]


def rows_of(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]


def exact_fisher(model: nn.Module, batches: list[dict[str, Tensor]], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """(1/N) sum over tokens and over every possible next token y of p(y) (d log p(y) / d w)^2, by enumeration."""
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    count = 0
    for row in rows_of(batches):
        logits, _ = supervised_logits(model, row)
        log_probs = logits.log_softmax(-1)
        count += len(log_probs)
        for position in log_probs:
            for log_prob in position:
                gradients = torch.autograd.grad(log_prob, list(weights.values()), retain_graph=True, allow_unused=True)
                for name, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None:
                        total[name] += log_prob.detach().exp().double() * gradient.double().square()
    return {name: tensor / count for name, tensor in total.items()}


def empirical_fisher(
    model: nn.Module, batches: list[dict[str, Tensor]], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """(1/N) sum over examples of (d log p(labels) / d w)^2, one example at a time."""
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    count = 0
    for row in rows_of(batches):
        logits, targets = supervised_logits(model, row)
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        count += len(targets)
        for name, gradient in zip(
            weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True
        ):
            if gradient is not None:
                total[name] += gradient.double().square()
    return {name: tensor / count for name, tensor in total.items()}


@torch.no_grad()
def drift(start: nn.Module, now: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Mean KL(start || now) per supervised token, with both models in hand."""
    total, count = 0.0, 0
    for row in rows_of(batches):
        p, q = (supervised_logits(model, row)[0].log_softmax(-1).double() for model in (start, now))
        total += (p.exp() * (p - q)).sum().item()
        count += len(p)
    return total / count


def lora_penalty(adapter, start: tuple[Tensor, Tensor] | None, rows: Tensor, columns: Tensor) -> Tensor:
    """1/2 sum_ij rows_i columns_j (change of W)_ij^2, with the change written out."""
    change = adapter.scale * adapter.B @ adapter.A
    if start is not None:
        change = change - adapter.scale * start[1] @ start[0]
    return 0.5 * (rows.unsqueeze(1) * columns.unsqueeze(0) * change.square()).sum()


def line_integral(weights: list[dict[str, Tensor]], gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """-sum over steps of gradient * (weight after - weight before), from all weights and gradients along a path."""
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights[0].items()}
    for before, after, gradient in zip(weights[:-1], weights[1:], gradients, strict=True):
        for name, g in gradient.items():
            total[name] -= g.double() * (after[name].double() - before[name].double())
    return total


def distillation(
    teacher: nn.Module, student: nn.Module, batches: list[dict[str, Tensor]], temperature: float = 1.0
) -> Tensor:
    """Sum over supervised tokens of T^2 KL(teacher || student), with graph, from full tables of both models' logits."""
    total = torch.zeros(())
    for row in rows_of(batches):
        with torch.no_grad():
            p = (supervised_logits(teacher, row)[0] / temperature).softmax(-1)
        log_q = (supervised_logits(student, row)[0] / temperature).log_softmax(-1)
        total = total + temperature**2 * nn.functional.kl_div(log_q, p, reduction="sum")
    return total


def bucketed(p: Tensor, q: Tensor, kept: Tensor) -> Tensor:
    """KL of each row of two tables of probabilities [n, V] when all tokens but the `kept` [n, k] count as one."""
    rows = []
    for p_row, q_row, tokens in zip(p, q, kept.tolist(), strict=True):
        rest = [token for token in range(len(p_row)) if token not in tokens]
        outcomes = [*([token] for token in tokens), *([rest] if rest else [])]
        both = [(p_row[outcome].sum(), q_row[outcome].sum()) for outcome in outcomes]
        rows.append(sum(a * (a / b).log() for a, b in both))
    return torch.stack(rows)


def squad_f1(answer: str, wanted: str) -> float:
    """2 PR / (P + R) over words counted one by one; SQuAD's words: lower case, no ASCII punctuation, no articles."""
    said, right = (
        [
            word
            for word in re.sub(f"[{re.escape(string.punctuation)}]", "", text.lower()).split()
            if word not in ARTICLES
        ]
        for text in (answer, wanted)
    )
    left, common = list(right), 0
    for word in said:
        if word in left:
            left.remove(word)
            common += 1
    return 2 * common / (len(said) + len(right)) if common else 0.0


def rouge_l(answer: str, wanted: str) -> float:
    """2 PR / (P + R) with the longest common subsequence found by trying every subsequence of the answer's words."""
    said, right = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, wanted))
    for length in range(len(said), 0, -1):
        for part in itertools.combinations(said, length):
            rest = iter(right)
            if all(word in rest for word in part):
                return 2 * length / (len(said) + len(right))
    return 0.0


def sequence_metrics(R: list[list[float]]) -> dict[str, float | None]:
    """The definitions word for word: R[i][j] after stage i = 0..T, tasks and stages counted from 1."""
    T = len(R) - 1

    def at(i: int, j: int) -> float:
        return R[i][j - 1]

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "ACC": mean([at(T, j) for j in range(1, T + 1)]),
        "BWT": mean([at(T, j) - at(j, j) for j in range(1, T)]),
        "FWT": mean([at(j - 1, j) - at(0, j) for j in range(2, T + 1)]),
        "forgetting": mean([max(at(i, j) for i in range(1, T)) - at(T, j) for j in range(1, T)]),
        "LA": mean([at(j, j) for j in range(1, T + 1)]),
    }
