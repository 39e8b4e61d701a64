"""Measure every task before training and after it, and say what changed."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..logits import Head, bare
from ..specs import distinct_names
from . import metrics, statistics
from .drift import keep_head
from .found import as_found
from .greedy import answers
from .results import Completion, Kept, Level, TaskResult
from .scoring import Autocast, Scores, Start, score
from .statistics import NOT_MEASURED, Estimate
from .tasks import EvalTask, asked_text, expected, question

SPARE = 4
"""Tokens beyond the longest expected answer: the end of the turn, and a full stop more or less."""
REASONED = 256
"""Tokens in which a pattern looks for an answer, at least: a model may reason before it gives one."""
TOGETHER = 4
"""Micro-batches answered at once: writing needs no logits of the prompt, and its time goes into reading the weights."""


@dataclass
class Moment:
    """One task at one moment: sums per row, the metric of each row, and the answers to the rows shown."""

    scores: Scores
    metric: NDArray | None = None
    unread: int = 0
    """Answers in which the metric's pattern found nothing."""
    answers: dict[int, str] = field(default_factory=dict)
    said: list[str | None] | None = None
    """The answer to every row, where the metric reads them, or its choice."""
    likelihoods: list[list[float]] | None = None
    """Of every choice of every row, in nats, where the metric compares them."""
    seconds: float = 0.0
    """Of scoring loss, accuracy and drift."""

    def answer(self, row: int) -> str | None:
        """As it is shown; None where nothing was asked."""
        return self.answers.get(row, self.said[row] if self.said else None)


