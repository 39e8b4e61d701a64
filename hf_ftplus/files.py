"""Read JSON, JSON lines and CSV so that whatever is wrong has an address: file, line and column.

A reader yields entries: a place, and a call that gives the row that stands there or raises ValueError. Text stays
text: pyarrow's readers, which `datasets` uses, turn strings that look like dates or numbers into dates and numbers.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import DataError, escape
from .formats import Row

Entry = tuple[str, Callable[[], Any]]
"""A place, and how to get the row that stands there (ValueError when it is malformed)."""


class Malformed(ValueError):
    """Not JSON, at a known line and column."""

    def __init__(self, reason: str, line: str, column: int) -> None:
        start = max(0, column - 41)
        super().__init__(f"{reason}, near: {escape(line[start : start + 80].strip())}")
        self.column = column


def _json(path: Path) -> Iterator[Entry]:
    """One JSON object per line, or one array of objects; told apart by the first character."""
    with path.open("rb") as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return _json_array(path) if first == b"[" else _json_lines(path)


def _json_lines(path: Path) -> Iterator[Entry]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")
            if line.strip():
                yield f"{path}:{number}", partial(_parse_line, line)


def _parse_line(line: bytes) -> Any:
    text = _utf8(line)
    try:
        return _parse(text)
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON ({error.msg})", text, error.pos + 1) from None


def _json_array(path: Path) -> Iterator[Entry]:
    text = _decode(path)
    try:
        rows = _parse(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        bad = Malformed(f"not JSON ({error.msg})", line, error.colno)
        raise DataError(f"{path}:{error.lineno}:{error.colno}: {bad}") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    return ((f"{path}, row {i}", partial(lambda row: row, row)) for i, row in enumerate(rows, 1))


def _parse(text: str) -> Any:
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("is nested too deep; expected an object of strings and messages") from None
    if "\\u" in text:  # an escaped half of a surrogate pair parses, and breaks every tokenizer later
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("has a lone surrogate (\\ud800 to \\udfff); expected whole characters") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"has {escape(twice)!r} twice; expected it once")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _utf8(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        shown = line[: error.start].decode()
        reason = f"not UTF-8 (byte 0x{line[error.start]:02x})"
        raise Malformed(reason, shown + "\ufffd", len(shown) + 1) from None


def _decode(path: Path) -> str:
    """The text of a whole file; bytes that are no UTF-8 are reported with line and column."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        for number, line in enumerate(data.split(b"\n"), 1):
            try:
                _utf8(line)
            except Malformed as error:
                raise DataError(f"{path}:{number}:{error.column}: {error}") from None
        raise


def _csv(path: Path) -> Iterator[Entry]:
    """Every field is text, as written: no dates, no numbers, no missing values are guessed."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            below = [line.rstrip("\r\n") for line in islice(file, 1, 2)]
            file.seek(0)
            reader = csv.DictReader(file, strict=True)
            _unique([(name, "") for name in reader.fieldnames or []])
            _refuse_separators(reader.fieldnames or [], below)
            for row in reader:
                yield f"{path}:{reader.line_num}", partial(_csv_row, row)
    except UnicodeDecodeError:
        _decode(path)  # says where
        raise
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error}).") from None
    except ValueError as error:
        raise DataError(f"{path}:1: {error}.") from None
    finally:
        csv.field_size_limit(limit)


def _refuse_separators(header: Sequence[str], below: Sequence[str]) -> None:
    for separator in (";", "\t") if len(header) == 1 else ():
        if separator in header[0] and any(separator in line for line in below):
            raise ValueError(f"its fields are separated by {separator!r}; expected commas: {escape(header[0])!r}")


def _csv_row(row: dict[str | None, Any]) -> Row:
    if None in row:
        raise ValueError(f"has {len(row[None])} fields more than the header; expected {len(row) - 1} (quote commas)")
    return row


READERS: dict[str, Callable[[Path], Iterator[Entry]] | None] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".parquet": None,  # through datasets: typed, and memory-mapped
}


def is_local(source: str) -> bool:
    """Whether `data.load` reads a file of this machine, and not a dataset of the Hub."""
    return Path(source).suffix.lower() in READERS
