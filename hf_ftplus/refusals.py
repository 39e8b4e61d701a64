"""Launchers, settings and models under which strategies would act wrongly, refused before anything is trained."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import TrainingArguments

from .errors import IncompatibleError
from .logits import causal_lm
from .strategy import Strategy, acts_on_gradients, refuse_deepspeed
from .zero import under_deepspeed

if TYPE_CHECKING:
    from .config import RunConfig
    from .trainer import SFTTrainer

KINDS = {"tp": "tensor", "cp": "context", "sp": "sequence"}
"""Parallelism that splits weights, or (the last two) rows, by the name of its size in an accelerate config."""


def refuse(strategies: list[Strategy], args: TrainingArguments) -> None:
    """Raise for launchers and settings under which a strategy would act wrongly, before a model is loaded."""
    if args.deepspeed or args.distributed_state.distributed_type == "DEEPSPEED":
        refuse_deepspeed(strategies, zero_stage(args))
    if strategies and args.auto_find_batch_size:
        raise IncompatibleError(
            "auto_find_batch_size starts training again from weights that already moved, which strategies would take "
            "for the starting model. Set per_device_train_batch_size instead."
        )
    if strategies and getattr(args, "enable_jit_checkpoint", False):
        raise IncompatibleError(
            "enable_jit_checkpoint saves within a step, from which no run goes on as it would have. Leave it out: "
            "ftplus sft saves after the step when it is told to stop."
        )
    if strategies and args.save_on_each_node:
        raise IncompatibleError(
            "save_on_each_node: what strategies remember is written once, by the first node, and would be missing on "
            "the others. Leave it out, and let --output_dir be a folder that all nodes see."
        )
    acting = [it.name for it in strategies if acts_on_gradients(it)]
    optimizer = getattr(args.optim, "value", args.optim)
    if acting and ("lomo" in optimizer or optimizer.endswith("layerwise")):
        raise IncompatibleError(
            f"{', '.join(acting)} acts on whole gradients before the optimizer's step, and --optim {optimizer} moves "
            "each weight as soon as its gradient is there. Choose another optimizer, such as adamw_torch."
        )
    looking = looking_inside(strategies)
    if looking and offloads(args):
        raise IncompatibleError(
            f"{', '.join(looking)} works on the device, and FSDP is told to keep weights in CPU memory "
            "(fsdp_offload_params). Set fsdp_offload_params: false in the accelerate config, or "
            "fsdp_config={'cpu_offload': False} in the arguments."
        )
    parts = parallelism(args)
    refuse_tensor_parallel(strategies, parts["tp"])
    reading = [it.name for it in strategies if it.overrides("token_loss")]
    for kind, names in (("cp", reading), ("sp", looking)):
        if names and parts[kind] > 1:
            raise IncompatibleError(
                f"{', '.join(names)} needs whole rows, which {KINDS[kind]} parallelism splits over {parts[kind]} "
                f"processes. Set {kind}_size: 1 in the accelerate config, or type --accelerate_config fsdp2."
            )
    for strategy in strategies if not args.resume_from_checkpoint else ():
        strategy.refuse(None)


def refuse_answers(args: TrainingArguments, instead: str) -> None:
    """Raise where words would be asked of a model in parts, or that reads rows in parts: they come out wrong (under
    context parallelism accelerate drops the padding mask for good) or never."""
    apart = [f"{KINDS[kind]} parallelism ({kind}_size: {size})" for kind, size in parallelism(args).items() if size > 1]
    apart += ["FSDP with weights in CPU memory (fsdp_offload_params: true)"] if offloads(args) else []
    if apart:
        raise IncompatibleError(f"Under {apart[0]} the model can neither be measured nor write rows. {instead}")


def refuse_parts(strategies: list[Strategy], model: nn.Module, args: TrainingArguments) -> None:
    """Raise where strategies would take a part of a weight, or of the rows, for the whole."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise IncompatibleError(
            "FSDP version 1 flattens weights into one, so strategies cannot tell them apart. Set fsdp_version: 2 "
            "in the accelerate config, or type --accelerate_config fsdp2."
        )
    reading = [strategy.name for strategy in strategies if strategy.overrides("token_loss")]
    if reading and args.n_gpu > 1:
        raise IncompatibleError(
            f"{', '.join(reading)} reads hidden states, of which each of {args.n_gpu} devices of one process would see "
            f"a part (DataParallel). Start a process for each: accelerate launch --num_processes {args.n_gpu} "
            "SCRIPT.py; or choose one device: CUDA_VISIBLE_DEVICES=0."
        )
    looking = looking_inside(strategies)
    if looking and len(devices := devices_of(model)) > 1:
        raise IncompatibleError(
            f"{', '.join(looking)} compares tensors that device_map spreads over {len(devices)} devices of one process "
            f"({', '.join(devices)}). Choose one device: CUDA_VISIBLE_DEVICES=0, or device_map={{'': 0}} to load the "
            "model with (in model_init_kwargs where the trainer loads it); or start a process for each: accelerate "
            "launch SCRIPT.py, with --use_fsdp --fsdp_version 2 where one device is too small."
        )
    refuse_tensor_parallel(strategies, getattr(model, "tp_size", None) or 1)


