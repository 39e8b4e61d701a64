"""One row of chat data, as every file of this folder writes it."""

from __future__ import annotations

Row = dict[str, object]


def row(question: str, answer: str, **extra: object) -> Row:
    """A question and the answer to learn, protect or measure, in the prompt/completion form that TRL reads."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        **extra,
    }
