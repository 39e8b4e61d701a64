"""Which run a checkpoint is of: compared before a Trainer loads any of it, for most of what differs it would not see.

Same shapes with another base model, tokenizer, adapter, order of rows or size of batches all load, and train on to
something that neither run would have become.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from .commit import on_first_rank
from .errors import IncompatibleError
from .examples import text_tokenizer
from .fingerprint import tokenizer_fingerprint
from .sketch import sketch
from .specs import as_tasks
from .state import identity, same_identity
from .weights import canonical, sharded

logger = logging.getLogger("hf_ftplus")

BATCH = 100
"""Rows that are read at a time."""
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
SAID = {
    "tokenizer": "another tokenizer or chat template",
    "frozen": "other weights below the adapter (another base model, or another dtype)",
    "rows": "other training rows, or another number or order of them",
    "seed": "another seed",
    "batch": "another number of rows per step",
    "dtype": "trained weights of another dtype",
}
REFUSED = (
    "optim",
    "optim_args",
    "lr_scheduler_type",
    "loss_type",
    "completion_only_loss",
    "assistant_only_loss",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "train_sampling_strategy",
    "dataloader_drop_last",
)
"""Arguments with which a run does not go on as another one: state of another optimizer, another loss, other rows in a
step."""
OVERRULED = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
"""Arguments whose values a checkpoint brings back, in its optimizer and schedule, whatever is given now."""
APPLIED = ("max_grad_norm", "warmup_steps", "bf16", "fp16", "ignore_data_skip", "max_steps", "num_train_epochs")
"""Arguments that hold from here on as they are given now."""
REMEMBERING = ("reduce_lr_on_plateau", "greedy")
"""Schedules whose own settings a checkpoint brings back; those of others are applied anew."""


def origin(trainer: Any) -> dict[str, Any]:
    """What a checkpoint of this trainer keeps about its run; asked before anything is loaded or wrapped."""
    args, tokenizer = trainer.args, text_tokenizer(trainer.processing_class)
    return {
        "model": identity(trainer.model),
        "frozen": _as_loaded(trainer, frozen),
        "tokenizer": tokenizer_fingerprint(tokenizer) if hasattr(tokenizer, "special_tokens_map") else None,
        "rows": rows(trainer.train_dataset, getattr(trainer.ftplus, "learn_rows", None)),
        "seed": [args.seed, args.data_seed],
        "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "dtype": _as_loaded(trainer, dtypes),
        "protect": protected(trainer.ftplus.protect if trainer.ftplus else None),
        "arguments": arguments(args),
        "split": [args.train_batch_size, args.gradient_accumulation_steps, args.world_size],
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def _as_loaded(trainer: Any, ask: Callable[[torch.nn.Module], Any]) -> Any:
    """What `ask` finds in the weights; None once FSDP or DeepSpeed placed them, in a dtype of its choice.

    Under FSDP the first process alone may have loaded them; under ZeRO-3 each has a part from the start.
    """
    model, sharding = trainer.model, trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharding and (trainer.model_wrapped is not model or sharded(model.parameters())):
        return None
    if sharding and not any(hasattr(weight, "ds_shape") for weight in model.parameters()):
        return on_first_rank(lambda: ask(model))
    return ask(model)


def frozen(model: torch.nn.Module) -> str | None:
    """Digest of some elements of each weight that a checkpoint does not bring; None where it brings all."""
    held = {canonical(name): weight.dtype for name, weight in model.named_parameters() if not weight.requires_grad}
    if not held or not getattr(model, "peft_config", None):  # without an adapter frozen weights are saved, too
        return None
    found = hashlib.sha256()
    for name, part in sorted(sketch(model).items()):
        if name in held and held[name].is_floating_point:
            found.update(f"{name} {held[name]}\n".encode() + part.numpy().tobytes())
    return found.hexdigest()


def dtypes(model: torch.nn.Module) -> dict[str, int]:
    """Number of trainable weights of each dtype."""
    trained = (weight for weight in model.parameters() if weight.requires_grad)
    return dict(Counter(str(weight.dtype).removeprefix("torch.") for weight in trained))


def arguments(args: Any) -> dict[str, Any]:
    """What was asked of optimizer, schedule and loss; what a Trainer's arguments do not have is left out."""
    names = (*REFUSED, *OVERRULED, *APPLIED, "lr_scheduler_kwargs")
    named = {name: getattr(args, name) for name in names if hasattr(args, name)}
    found = {name: getattr(value, "value", value) for name, value in named.items()}
    return {**found, "optim": str(found["optim"]).removesuffix("_fused")}  # the same, and the checkpoint's comes back


def rows(dataset: Any, first: int | None = None) -> dict[str, Any] | None:
    """Number and digest of the (first) rows of a dataset; None for a stream, or for what is not of `datasets`."""
    if not isinstance(dataset, Dataset):
        return None
    count = min(len(dataset), first or len(dataset))
    found = hashlib.sha256()
    for table in dataset.with_format("arrow").select(range(count)).iter(BATCH):
        for name in sorted(table.column_names):
            found.update(name.encode())
            for part in _bytes(table[name].combine_chunks()):
                found.update(part)
    return {"count": count, "sha256": found.hexdigest()}


