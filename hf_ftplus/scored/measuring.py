"""Measure every model on every task with one of them in memory, and keep each cell as soon as it is there.

The first model goes first. What drift needs of it (last hidden states at supervised positions, and its LM head: see
`evaluation/drift.py`) stays on the CPU while the others follow. It is also measured again in other batches, which says
how far figures move when nothing but rounding does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset

from ..batches import seed_of
from ..callback import give_back_memory
from ..errors import DataError, IncompatibleError, reason
from ..evaluation import EvalTask, Evaluation, with_answers
from ..evaluation.drift import keep_head
from ..evaluation.found import as_found
from ..evaluation.runner import TOGETHER, Moment
from ..evaluation.scoring import Start, score
from ..examples import Example, supervised_in, tokenize
from ..generate import self_generate
from ..logits import lm_head
from ..model import cache
from ..specs import distinct_names
from ..trained import Trained, device_here, load, tokenizer_of
from . import content
from .cells import Cells, written
from .harness import Benchmark, Outcome, as_outcome
from .plan import Found, Plan, chosen, find

Say = Callable[[str], None]
AGAIN = "again"
"""The other layout of batches."""


class OneModel:
    """A model that is loaded when it is first asked for, and gone after the block."""

    def __init__(self, plan: Plan, number: int) -> None:
        self.plan, self.name = plan, plan.models[number]
        self._loaded: Trained | None = None
        self._warm = False

    def __enter__(self) -> OneModel:
        return self

    def __call__(self) -> Trained:
        self._loaded = self._loaded or load(self.name, self.plan.dtype, self.plan.device)
        return self._loaded

    def warm_up(self, examples: list[Example], batch_size: int) -> None:
        """Score a batch once before anything is timed: the first forward pass of a model sets things up."""
        if not self._warm:
            score(self().model, examples[:batch_size], batch_size, label=f"{self.name}: warming up")
        self._warm = True

    def __exit__(self, *error: object) -> None:
        self._loaded = None
        give_back_memory()


@dataclass
class Scored:
    """What each model did on each task."""

    plan: Plan
    kept: Cells
    say: Say
    tokenizers: list[Any]
    contents: list[str]
    benchmarks: list[Benchmark] = field(default_factory=list)
    tasks: list[EvalTask] = field(default_factory=list)
    moments: list[dict[str, Moment]] = field(default_factory=list)
    """Of each model, by task."""
    again: dict[str, Moment] = field(default_factory=dict)
    """Of the first model in other batches; empty where nobody is compared with it."""
    outcomes: list[dict[str, Outcome]] = field(default_factory=list)
    """Of each model, by benchmark; and of the first in other batches."""
    outcomes_again: dict[str, Outcome] = field(default_factory=dict)
    measured: int = 0
    """Cells that were not kept from before."""

    def key(self, number: int, task: EvalTask, layout: str = "") -> str:
        """The name of a cell: everything that its figures come from."""
        against = self.contents[0] if number or layout else None
        return content.digest(
            [content.of_code(), self.contents[number], against, content.of_task(task), layout, *self.how]
        )

    @property
    def how(self) -> list[Any]:
        return [self.plan.dtype, self.plan.device or device_here(), self.plan.batch_size]

    def lacks(self, task: EvalTask) -> bool:
        """Whether anything is still to be compared with the first model."""
        keys = [self.key(0, task, AGAIN), *(self.key(number, task) for number in range(1, len(self.contents)))]
        return len(self.contents) > 1 and any(self.kept.moment(key) is None for key in keys)

    def cell(
        self, number: int, task: EvalTask, model: OneModel, start: Start | None, layout: str = "", hidden: bool = False
    ) -> Moment:
        """A cell from before, or one that is measured and kept now.

        Args:
            start: what drift is measured from.
            layout: of batches, if it is the other one.
            hidden: have the hidden states with it, which are never kept.
        """
        key = self.key(number, task, layout)
        before = self.kept.moment(key)
        if before and not hidden:
            return before
        it, size = model(), self.plan.batch_size
        at_once, together = (
            other_size(most, len(task.examples)) if layout else most for most in (size, TOGETHER * size)
        )
        evaluation = Evaluation([task], it.tokenizer, at_once, together=together)
        if start and len(lm_head(it.model).weight) != len(start.head.weight):
            start = None  # tokens were added: drift is not defined
        asked = replace(task, metric=None) if before else task
        with as_found(it.model, self.plan.seed):
            model.warm_up(task.examples, size)
            moment = evaluation.measure(it.model, asked, start, hidden, label=f"{it.name}: {task.name}")
        if before:
            before.scores.hidden = moment.scores.hidden
            return before
        self.kept.put(key, written(moment))
        self.measured += 1
        loss = moment.scores.nll.sum() / max(1, moment.scores.tokens.sum())
        where = " in other batches" if layout else ""
        self.say(f"{it.name}, {task.name}{where}: loss {loss:.3f}, {moment.seconds:.1f} s")
        return moment

    def show(self, number: int, task: EvalTask, moment: Moment, model: OneModel) -> None:
        """Have the answers that a page shows, where no metric has asked for all; kept beside the cell."""
        plan = self.plan
        how = {"batch_size": plan.batch_size, "seed": plan.seed, "completions": plan.completions}
        evaluation = Evaluation([task], self.tokenizers[number], **how)
        rows = evaluation.shown(task)
        if task.metric or not rows:
            return
        key = content.digest(
            ["shown", content.of_code(), self.contents[number], content.of_task(task), rows, *self.how]
        )
        kept = self.kept.get(key)
        if isinstance(kept, list) and len(kept) == len(rows):
            moment.answers = dict(zip(rows, kept, strict=True))
            return
        it = model()
        with as_found(it.model, plan.seed):
            evaluation.show(it.model, {task.name: moment})
        self.kept.put(key, [moment.answers[row] for row in rows])

    def outcome(self, number: int, benchmark: Benchmark, model: OneModel, layout: str = "") -> Outcome:
        """As `cell`, of a task of the harness."""
        metric = self.outcomes[0][benchmark.name].metric if number or layout else None
        known = [content.of_code(), self.contents[number], benchmark.content(), layout, self.plan.seed, metric]
        key = content.digest([*known, *self.how])
        kept = self.kept.get(key)
        if found := as_outcome(kept):
            return found
        it, size = model(), self.plan.batch_size
        size = other_size(size, len(self.outcomes[0][benchmark.name].rows)) if layout else size
        found = benchmark.measure(it, size, self.plan.seed, metric)
        self.kept.put(key, vars(found))
        self.measured += 1
        where = " in other batches" if layout else ""
        score = sum(row["score"] for row in found.rows) / len(found.rows)
        self.say(f"{it.name}, {benchmark.name}{where}: {found.metric} {score:.3f}")
        return found


def measure(plan: Plan, kept: Cells, say: Say, benchmarks: Sequence[Benchmark] = ()) -> Scored:
    """Every figure that is not kept already.

    Raises:
        DataError: no such model, no tokenizer beside it, or rows that cannot be measured.
        IncompatibleError: models that read the rows as other tokens.
    """
    distinct_names([*(task.name for task in plan.tasks), *(item.name for item in benchmarks)])
    tokenizers, found = [tokenizer_of(name) for name in plan.models], find(plan)
    scored = Scored(plan, kept, say, tokenizers, [content.of_model(name) for name in plan.models], list(benchmarks))
    with OneModel(plan, 0) as first:
        scored.tasks = [_task(_with_rows(item, scored, first), scored) for item in found]
        _refuse_other_tokens(scored)
        starts = _of_first(scored, first)
        scored.outcomes.append({item.name: scored.outcome(0, item, first) for item in benchmarks})
        if len(plan.models) > 1:
            scored.outcomes_again = {item.name: scored.outcome(0, item, first, AGAIN) for item in benchmarks}
    for number in range(1, len(plan.models)):
        with OneModel(plan, number) as model:
            moments = {task.name: scored.cell(number, task, model, starts.get(task.name)) for task in scored.tasks}
            for task in scored.tasks:
                scored.show(number, task, moments[task.name], model)
            scored.moments.append(moments)
            scored.outcomes.append({item.name: scored.outcome(number, item, model) for item in benchmarks})
    return scored


def _of_first(scored: Scored, model: OneModel) -> dict[str, Start]:
    """Measure the first model, twice if it is compared with others; where drift is still to be measured, from what."""
    starts: dict[str, Start] = {}
    head = None
    mine: dict[str, Moment] = {}
    for task in scored.tasks:
        lacks = scored.lacks(task)
        mine[task.name] = moment = scored.cell(0, task, model, None, hidden=lacks)
        scored.show(0, task, moment, model)
        if lacks:
            head = head or keep_head(model().model)
            starts[task.name] = Start(head, moment.scores.hidden)
            moment.scores.hidden = []
        if len(scored.contents) > 1:
            start = relaid(starts.get(task.name), task.examples, other_size(scored.plan.batch_size, len(task.examples)))
            scored.again[task.name] = scored.cell(0, task, model, start, AGAIN)
    scored.moments.append(mine)
    return starts


def other_size(batch_size: int, rows: int) -> int:
    """Rows in a batch of the other layout: half of those that one holds."""
    return min(batch_size, rows) // 2 or 2


def relaid(start: Start | None, examples: list[Example], size: int) -> Start | None:
    """The same hidden states in batches of another size; examples go by their length in either (`scoring.score`)."""
    if start is None:
        return None
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    counts = list(map(supervised_in, ordered))
    parts = [sum(counts[place : place + size]) for place in range(0, len(counts), size)]
    return Start(start.head, list(torch.cat(start.hidden).split(parts)))


# ---- rows ------------------------------------------------------------------------------------------------------------


def _with_rows(found: Found, scored: Scored, first: OneModel) -> Found:
    """Rows that the first model writes: whole ones, or answers to questions."""
    if found.rows is not None and not found.unanswered:
        return found
    task, plan = found.asked, scored.plan
    asked = list(found.rows) if found.rows is not None else task.spec.sampling()
    key = content.digest(["rows", content.of_code(), scored.contents[0], asked, task.use, plan.seed, *scored.how])
    rows = scored.kept.get(key)
    if rows is None:
        it = first()
        scored.say(f"{it.name}, {task.name}: writing what is measured")
        if found.unanswered:
            rows = with_answers(it.model, it.tokenizer, asked, batch_size=plan.batch_size)
        else:
            seed = seed_of(task.use, plan.seed)
            rows = list(self_generate(it.model, it.tokenizer, **asked, seed=seed, cache=cache() / "self"))
        scored.kept.put(key, rows)
    if not rows:
        raise DataError(
            f"{task.name}: {plan.models[0]} answers none of the questions, so there is nothing to measure. Give rows "
            "with a completion, or put a model first that answers."
        )
    written_rows = Dataset.from_list(rows)
    return Found(task, written_rows, found.notes) if found.unanswered else chosen(task, written_rows, plan.measure_rows)


def _task(found: Found, scored: Scored) -> EvalTask:
    task = found.asked
    measured = EvalTask.of(task.name, task.role, found.rows, scored.tokenizers[0], scored.plan.max_length, task.metric)
    measured.notes += found.notes
    return measured


def _refuse_other_tokens(scored: Scored) -> None:
    """Raise before a model loads where two of them do not read the same tokens, which loss and drift are means over."""
    models, first = scored.plan.models, scored.tokenizers[0]
    for name, tokenizer in zip(models[1:], scored.tokenizers[1:], strict=True):
        for task in scored.tasks:
            said = f"{name} reads {task.name} otherwise than {models[0]} does"
            try:
                same = tokenize(task.rows, tokenizer, scored.plan.max_length, task.name).examples == task.examples
                why = f"vocabularies of {len(tokenizer)} and {len(first)} tokens, or other chat templates"
            except (DataError, IncompatibleError) as error:
                same, why = False, reason(error)
            if not same:
                raise IncompatibleError(
                    f"{said} ({why}), so neither loss nor drift can be compared. Expected models with one tokenizer "
                    "and one template; score others in a command of their own."
                )
