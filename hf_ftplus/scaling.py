"""What a run takes on machines that are not here: memory of each rank, bytes on the wire, what each strategy adds.

Formulas alone: numbers of a model (`as_if.py` reads them from its config) and a layout go in, bytes and FLOPs come out.
`tests/test_scaling.py` holds them against measured runs of small models, on one process and on two. Seconds follow from
a device's rates and are as good as those: read them to one digit.

    memory of a rank    weights + gradients + optimizer, whole (DDP) or 1/n of each (FSDP2, ZeRO-3), and what is whole
                        for a moment: buckets of gradients (DDP), the root and two layers (FSDP2)
    wire of a step      ring collectives over n ranks send (n-1)/n of a buffer to gather or to scatter it: DDP reduces
                        gradients (twice that); FSDP2 gathers weights forward and backward, and scatters gradients
    FLOPs of a step     2 per weight and token forward, 4 backward, 2 more where activations are computed again
"""

from __future__ import annotations

from dataclasses import dataclass, field

SHARDINGS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
IN_SHARDS = ("fsdp2", "zero3")
FISHER_ROWS = 4
"""Rows of a micro-batch of protect data (`batches.PROTECT_BATCH`)."""


@dataclass(frozen=True)
class Model:
    """Numbers of a model that cost depends on; all of weights but `layers`, `width`, `inner`."""

    weights: int
    trained: int
    active: int
    """That one token is multiplied with: without the table of embeddings, and of experts only the chosen ones."""
    layer: int
    """Of the largest layer, which FSDP2 gathers as one."""
    root: int
    """Outside of the layers: embeddings, last norm, LM head."""
    top: int
    """Last norm and LM head, which stay gathered between the passes (all of the root where weights are tied)."""
    layers: int
    width: int
    inner: int
    """Width inside the MLP that a token passes through: of all its experts together."""


@dataclass(frozen=True)
class Layout:
    """How a run lies on its ranks."""

    world: int
    sharding: str = "fsdp2"
    rows: int = 8
    """Of a micro-batch of one rank."""
    length: int = 1024
    accumulation: int = 1
    bf16: bool = True
    """Mixed precision: weights, gradients and optimizer in fp32, passes (and FSDP2's wire) in bf16."""
    weight_bytes: int = 4
    frozen_bytes: int = 4
    """Of a weight that is not trained (under LoRA)."""
    optimizer_bytes: float = 8
    """Of each trained weight: 8 for AdamW in fp32, 2 for 8-bit, 0 for SGD."""
    checkpointing: bool = True

    @property
    def pass_bytes(self) -> int:
        """Of a weight in a forward pass."""
        return 2 if self.bf16 else self.weight_bytes

    @property
    def ring(self) -> float:
        """Share of a buffer that a rank sends to gather or to scatter it."""
        return (self.world - 1) / self.world

    @property
    def tokens(self) -> int:
        """Of a rank and optimizer step."""
        return self.rows * self.length * self.accumulation


@dataclass(frozen=True)
class Device:
    """What a rank can do, as a whole run gets it and not as a data sheet says it."""

    name: str = "H100"
    flops: float = 0.4 * 989e12
    memory: float = 0.8 * 3.35e12
    """Bytes read or written in a second."""
    near: float = 0.8 * 450e9
    """Bytes that a rank sends in a second inside a machine (NVLink)."""
    far: float = 0.8 * 50e9
    """The same between machines: one 400 Gbit/s card for each rank."""
    machine: int = 8
    """Ranks of a machine."""

    def wire(self, world: int) -> float:
        """Bytes a second that a ring over `world` ranks gets through: those of its slowest part."""
        return self.near if world <= self.machine else self.far


