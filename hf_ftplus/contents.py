"""Files known by what they hold."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from .disk import sha256


def of_file(path: Path) -> str:
    """The sha256 of all its bytes; read once, as long as neither its size nor its time changes."""
    found = path.stat()
    return _of_file(path, found.st_size, found.st_mtime_ns)


@lru_cache(None)
def _of_file(path: Path, size: int, changed: int) -> str:
    return sha256(path)


def of_path(path: Path, above: frozenset[tuple[int, int]] = frozenset()) -> str:
    """Of a file; or of a folder with whatever is in it that is not hidden; empty for what cannot be read again, and for
    a link that leads back to a folder `above` it."""
    if not os.access(path, os.R_OK) or not (path.is_file() or path.is_dir()):
        return ""
    if path.is_file():
        return of_file(path)
    found = path.stat()
    here = (found.st_dev, found.st_ino)
    if here in above:
        return ""
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    return of_parts({file.name: of_path(file, above | {here}) for file in files})


def of_parts(parts: dict[str, str]) -> str:
    """Of names with their digests; empty where there is none."""
    text = "".join(f"{name} {digest}\n" for name, digest in parts.items() if digest)
    return hashlib.sha256(text.encode()).hexdigest() if text else ""
