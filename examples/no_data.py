"""Protect what you have no data for: the starting model writes it, before it learns anything.

    python examples/no_data.py                    from the top of the repository; MODEL=... chooses another model

"self:64x48" opens the chat template at the user's turn, lets the model ask, then answer in at most 48 tokens, 64 times.
The strategies are those that `ftplus advise none` names: stacked, they were among those that kept most on a real model
(examples/benchmarks).
"""

import os

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig

from hf_ftplus import SFTTrainer

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")

trainer = SFTTrainer(
    model=MODEL,
    args=SFTConfig(
        os.environ.get("OUT", "out/no_data"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        max_grad_norm=0,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.accelerator.is_available(),
    ),
    train_dataset=load_dataset("json", data_files="examples/data/learn.jsonl", split="train"),
    processing_class=AutoTokenizer.from_pretrained(MODEL),
    strategies=[("replay", {"share": 0.0625}), ("ewc", {"strength": 3000})],
    protect=f"self:{os.environ.get('ROWS', 64)}x48",  # the line
)

trainer.train()
print("What the model wrote, and what was protected, is in", f"{trainer.args.output_dir}/_self/self.jsonl")
