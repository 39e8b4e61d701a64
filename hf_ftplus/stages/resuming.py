"""What is there already of a stage, and whether to go on from it: all that decides stands on disk.

A stage is finished when its report is there, and is then not run again. A kill at any moment costs what was trained
since the last whole checkpoint; after the one of the last step, only measuring is left. Settings that changed since are
refused, and so is what was trained from a stage that is gone; a folder of somebody else's is not touched.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from ..config import without_secrets
from ..errors import StorageError
from ..strategy import settings
from .plan import MERGED, Plan, Stage


def refuse_foreign(stage: Stage) -> None:
    """Refuse a folder that holds what a sequence did not make: it would be taken for ours, and cleared.

    Raises:
        StorageError: names the folder and what is in it.
    """
    found = outputs(stage)
    if found and not stage.file.is_file():
        raise StorageError(f"{stage.folder} holds another run ({found[0].name}). Choose another output_dir.")
    model = Path(stage.config.model.model_name_or_path).expanduser()
    if model.exists() and model.resolve() in (stage.folder.resolve(), (stage.folder / MERGED).resolve()):
        raise StorageError(f"{stage.folder} is the model that is to be trained. Choose another output_dir.")


def begun(stage: Stage) -> bool:
    """Whether there is anything to go on from."""
    return stage.report.is_file() or last_checkpoint(stage) is not None


SETTING = re.compile(r"plugins\[\d+\]\.[^.]+\.[^.]+")
"""Of a strategy. One that a later version alone has changes nothing of what is there, where it is left as it is."""


def refuse_changed(stage: Stage, now: dict[str, Any]) -> None:
    """Refuse to go on with other settings than those that made what is there.

    Raises:
        StorageError: names the keys that differ, and what to type.
    """
    if not stage.file.is_file() or not begun(stage):
        return
    try:
        then = _leaves(without_secrets(yaml.safe_load(stage.file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise StorageError(f"{stage.file} cannot be read ({error}). Choose a new output_dir.") from None
    now = _leaves(without_secrets(now))
    known = {key.rpartition(".")[0] for key in then}
    usual = {f"{it.name}.{item.name}": item.default for it in stage.config.strategies for item in settings(type(it))}
    newer = {
        key
        for key in now.keys() - then.keys()
        if SETTING.fullmatch(key) and key.rpartition(".")[0] in known and now[key] == usual.get(key.partition("].")[2])
    }
    shown = [key for key in {**then, **now} if key.partition(".")[0] != "env"]  # of the shell: no setting of a run
    differ = [key for key in shown if key not in newer and then.get(key) != now.get(key)]
    if differ:
        said = "; ".join(f"{key} was {_short(then.get(key))}, is {_short(now.get(key))}" for key in differ[:3])
        raise StorageError(
            f"{stage.folder} was made with other settings ({said}{'; ...' if differ[3:] else ''}). Put them back to go "
            "on, or choose a new output_dir."
        )


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Nested values by their place: `plugins[0].ewc.strength`."""
    if isinstance(value, dict) and value:
        parts = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        parts = [(f"{path}[{place}]", item) for place, item in enumerate(value)]
    elif path:
        return {path: value}
    else:
        raise ValueError(f"it holds a {type(value).__name__}; expected a mapping")
    return {place: leaf for name, item in parts for place, leaf in _leaves(item, name).items()}


def refuse_orphan(plan: Plan, stage: Stage) -> None:
    """Refuse what was trained from a stage before that has to be trained again.

    Raises:
        StorageError: names both.
    """
    before = plan.before(stage)
    if before and outputs(stage) and not before.report.is_file():
        raise StorageError(
            f"{stage.folder} was trained from an earlier {before.name!r}, which has no report any more. Remove "
            f"{stage.folder} and what came after it, to train them again, or choose a new output_dir."
        )


def refuse_other_pool(plan: Plan, stage: Stage, rows: int | None) -> None:
    """Refuse a pool with more or fewer rows than would be kept now.

    Args:
        rows: that the stage learns; None for a stream.

    Raises:
        StorageError: names the file and both numbers.
    """
    file = plan.pool(stage)
    if not plan.keep or not stage.report.is_file() or not file.is_file():
        return
    held, would = file.read_bytes().count(b"\n"), plan.keep if rows is None else min(plan.keep, rows)
    if held > would or (rows is not None and held < would):
        raise StorageError(
            f"{file} holds {held} rows, but with keep: {plan.keep} it would be {would}. Put keep (or the data) back to "
            "go on, or choose a new output_dir."
        )


def _short(value: Any) -> str:
    text = "not there" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def last_checkpoint(stage: Stage) -> Path | None:
    """The newest whole checkpoint. It is only looked for: a plan is shown without a file being touched."""
    from ..commit import newest

    return newest(stage.folder, aside=False)


def clear(plan: Plan, stage: Stage) -> None:
    """Take away what an unfinished run of ours left, and what was made of it, to start it anew."""
    remove(*outputs(stage), stage.folder / MERGED, plan.pool(stage))


def remove(*paths: Path) -> None:
    """Files and folders, if they are there."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def outputs(stage: Stage) -> list[Path]:
    """What a run has left in its folder."""
    from ..output import OUTPUTS

    return [path for name in OUTPUTS for path in stage.folder.glob(name)]
