"""Fine-tune without forgetting, on the trainer you already use.

from hf_ftplus import SFTTrainer
trainer = SFTTrainer(model, args=args, train_dataset=learn, strategies=["ewc"], protect=protect)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import StrategyCallback
    from .hookspecs import hookimpl
    from .interrupt import SaveOnInterrupt
    from .stages import sequence
    from .strategies.distill import Distill
    from .strategies.ewc import EWC
    from .strategies.multitask import MultiTask
    from .strategies.replay import Replay
    from .strategies.si import SI
    from .strategy import Batch, Memory, Run, Strategy, place, setting
    from .trainer import SFTTrainer, StrategyMixin, attach

__version__ = "0.1.0"

__all__ = [
    "EWC",
    "SI",
    "Batch",
    "Distill",
    "Memory",
    "MultiTask",
    "Replay",
    "Run",
    "SFTTrainer",
    "SaveOnInterrupt",
    "Strategy",
    "StrategyCallback",
    "StrategyMixin",
    "attach",
    "hookimpl",
    "place",
    "sequence",
    "setting",
]

# loaded on first touch: `ftplus --help` must not wait for torch and trl, nor for pluggy
_LAZY = {
    "Distill": ".strategies.distill",
    "EWC": ".strategies.ewc",
    "MultiTask": ".strategies.multitask",
    "Replay": ".strategies.replay",
    "SI": ".strategies.si",
    "hookimpl": ".hookspecs",
    **dict.fromkeys(("Batch", "Memory", "Run", "Strategy", "place", "setting"), ".strategy"),
    "StrategyCallback": ".callback",
    "SaveOnInterrupt": ".interrupt",
    "sequence": ".stages",
    **dict.fromkeys(("SFTTrainer", "StrategyMixin", "attach"), ".trainer"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
