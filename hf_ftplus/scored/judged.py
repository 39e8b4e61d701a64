"""Compare every model with the first, and keep all of it: eval.json, and the rows behind every score."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .. import disk
from ..errors import DataError
from ..evaluation import EvalTask, Evaluation, TaskResult, statistics
from ..evaluation.results import Level
from ..evaluation.runner import Moment
from ..evaluation.statistics import Estimate
from ..evaluation.tasks import asked_text, expected
from ..evaluation.verdict import Verdict, noise_floor, rows_to_keep, verdict
from ..report.record import strict
from . import content
from .harness import Outcome
from .measuring import Scored

ROWS_FILE = re.compile(r"\d+-.*\.\d+-.*\.jsonl")
FORMAT = 1
"""Of eval.json: raised when a reader of older ones would misread newer ones."""


@dataclass
class Judged:
    """One task with one model, beside the first."""

    result: TaskResult
    """`before` is the first model and `after` this one; of the first model itself `after` alone is measured."""
    rows: list[dict[str, Any]]
    """What every row was asked, what was said, and its figures: sums over its supervised tokens."""
    verdict: Verdict | None = None
    """None for the first model."""
    lost: tuple[int, ...] = ()
    """Rows that the first model has right and this one wrong."""
    gained: tuple[int, ...] = ()

    @property
    def before(self) -> Estimate:
        return self.result.kept[0]

    @property
    def change(self) -> Estimate:
        """Of the score: the task's metric, or token accuracy where it has none."""
        return self.result.change_of_score


@dataclass
class Judgement:
    """All tasks with all models."""

    scored: Scored
    models: list[list[Judged]]
    """Of each model, in the order of the tasks."""
    floors: list[dict[str, float | None]]
    """Of each task: how far its `score`, `loss` and `drift` move by rounding alone."""


def judge(scored: Scored) -> Judgement:
    """Figures with their intervals, verdicts and flips."""
    first, plan, names = scored.moments[0], scored.plan, scored.plan.models
    floors = [_floors(task, first[task.name], scored.again.get(task.name), plan.seed) for task in scored.tasks]
    floors += [_floor_of(item.name, scored) for item in scored.benchmarks]
    models = []
    for number, moments in enumerate(scored.moments):
        sides = (f"with {names[0]}", f"with {names[number]}")
        evaluation = Evaluation(
            scored.tasks, scored.tokenizers[0], seed=plan.seed, completions=plan.completions, sides=sides
        )
        model = []
        for task in scored.tasks:
            moment = moments[task.name]
            result = evaluation.result(task, first[task.name] if number else None, moment)
            if number and moment.scores.kl is None:
                result.notes.append(f"Drift is not defined {sides[1]}: its vocabulary has another size.")
            model.append(Judged(result, list(_rows(task, moment, scored.tokenizers[0]))))
        for item in scored.benchmarks:
            one, two = (scored.outcomes[i][item.name] for i in (0, number))
            model.append(Judged(_benchmark(item.name, one if number else None, two, plan.seed), two.rows))
        models.append(model)
    for model in models[1:]:
        for judged, start, floor in zip(model, models[0], floors, strict=True):
            _call(judged, start, floor["score"], plan.margin)
    return Judgement(scored, models, floors)


def _call(judged: Judged, first: Judged, floor: float | None, margin: float) -> None:
    """Give a task its verdict, and find the rows that flipped."""
    result = judged.result
    judged.verdict = verdict(judged.before, judged.change, floor, result.rows, margin)
    if judged.verdict == "not resolved" and result.rows < rows_to_keep(margin):
        result.notes.append(f"Kept within {100 * margin:g} points takes {rows_to_keep(margin)} rows or more to say.")
    elif judged.verdict == "not resolved" and judged.before.value <= margin:
        result.notes.append("There is nothing to keep: the first model's score is within the margin.")
    if result.flips:
        was, now = (np.array([row["score"] > 0.5 for row in side.rows]) for side in (first, judged))
        judged.lost, judged.gained = (tuple(np.flatnonzero(rows).tolist()) for rows in (was & ~now, ~was & now))


def _benchmark(name: str, first: Outcome | None, outcome: Outcome, seed: int) -> TaskResult:
    """A benchmark's figures: a score for each row, and nothing per token."""
    now = np.array([row["score"] for row in outcome.rows])
    was = None if first is None else np.array([row["score"] for row in first.rows])
    if first:
        _refuse_other_prompts(name, first, outcome)
    binary = all(set(scores.tolist()) <= {0, 1} for scores in (was, now) if scores is not None)
    level = statistics.share if binary else statistics.per_row
    result = TaskResult(name, "measure", len(now), 0, outcome.metric, after=Level(metric=level(now, seed)))
    if len(now) < outcome.of:
        result.notes.append(f"{len(now)} of {outcome.of} rows, spread evenly.")
    if was is not None:
        change = statistics.change_of_share(was, now) if binary else statistics.per_row(now - was, seed)
        result.before, result.change = Level(metric=level(was, seed)), Level(metric=change)
        result.retention = statistics.retention(was, now, seed)
        result.flips = statistics.flips(was, now) if binary else None
    return result


def _refuse_other_prompts(name: str, one: Outcome, other: Outcome) -> None:
    if [row["prompt"] for row in one.rows] != [row["prompt"] for row in other.rows]:
        raise DataError(
            f"--lm-eval {name}: it did not ask the same twice. Does its code draw at random, or did its rows change "
            "meanwhile? Give a new --cache DIR to measure again."
        )


