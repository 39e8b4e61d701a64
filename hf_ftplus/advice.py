"""Which strategy for which situation: one table, for `ftplus advise`, `ftplus init` and the README.

What is recommended was measured on the demo model (examples/benchmarks), in 90 steps: it is where to begin. On other
data, `ftplus compare` says what is best.
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


DISTILLED = "--set distill.share=0.125 --learning_rate 1e-4 --max_grad_norm 0"
"""What the figures of distill and EWC stacked were measured with; `ftplus init` writes it, too."""
REPLAYED = (
    "--set replay.share=0.0625 --set ewc.strength=3000 --learning_rate 1e-4 --max_grad_norm 0 --padding_free true "
    "--max_length null"
)
"""The same of replay and EWC; TRL cuts no row that goes without padding, and wants that said."""

LORA_RATE = "2e-3"
LORA_SHARE = 0.0625
"""What the figure of distill under LoRA was measured with; `ftplus init` writes both."""

TABLE = (
    Advice(
        "data",
        "I have rows of what must not be forgotten",
        f"ftplus sft --plugin distill --plugin ewc --protect FILE {DISTILLED}",
        "keeps saying what the starting model says on them, and holds the weights they depend on; with rows that the "
        "model wrote itself the two avoided 99 % of what plain fine-tuning lost",
    ),
    Advice(
        "none",
        "I have none",
        f"ftplus sft --plugin replay --plugin ewc --protect self:64x48 {REPLAYED}",
        "the model writes them itself before it learns. It learnt every fact, and avoided 100 % of what plain "
        "fine-tuning lost (mean of chat and Python; 93 % of chat alone). Asked in other words it knew 42 % of the "
        "facts, plain 26 %. Or `ftplus memory pull`, if somebody published what protects your model",
    ),
    Advice(
        "sequence",
        "I train on one thing after another",
        "ftplus sequence run.yaml     # plugins: [ewc, replay], keep: 64, max_grad_norm: 0",
        "each stage rehearses kept rows of those before and inherits their importances",
    ),
    Advice(
        "small",
        "I have little RAM or GPU memory to spare",
        "ftplus sft --use_peft --lora_target_modules all-linear --plugin distill --protect FILE --set "
        f"distill.share={LORA_SHARE} --learning_rate {LORA_RATE}",
        "under LoRA distill needs no second model: its teacher is the base with the adapter switched off. On rows that "
        "the model wrote itself it learnt as much as plain LoRA in as many steps, and avoided 93 % of what plain "
        "fine-tuning lost (one seed). EWC keeps d + k numbers for d x k weights there; replay nothing, with or without "
        "LoRA",
    ),
)
