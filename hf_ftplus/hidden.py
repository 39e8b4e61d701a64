"""Keep tokens out of every file that a Trainer writes: its arguments, which hold them, go into each checkpoint."""

from __future__ import annotations

from typing import Any

from .config import SECRETS, without_secrets


class Hidden(str):
    """A token that can be used as before, but is shown as *** and pickled as None."""

    def __repr__(self) -> str:
        return "'***'"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # whoever unpickles it needs nothing of ours

    def __copy__(self) -> Hidden:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Hidden:
        return self


def hide(args: Any) -> None:
    """Hide what is secret in a Trainer's arguments. A token in `model_init_kwargs`, by which the model was loaded,
    is taken out of them: give it anew to another trainer, or set HF_TOKEN."""
    for name, value in vars(args).items():
        if name in SECRETS and isinstance(value, str):
            setattr(args, name, Hidden(value))
        elif isinstance(value, dict) and (kept := without_secrets(value)) != value:
            setattr(args, name, kept)
