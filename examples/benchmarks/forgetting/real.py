"""Four real tasks learnt in a row by the demo model: what does each remedy learn, and what is left of the rest?

    python examples/benchmarks/forgetting/real.py --seeds 3         measures what is missing, then prints the table
    python examples/benchmarks/forgetting/real.py --show            prints it from real.json, as Markdown

Sentiment, code, translation, arithmetic (`real_data.py`), each for 30 steps of 8 rows; beside them prose, Python and
chats that the model wrote itself stand for what it could do before. Every row is one `ftplus sequence`, and is kept in
real.json, so the benchmark may be stopped at any time. Plain fine-tuning gets three learning rates; strengths and rates
of the others are what was found on the demo's facts (`../strategies.py`), not tuned here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import yaml

from hf_ftplus.disk import replace
from hf_ftplus.evaluation.matrix import backward_transfer
from hf_ftplus.report import Report
from hf_ftplus.report.matrix import Matrix

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
KEPT = HERE / "real.json"
OUT = Path("demo_output") / "forgetting"
DATA = OUT / "data"
TASKS = ("sentiment", "code", "translation", "arithmetic")
KEEP = ("chat", "python", "prose")
SELF_WRITTEN = {"chat_measure": 48, "chat": 48}
"""Rows that the model writes before anything: to measure, and others to protect with, whose file tells that both are
there."""

SHARED = {
    "model_name_or_path": "demo",
    "metric": {"sentiment": "choice", "arithmetic": "exact_match"},  # of code and translation: token accuracy
    "measure_rows": 32,
    "completions": 0,
    "max_steps": 30,
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "gradient_checkpointing": False,
    "max_length": 256,
    "pad_to_multiple_of": 16,
    "max_grad_norm": 0.0,  # a clipped task gradient would make every strength weigh more than it says
    "weight_decay": 0.0,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 4,
    "save_strategy": "no",
    "report_to": "none",
    "keep": 0,
}


@dataclass(frozen=True)
class Candidate:
    """A row of the table: what it changes in the shared YAML, and what it protects with."""

    change: dict[str, Any] = field(default_factory=dict)
    protect: tuple[str, ...] = ()
    """Of KEEP."""
    joint: bool = False
    """All tasks in one run, as who has them all at once would."""


def adapter(**settings: Any) -> dict[str, Any]:
    return {"use_peft": True, "lora_r": 16, "learning_rate": 1e-3, **settings}


ALL, MLP = ["all-linear"], ["gate_proj", "up_proj", "down_proj"]
EWC = {"ewc": {"strength": 10_000, "rows": 64, "first": True}}
EWC_LORA = {"ewc": {"strength": 1_000, "rows": 64, "first": True}}
DISTILL = {"distill": {"share": 0.125, "cache": True}}
REPLAY = {"replay": {"share": 0.25}}
REPLAY_LITTLE, EWC_LITTLE = {"replay": {"share": 0.0625}}, {"ewc": {"strength": 3_000, "rows": 32, "first": True}}
"""What `ftplus advise` recommends to who has nothing to protect with."""

CANDIDATES = {
    "joint (multitask)": Candidate({"plugins": [{"multitask": {"mode": "equal"}}], "max_steps": 120}, joint=True),
    "plain 2e-5": Candidate({"learning_rate": 2e-5}),
    "plain 5e-5": Candidate({"learning_rate": 5e-5}),
    "plain 1e-4": Candidate(),
    "LoRA": Candidate(adapter(lora_target_modules=ALL)),
    "LoRA, MLP only": Candidate(adapter(lora_target_modules=MLP)),
    "L2-SP": Candidate({"plugins": [{"l2sp": {"strength": 0.1}}]}),
    "OSF": Candidate({"plugins": ["osf"]}),
    "SI": Candidate({"plugins": ["si"]}),
    "EWC": Candidate({"plugins": [EWC], "keep": 48}, KEEP),
    "EWC, LoRA": Candidate(adapter(lora_target_modules=ALL, plugins=[EWC_LORA], keep=48), KEEP),
    "distill": Candidate({"plugins": [DISTILL], "keep": 48}, KEEP),
    "distill, self-written rows only": Candidate({"plugins": [DISTILL]}, ("chat",)),
    "replay": Candidate({"plugins": [REPLAY], "keep": 48}, KEEP),
    "replay + EWC": Candidate({"plugins": [REPLAY, EWC], "keep": 48}, KEEP),
    "replay + EWC, self-written rows only": Candidate({"plugins": [REPLAY_LITTLE, EWC_LITTLE]}, ("chat",)),
    "distill + EWC": Candidate({"plugins": [DISTILL, EWC], "keep": 48}, KEEP),
    "distill + EWC, self-written rows only": Candidate({"plugins": [DISTILL, EWC]}, ("chat",)),
}
"""`keep`: rows of every finished task that later stages protect, as the user who has them would."""


@dataclass
class Cell:
    """One sequence. Scores R [5, 4] and [5, 3] (before, and after each stage; of `joint` [2, 4] and [2, 3]): right
    answers or tokens, from 0 to 1; losses of what was there before, nats per token; seconds of training in all."""

    score: list[list[float]]
    kept_score: list[list[float]]
    kept_loss: list[list[float]]
    seconds: float

    def figures(self) -> dict[str, float | None]:
        """ACC, BWT (of tasks learnt at once none), the last score of each task, and the rise of each loss to keep."""
        return {
            "ACC": statistics.mean(self.score[-1]),
            "BWT": backward_transfer(self.score) if self.in_a_row else None,
            **dict(zip(TASKS, self.score[-1], strict=True)),
            **{
                name: after - before
                for name, before, after in zip(KEEP, self.kept_loss[0], self.kept_loss[-1], strict=True)
            },
        }

    def learnt(self) -> list[float]:
        """The score of each task when its stage ended."""
        return [row[task] for task, row in enumerate(self.score[1:])] if self.in_a_row else self.score[-1]

    @property
    def in_a_row(self) -> bool:
        return len(self.score) > 2


def measure(name: str, seed: int) -> Cell:
    """One `ftplus sequence`, or for all tasks at once one `ftplus sft`, as anybody would type it."""
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    from real_data import make_data
    from run import ENVIRONMENT

    make_data(DATA)
    write_chats()
    folder = OUT / f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', name)}-{seed}"
    file = folder.with_name(f"{folder.name}.yaml")
    candidate = CANDIDATES[name]
    if candidate.joint:  # saves nothing on its way: stopped, it begins anew
        shutil.rmtree(folder, ignore_errors=True)
    file.write_text(yaml.safe_dump(described(candidate, seed, folder), sort_keys=False))
    click.echo(f"{name}, seed {seed}", err=True)
    command = [str(Path(sys.executable).parent / "ftplus"), *(["sft", "--config"] if candidate.joint else ["sequence"])]
    with file.with_suffix(".log").open("a") as log:
        subprocess.run([*command, str(file)], check=True, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT})
    reports = [Report.load(path) for path in sorted(folder.rglob("ftplus/report.json"))]
    if candidate.joint:
        found = Matrix.of(["all"], [*TASKS, *KEEP], ["all"], reports)
        score, kept_score = apart(found.other_score)
        kept_loss = apart(found.other_loss)[1]
    else:
        found = Matrix.load(folder / "sequence.json")
        score, kept_score, kept_loss = found.score, found.other_score, found.other_loss
    for weights in folder.rglob("*.safetensors"):  # gigabytes that nobody reads again
        weights.unlink()
    return Cell(score, kept_score, kept_loss, sum(report.facts["seconds"]["training"] for report in reports))


def apart(table: list[list[float]]) -> tuple[list[list[float]], list[list[float]]]:
    """Of a column for each task and each thing to keep: those of the tasks, and the others."""
    return [row[: len(TASKS)] for row in table], [row[len(TASKS) :] for row in table]


def described(candidate: Candidate, seed: int, folder: Path) -> dict[str, Any]:
    """The YAML of a sequence, or of one run over all tasks."""
    given = {**SHARED, **candidate.change, "output_dir": str(folder), "seed": seed}
    data = {task: str(DATA / f"{task}.jsonl") for task in TASKS}
    measured = {name: str(DATA / f"{name}_measure.jsonl") for name in (*TASKS, *KEEP)}
    if candidate.joint:
        del given["keep"]
        metrics = given.pop("metric")
        given["tasks"] = [
            {
                "name": task,
                "dataset": data[task],
                "measure": measured.pop(task),
                **({"metric": metrics[task]} if task in metrics else {}),
            }
            for task in TASKS
        ]
    else:
        given["stages"] = [{"name": task, "dataset_name": data[task]} for task in TASKS]
    given["measure"] = measured
    if candidate.protect:
        given["protect"] = {name: str(DATA / f"{name}.jsonl") for name in candidate.protect}
    return given


def write_chats() -> None:
    """What the starting model says to requests of its own: fixed, so that all stages are measured on the same rows."""
    if (DATA / "chat.jsonl").is_file():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_ftplus.generate import self_generate, store
    from hf_ftplus.model import demo

    model, tokenizer = AutoModelForCausalLM.from_pretrained(demo()), AutoTokenizer.from_pretrained(demo())
    rows = list(self_generate(model, tokenizer, sum(SELF_WRITTEN.values()), progress=False))
    for name, count in SELF_WRITTEN.items():
        mine, rows = rows[:count], rows[count:]
        store(DATA / f"{name}.jsonl", mine)


@click.command()
@click.option("--seeds", default=1, help="Seeds per row; 0, 1, ...")
@click.option("--only", multiple=True, type=click.Choice(list(CANDIDATES)), help="Only these rows.")
@click.option("--out", default=KEPT, type=click.Path(path_type=Path), help="What was measured; a new file: anew.")
@click.option("--show", is_flag=True, help="Run nothing.")
def main(seeds: int, only: tuple[str, ...], out: Path, show: bool) -> None:
    """Run what is missing, then print the table."""
    out = out.absolute()
    os.chdir(ROOT)
    OUT.mkdir(parents=True, exist_ok=True)
    kept = json.loads(out.read_text()) if out.exists() else {}
    for seed in range(seeds):  # every row once before any twice
        for name in () if show else only or CANDIDATES:
            if str(seed) not in kept.setdefault(name, {}):
                kept[name][str(seed)] = asdict(measure(name, seed))
                replace(out, lambda file: file.write_text(json.dumps(kept) + "\n"))
    click.echo(table({name: [Cell(**cell) for cell in kept[name].values()] for name in CANDIDATES if kept.get(name)}))


def table(cells: dict[str, list[Cell]]) -> str:
    """Markdown: means over seeds, of ACC with the lowest and highest; scores in percent, rises in nats per token."""
    heads = ["row", "seeds", "ACC", "BWT", *TASKS, *(f"rise on {name}" for name in KEEP)]
    lines = [heads, ["---"] * len(heads)]
    for name, found in cells.items():
        figures = [cell.figures() for cell in found]
        mean = {key: None if None in each else statistics.mean(each) for key, each in columns(figures).items()}
        learnt = map(statistics.mean, zip(*(cell.learnt() for cell in found), strict=True))
        each = [
            f"{100 * first:.0f} -> {100 * mean[task]:.0f}" if found[0].in_a_row else f"{100 * mean[task]:.0f}"
            for task, first in zip(TASKS, learnt, strict=True)
        ]
        acc = [100 * cell["ACC"] for cell in figures]
        spread = f" ({min(acc):.0f} - {max(acc):.0f})" if len(found) > 1 else ""
        bwt = "" if mean["BWT"] is None else f"{100 * mean['BWT']:+.0f}"
        rises = [f"{mean[name]:+.3f}" for name in KEEP]
        lines.append([name, str(len(found)), f"{100 * mean['ACC']:.0f}{spread}", bwt, *each, *rises])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns(rows: list[dict[str, float | None]]) -> dict[str, list[float | None]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


if __name__ == "__main__":
    main()
