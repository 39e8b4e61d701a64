"""Four tasks in a row, learnt by a small transformer from scratch: what is left of the first three?

    python examples/benchmarks/forgetting/tiny.py               measures what is missing, then prints the table
    python examples/benchmarks/forgetting/tiny.py --show        prints it from tiny.json, as Markdown

Addition, reversal, sorting and addition modulo ten, each told by its first symbol, 600 steps of 64 rows each at a
constant rate, with a fresh optimizer (after Marek 2026, scaled down to a CPU). Every row is trained through
`hf_ftplus.SFTTrainer`, at the same three learning rates on one seed; the one with the highest ACC is then run on five
other seeds. Strengths are given, not tuned. What was run so far is in tiny.json.

Two digits are reversed or sorted: a hundred problems each, all of which are trained on. What is measured is what is
kept, not what is understood. With three digits no penalty on weights held anything, in first runs of one seed: ACC .25
without, .11 to .23 with diagonal EWC at strengths from 10 to 10,000, clipped or not, with 4 or 64 random draws, and .12
in a bare loop with the exact diagonal. A move of all weights together, each by little, changes answers by nats where
the diagonal predicts 1e-4.

It flatters replay: the tasks share no prompt, a model of this size can hold all four, and old rows, or the model's own,
are all there is to know. And it flatters nobody who lowers the learning rate or averages weights: a task is learnt from
nothing, so small steps do not arrive.
"""

from __future__ import annotations

import json
import logging
import os
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a model this small gains nothing from more

import click
import numpy as np
import torch
import trl
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

import hf_ftplus
from hf_ftplus.disk import replace
from hf_ftplus.errors import DataError
from hf_ftplus.evaluation.matrix import accuracy, backward_transfer, learning_accuracy
from hf_ftplus.generate import self_generate

KEPT = Path(__file__).with_suffix(".json")
STEPS, BATCH, ROWS, PROBLEMS = 600, 64, 8_000, 256
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
SEEDS, CHOOSING = (0, 1, 2, 3, 4), 100
OWN = 2048
"""Different rows that the model writes before a stage, where it protects with its own text; half as many, or a quarter,
where it knows fewer. Drawn from the whole of its distribution: the default leaves out what is said once in twenty,
which may be a task."""

Problem = tuple[str, str]
"""What is asked, ending in `=`, and the answer."""


def add(draw: random.Random) -> Problem:
    a, b = draw.randrange(100), draw.randrange(100)
    return f"A{a:02}+{b:02}=", f"{a + b:03}"


def reverse(draw: random.Random) -> Problem:
    digits = f"{draw.randrange(100):02}"
    return f"R{digits}=", digits[::-1]


def order(draw: random.Random) -> Problem:
    digits = f"{draw.randrange(100):02}"
    return f"S{digits}=", "".join(sorted(digits))


def add_modulo(draw: random.Random) -> Problem:
    a, b = draw.randrange(100), draw.randrange(100)
    return f"M{a:02}+{b:02}=", f"{(a + b) % 10:01}"


TASKS: dict[str, Callable[[random.Random], Problem]] = {
    "add": add,
    "reverse": reverse,
    "sort": order,
    "add modulo": add_modulo,
}


@dataclass(frozen=True)
class Candidate:
    """A row of the table: strategies by name with their settings, and what stands for the earlier tasks."""

    strategies: dict[str, dict[str, Any]] = field(default_factory=dict)
    protect: str = ""
    """`rows`: of each earlier task; `own`: what the model writes; else nothing."""
    joint: bool = False
    """All tasks at once, in as many steps: the upper bound."""


CANDIDATES = {
    "plain": Candidate(),
    "replay 5 %": Candidate({"replay": {"share": 0.05}}, "rows"),
    "replay 10 %": Candidate({"replay": {"share": 0.1}}, "rows"),
    "replay 1/3, own text": Candidate({"replay": {"share": 1 / 3}}, "own"),
    "distill, own text": Candidate({"distill": {"strength": 1.0, "share": 0.5, "on": "protect"}}, "own"),
    "distill on learn": Candidate({"distill": {"strength": 0.1, "on": "learn"}}),
    "EWC 1,000": Candidate({"ewc": {"strength": 1_000.0, "first": True}}),
    "SI 5": Candidate({"si": {"strength": 5.0}}),
    "joint": Candidate(joint=True),
}


def problems(task: str, count: int, seed: int) -> list[Problem]:
    draw = random.Random(f"{task} {seed}")
    return [TASKS[task](draw) for _ in range(count)]


def rows(task: str, seed: int) -> Dataset:
    return Dataset.from_dict({"text": [asked + answer for asked, answer in problems(task, ROWS, seed)]})


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each symbol."""
    symbols = ["<pad>", "<s>", "</s>", *"0123456789", *"ARSM", "+", "="]
    each = Tokenizer(models.WordLevel({symbol: number for number, symbol in enumerate(symbols)}, unk_token="<pad>"))
    each.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    each.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    each.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=each, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def small_model(seed: int, symbols: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Two layers, with a vector for each place: where a digit stands is what these tasks are about. Weights begin wider
    than in large models, or 600 steps are too few for addition."""
    set_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(symbols), n_embd=64, n_layer=2, n_head=4, n_positions=32, initializer_range=0.08,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def train(
    model: GPT2LMHeadModel, learn: Any, candidate: Candidate, rate: float, steps: int, seed: int, folder: Path,
    protect: Any = None, memory: Path | None = None,
) -> None:  # fmt: skip
    """One stage, with a fresh optimizer."""
    args = trl.SFTConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate, seed=seed,
        lr_scheduler_type="constant_with_warmup", warmup_steps=20, adam_beta2=0.99, weight_decay=0.02, max_length=32,
        save_strategy="no", report_to="none", logging_steps=200, use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    hf_ftplus.SFTTrainer(
        model, args=args, train_dataset=learn, processing_class=tokenizer(),
        strategies=candidate.strategies, protect=protect, memory=memory,
    ).train()  # fmt: skip


