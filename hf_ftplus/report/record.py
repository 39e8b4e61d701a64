"""Keep what a run found, and under which circumstances, as a JSON file that any parser reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rich.console import Console

from ..disk import read_json, write
from ..errors import DataError, StorageError
from ..evaluation.results import TaskResult
from .table import completions_view, table
from .text import is_number

FORMAT = 1
"""Raised when a reader of older reports would misread newer ones."""
MOST_LOGS = 300


@dataclass
class Report:
    """The results of a run and the facts about it.

    `facts` is a dictionary of the caller's: resolved config, versions, plugins, seeds; under `strategies`, the cost of
    each as `{"ewc": {"seconds": 12.1, "bytes": 1_070_000_000}}`, which the table shows; under `history`, what the
    trainer logged on the way.
    """

    tasks: list[TaskResult]
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only: paths and types as text, NaN and infinity as None."""
        return {
            "format": FORMAT,
            "tasks": [strict(task.to_dict()) for task in self.tasks],
            "facts": strict(self.facts),
        }

    def save(self, path: str | Path) -> Path:
        """Write the whole file or nothing.

        Raises:
            StorageError: the folder cannot be written.
        """
        path = Path(path)
        try:
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            write(path, text)
        except OSError as error:
            raise StorageError(
                f"Cannot write {path} ({error.strerror}); expected a writable folder. Choose another --output_dir."
            ) from error
        return path

    @classmethod
    def load(cls, path: str | Path, advice: str = "") -> Report:
        """Read what `save` wrote.

        Args:
            path: the file.
            advice: what to type where it is damaged, as far as the caller knows.

        Raises:
            DataError: missing, not JSON, or not a report of this version.
        """
        try:
            found = read_json(Path(path))
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; expected the report.json of a run.") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise DataError(f"{path} cannot be read as JSON: {error}. {advice}".strip()) from error
        version = found.get("format") if isinstance(found, dict) else None
        if version != FORMAT:
            raise DataError(f"{path} has format {version!r}; expected a report.json of format {FORMAT}.")
        try:
            report = cls([TaskResult.from_dict(task) for task in found["tasks"]], found["facts"])
            check(report)
            return report
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is not a whole report ({type(error).__name__}: {error}). {advice}".strip()
            ) from error

    def show(self, console: Console | None = None) -> None:
        """Print the table and the answers."""
        console = console or Console(highlight=False)
        console.print(table(self.tasks, self.facts))
        if any(task.completions for task in self.tasks):
            console.print()
            console.print(completions_view(self.tasks))


def history(log: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What a trainer logged; of each kind of entry (training, evaluation, ...) at most 300, evenly, and the last."""
    kinds: dict[frozenset[str], list[int]] = {}
    for place, entry in enumerate(log):
        kinds.setdefault(frozenset(entry), []).append(place)
    kept = {place for places in kinds.values() for place in places[:: -1 - (len(places) - 1) // MOST_LOGS]}
    return [log[place] for place in sorted(kept)]


def check(report: Report) -> None:
    """Dataclasses take any value: see that this holds numbers and text where they belong.

    Raises:
        TypeError: a figure is no number, or an answer no text.
    """
    if not isinstance(report.facts, dict):
        raise TypeError(f"facts are {type(report.facts).__name__}; expected an object")
    config = report.facts.get("config", {})
    if not isinstance(config, dict) or not isinstance(config.get("training", {}), dict):
        raise TypeError("its configuration is no object")
    for task in report.tasks:
        figures = [task.rows, task.tokens, *(vars(task.flips).values() if task.flips else ())]
        levels = (getattr(moment, name) for moment in (task.before, task.after, task.change) for name in vars(moment))
        for estimate in (*levels, task.drift, task.retention):
            figures += vars(estimate).values()
        for value in figures:
            if value is not None and not is_number(value):
                raise TypeError(f"{task.name}: {value!r} is no number")
        for text in (
            task.name,
            task.role,
            *task.notes,
            *(said for item in task.completions for said in vars(item).values()),
        ):
            if text is not None and not isinstance(text, str):
                raise TypeError(f"{task.name}: {text!r} is no text")


def strict(value: Any) -> Any:
    """`value` in types that strict JSON knows; a number that is none (NaN, infinity) becomes None."""
    if isinstance(value, Enum):
        return strict(value.value)
    if value is None or isinstance(value, (bool, int, str)):
        return _whole(value) if isinstance(value, str) else value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return strict(asdict(value))
    if isinstance(value, Mapping):
        return {_whole(str(key)): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [strict(item) for item in value]
    if callable(getattr(value, "tolist", None)):  # numpy and torch, scalars too
        return strict(value.tolist())
    return _whole(str(value))


def _whole(text: str) -> str:
    """Half a surrogate pair, which no UTF-8 file can hold, as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()