def refuse_encoder_decoder(model: nn.Module, names: list[str]) -> None:
    """Raise for a model that reads one text and writes another: rows here are one text, of which a part is learnt."""
    if getattr(getattr(causal_lm(model), "config", None), "is_encoder_decoder", False):
        raise IncompatibleError(
            f"{', '.join(names)} reads and mixes rows of causal language models, and {type(causal_lm(model)).__name__} "
            "is an encoder with a decoder. Expected a decoder-only model; of such a one, only si without protect data."
        )


def refuse_tensor_parallel(strategies: list[Strategy], size: int) -> None:
    """Raise for what would take a part of a weight, one of `size`, for all of it."""
    if size > 1 and (looking := looking_inside(strategies)):
        raise IncompatibleError(
            f"{', '.join(looking)} cannot tell the parts of a weight that tensor parallelism splits over {size} "
            "processes (tp_plan, tp_size, autotp_size). Load the model without it, and type --accelerate_config fsdp2."
        )


def parallelism(args: TrainingArguments) -> dict[str, int]:
    """Into how many parts accelerate or DeepSpeed is told to split weights (tp) and rows (cp, sp); 1 for not at all."""
    config, told = getattr(args, "parallelism_config", None), dict.fromkeys(KINDS)
    if config is not None:
        told = {kind: getattr(config, f"{kind}_size", None) for kind in KINDS}
    elif parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        told = {kind: os.environ.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE") for kind in KINDS}
    deepspeed = getattr(getattr(args, "deepspeed_plugin", None), "deepspeed_config", None) or {}
    split = (deepspeed.get("tensor_parallel") or {}).get("autotp_size")
    return {kind: max(_size(size), _size(split) if kind == "tp" else 1) for kind, size in told.items()}


def _size(told: Any) -> int:
    """1 where it is left out, or "auto"; who splits will complain of anything else."""
    return int(told) if str(told).isdigit() else 1


def looking_inside(strategies: list[Strategy]) -> list[str]:
    """Names of those that look at weights, gradients or hidden states; the others only choose rows."""
    return [it.name for it in strategies if it.overrides("token_loss") or acts_on_gradients(it)]


def devices_of(model: nn.Module) -> list[str]:
    """Where a device_map put parts of the model, as each was first spelled: 0, "cuda" and "cuda:0" are one device."""
    found: dict[str, str] = {}
    for device in (getattr(causal_lm(model), "hf_device_map", None) or {}).values():
        kind, _, index = str(device).partition(":")
        number = kind if kind.isdigit() else index or "0"
        found.setdefault(kind if kind in ("cpu", "disk") else number, str(device))
    return list(found.values())


def offloads(args: TrainingArguments) -> bool:
    """Whether FSDP is told to keep weights in CPU memory, by launcher or `args`; on CPUs accelerate leaves it out."""
    given = getattr(args, "fsdp_plugin_args", None)
    launched = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if (given is None and not launched) or args.distributed_state.distributed_type in ("NO", "MULTI_CPU"):
        return False
    return bool((given or {}).get("cpu_offload", parse_flag_from_env("FSDP_OFFLOAD_PARAMS")))


def zero_stage(args: TrainingArguments) -> int:
    """DeepSpeed's ZeRO stage of a run; 0 without it."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return int(getattr(plugin, "zero_stage", 0) or 0)


# ---- what a launch makes impossible for a whole run ------------------------------------------------------------------


def refuse_fsdp(config: RunConfig, trainer: SFTTrainer) -> None:
    """Raise for what cannot be asked of a model that is sharded when training starts."""
    if config.measure_rows and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise IncompatibleError(
            "FSDP version 1 flattens weights into one, so nothing can be measured. Set fsdp_version: 2 in the "
            "accelerate config, or type --accelerate_config fsdp2, or --measure-rows 0."
        )
    mixing = [strategy.name for strategy in config.strategies if strategy.overrides("mix")]
    mixing += [f"the share of {name}" for name in config.shares]
    if mixing and any(spec.generate for spec in config.protect):
        raise IncompatibleError(
            f"{mixing[0]} mixes rows before training starts, and under FSDP the model can write none until then. Give "
            "protect data that exists instead of self:N."
        )


def refuse_zero3(config: RunConfig) -> None:
    """Raise before a model loads for what cannot be asked of one that DeepSpeed keeps in parts from the start."""
    if zero_stage(config.training) != 3:
        return
    if config.measure_rows:
        raise IncompatibleError(
            "Under DeepSpeed ZeRO-3 no process holds a whole model, so nothing can be measured. Type --measure-rows 0 "
            "(and `ftplus eval` afterwards), or --accelerate_config fsdp2 or zero2."
        )
    if any(spec.generate for spec in config.protect):
        raise IncompatibleError(
            "Under DeepSpeed ZeRO-3 no process holds a whole model, so it can write nothing. Give protect data that "
            "exists instead of self:N, or launch with --accelerate_config fsdp2."
        )


def refuse_parted(config: RunConfig) -> None:
    """Raise before a model loads for words that would be asked of one in parts."""
    if config.measure_rows:
        refuse_answers(config.training, "Type --measure-rows 0 (and `ftplus eval` afterwards).")
    if any(spec.generate for spec in config.protect):
        refuse_answers(config.training, "Give protect data that exists instead of self:N.")


def refuse_several_devices(strategies: list[Strategy], args: TrainingArguments) -> None:
    """Raise where one process would spread the model over several devices (DataParallel)."""
    looking = looking_inside(strategies)
    if looking and args.parallel_mode.value == "not_distributed" and args.n_gpu > 1:
        raise IncompatibleError(
            f"{args.n_gpu} devices and one process, over which TRL would spread the model; {', '.join(looking)} cannot "
            "compare its parts. Type the same command with --num_processes "
            f"{args.n_gpu}, or choose one device: CUDA_VISIBLE_DEVICES=0."
        )


def clipping(strategies: list[Strategy], args: TrainingArguments, protect: bool, memory: bool) -> str:
    """What clipping does to strategies that add to gradients; nothing if nothing is clipped, or none does.

    Args:
        protect, memory: whether there is any; without them ewc and si only look.
    """
    idle = {"ewc": not (protect or memory), "si": not memory}
    adding = [it for it in strategies if it.overrides("before_step") and not idle.get(it.name)]
    if not args.max_grad_norm or not any(getattr(it, "strength", 1) != 0 for it in adding):
        return ""
    if under_deepspeed(args):
        return (
            f"DeepSpeed clips gradients to {args.max_grad_norm:g} with what strategies added to them; max_grad_norm 0 "
            "clips neither"
        )
    return (
        f"gradients are clipped to {args.max_grad_norm:g} before strategies add to them, which makes a strength weigh "
        "more than it says; max_grad_norm 0 keeps it to its word"
    )
