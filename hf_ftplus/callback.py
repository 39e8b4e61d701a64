"""Strategies behind the events that every Trainer has; `trainer.py` adds what events cannot serve."""

from __future__ import annotations

import ctypes
import logging
import math
import time
import traceback
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from . import state
from .batches import SelfText, learn_batches, protect_batches, same_batches, warn_of_learnt_tokens
from .errors import FTPlusError, IncompatibleError, PluginError, UsageError
from .examples import text_tokenizer
from .hookspecs import HOST
from .logits import causal_lm
from .mixture import check_drawn, rows_drawn
from .plugins import origin, resolve
from .precision import autocast, scale_of, unscale
from .refusals import clipping, refuse, refuse_encoder_decoder, refuse_parts
from .specs import as_tasks
from .strategy import Memory, Run, Strategy, acts_on_gradients
from .tensorfile import whole
from .weights import sharded, trainable
from .zero import Around, under_deepspeed

logger = logging.getLogger("hf_ftplus")

STATE_FOLDER = "ftplus"
RESCUED = "The trained model is saved in"
"""Begins what is said where an error would have taken it along."""
NEEDS_TRAINER = ("token_loss", "mix")
NEEDS_WEIGHTS = ("prepare", "load_state_dict", "finish")
"""Hooks between which and the optimizer's steps a strategy compares weights."""