def _floor_of(name: str, scored: Scored) -> dict[str, float | None]:
    """The noise floor of a benchmark."""
    floor: dict[str, float | None] = {"score": None, "loss": None, "drift": None}
    if again := scored.outcomes_again.get(name):
        _refuse_other_prompts(name, scored.outcomes[0][name], again)
        pairs = zip(again.rows, scored.outcomes[0][name].rows, strict=True)
        floor["score"] = noise_floor(statistics.per_row([a["score"] - b["score"] for a, b in pairs], scored.plan.seed))
    return floor


def _floors(task: EvalTask, first: Moment, again: Moment | None, seed: int) -> dict[str, float | None]:
    if again is None:
        return {"score": None, "loss": None, "drift": None}
    one, two = first.scores, again.scores
    if task.scored_by is None:
        score = statistics.per_token(two.correct - one.correct, one.tokens, seed)
    else:
        score = statistics.per_row(again.metric - first.metric, seed)
    loss = statistics.per_token(two.nll - one.nll, one.tokens, seed)
    drift = statistics.per_token(two.kl, one.tokens, seed)
    return {"score": noise_floor(score), "loss": noise_floor(loss), "drift": noise_floor(drift)}


# ---- as files ------------------------------------------------------------------------------------------------------


def to_dict(judgement: Judgement) -> dict[str, Any]:
    """All figures as plain types. `results` holds a list for each model, with an entry for each task."""
    scored = judgement.scored
    plan, names = scored.plan, [judged.result.name for judged in judgement.models[0]]
    models = zip(plan.models, scored.contents, speeds(scored), strict=True)
    return strict(
        {
            "format": FORMAT,
            "kind": "eval",
            "command": ["ftplus", *sys.argv[1:]],
            "versions": content.versions(),
            "plan": vars(plan) | {"tasks": [str(task.spec) for task in plan.tasks]},
            "models": [{"name": name, "content": held, "tokens_per_second": speed} for name, held, speed in models],
            "noise_floor": dict(zip(names, judgement.floors, strict=True)),
            "results": [
                [
                    _entry(judged, first, rows_file(plan.models[number], number, judged, i))
                    for i, (judged, first) in enumerate(zip(model, judgement.models[0], strict=True))
                ]
                for number, model in enumerate(judgement.models)
            ],
        }
    )


def _entry(judged: Judged, first: Judged, file: str) -> dict[str, Any]:
    def shown(rows: tuple[int, ...]) -> list[dict[str, Any]]:
        answers = [{"before": first.rows[i]["answer"], "after": judged.rows[i]["answer"]} for i in rows]
        asked = [{key: judged.rows[i][key] for key in ("prompt", "expected")} for i in rows]
        return [{"row": i, **one, **two} for i, one, two in zip(rows, asked, answers, strict=True)]

    return {
        **judged.result.to_dict(),
        "verdict": judged.verdict,
        "right_only_first": shown(judged.lost),
        "right_only_now": shown(judged.gained),
        "rows_file": file,
    }


def speeds(scored: Scored) -> list[float | None]:
    """Tokens that each model read in a second while loss and drift were scored, prompts included.

    Timed after a first batch. The first model has no drift, and keeps its hidden states instead: the others may be
    compared with each other, not with it.
    """
    tokens = sum(len(example["input_ids"]) for task in scored.tasks for example in task.examples)
    seconds = [sum(moment.seconds for moment in moments.values()) for moments in scored.moments]
    return [tokens / spent if spent else None for spent in seconds]


def save(judgement: Judgement, folder: Path) -> Path:
    """Write eval.json and, in `rows/`, one line for each row of every model and task.

    Raises:
        StorageError: the folder cannot be written.
    """
    with disk.attempt(f"--out {folder}", "another folder"):
        for number, (name, model) in enumerate(zip(judgement.scored.plan.models, judgement.models, strict=True)):
            for i, judged in enumerate(model):
                rows = [strict({"row": place, **row}) for place, row in enumerate(judged.rows)]
                lines = (json.dumps(row, allow_nan=False) for row in rows)
                disk.write(folder / rows_file(name, number, judged, i), "\n".join(lines) + "\n")
        facts = to_dict(judgement)
        disk.write(folder / "eval.json", json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        named = {folder / entry["rows_file"] for model in facts["results"] for entry in model}
        for file in (folder / "rows").glob("*.jsonl"):  # of other models or tasks, scored into this folder before
            if file not in named and ROWS_FILE.fullmatch(file.name):
                file.unlink()
    return folder / "eval.json"


def rows_file(model: str, number: int, judged: Judged, i: int) -> str:
    """Below the folder: of a model and a task, whose names may not do for files."""
    model, task = (
        re.sub(r"[^\w.-]+", "_", name).strip("_.").encode()[-100:].decode(errors="ignore")  # a name has 255 bytes
        for name in (model, judged.result.name)
    )
    return f"rows/{number + 1}-{model}.{i + 1}-{task}.jsonl"


def _rows(task: EvalTask, moment: Moment, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    scores = moment.scores
    for i, row in enumerate(task.rows):
        yield {
            "prompt": asked_text(row, tokenizer),
            "expected": expected(row, tokenizer),
            "answer": moment.said and moment.said[i],
            **({"likelihoods": moment.likelihoods[i]} if moment.likelihoods else {}),
            "score": None if moment.metric is None else moment.metric[i],
            "nll": scores.nll[i],
            "tokens": scores.tokens[i],
            "correct": scores.correct[i],
            "kl": None if scores.kl is None else scores.kl[i],
        }
