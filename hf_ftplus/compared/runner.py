"""The story of a comparison: what is asked, what it will take, every cell that is left, and which row to take.

One cell at a time on one device. With several GPUs in sight each cell is given one, through CUDA_VISIBLE_DEVICES in the
environment of its process; this has run on CPU only. A config that is itself launched in several processes has all
devices to itself, one cell after the other.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FTPlusError, UsageError
from .candidates import rows
from .cells import Cell, cells, look
from .judged import Judgement, judge
from .plan import Probe, forecast, probed, refuse_long, spent, total
from .processes import Runner
from .shown import plan

if TYPE_CHECKING:
    from ..config import RunConfig

SEED = 42
"""Of `ftplus sft`, where nothing is said."""


@dataclass
class Asked:
    """What was typed, read."""

    given: dict[str, Any]
    """The config as it stands in its file."""
    plugins: Sequence[str]
    out: Path
    seeds: int = 3
    strengths: str | None = None
    rates: str | None = None
    budget: float | None = None
    """Seconds of the whole comparison, however often it was stopped: what any cell took is part of it."""
    yes: bool = False
    command: str = ""
    """The same with --yes, as it can be typed."""


def compare(asked: Asked, show: Callable[[Any], None], say: Callable[[str], None]) -> Judgement:
    """Run what is left of a comparison, and judge it.

    Args:
        show: prints a rich table.
        say: prints a line of progress.

    Raises:
        FTPlusError: see the exit codes in `errors.py`. Cells that fail are no such error: they are in the judgement.
        KeyboardInterrupt: Ctrl-C or SIGTERM; cells save and end, and the same command goes on.
    """
    config, launched = configured(asked.given)
    table = rows(asked.plugins, config, asked.strengths, asked.rates)
    first = asked.given.get("seed", SEED)
    all_cells = cells(table, range(first, first + asked.seeds), asked.out, asked.given, config)
    check(all_cells, config)
    begin = time.monotonic()
    devices = [None] if launched or config.training.use_cpu else gpus()
    runner = Runner(asked.given.get("hub_token"))
    with ending(runner, say):
        probe = None
        if not any(cell.state == "finished" for cell in all_cells):
            say("Measuring a few steps first, to say what all will take.")
            probe = probed(all_cells[: len(table)], asked.out, asked.given, config, runner, devices[0])
        show(plan(table, all_cells, probe, len(devices), asked.budget))
        left = None if asked.budget is None else asked.budget - spent(all_cells, len(devices))
        if not asked.yes and any(cell.state != "finished" for cell in all_cells):
            seconds = total(all_cells, probe, len(devices))
            refuse_long(seconds if None in (seconds, left) else min(seconds, left), asked.command)
        run(all_cells, devices, runner, probe, None if left is None else begin + left, say)
    return judge(table, all_cells)


def configured(given: dict[str, Any]) -> tuple[RunConfig, bool]:
    """The run that all cells share, and whether it is launched in several processes.

    Raises:
        UsageError: a key that belongs elsewhere, or nothing that says what was learnt and kept.
    """
    from ..cli import launch
    from ..cli.sft import configured as read

    if "resume_from_checkpoint" in given:
        raise UsageError("resume_from_checkpoint: a comparison goes on by itself. Leave it out of the config.")
    if not isinstance(given.get("seed", SEED), int):
        raise UsageError(f"seed: {given['seed']!r} in the config; expected a whole number, the first of the seeds.")
    config, asked, _ = read({}, (), {key: value for key, value in given.items() if key != "env"})
    if not config.measure_rows or all(name in config.unmeasured for name in config.learns):
        raise UsageError(
            "The config measures nothing of what is learnt (measure_rows: 0, or measure: false); a comparison needs it."
        )
    if not config.protect and all(spec.name in config.learns for spec in config.measure):
        raise UsageError(
            "The config names nothing that could be forgotten. Add it: protect: {chat: chat.jsonl}, or protect: "
            "self:256 to let the starting model write it."
        )
    return config, bool(asked or launch.expected(use_cpu=True))


def check(all_cells: Sequence[Cell], config: RunConfig) -> None:
    """Find what is wrong with settings, model, data and folders before anything starts.

    Raises:
        FTPlusError: with the cell that it is about, where it is about one.
    """
    from ..foreseen import refuse_foreseen
    from ..model import DEMO, to_train
    from ..refusals import refuse
    from ..rows import find
    from ..trained import tokenizer_of

    if (model := config.model.model_name_or_path) != DEMO:
        folder = Path(to_train(model))
        if folder.is_dir() and not config.training.trust_remote_code:  # code of its own may read what we cannot
            tokenizer_of(model)
    for cell in all_cells:
        look(cell)
    for row in {id(cell.row): cell.row for cell in all_cells}.values():
        refuse(row.strategies, config.training)
        refuse_foreseen(replace(config, strategies=row.strategies), row.strategies)
    if any(cell.state != "finished" for cell in all_cells):
        find(config)


def gpus() -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES may name, one for each device in sight; [None] without several."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return [None]
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


def run(
    all_cells: Sequence[Cell],
    devices: Sequence[str | None],
    runner: Runner,
    probe: Probe | None,
    until: float | None,
    say: Callable[[str], None],
) -> None:
    """Every cell that is left, in order, on the next device that is free; none that would end after `until`."""
    waiting = deque(cell for cell in all_cells if cell.state != "finished")
    for cell in all_cells:
        if cell.state == "finished":
            runner.know(cell)
            cell.finish()
    lock, done, faults = threading.Lock(), threading.Semaphore(0), []

    def take() -> Cell | None:
        with lock:
            if not waiting or faults or runner.ended:
                return None
            cell = waiting.popleft()
            takes = forecast(cell, all_cells, probe).seconds
            if until is not None and time.monotonic() + (takes or 0) > until:
                for left in (cell, *waiting):
                    left.state = "left out"
                waiting.clear()
                return None
            return cell

    def work(device: str | None) -> None:
        try:
            while cell := take():
                on = f" on GPU {device}" if device else ""
                say(f"[{all_cells.index(cell) + 1}/{len(all_cells)}] {cell.name}{on}")
                runner.run(cell, device)
                if cell.state == "failed" and not runner.ended:
                    say(f"  failed: {cell.error}")
        except Exception as error:  # of this process: a full disk, data that changed
            faults.append(error)
        finally:
            done.release()

    for device in devices:
        threading.Thread(target=work, args=(device,)).start()
    for _ in devices:
        while not done.acquire(timeout=0.1):  # not join, which Ctrl-C makes take a thread for ended (Python 3.11)
            pass
    if faults:
        raise faults[0]


@contextmanager
def ending(runner: Runner, say: Callable[[str], None]) -> Iterator[None]:
    """Pass Ctrl-C and SIGTERM on to the cells and wait until they have saved; a second one kills them."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(128 + number)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except KeyboardInterrupt:
        say("Stopping: the cells that run save what they have. Finished cells are kept; the same command goes on.")
        runner.end()
        try:
            runner.wait()
        except KeyboardInterrupt:
            runner.end(signal.SIGKILL)
            runner.wait()
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def failed(found: Judgement) -> FTPlusError | None:
    """What to raise for cells that failed, when all is shown."""
    cells = [cell for item in found.rows for cell in item.cells]
    lost = [cell for cell in cells if cell.state == "failed"]
    if not lost:
        return None
    return FTPlusError(f"{len(lost)} of {len(cells)} cells failed: {lost[0].name}: {lost[0].error}")
