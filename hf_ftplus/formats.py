"""Bring a row of any common fine-tuning format into one of three shapes, or say what is wrong with it.

The canonical shapes are TRL's own: `prompt` + `completion` (both strings, or both lists of messages), `messages`, and
`text`. Rows that are tokenized already (`input_ids` + `labels`) pass through. Everything else is converted:

    input_ids [+ assistant_masks]       tokens     ->  input_ids + labels, as TRL trains on them
    instruction [+ input] + output      alpaca     ->  prompt + completion, as one user and one assistant message
    conversations [+ system]            sharegpt   ->  messages

A converter raises ValueError with the reason; the caller knows the place (`file:line` or `name, row 7`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .errors import DataError, escape, nearest

Row = dict[str, Any]

IGNORED = -100
"""Label of a token that carries no loss."""

ALSO_KEPT = ("choices", "tools", "chat_template_kwargs")
"""Optional columns: answers to choose from (evaluation), and the two that TRL hands to the chat template."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Speaker in `conversations` -> role in `messages`."""


@dataclass(frozen=True)
class Shape:
    """A format: the columns that give it away, and how one of its rows becomes canonical."""

    columns: tuple[str, ...]
    convert: Callable[[Row], Row]
    canonical: bool = True
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " + ".join([*self.columns, *(f"[{name}]" for name in self.optional)])

    def row(self, row: Row) -> Row:
        """The canonical row, with the optional columns it had.

        Raises:
            ValueError: a field is missing, empty or of the wrong type; says which.
        """
        missing = [name for name in self.columns if name not in row]
        if missing:
            raise ValueError(f"has no {missing[0]!r}; it has {_names(row)}, expected {self}")
        kept = {name: row[name] for name in ALSO_KEPT if row.get(name) is not None}
        if "choices" in kept:
            _choices(kept["choices"])
        return self.convert(row) | kept

    def fuller(self, row: Row) -> Shape | None:
        """The format with more columns than this that `row` has, of which this would keep a part."""
        larger = [shape for shape in SHAPES if set(self.columns) < set(shape.columns)]
        return next((shape for shape in larger if all(row.get(name) is not None for name in shape.columns)), None)


def shape_of(columns: Iterable[str], where: str) -> Shape:
    """The format that these columns belong to.

    Raises:
        DataError: none; lists the columns found, the formats expected, and the nearest column name.
    """
    found = list(columns)
    for shape in SHAPES:
        if set(shape.columns) <= set(found):
            return shape
    expected = "; ".join(str(shape) for shape in SHAPES)
    raise DataError(
        f"{where} has the columns {_names(found)}; expected one of these sets: {expected}.{_near(found)} "
        "Rename the columns in the file, or with Dataset.rename_column() in Python; a task under tasks: in YAML may "
        "say columns: {text: THEIR_NAME}, or have a template."
    )


def _near(found: list[str]) -> str:
    known = list(dict.fromkeys(name for shape in SHAPES for name in (*shape.columns, *shape.optional)))
    for name in found:
        hint = "" if name in known else nearest(name.lower(), known)
        if hint:
            return f"{hint[:-1]} for {escape(name)!r}?"
    return ""


def _names(columns: Iterable[str]) -> str:
    return ", ".join(repr(escape(str(name))) for name in columns) or "no columns"


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is {_what(value)}; expected a string")
    if not value.strip():
        raise ValueError(f"{column!r} is empty; expected some text")
    return value


def _messages(value: Any, column: str) -> list[Row]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column!r} is {_what(value)}; expected a list of messages with 'role' and 'content'")
    return [_message(message, f"{column}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> Row:
    if not isinstance(message, dict) or "role" not in message:
        raise ValueError(f"{where} is {_what(message)}; expected a message with 'role' and 'content'")
    if not isinstance(message["role"], str) or not message["role"]:
        raise ValueError(f"the role of {where} is {_what(message['role'])}; expected 'user', 'assistant' or 'system'")
    may_be_empty = message["role"] == "system" or message.get("tool_calls")
    if not (may_be_empty and message.get("content") in (None, "")):
        _string(message.get("content"), f"{where}.content")
    return message


def _choices(value: Any) -> None:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"'choices' is {_what(value)}; expected a list of two strings or more")
    if twice := next((item for item in value if value.count(item) > 1), None):
        raise ValueError(f"'choices' has {escape(twice, 40)!r} twice; expected each answer once")


def _what(value: Any) -> str:
    """A value in a few words: `None`, `an empty list`, `the number 5`, `the string 'abc'`."""
    if value is None:
        return "None"
    if isinstance(value, (list, dict)):
        kind = "list" if isinstance(value, list) else "object"
        return f"{'a' if value else 'an empty'} {kind}".replace("a object", "an object")
    if isinstance(value, str):
        return f"the string {escape(value, 40)!r}" if value else "an empty string"
    return f"the {'number' if isinstance(value, (int, float)) else type(value).__name__} {escape(str(value), 40)}"


def _prompt_completion(row: Row) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    for column, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, (str, list)):
            raise ValueError(f"{column!r} is {_what(value)}; expected a string or a list of messages")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError(
            f"'prompt' is {_what(prompt)} and 'completion' is {_what(completion)}; "
            "expected two strings or two lists of messages"
        )
    check = _string if isinstance(prompt, str) else _messages
    return {"prompt": check(prompt, "prompt"), "completion": check(completion, "completion")}


