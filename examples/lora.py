"""LoRA through TRL's trainer; EWC holds the change scale * B A that the adapter makes.

    python examples/lora.py                       from the top of the repository; MODEL=... chooses another model

Its state is d + k numbers for a weight of d x k, so this fits wherever LoRA fits.
"""

import os

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig

from hf_ftplus import SFTTrainer  # instead of: from trl import SFTTrainer

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")

trainer = SFTTrainer(
    model=MODEL,
    args=SFTConfig(
        os.environ.get("OUT", "out/lora"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        max_grad_norm=0,
        logging_steps=2,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.accelerator.is_available(),
    ),
    train_dataset=load_dataset("json", data_files="examples/data/learn.jsonl", split="train"),
    processing_class=AutoTokenizer.from_pretrained(MODEL),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    strategies=["ewc"],  # the line
    protect="examples/data/protect.jsonl",
)

trainer.train()
trainer.save_model()  # the adapter; `ftplus merge --model out/lora --out merged` makes one model of it and its base
