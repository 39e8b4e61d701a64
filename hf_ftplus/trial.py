"""A tiny run under this launch, beside the same steps of one process: `ftplus doctor --distributed`.

see(accelerator, found)     on every rank: what it holds of the weights, and whether a Trainer, with EWC where that
                            may act, makes the update of one process
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env

from .errors import IncompatibleError
from .formats import IGNORED
from .tensorfile import whole
from .weights import full_shape, local, sharded, trainable

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn
    from transformers import Trainer, TrainingArguments

    from .cluster import Found
    from .strategies.ewc import EWC
    from .strategy import Strategy

Rows = dict[str, "Tensor"]

STEPS, ROWS, RATE = 3, 2, 0.5
"""Steps, rows of each rank in each, learning rate."""
GIVING_WAY = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
"""What of a DeepSpeed configuration is of a run of the user's."""
OFFLOADED = "the optimizer is in CPU memory"


def see(accelerator: Accelerator, found: Found) -> None:
    """Train a tiny model with EWC as a run of this launch does, and on every rank alone on all rows."""
    from .testing import tiny_batches

    world, device = accelerator.num_processes, accelerator.device
    most = 1e-4 if accelerator.mixed_precision == "no" else 0.05
    learn = tiny_batches(seed=2, count=ROWS * world, size=1)
    protect = tiny_batches(seed=1, count=2 * world, size=1)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, accelerator)
        why = without_ewc(args)
        if why == OFFLOADED:  # DeepSpeed makes an Adam of its own of whatever optimizer it is given
            found.facts["sharding"] = {"DeepSpeed": f"not tried: ewc and si are refused where {why}"}
            return
        strategies = [] if why else [ewc()]
        try:
            trainer = run(args, strategies, learn, protect)
        except IncompatibleError as error:
            found.faults.append(str(error).rstrip("."))
            return
    found.facts["sharding"] = held(trainer, found)
    together, single = weights_and_state(trainer.model, strategies), alone(learn, protect, device, bool(strategies))
    how = f"without ewc, which is refused where {why}" if why else "with ewc"
    found.facts["laws"] = compared(together, single, start(), most, how, found)


def ewc() -> EWC:
    from .strategies.ewc import EWC

    return EWC(strength=1.0, fisher="empirical", remember=False)


def arguments(folder: str, accelerator: Accelerator) -> TrainingArguments:
    """Of the trial run; what a DeepSpeed configuration says of steps, clipping and optimizer gives way to them."""
    from transformers import TrainingArguments

    precision = accelerator.mixed_precision
    args = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=ROWS, optim="sgd",
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to="none",
        disable_tqdm=True, bf16=precision == "bf16", fp16=precision == "fp16",
        use_cpu=accelerator.device.type == "cpu",
    )  # fmt: skip
    config = deepspeed(args)
    for key in config.keys() & {"optimizer", "scheduler"}:
        del config[key]
    for key in GIVING_WAY:
        config[key] = "auto"
    return args


