"""One cell: an ordinary `ftplus sft` run in a folder of its own, and whether what is there may be gone on from.

A cell is a stage that nothing came before, and is kept as one (stages/resuming.py, digests.py): finished when its
report is there, resumed from its last whole checkpoint, refused when its settings or data changed. A kill at any moment
costs the cell that it hit what it trained since that checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from .. import disk
from ..config import without_secrets
from ..errors import FTPlusError, StorageError
from ..stages.digests import refuse_other_data
from ..stages.plan import Stage
from ..stages.resuming import refuse_changed, refuse_foreign
from .candidates import Row

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..report import Report

OWN = ("plugins", "set", "output_dir", "seed", "learning_rate", "push_to_hub")
"""Keys of the config that the cell decides; a cell is never pushed."""

LEFT_OUT = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|^CUDA_VISIBLE_DEVICES$", re.I)
"""Of `env`: secrets, which no file keeps, and which device a cell has."""


@dataclass
class Cell:
    """One row with one seed."""

    row: Row
    seed: int
    stage: Stage
    """Its folder, and what it is told."""
    state: str = "waiting"
    """waiting, finished, failed or left out."""
    error: str = ""
    """What it said when it failed, in a line."""

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.stage.folder / "ftplus" / "log.txt"

    @property
    def kept(self) -> dict[str, Any]:
        """How its last process ended: pid, created, resumed, what earlier ones spent; then seconds, peak_bytes, code.
        Empty if never begun."""
        try:
            found = disk.read_json(self.stage.folder / "ftplus" / "cell.json")
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def keep(self, **facts: Any) -> None:
        text = json.dumps(facts, indent=1) + "\n"
        disk.write(self.stage.folder / "ftplus" / "cell.json", text)

    def report(self) -> Report:
        from ..report import Report

        return Report.load(self.stage.report)

    def finish(self) -> None:
        """Its report ends it; checkpoints take up to three times the model each, and are of no more use."""
        self.state = "finished"
        for folder in self.stage.folder.glob("checkpoint-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def seconds(self) -> float:
        """That its last process took; as its report says where `compare` was killed and the process lived on."""
        return self.kept.get("seconds") or sum(self.report().facts["seconds"].values())

    def spent(self) -> float:
        """That all its processes took; where `compare` was killed beside the last, as its report says."""
        kept = self.kept
        if {"code", "spent"} <= kept.keys():
            return kept["spent"]
        return kept.get("spent", 0.0) + (self.seconds() if self.state == "finished" else 0.0)

    def peak_bytes(self) -> int | None:
        """The most that its run held of the device's memory; without a device, its process of the machine's."""
        on_device = self.report().facts.get("device_bytes") if self.stage.report.is_file() else None
        return on_device or self.kept.get("peak_bytes")


def cells(rows: Sequence[Row], seeds: Sequence[int], out: Path, given: dict[str, Any], config: RunConfig) -> list[Cell]:
    """Every cell, all rows with the first seed before any with the second."""
    return [
        cell(row, seed, out / "cells" / slug(row.name) / f"seed-{seed}", given, config)
        for seed in seeds
        for row in rows
    ]


def cell(row: Row, seed: int, folder: Path, given: dict[str, Any], config: RunConfig, **more: Any) -> Cell:
    """What one run is told: the config less what the cell decides. `more` wins over both."""
    own = {"output_dir": str(folder), "learning_rate": row.learning_rate, "seed": seed, "plugins": row.plugins}
    told = {key: value for key, value in given.items() if key not in OWN} | own
    told = {"save_total_limit": 1, **told, **more}
    if isinstance(told.get("env"), dict):
        told["env"] = {name: value for name, value in told["env"].items() if not LEFT_OUT.search(str(name))}
    told = yaml.safe_load(yaml.safe_dump(told, sort_keys=False))  # as it comes back from the file, to be compared
    return Cell(row, seed, Stage(1, row.name, folder, told, config=replace(config, strategies=row.strategies)))


def slug(name: str) -> str:
    """A folder's name for that of a row; told apart by a digest where it cannot hold all of it."""
    short = re.sub(r"[^\w.+=-]+", "-", name, flags=re.ASCII).strip("-.")
    return (
        short
        if short == name.replace(":", "-") and len(short) <= 100
        else f"{short[:90]}-{zlib.crc32(name.encode()):08x}"
    )


@contextmanager
def within(cell: Cell) -> Iterator[None]:
    """Put the name of the cell on whatever is wrong with it; what stages call output_dir is --out here."""
    try:
        yield
    except FTPlusError as error:
        raise type(error)(f"Cell {cell.name}: {error}".replace("output_dir", "--out")) from error
    except OSError as error:
        raise StorageError(f"Cannot write {cell.stage.folder}: {error.strerror}. Choose another --out.") from error


def look(cell: Cell) -> None:
    """See what is there of a cell, and refuse what does not belong to it, before any starts.

    Raises:
        StorageError: another run, other settings or other data; or a process of it that still runs.
    """
    with within(cell):
        refuse_foreign(cell.stage)
        if (pid := running(cell)) is not None:
            raise StorageError(
                f"it still runs as process {pid}, which an earlier `ftplus compare` left behind. Wait for its end, or "
                f"type kill {pid}, then the same command."
            )
        if cell.stage.folder.is_dir() and not cell.stage.report.is_file():
            with disk.locked(cell.stage.folder, "--out"):  # by whomever it was started
                pass
        refuse_changed(cell.stage, without_secrets(cell.stage.yaml))
        refuse_other_data(cell.stage)
        if cell.stage.report.is_file():
            cell.report()
            cell.state = "finished"


def running(cell: Cell) -> int | None:
    """The process that trains it, if one does: of a compare that was killed, or of another one now."""
    kept = cell.kept
    pid = kept.get("pid") if "code" not in kept else None
    with suppress(psutil.Error):
        if pid and created(pid) == kept.get("created") and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            return pid
    return None


def created(pid: int) -> float | None:
    """When a process began, which tells it from a later one of the same number."""
    with suppress(psutil.Error):
        return psutil.Process(pid).create_time()
    return None
