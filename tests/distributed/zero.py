"""A run under DeepSpeed on two gloo processes of CPUs; started by test_deepspeed.py as `zero.py STAGE FOLDER RANK`.

Stage 0 is DDP, without DeepSpeed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import tiny_llama
from torch import Tensor
from training import PROTECT, trainer
from two import meet

from hf_ftplus.strategies.distill import Distill
from hf_ftplus.strategies.replay import Replay


def trained(stage: int, folder: Path, *strategies) -> dict[str, Tensor]:
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    config = {
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, **dict.fromkeys(auto, "auto"),
    }  # fmt: skip
    it = trainer(
        folder, *strategies, model=tiny_llama(tie=False), protect=PROTECT[:6], max_steps=4, logging_steps=1,
        optim="adamw_torch", adam_epsilon=1.0, learning_rate=0.1, **({"deepspeed": config} if stage else {}),
    )  # fmt: skip
    it.train()
    weights = it.model.state_dict()
    if stage == 3:
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {name: safe_get_full_fp32_param(weight) for name, weight in it.model.named_parameters()}
    return {name: weight.detach().float().cpu().clone() for name, weight in weights.items()}


if __name__ == "__main__":
    stage, folder, rank = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    os.environ["DS_ACCELERATOR"] = "cpu"
    meet(folder, rank)
    stacks = {"replay": [Replay(share=0.25)]}
    stacks |= {"distill": [Distill(on="both", share=0.5, strength=10.0)]} if stage < 3 else {}
    found = {}
    for name, strategies in stacks.items():
        found |= {f"{name}/{key}": weight for key, weight in trained(stage, folder / name, *strategies).items()}
    save_file(found, folder / f"rank{rank}.safetensors")
    torch.distributed.barrier()
