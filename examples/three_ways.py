"""The three ways in, on the demo model and a few rows; each ends with the same weights.

.venv/bin/python examples/three_ways.py
"""

from __future__ import annotations

import tempfile

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_ftplus
from hf_ftplus import StrategyCallback
from hf_ftplus.model import resolve

LEARN = [
    {"prompt": f"Who keeps the lighthouse of Tarn {n}?", "completion": f" Keeper number {n * n}."} for n in range(16)
]
PROTECT = [
    {"prompt": "What colour is the sky on a clear day?", "completion": " Blue."},
    {"prompt": "Name a fruit that is yellow.", "completion": " A banana."},
    {"prompt": "What do bees make?", "completion": " Honey."},
    {"prompt": "Which season follows winter?", "completion": " Spring."},
]


def main() -> None:
    """Train three times and compare the weights."""
    learn, protect = Dataset.from_list(LEARN), Dataset.from_list(PROTECT)
    path = resolve("demo")
    common = {
        "args": trl.SFTConfig(
            tempfile.mkdtemp(), max_steps=3, per_device_train_batch_size=4, max_grad_norm=0,
            use_cpu=not torch.accelerator.is_available(), save_strategy="no", report_to="none",
            logging_steps=3, gradient_checkpointing=False,
        ),
        "train_dataset": learn,
        "processing_class": AutoTokenizer.from_pretrained(path),
    }  # fmt: skip

    def model() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(path)

    trainers = {
        "drop-in": hf_ftplus.SFTTrainer(model(), strategies=["ewc"], protect=protect, **common),
        "attached": hf_ftplus.attach(trl.SFTTrainer(model(), **common), "ewc", protect=protect),
        "callback": trl.SFTTrainer(model(), callbacks=[StrategyCallback("ewc", protect=protect)], **common),
    }
    weights = {}
    for name, trainer in trainers.items():
        trainer.train()
        weights[name] = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    for name, found in weights.items():
        print(f"{name}: same weights as drop-in: {torch.equal(found, weights['drop-in'])}")


if __name__ == "__main__":
    main()