@dataclass
class Cost:
    """What one strategy adds, for each rank."""

    state: float = 0.0
    """Bytes held while training."""
    flops: float = 0.0
    """In a step."""
    touched: float = 0.0
    """Bytes read and written in a step by elementwise arithmetic, beside any FLOPs."""
    wire: float = 0.0
    """Bytes sent in a step."""
    before: dict[str, float] = field(default_factory=dict)
    """`flops` and `wire` before the first step."""
    more_steps: float = 0.0
    """Of an epoch: 0.14 makes it a seventh longer."""
    note: str = ""


def memory(model: Model, layout: Layout) -> dict[str, float]:
    """Bytes on each rank, by what they hold."""
    n, wide, frozen = layout.world, layout.weight_bytes, model.weights - model.trained
    zero = layout.sharding.startswith("zero")
    master = 4.0 if zero and layout.pass_bytes < 4 else 0.0
    each = {
        "weights": (layout.pass_bytes if master else wide) * model.trained + layout.frozen_bytes * frozen,
        "gradients": (layout.pass_bytes if master else wide) * model.trained,
        "optimizer": (layout.optimizer_bytes + master) * model.trained,
    }
    split = {"ddp": (), "zero1": ("optimizer",), "zero2": ("optimizer", "gradients")}.get(layout.sharding, tuple(each))
    found = {name: held / n if name in split else held for name, held in each.items()}
    return found | {"for a moment": whole_for_a_moment(model, layout), "activations": activations(model, layout)}


def whole_for_a_moment(model: Model, layout: Layout) -> float:
    """Bytes of what is gathered, cast or bucketed while a step runs.

    DDP: buckets of gradients, and autocast's copies of the weights. Shards: the root and two layers (the next one is
    gathered while this one runs) with one layer's gradients.
    """
    if layout.sharding in IN_SHARDS:
        return layout.pass_bytes * (model.root + 3 * model.layer)
    copies = layout.pass_bytes * model.weights if layout.bf16 and layout.sharding == "ddp" else 0
    return copies + (layout.weight_bytes * model.trained if layout.sharding == "ddp" and layout.world > 1 else 0)


def activations(model: Model, layout: Layout) -> float:
    """Bytes kept for the backward pass, as measured of a Llama whose attention keeps no square (SDPA).

    For each token a layer keeps 4 numbers of the MLP's inner width and 10 of the model's, 17 halves of them in mixed
    precision, where the stream between layers stays in fp32. With checkpointing a layer keeps its input in fp32, and
    one at a time everything.
    """
    each, numbers = (2, 17) if layout.bf16 else (4, 10)
    layer = each * (numbers * model.width + 4 * model.inner)
    kept = layer + 4 * model.layers * model.width if layout.checkpointing else model.layers * layer
    return float(layout.rows * layout.length * kept)


def flops(model: Model, layout: Layout, rows: float | None = None) -> float:
    """Of training on a rank for a step, or on `rows` rows: of a weight and token 2 forward, 2 for the gradient of its
    input, 2 for its own if it is trained, and 2 for checkpointing's second forward pass."""
    tokens = layout.tokens if rows is None else rows * layout.length
    return (4.0 + 2.0 * model.trained / model.weights + 2.0 * layout.checkpointing) * model.active * tokens


def wire(model: Model, layout: Layout) -> dict[str, float]:
    """Bytes that a rank sends in a step, by what they are."""
    sent = layout.ring * layout.accumulation * layout.pass_bytes
    gradients = layout.ring * model.trained * (layout.weight_bytes if layout.sharding == "ddp" else layout.pass_bytes)
    if layout.sharding == "ddp":
        return {"gradients": 2 * gradients}
    if layout.sharding in ("zero1", "zero2"):
        scattered = gradients * (layout.accumulation if layout.sharding == "zero2" else 1)
        return {"weights": layout.ring * model.trained * layout.pass_bytes, "gradients": scattered}
    return {"weights": sent * gathered(model), "gradients": gradients}


def gathered(model: Model) -> float:
    """Weights that FSDP2 gathers for a forward and backward pass: all twice, but the top, which is needed at once."""
    return 2.0 * model.weights - model.top