class Evaluation:
    """Figures before and after training, of the same rows in the same micro-batches.

        evaluation = Evaluation(tasks, tokenizer)
        evaluation.before(model)        # the start: also what drift is measured from
        trainer.train()
        results = evaluation.after(model)

    The model is given back as found: mode, generators, gradients, generation settings. If training stops half-way,
    `results()` reports what was measured until then.

    Args:
        tasks: what to measure.
        tokenizer: of the model, with its chat template if the rows are chats.
        batch_size: rows in a micro-batch when scoring.
        seed: of the bootstrap and of the choice of completions.
        completions: rows of each task whose greedy answers are kept side by side.
        max_new_tokens: length of a completion; metrics allow for the longest expected answer of their task.
        autocast: the context of the forward passes, such as `partial(torch.autocast, "cuda", torch.bfloat16)`.
        sides: what notes call the two sides that are compared.
        together: rows that are answered at once; left out, four times as many as are scored.
    """

    def __init__(
        self,
        tasks: Iterable[EvalTask],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 8,
        seed: int = 0,
        completions: int = 4,
        max_new_tokens: int = 48,
        autocast: Autocast = nullcontext,
        sides: tuple[str, str] = ("before training", "after training"),
        together: int | None = None,
    ) -> None:
        self.tasks = list(tasks)
        distinct_names(task.name for task in self.tasks)
        self.tokenizer, self.batch_size, self.seed = tokenizer, batch_size, seed
        self.together = together or TOGETHER * batch_size
        self.completions, self.max_new_tokens, self.autocast = completions, max_new_tokens, autocast
        self.sides = sides
        self._head: Head | None = None
        self._before: dict[str, Moment] = {}
        self._after: dict[str, Moment] = {}

    def before(self, model: nn.Module) -> list[TaskResult]:
        """Measure the starting model, and keep what drift needs on the CPU."""
        model = bare(model)
        self._head, self._before, self._after = None, {}, {}
        if self.tasks:
            self._head = keep_head(model)
        with as_found(model, self.seed):
            for task in self.tasks:
                label = f"{task.name}: score before"
                self._before[task.name] = self.measure(model, task, keep_hidden=True, label=label)
            self.show(model, self._before)
        return self.results()

    def after(self, model: nn.Module) -> list[TaskResult]:
        """Measure again, and compare with `before` (without which change, drift and retention are not measured)."""
        model = bare(model)
        self._after = {}
        with as_found(model, self.seed):
            for task in self.tasks:
                label = f"{task.name}: score after"
                self._after[task.name] = self.measure(model, task, self._start(task), label=label)
            self.show(model, self._after)
        return self.results()

    def judged(self) -> list[str]:
        """The protect tasks that can be judged by what they keep: measured at the start, with something right."""
        before = {task.name: self._before.get(task.name) for task in self.tasks if task.role == "protect"}
        return [name for name, moment in before.items() if moment and moment.scores.correct.sum()]

    def kept(self, model: nn.Module) -> dict[str, Kept]:
        """How each protect task stands now, by forward passes alone.

        Compared is `choice` where it is the task's metric; else token accuracy, for answers would have to be written,
        and drift comes with it.
        """
        model, judged = bare(model), self.judged()
        with as_found(model, self.seed):
            return {task.name: self._kept(model, task) for task in self.tasks if task.name in judged}

    def _kept(self, model: nn.Module, task: EvalTask) -> Kept:
        before = self._before[task.name]
        if task.scored_by and not task.scored_by.written and before.metric.sum():
            now = metrics.right(metrics.picked(task, self._likelihoods(model, task)), task)
            return Kept(task.scored_by.name, before.metric.mean(), now.mean())
        how = {"start": self._start(task), "autocast": self.autocast, "label": f"{task.name}: score"}
        now = score(model, task.examples, self.batch_size, **how)
        was, tokens = before.scores.correct.sum(), before.scores.tokens.sum()
        return Kept("token_accuracy", was / tokens, now.correct.sum() / tokens, now.kl.sum() / tokens)

    def results(self) -> list[TaskResult]:
        """What has been measured so far, in the order of the tasks."""
        return [self.result(task, self._before.get(task.name), self._after.get(task.name)) for task in self.tasks]

    def _start(self, task: EvalTask) -> Start | None:
        before = self._before.get(task.name)
        return Start(self._head, before.scores.hidden) if before else None

    def measure(
        self,
        model: nn.Module,
        task: EvalTask,
        start: Start | None = None,
        keep_hidden: bool = False,
        label: str = "score",
    ) -> Moment:
        """One task as it stands with `model`, which is bare and inside `as_found`.

        Args:
            start: what drift is measured from.
            keep_hidden: keep what makes this moment such a start.
            label: of the progress bar.
        """
        begin = time.perf_counter()
        scores = score(
            model,
            task.examples,
            self.batch_size,
            start=start,
            keep_hidden=keep_hidden,
            autocast=self.autocast,
            label=label,
        )
        seconds = time.perf_counter() - begin
        if task.scored_by is None:
            return Moment(scores, seconds=seconds)
        if not task.scored_by.written:
            found = self._likelihoods(model, task)
            picks = metrics.picked(task, found)
            return Moment(scores, metrics.right(picks, task), said=picks, likelihoods=found, seconds=seconds)
        said = self._ask(model, [(task, i) for i in range(len(task.rows))], self._room(task), task.name)
        return Moment(scores, *metrics.written(said, task), said=said, seconds=seconds)

    def show(self, model: nn.Module, moments: dict[str, Moment]) -> None:
        """Ask for the completions of all tasks together: a step costs little more for twelve rows than for four."""
        shown = [(task, i) for task in self.tasks for i in self.shown(task)]
        for (task, i), said in zip(shown, self._ask(model, shown, self.max_new_tokens, "completions"), strict=True):
            moments[task.name].answers[i] = said

    def _likelihoods(self, model: nn.Module, task: EvalTask) -> list[list[float]]:
        return metrics.likelihoods(model, self.tokenizer, task, self.batch_size, self.autocast)

    def _ask(self, model: nn.Module, rows: list[tuple[EvalTask, int]], tokens: int, label: str) -> list[str]:
        return answers(
            model,
            self.tokenizer,
            [question(task.rows[i], self.tokenizer) for task, i in rows],
            batch_size=self.together,
            max_new_tokens=tokens,
            autocast=self.autocast,
            label=f"{label}: answers",
        )

    def _room(self, task: EvalTask) -> int:
        """Tokens for an answer: the longest expected one and some more, for what is longer still is wrong anyway.

        A metric that grades must see an answer run on, or it would be worth more than it is.
        """
        wanted = (self.tokenizer(expected(row), add_special_tokens=False)["input_ids"] for row in task.rows)
        longest = max(map(len, wanted))
        if task.scored_by.graded:
            longest = max(2 * longest, self.max_new_tokens)
        return max(longest + SPARE, REASONED if task.scored_by.pattern else 0)

    def shown(self, task: EvalTask) -> list[int]:
        """Rows whose completions are kept: drawn by seed and name, so the same in every run and strategy."""
        draw = np.random.default_rng([self.seed, zlib.crc32(task.name.encode())])
        count = min(self.completions, len(task.rows))
        return sorted(draw.choice(len(task.rows), count, replace=False).tolist())

    # ---- from sums per row to figures ------------------------------------------------------------------------------

    def result(self, task: EvalTask, before: Moment | None, after: Moment | None) -> TaskResult:
        """What two moments of a task say, and what lies between them; either may be missing."""
        either = before or after
        result = TaskResult(
            task.name,
            task.role,
            rows=len(task.examples),
            tokens=int(either.scores.tokens.sum()) if either else 0,
            metric=task.scored_by and task.scored_by.name,
            completions=self._completions(task, before, after),
            notes=[*task.notes]
            + [note for when, moment in zip(self.sides, (before, after), strict=True) for note in _notes(when, moment)],
        )
        if before:
            result.before = self._level(before)
        if after:
            result.after = self._level(after)
            if after.scores.kl is not None:
                result.drift = statistics.per_token(after.scores.kl, after.scores.tokens, self.seed)
        if before and after:
            self._compare(task, result, before, after)
        return result

    def _level(self, moment: Moment) -> Level:
        scores = moment.scores
        return Level(
            loss=statistics.per_token(scores.nll, scores.tokens, self.seed),
            token_accuracy=statistics.per_token(scores.correct, scores.tokens, self.seed),
            metric=NOT_MEASURED if moment.metric is None else statistics.share(moment.metric, self.seed),
        )

    def _compare(self, task: EvalTask, result: TaskResult, before: Moment, after: Moment) -> None:
        one, two = before.scores, after.scores
        result.change = Level(
            loss=statistics.per_token(two.nll - one.nll, one.tokens, self.seed),
            token_accuracy=statistics.per_token(two.correct - one.correct, one.tokens, self.seed),
            metric=self._change_of_metric(task, before, after),
        )
        was, now = (one.correct, two.correct) if result.metric is None else (before.metric, after.metric)
        result.retention = statistics.retention(was, now, self.seed)
        if result.metric is not None and not task.scored_by.graded:
            result.flips = statistics.flips(was, now)
        if result.undefined:
            what = result.retention_of.replace("_", " ")
            result.notes.append(f"Retention is undefined: {what} was 0 {self.sides[0]}.")

    def _change_of_metric(self, task: EvalTask, before: Moment, after: Moment) -> Estimate:
        if task.scored_by is None:
            return NOT_MEASURED
        if task.scored_by.graded:
            return statistics.per_row(after.metric - before.metric, self.seed)
        return statistics.change_of_share(before.metric, after.metric)

    def _completions(self, task: EvalTask, before: Moment | None, after: Moment | None) -> list[Completion]:
        return [
            Completion(
                asked_text(task.rows[i], self.tokenizer),
                expected(task.rows[i], self.tokenizer),
                before.answer(i) if before else None,
                after.answer(i) if after else None,
            )
            for i in self.shown(task)
        ]


def _notes(side: str, moment: Moment | None) -> list[str]:
    """What a figure alone does not say: a model that no longer computes, answers that no pattern could read."""
    if moment is None:
        return []
    rows, bad = len(moment.scores.nll), int((~np.isfinite(moment.scores.nll)).sum())
    found = [f"The loss {side} is not finite on {bad} of {rows} rows."] if bad else []
    if moment.unread:
        found.append(f"No answer was found in {moment.unread} of {rows} texts {side}; these score 0.")
    return found