class StrategyCallback(TrainerCallback):
    """Runs strategies inside any `transformers.Trainer`, through the events that every Trainer has.

    Args:
        *strategies: names ("ewc"), names with settings (("ewc", {"rows": 128})), or objects (EWC(rows=128)).
        protect: what must not be forgotten: a dataset, `{"name": dataset}`, a path, "self:256", or ready micro-batches.
        memory: OUTPUT of an earlier run, or a memory's own folder, whose importances still count.

    Raises:
        UsageError: unknown strategy or setting.
        IncompatibleError: a strategy acts on outputs or on the mixture of tasks, which a callback cannot serve.
    """

    within_trainer = False

    def __init__(self, *strategies: Any, protect: Any = None, memory: str | Path | None = None) -> None:
        self.strategies: list[Strategy] = [resolve(item) for item in strategies]
        self.protect, self.memory = protect, Memory.at(memory) if memory else None
        self.run: Run | None = None
        self.around: Around | None = None
        """Under DeepSpeed, what gives strategies their moments."""
        self.added = False
        """Whether what strategies add to the loss was asked for, in this training."""
        self.folder: Path | None = None
        """Where training writes, if that is not `output_dir`."""
        self.resumed_from: str | None = None
        self.learn_rows: int | None = None
        """Learn rows with which the training set begins, where protect rows follow them."""
        self.told = False
        """Whether the user was told which protect rows are learnt, too."""
        self._silent: set[str] = set()
        """Strategies that could not say their figures."""
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
        looks = self.around is not None and hook in NEEDS_WEIGHTS and acts_on_gradients(strategy)
        try:
            with self.around.whole() if looks else nullcontext():
                return getattr(strategy, hook)(*args)
        except (FTPlusError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            step = self.run.step if self.run else 0
            raise PluginError(
                f"Strategy {strategy.name!r}{_of(strategy)} failed in {hook} at step {step}: {type(error).__name__}: "
                f"{error} ({_place(error)})"
            ) from error
        finally:
            self.seconds[strategy.name] += time.perf_counter() - begin

    def bytes(self) -> dict[str, int]:
        """Bytes of state that each strategy holds."""
        states = self.states().items()
        return {name: sum(t.numel() * t.element_size() for t in tensors.values()) for name, tensors in states}

    def states(self) -> dict[str, dict[str, Tensor]]:
        """What each strategy would go on from."""
        found = {strategy.name: self.call(strategy, "state_dict") for strategy in self.strategies}
        for name, tensors in found.items():
            odd = [f"{key!r}: {type(item).__name__}" for key, item in tensors.items() if not isinstance(item, Tensor)]
            if odd:
                raise PluginError(f"{name}.state_dict() holds {odd[0]}; expected only {{str: Tensor}}.")
        return found

    def _check_memory(self, model: torch.nn.Module) -> None:
        """Refuse memory of other weights where the model's are in a folder; else a sample of them tells (`sketch.py`).

        A name on the Hub does not say of which revision the loaded weights are.
        """
        from .shared.base import check

        source = str(getattr(getattr(causal_lm(model), "config", None), "_name_or_path", "") or "")
        if self.memory is not None and source and Path(source).is_dir():
            check(self.memory, source)

    def setup(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        tokenizer: Any,
        train_dataloader: Any,
        written: SelfText | None = None,
    ) -> Run:
        """Make the Run: live weights, protect data as micro-batches, where memory is read and written."""
        refuse(self.strategies, args)
        run = self._sight(model, args, tokenizer)
        run.learn = lambda rows: learn_batches(
            train_dataloader, args.per_device_train_batch_size, min(rows, self.learn_rows or rows)
        )
        run.protect = protect_batches(self.protect, run, args, written)
        if self.run is not None:
            run.tasks, run.rows = self.run.tasks, self.run.rows
        self.run = run
        return run

    def refuse(self, model: torch.nn.Module, args: TrainingArguments, tokenizer: Any) -> None:
        """Let every strategy refuse what it cannot train, before anything is asked of the model."""
        run = self._sight(model, args, tokenizer)
        for strategy in self.strategies:
            self.call(strategy, "refuse", run)

    def _sight(self, model: torch.nn.Module, args: TrainingArguments, tokenizer: Any) -> Run:
        """The Run before a row is read: its protect tasks have names only."""
        refuse_parts(self.strategies, model, args)
        if self.protect is not None or self.acting("mix") or self.acting("token_loss"):
            refuse_encoder_decoder(model, [strategy.name for strategy in self.strategies])
        out = Path(self.folder or args.output_dir) / STATE_FOLDER / "memory"
        return Run(
            model=model,
            weights=trainable(model),
            protect={name: [] for name in as_tasks(self.protect)},
            learn=lambda rows: [],
            device=args.device,
            seed=args.seed,
            memory=Memory(read=self.memory, write=out),
            autocast=autocast(args),
            clip=None if args.max_grad_norm and not (self.within_trainer or under_deepspeed(args)) else 1.0,
            strategies=tuple(self.strategies),
            tokenizer=text_tokenizer(tokenizer),
        )

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._alone(state)

    def _alone(self, state: TrainerState) -> None:
        """A trainer's strategies are of one callback: two would write to the same folder of a checkpoint."""
        names = [strategy.name for strategy in self.strategies]
        first, others = vars(state).setdefault("_ftplus", (id(self), names)) if names else (id(self), names)
        if first != id(self):
            raise UsageError(
                f"This trainer has strategies twice ({', '.join(others)}; {', '.join(names)}); expected one set. Give "
                f"them together: StrategyCallback({', '.join(map(repr, [*others, *names]))}, protect=...)."
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        train_dataloader: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        if not self.strategies:
            return
        if state.is_hyper_param_search and not self.within_trainer:
            raise IncompatibleError(
                "A callback is not told the folder of a trial of hyperparameter_search. Use hf_ftplus.attach(trainer, "
                f"{', '.join(repr(strategy.name) for strategy in self.strategies)}, ...) instead."
            )
        self._alone(state)
        checkpoint = self._checkpoint(args, state) if state.global_step else None
        mixed = self.run.protect if self.run and self.acting("mix") else None
        written = SelfText(Path(args.output_dir), checkpoint)
        run = self.setup(model, args, processing_class, train_dataloader, written)
        if checkpoint and mixed is not None and not same_batches(mixed, run.protect):
            raise IncompatibleError(
                "The protect text among the training rows was written by other weights than those that the run began "
                "with. Make the trainer with the starting model; resume_from_checkpoint brings the trained weights."
            )
        run.step, self._saved, self.added = state.global_step, None, False
        if under_deepspeed(args) and any(map(acts_on_gradients, self.strategies)):
            before = partial(self._before_step, args, state, lr_scheduler)
            after = self._after_step if self.acting("after_step") else None
            self.around = Around(optimizer.optimizer, run.weights.values(), before, after)
        said = clipping(self.strategies, args, bool(run.protect), run.memory.read is not None)
        if said and args.process_index == 0:
            logger.warning("%s", said)
        if checkpoint is None:
            self._check_memory(model)
            if not self.told and args.process_index == 0:
                warn_of_learnt_tokens(getattr(train_dataloader, "dataset", None), self.learn_rows, run.protect)
            for hook in ("refuse", "prepare"):
                for strategy in self.strategies:
                    self.call(strategy, hook, run)
            if self.memory is not None and not run.memory.asked and args.process_index == 0:
                logger.warning("%s: no strategy of this run has read it; ewc and si do, unless decay is 0", self.memory)
        else:
            self._restore(checkpoint, self.strategies, run.step)
        for name, held in self.bytes().items():
            logger.info("%s: ready after %.1f s, %.1f MB of state", name, self.seconds[name], held / 1e6)
        give_back_memory()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.run:
            self.run.step = state.global_step
            clipped = args.max_grad_norm and self.around is None  # DeepSpeed clips later
            self.run.clip = None if clipped else 1.0  # within a trainer, until it has clipped

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.run and not self.added and (silent := self.acting("token_loss")):
            raise IncompatibleError(
                f"{silent[0].name} adds to the loss, and was never asked: this trainer computes its loss past "
                "hf_ftplus, in a compute_loss or training_step of its own. Call super().compute_loss() there; or, of a "
                "class that replaces only compute_loss, attach() strategies to an instance."
            )
        if self.run and self.around is None:
            acting = [it.name for it in self.strategies if acts_on_gradients(it)]
            if acting and all(weight.grad is None for weight in self.run.weights.values()):
                raise IncompatibleError(
                    f"No weight has a gradient when {', '.join(acting)} is to act on it: something takes the "
                    "optimizer's step within the backward pass. Expected an optimizer that steps after it, such as "
                    "adamw_torch."
                )
            if acting and not args.max_grad_norm:
                unscale(optimizer)
            self._scale = scale_of(optimizer) if self.acting("after_step") else None
            self._before_step(args, state, lr_scheduler)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.run and self.around is None and not self._skipped(optimizer):
            self._after_step()

    def _skipped(self, optimizer: Any) -> bool:
        """Whether fp16 overflowed: accelerate does not see it of an optimizer whose fused step skips by itself, but the
        loss scale falls."""
        return getattr(optimizer, "step_was_skipped", False) or (
            self._scale is not None and scale_of(optimizer) < self._scale
        )

    @torch.no_grad()
    def _before_step(self, args: TrainingArguments, state: TrainerState, lr_scheduler: Any) -> None:
        self.run.learning_rate = lr_scheduler.get_last_lr()[0] if lr_scheduler else args.learning_rate
        self.run.measuring = ends_window(args, state)
        for hook in ("read_gradients", "before_step"):
            for strategy in self.acting(hook):
                self.call(strategy, hook, self.run)

    @torch.no_grad()
    def _after_step(self) -> None:
        for strategy in self.acting("after_step"):
            self.call(strategy, "after_step", self.run)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The Trainer saves, rotates and pushes before on_save: write now what belongs to the checkpoint it will make.
        # Within a trainer `_save_checkpoint` does, and no folder is left behind when evaluation fails in between.
        if control.should_save:
            self._save_alone(args, state)

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._save_alone(args, state)  # nothing is written twice; this is for save_strategy="best"

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not self.within_trainer and logs is not None and "loss" in logs:
            figures = self.metrics()
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not self.run:
            return
        self.run.step = state.global_step
        try:
            if args.load_best_model_at_end and state.best_model_checkpoint:  # whose weights were put back: so is memory
                self._restore(Path(state.best_model_checkpoint), self.acting("finish"))
            for strategy in self.acting("finish"):
                self.call(strategy, "finish", self.run)
        except Exception as error:  # what was trained would die with the caller
            error.args = (f"{error} {rescued(self.run.model, args, processing_class)}",)
            raise
        except KeyboardInterrupt:
            logger.warning(rescued(self.run.model, args, processing_class))
            raise
        finally:
            self.release()

    def release(self) -> None:
        """Leave DeepSpeed's optimizer as it was found."""
        if self.around is not None:
            self.around.remove()
            self.around = None

    def metrics(self) -> dict[str, float]:
        """Figures of every strategy for the logging window that just ended, as `ewc/penalty`."""
        found = {}
        for strategy in self.strategies if self.run else ():
            found |= self._figures(strategy)
        for name, value in found.items():
            if not math.isfinite(value):
                raise IncompatibleError(
                    f"{name} is {value} at step {self.run.step}: weights or strategy state are no longer finite. "
                    "Lower the strength or the learning rate; the last checkpoint is intact."
                )
        return found

    def _figures(self, strategy: Strategy) -> dict[str, float]:
        """Those of one; none, and a warning, where it cannot say them: no run ends for a figure."""
        try:
            found = {f"{strategy.name}/{key}": value for key, value in self.call(strategy, "metrics").items()}
            for value in found.values():
                math.isfinite(value)  # raises for text, which float() may take for a number
            return {name: float(value) for name, value in found.items()}  # as trackers and checkpoints take them
        except (PluginError, AttributeError, TypeError, ValueError, OverflowError) as error:
            if strategy.name not in self._silent:
                logger.warning("%s says no figures, and training goes on: %s", strategy.name, error)
            self._silent.add(strategy.name)
            return {}

    def _save_alone(self, args: TrainingArguments, state: TrainerState) -> None:
        if not self.within_trainer:
            self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)

    def save(self, checkpoint: Path, step: int, again: bool = False) -> None:
        """Write the state of every strategy into a checkpoint, which is of this step: once, unless `again`."""
        folder = checkpoint / STATE_FOLDER
        if self.run and (self.strategies or self.run.tasks) and (again or self._saved != folder):
            self._saved = folder
            self._plugins = published(self.strategies) if self._plugins is None else self._plugins
            facts = {"mixture": rows_drawn(self.run.tasks), "plugins": self._plugins}
            settings = state.settings_of(self.strategies)
            state.save_checkpoint(folder, self.states(), self.run.model, step, settings=settings, **facts)

    _scale: float | None = None
    """Loss scale of fp16 before the step, where anybody acts after it."""
    _saved: Path | None = None
    _plugins: dict[str, tuple[str, str]] | None = None

    def verify(self, checkpoint: str, model: torch.nn.Module) -> None:
        """Refuse one of another model, adapter, mixture, strategies or settings before the Trainer loads any of it."""
        folder = Path(checkpoint) / STATE_FOLDER
        if self.strategies:
            state.check_checkpoint(folder, state.settings_of(self.strategies), model)
        check_drawn(state.checkpoint_fact(folder, "mixture"), self.run.tasks if self.run else {})

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The one that training goes on from."""
        given = self.resumed_from or args.resume_from_checkpoint
        if given and Path(str(given)).is_dir():
            return Path(given)
        guess = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        found = guess / TRAINER_STATE_NAME
        if not found.is_file() or str(TrainerState.load_from_json(str(found)).log_history) != str(state.log_history):
            raise IncompatibleError(
                f"Training goes on from a checkpoint at step {state.global_step} that is not {guess}, and a callback "
                "is not told which. Set TrainingArguments(resume_from_checkpoint=FOLDER) to the folder given to "
                "train(), or use hf_ftplus.attach()."
            )
        return guess

    def _restore(self, checkpoint: Path, strategies: list[Strategy], step: int | None = None) -> None:
        settings = state.settings_of(self.strategies)
        states = state.load_checkpoint(checkpoint / STATE_FOLDER, settings, self.run.model, step)
        for strategy in strategies:
            self.call(strategy, "load_state_dict", states[strategy.name], self.run)


def published(strategies: list[Strategy]) -> dict[str, tuple[str, str]]:
    """Distribution and version of each strategy that a stranger published."""
    found = {strategy.name: origin(type(strategy)) for strategy in strategies}
    return {name: (who, version) for name, (who, version) in found.items() if version and who != HOST}


def _place(error: BaseException) -> str:
    """`idea.py:19`, where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def _of(strategy: Strategy) -> str:
    return "".join(f" of {who} {version}" for who, version in published([strategy]).values())


def give_back_memory() -> None:
    """Return what preparing freed to device and system, before training asks for its own.

    glibc keeps what was freed: 1.3 GB after the Fisher pass over a model of 135 M weights.
    """
    clear_device_cache(garbage_collection=True)
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def ends_window(args: TrainingArguments, state: Any) -> bool:
    """Whether the step being taken is the last of a logging window."""
    step = state.global_step + 1
    every = max(1, int(state.logging_steps or 1)) if args.logging_strategy == "steps" else 10
    return step % every == 0 or step == state.max_steps or (step == 1 and args.logging_first_step)


def rescued(model: torch.nn.Module, args: TrainingArguments, tokenizer: Any) -> str:
    """Save the trained model where `trainer.save_model()` would, since an error is about to be raised; says where."""
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)  # transformers only logs that it cannot
        found = {}
        if sharded(model.parameters()):
            for name, tensor in model.state_dict().items():
                tensor = whole(tensor)  # all ranks take part
                found |= {name: tensor} if args.should_save else {}
        if args.should_save:
            model.save_pretrained(args.output_dir, state_dict=found or None)
            if tokenizer is not None:
                tokenizer.save_pretrained(args.output_dir)
    except Exception as error:
        return f"The trained model could not be saved: {type(error).__name__}: {error}"
    return f"{RESCUED} {args.output_dir}."
