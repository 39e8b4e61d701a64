"""Give a model back what fine-tuning took from it, without training: go back toward its base, or calm its intruders.

- alpha: every weight at base + alpha (tuned - base); of a LoRA, B scaled by alpha. (WiSE-FT, arXiv:2109.01903)
- intruders: PEFT's `reduce_intruder_dimension`: singular directions of W + scale B A that W itself has nothing of are
  scaled down. (Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv:2410.21228)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_ftplus import Run
from hf_ftplus.disk import attempt, refuse_full
from hf_ftplus.errors import DataError, IncompatibleError, UsageError
from hf_ftplus.examples import collate, tokenize
from hf_ftplus.generate import pad_id, self_generate
from hf_ftplus.model import resolve
from hf_ftplus.specs import TaskSpec
from hf_ftplus.strategy import Memory
from hf_ftplus.trained import Trained, base_of, began_with, load, weights
from hf_ftplus.weights import match

from .curve import Point, choose, loss

INTRUDERS = "intruders"


@dataclass
class Repaired:
    """What was found, and what was taken."""

    points: list[Point] = field(default_factory=list)
    chosen: Point | None = None


@dataclass
class Damaged:
    """A tuned model that can be put anywhere between its base and itself."""

    it: Trained
    stand: Callable[[float], None]
    """Puts the model at alpha."""
    intruders: Callable[[float], None] | None = None
    """Puts it where its intruder dimensions are scaled down by this share; None for a model without an adapter."""


def repair(
    name: str,
    base: str | None,
    learn: TaskSpec,
    protect: list[TaskSpec],
    *,
    points: int = 10,
    keep: float = 0.9,
    mitigation: float | None = 0.75,
    rows: int = 64,
    max_length: int = 1024,
    batch_size: int = 4,
    seed: int = 42,
    dtype: str = "auto",
    device: str | None = None,
    out: Path | None = None,
) -> Repaired:
    """Measure every point, choose one, and write the model that stands there to `out`.

    Raises:
        UsageError: a whole model without a base to go back to.
        IncompatibleError: base and model differ in shape, or the adapter is moved otherwise than by scaling B.
        DataError: rows or models that cannot be read.
        StorageError: `out` holds something, or cannot be written.
    """
    if out is not None:
        refuse_full(out)
    damaged = _damaged(name, base, dtype, device)
    run = _run(damaged.it, seed)
    damaged.stand(0.0)  # the base writes what `self:N` asks for
    tasks = {spec.name: _batches(spec, damaged.it, run, rows, max_length, batch_size) for spec in [learn, *protect]}
    found = Repaired()

    def measured(alpha: float, name: str = "") -> Point:
        kept = {spec.name: loss(run, tasks[spec.name], rows) for spec in protect}
        return Point(alpha, loss(run, tasks[learn.name], rows), kept, name)

    for step in range(points, -1, -1):
        damaged.stand(step / points)
        found.points.append(measured(step / points))
    if damaged.intruders is not None and mitigation:
        damaged.intruders(mitigation)
        found.points.append(measured(1.0, f"{INTRUDERS} {mitigation:g}"))
    found.chosen = choose(found.points, keep)
    if out is not None:
        if found.chosen.name:
            damaged.intruders(mitigation)
        else:
            damaged.stand(found.chosen.alpha)
        _save(damaged.it, out)
    return found


# ---- models ----------------------------------------------------------------------------------------------------------


def _damaged(name: str, base: str | None, dtype: str, device: str | None) -> Damaged:
    if base_of(name) is not None:
        if base is not None and resolve(base) != base_of(name):
            raise UsageError(f"{name} is an adapter of {base_of(name)}, not of {base}. Leave --base out.")
        it = load(name, dtype, device)
        return _adapted(it)
    if base is None:
        try:
            base = began_with(name)
        except DataError:
            raise UsageError(f"{name} is a whole model; name the one that it was trained from: --base MODEL.") from None
    it = load(name, dtype, device)
    return Damaged(it, _between(it.model, weights(resolve(base), dtype), name, base))


def _between(model: nn.Module, start: nn.Module, name: str, base: str) -> Callable[[float], None]:
    """Moves all weights of a model between `start` and where they are."""
    ended = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    began = {key: weight.detach() for key, weight in start.named_parameters()}
    match(ended, began, f"The base {base}")
    odd = [key for key in ended if ended[key].shape != began[key].shape]
    if odd:
        raise IncompatibleError(
            f"{odd[0]} has the shape {list(ended[odd[0]].shape)} in {name} and {list(began[odd[0]].shape)} in {base}. "
            "Name the model that it was trained from."
        )

    @torch.no_grad()
    def stand(alpha: float) -> None:
        for key, weight in model.named_parameters():
            end = ended[key].float()
            weight.copy_(ended[key] if alpha == 1 else began[key].to(end.device).float().lerp(end, alpha))

    return stand


def _adapted(it: Trained) -> Damaged:
    from peft.tuners.lora import LoraLayer

    model, key = it.model, it.model.active_adapter
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and key in layer.lora_A]
    config = model.peft_config[key]
    moved = {id(part[key].weight) for layer in layers for part in (layer.lora_A, layer.lora_B)}
    odd = [name for name, weight in model.named_parameters() if f".{key}." in f"{name}." and id(weight) not in moved]
    if not layers or odd or config.bias != "none":
        raise IncompatibleError(
            f"{it.name} changes weights otherwise than by scale * B A alone ({config.peft_type.value}; DoRA, "
            "embeddings, modules_to_save and biases, too). Merge it (ftplus merge) and repair the whole model: --base "
            "MODEL."
        )
    ended = [
        (layer, layer.lora_A[key].weight.detach().clone(), layer.lora_B[key].weight.detach().clone())
        for layer in layers
    ]

    @torch.no_grad()
    def stand(alpha: float) -> None:
        for layer, a, b in ended:
            layer.lora_A[key].weight.copy_(a)
            layer.lora_B[key].weight.copy_(alpha * b)

    kept: dict[float, list[tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def intruders(mitigation: float) -> None:
        if mitigation not in kept:
            stand(1.0)
            kept[mitigation] = _without_intruders(model, key, layers, mitigation)
        for (layer, _, _), (a, b) in zip(ended, kept[mitigation], strict=True):
            layer.lora_A[key].weight.copy_(a)
            layer.lora_B[key].weight.copy_(b)

    return Damaged(it, stand, intruders)


def _without_intruders(model: Any, key: str, layers: list[nn.Module], mitigation: float) -> list[tuple[Tensor, Tensor]]:
    """A and B of every target after PEFT's reduction, whose adapter is taken away again.

    PEFT's lambda is the share that is left (seen in 0.20 and 0.21; its docstring says that it is taken away).
    """
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    other, left = "ftplus_without_intruders", 1 - mitigation
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT: that a second adapter is added, which is what is wanted
            reduce_intruder_dimension(model, key, other, mitigation_lambda=left, logging_sink=None)
        return [(layer.lora_A[other].weight.clone(), layer.lora_B[other].weight.clone()) for layer in layers]
    finally:
        model.set_adapter(key)
        with suppress(ValueError):
            model.delete_adapter(other)


def _save(it: Trained, out: Path) -> None:
    with attempt(f"--out {out}"):
        it.model.save_pretrained(out)
        it.tokenizer.save_pretrained(out)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _run(it: Trained, seed: int) -> Run:
    """What `loss` needs of a Run, without training."""
    named = dict(it.model.named_parameters())
    device = next(iter(named.values())).device
    return Run(it.model, named, {}, lambda rows: [], device, seed, Memory(), tokenizer=it.tokenizer)


def _batches(
    spec: TaskSpec, it: Trained, run: Run, rows: int, max_length: int, batch_size: int
) -> list[dict[str, Tensor]]:
    if spec.generate:
        data = self_generate(it.model, it.tokenizer, **spec.sampling(), seed=run.seed)
    else:
        data = spec.load(run.seed)
    data = data.select(range(min(rows, len(data))))
    if data.column_names == ["prompt"]:
        raise DataError(f"{spec.name}: its rows are questions without answers, which have no loss. Give a completion.")
    done = tokenize(data, it.tokenizer, max_length, spec.name)
    return collate(done.examples, pad_id(it.tokenizer), batch_size)


def shown(found: Repaired) -> Iterator[dict[str, Any]]:
    """Every point as plain types."""
    from .curve import learnt

    for point in found.points:
        yield {
            "point": str(point), "alpha": point.alpha, "learn": point.learn, "learnt": learnt(point, found.points),
            "protect": point.protect, "taken": point is found.chosen,
        }  # fmt: skip
