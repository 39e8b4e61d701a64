"""Preferences (DPO) through TRL's own trainer. One line keeps what the model knows.

    python examples/dpo.py                        from the top of the repository; MODEL=... chooses another model

A strategy that acts on weights needs no more than a callback. `remember=False`: pairs of answers are not rows that EWC
could look back on for a next run.
"""

import os

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from hf_ftplus import EWC, StrategyCallback

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")

trainer = DPOTrainer(
    model=MODEL,
    args=DPOConfig(
        os.environ.get("OUT", "out/dpo"),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-5,
        max_grad_norm=0,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.accelerator.is_available(),
    ),
    train_dataset=load_dataset("json", data_files="examples/data/preferences.jsonl", split="train"),
    processing_class=AutoTokenizer.from_pretrained(MODEL),
    callbacks=[StrategyCallback(EWC(remember=False), protect="examples/data/protect.jsonl")],  # the line
)

trainer.train()
