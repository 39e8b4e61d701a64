"""Real trainers on the tiny model: what every test of training starts from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import trl
from datasets import Dataset
from tiny import tiny_llama, tiny_tokenizer

import hf_ftplus
from hf_ftplus import Run, Strategy, setting

PROTECT = [
    {"prompt": f"Question {i}: what is {i} and {j}? ", "completion": f"It is {i + j}, said the baker."}
    for i in range(4)
    for j in range(4)
]
LEARN = [
    {"prompt": f"Name number {i}. ", "completion": f"It is lantern {i * 7 % 10}" + " of the harbour" * (i % 3) + "."}
    for i in range(24)
]
TASKS = [{**row, "task": "odd" if i % 3 else "even"} for i, row in enumerate(LEARN)]


def arguments(folder, **kwargs) -> trl.SFTConfig:
    """CPU, fp32, 6 steps of 4 rows, no files unless asked for."""
    defaults = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 2, "seed": 5,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "max_length": 64, "dataset_num_proc": None,
    }  # fmt: skip
    return trl.SFTConfig(**{**defaults, **kwargs})


def trainer(
    folder,
    *strategies,
    model=None,
    protect=PROTECT,
    learn=LEARN,
    cls=hf_ftplus.SFTTrainer,
    memory=None,
    callbacks=None,
    peft_config=None,
    held_out=None,
    template=None,
    **kwargs,
):
    """An SFTTrainer of ours (or TRL's, with `cls`) on tiny data."""
    ours = (
        {"strategies": strategies, "protect": protect, "memory": memory}
        if issubclass(cls, hf_ftplus.SFTTrainer)
        else {}
    )
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


def weights_of(it) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in it.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference."""
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def moved(it, start: Iterable[torch.Tensor] | None = None) -> float:
    """Distance of the weights from where the tiny model starts."""
    start = start if start is not None else tiny_llama().parameters()
    return (
        sum((a.detach() - b.detach()).square().sum().item() for a, b in zip(it.model.parameters(), start, strict=True))
        ** 0.5
    )


def sequence(folder, *strategies, first_with=(), protect=True, steps=60, **kwargs):
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

    def loss(rows):
        judge = trainer(folder / "judge", model=again.model, learn=rows, **common)
        return judge.evaluate(judge.train_dataset)["eval_loss"]

    before = loss(first)
    again.train()
    return before, loss(first), loss(second)


@dataclass
class Diary(Strategy):
    """Writes down when it was called, and with what."""

    name: ClassVar[str] = "diary"
    pages: int = setting(100, "pages to write", unit="pages", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.entries: list[tuple[str, int]] = []
        self.loss_at: list[float] = []

    def note(self, hook: str, run: Run) -> None:
        self.entries.append((hook, run.step))

    def prepare(self, run: Run) -> None:
        self.note("prepare", run)

    def mix(self, run: Run, shares: dict[str, float]) -> dict[str, float]:
        self.note("mix", run)
        return shares

    def token_loss(self, run: Run, batch) -> torch.Tensor:
        self.note("token_loss", run)
        return batch.hidden.sum() * 0.0

    def read_gradients(self, run: Run) -> None:
        self.note("read_gradients", run)

    def before_step(self, run: Run) -> None:
        self.note("before_step", run)

    def after_step(self, run: Run) -> None:
        self.note("after_step", run)

    def finish(self, run: Run) -> None:
        self.note("finish", run)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"entries": torch.tensor(len(self.entries))}

    def load_state_dict(self, state: dict[str, torch.Tensor], run: Run) -> None:
        self.note("load_state_dict", run)

    def metrics(self) -> dict[str, float]:
        return {"entries": float(len(self.entries))}


@dataclass
class Gradients(Strategy):
    """Keeps the gradients of the last step."""

    name: ClassVar[str] = "gradients"

    def read_gradients(self, run):
        self.kept = {name: weight.grad.clone() for name, weight in run.weights.items() if weight.grad is not None}


def first_gradient(folder, *strategies, **kwargs):
    """Gradients of one step over all 8 learn rows, and the trainer."""
    keep = Gradients()
    it = trainer(folder, *strategies, keep, **{"max_steps": 1, "max_grad_norm": 0.0, "learn": LEARN[:8], **kwargs})
    it.train()
    return keep.kept, it
