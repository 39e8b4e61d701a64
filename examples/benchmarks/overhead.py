"""What EWC costs: step, Fisher pass, state and start-up, each as a ratio of both sides measured in one run.

    .venv/bin/python examples/benchmarks/overhead.py            prints the table; --json FILE keeps the figures

Both sides of a ratio are timed in turn, A B B A, on the same model and rows, and the median of these ratios is reported
with its range, so that a slower minute of the machine hits both. OMP_NUM_THREADS=1 counts seconds of the processor.
Shapes and machine stand beside the table.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from hf_ftplus import EWC, Memory, Run
from hf_ftplus.fisher import fisher
from hf_ftplus.model import resolve
from hf_ftplus.weights import split, trainable

ROWS, LENGTH, BATCHES = 8, 64, 8
GOALS = {
    "step, full": 1.04,
    "step, LoRA r=16": 1.02,
    "Fisher, full": 1.15,
    "Fisher, LoRA r=16": 1.15,
    "state, full": 8.0,
    "state, LoRA r=16": 1.0,
    "ftplus --help": 5.0,
}


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Random tokens, the second half supervised, as in prompt/completion rows."""
    ids = torch.randint(100, 40_000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def clock() -> Callable[[], float]:
    """Seconds of the processor on one thread, which other work on the machine hardly touches; else of the wall."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def paired(
    one: Callable[[], object], other: Callable[[], object], pairs: int, now: Callable[[], float] | None = None
) -> list[float]:
    """Ratios time(one) / time(other), a warm-up first.

    A ratio is of A B B A: a machine that drifts, or favours whoever goes first, then favours neither side.
    """
    ratios, now = [], now or clock()
    for _ in range(pairs + 1):
        took = dict.fromkeys((one, other), 0.0)
        for side in (one, other, other, one):
            begin = now()
            side()
            took[side] += now() - begin
        ratios.append(took[one] / took[other])
    return ratios[1:]


class Bench:
    """One model, in full or with LoRA, with an optimizer and a prepared EWC."""

    def __init__(self, lora: bool) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(resolve("demo"), dtype=torch.float32).train()
        if lora:
            self.model = get_peft_model(self.model, LoraConfig(r=16, target_modules="all-linear"))
        self.optimizer = torch.optim.AdamW([w for w in self.model.parameters() if w.requires_grad], lr=1e-5, fused=True)
        self.batch, self.several = batch(0), [batch(seed) for seed in range(BATCHES)]
        self.run = Run(
            model=self.model, weights=trainable(self.model), protect={"text": [batch(1)]}, learn=lambda rows: [],
            device=torch.device("cpu"), seed=0, memory=Memory(), measuring=False,
        )  # fmt: skip
        self.ewc = EWC(strength=1.0)
        self.ewc.prepare(self.run)

    def forward_backward(self) -> None:
        self.model(**self.batch).loss.backward()

    def step(self, hold: bool) -> None:
        """A step as the Trainer makes it: clipped to a norm of 1, then AdamW."""
        self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.run.weights.values(), 1.0)
        if hold:
            with torch.no_grad():
                self.ewc.before_step(self.run)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def training_pass(self) -> None:
        for rows in self.several:
            self.model(**rows).loss.backward()
            self.model.zero_grad()

    def fisher_pass(self) -> None:
        fisher(self.model, self.several, *split(self.model))

    def state(self) -> float:
        """Bytes per weight; under LoRA in units of one fp32 number per row and column of each target."""
        state = sum(tensor.numel() * tensor.element_size() for tensor in self.ewc.state_dict().values())
        adapters = split(self.model)[1].values()
        if adapters:
            return state / (4 * sum(sum((*a.B.shape[:1], *a.A.shape[1:])) for a in adapters))
        return state / sum(weight.numel() for weight in self.run.weights.values())


def processes(pairs: int) -> list[float]:
    """`ftplus --help` against the start of Python itself, as whole processes."""
    quiet = {"stdout": subprocess.DEVNULL, "check": True}
    ours = partial(subprocess.run, [str(Path(sys.executable).parent / "ftplus"), "--help"], **quiet)
    return paired(ours, partial(subprocess.run, [sys.executable, "-c", "pass"], **quiet), pairs, time.perf_counter)


@click.command()
@click.option("--pairs", default=5, help="Ratios timed for each figure.")
@click.option("--only", multiple=True, type=click.Choice(list(GOALS)), help="Only these figures.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Also write every ratio here.")
def main(pairs: int, only: tuple[str, ...], path: str | None) -> None:
    """Measure what EWC costs on the demo model, batch 8 x 64, fp32."""
    found = {what: measure(pairs) for what, measure in figures() if not only or what in only}
    show(found)
    if path:
        Path(path).write_text(json.dumps({"machine": machine(), "ratios": found}, indent=1))


def figures() -> Iterator[tuple[str, Callable[[int], list[float]]]]:
    """What is measured, and how, given a number of ratios; one model in memory at a time."""
    for kind, lora in (("full", False), ("LoRA r=16", True)):
        bench = Bench(lora)
        yield f"step, {kind}", partial(paired, partial(bench.step, True), partial(bench.step, False))
        yield f"Fisher, {kind}", partial(paired, bench.fisher_pass, bench.training_pass)
        yield f"state, {kind}", lambda pairs, bench=bench: [bench.state()]
        del bench
    yield "ftplus --help", lambda pairs: processes(max(pairs, 15))


def show(found: dict[str, list[float]]) -> None:
    table = Table(
        title=f"EWC beside plain, demo model (135 M weights), fp32, batches of {ROWS} x {LENGTH} tokens",
        caption=machine(),
    )
    for column in ("what", "median", "range", "goal"):
        table.add_column(column)
    against = {
        "state, full": " bytes per weight",
        "state, LoRA r=16": " x 4 (d + k) bytes",
        "ftplus --help": " x python -c pass",
    }
    for what, ratios in found.items():
        goal = GOALS[what]
        unit = against.get(what, " x")
        table.add_row(
            what, f"{statistics.median(ratios):.3f}{unit}", f"{min(ratios):.3f} - {max(ratios):.3f}", f"<= {goal:g}"
        )
    Console().print(table)


def machine() -> str:
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{platform.machine()}, {threads}, torch {torch.__version__}, CPU only"


if __name__ == "__main__":
    main()
