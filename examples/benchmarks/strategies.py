"""Every strategy on the demo model: what it learns, what it keeps, beside plain fine-tuning at several learning rates.

    .venv/bin/python examples/benchmarks/strategies.py --seeds 3        measures what is missing, then prints the table
    .venv/bin/python examples/benchmarks/strategies.py --show           prints it from strategies.json, as Markdown

Every row is one `ftplus sft` command on the demo's data (examples/demo): facts, learnt by heart; sentiment, measured
on other reviews than it was learnt from; facts once sentiment is learnt, or with it. What was measured stands in
strategies.json and is not measured again, so the benchmark may be stopped at any time. Rows of plugins need them
installed (`pip install plugins/ftplus-*/`). Seconds are those of a machine that may be busy: what a step costs is
measured by costs.py and overhead.py, both sides in one run.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from hf_ftplus.disk import replace
from hf_ftplus.report import Report

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "examples" / "demo"))

KEPT = HERE / "strategies.json"
LEARNT, TOLD = 0.9, 0.75
"""Share of the facts from which on what was kept is compared; of the reviews (0.52 is told at the start), or of facts
after them."""
LEAST = 0.05
"""Nats that the best plain row loses, below which there is nothing to keep a share of."""

LORA = "--use_peft --lora_r 16 --lora_target_modules all-linear --learning_rate 2e-3"
EWC = "--plugin ewc --set ewc.remember=false --set ewc.strength"
SELF = "--protect chat=self:64"
"""Protects with what the model wrote itself, and nothing of the user's."""
MORE = "--protect chat=self:192"
SHORT = "--protect chat=self:64x48"
"""Answers of at most 48 tokens instead of 96."""
FEW = '--max_steps 65 --lr_scheduler_kwargs {"num_decay_steps":20}'
SEVENTY_TWO = '--max_steps 72 --lr_scheduler_kwargs {"num_decay_steps":22}'
SEVENTY_SIX = '--max_steps 76 --lr_scheduler_kwargs {"num_decay_steps":23}'
EIGHTY = '--max_steps 80 --lr_scheduler_kwargs {"num_decay_steps":24}'
EIGHTY_SIX = '--max_steps 86 --lr_scheduler_kwargs {"num_decay_steps":26}'
NINETY = '--max_steps 90 --lr_scheduler_kwargs {"num_decay_steps":27}'
TWELFTH = "--set distill.share=0.0833"
FOURTEENTH = "--set distill.share=0.0714"
TENTH = "--set distill.share=0.1"
EIGHTH = "--set distill.share=0.125"
HUNDRED = '--max_steps 100 --lr_scheduler_kwargs {"num_decay_steps":30}'
REPLAY = "--plugin replay --padding_free true"
"""Self-written rows are three times as long as facts: padded to them, every fact would cost as much."""
DISTILL = "--plugin distill --set distill.cache=true --set distill.share=0.0625"

