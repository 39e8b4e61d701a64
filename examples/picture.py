"""Draw the picture of the README from what was measured: `python examples/picture.py`.

Every point is a row of examples/benchmarks/strategies.json, its mean over seeds: what was learnt, and what it cost.
"""

import json
import os
from pathlib import Path
from statistics import mean

from matplotlib import rc_context
from matplotlib.figure import Figure

HERE = Path(__file__).parent
OUT = Path(os.environ.get("OUT", HERE / "picture.svg"))
KINDS = {"plain": ("#b5302a", "X"), "replay": ("#4d7a2f", "s"), "distill": ("#2b6cb0", "o"), "EWC": ("#8a5a00", "D")}
STACKED = {"distill": ("distill + EWC", "#5b3a9b", "*"), "replay": ("replay + EWC", "#1f7a7a", "P")}
OTHER = ("plugins", "#777777", "v")

rows = json.loads((HERE / "benchmarks" / "strategies.json").read_text(encoding="utf-8"))
points: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
for name, seeds in rows.items():
    if name.startswith(("sentiment", "after sentiment")):
        continue
    first = next((kind for kind in KINDS if name.startswith(kind)), "")
    kind = STACKED.get(first) if "EWC" in name else None
    kind = kind or ((first, *KINDS[first]) if first else OTHER)
    learnt = mean(run["learnt"] for run in seeds.values())
    rise = mean((run["chat"] + run["python"]) / 2 for run in seeds.values())
    points.setdefault(kind, []).append((100 * learnt, rise))

with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ftplus", "font.family": "sans-serif"}):
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    for (label, colour, marker), found in points.items():
        size = 160 if marker == "*" else 60
        axes.scatter(*zip(*found, strict=True), s=size, c=colour, marker=marker, label=label, zorder=3)
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set_xlabel("facts learnt, %")
    axes.set_ylabel("rise of the loss on what it knew,\nnats per token (lower is better)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(OUT, bbox_inches="tight", metadata={"Date": None}, facecolor="white")
