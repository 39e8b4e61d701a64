"""Write a file whole or not at all; read JSON as it was written."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(file)` beside `path`, then move it into place: whoever reads `path` never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What a file of strict JSON holds.

    Raises:
        OSError: it cannot be read.
        ValueError: not JSON, or with NaN or Infinity, which nothing here writes and no figure may be.
    """
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number that JSON knows")
