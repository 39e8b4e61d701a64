"""Tell whether a run that is asked to go on has nothing left to do, and whether it is the run that is asked for.

Nothing is written: a finished run may stand in a folder that nobody can write.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .config import RunConfig
from .errors import StorageError
from .origin import APPLIED, OVERRULED, REFUSED
from .output import REPORT
from .report import Report
from .report.record import strict
from .state import settings_in

LONGER = ("max_steps", "num_train_epochs")
"""With another value it is to train longer."""
WEIGHTS = ("*model*.safetensors", "*model*.bin")
"""How files of weights are called."""
PARTS = ("protect", "tasks", "memory", "stop_when", "model", "data", "mixture")
ARGUMENTS = (
    *(*REFUSED, *OVERRULED, *(name for name in APPLIED if name != "ignore_data_skip")),
    *("seed", "data_seed", "max_length", "packing", "truncation_mode", "chat_template_path", "dataset_text_field"),
    *("packing_strategy", "eos_token", "load_best_model_at_end", "metric_for_best_model"),
)
"""What of a configuration decides which weights a run ends with. How it is measured, logged and saved does not."""
MEASURING = {"measure": "--measure NAME=DATA", "metrics": "--metric NAME=METRIC", "measure_rows": "--measure_rows N"}
"""What says how to measure, and the flag of it."""


def finished(config: RunConfig) -> Report | None:
    """The report of the run, if it was trained to its end.

    Raises:
        StorageError: another run ended there; names what differs.
    """
    training = config.training
    file = Path(training.output_dir) / REPORT
    if not training.resume_from_checkpoint or not os.path.isfile(file):
        return None
    report = Report.load(file, "Remove it, and type the same again: the run goes on from its last checkpoint.")
    then, now = report.facts.get("config", {}), strict(config.resolved())
    was = then.get("training", {})
    ends = 0 < training.max_steps <= report.facts.get("steps", 0)
    longer = not ends and any(was.get(key) != getattr(training, key) for key in LONGER)
    if longer or _weights_are_gone(file.parents[1]) or not _from_its_end(config, report):
        return None
    there = _strategies(then, config) | _deciding(then, report.facts.get("processes", 1))
    here = _strategies(now, config) | _deciding(now, training.world_size)
    if differ := _differ(there, here):
        said = "; ".join(f"{name} {_shown(was)} there, {_shown(now)} here" for name, (was, now) in differ.items())
        raise StorageError(
            f"{training.output_dir} holds another run, which is complete: {said}. Choose another --output_dir for this "
            "one, or put back what it was."
        )
    return report


def measured_otherwise(config: RunConfig, report: Report) -> list[str]:
    """What of a configuration says how to measure, and is not what a finished run was measured by."""
    then, now = report.facts.get("config", {}), strict(config.resolved())
    return [key for key in MEASURING if key in then and then[key] != now[key]]


def _weights_are_gone(folder: Path) -> bool:
    """Whether it lacks what its checkpoints have: it goes on from the last of them, and is saved again."""
    here, there = (any(path for name in WEIGHTS for path in folder.glob(f"{at}{name}")) for at in ("", "checkpoint-*/"))
    return there and not here


def _from_its_end(config: RunConfig, report: Report) -> bool:
    """Whether it is asked to go on from its last checkpoint: the newest, or that one by its path."""
    given = str(config.training.resume_from_checkpoint)
    last = Path(config.training.output_dir) / f"checkpoint-{report.facts.get('steps')}"
    return given.lower() in ("true", "auto") or Path(given).resolve() == last.resolve()


def _strategies(resolved: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """`{"strategies": ["EWC"], "ewc.strength": "3000.0"}`: the classes, and the settings of those that `config` has."""
    said = resolved.get("strategies")
    if said is None:
        return {}
    found: dict[str, Any] = {"strategies": [text.partition("(")[0] for text in said]}
    for strategy, kind, text in zip(config.strategies, found["strategies"], said, strict=False):
        if kind == type(strategy).__name__:
            found |= {f"{strategy.name}.{key}": value for key, value in settings_in(text).items()}
    return found


def _deciding(resolved: dict[str, Any], processes: int) -> dict[str, Any]:
    """What else decides, by name; a configuration that an earlier version wrote may lack some of it."""
    training = resolved.get("training", {})
    parts = {key: resolved[key] for key in PARTS if key in resolved}
    found = {key: part for key, part in parts.items() if not isinstance(part, dict)}
    for part in parts.values():
        found |= part if isinstance(part, dict) else {}
    found |= {key: training[key] for key in ARGUMENTS if key in training}
    rows = [training.get(key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    return found if None in rows else {**found, "rows per step": rows[0] * rows[1] * processes}


def _differ(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (then[name], now[name]) for name in now if name in then and then[name] != now[name]}


def _shown(value: Any) -> str:
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value)) or "none"
