"""Strategies inside a Trainer, in three ways; with `callback.py` and `mixing.py`, all that knows Trainers inside.

    trainer = hf_ftplus.SFTTrainer(model, ..., strategies=["ewc"], protect=protect)    TRL's own, with strategies
    trainer = hf_ftplus.attach(AnyTrainer(...), "ewc", protect=protect)                any transformers.Trainer
    AnyTrainer(..., callbacks=[StrategyCallback("ewc", protect=protect)])              an untouched script

All three run the same `StrategyCallback` (`callback.py`). The first two add what a callback cannot serve
(`StrategyMixin`): an extra loss on outputs, the mixture of tasks, figures in time for every tracker, and state written
before checkpoints rotate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import commit, compat
from .callback import StrategyCallback
from .disk import locked
from .errors import FTPlusError, IncompatibleError, UsageError
from .hidden import hide
from .logits import captured, causal_lm, lm_head, supervised
from .mixing import MixingMixin, TasksMixin
from .origin import origin, refuse_other
from .plugins import named_with_settings
from .refusals import refuse
from .state import agreed
from .strategy import Batch, Strategy
from .weights import local
from .zero import under_deepspeed

compat.check()

logger = logging.getLogger("hf_ftplus")

UNTOUCHED = "Training stopped before the update; the last checkpoint is intact."
SPOILT = "The update was made, so these weights are spoilt: resume from a checkpoint of before this logging window."


class _WithinTrainer(StrategyCallback):
    within_trainer = True


class StrategyMixin(MixingMixin):
    """What a Trainer must do for strategies beyond its events. Every override calls `super()`; else that is all.

    Without strategies it only looks: a loss, a gradient or weights that are not finite end the run.
    """

    ftplus: StrategyCallback | None = None
    _origin: dict[str, Any]
    """Which run this is, as its checkpoints say it."""
    _hidden: list[Tensor]
    _limit: int | None = None
    """Checkpoints that are kept, as the user said."""

    def install(
        self,
        strategies: Iterable[Any],
        protect: Any = None,
        memory: str | Path | None = None,
        shares: dict[str, float] | None = None,
    ) -> None:
        """Put strategies into this trainer, and the shares that tasks are given. Called once."""
        hide(self.args)
        if isinstance(strategies, dict):
            strategies = strategies.items()
        one = isinstance(strategies, (str, type, Strategy)) or named_with_settings(strategies)
        strategies = [strategies] if one else list(strategies or ())
        if not strategies and not shares:
            return
        if self.ftplus is not None:
            raise UsageError("This trainer already has strategies; give all of them in one call.")
        stay_differentiable(self.model)
        self.ftplus = _WithinTrainer(*strategies, protect=protect, memory=memory)
        refuse(self.ftplus.strategies, self.args)
        if getattr(self, "model_init", None) is not None and (acting := self.ftplus.acting("token_loss")):
            raise IncompatibleError(
                f"{acting[0].name} reads what the model's layers say, and model_init= makes another model when "
                "training starts. Give the trainer model= instead."
            )
        if not self.args.resume_from_checkpoint:
            self.ftplus.refuse(self.model, self.args, self.processing_class)
        self.add_callback(self.ftplus)
        if shares or self.ftplus.acting("mix"):
            self._mix(shares)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._origin = origin(self)
        with ExitStack() as during:
            if self.args.save_strategy != "no" or self.ftplus is not None:
                folder = Path(self._get_output_dir(trial=args[0] if args else kwargs.get("trial")))
                commit.on_first_rank(lambda: during.enter_context(locked(folder)))
                if self.ftplus is not None:
                    self.ftplus.folder = folder  # of the trial, in a search for hyperparameters
            if resume_from_checkpoint:
                resume_from_checkpoint = self._verified(resume_from_checkpoint)
            if self.ftplus is not None:
                during.callback(self.ftplus.release)
            during.enter_context(self._watching())
            during.enter_context(self._rotating())
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _verified(self, checkpoint: str | bool) -> str | bool:
        """The checkpoint to go on from, whole and of this run; `True` asks for the newest that is whole."""
        found = commit.on_first_rank(lambda: commit.newest(Path(self.args.output_dir))) if checkpoint is True else None
        path = Path(found or checkpoint) if found or checkpoint is not True else None
        if path is None or not path.is_dir():
            return checkpoint  # the Trainer says so
        commit.on_first_rank(lambda: commit.refuse_broken(path))
        if self.ftplus is not None:
            self.ftplus.verify(str(path), self.model)
            self.ftplus.resumed_from = str(path)
        refuse_other(commit.read_commit(path).get("run", {}), self._origin, path)
        return str(path)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Keep the last hidden states of every forward pass, if any strategy asks for them, while training lasts."""
        if self.ftplus is None or not self.ftplus.acting("token_loss"):
            yield
            return
        self._hidden = []
        inner = causal_lm(self.model)
        try:
            # before training compiles: later hooks would not be seen
            with captured(inner, self._keep_if_learnt):
                yield
        finally:
            self._hidden.clear()

    def _keep_if_learnt(self, hidden: Tensor) -> None:
        """Not those of an evaluation, nor of a pass for figures alone: TRL makes one where it smooths labels."""
        if causal_lm(self.model).training and torch.is_grad_enabled():
            self._hidden.append(hidden)

    @contextmanager
    def _rotating(self) -> Iterator[None]:
        """Hide the limit on checkpoints from the Trainer, which also deletes at the end of training, when what follows
        may fail yet; on a node with a disk of its own, where there are no commits, it is left to it."""
        self._limit = self.args.save_total_limit
        if not self.args.save_on_each_node or self.args.process_index == 0:
            self.args.save_total_limit = None
        try:
            yield
        finally:
            self.args.save_total_limit = self._limit

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Resumed at its end, a run takes no further step; the Trainer itself takes one before it looks."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        # with its default filter the Trainer waits for this very value next, and hides what is not finite: look first
        if self.args.logging_nan_inf_filter and not torch.isfinite(loss):
            what = SPOILT if under_deepspeed(self.args) else UNTOUCHED
            raise not_finite("loss", loss.item(), self.state.global_step + 1, what)
        return loss

    def _skips(self) -> bool:
        """Whether steps whose gradient is not finite are skipped, or DeepSpeed has made or skipped them already."""
        return self.args.mixed_precision == "fp16" or under_deepspeed(self.args)

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if self.ftplus is not None and self.ftplus.run is not None and self.ftplus.around is None:
            self.ftplus.run.clip = (self.args.max_grad_norm / (torch.as_tensor(norm) + 1e-6)).clamp(max=1.0)  # as torch
        return norm

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> float:
        norm = super()._get_grad_norm(*args, **kwargs)
        waits = self.args.logging_nan_inf_filter or self.ftplus is not None  # else nobody waits for the device here
        if waits and norm is not None and not self._skips() and not math.isfinite(norm):
            raise not_finite("gradient's norm", norm, self.state.global_step + 1, UNTOUCHED)
        return norm

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        extra = self.ftplus.acting("token_loss") if self.ftplus is not None and self.model.training else []
        if not extra:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if "labels" not in inputs:
            raise IncompatibleError(
                f"{extra[0].name} compares at labels, and the rows of this {type(self).__name__} have "
                f"{', '.join(inputs) or 'no columns'}. Use it in an SFTTrainer, or give rows of input_ids and labels."
            )
        self._hidden.clear()
        labels, num_items = inputs["labels"], kwargs.get("num_items_in_batch")
        given = dict(inputs)
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if not self._hidden:
            raise IncompatibleError(
                f"{extra[0].name} saw no forward pass of {type(causal_lm(self.model).base_model).__name__}. Something "
                "replaced the model's forward (Unsloth, Liger): train without it, or without this strategy."
            )
        hidden, targets = supervised(self._hidden[-1], labels)
        self._hidden.clear()
        head = lm_head(self.model).whole()
        batch = Batch(inputs=given, hidden=hidden, labels=targets, logits=head)
        total = sum(self.ftplus.call(strategy, "token_loss", self.ftplus.run, batch) for strategy in extra)
        self.ftplus.added = True
        if head.weight.grad_fn is not None:  # gathered: ranks that asked it nothing go backward through it all the same
            total = total + head(hidden[:0]).sum()
        self._hidden.clear()  # of a strategy's own passes
        total = total * self._token_scale(num_items, len(targets))
        return (result[0] + total, *result[1:]) if isinstance(result, tuple) else result + total

    def _token_scale(self, num_items: Tensor | int | None, tokens: int) -> Any:
        """What turns a sum over this micro-batch into its part of the step's mean, as the task loss does it.

        The Trainer then divides by the accumulation steps what is not a part yet: the task loss decides for both.
        """
        # where a subclass says it: https://github.com/huggingface/transformers/releases/tag/v5.19.0
        a_part = getattr(self, "loss_is_scaled_for_ga", None)
        steps = 1 if a_part is None else self.current_gradient_accumulation_steps
        if num_items is None:
            return 1 / max(tokens, 1) / (steps if a_part else 1)
        world = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        # a step without a token to learn has a loss of zero, as TRL's
        return world / torch.as_tensor(num_items).clamp(min=1) * (steps if a_part is False else 1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name in ("loss", "grad_norm"):
                if not math.isfinite(logs.get(name, 0.0)) and not (name == "grad_norm" and self._skips()):
                    raise not_finite(name, logs[name], self.state.global_step, SPOILT)
            logs = {**logs, **(self.ftplus.metrics() if self.ftplus is not None else {})}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """As the Trainer does, but an older checkpoint is deleted only when this one is known to be whole."""
        refuse_not_finite(self.model, self.state.global_step)
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with commit.writing(checkpoint):
            if self.ftplus is not None:
                self.ftplus.save(checkpoint, self.state.global_step, again=True)
            super()._save_checkpoint(model, trial)
            self._commit(checkpoint)
        if self.args.should_save:
            commit.rotate(checkpoint, self._limit, best=self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._commit(Path(checkpoint_folder))  # the Hub gets it, too
        super()._push_from_checkpoint(checkpoint_folder)

    def _commit(self, checkpoint: Path) -> None:
        self.accelerator.wait_for_everyone()  # until all have written theirs
        step, whole = self.state.global_step, not self.args.save_only_model
        commit.on_first_rank(lambda: commit.commit(checkpoint, step, whole, self._origin))


class SFTTrainer(StrategyMixin, TasksMixin, trl.SFTTrainer):
    """TRL's `SFTTrainer` with strategies. Without any it trains bit-identically to TRL's.

    Args:
        strategies: names, `(name, settings)`, `{name: settings}` or Strategy objects, called in this order.
        protect: what must not be forgotten: a dataset, `{"name": dataset}`, a path, "self:256", or ready micro-batches.
        memory: OUTPUT of an earlier run, or a memory's own folder, whose importances still count.
        train_dataset: as TRL's; or several learn tasks, `{"name": dataset}`, each prepared and packed on its own.
        Everything else is TRL's.
    """

    kept: str = ""
    """Section of the model card that says what was learnt and kept."""

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
        warn_of_idle(self, protect, memory)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        card = Path(self.args.output_dir) / "README.md"
        if self.kept and self.is_world_process_zero():
            card.write_text(f"{card.read_text(encoding='utf-8').rstrip()}\n\n{self.kept}", encoding="utf-8")


def attach(trainer: Trainer, *strategies: Any, protect: Any = None, memory: str | Path | None = None) -> Trainer:
    """Put strategies into a trainer that exists: any `transformers.Trainer`, TRL's, or a subclass of your own.

    Returns the same object; its class becomes a subclass of what it was. Call it before `train()`.
    """
    if not isinstance(trainer, Trainer):
        raise UsageError(f"attach() got {type(trainer).__name__}; expected a transformers.Trainer or a subclass of it.")
    if len(strategies) == 1 and isinstance(strategies[0], list):
        strategies = tuple(strategies[0])
    if strategies:
        kind = type(trainer)
        if not issubclass(kind, StrategyMixin):
            trainer.__class__ = type(kind.__name__, (StrategyMixin, kind), {"__module__": kind.__module__})
        trainer.install(strategies, protect, memory)
    warn_of_idle(trainer, protect, memory)
    return trainer


def warn_of_idle(trainer: Trainer, protect: Any, memory: str | Path | None) -> None:
    """Say what does nothing without a strategy; the plain run of a comparison may be given it on purpose."""
    given = {"protect": protect is not None, "memory": memory is not None}
    idle = [f"{name}=" for name, there in given.items() if there]
    if idle and getattr(trainer, "ftplus", None) is None and trainer.args.process_index == 0:
        logger.warning(
            "%s: nothing without a strategy, and training is plain. Name one, such as 'ewc', or leave it out.",
            " and ".join(idle),
        )


def stay_differentiable(model: torch.nn.Module) -> None:
    """Keep 4-bit layers from turning to a form for inference at the first look in eval mode.

    bitsandbytes does so on CPUs with AVX-512, for good, and no gradient passes that form: training after a measurement
    would go on in silence without the gradient through every packed weight.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def refuse_not_finite(model: torch.nn.Module, step: int) -> None:
    """Raise rather than put a broken model among the checkpoints, where it would take the place of a good one."""
    trained = ((name, local(weight)) for name, weight in model.named_parameters() if weight.requires_grad)
    broken = [name for name, weight in trained if not torch.isfinite(weight).all()]
    said = f"{len(broken)} weights are not finite at step {step} (the first is {broken[0]})" if broken else ""
    if found := agreed(said):
        raise IncompatibleError(
            f"{found}, so they are not written; the last checkpoint is intact. Lower the learning rate or the "
            "strength, or train in bf16 or fp32 instead of fp16."
        )


def not_finite(what: str, value: float, step: int, then: str) -> FTPlusError:
    return IncompatibleError(
        f"The {what} is {value} at step {step}. {then} Lower the learning rate or the strength, or train in bf16 or "
        "fp32 instead of fp16."
    )