ROWS = {
    "plain 2e-5": '--learning_rate 2e-5 --max_steps 120 --lr_scheduler_kwargs {"num_decay_steps":36}',
    "plain 5e-5": f"--learning_rate 5e-5 {NINETY}",
    "plain 1e-4": "--learning_rate 1e-4",
    "EWC 30,000, 2e-4": f"{EWC}=30000 --learning_rate 2e-4",
    "replay 1/8, self, 5e-5, 100 steps": f"{REPLAY} {SELF} --learning_rate 5e-5 {HUNDRED}",
    "distill 1/8, self, 5e-5, 90 steps": f"{DISTILL} {EIGHTH} {SELF} --learning_rate 5e-5 {NINETY}",
    "distill on learn": "--plugin distill --set distill.on=learn --learning_rate 1e-4",
    "distill 1/12 + EWC 10,000, self, 80 steps": (
        f"{DISTILL} {TWELFTH} {EWC}=10000 --set ewc.rows=32 {SELF} --learning_rate 1e-4 {EIGHTY}"
    ),
    "distill 1/8 + EWC 10,000, self, 90 steps": f"{DISTILL} {EIGHTH} {EWC}=10000 {SELF} --learning_rate 1e-4 {NINETY}",
    "replay 1/16 + EWC 3,000, self 64x48, 90 steps": (
        f"{REPLAY} --set replay.share=0.0625 {EWC}=3000 --set ewc.rows=32 {SHORT} --learning_rate 1e-4 {NINETY}"
    ),
    "replay 1/16 + EWC 3,000, self 64x48, 100 steps": (
        f"{REPLAY} --set replay.share=0.0625 {EWC}=3000 --set ewc.rows=32 {SHORT} --learning_rate 1e-4 {HUNDRED}"
    ),
    "plain LoRA": LORA,
    "EWC 1,000, LoRA, 90 steps": f"{EWC}=1000 {LORA} {NINETY}",
    "replay 1/8, self, LoRA": f"{REPLAY} {SELF} {LORA} --max_steps 69",
    "distill, self, LoRA": f"{DISTILL} {SELF} {LORA}",
    "L2-SP 0.1, 90 steps": f"--plugin l2sp --set l2sp.strength=0.1 --learning_rate 1e-4 {NINETY}",
    "OSF, 90 steps": f"--plugin osf --learning_rate 1e-4 {NINETY}",
    "EAFT, 90 steps": f"--plugin tokenweight --learning_rate 1e-4 {NINETY}",
    "WiSE, self, 90 steps": f"--plugin wise {SELF} --learning_rate 1e-4 {NINETY}",
    "kfac 1,000, 2e-4": "--plugin kfac --set kfac.strength=1000 --set kfac.rows=64 --learning_rate 2e-4",
}
"""Full fine-tuning if nothing else is said; L2-SP, OSF, EAFT, WiSE and kfac are those of plugins/. Low rates get up to
twice the demo's 60 steps, to learn as much; replay gets its share of steps more, so that every fact is seen as often as
without."""

TRIED = {
    "replay 1/8, self": f"{REPLAY} {SELF} --learning_rate 1e-4 --max_steps 69",
    "distill, self": f"{DISTILL} {SELF} --learning_rate 1e-4",
    "distill, self, 2e-4": f"{DISTILL} {SELF} --learning_rate 2e-4",
    "distill 10, self, 2e-4": f"{DISTILL} {SELF} --set distill.strength=10 --learning_rate 2e-4",
    "distill 1/8, self, 90 steps": f"{DISTILL} {EIGHTH} {SELF} --learning_rate 1e-4 {NINETY}",
    "distill 1/8, self 192, 90 steps": f"{DISTILL} {EIGHTH} {MORE} --learning_rate 1e-4 {NINETY}",
    "distill 1/8 + EWC 10,000, self, 1.5e-4, 65 steps": (
        f"{DISTILL} {EIGHTH} {EWC}=10000 {SELF} --learning_rate 1.5e-4 {FEW}"
    ),
    "distill 1/12 + EWC 10,000, self, 8e-5, 76 steps": (
        f"{DISTILL} {TWELFTH} {EWC}=10000 --set ewc.rows=32 {SELF} --learning_rate 8e-5 {SEVENTY_SIX}"
    ),
    "distill 1/12 + EWC 10,000, self, 7e-5, 80 steps": (
        f"{DISTILL} {TWELFTH} {EWC}=10000 --set ewc.rows=32 {SELF} --learning_rate 7e-5 {EIGHTY}"
    ),
    "distill 1/12 + EWC 10,000, self 64x48, 80 steps": (
        f"{DISTILL} {TWELFTH} {EWC}=10000 --set ewc.rows=32 {SHORT} --learning_rate 1e-4 {EIGHTY}"
    ),
    "distill 1/10 + EWC 10,000, self 64x48, 86 steps": (
        f"{DISTILL} {TENTH} {EWC}=10000 --set ewc.rows=32 {SHORT} --learning_rate 1e-4 {EIGHTY_SIX}"
    ),
    "distill 1/12 + EWC 10,000 on 16 rows, self, 80 steps": (
        f"{DISTILL} {TWELFTH} {EWC}=10000 --set ewc.rows=16 {SELF} --learning_rate 1e-4 {EIGHTY}"
    ),
    "distill 1/12 + EWC 10,000, self, 72 steps": (
        f"{DISTILL} {TWELFTH} {EWC}=10000 --set ewc.rows=32 {SELF} --learning_rate 1e-4 {SEVENTY_TWO}"
    ),
    "distill 1/14 + EWC 15,000, self, 80 steps": (
        f"{DISTILL} {FOURTEENTH} {EWC}=15000 --set ewc.rows=24 {SELF} --learning_rate 1.1e-4 {EIGHTY}"
    ),
    "distill 1/16 + EWC 10,000, self, 80 steps": (
        f"{DISTILL} {EWC}=10000 --set ewc.rows=32 {SELF} --learning_rate 1.1e-4 {EIGHTY}"
    ),
    "replay 1/16 + EWC 10,000, self, 86 steps": (
        f"{REPLAY} --set replay.share=0.0625 {EWC}=10000 --set ewc.rows=32 {SELF} --learning_rate 1e-4 {EIGHTY_SIX}"
    ),
    "replay 1/16 + EWC 3,000, self, 90 steps": (
        f"{REPLAY} --set replay.share=0.0625 {EWC}=3000 --set ewc.rows=32 {SELF} --learning_rate 1e-4 {NINETY}"
    ),
    "replay 1/16 + EWC 10,000, self, 1.5e-4, 86 steps": (
        f"{REPLAY} --set replay.share=0.0625 {EWC}=10000 --set ewc.rows=32 {SELF} --learning_rate 1.5e-4 {EIGHTY_SIX}"
    ),
    "replay 1/32 + EWC 3,000, self, 1.2e-4, 90 steps": (
        f"{REPLAY} --set replay.share=0.03125 {EWC}=3000 --set ewc.rows=32 {SELF} --learning_rate 1.2e-4 {NINETY}"
    ),
    "replay 1/32 + EWC 10,000, self, 1.2e-4, 90 steps": (
        f"{REPLAY} --set replay.share=0.03125 {EWC}=10000 --set ewc.rows=32 {SELF} --learning_rate 1.2e-4 {NINETY}"
    ),
    "replay + EWC 10,000, self": f"{REPLAY} {EWC}=10000 {SELF} --learning_rate 1e-4 --max_steps 69",
    "distill 1/8 + EWC 30,000, self, 2e-4": f"{DISTILL} {EIGHTH} {EWC}=30000 {SELF} --learning_rate 2e-4",
}
"""What was tried on the way to these."""
ROWS |= TRIED


