"""`ftplus` on one of two gloo processes whose weights accelerate really shards with FSDP2.

On a CPU accelerate leaves FSDP out without a word, because it calls such ranks MULTI_CPU. Called MULTI_GPU, they go
through the very code that shards on GPUs: `fsdp2_prepare_model`, loading from rank 0, checkpoints in one piece. What is
still missing of a GPU run is the device alone.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from hf_ftplus import run
from hf_ftplus.cli import main

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "ACCELERATE_MIXED_PRECISION": "no",
}  # fmt: skip
make = PartialState.__init__


def as_on_gpus(self, *args, **kwargs):
    make(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class Start(run.Start):
    """Makes sure that what is measured is sharded, and what is given back, too."""

    def measure(self) -> None:
        self.check()
        super().measure()
        self.check()

    def check(self) -> None:
        weights = list(self.trainer.model.parameters())
        assert weights
        assert all(isinstance(weight, DTensor) and weight.to_local().numel() < weight.numel() for weight in weights)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= FSDP2
    PartialState.__init__, run.Start = as_on_gpus, Start
    sys.exit(main())
