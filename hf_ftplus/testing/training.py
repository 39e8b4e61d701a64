"""Real trainers on the tiny model and a few rows of text: what a test of training starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import trl
from datasets import Dataset
from torch import Tensor

from ..strategy import Run, Strategy
from ..trainer import SFTTrainer
from .tiny import tiny_llama, tiny_tokenizer

Rows = list[dict[str, str]]

PROTECT: Rows = [
    {"prompt": f"Question {i}: what is {i} and {j}? ", "completion": f"It is {i + j}, said the baker."}
    for i in range(4)
    for j in range(4)
]
LEARN: Rows = [
    {"prompt": f"Name number {i}. ", "completion": f"It is lantern {i * 7 % 10}" + " of the harbour" * (i % 3) + "."}
    for i in range(24)
]


def arguments(folder: str | Path, **kwargs: Any) -> trl.SFTConfig:
    """CPU, fp32, 6 steps of 4 rows, no files unless asked for; `kwargs` are those of SFTConfig."""
    defaults = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-3,
        "logging_steps": 2, "seed": 5, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "disable_tqdm": True, "max_length": 64, "dataset_num_proc": None,
    }  # fmt: skip
    return trl.SFTConfig(**{**defaults, **kwargs})


def trainer(
    folder: str | Path,
    *strategies: Strategy,
    model: Any = None,
    protect: Any = PROTECT,
    learn: Sequence[dict[str, Any]] = LEARN,
    cls: type[trl.SFTTrainer] = SFTTrainer,
    memory: str | Path | None = None,
    callbacks: list[Any] | None = None,
    peft_config: Any = None,
    held_out: Any = None,
    template: str | None = None,
    **kwargs: Any,
) -> Any:
    """An SFTTrainer of ours (or TRL's, with `cls`) on tiny data; `kwargs` are those of SFTConfig."""
    ours = {"strategies": strategies, "protect": protect, "memory": memory} if issubclass(cls, SFTTrainer) else {}
    return cls(
        model if model is not None else tiny_llama(),
        args=arguments(folder, **kwargs),
        train_dataset=Dataset.from_list(list(learn)),
        eval_dataset=held_out,
        processing_class=tiny_tokenizer(template) if template else tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
        **ours,
    )


def weights_of(it: trl.SFTTrainer) -> dict[str, Tensor]:
    """A copy of all weights and buffers of its model."""
    return {name: weight.detach().clone() for name, weight in it.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether they are, bit for bit."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference."""
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def sequence(
    folder: Path,
    *strategies: Strategy,
    first_with: Sequence[Strategy] = (),
    protect: bool = True,
    steps: int = 60,
    **kwargs: Any,
) -> tuple[float, float, float]:
    """Learn one thing, then another with `strategies`; (loss on the first before and after, loss on the second).

    The second run protects the rows of the first, or has its memory if a strategy was there (`first_with`).
    """
    first = [
        {"prompt": f"Colour {i}: ", "completion": ["blue", "green", "amber"][i % 3] + " as ever."} for i in range(24)
    ]
    second = [
        {"prompt": f"Fruit {i}: ", "completion": ["pear", "plum", "fig"][i % 3] + " of course!"} for i in range(24)
    ]
    common = {
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
        "logging_steps": 1000,
        **kwargs,
    }
    taught = trainer(folder / "first", *first_with, learn=first, protect=None, max_steps=40, **common)
    taught.train()
    memory = folder / "first" / "ftplus" / "memory" if first_with and strategies else None
    again = trainer(
        folder / "second", *strategies, model=taught.model, learn=second, protect=first if protect else None,
        memory=memory, max_steps=steps, **common,
    )  # fmt: skip

    def loss(rows: Rows) -> float:
        judge = trainer(folder / "judge", model=again.model, learn=rows, **common)
        return judge.evaluate(judge.train_dataset)["eval_loss"]

    before = loss(first)
    again.train()
    return before, loss(first), loss(second)


@dataclass
class Gradients(Strategy):
    """Keeps the gradients of the last step."""

    name: ClassVar[str] = "gradients"

    def read_gradients(self, run: Run) -> None:
        self.kept = {name: weight.grad.clone() for name, weight in run.weights.items() if weight.grad is not None}


def first_gradient(folder: str | Path, *strategies: Strategy, **kwargs: Any) -> tuple[dict[str, Tensor], Any]:
    """Gradients of one step over the first 8 learn rows as an optimizer sees them, and the trainer."""
    keep = Gradients()
    it = trainer(folder, *strategies, keep, **{"max_steps": 1, "max_grad_norm": 0.0, "learn": LEARN[:8], **kwargs})
    it.train()
    return keep.kept, it
