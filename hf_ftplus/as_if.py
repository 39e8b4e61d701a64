"""`ftplus sft --dry-run --as-if model=CONFIG,world=64,sharding=fsdp2`: the plan of a run on machines that are not here.

The model is built from its config on torch's meta device, which holds shapes and no numbers, so a config.json of 235 B
weights takes seconds and no memory. Each strategy says the bytes of its state itself (`preview`); the rest are the
formulas of `scaling.py`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import scaling
from .errors import DataError, FTPlusError, IncompatibleError, UsageError, nearest
from .scaling import IN_SHARDS, SHARDINGS, Cost, Device, Layout, Model

if TYPE_CHECKING:
    import torch

    from .config import RunConfig
    from .strategy import Run, Strategy

KEPT = {
    "schedule_free_sgd": 1, "sgd": 0, "lomo": 0, "adafactor": 0, "lion": 1, "adagrad": 1, "rmsprop": 1, "ademamix": 3,
}  # fmt: skip
"""Numbers that an optimizer keeps for each weight, by part of its name; Adam and all others keep two. Sums over rows
and columns (Adafactor) are nearly none."""
SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True)
class AsIf:
    """What `--as-if` says: KEY=VALUE, divided by commas."""

    model: str = ""
    world: int = 8
    sharding: str = "fsdp2"

    @classmethod
    def parse(cls, text: str) -> AsIf:
        """Raises UsageError for what is not KEY=VALUE, an unknown key or a bad value."""
        given: dict[str, Any] = {}
        known = [item.name for item in dataclasses.fields(cls)]
        for part in filter(None, map(str.strip, text.split(","))):
            key, equals, value = part.partition("=")
            if key not in known or not equals:
                raise UsageError(
                    f"--as-if: {part!r}; expected {', '.join(f'{name}=...' for name in known)}, divided by commas."
                    f"{nearest(key, known)}"
                )
            given[key] = value
        if "world" in given:
            if not given["world"].isdecimal() or int(given["world"]) < 1:
                raise UsageError(f"--as-if: world is {given['world']!r}; expected the number of ranks, 1 or more.")
            given["world"] = int(given["world"])
        found = cls(**given)
        if found.sharding not in SHARDINGS:
            raise UsageError(
                f"--as-if: sharding is {found.sharding!r}; expected one of {', '.join(SHARDINGS)}."
                f"{nearest(found.sharding, list(SHARDINGS))}"
            )
        return found


def plan(config: RunConfig, asked: AsIf) -> None:
    """Print what the run would take of each rank; no weight and no row is read.

    Raises:
        DataError: there is no config of that model.
        IncompatibleError: a strategy that cannot act under DeepSpeed ZeRO-3.
    """
    if asked.sharding.startswith("zero"):
        from .strategy import refuse_deepspeed

        refuse_deepspeed(list(config.strategies), int(asked.sharding.removeprefix("zero")))
    built = on_meta(asked.model or config.model.model_name_or_path, config)
    model, layout = numbers(built), layout_of(config, asked, built)
    device = Device()
    for line in (*about(asked, config, model, layout, device), *about_strategies(config, built, model, layout, device)):
        click.echo(line)
    rate = device.wire(layout.world) / 1e9
    click.echo(
        f"Seconds are of an {device.name} that computes {device.flops / 1e12:.0f} TFLOP/s, moves "
        f"{device.memory / 1e12:.1f} TB/s and sends {rate:.0f} GB/s for each rank. Nothing was "
        "loaded, trained or written."
    )


# ---- the model -------------------------------------------------------------------------------------------------------


def on_meta(name: str, config: RunConfig) -> torch.nn.Module:
    """The model that would be trained, adapters included, without its numbers."""
    import torch
    import trl
    from transformers import AutoConfig, AutoModelForCausalLM

    from .errors import reason
    from .model import resolve

    args = config.model
    trust = {"trust_remote_code": config.training.trust_remote_code}
    try:
        file = Path(name).expanduser()
        if file.is_file():
            kinds = json.loads(file.read_text(encoding="utf-8"))
            made = AutoConfig.for_model(kinds.pop("model_type"), **kinds)
        else:
            made = AutoConfig.from_pretrained(resolve(name), revision=args.model_revision, **trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made, dtype=dtype_of(args.dtype, made), **trust)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--as-if: no causal LM can be made from {name!r}: {type(error).__name__}: {reason(error)} Expected a "
            "config.json, a folder with one, or a name on the Hub."
        ) from error
    peft = trl.get_peft_config(args)
    if peft is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            model = get_peft_model(model, peft)
    return model


def dtype_of(said: str | None, made: Any) -> torch.dtype:
    import torch

    if said in (None, "auto"):
        return getattr(made, "dtype", None) or torch.float32
    return getattr(torch, said)


def numbers(built: torch.nn.Module) -> Model:
    """What `scaling` asks of a model."""
    from .logits import causal_lm
    from .teacher import outermost_lists

    inner = causal_lm(built)
    text = inner.config.get_text_config()
    sizes = {weight: weight.numel() for weight in built.parameters()}
    layers = [
        sum(weight.numel() for weight in layer.parameters()) for found in outermost_lists(inner) for layer in found
    ]
    root = sum(sizes.values()) - sum(layers)
    table, head = inner.get_input_embeddings().weight, inner.get_output_embeddings()
    tied = head is not None and head.weight is table
    experts = sum(weight.numel() for name, weight in built.named_parameters() if ".experts." in name)
    counts = (getattr(text, key, 0) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    several = next(filter(None, counts), 1)
    chosen = getattr(text, "num_experts_per_tok", None) or several
    inside = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    if experts:
        inside = chosen * (getattr(text, "moe_intermediate_size", None) or inside)
    return Model(
        weights=sum(sizes.values()),
        trained=sum(size for weight, size in sizes.items() if weight.requires_grad),
        active=int(sum(sizes.values()) - experts * (1 - chosen / several) - (0 if tied else table.numel())),
        layer=max(layers, default=0),
        root=root,
        top=root if tied else root - table.numel(),
        layers=len(layers),
        width=text.hidden_size,
        inner=inside,
    )


def layout_of(config: RunConfig, asked: AsIf, built: torch.nn.Module) -> Layout:
    """The ranks, rows and precision of the run."""
    args = config.training
    kind = str(getattr(args.optim, "value", args.optim))
    each = next(iter(built.parameters())).element_size()
    wide = 4 if asked.sharding == "fsdp2" else each  # accelerate casts what FSDP2 trains in mixed precision to fp32
    stored = 0.5 if config.model.load_in_4bit else 1 if config.model.load_in_8bit else each
    return Layout(
        world=asked.world,
        sharding=asked.sharding,
        rows=args.per_device_train_batch_size,
        length=args.max_length or 1024,
        accumulation=args.gradient_accumulation_steps,
        bf16=bool(args.bf16 or args.fp16),
        weight_bytes=wide,
        frozen_bytes=stored,
        optimizer_bytes=optimizer_bytes(kind, wide),
        checkpointing=args.gradient_checkpointing,
    )


def optimizer_bytes(kind: str, wide: int) -> float:
    """Of each trained weight, for what `--optim` names: as many numbers as it keeps, in 4 or 8 bits if it says so."""
    numbers = next((count for name, count in KEPT.items() if name in kind), 2)
    return numbers * (0.5 if "4bit" in kind else 1 if "8bit" in kind else wide)


# ---- strategies ------------------------------------------------------------------------------------------------------


def cost(strategy: Strategy, state: float, model: Model, layout: Layout, config: RunConfig, lora: bool) -> Cost | None:
    """What a strategy adds beside its bytes of state; None of one whose arithmetic nobody described here."""
    if strategy.name == "ewc":
        if lora and layout.sharding in IN_SHARDS:
            raise IncompatibleError("ewc cannot hold a LoRA adapter under FSDP2; use sharding=ddp.")
        return scaling.ewc(model, layout, state, strategy.rows * max(1, len(config.protect)), strategy.remember, lora)
    if strategy.name == "si":
        return scaling.si(model, layout, state, memory=bool(config.memory))
    if strategy.name == "distill":
        if layout.sharding in IN_SHARDS and not (lora or strategy.cache):
            raise IncompatibleError("distill keeps a copy of the start, which shards cannot; --set distill.cache=true.")
        auto = ("protect",) if config.protect else ("learn",)
        on = {"auto": auto, "both": ("learn", "protect")}.get(strategy.on, (strategy.on,))
        return scaling.distill(model, layout, state, strategy.share, strategy.cache, on, lora)
    if strategy.name == "replay":
        return scaling.replay(strategy.share)
    return Cost(note="rows in the stream, no state") if strategy.name == "multitask" else None


def state_bytes(strategy: Strategy, built: torch.nn.Module, config: RunConfig) -> float:
    """What a strategy says of itself, of all ranks together: with nothing to protect, else with one row."""
    import torch

    row = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}
    for protect in ({}, {"protect": [{**row, "attention_mask": row["labels"]}]}):
        try:
            return strategy.preview(sight(built, config, protect)).get("bytes", 0.0)
        except DataError:
            continue
    return 0.0


def sight(built: torch.nn.Module, config: RunConfig, protect: dict[str, list]) -> Run:
    """The Run of a model without numbers."""
    import torch

    from .strategy import Memory, Run
    from .weights import trainable

    return Run(
        model=built,
        weights=trainable(built),
        protect=protect,
        learn=lambda rows: [],
        device=torch.device("meta"),
        seed=config.training.seed,
        memory=Memory(read=Path(config.memory) if config.memory else None),
        strategies=tuple(config.strategies),
    )


# ---- in words --------------------------------------------------------------------------------------------------------


def about(asked: AsIf, config: RunConfig, model: Model, layout: Layout, device: Device) -> list[str]:
    """The run, and each rank's memory and wire."""
    held, sent = scaling.memory(model, layout), scaling.wire(model, layout)
    computing, sending = scaling.flops(model, layout) / device.flops, sum(sent.values()) / device.wire(layout.world)
    name = asked.model or config.model.model_name_or_path
    rows = f"{layout.rows} rows of {layout.length} tokens"
    rows += f", {layout.accumulation} times a step" if layout.accumulation > 1 else ""
    passes = "fp16" if config.training.fp16 else "bf16" if layout.bf16 else "fp32"
    return [
        f"as if     {name}: {model.weights / 1e9:,.2f} B weights, {model.trained / 1e9:,.2f} B trained, "
        f"{model.active / 1e9:,.2f} B for each token",
        f"ranks     {layout.world}, {layout.sharding}; on each {rows}; passes in {passes}",
        f"memory    {size(sum(held.values()))} on each rank ({parts(held)})",
        f"wire      {size(sum(sent.values()))} sent by each rank and step ({parts(sent)})",
        f"step      about {max(computing, sending):.2g} s: computing {computing:.2g} s, wire {sending:.2g} s",
    ]


