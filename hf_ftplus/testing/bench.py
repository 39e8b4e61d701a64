"""The tiny world that a strategy is judged in: a model, rows, a companion, and ways to train and to compare."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor, nn

from ..callback import StrategyCallback
from ..strategy import Batch, Run, Strategy, setting
from ..trainer import SFTTrainer
from ..weights import trainable

VOCAB = 64
"""Tokens of the laws' model: protect data of your own uses ids below this."""

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """A way to train: all weights, or a LoRA adapter."""

    lora: bool

    def __str__(self) -> str:
        return "LoRA" if self.lora else "full fine-tuning"


@dataclass
class Bench:
    """A strategy to judge, and the tiny world that it is judged in."""

    strategy: Strategy
    folder: Path
    protect: Any = None
    peft: bool = True
    processes: bool = True
    second_run: bool = False
    from_start: bool | None = None
    zero: dict[str, Any] | None = None
    learn: Any = None
    finish: str = "looks"
    """`moves` if the hook may move the weights at the end of training."""
    breaks: dict[str, str] = field(default_factory=dict)
    """Laws that it breaks knowingly, and why."""
    first: dict[bool, Path] = field(default_factory=dict)
    """With `second_run`: output folders of the first run, full and LoRA."""
    law: str = ""
    """The law that is being tried."""

    @property
    def name(self) -> str:
        return self.strategy.name or type(self.strategy).__name__

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Full fine-tuning, and LoRA where wanted."""
        return (Kind(False), Kind(True)) if self.peft else (Kind(False),)

    def demand(self, holds: bool, found: str) -> None:
        """Raise in the name of the law unless it holds."""
        if not holds:
            raise AssertionError(f"Law {self.law!r} is broken by {self.name!r}: {found}.")

    def hold(self, law: Callable[[Bench], None]) -> None:
        """Try one law; whatever goes wrong is an AssertionError that names law and strategy."""
        self.law = law.__name__.removeprefix("law_").replace("_", " ")
        try:
            if self.second_run and not self.first:
                self.first = {kind.lora: self.first_run(kind.lora) for kind in self.kinds}
            law(self)
        except AssertionError:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise AssertionError(f"Law {self.law!r} cannot be tried on {self.name!r}: {said}") from error

    @property
    def excuse(self) -> str:
        """Why it breaks the law that is being tried, if it does so knowingly."""
        return self.breaks.get(self.law, "")

    def equal(self, one: Weights, other: Weights, what: str) -> None:
        """Demand that two sets of tensors agree bit for bit."""
        far = distance(one, other)
        self.demand(far == 0, f"{what} end up to {far:.1e} apart, expected 0")

    def fresh(self, **changes: Any) -> Strategy:
        """A strategy of the same settings that has not trained yet."""
        return dataclasses.replace(self.strategy, **changes)

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def model(self, lora: bool, dropout: float) -> nn.Module:
        """The starting model: always the same weights; those that the first run ended with, for a second run."""
        model = tiny_model(lora, dropout)
        if lora in self.first:
            from safetensors.torch import load_file

            ended = load_file(self.first[lora] / "weights.safetensors")
            with torch.no_grad():
                for name, weight in trainable(model).items():
                    weight.copy_(ended[name])
        return model

    def first_run(self, lora: bool) -> Path:
        """Train once, leaving memory and weights for the runs that are judged."""
        from safetensors.torch import save_file

        folder = self.new_folder()
        trainer = self.train(self.fresh(), lora=lora, output_dir=str(folder))
        save_file(weights_of(trainer), folder / "weights.safetensors")
        return folder

    def plain(self, **kwargs: Any) -> trl.SFTTrainer:
        """A finished run of TRL's own trainer."""
        return self.train(**kwargs)

    def train(
        self,
        *strategies: Strategy,
        lora: bool = False,
        dropout: float = 0.0,
        callback: bool = False,
        resume: str | None = None,
        **args: Any,
    ) -> trl.SFTTrainer:
        """A finished run on random rows; TRL's own trainer if there is no strategy, or with `callback`."""
        from transformers import PrinterCallback

        memory = self.first[lora] / "ftplus" / "memory" if lora in self.first else None
        ours = {"protect": tiny_batches(seed=1) if self.protect is None else self.protect, "memory": memory}
        learn = tiny_rows(seed=0) if self.learn is None else self.learn
        rows = {"train_dataset": learn, "eval_dataset": tiny_rows(seed=2, count=4)}
        kind, extra = trl.SFTTrainer, {}
        if strategies and callback:
            extra = {"callbacks": [StrategyCallback(*strategies, **ours)]}
        elif strategies:
            kind, extra = SFTTrainer, {"strategies": strategies, **ours}
        known = {"args": self._arguments(args), "processing_class": tiny_tokenizer(), **rows}
        trainer = kind(self.model(lora, dropout), **known, **extra)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def _arguments(self, changes: dict[str, Any]) -> trl.SFTConfig:
        usual = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "max_length": 32, "seed": 7}
        bare = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
        quiet = {"logging_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        folder = changes.get("output_dir") or str(self.new_folder())
        return trl.SFTConfig(**{**usual, **bare, **quiet, **changes, "output_dir": folder})


def tiny_model(lora: bool = False, dropout: float = 0.0) -> nn.Module:
    """A Llama of some thousand random weights, the same at every call; global random numbers are left as found."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, attention_dropout=dropout, pad_token_id=0, bos_token_id=1, eos_token_id=1,
            tie_word_embeddings=True,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        if lora:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=dropout))
    return model


def tiny_tokenizer() -> Any:
    """One token a word; the trainer wants a tokenizer although the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t2"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t1", unk_token="t2"
    )