def seconds(device: Device, world: int, *, flops: float = 0.0, touched: float = 0.0, wire: float = 0.0) -> float:
    """Computing and sending overlap; elementwise arithmetic does not."""
    return max(flops / device.flops, wire / device.wire(world)) + touched / device.memory


# ---- what strategies add ---------------------------------------------------------------------------------------------


def ewc(model: Model, layout: Layout, state: float, rows: int = 256, remember: bool = True, lora: bool = False) -> Cost:
    """Of a weight: w, w*, F and g are read, one difference and g written. Fisher: a pass over `rows` rows, shared.

    A LoRA target takes products of r x r alone, which is nothing beside a step.
    """
    shards = layout.world if layout.sharding in IN_SHARDS else 1
    cost = Cost(state=state, touched=0.0 if lora else 28.0 * model.trained / shards)
    mine = rows / layout.world
    if shards > 1:
        passes = -(-rows // (FISHER_ROWS * layout.world))
        sent = passes * layout.ring * layout.pass_bytes * (gathered(model) + model.trained)
    else:
        sent = 0.0 if lora else 2 * layout.ring * 4.0 * model.trained
    cost.before = {"flops": flops(model, layout, mine), "wire": sent}
    cost.note = f"Fisher of {rows} rows before the first step" + (", and as much after the last" if remember else "")
    return around_step(cost, model, layout, moments=1)


def si(model: Model, layout: Layout, state: float, memory: bool = False) -> Cost:
    """Of a weight on a GPU: a difference, the gradient cleaned of what is not finite, their product added, and a copy;
    with memory a second difference instead of the copy, and the pull."""
    shards = layout.world if layout.sharding in IN_SHARDS else 1
    cost = Cost(state=state, touched=(80.0 if memory else 52.0) * model.trained / shards)
    return around_step(cost, model, layout, moments=2)


def around_step(cost: Cost, model: Model, layout: Layout, moments: int) -> Cost:
    """Under ZeRO-1 and -2 every rank gathers all gradients in fp32 for the step, and where passes are in 16 bits the
    fp32 weights, too, before the step and, with 2 `moments`, after it (`zero.py`). Summed, so sent twice."""
    if layout.sharding in ("zero1", "zero2"):
        narrow = layout.pass_bytes < 4
        cost.state += 4.0 * model.trained * (1 + narrow)
        cost.wire += 2 * layout.ring * 4.0 * model.trained * (1 + narrow * moments)
        whole = "gradients and fp32 weights" if narrow else "gradients"
        cost.note = "; ".join(filter(None, (cost.note, f"of it whole {whole} once for all strategies")))
    return cost


def distill(
    model: Model, layout: Layout, state: float, share: float, cache: bool, on: tuple[str, ...], lora: bool
) -> Cost:
    """On learn tokens a teacher's forward pass; on protect tokens, `share` of a row for each, the student's, too.

    With `cache` the teacher's passes are before the first step. Of shards, the student's second pass gathers the layers
    twice and the root once, as it is gathered for the first pass, too.
    """
    teacher, rows = (0.0 if cache else 2.0 * model.active), share if "protect" in on else 0.0
    protect = flops(model, layout) * rows + teacher * layout.tokens * rows
    learn = (teacher + 4.0 * model.top) * layout.tokens if "learn" in on else 0.0  # logits that the task's loss keeps
    cost = Cost(state=state, flops=protect + learn)
    if layout.sharding in IN_SHARDS:
        passes = ("protect" in on) * (2.0 * model.weights - model.root) + (0.0 if cache else len(on) * model.weights)
        cost.wire = layout.ring * layout.accumulation * layout.pass_bytes * passes
    cost.note = "answers of the teacher on disk" if cache else "the adapter switched off" if lora else "a frozen copy"
    return cost


def replay(share: float) -> Cost:
    """Rows are added, not steps made longer; with max_steps nothing is."""
    return Cost(more_steps=share / (1 - share), note="rows in the stream, no state")
