"""Which strategy for which situation: one table, for `ftplus advise`, `ftplus init` and the README.

What is recommended was measured on the demo model (examples/benchmarks): it is where to begin. What is best on other
data, `ftplus compare` says.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """One situation, and what to begin with."""

    key: str
    situation: str
    take: str
    """The command, without what is the user's own."""
    why: str


TABLE = (
    Advice(
        "data",
        "I have rows of what must not be forgotten",
        "ftplus sft --plugin distill --plugin ewc --protect FILE",
        "keeps saying what the starting model says on them, and holds the weights they depend on; stacked they kept "
        "most of all that was measured",
    ),
    Advice(
        "none",
        "I have none",
        "ftplus sft --plugin distill --plugin ewc --protect self:64",
        "the model writes them itself before it learns: 99 % kept where plain loses most, every fact learnt; or "
        "`ftplus memory pull`, if somebody published what protects your model",
    ),
    Advice(
        "sequence",
        "I train on one thing after another",
        "ftplus sequence run.yaml     # plugins: [ewc, replay], keep: 64",
        "each stage rehearses kept rows of those before and inherits their importances",
    ),
    Advice(
        "memory",
        "I have no memory to spare",
        "ftplus sft --use_peft --plugin ewc --protect FILE",
        "under LoRA EWC keeps d + k numbers for d x k weights, and distill needs no second model; replay needs nothing "
        "at all, with or without LoRA",
    ),
)


def markdown() -> str:
    """The table as it stands in the README."""
    rows = [f"| {item.situation} | `{item.take}` | {item.why} |" for item in TABLE]
    return "\n".join(["| situation | begin with | why |", "|---|---|---|", *rows])
