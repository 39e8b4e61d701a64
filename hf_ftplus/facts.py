"""What a report says of a run beside its figures: command, settings, versions, seconds and what strategies cost."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import stopping
from .callback import STATE_FOLDER
from .config import SECRETS
from .report import history

if TYPE_CHECKING:
    from .config import RunConfig
    from .trainer import SFTTrainer

TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
"""As the Hub gives them out, wherever they stand."""


def facts(config: RunConfig, trainer: SFTTrainer, seconds: dict[str, float], began: int) -> dict[str, Any]:
    """What the report says beside the figures: how the run was made and what it cost, since the step at which it began
    or was resumed."""
    return {
        "command": ["ftplus", *masked(sys.argv[1:])],
        "config": config.resolved(),
        "versions": versions(),
        "seed": config.training.seed,
        "steps": trainer.state.global_step,
        "resumed_at": began or None,
        "stopped": stopping.why_stopped(trainer),
        "device": str(trainer.args.device),
        "processes": trainer.args.world_size,
        "seconds": seconds,
        "device_bytes": most_held(trainer.args.device),
        "memory": Path(config.training.output_dir, STATE_FOLDER, "memory", "manifest.json").is_file(),
        "strategies": {} if trainer.ftplus is None else strategy_facts(trainer),
        "history": history(trainer.state.log_history),
    }


def count_memory_anew(device: torch.device) -> None:
    """Let `most_held` be of what comes now, and not of an earlier run in this process."""
    if reset := getattr(torch.get_device_module(device), "reset_peak_memory_stats", None):
        reset(device)


def most_held(device: torch.device) -> int | None:
    """Bytes of the device's memory that tensors of this process held at most; None where nothing counts them (CPU)."""
    count = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return count(device) if count else None


def masked(words: list[str]) -> list[str]:
    """A command line with the value of every secret flag masked, and whatever else looks like a token."""
    shown, secret = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        hides = name.lstrip("-").replace("-", "_") in SECRETS
        shown.append("***" if secret else f"{name}=***" if equals and hides else TOKENS.sub("***", word))
        secret = hides and not equals
    return shown


def strategy_facts(trainer: SFTTrainer) -> dict[str, dict[str, Any]]:
    """Seconds, bytes of state and last figures of each strategy."""
    logged = {key: value for log in trainer.state.log_history for key, value in log.items()} | trainer.ftplus.metrics()
    held = trainer.ftplus.bytes()
    return {
        name: {"seconds": round(spent, 2), "bytes": held[name]}
        | {key.removeprefix(f"{name}/"): value for key, value in logged.items() if key.startswith(f"{name}/")}
        for name, spent in trainer.ftplus.seconds.items()
    }


def versions() -> dict[str, str]:
    """Of everything that shapes the result, plugins included."""
    from .plugins import discover

    names = ["hf-ftplus", "torch", "transformers", "trl", "peft", "accelerate", "datasets"]
    found = {name: metadata.version(name) for name in names}
    plugins = {plugin.distribution: plugin.version for plugin in discover() if plugin.distribution}
    return {"python": platform.python_version(), **found, **{k: v for k, v in plugins.items() if k not in found}}
