"""The figures of a run for whatever `report_to` names (trackio, tensorboard, wandb, ...), by the Trainer's own log."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from transformers import trainer as trainers

from ..evaluation import TaskResult
from ..logits import evaluating

if TYPE_CHECKING:
    from ..trainer import SFTTrainer


def figures(results: Iterable[TaskResult], moment: Literal["before", "after"]) -> dict[str, float]:
    """`loss/TASK`, `token_accuracy/TASK` and the task's own metric; after training `drift/TASK` and `retention/TASK`.

    What was not measured, or is undefined, is left out.
    """
    found = {}
    for result in results:
        level = getattr(result, moment)
        named = {"loss": level.loss, "token_accuracy": level.token_accuracy, str(result.metric): level.metric}
        named |= {"drift": result.drift, "retention": result.retention} if moment == "after" else {}
        found |= {f"{name}/{result.name}": figure.value for name, figure in named.items() if figure.value is not None}
    return found


def track(trainer: SFTTrainer, results: Iterable[TaskResult], moment: Literal["before", "after"]) -> None:
    """Log them at the step that the trainer is at, if there is anybody to log them for."""
    if trainer.args.report_to:
        with evaluating(trainer.model):  # TRL would otherwise log and forget its figures of training
            trainer.log(figures(results, moment))


def hold_open(trainer: SFTTrainer) -> Callable[[], None]:
    """Keep trackers from closing when training ends, before they have heard what was measured after it: MLflow would
    open a second run for that. Returns what closes them."""
    kinds = tuple(trainers.get_reporting_integration_callbacks(trainer.args.report_to))
    held = [it for it in trainer.callback_handler.callbacks if isinstance(it, kinds)]

    def not_yet(*args: Any, **kwargs: Any) -> None:
        return None

    def close() -> None:
        for tracker in held:
            del tracker.on_train_end
            more = {"model": trainer.model, "processing_class": trainer.processing_class}
            tracker.on_train_end(trainer.args, trainer.state, trainer.control, **more)

    for tracker in held:
        tracker.on_train_end = not_yet
    return close
