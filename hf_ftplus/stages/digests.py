"""What a stage was made of, told by a digest of each local file: rows, the model that the first one starts from, and
files of strategies. Going on over others would mix two data sets, or two models.

Kept beside its settings when a stage starts, and compared when it is asked for again. What is on the Hub is known by
its name alone, which is one of the settings.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .. import contents, disk
from ..chosen import plugins_of
from ..errors import StorageError
from .plan import Stage
from .resuming import begun


def see_data(stage: Stage, pools: Collection[str]) -> None:
    """Remember what the data of a stage that is yet to begin holds; not the pools, which stages before will write."""
    found = {} if begun(stage) else digests(stage)
    stage.seen = {name: digest for name, digest in found.items() if name not in pools}


def note_data(stage: Stage) -> None:
    """Keep what its data holds now."""
    text = json.dumps(digests(stage), indent=1, ensure_ascii=False) + "\n"
    disk.write(_file(stage), text)


def refuse_other_data(stage: Stage) -> None:
    """Refuse to go on over rows, a model or a strategy that are not those of its start, or to begin on others than were
    checked. A file that is gone is for others to miss.

    Raises:
        StorageError: names what changed, and what to do.
    """
    if stage.seen and (changed := _changed(stage.seen, digests(stage))):
        raise StorageError(
            f"{changed} changed since all stages were checked, while others trained. Look at it, then type the same "
            "command: finished stages are kept."
        )
    if not begun(stage) or not _file(stage).is_file():  # made by a version that kept none
        return
    try:
        changed = _changed(json.loads(_file(stage).read_text(encoding="utf-8")), digests(stage))
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(f"{_file(stage)} cannot be read ({error}). Choose a new output_dir.") from None
    if changed:
        raise StorageError(
            f"{changed} changed since {stage.folder} was made of it. Put back what it held to go on; or "
            f"remove {stage.folder} and what came after it, to train them again; or choose a new output_dir."
        )


def _changed(then: dict[str, str], now: dict[str, str]) -> str:
    """Names of what was there then, and now holds something else."""
    return ", ".join(name for name in now if then.get(name, now[name]) != now[name])


def _file(stage: Stage) -> Path:
    return stage.folder / "ftplus" / "data.json"


def digests(stage: Stage) -> dict[str, str]:
    """Of every local file, or folder, that a stage reads, by its name there; pools of stages before, too."""
    from ..scored.content import of_folder

    found = {name: _digest_of_all(name) for name in _sources(stage)}
    model = str(stage.config.model.model_name_or_path)
    folder = Path(model).expanduser()
    if stage.number == 1 and folder.is_dir():  # later ones start from what the stage before left
        found[model] = of_folder(folder)
    return {name: digest for name, digest in found.items() if digest}


def _digest_of_all(name: str) -> str:
    """Of the file or folder of this name, or of all that match it as a pattern."""
    path = Path(name).expanduser()
    if path.exists() or not glob.has_magic(name):
        return contents.of_path(path)
    matches = sorted(glob.glob(str(path), recursive=True))
    return contents.of_parts({match: contents.of_path(Path(match)) for match in matches})


def _sources(stage: Stage) -> Iterator[str]:
    config = stage.config
    specs = [*(task.spec for task in config.tasks), *config.protect, *config.measure]
    yield from (spec.source for spec in specs if not spec.generate)
    yield from filter(None, [config.script.dataset_name])
    for name in plugins_of(stage.yaml.get("plugins"))[0]:
        file, ends, _ = name.partition(".py")  # behind it may stand :Class
        yield from [file + ends] if ends else []
    for part in config.mixture.datasets:
        files = _flat(part.data_files)
        yield from filter(None, [part.path, part.data_dir, *files])
        yield from (os.path.join(folder, file) for folder in (part.path, part.data_dir) if folder for file in files)


def _flat(value: Any) -> list[str]:
    """Files as `datasets` takes them: one, several, or several by split."""
    if isinstance(value, (dict, list)):
        return [file for item in (value.values() if isinstance(value, dict) else value) for file in _flat(item)]
    return [str(value)] if value else []
