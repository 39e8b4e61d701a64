"""A plain `transformers` script that goes on with pre-training on notes. One line keeps what the model knows.

python examples/causal_lm.py                  from the top of the repository; MODEL=... chooses another model
"""

import os

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import hf_ftplus

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")

tokenizer = AutoTokenizer.from_pretrained(MODEL)
notes = load_dataset("json", data_files="examples/data/notes.jsonl", split="train")
tokens = notes.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns="text")

trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
    args=TrainingArguments(
        os.environ.get("OUT", "out/causal_lm"),
        max_steps=6,
        per_device_train_batch_size=4,
        max_grad_norm=0,  # or the penalty, which is added after clipping, weighs more than it says
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
    ),
    train_dataset=tokens,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)

hf_ftplus.attach(trainer, "ewc", protect="examples/data/protect.jsonl")  # the line

trainer.train()
