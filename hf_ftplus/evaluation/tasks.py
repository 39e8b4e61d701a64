"""What is measured: a named task, its rows as tokens and as questions that the model can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import DataError, UsageError
from ..examples import Example, rendered, template_options, tokenize
from ..formats import IGNORED, Row
from ..metric import Metric, parse

Role = Literal["learn", "protect", "measure"]
ROLES = get_args(Role)


@dataclass
class EvalTask:
    """A task to measure before and after training.

    Args:
        name: as it appears in the report.
        role: "learn" (what is being learnt, held out), "protect" (what must stay) or "measure" (looked at only).
        examples: token ids and labels; row i of `rows` where rows are given.
        rows: canonical rows, for metrics and completions; without them completions are read from the examples.
        metric: None, or one of `metric.METRICS`: "choice" (rows with `choices`; the completion is the right one),
            "exact_match", "f1", "rouge"; with a pattern that finds the answer, "exact_match:answer is (.+)".
        notes: what the report says about these rows.
    """

    name: str
    role: Role
    examples: list[Example]
    rows: list[Row] | None = None
    metric: str | None = None
    notes: list[str] = field(default_factory=list)
    scored_by: Metric | None = field(init=False, default=None)
    """`metric`, as read."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(f"Task {self.name!r} has the role {self.role!r}; expected one of {', '.join(ROLES)}.")
        if self.metric is not None:
            self.scored_by = parse(self.metric, f"Task {self.name!r} has the metric {self.metric!r}")
        self.rows = list(self.rows) if self.rows else list(self.examples)
        if len(self.rows) != len(self.examples):
            raise UsageError(
                f"Task {self.name!r} has {len(self.rows)} rows and {len(self.examples)} examples; expected as many "
                "(Tokenized.kept says which rows were kept; EvalTask.of sees to it)."
            )
        if self.scored_by:
            self._check_metric(self.scored_by.name)

    def _check_metric(self, metric: str) -> None:
        for i, row in enumerate(self.rows, 1):
            if not ("prompt" in row or "messages" in row):
                raise DataError(
                    f"Task {self.name!r}, row {i} has {', '.join(map(repr, row))}, so {metric} has no question to "
                    "ask; expected prompt + completion, or messages."
                )
            if metric == "choice" and expected(row) not in (row.get("choices") or ()):
                found = "no 'choices'" if not row.get("choices") else "a completion that is not one of its 'choices'"
                raise DataError(
                    f"Task {self.name!r}, row {i} has {found}; for the metric 'choice' every row needs 'choices', the "
                    "completion among them, letter for letter."
                )

    @classmethod
    def of(
        cls,
        name: str,
        role: Role,
        rows: Dataset | list[Row],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        metric: str | None = None,
        truncation_mode: str = "keep_start",
    ) -> EvalTask:
        """A task from canonical rows. Rows that truncation leaves without a supervised token are left out.

        Rows that all have `choices` declare the metric "choice", if no metric is given.
        """
        rows = list(rows)
        done = tokenize(rows, tokenizer, max_length, name, truncation_mode)
        kept = [rows[i] for i in done.kept]
        if metric is None and all(row.get("choices") for row in kept):
            metric = "choice"
        lost = f"{done.dropped} of {done.rows} rows are not measured at max_length {max_length}: {done.why()}."
        return cls(name, role, done.examples, kept, metric, [lost] if done.dropped else [])


# ---- rows as questions ---------------------------------------------------------------------------------------------


def question(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what comes before the answer: a template opened at the assistant's turn, or the prompt as it is."""
    if "input_ids" in row:
        return row["input_ids"][: _first_label(row)]
    asked = opening(row)
    if isinstance(asked, str):
        ids = list(tokenizer(text=asked)["input_ids"])
        # some tokenizers close every text, also one that goes on
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    opened = rendered(
        asked, tokenizer, tokenize=True, return_dict=True, add_generation_prompt=True, **template_options(row)
    )
    return opened["input_ids"]


def asked_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """The question as a person would read it."""
    if "input_ids" in row:
        return tokenizer.decode(question(row, tokenizer), skip_special_tokens=True)
    asked = opening(row)
    if isinstance(asked, str):
        return asked
    if len(asked) == 1:
        return _content(asked[0])
    return "\n".join(f"{message['role']}: {_content(message)}" for message in asked)


def expected(row: Row, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The answer that the data gives; the last one of a conversation."""
    if "input_ids" in row:
        ids = [label for label in row["labels"] if label != IGNORED]
        return tokenizer.decode(ids, skip_special_tokens=True).strip() if tokenizer else ""
    if "messages" in row:
        return _content(row["messages"][_last_answer(row)])
    if "text" in row:
        return row["text"][_middle(row["text"]) :]
    completion = row.get("completion") or ""
    return completion if isinstance(completion, str) else "\n".join(_content(message) for message in completion)


def answered(row: Row, answer: str) -> Row:
    """The same row with another answer in the place of its own."""
    if "messages" in row:
        asked = row["messages"][: _last_answer(row)]
        return {**_options(row), "prompt": asked, "completion": [{"role": "assistant", "content": answer}]}
    chat = not isinstance(row["prompt"], str)
    return {
        **_options(row),
        "prompt": row["prompt"],
        "completion": [{"role": "assistant", "content": answer}] if chat else answer,
    }


def _options(row: Row) -> Row:
    return {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key) is not None}


def opening(row: Row) -> Any:
    """What stands before the answer: text, or messages."""
    if "messages" in row:
        return row["messages"][: _last_answer(row)]
    return row["text"][: _middle(row["text"])] if "text" in row and "prompt" not in row else row["prompt"]


def _last_answer(row: Row) -> int:
    return max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")


def _first_label(row: Row) -> int:
    """Where the answer begins; text that is supervised from its first token is cut in the middle."""
    first = next((i for i, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"]))
    return first if first > 1 else max(1, len(row["labels"]) // 2)


def _middle(text: str) -> int:
    """The end of a word near the middle: text has no question, so the model is asked to go on from there."""
    space = text.find(" ", len(text) // 2)
    return space if space > 0 else max(1, len(text) // 2)


def _content(message: Row) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content)