def own_rows(model: GPT2LMHeadModel, seed: int) -> dict[str, Dataset]:
    """What the model writes by itself, no row twice."""
    count = OWN
    while True:
        try:
            return {"own": self_generate(model, tokenizer(), count, seed=seed, top_p=1.0, progress=False)}
        except DataError:  # it knows fewer
            count //= 2


@torch.no_grad()
def right(model: GPT2LMHeadModel, task: str, seed: int) -> float:
    """Share of problems whose whole answer is right, greedily."""
    symbols, asked = tokenizer(), problems(task, PROBLEMS, seed)
    prompts = symbols([prompt for prompt, _ in asked], return_tensors="pt")
    length = len(asked[0][1]) + 1
    written = model.eval().generate(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, max_new_tokens=length, do_sample=False
    )
    ends = written[:, prompts.input_ids.shape[1] :]
    answers = symbols.batch_decode(ends, skip_special_tokens=True)
    return statistics.mean(found == answer for found, (_, answer) in zip(answers, asked, strict=True))


def run(candidate: Candidate, rate: float, seed: int, scored_on: int) -> list[list[float]]:
    """R: the share right of each task before the first stage and after every stage (of `joint`: before and after)."""
    model = small_model(seed, tokenizer())
    scores = [[right(model, task, scored_on) for task in TASKS]]
    with tempfile.TemporaryDirectory() as place:
        if candidate.joint:
            learn = {task: rows(task, seed) for task in TASKS}
            equally = Candidate({"multitask": {"mode": "equal"}})
            train(model, learn, equally, rate, STEPS * len(TASKS), seed, Path(place))
            return [*scores, [right(model, task, scored_on) for task in TASKS]]
        past: dict[str, Dataset] = {}
        remembering = bool({"ewc", "si"} & set(candidate.strategies))
        for number, task in enumerate(TASKS):
            learn = rows(task, seed)
            now = candidate if past or remembering else Candidate()
            protect = past if candidate.protect == "rows" else None
            if candidate.protect == "own" and past:
                protect = own_rows(model, seed + number)
            memory = remembering and past and Path(place) / list(past)[-1] / "ftplus" / "memory"
            train(model, learn, now, rate, STEPS, seed + number, Path(place) / task, protect or None, memory or None)
            past[task] = learn
            scores.append([right(model, each, scored_on) for each in TASKS])
    return scores


def figures(R: list[list[float]]) -> tuple[float, float | None, float | None]:
    """ACC, BWT and LA."""
    if len(R) == 2:  # all at once: there is nothing earlier
        return statistics.mean(R[-1]), None, None
    return accuracy(R), backward_transfer(R), learning_accuracy(R)


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(CANDIDATES)), help="Only these rows.")
@click.option("--out", default=KEPT, type=click.Path(path_type=Path), help="What was measured; a new file: anew.")
@click.option("--show", is_flag=True, help="Run nothing.")
def main(only: tuple[str, ...], out: Path, show: bool) -> None:
    """Run what is missing, then print the table."""
    logging.getLogger("hf_ftplus").setLevel(logging.ERROR)
    disable_progress_bars()
    kept = json.loads(out.read_text()) if out.exists() else {}
    names = () if show else only or tuple(CANDIDATES)
    for name in names:
        for rate in LEARNING_RATES:
            measure(kept, out, name, f"{rate:g} choosing", rate, CHOOSING, CHOOSING)
    for seed in SEEDS:  # every row once before any twice
        for name in names:
            best = chosen(kept[name])
            measure(kept, out, name, f"{best:g} {seed}", best, seed, seed + 1000)
    print_table(kept)


def measure(kept: dict, out: Path, name: str, key: str, rate: float, seed: int, scored_on: int) -> None:
    mine = kept.setdefault(name, {})
    if key not in mine:
        mine[key] = run(CANDIDATES[name], rate, seed, scored_on)
        replace(out, lambda file: file.write_text(json.dumps(kept, indent=1) + "\n"))
        print(name, key, *(f"{value:.3f}" for value in figures(mine[key]) if value is not None), flush=True)


def chosen(mine: dict) -> float:
    """The learning rate with the highest ACC on the problems kept for choosing; of equals, as where only the last task
    is left, the one that learnt most.
    """

    def worth(rate: float) -> tuple[float, float]:
        acc, _, la = figures(mine[f"{rate:g} choosing"])
        return round(acc, 2), la or 0.0

    return max(LEARNING_RATES, key=worth)


def print_table(kept: dict) -> None:
    table = Table("row", "learning rate", "seeds", *(f"{what}" for what in ("ACC", "range", "BWT", "LA")))
    found = {}
    for name, mine in kept.items():
        if all(f"{rate:g} choosing" in mine for rate in LEARNING_RATES):
            best = chosen(mine)
            done = [figures(mine[f"{best:g} {seed}"]) for seed in SEEDS if f"{best:g} {seed}" in mine]
            if done:
                found[name] = best, done
    for name, (best, done) in sorted(found.items(), key=lambda item: -np.mean([one[0] for one in item[1][1]])):
        acc, bwt, la = ([one[place] for one in done] for place in range(3))
        means = ["-" if None in each else f"{statistics.mean(each):+.3f}".lstrip("+") for each in (bwt, la)]
        low_high = f"{min(acc):.3f} to {max(acc):.3f}"
        table.add_row(name, f"{best:g}", str(len(done)), f"{statistics.mean(acc):.3f}", low_high, *means)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