SENTIMENT = "sentiment: "
"""Begins the names of rows that learn it: in half as many steps, for reviews are long and the question easy."""
TOLD_BY = "demo_output/data/reviews_measure.jsonl"
KEPT_BY = "--measure chat=demo_output/data/chat_questions.jsonl --measure python=demo_output/data/python_measure.jsonl"
REVIEWS = (
    '--max_steps 30 --lr_scheduler_kwargs {"num_decay_steps":9} '
    f"--dataset_name demo_output/data/reviews.jsonl --measure learn={TOLD_BY} {KEPT_BY} --metric learn=choice"
)
ROWS |= {
    f"{SENTIMENT}{name}": f"{REVIEWS} {flags}"
    for name, flags in {
        "plain 1e-5": "--learning_rate 1e-5",
        "plain 2e-5": "--learning_rate 2e-5",
        "EWC 10,000, self": f"{EWC}=10000 {SELF} --learning_rate 5e-5",
        "replay 1/8, self": f"{REPLAY} {SELF} --learning_rate 5e-5",
        "distill 1/8, self": f"{DISTILL} {EIGHTH} {SELF} --learning_rate 5e-5",
        "distill 1/8 + EWC 10,000, self": f"{DISTILL} {EIGHTH} {EWC}=10000 {SELF} --learning_rate 5e-5",
        "SI records, 5e-5": "--plugin si --learning_rate 5e-5",
    }.items()
}

AFTER = "after sentiment: "
"""Begins the names of rows that learn the facts when sentiment is learnt, or at once with it."""
FIRST = f"{SENTIMENT}SI records, 5e-5"
"""The row that they begin with, {first}; SI only records there, so its model is that of plain fine-tuning."""
FACTS = (
    "--measure learn=demo_output/data/facts.jsonl "
    "--measure asked_otherwise=demo_output/data/facts_other_phrasing.jsonl --metric asked_otherwise=exact_match "
    f"--measure reviews={TOLD_BY} --metric reviews=choice {KEPT_BY} "
    "--protect python=demo_output/data/python_protect.jsonl"
)
ROWS |= {
    f"{AFTER}{name}": f"{FACTS} --learning_rate 1e-4 {flags}"
    for name, flags in {
        "plain": "--model_name_or_path {first}",
        "SI 0.1": "--model_name_or_path {first} --plugin si --set si.strength=0.1 --memory {first}",
        "SI 1": "--model_name_or_path {first} --plugin si --set si.strength=1 --memory {first}",
        "both at once, multitask, 90 steps": (
            f"--dataset_name demo_output/data/both.jsonl --plugin multitask --set multitask.mode=equal {NINETY}"
        ),
    }.items()
}
GROUPS = {"": LEARNT, SENTIMENT: TOLD, AFTER: TOLD}
"""How names begin, and what is enough to have learnt."""