def deepspeed(args: TrainingArguments) -> dict[str, Any]:
    """DeepSpeed's configuration, as it is held; empty without DeepSpeed."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return plugin.deepspeed_config if plugin else {}


def without_ewc(args: TrainingArguments) -> str:
    """Where EWC is refused under DeepSpeed: a run may do without, and so does the trial."""
    from .refusals import zero_stage

    config = deepspeed(args)
    if (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none") != "none":
        return OFFLOADED
    if config and zero_stage(args) not in (1, 2):
        return f"ZeRO-{zero_stage(args)} trains"
    return "DeepSpeed trains in fp16" if config and args.fp16 else ""


def run(args: TrainingArguments, strategies: list[Strategy], learn: list[Rows], protect: list[Rows]) -> Trainer:
    """A trainer after some steps on all rows, shared out to ranks.

    Raises:
        IncompatibleError: strategies cannot act in what this launch makes of a model.
    """
    from transformers import PrinterCallback, Trainer

    from .testing import tiny_model
    from .trainer import attach

    trainer = Trainer(tiny_model(), args, train_dataset=[unbatched(rows) for rows in learn])
    trainer.remove_callback(PrinterCallback)
    attach(trainer, *strategies, protect=protect if strategies else None).train()
    return trainer


def unbatched(rows: Rows) -> Rows:
    return {key: tensor[0] for key, tensor in rows.items()}


def held(trainer: Trainer, found: Found) -> dict[str, str]:
    """What of the weights this rank holds, as their tensors say."""
    from .refusals import zero_stage

    weights, cpu = list(trainer.model.parameters()), trainer.args.device.type == "cpu"
    every = sum(full_shape(weight).numel() for weight in weights)
    mine = sum(getattr(weight, "ds_tensor", local(weight)).numel() for weight in weights)
    zero = f"DeepSpeed ZeRO-{zero_stage(trainer.args)}" if trainer.is_deepspeed_enabled else ""
    for name, there in (("FSDP", sharded(weights)), ("DEEPSPEED", zero)):
        if asked_for(name) and not there:
            why = ": accelerate shards on no CPU" if cpu else ""
            found.faults.append(f"{name} was asked for, and every rank holds the whole model{why}")
    said = f"on: {zero or 'FSDP2'}, a rank holds {mine / every:.0%} of the weights"
    if mine == every:
        said = f"off: every rank holds all{f' ({zero} shares out the optimizer)' if zero else ''}"
    return {"weights": said, "launched as": str(trainer.args.distributed_state.distributed_type).rpartition(".")[2]}


def asked_for(what: str) -> bool:
    return parse_flag_from_env(f"ACCELERATE_USE_{what}")


def alone(learn: list[Rows], protect: list[Rows], device: torch.device, with_ewc: bool) -> dict[str, Tensor]:
    """The same steps in a bare loop on this rank, in fp32."""
    from .strategy import Memory, Run
    from .testing import tiny_model

    model, strategies = tiny_model().to(device), [ewc()] if with_ewc else []
    weights = trainable(model)
    optimizer = torch.optim.SGD(weights.values(), lr=RATE)
    run = Run(model, weights, {"protect": protect}, lambda rows: [], device, 0, Memory())
    for strategy in strategies:
        strategy.prepare(run)
    tokens = sum(int((rows["labels"][:, 1:] != IGNORED).sum()) for rows in learn)
    for _ in range(STEPS):
        for rows in learn:
            count = (rows["labels"][:, 1:] != IGNORED).sum().to(device)
            (model(**{key: tensor.to(device) for key, tensor in rows.items()}).loss * count / tokens).backward()
        for strategy in strategies:
            with torch.no_grad():
                strategy.before_step(run)
        optimizer.step()
        optimizer.zero_grad()
    return weights_and_state(model, strategies)


def weights_and_state(model: nn.Module, strategies: list[Strategy]) -> dict[str, Tensor]:
    found = {f"weights.{name}": gathered(weight) for name, weight in trainable(model).items()}
    for strategy in strategies:
        found |= {f"state.{name}": whole(tensor) for name, tensor in strategy.state_dict().items()}
    return found


def gathered(weight: nn.Parameter) -> Tensor:
    """All of a weight, on the CPU."""
    if hasattr(weight, "ds_shape"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([weight]):
            return weight.detach().cpu().clone()
    return whole(weight)


def start() -> dict[str, Tensor]:
    from .testing import tiny_model

    return weights_and_state(tiny_model(), [])


def compared(
    together: dict[str, Tensor],
    single: dict[str, Tensor],
    start: dict[str, Tensor],
    most: float,
    how: str,
    found: Found,
) -> dict[str, str]:
    """Same on all ranks to the bit; and that of one process, within `most` of the way that the weights went."""
    bits = [float(sum(tensor.double().sum() for tensor in together.values()))]
    everywhere: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, bits)
    alike = all(one == everywhere[0] for one in everywhere)
    far = torch.stack([(together[name].float() - single[name]).abs().max() for name in start]).max().item()
    went = torch.stack([(single[name] - begun).abs().max() for name, begun in start.items()]).max().item()
    if not alike:
        found.faults.append("ranks end with different weights or strategy state; expected the same on all")
    if not far <= most * went:
        found.faults.append(
            f"an update {how} is not that of one process: {far / went:.1e} of the way apart, expected {most:.0e}"
        )
    return {
        "same on all ranks": "yes, weights and what strategies hold" if alike else "no",
        "as one process": f"{far / went:.0e} of the way apart after {STEPS} steps {how} (allowed {most:.0e})",
    }
