"""What the stack must have for ours to work on it, and what we do because of one version of it.

Each with the version and a link, so that it can be deleted one day. What passes where: `.ci/compat`.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from typing import Any, NoReturn

from .errors import IncompatibleError

TRANSFORMERS = "5.10.1"
"""Below it the laws fail. Before 5.3 its Trainer lacks `_run_epoch` and `_clip_grad_norm`, so that our overrides are
never called; in 5.3 batches of 8x1 and 2x4 give different updates; up to 5.9 distill's gradient is another one on rows
packed with `wrapped`. https://github.com/huggingface/transformers/releases/tag/v5.10.1"""


def check() -> None:
    """Refuse a transformers on which training would go wrong in silence.

    Raises:
        IncompatibleError: names the version found, the one that is needed, and what to type.
    """
    from importlib import metadata

    from packaging.version import Version

    found = metadata.version("transformers")
    if Version(found) < Version(TRANSFORMERS):
        raise IncompatibleError(
            f"transformers {found} is installed; hf-ftplus needs {TRANSFORMERS} or newer: with older ones its tests "
            f"fail. Type: pip install 'transformers>={TRANSFORMERS}'"
        )


def quiet() -> None:
    """Keep from users what the stack tells its own developers: TRL 1.16 and PEFT 0.21 ask for what transformers 5.23
    will drop. https://github.com/huggingface/transformers/releases"""
    for name in ("gradient_checkpointing", "is_gradient_checkpointing"):
        warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)


def no_bars_unseen() -> None:
    """No progress bars of transformers where nobody watches: whether anybody does, it does not ask."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def end(trainer: Any) -> None:
    """Finish the trackers and the process group. Trainers can since transformers 5.18, as TRL's sft.py knows, too.

    https://github.com/huggingface/transformers/releases/tag/v5.18.0
    """
    if hasattr(trainer, "end"):
        trainer.end()


def leave(code: int) -> NoReturn:
    """End a process of a launch without tearing its interpreter down, in which a thread of gloo may abort it, so that
    what succeeded counts as failed: `destroy_process_group` leaves threads to every DeviceMesh (torch 2.13). Files that
    are still open lose what they hold back. https://github.com/pytorch/pytorch/pull/179291
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(code)
