"""What the stack must have for ours to work on it, refused in one sentence instead of failing in silence later."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

from .errors import IncompatibleError

TRANSFORMERS = "5.3"
"""First whose Trainer has `_run_epoch` and `_clip_grad_norm`: below it overrides (trainer.py) would never be called,
so that a run resumed at its end takes a step too many, and clipping is unknown to strategies.
https://github.com/huggingface/transformers/releases/tag/v5.3.0"""


def check() -> None:
    """Refuse a transformers that lacks what `trainer.py` overrides.

    Raises:
        IncompatibleError: names the version found, the one that is needed, and what to type.
    """
    found = metadata.version("transformers")
    if Version(found) < Version(TRANSFORMERS):
        raise IncompatibleError(
            f"transformers {found} is installed; hf-ftplus needs {TRANSFORMERS} or newer, whose Trainer has what it "
            f"overrides. Type: pip install 'transformers>={TRANSFORMERS}'"
        )
