"""Run cells, each in a process of its own: placed, started or resumed, watched, and ended as it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from .. import disk
from ..config import without_secrets
from ..errors import StorageError
from ..stages.digests import note_data, refuse_other_data
from ..stages.resuming import last_checkpoint, outputs, remove
from .cells import Cell, created, within

LOOKS = 0.25
"""Seconds between two looks at how much memory a cell takes."""


class Runner:
    """Runs cells, each in a process, on any number of devices at once; ends them all when it is told."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.processes: set[subprocess.Popen] = set()
        self.ended = False
        """Whether no cell is to start any more."""
        self.data: dict[str, str] = {}
        """Digests of what cells read, as the first of them found it."""
        self.lock = threading.Lock()

    def run(self, cell: Cell, device: str | None = None) -> None:
        """Start a cell, or go on with it, and wait for its end; its state says how that was.

        Args:
            cell: one that is not finished.
            device: for CUDA_VISIBLE_DEVICES; None leaves the environment as it is.

        Raises:
            StorageError: the folder cannot be written, or data changed since the other cells were made of it.
        """
        with within(cell):
            checkpoint = self._place(cell)
            more = ["--resume_from_checkpoint", str(checkpoint)] if checkpoint else []
            line = [sys.executable, "-m", "hf_ftplus", "sft", "--config", str(cell.stage.file), *more]
            begin = time.monotonic()
            with cell.log.open("wb") as log:
                with self.lock:
                    if self.ended:
                        return
                    process = subprocess.Popen(
                        line,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=self._environment(device),
                        start_new_session=True,  # Ctrl-C reaches it through `end` alone, once
                    )
                    self.processes.add(process)
                known = {"pid": process.pid, "created": created(process.pid), "resumed": checkpoint is not None}
                known |= {"spent": cell.kept.get("spent", 0.0)} | ({} if device is None else {"device": device})
                cell.keep(**known)
                peak = watch(process)
            self.processes.discard(process)
            seconds = round(time.monotonic() - begin, 2)
            known["spent"] += seconds
            cell.keep(**known, seconds=seconds, peak_bytes=peak, code=process.returncode)
            self._judge(cell, process.returncode)

    def _place(self, cell: Cell) -> Path | None:
        """Its folder with what it is told, cleared of what cannot be gone on from; the checkpoint to go on from."""
        stage = cell.stage
        with disk.locked(stage.folder, "--out"):
            checkpoint = last_checkpoint(stage)
            if not checkpoint:
                remove(*outputs(stage))
                note_data(stage)
            refuse_other_data(stage)
            self.know(cell)
            text = yaml.safe_dump(without_secrets(stage.yaml), sort_keys=False, allow_unicode=True)
            disk.write(stage.file, text)
        return checkpoint

    def know(self, cell: Cell) -> None:
        """Compare the digests of its data with those of the cells before.

        Raises:
            StorageError: a file changed in between.
        """
        file = cell.stage.folder / "ftplus" / "data.json"
        if not file.is_file():
            return
        now = json.loads(file.read_text(encoding="utf-8"))
        with self.lock:
            then = self.data
            self.data = {**now, **then}
        if changed := [name for name in then if now.get(name, then[name]) != then[name]]:
            raise StorageError(
                f"{', '.join(changed)} changed since other cells were made of it, so nothing could be compared. Put "
                "back what it held, or choose another --out."
            )

    def _environment(self, device: str | None) -> dict[str, str]:
        more = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        return {**os.environ, **more, **({"HF_TOKEN": self.token} if self.token else {}), "PYTHONUNBUFFERED": "1"}

    def _judge(self, cell: Cell, code: int) -> None:
        """A report ends a cell, also where its retention gate did not pass: that is what is compared."""
        if cell.stage.report.is_file():
            cell.finish()
        else:
            cell.state, cell.error = "failed", last_words(cell.log, code)

    def end(self, signals: int = signal.SIGINT) -> None:
        """Pass a signal on: the cells save and end. One that none survives goes to their ranks, too, which would train
        on alone."""
        with self.lock:
            self.ended, started = True, list(self.processes)
        for process in started:
            with suppress(psutil.Error):
                for rank in psutil.Process(process.pid).children(recursive=True) if signals == signal.SIGKILL else ():
                    rank.kill()
            with suppress(OSError):
                process.send_signal(signals)

    def wait(self) -> None:
        """Until all that run have ended."""
        for process in list(self.processes):
            process.wait()


def watch(process: subprocess.Popen) -> int | None:
    """Wait for the end of a process; the most bytes of memory that it and its children held, as seen now and then."""
    peak = 0
    while True:
        with suppress(psutil.Error):
            family = psutil.Process(process.pid)
            peak = max(peak, sum(_resident(one) for one in [family, *family.children(recursive=True)]))
        with suppress(subprocess.TimeoutExpired):
            process.wait(LOOKS)
            return peak or None


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return process.memory_info().rss
    return 0


def last_words(log: Path, code: int) -> str:
    """The one red line of `ftplus sft`; without it (a kill, a crash of the interpreter) how it ended."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]
    except OSError:
        lines = []
    mark = "ftplus: error: "
    said = next((line.partition(mark)[2] for line in reversed(lines) if mark in line), "")
    ended = f"killed by signal {-code}" if code < 0 else f"ended with {code}"
    return f"{said or 'no word of it'} ({ended}; see {log})"
