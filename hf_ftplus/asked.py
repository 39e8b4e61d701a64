"""Ask a trained model things, and another one the same things."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from . import data
from .batches import seed_of
from .errors import DataError, UsageError, reason
from .evaluation.found import as_found
from .evaluation.greedy import answers
from .evaluation.tasks import asked_text, expected, opening, question
from .formats import Row
from .logits import positions
from .trained import Trained


@dataclass
class Answered:
    """A question, the answer of each model, and the one that the data expects if it says."""

    prompt: str
    answers: list[str]
    expected: str | None = None


@dataclass(frozen=True)
class How:
    """How answers are written. At temperature 0 the likeliest token is taken at every step."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 8
    seed: int = 0


def ask(models: list[Trained], rows: list[list[Row]], how: How) -> Iterator[Answered]:
    """Answers in the order of the questions, as soon as a batch of them is there.

    Args:
        models: to be asked.
        rows: for each model, the same questions in the form that it understands.
        how: answers are written.
    """
    for start in range(0, len(rows[0]), how.batch_size):
        group = [own[start : start + how.batch_size] for own in rows]
        drawn = replace(how, seed=seed_of(f"batch {start}" if start else "", how.seed))  # else all would draw the same
        found = [_answers(model, own, drawn) for model, own in zip(models, group, strict=True)]
        for i, row in enumerate(group[0]):
            wanted = expected(row, models[0].tokenizer) if "completion" in row or "messages" in row else None
            yield Answered(asked_text(row, models[0].tokenizer), [texts[i] for texts in found], wanted)


def _answers(it: Trained, rows: list[Row], how: How) -> list[str]:
    questions = [question(row, it.tokenizer) for row in rows]
    longest, room = max(map(len, questions)), positions(it.model)
    if longest + how.max_new_tokens > room:
        raise DataError(
            f"A prompt has {longest} tokens, and its answer may take {how.max_new_tokens}; {it.name} reads {room} in "
            "all. Shorten it, or lower --max_new_tokens."
        )
    with it.speaking(), as_found(it.model, how.seed):
        return answers(
            it.model,
            it.tokenizer,
            questions,
            batch_size=how.batch_size,
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
        )


def questions_of(
    typed: Iterable[str], file: str | None, of: str, chat_template: bool, system: str | None = None, chat: bool = True
) -> list[Row]:
    """Questions that were typed, then those in a file, as rows that can be asked of a model.

    Text becomes a user's turn for a model with a chat template, unless `chat` is false; messages stay messages.

    Args:
        typed: questions.
        file: of others.
        of: name of the model.
        chat_template: whether its tokenizer has one.
        system: message before each chat.
        chat: whether text becomes a chat.

    Raises:
        DataError: nothing to ask, an empty question, or a chat without a template for it.
        UsageError: a system message for text that is no chat.
    """
    turns = chat and chat_template
    if system and not turns:
        why = "--no-chat was given" if chat_template else f"{of} has no chat template"
        raise UsageError(f"--system is for chats, but {why}. Write it into the prompt.")
    rows = [{"prompt": text} for text in typed] + (_in_file(file) if file else [])
    if not rows:
        raise DataError("Nothing to ask. Type --prompt TEXT, or --file prompts.jsonl.")
    for number, row in enumerate(rows, 1):
        asked = opening(row) if "input_ids" not in row else "tokens"
        if not (asked.strip() if isinstance(asked, str) else asked):
            raise DataError(f"Prompt {number} is empty; expected some text, or a turn before the assistant's.")
        if not chat_template and not isinstance(row.get("prompt"), str) and "input_ids" not in row:
            raise DataError(f"Prompt {number} is a chat, and {of} has no chat template; expected text.")
    return [_as_turns(row, system) if turns else row for row in rows]


def _in_file(file: str) -> list[Row]:
    if Path(file).suffix.lower() != ".txt":
        rows = data.load(file, through=_unanswered)
        return [{"prompt": row["text"]} if "text" in row else row for row in rows]
    try:
        return [{"prompt": line} for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file {file} cannot be read: {reason(error)}. Expected lines of text.") from error


def _unanswered(row: Row) -> Row:
    """A conversation in which somebody waits for an answer is a question, all of it."""
    turns = row.get("messages")
    waits = isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "user"
    return {"prompt": turns, **{key: value for key, value in row.items() if key != "messages"}} if waits else row


def _as_turns(row: Row, system: str | None) -> Row:
    opening = [{"role": "system", "content": system}] if system else []
    if not isinstance(row.get("prompt"), str):
        asked = next((key for key in ("prompt", "messages") if key in row), None)
        return {**row, asked: opening + row[asked]} if asked else row
    turns = {"prompt": [*opening, {"role": "user", "content": row["prompt"]}]}
    if "completion" in row:
        turns["completion"] = [{"role": "assistant", "content": row["completion"]}]
    return turns
