"""Find out whether a strategy keeps the laws that all strategies keep; for ours, and for yours.

    from hf_ftplus.testing import check_strategy

    def test_my_strategy_keeps_the_laws():
        check_strategy(MyStrategy())

Each law is a function below (`LAWS`), and trains a Llama of some thousand weights on random tokens, on the CPU, without
network, in about 20 seconds for all of them. What breaks a law raises an AssertionError of one sentence that names law,
strategy and figure.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor, nn

from .errors import UsageError
from .strategy import Batch, Run, Setting, Strategy, setting, settings
from .trainer import NEEDS_TRAINER, SFTTrainer, StrategyCallback
from .weights import trainable

VOCAB = 64
"""Tokens of the laws' model: protect data of your own uses ids below this."""
ZEROS = ("strength", "share", "weight")
SPAWN_SECONDS = 120.0
BYTES_PER_WEIGHT = 16
"""State allowed for each trainable weight: four numbers in fp32."""

WRAPPED = r"\b(base_model\.model|_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|lora_[AB]\.default)\."

Weights = dict[str, Tensor]


def check_strategy(
    strategy: Strategy,
    *,
    protect: Any = None,
    peft: bool = True,
    processes: bool = True,
    second_run: bool = False,
    from_start: bool | None = None,
    zero: dict[str, Any] | None = None,
    laws: Sequence[Callable[[Bench], None]] | None = None,
) -> None:
    """Train with `strategy` in many ways and demand that it keeps every law.

    Args:
        strategy: with the settings to judge it by; the object itself is never trained, only copies are.
        protect: ready micro-batches (or a dict of them) with token ids below `VOCAB`; random ones when left out.
        peft: also judge it on a LoRA adapter. False for a strategy that refuses adapters.
        processes: also train on two processes, which takes some 10 seconds; the class must be importable.
        second_run: judge it in a run that has the memory of a first one. For strategies that only record in the first.
        from_start: whether it does nothing until weights leave their start. Left out: True, unless it mixes tasks.
        zero: settings that turn it off. Left out: `strength`, `share` or `weight` at 0.
        laws: only these, of `LAWS`.

    Raises:
        AssertionError: a law is broken; names law, strategy and figure.
    """
    with tempfile.TemporaryDirectory(prefix="ftplus-laws-") as folder, _quiet(), _rng_restored():
        bench = Bench(strategy, Path(folder), protect, peft, processes, second_run, from_start, zero)
        for law in LAWS if laws is None else laws:
            bench.law = law.__name__.removeprefix("law_").replace("_", " ")
            try:
                if second_run and not bench.first:
                    bench.first = {kind.lora: bench.first_run(kind.lora) for kind in bench.kinds}
                law(bench)
            except AssertionError:
                raise
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                raise AssertionError(f"Law {bench.law!r} cannot be tried on {bench.name!r}: {said}") from error


# ---- the laws --------------------------------------------------------------------------------------------------------


def law_silent_at_zero(bench: Bench) -> None:
    """Turned off, it trains bit-identically to plain TRL, dropout and all."""
    off = bench.zero if bench.zero is not None else _zero(bench)
    for kind in bench.kinds:
        silent, plain = (
            bench.train(bench.fresh(**off), lora=kind.lora, dropout=0.1),
            bench.plain(lora=kind.lora, dropout=0.1),
        )
        bench.equal(_weights(silent), _weights(plain), f"with {off} weights and plain TRL's ({kind})")