BRIEF = (
    "plain 5e-5",
    "plain LoRA",
    "EWC 30,000, 2e-4",
    "replay 1/16 + EWC 3,000, self 64x48, 90 steps",
    "distill, self, LoRA",
    "distill 1/12 + EWC 10,000, self, 80 steps",
    "distill 1/8 + EWC 10,000, self, 90 steps",
)
"""Rows that the README shows."""


@dataclass
class Cell:
    """One run: shares learnt, rise of loss on what is to be kept and drift (nats per token), training time, and bytes
    that strategies held."""

    learnt: float
    otherwise: float | None
    """Of facts, in another phrasing."""
    chat: float
    python: float
    drift: float
    steps: int
    seconds: float
    bytes: int | None = None
    """Not kept of the first runs."""
    reviews: float | None = None
    """Share told right at the end, where facts are learnt after them."""

    @classmethod
    def read(cls, path: Path) -> Cell:
        report = Report.load(path)
        tasks = {task.name: task for task in report.tasks}
        metrics = {name: task.after.metric.value for name, task in tasks.items()}
        rise = {name: tasks[name].after.loss.value - tasks[name].before.loss.value for name in ("chat", "python")}
        return cls(
            learnt=metrics["learn"],
            otherwise=metrics.get("asked otherwise", metrics.get("asked_otherwise")),
            reviews=metrics.get("reviews"),
            drift=statistics.mean(tasks[name].drift.value for name in rise),
            steps=report.facts["steps"],
            seconds=report.facts["seconds"]["training"],
            bytes=sum(cost["bytes"] for cost in report.facts.get("strategies", {}).values()),
            **rise,
        )

    @property
    def megabytes(self) -> float | None:
        return None if self.bytes is None else self.bytes / 1e6

    @property
    def rise(self) -> float:
        return (self.chat + self.python) / 2


@click.command()
@click.option("--seeds", default=1, help="Seeds per row; 0, 1, ...")
@click.option("--only", multiple=True, help="Only these rows.")
@click.option("--out", default=ROOT / "demo_output" / "strategies", type=click.Path(path_type=Path))
@click.option("--show", is_flag=True, help="Run nothing.")
def main(seeds: int, only: tuple[str, ...], out: Path, show: bool) -> None:
    """Run what is missing, then print the table."""
    unknown = [name for name in only if name not in ROWS]
    if unknown:
        raise click.UsageError(f"No row {unknown[0]!r}; expected one of: {', '.join(ROWS)}.")
    cells = known()
    for name, seed in missing(cells, [] if show else only or ROWS, seeds):
        cells.setdefault(name, {})[str(seed)] = measure(name, seed, out)
        keep(cells)
    click.echo("\n\n".join(whole()))


def keep(cells: dict[str, dict[str, Cell]]) -> None:
    text = json.dumps(
        {row: {seed: asdict(cell) for seed, cell in found.items()} for row, found in cells.items()}, indent=1
    )
    replace(KEPT, lambda file: file.write_text(text + "\n"))


def known() -> dict[str, dict[str, Cell]]:
    """What was measured, by row and seed."""
    measured = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return {name: {seed: Cell(**cell) for seed, cell in found.items()} for name, found in measured.items()}


def whole() -> list[str]:
    """A table of each group of rows that was measured; of the facts one more, of what was tried on the way."""
    cells, tables = known(), []
    for group, enough in GROUPS.items():
        names = [name for name in ROWS if name in cells and of(name) == group]
        mine = {name.removeprefix(group): list(cells[name].values()) for name in names}
        for tried in (False, True):
            rows = [name for name in mine if (group + name in TRIED) is tried]
            shown = [key for key in COLUMNS if any(None not in values_of(mine[name], key) for name in rows)]
            tables += [table(mine, shown, rows, enough)] if rows else []
    return tables


def of(name: str) -> str:
    """The group of a row."""
    return next((group for group in (SENTIMENT, AFTER) if name.startswith(group)), "")


