"""The tables of ../scaling.md: `python examples/scaling/table.py`. No weight is loaded; some seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ftplus import scaling
from hf_ftplus.as_if import numbers, size
from hf_ftplus.config import read_yaml
from hf_ftplus.scaling import Cost, Device, Layout, Model

MODELS = {
    "Llama 3.2 1B": "llama-3.2-1b.json",
    "Llama 3.1 8B": "llama-3.1-8b.json",
    "Llama 3.1 70B": "llama-3.1-70b.json",
    "Qwen3 235B-A22B": "qwen3-235b-a22b.json",
}
WORLDS = (8, 64, 512)


def model_of(file: str) -> Model:
    kinds = read_yaml(str(Path(__file__).with_name(file)))
    with torch.device("meta"):
        return numbers(AutoModelForCausalLM.from_config(AutoConfig.for_model(kinds.pop("model_type"), **kinds)))


def layout(world: int) -> Layout:
    """FSDP2 of `--accelerate_config fsdp2`, bf16, checkpointing, 4 rows of 2048 tokens on each rank, AdamW."""
    return Layout(world, "fsdp2", rows=4, length=2048)


def added(model: Model, at: Layout) -> dict[str, Cost]:
    """By each strategy with its own defaults; SI in a run with memory."""
    return {
        "ewc": scaling.ewc(model, at, 8 * model.trained / at.world),
        "si": scaling.si(model, at, 16 * model.trained / at.world, memory=True),
        "distill": scaling.distill(model, at, 0, 0.25, True, ("protect",), lora=False),
    }


def plain(models: dict[str, Model]) -> Iterator[str]:
    device = Device()
    yield "| model | ranks | memory of a rank | of it weights, gradients, optimizer | sent in a step | a step, about |"
    yield "|---|---|---|---|---|---|"
    for name, model in models.items():
        for world in WORLDS:
            at = layout(world)
            held, sent = scaling.memory(model, at), sum(scaling.wire(model, at).values())
            shards = sum(held[part] for part in ("weights", "gradients", "optimizer"))
            step = scaling.seconds(device, world, flops=scaling.flops(model, at), wire=sent)
            yield f"| {name} | {world} | {size(sum(held.values()))} | {size(shards)} | {size(sent)} | {step:.2g} s |"


def strategies(models: dict[str, Model]) -> Iterator[str]:
    device = Device()
    yield "| model | ranks | strategy | state of a rank | sent in a step | a step is longer by | before step 1 |"
    yield "|---|---|---|---|---|---|---|"
    for name, model in models.items():
        for world in WORLDS:
            at = layout(world)
            usual = {"flops": scaling.flops(model, at), "wire": sum(scaling.wire(model, at).values())}
            step = scaling.seconds(device, world, **usual)
            for strategy, cost in added(model, at).items():
                more = {"flops": usual["flops"] + cost.flops, "wire": usual["wire"] + cost.wire}
                longer = scaling.seconds(device, world, **more, touched=cost.touched) / step - 1
                before = "-"
                if cost.before:
                    before = f"{scaling.seconds(device, world, **cost.before):.2g} s, {size(cost.before['wire'])}"
                held, sent = size(cost.state), size(cost.wire)
                yield f"| {name} | {world} | {strategy} | {held} | {sent} | {longer:.1%} | {before} |"


def layouts(models: dict[str, Model]) -> Iterator[str]:
    model = models["Llama 3.1 8B"]
    yield "| 8B on 8 ranks | memory of a rank | sent in a step |"
    yield "|---|---|---|"
    for sharding in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        at = replace(layout(8), sharding=sharding)
        held, sent = scaling.memory(model, at), scaling.wire(model, at)
        yield f"| {sharding} | {size(sum(held.values()))} | {size(sum(sent.values()))} |"


def tables() -> list[str]:
    models = {name: model_of(file) for name, file in MODELS.items()}
    return ["\n".join(made(models)) for made in (plain, strategies, layouts)]


if __name__ == "__main__":
    print("\n\n".join(tables()))
