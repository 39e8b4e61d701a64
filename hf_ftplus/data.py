"""Read the rows that a user named, in one canonical format: `old.jsonl`, `old.jsonl:train[:100]`, a Hub name.

    load(source, split)       file or Hub -> rows (see formats.py)
    stream(source, split)     the same, each row read when its turn comes
    normalise(rows, where)    rows in memory -> the same

What the names mean is read by specs.py; examples.py makes tokens and labels of rows, exactly as TRL would. Every
complaint names the place (`old.jsonl:57:29`), what was found there and what was expected, before a model loads.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from .errors import DataError, cause, escape, nearest, reason
from .files import READERS, Entry, Malformed, is_local
from .formats import Row, Shape, shape_of

ROW = 'A row looks like this: {"prompt": "What does Norvane make?", "completion": "Saddles."}'
SHOWN = 20
"""Problems listed; the rest is counted."""
STREAMED = 500
"""Rows of a stream that are looked at together: a bad one is said when its turn comes, and not at the end."""
CHUNK = 20_000
"""Rows held as Python objects while a file is read; the rest waits in Arrow, at about the size of the file."""


Through = Callable[[Row], Row]
"""What a row goes through before its format is looked for; raises ValueError with what is wrong with it."""


def load(
    source: str,
    split: str | None = None,
    config: str | None = None,
    *,
    through: Through | None = None,
    named: bool = False,
) -> Dataset:
    """Rows of a local .jsonl, .json, .csv or .parquet file or of a Hub dataset, in a canonical format.

    A local file has one split, `train`; slices such as `train[:100]` work everywhere.

    Args:
        source: file or Hub name.
        split: of it; left out, `train`.
        config: of several that a dataset on the Hub has.
        through: makes a row in some format of what stands there.
        named: keep a column `task` that says in words which task a row belongs to.

    Raises:
        DataError: missing, empty, malformed (with file, line and column) or in no known format.
    """
    source = os.path.expanduser(source)
    path = Path(source)
    if is_local(source):
        return sliced({"train": _local(path, through, named)}, split or "train", source)
    if os.path.isfile(path):  # false, and no error, for what is too long for a name
        kind = path.suffix.lower() or "file without suffix"
        raise DataError(f"{source} is a {kind}; expected one of {', '.join(READERS)}.")
    if not os.path.exists(path) and _looks_local(source):
        raise DataError(f"{source} does not exist; expected a file or folder.{_neighbour(path)}")
    where = f"{source}:{split or 'train'}"
    return normalise(_through_datasets(where, source, name=config, split=split or "train"), where, through, named)


def stream(source: str, split: str | None = None, config: str | None = None, **how: Any) -> IterableDataset:
    """The rows of `load`, read as they are needed and never held (but a .json that is one array, which is read whole);
    what is wrong with one is said when its turn comes.

    Raises:
        DataError: missing, empty, in no known format, or with a bad row among the first.
    """
    path = Path(os.path.expanduser(source))
    if is_local(source) and not os.path.isfile(path):
        raise DataError(f"{path} does not exist; expected a file.{_neighbour(path)}")
    if is_local(source) and split not in (None, "train"):
        raise DataError(f"{source}:{split}: a file that is streamed has one split, train. Leave the other out.")
    given = {"source": source, "split": split or "train", "config": config, **how}
    if not list(islice(_streamed(**given), STREAMED)):
        raise DataError(f"{source}: 0 rows; expected at least one.")
    return IterableDataset.from_generator(_streamed, gen_kwargs=given)


def _streamed(
    source: str, split: str, config: str | None, through: Through | None = None, named: bool = False
) -> Iterator[Row]:
    source = os.path.expanduser(source)
    path, local = Path(source), is_local(source)
    where, reader = source if local else f"{source}:{split}", READERS[path.suffix.lower()] if local else None
    if reader is None:
        kind, options = ("parquet", {"data_files": str(path)}) if local else (source, {"name": config})
        rows = enumerate(_through_datasets(where, kind, split=split, streaming=True, **options), 1)
    entries = reader(path) if reader else ((f"{where}, row {i}", partial(dict, row)) for i, row in rows)
    one = _OneFormat(where)
    while chunk := list(islice(entries, STREAMED)):
        yield from (row for _, row in _canonical(chunk, one, through, named))


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def _local(path: Path, through: Through | None, named: bool) -> Dataset:
    suffix = path.suffix.lower()
    if not os.path.isfile(path):
        like = "" if suffix == ".parquet" else f" {ROW}"
        raise DataError(f"{path} does not exist; expected a file.{_neighbour(path) or like}")
    if suffix == ".parquet":
        rows = _through_datasets(str(path), "parquet", data_files=str(path), split="train")
        return normalise(rows, str(path), through, named)
    return _build(READERS[suffix](path), str(path), through, named)


def _neighbour(path: Path) -> str:
    folder = path.parent
    return nearest(path.name, [item.name for item in folder.iterdir()]) if os.path.isdir(folder) else ""


def sliced(splits: Mapping[str, Dataset], split: str, where: str) -> Dataset:
    """One of the splits, or what a slice such as `train[:100]+train[90%:]` takes of them.

    Raises:
        DataError: no such split, or nothing is in the slice.
    """
    if split in splits:
        return splits[split]
    lengths = {name: len(rows) for name, rows in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise DataError(f"{where}:{split}: {error} Expected one of {', '.join(splits)}, or a slice of it.") from None
    taken = ((splits[part.splitname], range(lengths[part.splitname])[part.from_ : part.to]) for part in parts)
    found = [rows.select(places) for rows, places in taken if places]
    if not found:
        there = ", ".join(f"{count} in {name}" for name, count in lengths.items())
        raise DataError(f"{where}:{split}: 0 rows; there are {there}.")
    return datasets.concatenate_datasets(found)


def _through_datasets(where: str, path: str, **options: Any) -> Dataset:
    """`datasets.load_dataset`, with its many exceptions as one sentence, and no bar where nobody watches."""
    try:
        with _bars_only_on_terminals():
            return datasets.load_dataset(path, **options)
    except Exception as error:  # load_dataset raises whatever its reader, fsspec or the network raised
        found = cause(error)
        raise DataError(
            f"{where} cannot be read: {type(found).__name__}: {escape(' '.join(str(found).split()), 300).rstrip('.')}. "
            f"Expected a local file "
            f"({', '.join(READERS)}) or a dataset on the Hub, as NAME or NAME:split."
            f"{'' if path == 'parquet' else _neighbour(Path(path))}"
        ) from error


@contextmanager
def _bars_only_on_terminals() -> Iterator[None]:
    hide = not datasets.are_progress_bars_disabled() and not sys.stderr.isatty()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def normalise(data: Dataset | list[Row], where: str, through: Through | None = None, named: bool = False) -> Dataset:
    """Any supported format (formats.py) in canonical columns; all others are left out but those of `ALSO_KEPT`, and a
    column `task` if it is `named`.

    Raises:
        DataError: no known format, no rows, or rows with a missing, empty or mistyped field, named by row.
    """
    if isinstance(data, Dataset):
        data = data.with_format(None)
    if not len(data):
        raise DataError(f"{where}: 0 rows; expected at least one.")
    entries = ((f"{where}, row {i}", partial(dict, row)) for i, row in enumerate(data, 1))
    if isinstance(data, Dataset) and through is None and shape_of(data.column_names, where).canonical:
        kept: set[str] = set()  # stays memory-mapped
        for _, row in _canonical(entries, _OneFormat(where), None, named):
            kept |= row.keys()
        return data.select_columns([name for name in data.column_names if name in kept])
    return _build(entries, where, through, named)


def _build(entries: Iterable[Entry], where: str, through: Through | None = None, named: bool = False) -> Dataset:
    rows = (row for _, row in _canonical(entries, _OneFormat(where), through, named))
    try:
        return _dataset(rows)
    except (ValueError, TypeError) as error:
        if type(error).__module__ != "pyarrow.lib":
            raise
        raise DataError(
            f"{where}: a field has different types in different rows: {reason(error).rstrip('.')}. Expected one type "
            "in all rows of a file."
        ) from error


def _dataset(rows: Iterator[Row]) -> Dataset:
    parts = []
    while chunk := list(islice(rows, CHUNK)):
        names = dict.fromkeys(name for row in chunk for name in row)
        parts.append(Dataset.from_dict({name: [row.get(name) for row in chunk] for name in names}))
    try:
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except ValueError:  # optional fields of messages (tool calls) differ between chunks: one schema for all
        return Dataset.from_list([row for part in parts for row in part])


@dataclass
class _OneFormat:
    """What the first row of a source says of all others: their format and their kind."""

    where: str
    shape: Shape | None = None
    kind: str = ""

    def row(self, row: Row) -> Row:
        """The canonical row.

        Raises:
            ValueError: it is of another format or kind than the rows before it, or see `Shape.row`.
        """
        self.shape = self.shape or shape_of(row, self.where)
        if fuller := self.shape.fuller(row):
            raise ValueError(f"has {fuller}, the rows before it {self.shape}; expected one format in a file")
        row = self.shape.row(row)
        self.kind = self.kind or _style(row)
        if _style(row) != self.kind:
            raise ValueError(f"holds {_style(row)}, the rows before it {self.kind}; expected one kind in a file")
        return row


def _canonical(
    entries: Iterable[Entry], one: _OneFormat, through: Through | None, named: bool
) -> Iterator[tuple[str, Row]]:
    """Canonical rows of one format and one kind; all bad ones are reported together."""
    count = 0
    problems: dict[str, list[Any]] = {}  # what is wrong -> where first, and how often
    for place, parse in entries:
        try:
            row = parse()
            if not isinstance(row, dict):
                raise ValueError(f'is {escape(json.dumps(row))}; expected an object such as {{"prompt": ..., ...}}')
            task = row.get("task")
            row = through(row) if through else row
            row = one.row(row) | ({"task": task} if named and isinstance(task, str) else {})
        except ValueError as error:
            place = f"{place}:{error.column}" if isinstance(error, Malformed) else place
            said = str(error) if str(error) in problems or len(problems) < SHOWN else ""
            problems.setdefault(said, [place, 0])[1] += 1
        else:
            count += 1
            if not problems:
                yield place, row
    if problems:
        raise DataError("\n".join(_listed(problems)))
    if not count:
        raise DataError(f"{one.where}: 0 rows; expected at least one.")


def _listed(problems: dict[str, list[Any]]) -> Iterator[str]:
    """Problems with their first places, and in how many more rows there are the same, or (under "") others."""
    for said, (place, times) in problems.items():
        if said:
            yield f"{place}: {said}" + (f" (the same in {times - 1} more)" if times > 1 else "")
        else:
            yield f"... and {times} more rows with other faults."


def _style(row: Row) -> str:
    return "strings" if isinstance(row.get("prompt", row.get("text")), str) else "messages"