def _question(row: Row) -> Row:
    check = _string if isinstance(row["prompt"], str) else _messages
    return {"prompt": check(row["prompt"], "prompt")}


def _conversation(row: Row) -> Row:
    messages = _messages(row["messages"], "messages")
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(repr(escape(message["role"], 20)) for message in messages[:4])
        raise ValueError(f"'messages' has no turn of the role 'assistant', only {roles}; nothing to learn from")
    return {"messages": messages}


def _sharegpt(row: Row) -> Row:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"'conversations' is {_what(turns)}; expected a list of turns with 'from' and 'value'")
    system = row.get("system")
    opening = [{"role": "system", "content": system}] if system else []
    return _conversation({"messages": opening + [_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]})


def _turn(turn: Any, where: str) -> Row:
    if isinstance(turn, dict) and "role" in turn:
        return turn
    if not isinstance(turn, dict) or "from" not in turn:
        raise ValueError(f"{where} is {_what(turn)}; expected a turn with 'from' and 'value'")
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in ROLES:
        hint = nearest(str(speaker), list(ROLES))
        raise ValueError(f"{where} is from {escape(str(speaker))!r}; expected one of {', '.join(ROLES)}.{hint}")
    return {"role": ROLES[speaker], "content": turn.get("value")}


def _alpaca(row: Row) -> Row:
    request = _string(row["instruction"], "instruction")
    detail = row.get("input")
    if detail is not None and not isinstance(detail, str):
        raise ValueError(f"'input' is {_what(detail)}; expected a string")
    return {
        "prompt": [{"role": "user", "content": f"{request}\n\n{detail}" if detail else request}],
        "completion": [{"role": "assistant", "content": _string(row["output"], "output")}],
    }


def _text(row: Row) -> Row:
    return {"text": _string(row["text"], "text")}


def _tokenized(row: Row) -> Row:
    ids, labels = row["input_ids"], row["labels"]
    for column, value in (("input_ids", ids), ("labels", labels)):
        if not isinstance(value, list) or not value or not all(isinstance(item, int) for item in value):
            raise ValueError(f"{column!r} is {_what(value)}; expected a list of token ids")
    if len(ids) != len(labels):
        raise ValueError(f"'input_ids' has {len(ids)} tokens and 'labels' {len(labels)}; expected as many")
    return {"input_ids": ids, "labels": labels}


def _unlabelled(row: Row) -> Row:
    ids, mask = row["input_ids"], row.get("assistant_masks")
    if mask is not None and not isinstance(mask, list):
        raise ValueError(f"'assistant_masks' is {_what(mask)}; expected a list of 0 and 1")
    labels = ids
    if mask is not None and isinstance(ids, list):
        labels = [token if kept else IGNORED for token, kept in zip(ids, mask, strict=False)]
    return _tokenized({"input_ids": ids, "labels": labels})


SHAPES = (
    Shape(("input_ids", "labels"), _tokenized),
    Shape(("input_ids",), _unlabelled, canonical=False, optional=("assistant_masks",)),
    Shape(("prompt", "completion"), _prompt_completion),
    Shape(("messages",), _conversation),
    Shape(("conversations",), _sharegpt, canonical=False, optional=("system",)),
    Shape(("instruction", "output"), _alpaca, canonical=False, optional=("input",)),
    Shape(("text",), _text),
    Shape(("prompt",), _question),  # only to measure with: the starting model's own answer completes it
)
"""In order of precedence: a row with `prompt`, `completion` and `text` is a prompt and its completion, as for TRL."""
