"""The demo as a measurement: plain fine-tuning at several learning rates against EWC, over seeds, on both axes.

    .venv/bin/python examples/benchmarks/forgetting.py --seeds 3

Every row is one `ftplus sft` command on the demo's data (examples/demo). A cell that was measured before is not run
again, so the benchmark may be stopped at any time. The last table says, at matched learning, how much of plain's rise
in protect loss each row removes; rows that learnt less than 90 % of the facts are shown and not compared.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from hf_ftplus.report import Report

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "demo"))

LEARNT = 0.9
EWC = "--plugin ewc --set ewc.remember=false --set ewc.strength"
ROWS = {
    "plain 2e-5": '--learning_rate 2e-5 --max_steps 120 --lr_scheduler_kwargs {"num_decay_steps":36}',
    "plain 5e-5": '--learning_rate 5e-5 --max_steps 90 --lr_scheduler_kwargs {"num_decay_steps":27}',
    "plain 1e-4": "--learning_rate 1e-4",
    "plain 2e-4": "--learning_rate 2e-4",
    "ewc 3e4, 2e-4": f"{EWC}=30000 --learning_rate 2e-4",
    "plain LoRA 2e-3": "--use_peft --lora_r 16 --lora_target_modules all-linear --learning_rate 2e-3",
    "ewc LoRA 1e3, 2e-3": f"{EWC}=1000 --use_peft --lora_r 16 --lora_target_modules all-linear --learning_rate 2e-3",
    "ewc LoRA 1e4, 2e-3": f"{EWC}=10000 --use_peft --lora_r 16 --lora_target_modules all-linear --learning_rate 2e-3",
    "ewc LoRA 3e4, 2e-3": f"{EWC}=30000 --use_peft --lora_r 16 --lora_target_modules all-linear --learning_rate 2e-3",
}
"""Low rates get up to twice the demo's 60 steps, to learn as much."""


@dataclass
class Cell:
    """One run: share of facts learnt, mean rise of loss over the protect tasks (nats per token), seconds."""

    learnt: float
    otherwise: float
    rise: float
    drift: float
    seconds: float

    @classmethod
    def read(cls, path: Path) -> Cell:
        report = Report.load(path)
        tasks = {task.name: task for task in report.tasks}
        protect = [task for task in report.tasks if task.role == "protect"]
        return cls(
            tasks["learn"].after.metric.value,
            tasks["asked otherwise"].after.metric.value,
            statistics.mean(task.after.loss.value - task.before.loss.value for task in protect),
            statistics.mean(task.drift.value for task in protect),
            report.facts["seconds"]["training"],
        )


@click.command()
@click.option("--seeds", default=3)
@click.option("--out", default="demo_output/forgetting", type=click.Path(path_type=Path))
@click.option("--only", multiple=True, help="Only these rows.")
def main(seeds: int, out: Path, only: tuple[str, ...]) -> None:
    """Run what is missing, then print the table."""
    from make_data import make_data
    from run import ENVIRONMENT, OUT

    make_data(OUT / "data")
    cells: dict[str, list[Cell]] = {}
    for seed in range(seeds):
        for name, flags in ROWS.items():
            if only and name not in only:
                continue
            folder = out / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
            report = folder / "ftplus" / "report.json"
            if not report.is_file():
                command = [str(Path(sys.executable).parent / "ftplus"), "sft", "--config", "examples/demo/demo.yaml"]
                command += ["--output_dir", str(folder), "--seed", str(seed), "--completions", "0", *flags.split()]
                click.echo(f"{name}, seed {seed}")
                subprocess.run(
                    command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **ENVIRONMENT}, cwd=ROOT
                )
                (folder / "model.safetensors").unlink(missing_ok=True)  # half a gigabyte that nobody reads again
            cells.setdefault(name, []).append(Cell.read(report))
    Console(width=110).print(summary(cells))


def summary(cells: dict[str, list[Cell]]) -> Table:
    """Mean and range over seeds; the reference is the plain row that learnt enough and lost least."""
    learnt = {name: statistics.mean(cell.learnt for cell in found) for name, found in cells.items()}
    rise = {name: statistics.mean(cell.rise for cell in found) for name, found in cells.items()}
    plain = [name for name in cells if name.startswith("plain") and learnt[name] >= LEARNT]
    best = min(plain, key=rise.__getitem__, default=None)
    table = Table(title=f"Demo facts, {max(map(len, cells.values()), default=0)} seeds; mean (lowest - highest)")
    for column in (
        "row",
        "facts learnt",
        "asked otherwise",
        "rise of protect loss",
        "drift",
        "seconds",
        "of plain's rise removed",
    ):
        table.add_column(column)
    for name, found in cells.items():
        removed = f"{1 - rise[name] / rise[best]:.0%}" if best and learnt[name] >= LEARNT else "learnt too little"
        columns = [
            [getattr(cell, key) for cell in found] for key in ("learnt", "otherwise", "rise", "drift", "seconds")
        ]
        shown = [
            f"{statistics.mean(c):.{d}f} ({min(c):.{d}f} - {max(c):.{d}f})"
            for c, d in zip(columns, (2, 2, 3, 3, 0), strict=True)
        ]
        table.add_row(name, *shown, "reference" if name == best else removed)
    return table


if __name__ == "__main__":
    main()
