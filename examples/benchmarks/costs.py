"""What each strategy adds to a training step: both sides in one run, step by step in turn.

    .venv/bin/python examples/benchmarks/costs.py            prints Markdown; --only NAME measures one row
    .venv/bin/python examples/benchmarks/costs.py --batch 16 the same with as many tokens in a step as the demo has
    .venv/bin/python examples/benchmarks/costs.py --peak     the same of memory: each side in a process of its own

Two real SFTTrainers, one plain and one with the strategy, train in threads of one process and take turns at every
optimizer step, so that a slower minute of the machine hits both. A ratio is of two pairs of steps, one that plain began
and one that the strategy began, from the end of one step to the end of the next: drawing rows, forward, backward,
strategy, optimizer. Preparing is not in it. OMP_NUM_THREADS=1 counts seconds of the processor.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import click
import torch
import trl
from datasets import Dataset
from overhead import clock, machine
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import hf_ftplus
from hf_ftplus import SI, Distill, MultiTask, Replay
from hf_ftplus.model import resolve

LENGTH = 64
WARM = 2
"""Steps of each side that are not counted."""
LORA = {"peft_config": LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")}

CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], float | None]] = {
    "replay 1/8": (lambda: Replay(), {}, 1.00),
    "multitask": (lambda: MultiTask(mode="equal"), {}, 1.01),
    "si": (lambda: SI(), {}, 1.08),
    "distill on learn": (lambda: Distill(on="learn"), {}, 1.45),
    "distill on learn, LoRA": (lambda: Distill(on="learn"), LORA, 1.40),
    "distill on learn, cache": (lambda: Distill(on="learn", cache=True), {}, 1.10),
    "distill on protect": (lambda: Distill(on="protect"), {}, None),
    "distill on protect, cache": (lambda: Distill(on="protect", cache=True), {}, None),
}
"""Strategy, further arguments of both trainers, and the goal."""


class Turns:
    """Threads that go on one at a time, in a fixed order."""

    def __init__(self, number: int) -> None:
        self.turn, self.changed = 0, threading.Condition()
        self.going = set(range(number))

    def wait(self, mine: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == mine)

    def give(self, mine: int, done: bool = False) -> None:
        with self.changed:
            self.going -= {mine} if done else set()
            after = [number for number in sorted(self.going) if number > mine]
            self.turn = (after or sorted(self.going) or [mine])[0]
            self.changed.notify_all()


class OneStepATurn(TrainerCallback):
    """Gives the turn away at the end of every step, and keeps the seconds of each turn."""

    def __init__(self, turns: Turns, mine: int) -> None:
        self.turns, self.mine, self.seconds, self.now = turns, mine, [], clock()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self.now() - self.begin)
        self.turns.give(self.mine)
        self.turns.wait(self.mine)
        self.begin = self.now()


def rows(count: int, seed: int, tasks: int = 1) -> Dataset:
    """Random tokens, the second half supervised, as in prompt/completion rows."""
    ids = torch.randint(100, 40_000, (count, LENGTH), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [[-100] * (LENGTH // 2) + row[LENGTH // 2 :] for row in ids]
    columns = {"input_ids": ids, "labels": labels}
    return Dataset.from_dict(columns | {"task": [f"task {i % tasks}" for i in range(count)]} if tasks > 1 else columns)


def trainer(
    folder: str, steps: int, strategy: Any, callback: TrainerCallback, batch: int, extra: dict[str, Any]
) -> Any:
    args = trl.SFTConfig(
        folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-5, max_length=LENGTH, use_cpu=True,
        bf16=False, gradient_checkpointing=False, logging_steps=1000, save_strategy="no", report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    return hf_ftplus.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(resolve("demo"), dtype=torch.float32),
        args=args,
        processing_class=AutoTokenizer.from_pretrained(resolve("demo")),
        train_dataset=rows(batch * steps, 0, tasks=2 if isinstance(strategy, MultiTask) else 1),
        callbacks=[callback],
        strategies=[strategy] if strategy else [],
        protect=rows(64, 1) if strategy else None,
        **extra,
    )


def in_turns(
    make: Callable[[], Any], extra: dict[str, Any], steps: int, batch: int, ours: int
) -> tuple[list[float], list[float]]:
    """Seconds of each step with the strategy, which is side `ours` (0 begins), and of the plain step beside it."""
    turns, failed = Turns(2), []
    callbacks = [OneStepATurn(turns, mine) for mine in (0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            trainer(f"{folder}/{mine}", steps + WARM, make() if mine == ours else None, callbacks[mine], batch, extra)
            for mine in (0, 1)
        ]

        def train(mine: int) -> None:
            turns.wait(mine)
            try:
                sides[mine].train()
            except BaseException as error:
                failed.append(error)
            finally:
                turns.give(mine, done=True)

        threads = [threading.Thread(target=train, args=(mine,)) for mine in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]
    seconds = [callback.seconds[WARM:] for callback in callbacks]
    return seconds[ours], seconds[1 - ours]


def peak(name: str, plain: bool, batch: int) -> tuple[int, int]:
    """Of a process that trains three steps: MiB at the most, and MiB of these that the strategy holds."""
    side = "plain" if plain else "strategy"
    line = [sys.executable, __file__, "--only", name, "--batch", str(batch), "--alone", side]
    peak, held = subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return int(peak), int(held)


def alone(name: str, plain: bool, batch: int) -> None:
    make, extra, _ = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        it = trainer(folder, 3, None if plain else make(), TrainerCallback(), batch, extra)
        it.train()
        held = 0 if plain else sum(it.ftplus.bytes().values())
    click.echo(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10} {held // 2**20}")


@click.command()
@click.option("--steps", default=6, help="Pairs of steps for each row in which plain begins, and in which it does not.")
@click.option("--batch", default=8, help="Rows of a step, of 64 tokens each.")
@click.option("--only", multiple=True, type=click.Choice(list(CASES)), help="Only these rows.")
@click.option("--peak", "memory", is_flag=True, help="Memory instead of seconds.")
@click.option("--alone", "side", type=click.Choice(["plain", "strategy"]), hidden=True)
def main(steps: int, batch: int, only: tuple[str, ...], memory: bool, side: str | None) -> None:
    """Measure on the demo model, fp32."""
    if side:
        alone(only[0], side == "plain", batch)
        return
    click.echo(f"Beside plain, demo model (135 M weights), fp32, {batch} x {LENGTH} tokens; {machine()}\n")
    if memory:
        click.echo("| strategy | peak, MiB | plain | it holds | peak / (plain + held) |\n|---|---|---|---|---|")
    else:
        click.echo("| strategy | median | quarter to three quarters | goal |\n|---|---|---|---|")
    for name in only or CASES:
        click.echo(peak_row(name, batch) if memory else seconds_row(name, steps, batch))


def peak_row(name: str, batch: int) -> str:
    (whole, held), (plain, _) = peak(name, False, batch), peak(name, True, batch)
    return f"| {name} | {whole} | {plain} | {held} | {whole / (plain + held):.2f} |"


def seconds_row(name: str, steps: int, batch: int) -> str:
    make, extra, goal = CASES[name]
    (last, began), (first, after) = (in_turns(make, extra, steps, batch, ours) for ours in (1, 0))
    pairs = zip(last, first, began, after, strict=True)
    low, middle, high = statistics.quantiles([(a + b) / (c + d) for a, b, c, d in pairs], n=4)
    return f"| {name} | {middle:.2f}x | {low:.2f} - {high:.2f} | {f'{goal:.2f}x' if goal else ''} |"


if __name__ == "__main__":
    main()
