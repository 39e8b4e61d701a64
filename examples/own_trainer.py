"""A Trainer subclass with a loss of its own. One line keeps what the model says, whatever that loss is.

    python examples/own_trainer.py                from the top of the repository; MODEL=... chooses another model

`distill` acts on outputs: it adds, beside the loss below, the divergence from what the starting model says. The
subclass needs no change for it; `attach` puts strategies into the object that the script already has.
"""

import os

import torch
from datasets import load_dataset
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer
from transformers import TrainingArguments as Arguments

import hf_ftplus

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")


class FocalTrainer(Trainer):
    """Tokens that the model already predicts well count less (Lin 2017)."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        logits, labels = outputs.logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten()
        each = cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        # the count is of all processes, over which gradients are averaged
        loss = ((1 - torch.exp(-each)) ** 2 * each).sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


tokenizer = AutoTokenizer.from_pretrained(MODEL)
notes = load_dataset("json", data_files="examples/data/notes.jsonl", split="train")
trainer = FocalTrainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
    args=Arguments(
        os.environ.get("OUT", "out/own_trainer"),
        max_steps=6,
        per_device_train_batch_size=4,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
    ),
    train_dataset=notes.map(lambda row: tokenizer(row["text"]), remove_columns="text"),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)

hf_ftplus.attach(trainer, "distill", protect="examples/data/protect.jsonl")  # the line

trainer.train()