def tiny_rows(seed: int, count: int = 24) -> Any:
    """Rows of random tokens and varied lengths, the first two of each unsupervised."""
    from datasets import Dataset

    generator = random.Random(seed)
    ids = [[generator.randrange(3, VOCAB) for _ in range(generator.randrange(6, 12))] for _ in range(count)]
    return Dataset.from_list([{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids])


def rows_of(tasks: int) -> Any:
    """The same rows, of so many tasks, the last of them the largest."""
    rows = tiny_rows(seed=0)
    return rows.add_column("task", [f"task {min(i % (tasks + 2), tasks - 1) + 1}" for i in range(len(rows))])


def tiny_batches(seed: int, count: int = 12, size: int = 3) -> list[dict[str, Tensor]]:
    """The same as padded micro-batches, ready to protect."""
    from ..examples import collate

    return collate(list(tiny_rows(seed, count)), 0, size)


@dataclass
class Companion(Strategy):
    """Pulls logits together and weights to where they started."""

    name = "companion"
    strength: float = setting(0.1, "how hard it pulls", unit="loss per squared distance", low=0)

    def prepare(self, run: Run) -> None:
        self.start = {name: weight.detach().clone() for name, weight in run.weights.items()}

    def token_loss(self, run: Run, batch: Batch) -> Tensor:
        return 0.01 * self.strength * batch.logits(batch.hidden).square().sum()

    def before_step(self, run: Run) -> None:
        for name, weight in run.weights.items():
            if weight.grad is not None:
                weight.grad.add_(weight.detach() - self.start[name], alpha=self.strength)


@dataclass
class Look(Strategy):
    """Notes the state of the world at each hook, for comparison with one that looks after the strategy between."""

    name = "look"

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, []

    def _look(self, hook: str, run: Run) -> None:
        weights = list(run.weights.values())
        facts = {
            "torch's random numbers": _digest(torch.get_rng_state()),
            "Python's random numbers": hash(random.getstate()),
            "NumPy's random numbers": _numpy_state(),
            "training mode": tuple(module.training for module in run.model.modules()),
            "requires_grad": tuple(weight.requires_grad for weight in run.model.parameters()),
            "whether gradients are recorded": torch.is_grad_enabled(),
        }
        if hook == "read_gradients":
            facts["gradients"] = _digest(*(weight.grad for weight in weights if weight.grad is not None))
        if hook in ("prepare", "finish"):
            facts["weights"] = _digest(*run.model.parameters())
        if hook == "prepare":
            if self.name == "look before":
                for weight in weights:
                    weight.grad = torch.ones_like(weight)
            facts["gradients"] = tuple(weight.grad is not None and bool((weight.grad == 1).all()) for weight in weights)
            if self.name == "look after":
                for weight in weights:
                    weight.grad = None
        self.seen.append((hook, facts))

    def prepare(self, run: Run) -> None:
        self._look("prepare", run)

    def token_loss(self, run: Run, batch: Batch) -> Tensor:
        self._look("token_loss", run)
        return batch.hidden.sum() * 0.0

    def read_gradients(self, run: Run) -> None:
        self._look("read_gradients", run)

    def before_step(self, run: Run) -> None:
        self._look("before_step", run)

    def after_step(self, run: Run) -> None:
        self._look("after_step", run)

    def finish(self, run: Run) -> None:
        self._look("finish", run)


def strategy_of(trainer: trl.SFTTrainer) -> Strategy:
    """The strategy in a trainer that has one."""
    return trainer.ftplus.strategies[0]


def weights_of(trainer: trl.SFTTrainer) -> Weights:
    """A copy of the trained weights by canonical name."""
    return {name: weight.detach().clone() for name, weight in trainable(trainer.model).items()}


def state_of(trainer: trl.SFTTrainer) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in strategy_of(trainer).state_dict().items()}


def distance(one: Weights, other: Weights) -> float:
    """Largest difference; infinite when names or shapes differ, or a number is not finite."""
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return math.inf
    gaps = [(one[name].double() - other[name].double()).abs().max().item() for name in one if one[name].numel()]
    return max((gap if math.isfinite(gap) else math.inf for gap in gaps), default=0.0)


def last_logged(trainer: trl.SFTTrainer, key: str) -> float | None:
    """The last value of a figure in the training log."""
    return next((log[key] for log in reversed(trainer.state.log_history) if key in log), None)


def _digest(*tensors: Tensor) -> int:
    return hash(tuple(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors))


def _numpy_state() -> int:
    import numpy as np

    kind, keys, position, *_ = np.random.get_state()
    return hash((kind, keys.tobytes(), position))


@contextlib.contextmanager
def rng_restored() -> Iterator[None]:
    """Random numbers of the caller come back as they were: training seeds them."""
    import numpy as np

    python, numpy = random.getstate(), copy.deepcopy(np.random.get_state())
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of datasets while dozens of tiny runs go by."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
