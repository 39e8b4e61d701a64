"""What is there already of a stage, and whether to go on from it: all that decides stands on disk.

A stage is finished when its report is there, and is then not run again. A kill at any moment costs what was trained
since the last whole checkpoint. Settings that changed since are refused; a folder of somebody else's is not touched.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from ..errors import StorageError
from .plan import Stage


def refuse_foreign(stage: Stage) -> None:
    """Refuse a folder that holds what a sequence did not make: it would be taken for ours, and cleared.

    Raises:
        StorageError: names the folder and what is in it.
    """
    found = _outputs(stage)
    if found and not stage.file.is_file():
        raise StorageError(f"{stage.folder} holds another run ({found[0].name}). Choose another output_dir.")
    model = Path(stage.config.model.model_name_or_path).expanduser()
    if model.exists() and model.resolve() in (stage.folder.resolve(), (stage.folder / "merged").resolve()):
        raise StorageError(f"{stage.folder} is the model that is to be trained. Choose another output_dir.")


def refuse_changed(stage: Stage, now: dict[str, Any]) -> None:
    """Refuse to go on with other settings than those that made what is there.

    Raises:
        StorageError: names the keys that differ, and what to type.
    """
    if not stage.file.is_file() or not (stage.report.is_file() or last_checkpoint(stage)):
        return
    try:
        then = yaml.safe_load(stage.file.read_text(encoding="utf-8"))
        differ = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise StorageError(f"{stage.file} cannot be read ({error}). Choose a new output_dir.") from None
    if differ:
        said = "; ".join(f"{key} was {_short(then.get(key))}, is {_short(now.get(key))}" for key in differ[:3])
        raise StorageError(
            f"{stage.folder} was made with other settings ({said}{'; ...' if differ[3:] else ''}). Put them back to go "
            "on, or choose a new output_dir."
        )


def _short(value: Any) -> str:
    text = "not there" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def last_checkpoint(stage: Stage) -> Path | None:
    """The newest whole checkpoint that leaves steps to take: a Trainer that resumes at its last step takes another.

    A Trainer writes its state last, so a checkpoint without it, or with half of it, was being written when all ended.
    """
    from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

    found = {}
    for file in stage.folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not _over(state) and any(file.parent.glob(f"{Path(OPTIMIZER_NAME).stem}*")):
            found[state["global_step"]] = file.parent
    return found[max(found)] if found else None


def _over(state: dict[str, Any]) -> bool:
    """Whether training had come to its end when this was saved: its last step, or an earlier one that sufficed."""
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return state["global_step"] >= state["max_steps"] or control.get("should_training_stop", False)


def clear(stage: Stage) -> None:
    """Take away what an unfinished run of ours left, to start it anew."""
    for path in _outputs(stage):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _outputs(stage: Stage) -> list[Path]:
    from ..run import OUTPUTS

    return [path for name in OUTPUTS for path in stage.folder.glob(name)]
