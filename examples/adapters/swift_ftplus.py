"""Strategies inside ms-swift, through its `external_plugins`:

    FTPLUS_STRATEGIES=ewc FTPLUS_PROTECT=protect.jsonl \\
    swift sft --external_plugins swift_ftplus.py --callbacks ftplus --max_grad_norm 0 --model ... --dataset ...

A callback reaches gradients and weights (ewc, si); `distill`, `replay` and `multitask` need more, and say so. Written
for ms-swift 4.6, which wants TRL below 1.0: pip cannot resolve both (`pip install --no-deps hf-ftplus` puts it there);
a callback needs no TRL. What was tried: see examples/README.md.
"""

import os

from swift.callbacks import callbacks_map

from hf_ftplus import StrategyCallback


def ftplus(args, trainer):
    """What `--callbacks ftplus` adds to the trainer."""
    strategies = os.environ.get("FTPLUS_STRATEGIES", "ewc").split(",")
    return StrategyCallback(
        *strategies, protect=os.environ.get("FTPLUS_PROTECT"), memory=os.environ.get("FTPLUS_MEMORY")
    )


callbacks_map["ftplus"] = ftplus
