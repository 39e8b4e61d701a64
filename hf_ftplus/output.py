"""The output folder of a run: who may write to it, whether it has room, and where in it to go on from."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from . import commit
from .callback import STATE_FOLDER
from .disk import attempt, flush, locked, replace
from .errors import StorageError
from .weights import full_shape

if TYPE_CHECKING:
    from .config import RunConfig
    from .trainer import SFTTrainer

logger = logging.getLogger("hf_ftplus")

REPORT = f"{STATE_FOLDER}/report.json"
"""Written last of all: a run with one is done."""
OUTPUTS = (
    "checkpoint-*",
    "*.safetensors",
    "config.json",
    "adapter_config.json",
    REPORT,
    f"{STATE_FOLDER}/memory",
)
"""What a run leaves, ours or `trl sft`'s."""
TRAIN_ON = "To train its model on, name it as --model_name_or_path."


def claim(config: RunConfig, probe: bool = True) -> None:
    """The output folder must be writable, not hold another run, and not be the model's own.

    Raises:
        StorageError: it is not so; says how to go on.
    """
    folder = Path(config.training.output_dir)
    commit.on_first_rank(lambda: _refuse_taken(config, folder))  # soon it will rename things there
    if not probe:
        return
    with attempt(f"--output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".ftplus-{platform.node()}-{time.monotonic_ns()}"
        replace(trial, lambda file: (file.write_bytes(b"?"), flush(file)))
        trial.unlink()


def _refuse_taken(config: RunConfig, folder: Path) -> None:
    if folder.exists() and folder.resolve() == Path(config.model.model_name_or_path).expanduser().resolve():
        raise StorageError(f"--output_dir {folder} is the model that is to be trained. Choose another, to keep it.")
    if os.path.isfile(folder):
        raise StorageError(f"--output_dir {folder} cannot be written: it is a file. Choose another.")
    found = [path for name in OUTPUTS for path in folder.glob(name)]
    if resume_point(config) is None and found:
        newest = max(found, key=os.path.getmtime)
        on = f"There is no checkpoint to go on from. {TRAIN_ON} Choose"
        if _checkpoints(folder):
            on = "Go on: --resume_from_checkpoint true. Or choose"
        raise StorageError(f"{folder} holds another run ({newest.relative_to(folder)}). {on} another --output_dir.")


@contextmanager
def no_empty_folder(folder: str | Path, unless_done: bool = False) -> Iterator[None]:
    """What is about to start makes its folder at once; take an empty one away again that was not there before."""
    folder, done = Path(folder), False
    existed = folder.exists()
    try:
        yield
        done = True
    finally:
        if not existed and not (done and unless_done):
            with suppress(OSError):  # not empty, or another rank was first
                folder.rmdir()


@contextmanager
def alone(config: RunConfig) -> Iterator[None]:
    """No other run writes to the output folder meanwhile; of several processes the first speaks for all."""
    first = config.training.process_index == 0
    with locked(Path(config.training.output_dir)) if first else nullcontext():
        yield


def resume_point(config: RunConfig) -> str | bool | None:
    """`true` as a word, a path as it is; None to begin, as `auto` does where there is nothing to go on from."""
    given = config.training.resume_from_checkpoint
    if not given:
        return None
    folder = Path(config.training.output_dir)
    there = _checkpoints(folder)
    if str(given).lower() == "auto":
        return there or None
    if str(given).lower() == "true":
        if not there:
            taken = any(path for name in OUTPUTS for path in folder.glob(name))
            instead = TRAIN_ON if taken else "Leave the flag out to start, or type auto, which does either."
            raise StorageError(f"--resume_from_checkpoint true: {folder} holds no checkpoint-N. {instead}")
        return True
    if not Path(given).is_dir():
        raise StorageError(
            f"--resume_from_checkpoint {given}: no such folder; expected a checkpoint-N folder, true or auto."
        )
    return given


def _checkpoints(folder: Path) -> bool:
    return any(folder.glob("checkpoint-*"))


def settle(config: RunConfig) -> None:
    """Choose the checkpoint to go on from, before anything is made of it: `true` and `auto` become a path, or None.

    The first rank looks for all: a later one would see what is broken set aside already.

    Raises:
        StorageError: `true`, and no checkpoint is whole.
    """
    config.training.resume_from_checkpoint = commit.on_first_rank(lambda: _settled(config))


def _settled(config: RunConfig) -> str | None:
    if (point := resume_point(config)) is not True:
        return point
    folder = Path(config.training.output_dir)
    found = commit.newest(folder)
    if found is None and str(config.training.resume_from_checkpoint).lower() != "auto":
        raise StorageError(
            f"{folder} holds no whole checkpoint: the run ended before its first was written. Start again without "
            "--resume_from_checkpoint, or with auto."
        )
    return None if found is None else str(found)


def refuse_full_disk(trainer: SFTTrainer, folder: Path) -> None:
    """Raise before anything is prepared where not even the trained weights will find room.

    Raises:
        StorageError: says how much there is and how much it takes.
    """
    free, least = shutil.disk_usage(folder).free, bytes_saved(trainer)
    if free < least:
        raise StorageError(
            f"{folder} has room for {free / 1e6:,.0f} MB, and the trained weights alone take {least / 1e6:,.0f} MB. "
            "Free some space, or choose another --output_dir."
        )


def warn_of_little_room(trainer: SFTTrainer, folder: Path) -> None:
    """Warn where a checkpoint, with Adam's moments and what strategies hold, will not find room."""
    state = sum(trainer.ftplus.bytes().values()) if trainer.ftplus else 0
    weights = [full_shape(weight).numel() for weight in trainer.model.parameters() if weight.requires_grad]
    free, least = shutil.disk_usage(folder).free, bytes_saved(trainer) + 8 * sum(weights) + state
    if trainer.args.save_strategy != "no" and free < least:
        logger.warning(
            "%s has room for %.1f MB; a checkpoint takes about %.1f MB, of which strategies %.1f MB. Free some space, "
            "or type --save_strategy no.",
            *(folder, free / 1e6, least / 1e6, state / 1e6),
        )


def bytes_saved(trainer: SFTTrainer) -> int:
    """Of the weights that a checkpoint brings: of an adapter, where there is one."""
    adapted = bool(getattr(trainer.model, "peft_config", None))
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad or not adapted]
    return sum(full_shape(weight).numel() * weight.element_size() for weight in weights)


@contextmanager
def on_the_disk(said: str) -> Iterator[None]:
    """Turn errors of the disk into ours, which say what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not commit.of_the_disk(error):
            raise
        raise StorageError(
            f"{said}: {error}. Free some space, then go on with --resume_from_checkpoint true."
        ) from error