def law_same_anywhere(bench: Bench) -> None:
    """8 rows at once = 2 rows four times; a callback = the trainer; one process = two."""
    gentle = {"optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0, "max_steps": 3}
    at_once, in_four = (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    )
    whole = _weights(bench.train(bench.fresh(), **gentle, **at_once))
    plain = _weights(bench.plain(**gentle, **at_once))
    _same_update(
        bench,
        whole,
        _weights(bench.train(bench.fresh(), **gentle, **in_four)),
        plain,
        "8 rows at once and 2 rows four times",
    )
    if not any(bench.strategy.overrides(hook) for hook in NEEDS_TRAINER):
        inside, outside = bench.train(bench.fresh()), bench.train(bench.fresh(), callback=True)
        bench.equal(_weights(inside), _weights(outside), "as a callback, weights and those of the trainer")
    if bench.processes:
        one, other = _two_processes(bench, {**gentle, "per_device_train_batch_size": 4})
        bench.equal(one, other, "two processes' weights and state")
        _same_update(bench, whole, {name: one[f"weights.{name}"] for name in whole}, plain, "one process and two")


def law_remembers(bench: Bench) -> None:
    """Stopped and resumed, it ends where it would have ended, bit for bit, and knows what it would have known."""
    for kind in bench.kinds:
        folder = str(bench.new_folder())
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "output_dir": folder}
        whole = bench.train(bench.fresh(), lora=kind.lora, dropout=0.1, **saving)
        resumed = bench.train(bench.fresh(), lora=kind.lora, dropout=0.1, resume=f"{folder}/checkpoint-3", **saving)
        bench.equal(
            _weights(whole),
            _weights(resumed),
            f"stopped at step 3 and resumed, weights and uninterrupted ones ({kind})",
        )
        bench.equal(
            _state(whole),
            _state(resumed),
            f"stopped at step 3 and resumed, its state and an uninterrupted one ({kind})",
        )


def law_leaves_no_trace(bench: Bench) -> None:
    """Model, gradients and random numbers are as found after each hook; nothing stays in the model after training."""
    for kind in bench.kinds:
        before, after = Look("look before"), Look("look after")
        trainer = bench.train(before, bench.fresh(), after, lora=kind.lora, dropout=0.1)
        for (hook, found), (_, left) in zip(before.seen, after.seen, strict=True):
            changed = ", ".join(sorted(key for key in found if found[key] != left[key]))
            bench.demand(not changed, f"its {hook} changed {changed} ({kind}), expected nothing")
        plain = bench.plain(lora=kind.lora, dropout=0.1)
        usual = _fixtures(plain.model)
        stays = [name or "the model" for name, now in _fixtures(trainer.model).items() if now != usual[name]]
        bench.demand(
            not stays, f"after training something of it stays on {', '.join(stays[:3])}, expected no hook, no patch"
        )
        # the very same weights in both, so that only a trace could tell them apart
        plain.model.load_state_dict(trainer.model.state_dict())
        mine, theirs = (it.evaluate()["eval_loss"] for it in (trainer, plain))
        bench.demand(
            mine == theirs, f"the evaluation loss is {mine:.6f} with it and {theirs:.6f} without, expected the same"
        )


def law_travels_light(bench: Bench) -> None:
    """Its state is a flat dict of tensors under canonical names, no larger than 16 bytes for each trainable weight."""
    for kind in bench.kinds:
        trainer = bench.train(bench.fresh(), lora=kind.lora)
        state = _own(trainer).state_dict()
        odd = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
        bench.demand(not odd, f"state_dict() holds {odd[:1]}, expected only {{str: Tensor}}")
        wrapped = [key for key in state if re.search(WRAPPED, key)]
        bench.demand(
            not wrapped, f"state_dict() calls a tensor {wrapped[:1]}, expected canonical names as in run.weights"
        )
        graphs = [key for key, value in state.items() if value.requires_grad]
        bench.demand(not graphs, f"{graphs[:1]} in state_dict() requires a gradient, expected detached tensors")
        held = sum(value.numel() * value.element_size() for value in state.values())
        allowed = BYTES_PER_WEIGHT * sum(weight.numel() for weight in trainable(trainer.model).values()) + 1024
        bench.demand(held <= allowed, f"its state takes {held} bytes ({kind}), expected at most {allowed}")


