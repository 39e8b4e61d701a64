"""Five pairs of digits learnt in a row: at which strength does EWC begin to hold, with each estimate of the Fisher?

    pip install scikit-learn                                    brings the images, nothing else is taken from it
    python examples/benchmarks/forgetting/digits.py             measures what is missing, then prints the table
    python examples/benchmarks/forgetting/digits.py --show      prints it from digits.json, as Markdown

The protocol is that of van de Ven (2025, "On the computation of the Fisher Information in continual learning") for
Split-MNIST, scaled down: a network of two hidden layers, a head for each pair, Adam, EWC with the sum of the
importances around the last weights. The images are a stand-in that needs no download: the 8 x 8 digits of
scikit-learn, 1,797 of them, where MNIST has 70,000 of 28 x 28. The figures are therefore not comparable with his; the
order of strengths is.

    exact       every label of every example, weighed by its probability
    sign        ours: random signs through the root of the logits' Fisher, a batch at a time
    sampled     a label drawn from the model, a batch at a time
    empirical   the true label, an example at a time
    batched     the true label, the gradient of a mean over a batch squared: cheap, and what many packages do

Strength is in nats per example: the loss is a mean over examples, and so is the Fisher.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a network this small gains nothing from more

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from hf_ftplus.disk import replace
from hf_ftplus.fisher import logit_gradient
from hf_ftplus.quadratic import pull, starting, wells

KEPT = Path(__file__).with_suffix(".json")
WIDTH, STEPS, BATCH, RATE = 100, 300, 128, 1e-2
SEEDS = range(5)
STRENGTHS = tuple(10.0**power for power in range(13))
TASKS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))

Split = tuple[Tensor, Tensor]
"""Images [n, 64] from 0 to 1, and which digit of its pair each shows [n]."""


def digits() -> tuple[list[Split], list[Split]]:
    """Training and test images of each pair; which are which is told by a hash of their pixels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise click.ClickException("The images come with scikit-learn: pip install scikit-learn") from None
    images, shown = load_digits(return_X_y=True)
    tested = torch.tensor([hashlib.sha256(image.tobytes()).digest()[0] < 77 for image in images])  # 3 of 10
    pixels, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(shown)
    splits = []
    for part in (~tested, tested):
        of_pairs = [part & ((labels == a) | (labels == b)) for a, b in TASKS]
        splits.append([(pixels[mine], labels[mine] - a) for mine, (a, _) in zip(of_pairs, TASKS, strict=True)])
    return splits[0], splits[1]


class Network(nn.Module):
    """Two hidden layers, shared, and a head of two logits for each pair."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in TASKS)

    def forward(self, images: Tensor, task: int) -> Tensor:
        return self.heads[task](self.body(images))


# ---- the Fisher of the body, five ways; each a mean over examples ---------------------------------------------------


def estimate(how: str, network: Network, split: Split, task: int, seed: int) -> dict[str, Tensor]:
    """Importance of each weight of the body, named as in it."""
    images, labels = split
    if how == "exact":
        with torch.no_grad():
            chances = network(images, task).softmax(-1)
        return _summed([_squares(network, images, torch.full_like(labels, y), task, chances[:, y]) for y in (0, 1)])
    if how == "empirical":
        return _squares(network, images, labels, task, torch.ones(len(labels)))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for some, theirs in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        logits = network(some, task)
        if how == "batched":
            back = logit_gradient(logits.detach(), theirs, "empirical", generator) / len(some)
            share = len(some) / len(images)  # a mean over batches of the square of a mean over examples
        else:
            back, share = logit_gradient(logits.detach(), theirs, how, generator), 1 / len(images)
        gradients = torch.autograd.grad(logits, list(network.body.parameters()), back)
        names = [name for name, _ in network.body.named_parameters()]
        found.append({name: share * g.square() for name, g in zip(names, gradients, strict=True)})
    return _summed(found)


def _squares(network: Network, images: Tensor, labels: Tensor, task: int, weight: Tensor) -> dict[str, Tensor]:
    """Squared gradients of each example's own loss, weighed, and averaged over examples."""
    head = network.heads[task]

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = head(functional_call(network.body, weights, (image,)))
        return nn.functional.cross_entropy(logits, label)

    weights = {name: value.detach() for name, value in network.body.named_parameters()}
    each = vmap(grad(loss), (None, 0, 0))(weights, images, labels)
    return {name: torch.einsum("n,n...->...", weight / len(images), g.square()) for name, g in each.items()}


