"""Plots as inline SVG, drawn by matplotlib. No text of the data stands in them: names are HTML beside them.

Runs are numbered as in the tables. Colours are CSS variables of the page, so that a plot is light or dark with it.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from ..evaluation.statistics import Estimate

SVG = "http://www.w3.org/2000/svg"
HREF = "{http://www.w3.org/1999/xlink}href"
INK, LINE, COLOURS = "#010101", "#020202", 8
MARKERS = "osD^vPX*"
WIDTH, HEIGHT = 4.6, 3.0
"""Inches of 72 units: on a phone of 360 pixels text of 10 units is 10 pixels."""


def available() -> bool:
    return find_spec("matplotlib") is not None


def learning_and_retention(
    points: Sequence[tuple[int, Estimate, Estimate]],
    starts: Sequence[float],
    name: str,
    upwards: str = "learnt, score %",
    front: Sequence[int] = (),
) -> str:
    """Runs as points with 95 % intervals both ways: retention across, what was learnt upwards.

    Args:
        points: of each run its number, retention and score (or its change), from 0 to 1.
        starts: scores of the starting models, whose retention is 1.
        name: what a screen reader says.
        upwards: what the axis of learning says.
        front: numbers of the runs that a line joins.
    """

    def draw(axes: Any) -> None:
        axes.axvline(1, color=LINE, linewidth=1, zorder=0)
        for start in starts:
            axes.plot(1, 100 * start, "o", markerfacecolor="none", color=INK)
        best = sorted((kept.value, 100 * learnt.value) for number, kept, learnt in points if number in front)
        if best:
            axes.plot(*zip(*best, strict=True), "--", color=LINE, linewidth=1, zorder=0)
        for number, kept, learnt in points:
            x, y = kept.value, 100 * learnt.value
            colour, marker = _series(number)
            style = {"fmt": marker, "color": colour, "elinewidth": 1, "capsize": 2, "markersize": 5}
            axes.errorbar(x, y, xerr=_ends(kept, 1), yerr=_ends(learnt, 100), **style)
            axes.annotate(str(number), (x, y), (5, 4), textcoords="offset points", color=INK)
        axes.set_xlabel("retention (after / before)")
        axes.set_ylabel(upwards)
        axes.margins(0.12)

    return _svg(draw, name)


def over_steps(lines: Sequence[tuple[int, Sequence[tuple[float, float]]]], name: str) -> str:
    """One figure of several runs: (step, value) points joined by lines."""

    def draw(axes: Any) -> None:
        for number, points in lines:
            colour, marker = _series(number)
            steps, values = zip(*points, strict=True)
            few = marker if len(points) < 30 else ""
            axes.plot(steps, values, color=colour, marker=few, markersize=3, linewidth=1.3)
            axes.annotate(str(number), points[-1], (4, 0), textcoords="offset points", color=INK, va="center")
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _svg(draw, name, HEIGHT * 0.75)


def bars(rows: Sequence[tuple[str, Sequence[float]]], unit: str, name: str) -> str:
    """Horizontal stacked bars: of each row its short label and its parts."""

    def draw(axes: Any) -> None:
        for place, (_, parts) in enumerate(rows):
            left = 0.0
            for i, part in enumerate(parts, start=1):
                axes.barh(place, part, left=left, color=_series(i)[0], height=0.6, edgecolor=LINE, linewidth=0.5)
                left += part
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.invert_yaxis()
        axes.set_xlabel(unit)

    return _svg(draw, name, 0.8 + 0.26 * len(rows))


def _series(number: int) -> tuple[str, str]:
    """Colour and marker of the run with this number: 64 runs differ in one of them."""
    place = (number - 1) % COLOURS
    return f"#0303{place + 1:02d}", MARKERS[((number - 1) // COLOURS + place) % len(MARKERS)]


def _ends(estimate: Estimate, factor: float) -> list[list[float]] | None:
    if estimate.low is None or estimate.high is None:
        return None
    ends = (estimate.value - estimate.low, estimate.high - estimate.value)
    return [[factor * max(0.0, end)] for end in ends]


def _svg(draw: Callable[[Any], None], name: str, height: float = HEIGHT) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 10}
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    settings |= {"axes.edgecolor": LINE, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        figure = Figure((WIDTH, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), name)


def _inline(text: str, name: str) -> str:
    """Fit for the middle of a page: scaled by it, coloured by it, named, and without ids that nothing refers to."""
    ET.register_namespace("", SVG)
    text = re.sub(r"#0303(0\d)", lambda found: f"var(--s{int(found[1])})", text)
    text = text.replace(INK, "var(--ink)").replace(LINE, "var(--line)")  # before any name of the data stands in it
    root = ET.fromstring(text[text.index("<svg") :])
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style") or (
                child.tag.endswith("}defs") and not len(child)
            ):
                parent.remove(child)
    used = set(re.findall(r"#([pm][0-9a-f]{10})\b", text))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        if HREF in element.attrib:
            element.set("href", element.attrib.pop(HREF))
        if element.tag == f"{{{SVG}}}text":
            element.set("style", re.sub(r"font-family:[^;]*;?", "", element.get("style", "")))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", name)
    return ET.tostring(root, encoding="unicode")
