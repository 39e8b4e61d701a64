"""Which rows a stage has read, told by a digest of each local file: going on over others would mix two data sets.

Kept beside its settings when a stage starts, and compared when it is asked for again. Data on the Hub is known by its
name alone, which is one of the settings.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import disk
from ..errors import StorageError
from .plan import Stage
from .resuming import begun


def note_data(stage: Stage) -> None:
    """Keep what its data holds now."""
    text = json.dumps(_digests(stage), indent=1, ensure_ascii=False) + "\n"
    disk.replace(_file(stage), lambda file: file.write_text(text, encoding="utf-8"))


def refuse_other_data(stage: Stage) -> None:
    """Refuse to go on over rows that are not those of its start. A file that is gone is for others to miss.

    Raises:
        StorageError: names what changed, and what to do.
    """
    if not begun(stage) or not _file(stage).is_file():  # made by a version that kept none
        return
    now = _digests(stage)
    try:
        then = json.loads(_file(stage).read_text(encoding="utf-8"))
        changed = [name for name in now if then.get(name, now[name]) != now[name]]
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(f"{_file(stage)} cannot be read ({error}). Choose a new output_dir.") from None
    if changed:
        raise StorageError(
            f"{', '.join(changed)} changed since {stage.folder} was made of it. Put back what it held to go on; or "
            f"remove {stage.folder} and what came after it, to train them again; or choose a new output_dir."
        )


def _file(stage: Stage) -> Path:
    return stage.folder / "ftplus" / "data.json"


def _digests(stage: Stage) -> dict[str, str]:
    """Of every local file, or folder, of rows that a stage reads, by its name there; pools of stages before, too."""
    found = {name: _digest_of_all(name) for name in _sources(stage)}
    return {name: digest for name, digest in found.items() if digest}


def _digest_of_all(name: str) -> str:
    """Of the file or folder of this name, or of all that match it as a pattern."""
    path = Path(name).expanduser()
    if path.exists() or not glob.has_magic(name):
        return _digest(path)
    matches = sorted(glob.glob(str(path), recursive=True))
    return _of_parts({match: _digest(Path(match)) for match in matches})


def _sources(stage: Stage) -> Iterator[str]:
    config = stage.config
    specs = [*(task.spec for task in config.tasks), *config.protect, *config.measure]
    yield from (spec.source for spec in specs if not spec.generate)
    yield from filter(None, [config.script.dataset_name])
    for part in config.mixture.datasets:
        files = _flat(part.data_files)
        yield from filter(None, [part.path, part.data_dir, *files])
        yield from (os.path.join(folder, file) for folder in (part.path, part.data_dir) if folder for file in files)


def _flat(value: Any) -> list[str]:
    """Files as `datasets` takes them: one, several, or several by split."""
    if isinstance(value, (dict, list)):
        return [file for item in (value.values() if isinstance(value, dict) else value) for file in _flat(item)]
    return [str(value)] if value else []


def _digest(path: Path) -> str:
    """Of a file; or of a folder with whatever is in it that is not hidden; empty for what cannot be read again."""
    if not os.access(path, os.R_OK) or not (path.is_file() or path.is_dir()):
        return ""
    if path.is_file():
        return _digest_of_file(path, path.stat().st_size, path.stat().st_mtime_ns)
    inside = {file.name: _digest(file) for file in sorted(path.iterdir()) if not file.name.startswith(".")}
    return _of_parts(inside)


def _of_parts(parts: dict[str, str]) -> str:
    text = "".join(f"{name} {digest}\n" for name, digest in parts.items() if digest)
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


@lru_cache(None)
def _digest_of_file(path: Path, size: int, changed: int) -> str:
    """Read once, as long as neither its size nor its time changes: many stages measure the same file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