def about_strategies(
    config: RunConfig, built: torch.nn.Module, model: Model, layout: Layout, device: Device
) -> list[str]:
    """What each strategy adds, or why it would not train so."""
    found, lora = [], bool(getattr(built, "peft_config", None))
    parted = layout.world if layout.sharding in IN_SHARDS and not lora else 1
    for strategy in config.strategies:
        try:
            state = state_bytes(strategy, built, config) / parted
            added = cost(strategy, state, model, layout, config, lora)
        except FTPlusError as error:
            found.append(f"strategy  {strategy.name}: refused: {error}")
            continue
        unknown = f"{size(state)} of state on each rank; its time is not known"
        said = in_words(added, model, layout, device) if added else unknown
        found.append(f"strategy  {strategy.name}: {said}")
    return found


def in_words(added: Cost, model: Model, layout: Layout, device: Device) -> str:
    plain = {"flops": scaling.flops(model, layout), "wire": sum(scaling.wire(model, layout).values())}
    step = scaling.seconds(device, layout.world, **plain)
    longer = scaling.seconds(
        device, layout.world, flops=plain["flops"] + added.flops, wire=plain["wire"] + added.wire, touched=added.touched
    )
    said = [
        f"{size(added.state)} of state and {size(added.wire)} of wire on each rank",
        f"a step {longer / step - 1:.1%} longer",
    ]
    if added.more_steps:
        said.append(f"an epoch {added.more_steps:.0%} longer")
    if added.before:
        begin = scaling.seconds(device, layout.world, **added.before)
        said.append(f"about {begin:.2g} s and {size(added.before['wire'])} before the first step")
    return "; ".join([*said, added.note] if added.note else said)


def parts(of: dict[str, float]) -> str:
    return ", ".join(f"{name} {size(bytes)}" for name, bytes in of.items())


def size(bytes: float) -> str:
    """Three digits and a unit: 4.41 GB."""
    for unit, name in SIZES:
        if bytes >= unit:
            return f"{bytes / unit:.3g} {name}"
    return f"{bytes:.0f} B"
