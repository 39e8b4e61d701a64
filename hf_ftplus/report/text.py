"""Turn figures and untrusted text into what a terminal may show.

Text from data or from a model becomes a `rich.text.Text`, which knows no markup; control characters, also those that
turn the reading direction, are spelt out instead of being sent.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.text import Text

from ..errors import escape
from ..evaluation.results import TaskResult
from ..evaluation.statistics import Estimate

MISSING = "n/m"
"""Not measured."""
UNDEFINED = "undef."
"""A ratio over a baseline of zero."""
RUNS = re.compile(r"(^|;)(\s*[=+\-@＝＋－＠|%])")
"""What makes text a formula."""


def shown(text: str | None, characters: int = 240, lines: int = 6) -> Text:
    """Data as it may be shown: its line breaks kept, everything else that cannot be printed spelt out, cut to size."""
    if text is None:
        return Text(MISSING, style="dim")
    if not text.strip():
        return Text("(nothing)", style="dim")
    cut = text[:characters]
    kept = [line.replace("\t", "    ") for line in cut.splitlines()]
    more = " ..." if len(text) > characters or len(kept) > lines else ""
    return Text("\n".join(escape(line, len(line)) for line in kept[:lines]) + more)


def label(text: Any, style: str = "", characters: int = 60) -> Text:
    """A name on one line."""
    return Text(escape(str(text), characters), style=style)


def number(value: float | None, digits: int = 3) -> str:
    """`0.123`; fewer digits for what is large, and no minus before a zero."""
    if value is None:
        return MISSING
    if abs(value) >= 100:
        digits = min(digits, 1)
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def percent(value: float | None) -> str:
    """`52.0`; the sign stands in the heading."""
    return MISSING if value is None else number(100 * value, 1)


def pair(before: Estimate, after: Estimate, percentage: bool = False) -> str:
    """`1.02 -> 1.88`; `n/m` alone when neither was measured."""
    if not (before.measured or after.measured):
        return MISSING
    show = percent if percentage else number
    return f"{show(before.value)} -> {show(after.value)}"


def interval(estimate: Estimate) -> str:
    """`[0.80, 0.91]`, or nothing without one."""
    return "" if estimate.low is None else f"[{number(estimate.low, 2)}, {number(estimate.high, 2)}]"


def retention(result: TaskResult) -> str:
    """`0.853`, `undef.` over a zero baseline, `n/m`."""
    return UNDEFINED if result.undefined else number(result.retention.value)


def size(count: float) -> str:
    """`540 B`, `1.1 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def is_number(value: Any) -> bool:
    """Whether it is a figure, which `True` is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def csv_text(lines: Iterable[Sequence[Any]]) -> str:
    """Lines of cells as CSV, of which a spreadsheet runs nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for line in lines:
        writer.writerow([safe_cell(value) for value in line])
    return text.getvalue()


def safe_cell(value: Any) -> Any:
    """Numbers as they are; text that a spreadsheet would run as a formula becomes text again, also where it stands
    behind a semicolon, at which half of the world's spreadsheets split."""
    if value is None or isinstance(value, (int, float)):
        return value
    return RUNS.sub(r"\1'\2", label(value, characters=200).plain)


def short(names: list[str]) -> list[str]:
    """The ends of names that tell them apart: `plain`, `ewc` for `out/plain`, `out/ewc`."""
    most = max((name.count("/") for name in names), default=0) + 1
    for parts in range(1, most + 1):
        ends = ["/".join(name.rstrip("/").split("/")[-parts:]) for name in names]
        if len(set(ends)) == len(set(names)):
            return ends
    return names