def values_of(cells: list[Cell], column: str) -> list[float | None]:
    return [getattr(cell, COLUMNS[column][0]) for cell in cells]


def brief() -> str:
    """What the README shows of the facts."""
    cells = {name: list(found.values()) for name, found in known().items() if not of(name)}
    return table(cells, ("learnt", "rise on chat", "rise on Python"), BRIEF)


def missing(cells: dict[str, dict[str, Cell]], rows: Iterator[str], seeds: int) -> Iterator[tuple[str, int]]:
    """Cells that nobody has measured: every row once before any twice."""
    return ((name, seed) for seed in range(seeds) for name in rows if str(seed) not in cells.get(name, {}))


def measure(name: str, seed: int, out: Path) -> Cell:
    """One run of `ftplus sft`, as anybody would type it."""
    from make_data import make_data
    from run import ENVIRONMENT, OUT

    make_data(ROOT / OUT / "data")
    put_together(ROOT / OUT / "data")
    if "{first}" in ROWS[name]:
        measure(FIRST, seed, out)
    folder = folder_of(name, seed, out)
    if not (folder / "ftplus" / "report.json").is_file():
        command = [str(Path(sys.executable).parent / "ftplus"), "sft", "--config", "examples/demo/demo.yaml"]
        command += ["--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
        command += ["--seed", str(seed), "--completions", "0"]
        command += ROWS[name].replace("{first}", str(folder_of(FIRST, seed, out))).split()
        click.echo(f"{name}, seed {seed}", err=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **ENVIRONMENT}, cwd=ROOT)
        if name != FIRST:
            (folder / "model.safetensors").unlink(missing_ok=True)  # half a gigabyte that nobody reads again
    return Cell.read(folder / "ftplus" / "report.json")


def folder_of(name: str, seed: int, out: Path) -> Path:
    return out / f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', name)}-{seed}"


def put_together(data: Path) -> None:
    """Facts, and five times as many reviews, as one file of two tasks."""
    tasks = {"facts": (data / "facts.jsonl").read_text().splitlines()}
    tasks["reviews"] = (data / "reviews.jsonl").read_text().splitlines()[: 5 * len(tasks["facts"])]
    rows = [json.loads(line) | {"task": task} for task, lines in tasks.items() for line in lines]
    (data / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


COLUMNS = {
    "learnt": ("learnt", 2),
    "asked otherwise": ("otherwise", 2),
    "rise on chat": ("chat", 3),
    "rise on Python": ("python", 3),
    "drift": ("drift", 2),
    "reviews": ("reviews", 2),
    "state, MB": ("megabytes", 0),
}
"""What the table says of a Cell, and with how many digits."""


def table(
    cells: dict[str, list[Cell]],
    shown: Sequence[str] = tuple(COLUMNS),
    rows: Sequence[str] = (),
    enough: float = LEARNT,
) -> str:
    """Markdown: mean over seeds (lowest - highest); what is kept is compared with the best plain row that learnt.

    Args:
        cells: all that was measured, of every row.
        shown: of COLUMNS.
        rows: only these.
        enough: share learnt from which on what was kept is compared.
    """

    def mean(name: str, key: Callable[[Cell], float]) -> float:
        return statistics.mean(map(key, cells[name]))

    learnt = [name for name in cells if mean(name, lambda cell: cell.learnt) >= enough]
    best = min(
        (name for name in learnt if name.startswith("plain")),
        key=lambda name: mean(name, lambda cell: cell.rise),
        default=None,
    )
    lost = mean(best, lambda cell: cell.rise) if best else 0.0
    heads = ["row", "seeds", "steps", *shown, *(["kept"] if lost > LEAST else [])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in rows or cells:
        found, kept = cells[name], "learnt too little"
        if name in learnt and lost > LEAST:
            kept = "reference" if name == best else f"{1 - mean(name, lambda cell: cell.rise) / lost:.0%}"
        figures = [in_words(values_of(found, key), COLUMNS[key][1]) for key in shown]
        words = [name, str(len(found)), str(found[0].steps), *figures, kept][: len(heads)]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def in_words(values: list[float | None], digits: int) -> str:
    """The mean, and the range if there is one; empty where a run has no such figure."""
    if None in values:
        return ""
    spread = f" ({min(values):.{digits}f} - {max(values):.{digits}f})" if min(values) < max(values) else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
