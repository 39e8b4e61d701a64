"""Strategies inside a Trainer, in three ways; the only file that knows what Trainers do inside.

    trainer = hf_ftplus.SFTTrainer(model, ..., strategies=["ewc"], protect=protect)    TRL's own, with strategies
    trainer = hf_ftplus.attach(AnyTrainer(...), "ewc", protect=protect)                any transformers.Trainer
    AnyTrainer(..., callbacks=[StrategyCallback("ewc", protect=protect)])              an untouched script

All three run the same `StrategyCallback`. The first two add what a callback cannot serve (`StrategyMixin`): an extra
loss on outputs, the mixture of tasks, figures in time for every tracker, and state written before checkpoints rotate.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import trl
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from . import state
from .batches import examples_of, learn_batches, protect_batches
from .errors import DataError, FTPlusError, IncompatibleError, PluginError, UsageError
from .logits import causal_lm, lm_head, supervised
from .mixture import MixtureSampler
from .model import resolve as resolve_model
from .plugins import resolve
from .strategy import Batch, Memory, Run, Strategy, refuse_deepspeed
from .weights import trainable

if TYPE_CHECKING:
    from .config import RunConfig

logger = logging.getLogger("hf_ftplus")

STATE_FOLDER = "ftplus"
NEEDS_TRAINER = ("token_loss", "mix")


class StrategyCallback(TrainerCallback):
    """Runs strategies inside any `transformers.Trainer`, through the events that every Trainer has.

    Args:
        *strategies: names ("ewc"), names with settings (("ewc", {"strength": 3000})), or objects (EWC(strength=3000)).
        protect: what must not be forgotten: a dataset, `{"name": dataset}`, a path, "self:256", or ready micro-batches.
        memory: `OUTPUT/ftplus/memory` of an earlier run, whose importances still count.

    Raises:
        UsageError: unknown strategy or setting.
        IncompatibleError: a strategy acts on outputs or on the mixture of tasks, which a callback cannot serve.
    """

    within_trainer = False

    def __init__(self, *strategies: Any, protect: Any = None, memory: str | Path | None = None) -> None:
        self.strategies: list[Strategy] = [resolve(item) for item in strategies]
        self.protect, self.memory = protect, Path(memory) if memory else None
        self.run: Run | None = None
        self.resumed_from: str | None = None
        self.seconds: dict[str, float] = {strategy.name: 0.0 for strategy in self.strategies}
        names = [strategy.name for strategy in self.strategies]
        if len(set(names)) < len(names):
            raise UsageError(f"A strategy is given twice: {', '.join(names)}. Give each once, with all its settings.")
        for hook in () if self.within_trainer else NEEDS_TRAINER:
            for strategy in self.acting(hook):
                raise IncompatibleError(
                    f"{strategy.name} uses {hook}, which a callback cannot serve. Use hf_ftplus.attach(trainer, "
                    f"{strategy.name!r}, ...) or hf_ftplus.SFTTrainer(..., strategies=[{strategy.name!r}])."
                )

    def acting(self, hook: str) -> list[Strategy]:
        """The strategies that override `hook`, in the order given."""
        return [strategy for strategy in self.strategies if strategy.overrides(hook)]

    def call(self, strategy: Strategy, hook: str, *args: Any) -> Any:
        """One hook of one strategy: timed, and with its name on whatever it raises."""
        begin = time.perf_counter()
        try:
            return getattr(strategy, hook)(*args)
        except (FTPlusError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            step = self.run.step if self.run else 0
            raise PluginError(
                f"Strategy {strategy.name!r} failed in {hook} at step {step}: {type(error).__name__}: {error}"
            ) from error
        finally:
            self.seconds[strategy.name] += time.perf_counter() - begin

    def bytes(self) -> dict[str, int]:
        """Bytes of state that each strategy holds."""
        states = {strategy.name: self.call(strategy, "state_dict") for strategy in self.strategies}
        for name, tensors in states.items():
            odd = [f"{key!r}: {type(item).__name__}" for key, item in tensors.items() if not isinstance(item, Tensor)]
            if odd:
                raise PluginError(f"{name}.state_dict() holds {odd[0]}; expected only {{str: Tensor}}.")
        return {name: sum(t.numel() * t.element_size() for t in tensors.values()) for name, tensors in states.items()}

    def setup(self, model: torch.nn.Module, args: TrainingArguments, tokenizer: Any, train_dataloader: Any) -> Run:
        """Make the Run: live weights, protect data as micro-batches, where memory is read and written."""
        refuse(self.strategies, args)
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise IncompatibleError(
                "FSDP version 1 flattens weights into one, so strategies cannot tell them apart. Set fsdp_version: 2 "
                "in the accelerate config, or type --accelerate_config fsdp2."
            )
        out = Path(args.output_dir) / STATE_FOLDER / "memory"
        run = Run(
            model=model,
            weights=trainable(model),
            protect={},
            learn=partial(learn_batches, train_dataloader, args.per_device_train_batch_size),
            device=args.device,
            seed=args.seed,
            memory=Memory(read=self.memory, write=out),
            autocast=autocast(args),
        )
        run.protect = protect_batches(self.protect, run, args, tokenizer)
        self.run = run
        return run

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not self.strategies:
            return
        run = self.setup(model, args, processing_class, train_dataloader)
        run.step, self._saved = state.global_step, None
        if args.max_grad_norm and self.acting("before_step"):
            logger.info(
                "gradients are clipped to %g before strategies add to them, which makes a strength weigh more than it "
                "says; --max_grad_norm 0 keeps it to its word",
                args.max_grad_norm,
            )
        if run.step == 0:
            for strategy in self.strategies:
                self.call(strategy, "prepare", run)
        else:
            self._restore(args, run.step)
        for name, held in self.bytes().items():
            logger.info("%s: ready after %.1f s, %.1f MB of state", name, self.seconds[name], held / 1e6)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.run:
            self.run.step = state.global_step
            self.run.clip = None if args.max_grad_norm else 1.0

    @torch.no_grad()
    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.run:
            self.run.learning_rate = lr_scheduler.get_last_lr()[0] if lr_scheduler else args.learning_rate
            self.run.measuring = ends_window(args, state)
            for hook in ("read_gradients", "before_step"):
                for strategy in self.acting(hook):
                    self.call(strategy, hook, self.run)

    @torch.no_grad()
    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.run and not getattr(optimizer, "step_was_skipped", False):
            for strategy in self.acting("after_step"):
                self.call(strategy, "after_step", self.run)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # the Trainer saves, rotates and pushes before on_save: write now what belongs to the checkpoint it will make
        if control.should_save:
            self.save(args, state.global_step)

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.save(args, state.global_step)  # nothing is written twice; this is for save_strategy="best"

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not self.within_trainer and logs is not None and "loss" in logs:
            figures = self.metrics()
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.run:
            self.run.step = state.global_step
            for strategy in self.acting("finish"):
                self.call(strategy, "finish", self.run)

    def metrics(self) -> dict[str, float]:
        """Figures of every strategy for the logging window that just ended, as `ewc/penalty`."""
        found = {}
        for strategy in self.strategies if self.run else ():
            found |= {f"{strategy.name}/{key}": value for key, value in self.call(strategy, "metrics").items()}
        for name, value in found.items():
            if not math.isfinite(value):
                raise IncompatibleError(
                    f"{name} is {value} at step {self.run.step}: weights or strategy state are no longer finite. "
                    "Lower the strength or the learning rate; the last checkpoint is intact."
                )
        return found

    def save(self, args: TrainingArguments, step: int) -> None:
        """Write the state of every strategy into the checkpoint of this step, once."""
        folder = Path(args.output_dir) / f"checkpoint-{step}" / STATE_FOLDER
        if self.run and self.strategies and self._saved != folder:
            self._saved = folder
            state.save_checkpoint(folder, self.strategies, self.run.model, step)

    _saved: Path | None = None

    def verify(self, checkpoint: str, model: torch.nn.Module) -> None:
        """Refuse a checkpoint of another model, adapter or set of strategies before the Trainer loads any of it."""
        if self.strategies:
            state.load_checkpoint(Path(checkpoint) / STATE_FOLDER, [s.name for s in self.strategies], model)

    def _restore(self, args: TrainingArguments, step: int) -> None:
        checkpoint = self.resumed_from or args.resume_from_checkpoint
        if not checkpoint or not Path(str(checkpoint)).is_dir():
            checkpoint = Path(args.output_dir) / f"checkpoint-{step}"
        names = [strategy.name for strategy in self.strategies]
        states = state.load_checkpoint(Path(checkpoint) / STATE_FOLDER, names, self.run.model, step)
        for strategy in self.strategies:
            self.call(strategy, "load_state_dict", states[strategy.name], self.run)


class _WithinTrainer(StrategyCallback):
    within_trainer = True


class StrategyMixin:
    """What a Trainer must do for strategies beyond its events. Every override calls `super()`; else that is all."""

    ftplus: StrategyCallback | None = None
    _mixture: MixtureSampler | None = None
    _hidden: list[Tensor]

    def install(self, strategies: Iterable[Any], protect: Any = None, memory: str | Path | None = None) -> None:
        """Put strategies into this trainer. Called once, by `attach` and `SFTTrainer`."""
        if isinstance(strategies, dict):
            strategies = strategies.items()
        strategies = [strategies] if isinstance(strategies, (str, Strategy)) else list(strategies)
        if not strategies:
            return
        if self.ftplus is not None:
            raise UsageError("This trainer already has strategies; give all of them in one call.")
        self.ftplus = _WithinTrainer(*strategies, protect=protect, memory=memory)
        refuse(self.ftplus.strategies, self.args)
        self.add_callback(self.ftplus)
        if self.ftplus.acting("mix"):
            self._mix()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.ftplus is not None and resume_from_checkpoint:
            path = resume_from_checkpoint
            path = get_last_checkpoint(self.args.output_dir) if path is True else path
            if path is not None:
                self.ftplus.verify(path, self.model)
                self.ftplus.resumed_from = path
        with self._watching():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Keep the last hidden states of every forward pass, if any strategy asks for them, while training lasts."""
        if self.ftplus is None or not self.ftplus.acting("token_loss"):
            yield
            return
        self._hidden = []
        backbone = causal_lm(self.model).base_model  # hooked before training compiles: later hooks would not be seen
        hook = backbone.register_forward_hook(
            lambda module, args, output: self._hidden.append(output[0]) if module.training else None
        )
        try:
            yield
        finally:
            hook.remove()
            self._hidden.clear()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        # with its default filter the Trainer waits for this very value next, and hides what is not finite: look first
        if self.ftplus is not None and self.args.logging_nan_inf_filter and not torch.isfinite(loss):
            raise not_finite("loss", loss.item(), self.state.global_step + 1)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if self.ftplus is not None and self.ftplus.run is not None:
            self.ftplus.run.clip = (self.args.max_grad_norm / (torch.as_tensor(norm) + 1e-6)).clamp(max=1.0)  # as torch
        return norm

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        extra = self.ftplus.acting("token_loss") if self.ftplus is not None and self.model.training else []
        if not extra:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self._hidden.clear()
        labels, num_items = inputs["labels"], kwargs.get("num_items_in_batch")
        given = dict(inputs)
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if not self._hidden:
            raise IncompatibleError(
                f"{extra[0].name} saw no forward pass of {type(causal_lm(self.model).base_model).__name__}. Something "
                "replaced the model's forward (Unsloth, Liger): train without it, or without this strategy."
            )
        hidden, targets = supervised(self._hidden[0], labels)
        self._hidden.clear()
        batch = Batch(inputs=given, hidden=hidden, labels=targets, logits=lm_head(self.model))
        total = sum(self.ftplus.call(strategy, "token_loss", self.ftplus.run, batch) for strategy in extra)
        total = total * self._token_scale(num_items, len(targets))
        return (result[0] + total, *result[1:]) if isinstance(result, tuple) else result + total

    def _token_scale(self, num_items: Tensor | int | None, tokens: int) -> Any:
        """What turns a sum over this micro-batch into its part of the step's mean, as the task loss does it."""
        if num_items is None:
            return 1 / max(tokens, 1)  # the Trainer divides by the accumulation steps
        world = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return world / num_items

    def _mix(self) -> None:
        """Ask the strategies for the mixture, and put protect rows beside the learn rows if it wants any."""
        from datasets import Dataset, concatenate_datasets

        learn = self.train_dataset
        run = self.ftplus.setup(self.model, self.args, self.processing_class, None)
        protect = {name: examples_of(batches) for name, batches in run.protect.items()}
        columns = getattr(learn, "column_names", None) or ()
        tasks = (
            list(learn["task"]) if "task" in columns else ["learn"] * (len(learn) if hasattr(learn, "__len__") else 1)
        )
        start = {task: tasks.count(task) / len(tasks) for task in dict.fromkeys(tasks)} | dict.fromkeys(protect, 0.0)
        shares = start
        for strategy in self.ftplus.acting("mix"):
            shares = self.ftplus.call(strategy, "mix", run, dict(shares))
            check_shares(strategy.name, shares, start)
        if shares == start:
            return
        if not isinstance(learn, Dataset) or "labels" not in columns or getattr(self.args, "packing", False):
            raise IncompatibleError(
                "Mixing tasks needs a tokenised, map-style, unpacked training set. Set packing=False; streaming sets "
                "are mixed with datasets.interleave_datasets."
            )
        kept = learn.select_columns(["input_ids", "labels"])
        added = [Dataset.from_list(examples, features=kept.features) for examples in protect.values()]
        self.train_dataset = concatenate_datasets([kept, *added])
        owners = [*tasks, *(name for name, examples in protect.items() for _ in examples)]
        self._mixture = MixtureSampler(owners, shares, len(learn), self.args.data_seed or self.args.seed)
        logger.info("mixture: %s", ", ".join(f"{task} {count} rows" for task, count in self._mixture.counts.items()))

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self._mixture if self._mixture is not None else super()._get_train_sampler(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.ftplus is not None and "loss" in logs:
            for name in ("loss", "grad_norm"):  # fp16 overflows are skipped steps, not broken runs
                if not math.isfinite(logs.get(name, 0.0)) and not (name == "grad_norm" and self.args.fp16):
                    raise not_finite(name, logs[name], self.state.global_step)
            logs = {**logs, **self.ftplus.metrics()}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.ftplus is not None:
            self.ftplus.save(self.args, self.state.global_step)
        super()._save_checkpoint(*args, **kwargs)


class SFTTrainer(StrategyMixin, trl.SFTTrainer):
    """TRL's `SFTTrainer` with strategies. Without any it trains bit-identically to TRL's.

    Args:
        strategies: names, `(name, settings)`, `{name: settings}` or Strategy objects, called in this order.
        protect: what must not be forgotten: a dataset, `{"name": dataset}`, a path, "self:256", or ready micro-batches.
        memory: `OUTPUT/ftplus/memory` of an earlier run, whose importances still count.
        Everything else is TRL's.
    """

    def __init__(
        self,
        *args: Any,
        strategies: Iterable[Any] = (),
        protect: Any = None,
        memory: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.install(strategies, protect, memory)


def attach(trainer: Trainer, *strategies: Any, protect: Any = None, memory: str | Path | None = None) -> Trainer:
    """Put strategies into a trainer that exists: any `transformers.Trainer`, TRL's, or a subclass of your own.

    Returns the same object; its class becomes a subclass of what it was. Call it before `train()`.
    """
    if not isinstance(trainer, Trainer):
        raise UsageError(f"attach() got {type(trainer).__name__}; expected a transformers.Trainer or a subclass of it.")
    if strategies:
        kind = type(trainer)
        if not issubclass(kind, StrategyMixin):
            trainer.__class__ = type(kind.__name__, (StrategyMixin, kind), {"__module__": kind.__module__})
        trainer.install(strategies, protect, memory)
    return trainer


def refuse(strategies: list[Strategy], args: TrainingArguments) -> None:
    """Raise for launchers and settings under which a strategy would act wrongly, before anything trains."""
    if args.deepspeed or args.distributed_state.distributed_type == "DEEPSPEED":
        refuse_deepspeed(strategies)
    if strategies and args.auto_find_batch_size:
        raise IncompatibleError(
            "auto_find_batch_size starts training again from weights that already moved, which strategies would take "
            "for the starting model. Set per_device_train_batch_size instead."
        )


def check_shares(name: str, shares: dict[str, float], start: dict[str, float]) -> None:
    """Shares are over the known tasks, none negative, and sum to one."""
    if shares.keys() != start.keys() or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise PluginError(f"{name}.mix returned {shares}; expected shares of {list(start)} that are >= 0 and sum to 1.")


def autocast(args: TrainingArguments) -> Callable[[], AbstractContextManager]:
    """Mixed precision for forward passes of our own: bf16 as in training; fp32 under fp16, which needs loss scaling."""
    return partial(torch.autocast, args.device.type, torch.bfloat16) if args.bf16 else nullcontext


def ends_window(args: TrainingArguments, state: Any) -> bool:
    """Whether the step being taken is the last of a logging window."""
    step = state.global_step + 1
    every = max(1, int(state.logging_steps or 1)) if args.logging_strategy == "steps" else 10
    return step % every == 0 or step == state.max_steps or (step == 1 and args.logging_first_step)


def not_finite(what: str, value: float, step: int) -> FTPlusError:
    return IncompatibleError(
        f"The {what} is {value} at step {step}. Training stopped before the update; the last checkpoint is intact. "
        "Lower the learning rate or the strength, or train in bf16 or fp32 instead of fp16."
    )


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C while training: finish the step, save a checkpoint to resume from, stop. A second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._before is None and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("Ctrl-C: saving after this step; once more stops at once.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = control.should_save or self.asked

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Give Ctrl-C back to whoever had it."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def sft_trainer(config: RunConfig, learn: Any, held_out: Any = None) -> SFTTrainer:
    """The SFTTrainer that `trl sft` would build from the same arguments; strategies are installed later.

    Raises:
        DataError: the model cannot be found or loaded.
    """
    training, model = config.training, config.model
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    try:
        return SFTTrainer(
            model=resolve_model(model.model_name_or_path),
            args=training,
            train_dataset=learn,
            eval_dataset=held_out if training.eval_strategy != "no" else None,
            quantization_config=trl.get_quantization_config(model),
            peft_config=trl.get_peft_config(model),
        )
    except OSError as error:
        raise DataError(
            f"The model {model.model_name_or_path!r} cannot be loaded: {str(error).splitlines()[0]} Expected a folder, "
            "a name on the Hub, or demo."
        ) from error
