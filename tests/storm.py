"""Kill runs: as a script, in one process that forks, so that a hundred starts do not import torch a hundred times.

    python storm.py storm PLACE OUT KILLS STEPS    SIGKILL at random moments (or never, for 0), then one run to the end
    python storm.py points OUT                     SIGKILL at every single write of a save, one after the other

Each prints a line of JSON, or fails.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from commands import words
from training import trainer

from hf_ftplus import commit
from hf_ftplus.cli import main


def line(place: Path, out: Path, steps: int) -> list[str]:
    few = ["--measure_rows", "0", "--logging_steps", "1", "--max_steps", str(steps), "--save_total_limit", "2"]
    more = ["--plugin", "replay", "--plugin", "distill", "--resume_from_checkpoint", "auto"]
    return words(place, out, *few, *more)


def started(words: list[str], log: Path) -> int:
    """The process id of a run in a process of its own."""
    log.write_bytes(b"")
    if child := os.fork():
        return child
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1), os.dup2(handle, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os._exit(main(words))


def wait_for(child: int, said: Callable[[], Any], seconds: float = 120) -> bool:
    """Whether it happened before the run ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if said():
            return True
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.003)
    os.kill(child, signal.SIGKILL)
    raise SystemExit(f"nothing happened for {seconds} s")


def ended(child: int, log: Path) -> None:
    """Wait for a run that nobody stops."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise SystemExit(f"ended with {code}: {log.read_text()[-3000:]}")


def storm(place: Path, out: Path, kills: int, steps: int) -> None:
    run = line(place, out, steps)
    log, chance, whole, set_aside = out.with_suffix(".log"), random.Random(kills), [], 0
    for _ in range(kills):
        child = started(run, log)
        moment, known, alive = chance.random(), set(out.glob("checkpoint-*")), True
        if moment < 0.2:  # while it prepares
            time.sleep(chance.uniform(0, 2.0))
        else:
            alive = wait_for(child, lambda: "'loss'" in log.read_text(errors="replace"))
            if moment < 0.6:  # while it saves
                alive = alive and wait_for(child, lambda known=known: set(out.glob("checkpoint-*")) - known)
            time.sleep(chance.uniform(0, 0.03 if moment < 0.6 else 0.4))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not alive or not os.WIFSIGNALED(status):
            raise SystemExit(f"was over before it was killed: {log.read_text()[-3000:]}")
        there = [path for path in out.glob("checkpoint-*") if (path / commit.COMMIT).is_file()]
        faults = {path.name: why for path in there if (why := commit.fault(path))}
        whole.append(max((int(path.name.split("-")[1]) for path in there), default=0))
        if faults or whole != sorted(whole):
            raise SystemExit(f"a commit was lost or broken: {faults}, {whole}")
        set_aside += "is not whole" in log.read_text(errors="replace")
    ended(started(run, log), log)
    print(json.dumps({"kills": kills, "whole": whole, "set_aside": set_aside}))


# ---- every write of a save -------------------------------------------------------------------------------------------


class Countdown:
    """Kills its process at one of the moments at which something under `folder` is written, renamed or deleted."""

    def __init__(self, folder: Path, left: int) -> None:
        self.folder, self.left = str(folder), left
        sys.addaudithook(self.hear)
        torch.save = self.torn(torch.save, 1)
        safetensors.torch.serialize_file = self.torn(safetensors.torch.serialize_file, 1)

    def hear(self, event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate")
        if (writes or changes) and self.folder in str(args[0]):
            self.tick()

    def tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def torn(self, write, place: int):
        """A writer in Rust or C++, which Python does not hear: killed before, with half of the file there, or after."""

        def written(*args, **kwargs):
            self.tick()
            result, path = write(*args, **kwargs), args[place]
            if isinstance(path, (str, Path)) and self.left == 0:
                os.truncate(path, Path(path).stat().st_size // 2)
            self.tick()
            return result

        return written


def points(out: Path) -> None:
    it = trainer(out, "ewc", "replay", save_strategy="steps", save_steps=2, save_total_limit=1)
    backup, chosen = out.with_suffix(".kept"), []
    save = type(it)._save_checkpoint

    def again_and_again(self, *args) -> None:
        if self.state.global_step == 4:
            each_moment()
        save(self, *args)

    def each_moment() -> None:
        shutil.copytree(out, backup)
        whole = {path.name: sums(path) for path in backup.glob("checkpoint-*")}
        while True:
            drawn = random.getstate()
            child = os.fork()
            if not child:
                random.setstate(drawn)  # Python seeds it anew after a fork
                Countdown(out, len(chosen))
                save(it, it.model, None)
                os._exit(0)
            if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
                whole["checkpoint-4"] = sums(out / "checkpoint-4")
                break
            found = commit.newest(out)
            chosen.append((found.name, sums(found)))
            shutil.rmtree(out)
            shutil.copytree(backup, out)
        for moment, (name, held) in enumerate(chosen):
            if held != whole[name]:
                other = [file for file in whole[name] if held.get(file) != whole[name][file]]
                raise SystemExit(f"killed at {moment}: {name} was taken for whole, and is not: {other}")

    type(it)._save_checkpoint = again_and_again
    it.train()
    names = [name for name, _ in chosen]
    print(
        json.dumps({"moments": len(names), "older": names.count("checkpoint-2"), "newer": names.count("checkpoint-4")})
    )


def sums(checkpoint: Path) -> dict[str, str]:
    """What tells two checkpoints apart: all but times of day."""
    files = commit.read_commit(checkpoint)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "training_args.bin"}


if __name__ == "__main__":
    what, *places = sys.argv[1:]
    if what == "points":
        points(Path(places[0]))
    else:
        storm(Path(places[0]), Path(places[1]), int(places[2]), int(places[3]))