def _bytes(column: Any) -> Iterator[bytes]:
    """What an Arrow array holds, whatever memory it is spread over: tokens as they are, all else as JSON."""
    if not column.null_count and hasattr(column, "value_lengths"):  # a list in each row
        yield column.value_lengths().to_numpy().astype("<i8").tobytes()
        yield from _bytes(column.flatten())
    elif not column.null_count and str(column.type).startswith(("int", "uint")):
        yield column.to_numpy().astype("<i8").tobytes()
    elif str(column.type).startswith("struct<bytes: binary"):  # images and sounds
        for part in column.flatten():
            yield from _bytes(part)
    elif str(column.type) in ("binary", "large_binary"):
        for value in column:
            yield b"-" if (content := value.as_py()) is None else f"{len(content)} ".encode() + content
    else:
        yield json.dumps(column.to_pylist(), default=_plain, sort_keys=True).encode()


def protected(protect: Any) -> dict[str, Any]:
    """The same of each protect task; None for rows that are yet to be read or written."""
    tasks = as_tasks(protect)
    return {name: _listed(task) if isinstance(task, list) else rows(task) for name, task in tasks.items()}


def _listed(task: list[Any]) -> dict[str, Any]:
    found = hashlib.sha256()
    for row in task:
        found.update(json.dumps(row, default=_plain, sort_keys=True).encode())
    return {"count": len(task), "sha256": found.hexdigest()}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else repr(value)


def refuse_other(then: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """Raise where a checkpoint is not of the run that is to go on from it.

    Args:
        then: what `origin` gave when it was written; empty if it was not asked.
        now: the same of the run.

    Raises:
        IncompatibleError: names what differs, and both ways on.
    """
    if not then:
        return
    if "model" in then:
        same_identity(then["model"], now["model"], checkpoint)
    keys = [key for key in SAID if _otherwise(then.get(key), now[key])]
    differ = [_said(key, then[key], now[key]) for key in keys]
    differ += [f"other rows to protect ({said})" for said in _protected_otherwise(then.get("protect"), now["protect"])]
    asked = _asked_otherwise(then.get("arguments", {}), now["arguments"])
    differ += [f"another {name} ({said})" for name, said in asked.items() if name in REFUSED]
    if differ:
        raise IncompatibleError(
            f"{checkpoint} was written with {'; '.join(differ)}. Put back what it was to go on, or start a new run "
            f"from its weights: --model_name_or_path {checkpoint}"
        )
    _warn_of_arguments(asked, checkpoint, now["arguments"].get("lr_scheduler_type"))
    before = then.get("versions", {})
    notes = [] if then.get("split") == now["split"] else ["the rows of a step shared out otherwise"]
    changed = {name: found for name, found in now["versions"].items() if before.get(name) != found}
    notes += [f"{name} {before.get(name)}, not {found}" for name, found in changed.items()]
    if notes:
        logger.warning("%s was written with %s: the run goes on, but not bit for bit.", checkpoint, ", ".join(notes))


def _asked_otherwise(then: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Of the arguments that both know: what was asked then, and is asked now."""
    both = [name for name in now if name in then and then[name] != now[name]]
    return {name: f"{then[name]} there, {now[name]} here" for name in both}


def _protected_otherwise(then: dict[str, Any] | None, now: dict[str, Any]) -> Iterator[str]:
    if not then or not now:
        return
    if sorted(then) != sorted(now):
        yield f"{', '.join(sorted(then))} there, {', '.join(sorted(now))} here"
        return
    yield from (name for name, rows in now.items() if _otherwise(then[name], rows))


def _otherwise(then: Any, now: Any) -> bool:
    """Whether they differ in what both know."""
    if isinstance(then, dict) and isinstance(now, dict) and "count" in now:  # rows: once it was the digest of some
        return any(then.get(key, value) != value for key, value in now.items())
    return then is not None and now is not None and then != now


def _warn_of_arguments(asked: dict[str, str], checkpoint: Path, schedule: str | None) -> None:
    overruled, applied = list(OVERRULED), list(APPLIED)
    (overruled if schedule in REMEMBERING else applied).append("lr_scheduler_kwargs")
    for names, what in (
        (overruled, "the checkpoint's go on, what is given now has no effect"),
        (applied, "what is given now holds"),
    ):
        said = [f"{name} ({asked[name]})" for name in names if name in asked]
        if said:
            logger.warning("%s was written with another %s: %s.", checkpoint, "; ".join(said), what)


def _said(key: str, then: Any, now: Any) -> str:
    if key in ("seed", "batch", "dtype"):
        then, now = (", ".join(value) if isinstance(value, dict) else value for value in (then, now))
        return f"{SAID[key]} ({then} there, {now} here)"
    if key == "rows" and then.get("count") != now["count"]:
        return f"{SAID[key]} ({then.get('count')} there, {now['count']} here)"
    return SAID[key]
