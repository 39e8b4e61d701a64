"""The trainer that a run's configuration asks for; what TRL and transformers refuse of it, as one sentence each."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

import trl

from .errors import DataError, FTPlusError, StorageError, UsageError
from .model import to_train, unloadable
from .pools import EVALUATED, together
from .shared.hub import of_push, refusal
from .trainer import SFTTrainer, stay_differentiable

if TYPE_CHECKING:
    from .config import RunConfig


def raised_in(error: BaseException) -> str:
    """The module whose code raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "")


def refused(error: OSError | ValueError, config: RunConfig) -> FTPlusError | None:
    """What to say of what TRL, transformers, PEFT, accelerate or the disk raised; None where it is none of theirs."""
    name = config.model.model_name_or_path
    if isinstance(error, OSError):
        if of_push(error):
            return StorageError(refusal(config.training.hub_model_id or config.training.output_dir, error))
        if error.errno is not None:  # of the system; what transformers raises about a model has no number
            return StorageError(f"Preparing the run failed: {error}. Free some space, or mind who may write.")
        return unloadable(name, error)
    if "trust_remote_code" in str(error):
        return UsageError(
            f"The model {name!r} brings code of its own, which may do anything. Read it, then type --trust_remote_code "
            "to let it run."
        )
    if "padding_free" in str(error) and "max_length" in str(error):
        return UsageError(
            "Rows that go without padding are not cut, and TRL wants that said: type --max_length null beside "
            "--padding_free true; or --packing true, which cuts them."
        )
    if "chat template" in str(error):
        return DataError(
            f"The learn rows are chats, and the tokenizer of {name!r} has no chat template. Type --chat_template_path "
            "NAME_OR_FILE (of a model that has one, or a Jinja file), or give rows of text."
        )
    module = raised_in(error)
    if module.startswith("transformers.models.auto."):
        return unloadable(name, error)
    if (package := module.partition(".")[0]) in ("trl", "transformers", "peft", "accelerate"):
        return UsageError(f"{package} refuses these settings: {error}")
    return None


def sft_trainer(config: RunConfig, learn: Any, held_out: Any = None) -> SFTTrainer:
    """The SFTTrainer that `trl sft` would build from the same arguments; strategies are installed later.

    Raises:
        DataError: the model cannot be found or loaded, or has no template for chats.
        UsageError: it brings code that was not allowed to run; or TRL, transformers, PEFT or accelerate refuses
            settings.
        StorageError: the disk failed (full, or not to be read or written).
    """
    training, model = config.training, config.model
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    adapter = trl.get_peft_config(model)
    if adapter is not None and model.model_revision != "main":
        adapter.revision = model.model_revision  # or whoever loads the adapter puts it on another base
    try:
        trainer = SFTTrainer(
            model=to_train(model.model_name_or_path),
            args=training,
            train_dataset=learn,
            eval_dataset=held_out if training.eval_strategy != "no" else None,
            quantization_config=trl.get_quantization_config(model),
            peft_config=adapter,
        )
    except (OSError, ValueError) as error:
        if (said := refused(error, config)) is None:
            raise
        raise said from error
    stay_differentiable(trainer.model)
    best = (training.metric_for_best_model or "").removeprefix("eval_")
    if isinstance(trainer.eval_dataset, dict) and best in EVALUATED:
        trainer.eval_dataset = together(trainer.eval_dataset)  # the best model is told by one figure: of all their rows
    return trainer