def _summed(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


ESTIMATORS = ("exact", "sign", "sampled", "empirical", "batched")


# ---- five tasks in a row -------------------------------------------------------------------------------------------


def run(how: str, strength: float, seed: int, learn: list[Split], test: list[Split]) -> dict[str, float]:
    """Mean accuracy over all pairs after the last; seconds of an estimate, and its trace after the first pair."""
    torch.manual_seed(seed)
    network = Network()
    body = dict(network.body.named_parameters())
    importance = {name: torch.zeros_like(weight) for name, weight in body.items()}
    seconds, trace = [], 0.0
    for task, (images, labels) in enumerate(learn):
        optimizer = torch.optim.Adam(network.parameters(), lr=RATE, fused=True)
        held = wells(body, {}, starting(body, {}), {f"diagonal.{name}": value for name, value in importance.items()})
        for _ in range(STEPS):
            drawn = torch.randint(len(images), (BATCH,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[drawn], task), labels[drawn]).backward()
            if task and strength:
                with torch.no_grad():
                    pull(held, strength, False)
            optimizer.step()
        if strength and task + 1 < len(learn):
            begin = time.process_time()
            found = estimate(how, network, (images, labels), task, seed)
            seconds.append(time.process_time() - begin)
            trace = trace or sum(value.sum().item() for value in found.values())
            importance = _summed([importance, found])
    with torch.no_grad():
        right = [(network(x, task).argmax(-1) == y).float().mean().item() for task, (x, y) in enumerate(test)]
    return {"accuracy": statistics.mean(right), "seconds": statistics.mean(seconds or [0.0]), "trace": trace}


@click.command()
@click.option("--out", default=KEPT, type=click.Path(path_type=Path), help="What was measured; a new file: anew.")
@click.option("--show", is_flag=True, help="Run nothing.")
def main(out: Path, show: bool) -> None:
    """Run what is missing, then print the table."""
    kept = json.loads(out.read_text()) if out.exists() else {}
    if not show:
        learn, test = digits()
        cells = [("none", 0.0), *((how, strength) for how in ESTIMATORS for strength in STRENGTHS)]
        for how, strength in cells:
            for seed in SEEDS:
                key = f"{how} {strength:g} {seed}"
                kept[key] = kept.get(key) or run(how, strength, seed, learn, test)
            replace(out, lambda file: file.write_text(json.dumps(kept, indent=1) + "\n"))
    Console(width=160).print(table(kept))


def table(kept: dict[str, dict[str, float]]) -> Table:
    """Accuracy in %, mean over seeds; of none at every strength the same."""
    head = ["Fisher", *(f"{strength:.0e}".replace("e+0", "e").replace("e+", "e") for strength in STRENGTHS)]
    grid = Table(*head, "trace", "cost", title="Accuracy in %, mean over all pairs and seeds, by strength")
    costs = {how: _mean(kept, how, "seconds", STRENGTHS) for how in ESTIMATORS}
    for how in ESTIMATORS:
        cells = [f"{100 * _mean(kept, how, 'accuracy', [strength]):.1f}" for strength in STRENGTHS]
        trace, cost = _mean(kept, how, "trace", STRENGTHS), costs[how] / costs["batched"]
        grid.add_row(how, *cells, f"{trace:.1e}", f"{cost:.1f}x")
    none = [kept[f"none 0 {seed}"]["accuracy"] for seed in SEEDS]
    grid.caption = f"without EWC {100 * statistics.mean(none):.1f}; cost: seconds of an estimate over those of batched"
    return grid


def _mean(kept: dict[str, dict[str, float]], how: str, figure: str, strengths: list[float]) -> float:
    return statistics.mean(kept[f"{how} {strength:g} {seed}"][figure] for strength in strengths for seed in SEEDS)


if __name__ == "__main__":
    main()