def law_introduces_itself(bench: Bench) -> None:
    """`repr` pastes back; it, and each setting, has help; numbers have units; a bad value is refused by name."""
    kind, strategy = type(bench.strategy), bench.strategy
    named = re.fullmatch(r"[a-z][a-z0-9_-]*", kind.name or "")
    bench.demand(bool(named), f"its name is {kind.name!r}, expected lower-case letters, digits, - and _")
    help = (kind.__doc__ or "").strip()
    bench.demand(
        bool(help) and not help.startswith(f"{kind.__name__}("), "its class has no docstring, expected a line of help"
    )
    pasted = _pasted(strategy)
    bench.demand(pasted == strategy, f"{strategy!r} pastes back as {pasted!r}, expected an equal strategy")
    known = {item.name: item for item in settings(kind)}
    bare = [item.name for item in dataclasses.fields(kind) if item.init and item.name not in known]
    bench.demand(not bare, f"{bare[:1]} is a field without setting(), expected default and help for each")
    for item in known.values():
        bench.demand(bool(item.help.strip()), f"setting {item.name} has no help")
        bench.demand(bool(item.unit) or not _needs_unit(item), f"setting {item.name} is a number without a unit")
        where = f"{kind.name}.{item.name}"
        for value in _bad_values(item):
            said = _refusal(kind, item.name, value)
            bench.demand(
                where in said, f"{item.name}={value!r} gives {said!r}, expected a UsageError that names {where}"
            )


def law_gets_along(bench: Bench) -> None:
    """Beside another strategy, before or after it, both act."""
    alone, other = _weights(bench.train(bench.fresh())), _weights(bench.train(Companion()))
    acts = _far(alone, _weights(bench.plain())) > 0
    for order, pair in (("before", [bench.fresh(), Companion()]), ("after", [Companion(), bench.fresh()])):
        both = _weights(bench.train(*pair))
        bench.demand(
            not acts or _far(both, other) > 0, f"{order} another strategy it no longer acts: nothing changes without it"
        )
        bench.demand(_far(both, alone) > 0, f"when it comes {order} another strategy, the other no longer acts")


def law_acts(bench: Bench) -> None:
    """It does nothing at the starting weights, and something as soon as they move."""
    from_start = bench.from_start if bench.from_start is not None else not bench.strategy.overrides("mix")
    for kind in bench.kinds:
        if from_start:
            step = {"max_steps": 1, "optim": "sgd", "learning_rate": 1e-2, "logging_steps": 1, "max_grad_norm": 0.0}
            first = bench.train(bench.fresh(), lora=kind.lora, **step)
            far = _far(_weights(first), _weights(bench.plain(lora=kind.lora, **step)))
            bench.demand(
                far <= 1e-6, f"it moves weights by {far:.1e} at the start, before any left it ({kind}), expected 0"
            )
            penalty = _logged(first, f"{bench.name}/penalty")
            bench.demand(not penalty, f"its penalty is {penalty} at the start ({kind}), expected 0")
        moved = bench.train(bench.fresh(), lora=kind.lora, max_steps=6, logging_steps=6)
        far = _far(_weights(moved), _weights(bench.plain(lora=kind.lora, max_steps=6)))
        bench.demand(far > 0, f"after 6 steps weights are {far:.1e} from plain TRL's ({kind}): its gradient is 0")
        penalty = _logged(moved, f"{bench.name}/penalty")
        bench.demand(
            penalty is None or penalty > 0, f"its penalty is {penalty} after 6 steps ({kind}), expected more than 0"
        )


LAWS = (
    law_introduces_itself,
    law_silent_at_zero,
    law_acts,
    law_remembers,
    law_leaves_no_trace,
    law_travels_light,
    law_gets_along,
    law_same_anywhere,
)


# ---- where they are tried --------------------------------------------------------------------------------------------


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

    def equal(self, one: Weights, other: Weights, what: str) -> None:
        """Demand that two sets of tensors agree bit for bit."""
        far = _far(one, other)
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

            model.load_state_dict(load_file(self.first[lora] / "weights.safetensors"), strict=False)
        return model

    def first_run(self, lora: bool) -> Path:
        """Train once, leaving memory and weights for the runs that are judged."""
        from safetensors.torch import save_file

        folder = self.new_folder()
        trainer = self.train(self.fresh(), lora=lora, output_dir=str(folder))
        save_file(_weights(trainer), folder / "weights.safetensors")
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
        rows = {"train_dataset": tiny_rows(seed=0), "eval_dataset": tiny_rows(seed=2, count=4)}
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


def tiny_batches(seed: int, count: int = 12, size: int = 3) -> list[dict[str, Tensor]]:
    """The same as padded micro-batches, ready to protect."""
    from .data import collate

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

    def before_step(self, run: Run) -> None:
        self._look("before_step", run)

    def after_step(self, run: Run) -> None:
        self._look("after_step", run)

    def finish(self, run: Run) -> None:
        self._look("finish", run)


