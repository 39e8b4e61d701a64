"""What it costs that a checkpoint is known to be whole: time beside the Trainer's own save, and memory.

    .venv/bin/python examples/benchmarks/saving.py           prints Markdown

The demo model after one step, all of it trained, saves in turns, A B C C B A: as the Trainer does; as our trainer does,
which sums every file and flushes it to the disk; and that with EWC, whose state it writes, too. Memory is what the
process held at most while it saved, beyond what it held before.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import psutil
import trl
from costs import trainer
from overhead import machine
from transformers import TrainerCallback

from hf_ftplus import EWC, SFTTrainer, commit


class Peak(threading.Thread):
    """The most memory that this process held while the block lasted, beyond what it held before: MB."""

    def __enter__(self) -> Peak:
        self.process, self.over = psutil.Process(), threading.Event()
        self.before = self.most = self.process.memory_info().rss
        self.start()
        return self

    def run(self) -> None:
        while not self.over.wait(0.005):
            self.most = max(self.most, self.process.memory_info().rss)

    def __exit__(self, *raised: object) -> None:
        self.over.set()
        self.join()

    @property
    def megabytes(self) -> float:
        return (self.most - self.before) / 1e6


def saved(side: SFTTrainer, save: Callable[..., None]) -> tuple[float, float, int]:
    """Seconds of one save, MB that it took, and bytes written."""
    checkpoint = Path(side.args.output_dir) / f"checkpoint-{side.state.global_step}"
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
    begin = time.perf_counter()
    with Peak() as peak:
        save(side, side.model, None)
    seconds = time.perf_counter() - begin
    return seconds, peak.megabytes, sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())


def compared(checkpoint: Path) -> float:
    """Seconds of reading every file and comparing its sum, as before a run goes on."""
    begin = time.perf_counter()
    commit.refuse_broken(checkpoint)
    return time.perf_counter() - begin


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Of A B C C B A.")
def main(rounds: int) -> None:
    """Save in turns and print what each save took."""
    with tempfile.TemporaryDirectory() as place:
        plain, held = (
            trainer(f"{place}/{name}", 1, strategy, TrainerCallback(), {})
            for name, strategy in (("plain", None), ("held", EWC(rows=8)))
        )
        plain.train()
        held.train()
        sides: dict[str, tuple[Any, Callable[..., None]]] = {
            "the Trainer's": (plain, trl.SFTTrainer._save_checkpoint),
            "ours": (plain, SFTTrainer._save_checkpoint),
            "ours with EWC": (held, SFTTrainer._save_checkpoint),
        }
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in sides}
        for name in [*sides, *reversed(sides)] * rounds:
            found[name].append(saved(*sides[name]))
        reading = compared(Path(place, "held", "checkpoint-1"))
    click.echo(f"{machine()}\n\n| save | GB | seconds (range) | seconds per GB / the Trainer's | memory, MB |")
    click.echo("|---|---|---|---|---|")
    rates = {name: statistics.median(seconds / size * 1e9 for seconds, _, size in runs) for name, runs in found.items()}
    theirs = rates["the Trainer's"]
    for name, runs in found.items():
        seconds = sorted(seconds for seconds, _, _ in runs)
        spread = f"{statistics.median(seconds):.1f} ({seconds[0]:.1f} - {seconds[-1]:.1f})"
        most = max(memory for _, memory, _ in runs)
        click.echo(f"| {name} | {runs[0][2] / 1e9:.2f} | {spread} | {rates[name] / theirs:.2f}x | {most:.0f} |")
    click.echo(f"\nBefore a run goes on, every file is read and its sum compared: {reading:.1f} s here.")


if __name__ == "__main__":
    main()
