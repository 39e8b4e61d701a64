"""What a user names as data, before a row of it is read: `chat=old.jsonl:train`, `self:256`, a dataset, rows.

TaskSpec.parse("chat=old.jsonl:train")     a string of the command line -> name, source, split
as_tasks({"chat": rows, "code": "a.jsonl"})   what the Python API accepts -> named tasks
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from torch import Tensor

from . import data
from .errors import UsageError, escape
from .files import READERS, is_local
from .formats import Row

_NAME = re.compile(r"(?P<name>[^=/\\:\x00-\x1f]+)=(?P<rest>.+)", re.DOTALL)
_PART = r"[A-Za-z_][\w.-]*(?:\[[^\]]*\])?"
_SPLIT = re.compile(rf"(?P<source>.+):(?P<split>{_PART}(?:\+{_PART})*)", re.DOTALL)


@dataclass(frozen=True)
class TaskSpec:
    """One task as it is typed: `[NAME=]FILE_OR_HUB[:split]`, `[NAME=]self:256` or `[NAME=]self:256x48`."""

    name: str
    source: str
    split: str | None = None
    generate: int | None = None
    """Number of examples that the starting model writes itself; None for data that exists."""
    tokens: int | None = None
    """Longest answer of these; None: as `generate.Sampling` says."""
    config: str | None = None
    """Of several that a dataset on the Hub has."""
    through: Callable[[int], Callable[[Row], Row]] | None = field(default=None, repr=False)
    """Gives, for a seed, what every row goes through before its format is looked for (a template)."""

    @classmethod
    def parse(cls, text: str) -> TaskSpec:
        """Read one specification. A file that exists under the whole text is that file.

        Raises:
            UsageError: empty, or `self:` without a number of rows.
        """
        named = None if os.path.exists(text) else _NAME.fullmatch(text)
        name, rest = (named["name"].strip(), named["rest"]) if named else ("", text)
        if not rest.strip():
            raise UsageError(f"{text!r} names no data; expected [NAME=]FILE_OR_HUB[:split] or [NAME=]self:256.")
        return cls.of(name, rest)

    @classmethod
    def of(cls, name: str, text: str) -> TaskSpec:
        """One task by its name (or a name of its source) and what stands behind it: FILE_OR_HUB[:split], self:256 or
        self:256x48.

        Raises:
            UsageError: `self:` without a number of rows.
        """
        if text == "self" or text.startswith("self:"):
            generate, tokens = _self(text)
            return cls(name or "self", "self", generate=generate, tokens=tokens)
        source, split = _split(text)
        path = Path(source)
        return cls(name or (path.stem if is_local(source) else path.name), source, split)

    def load(self, seed: int = 0) -> Dataset:
        """Its rows, in a canonical format.

        Args:
            seed: of what is drawn for each row, as one of several templates.

        Raises:
            DataError: see `data.load`.
        """
        return data.load(self.source, self.split, self.config, through=self.through(seed) if self.through else None)

    def stream(self, seed: int = 0) -> IterableDataset:
        """The same, read as they are needed; see `data.stream`."""
        return data.stream(self.source, self.split, self.config, through=self.through(seed) if self.through else None)

    def sampling(self) -> dict[str, int]:
        """What the model is to write, for `self_generate`."""
        return {"count": self.generate, **({"max_new_tokens": self.tokens} if self.tokens else {})}

    def __str__(self) -> str:
        tail = f":{self.generate or self.split}" if self.generate or self.split else ""
        return f"{self.name}={self.source}{tail}" + (f"x{self.tokens}" if self.tokens else "")


def parse_all(texts: Iterable[str]) -> list[TaskSpec]:
    """Every specification, in order.

    Raises:
        UsageError: a bad one, or two of one name (letter case and Unicode spelling do not tell names apart).
    """
    specs = [TaskSpec.parse(text) for text in texts]
    distinct_names(spec.name for spec in specs)
    return specs


def distinct_names(names: Iterable[str]) -> None:
    """Refuse two tasks of one name.

    Raises:
        UsageError: names both, and says how to name a task.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFKC", name).casefold()
        if key in seen:
            other = f" (the other is {escape(seen[key])!r})" if seen[key] != name else ""
            raise UsageError(
                f"Two tasks have the name {escape(name)!r}{other}; expected distinct names. Give one its own: "
                "OTHER_NAME=FILE, or name: OTHER_NAME in YAML."
            )
        seen[key] = name


def _self(text: str) -> tuple[int, int | None]:
    """Rows, and tokens of the longest answer, of `self:256` or `self:256x48`."""
    found = re.fullmatch(r"self:(0*[1-9][0-9]{0,8})(?:x(0*[1-9][0-9]{0,5}))?", text)
    if not found:
        raise UsageError(
            f"{text!r} does not say how many rows; expected self:N with N of 1 or more, such as self:256, or "
            "self:256x48 for answers of at most 48 tokens."
        )
    return int(found[1]), int(found[2]) if found[2] else None


def _split(text: str) -> tuple[str, str | None]:
    found = None if os.path.exists(text) else _SPLIT.fullmatch(text)
    if found is None or Path(found["split"]).suffix.lower() in READERS:
        return text, None
    return found["source"], found["split"]


def as_tasks(protect: Any) -> dict[str, Any]:
    """What a user may pass as `protect=` (or learn data), as a dict of named tasks, each left as it was given.

    Accepted: a `datasets.Dataset`; a list of rows (dicts); ready batches (a list of dicts of tensors with `input_ids`
    and `labels`); a string as for `--protect` (becomes a `TaskSpec`); a dict from names to any of these; a list of
    strings; None. A path may stand where a string does. A task without a name is called `protect`.

    Raises:
        UsageError: anything else, naming what was given.
    """
    if protect is None:
        return {}
    if isinstance(protect, (str, os.PathLike)):
        spec = TaskSpec.parse(os.fspath(protect))
        return {spec.name: spec}
    if isinstance(protect, (list, tuple)) and protect and all(isinstance(item, (str, os.PathLike)) for item in protect):
        return {spec.name: spec for spec in parse_all(map(os.fspath, protect))}
    if isinstance(protect, dict):
        distinct_names(str(key) for key in protect)
        return {str(key): _task(value, str(key)) for key, value in protect.items()}
    return {"protect": _task(protect, "protect")}


def _task(value: Any, name: str) -> Any:
    if isinstance(value, (Dataset, TaskSpec)):
        return value
    if isinstance(value, (str, os.PathLike)):
        return replace(TaskSpec.parse(os.fspath(value)), name=name)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, dict) for item in value):
        return list(value)
    raise UsageError(
        f"protect data {escape(name)!r} is {_kind(value)}; expected a datasets.Dataset, a list of rows (dicts), ready "
        "batches (a list of dicts of tensors with 'input_ids' and 'labels'), a file or Hub name, 'self:256', or a dict "
        "from task names to these."
    )


def _kind(value: Any) -> str:
    if isinstance(value, datasets.IterableDataset):
        return "a streaming IterableDataset (take the rows that you need: list(stream.take(256)))"
    if isinstance(value, (list, tuple)):
        return "an empty list" if not value else f"a list of {type(value[0]).__name__}"
    return f"of type {type(value).__module__}.{type(value).__name__}"


def is_batches(task: Any) -> bool:
    """Whether a task is ready batches: dicts of tensors, to be used as they are."""
    return isinstance(task, list) and all(
        isinstance(item.get("input_ids"), Tensor) and isinstance(item.get("labels"), Tensor) for item in task
    )
