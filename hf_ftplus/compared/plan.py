"""What a comparison will take, from what was measured here; and what a budget leaves room for.

A finished cell of the same row says best what the next will take, any finished cell comes next. Before there is one, a
probe is: the first cell cut to three steps, in a process of its own, from which the seconds of a step and of everything
around it are read. Other strategies may take more than the one that was probed; their first cells correct it.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from .. import disk
from ..config import without_secrets
from ..errors import FTPlusError, UsageError
from .cells import Cell, cell
from .processes import Runner

if TYPE_CHECKING:
    from ..config import RunConfig

LIMIT = 30 * 60
"""Seconds above which a comparison asks first."""
STEPS = 3
"""Of a probe; the first is slower than the others, so a probe promises too little rather than too much."""
UNITS = {"h": 3600, "m": 60, "s": 1}


@dataclass(frozen=True)
class Forecast:
    """What one cell will take, and how that is known. None is not known."""

    seconds: float | None = None
    bytes: int | None = None
    source: str = "not known"


@dataclass
class Probe:
    """Three steps of the first cell; `steps` are those of a whole one, None where rows cannot be counted."""

    cell: Cell
    steps: int | None

    @property
    def forecast(self) -> Forecast:
        kept = self.cell.kept
        if not self.cell.stage.report.is_file() or "seconds" not in kept:
            return Forecast()
        training = self.cell.report().facts["seconds"]["training"]
        seconds = None if self.steps is None else kept["seconds"] + training * (self.steps / STEPS - 1)
        return Forecast(seconds, self.cell.peak_bytes(), "the probe")


def forecast(asked: Cell, cells: Sequence[Cell], probe: Probe | None) -> Forecast:
    """What a cell will take. Seconds of cells that were resumed are of a part, and say nothing."""
    done = [item for item in cells if item.state == "finished" and "seconds" in item.kept and not item.kept["resumed"]]
    own = [item for item in done if item.row is asked.row]
    found = own or done
    if not found:
        return probe.forecast if probe else Forecast()
    peaks = [peak for item in found if (peak := item.peak_bytes())]
    source = f"{len(own)} finished cells" if own else f"{len(found)} cells of other rows"
    return Forecast(fmean(item.kept["seconds"] for item in found), max(peaks, default=None), source)


def probed(
    firsts: Sequence[Cell],
    out: Path,
    given: dict[str, Any],
    config: RunConfig,
    runner: Runner,
    device: str | None = None,
) -> Probe:
    """Measure a cell by its first steps, or read what an earlier call measured; the next one where a cell fails.

    `device` is one of those that cells will have: left to itself, a run takes all that it sees.

    Raises:
        FTPlusError: all of them failed; says what the first one said.
    """
    told = {"max_steps": STEPS, "save_strategy": "no", "completions": 0, "report_to": "none", "eval_strategy": "no"}
    errors = []
    for first in firsts:
        found = cell(first.row, first.seed, out / "probe", given, config, **told, load_best_model_at_end=False)
        if not _same(found):
            if found.stage.folder.is_dir():
                with disk.locked(found.stage.folder, "--out"):
                    shutil.rmtree(found.stage.folder, ignore_errors=True)
            runner.run(found, device)
            for file in found.stage.folder.glob("*"):
                if file.is_file():  # the model of three steps
                    file.unlink()
        if found.stage.report.is_file():
            return Probe(found, steps(config, found.report().facts["processes"]))
        errors.append(found.error)
    raise FTPlusError(f"No candidate can start. The first one, {firsts[0].row.name}: {errors[0]}")


def _same(found: Cell) -> bool:
    """Whether the probe that is there is of this cell."""
    try:
        told = yaml.safe_load(found.stage.file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return False
    return told == without_secrets(found.stage.yaml) and found.stage.report.is_file() and "seconds" in found.kept


def steps(config: RunConfig, processes: int) -> int | None:
    """Optimizer steps of a run; with packing, and where a limit on length leaves rows out, it takes fewer."""
    training = config.training
    if training.max_steps > 0:
        return training.max_steps
    from ..row_checks import row_count
    from ..rows import find

    rows = row_count(find(config).learn)
    if rows is None:
        return None
    batches = math.ceil(rows / (training.per_device_train_batch_size * processes))
    return math.ceil(math.ceil(batches / training.gradient_accumulation_steps) * training.num_train_epochs)


def seconds_of(text: str) -> float:
    """`2h`, `90m`, `1h30m` or `300s`.

    Raises:
        UsageError: anything else, also a bare number.
    """
    found = re.fullmatch(r"(?=.)(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    total = (
        sum(float(part) * unit for part, unit in zip(found.groups(), UNITS.values(), strict=True) if part)
        if found
        else 0
    )
    if not total:
        raise UsageError(f"--budget {text!r}; expected a time with its unit: 2h, 90m, 1h30m or 300s")
    return total


def total(cells: Sequence[Cell], probe: Probe | None, devices: int) -> float | None:
    """Seconds that all cells which are not finished will take; None if any is not known."""
    found = [forecast(item, cells, probe).seconds for item in cells if item.state != "finished"]
    return None if None in found else sum(found) / max(1, min(devices, len(found)))


def spent(cells: Sequence[Cell], devices: int) -> float:
    """Seconds that cells took so far, whatever became of them, however often they were started."""
    done = [item.spent() for item in cells if item.spent()]
    return sum(done) / max(1, min(devices, len(done)))


def refuse_long(seconds: float | None, command: str) -> None:
    """Raise for more than half an hour, or for what cannot be told, that nobody said yes to.

    Raises:
        UsageError: with the command that says yes.
    """
    if seconds is None or seconds > LIMIT:
        what = "What this will take is not known" if seconds is None else f"This will take about {duration(seconds)}"
        raise UsageError(f"{what}; above {duration(LIMIT)} it starts only when you say so. Type {command}")


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min`, `2.5 h`."""
    if seconds is None:
        return "n/m"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
