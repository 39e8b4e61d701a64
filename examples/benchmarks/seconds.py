"""How long a row of strategies.py trains beside another one, preparation included, in turns: A B B A.

    python examples/benchmarks/seconds.py "distill 1/12 + EWC 10,000, self, 80 steps"          beside plain 5e-5

Each side is some steps of the `ftplus sft` command that strategies.py types, in a process of its own. What is before
the first step (the Fisher, what a teacher answers) is counted once, and the median of the steps as often as the row
has steps. Self-written rows are there already, kept from an earlier run, as they are for every run of a model but the
first, and so are a teacher's answers to them.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from overhead import machine
from strategies import ROOT, ROWS, SENTIMENT
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

STEPS, WARM = 12, 2
"""Of each run, and those of them that are not counted."""
OWN = ("--max_steps", "--lr_scheduler_kwargs")
"""Flags of a row that say how long it trains."""


class Clock(TrainerCallback):
    """Writes down when training began and when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        Path(args.output_dir, "times.json").write_text(json.dumps(self.times))


def steps_of(name: str) -> int:
    """Of the whole run; 60 in the demo's YAML."""
    found = re.search(r"--max_steps (\d+)", ROWS[name])
    return int(found[1]) if found else 60


def typed(name: str, folder: str) -> list[str]:
    """The command of a row, for so many steps."""
    words = ROWS[name].split()
    kept = [word for before, word in zip(["", *words], words, strict=False) if word not in OWN and before not in OWN]
    own = f"--output_dir {folder} --measure_rows 0 --completions 0 --max_steps {STEPS} --warmup_steps 1".split()
    return ["sft", "--config", "examples/demo/demo.yaml", *own, *kept, "--lr_scheduler_kwargs", '{"num_decay_steps":1}']


def timed(name: str) -> tuple[float, float]:
    """Seconds before the first step, with what the first steps take longer than others, and of each step."""
    from run import ENVIRONMENT

    with tempfile.TemporaryDirectory() as place:
        folder = f"{place}/out"
        command = [sys.executable, __file__, "--type", *typed(name, folder)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **ENVIRONMENT}, cwd=ROOT)
        training = json.loads(Path(folder, "ftplus", "report.json").read_text())["facts"]["seconds"]["training"]
        times = json.loads(Path(folder, "times.json").read_text())
    each = [after - before for before, after in pairwise(times)][WARM:]
    return training - sum(each) - WARM * statistics.median(each), statistics.median(each)


@click.command()
@click.argument("row", metavar="ROW", type=click.Choice([name for name in ROWS if not name.startswith(SENTIMENT)]))
@click.option("--beside", default="plain 5e-5", metavar="ROW", type=click.Choice(list(ROWS)), show_default=True)
@click.option("--rounds", default=2, show_default=True, help="Of A B B A.")
def main(row: str, beside: str, rounds: int) -> None:
    """Train both sides in turns and print what each takes."""
    from make_data import make_data
    from run import OUT

    make_data(ROOT / OUT / "data")
    timed(row)  # writes what is kept for the others
    found: dict[str, list[tuple[float, float]]] = {row: [], beside: []}
    for name in (beside, row, row, beside) * rounds:
        found[name].append(timed(name))
        before, each = found[name][-1]
        click.echo(f"{name}: {before:.1f} s before the first step, {each:.2f} s each", err=True)
    whole = {name: [before + steps_of(name) * each for before, each in runs] for name, runs in found.items()}
    click.echo(machine())
    for what, ours, theirs in (
        ("a step", [each for _, each in found[row]], [each for _, each in found[beside]]),
        (f"the whole of {steps_of(row)} steps", whole[row], whole[beside]),
    ):
        ratios = sorted(our / their for our, their in zip(ours, theirs, strict=True))
        median = statistics.median(ours) / statistics.median(theirs)
        click.echo(f"{what}: {median:.2f}x ({ratios[0]:.2f} - {ratios[-1]:.2f})")
    click.echo(f"beside {beside}, {steps_of(beside)} steps")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--type"]:  # the child: a command as it was typed, with a clock on its trainer
        from hf_ftplus.cli import main as ftplus

        DEFAULT_CALLBACKS.append(Clock)
        sys.exit(ftplus(sys.argv[2:]))
    main()