# ---- two processes ---------------------------------------------------------------------------------------------------


def _two_processes(bench: Bench, args: dict[str, Any]) -> tuple[Weights, Weights]:
    """Weights and state at the end of a run on two gloo processes, of each."""
    from safetensors.torch import load_file

    folder = bench.new_folder()
    kind = type(bench.strategy)
    reachable = "<locals>" not in kind.__qualname__ and kind.__module__ != "__main__"
    advice = "move it to a module, or give processes=False"
    bench.demand(reachable, f"{kind.__qualname__} cannot be imported by another process: {advice}")
    protect = bench.protect if bench.protect is None or isinstance(bench.protect, dict) else {"protect": bench.protect}
    task = {
        "module": kind.__module__, "file": inspect.getfile(kind), "class": kind.__qualname__, "args": args,
        "settings": {item.name: getattr(bench.strategy, item.name) for item in settings(kind)},
        "protect": protect and {name: [_listed(batch) for batch in batches] for name, batches in protect.items()},
        "first": {str(int(lora)): str(path) for lora, path in bench.first.items()},
    }  # fmt: skip
    (folder / "task.json").write_text(json.dumps(task))
    ranks = []
    try:
        for rank in range(2):
            inside = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
            path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            environment = {**os.environ, **path, **{key: str(value) for key, value in inside.items()}}
            command = f"from hf_ftplus.testing import _one_rank; _one_rank({str(folder)!r}, {rank})"
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            ranks.append(subprocess.Popen([sys.executable, "-c", command], env=environment, **pipes))
        for rank, process in enumerate(ranks):
            errors = process.communicate(timeout=SPAWN_SECONDS)[1].strip()
            if process.returncode:
                why = errors.splitlines()[-1] if errors else f"exit code {process.returncode}"
                raise RuntimeError(f"process {rank} of two failed: {why}")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return load_file(folder / "rank0.safetensors"), load_file(folder / "rank1.safetensors")


def _one_rank(folder: str, rank: int) -> None:
    """What each of the two processes does."""
    from datetime import timedelta

    from safetensors.torch import save_file

    torch.set_num_threads(1)
    task = json.loads((Path(folder) / "task.json").read_text())
    bound = timedelta(seconds=SPAWN_SECONDS / 2)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=bound
    )
    given = task["protect"]
    protect = given and {name: [_tensors(batch) for batch in batches] for name, batches in given.items()}
    first = {lora == "1": Path(path) for lora, path in task["first"].items()}
    bench = Bench(_class(task)(**task["settings"]), Path(folder), protect, first=first)
    trainer = bench.train(bench.fresh(), **task["args"])
    if trainer.accelerator.num_processes != 2:
        raise RuntimeError(f"trained on {trainer.accelerator.num_processes} processes, expected 2")
    found = {f"weights.{name}": weight for name, weight in _weights(trainer).items()}
    found |= {
        f"state.{name}": tensor.detach().clone().contiguous() for name, tensor in _own(trainer).state_dict().items()
    }
    save_file(found, Path(folder) / f"rank{rank}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _listed(batch: dict[str, Tensor]) -> dict[str, list]:
    return {key: tensor.tolist() for key, tensor in batch.items()}


def _tensors(batch: dict[str, list]) -> dict[str, Tensor]:
    return {key: torch.tensor(values) for key, values in batch.items()}


def _class(task: dict[str, str]) -> type[Strategy]:
    """A strategy class by its module, or by its file when the module has no importable name (as under pytest)."""
    try:
        module = importlib.import_module(task["module"])
    except ImportError:
        from .plugins import load

        return load(f"{task['file']}:{task['class']}")
    return getattr(module, task["class"])


# ---- small things ----------------------------------------------------------------------------------------------------


def _same_update(bench: Bench, one: Weights, other: Weights, plain: Weights, what: str) -> None:
    """Equal to rounding; and far closer than what the strategy does, where it does more than rounding."""
    far, effect = _far(one, other), _far(one, plain)
    allowed = min(1e-6, effect / 10) if effect > 2e-6 else 1e-6
    bench.demand(far <= allowed, f"{what} end with weights up to {far:.1e} apart, expected at most {allowed:.1e}")


def _own(trainer: trl.SFTTrainer) -> Strategy:
    """The strategy in a trainer that has one."""
    return trainer.ftplus.strategies[0]


def _weights(trainer: trl.SFTTrainer) -> Weights:
    """A copy of the trained weights by canonical name."""
    return {name: weight.detach().clone() for name, weight in trainable(trainer.model).items()}


def _state(trainer: trl.SFTTrainer) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in _own(trainer).state_dict().items()}


def _far(one: Weights, other: Weights) -> float:
    """Largest difference; infinite when names or shapes differ, or a number is not finite."""
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return math.inf
    gaps = [(one[name].double() - other[name].double()).abs().max().item() for name in one if one[name].numel()]
    return max((gap if math.isfinite(gap) else math.inf for gap in gaps), default=0.0)


def _logged(trainer: trl.SFTTrainer, key: str) -> float | None:
    """The last value of a figure in the training log."""
    return next((log[key] for log in reversed(trainer.state.log_history) if key in log), None)


def _zero(bench: Bench) -> dict[str, Any]:
    """The setting that turns a strategy off, at 0."""
    known = [item.name for item in settings(type(bench.strategy))]
    found = [name for name in ZEROS if name in known]
    wanted = "strength, share or weight; give it one, or say check_strategy(..., zero={...}) what turns it off"
    bench.demand(bool(found), f"none of its settings is called {wanted}")
    return {found[0]: 0}


def _pasted(strategy: Strategy) -> Any:
    """What `repr` evaluates to; the error if it does not."""
    kind = type(strategy)
    try:
        written = repr(strategy).replace(kind.__qualname__, kind.__name__, 1)  # classes inside functions, as in tests
        return eval(written, {kind.__name__: kind, "nan": math.nan, "inf": math.inf})
    except Exception as error:
        return error


def _needs_unit(item: Setting) -> bool:
    """Numbers do, shares (between 0 and 1) do not."""
    number = isinstance(item.default, (int, float)) and not isinstance(item.default, bool)
    return number and not item.choices and not (item.high == 1 and (item.low == 0 or item.above == 0))


def _bad_values(item: Setting) -> list[Any]:
    """Values that its declaration rules out."""
    bad = [item.low - 1] if item.low is not None else []
    bad += [item.high + 1] if item.high is not None else []
    bad += [item.above] if item.above is not None else []
    bad += ["none of these"] if item.choices else []
    return bad + ([math.nan, "a word"] if isinstance(item.default, (int, float)) else [])


def _refusal(kind: type[Strategy], name: str, value: Any) -> str:
    try:
        return f"{kind(**{name: value})!r}"
    except UsageError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__} instead of UsageError"


def _digest(*tensors: Tensor) -> int:
    return hash(tuple(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors))


def _numpy_state() -> int:
    import numpy as np

    kind, keys, position, *_ = np.random.get_state()
    return hash((kind, keys.tobytes(), position))


def _fixtures(model: nn.Module) -> dict[str, Any]:
    """What somebody may have hung onto each module and weight: numbers of hooks, and methods put over its own."""
    kinds = [key for key in vars(nn.Module()) if key.endswith("_hooks")]
    found: dict[str, Any] = {
        name: ([len(getattr(module, kind)) for kind in kinds], _patches(module), module.training)
        for name, module in model.named_modules()
    }
    for name, weight in model.named_parameters():
        hooks = (weight._backward_hooks, getattr(weight, "_post_accumulate_grad_hooks", None))
        found[f"weight {name}"] = ([len(kept) for kept in hooks if kept], weight.requires_grad)
    return found


def _patches(module: nn.Module) -> dict[str, str]:
    """Methods put over the module's own, by who wrote them; the trainer itself puts some."""
    own = {key: value for key, value in vars(module).items() if callable(value) and not isinstance(value, type)}
    return {key: getattr(value, "__qualname__", type(value).__name__) for key, value in own.items()}


@contextlib.contextmanager
def _rng_restored() -> Iterator[None]:
    """Random numbers of the caller come back as they were: training seeds them."""
    import numpy as np

    python, numpy = random.getstate(), copy.deepcopy(np.random.get_state())
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of datasets while dozens of tiny runs go by."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
