"""QLoRA: an adapter on a base in 4 bits (bitsandbytes), on a GPU or, slowly, on a CPU.

    python examples/qlora.py                      from the top of the repository; MODEL=... chooses another model

`distill` needs no copy of the model here: its teacher is the same base with the adapter switched off.
"""

import os

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig

from hf_ftplus import SFTTrainer  # instead of: from trl import SFTTrainer

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
GPU = torch.accelerator.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32

trainer = SFTTrainer(
    model=MODEL,
    args=SFTConfig(
        os.environ.get("OUT", "out/qlora"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        max_grad_norm=0,
        logging_steps=2,
        report_to="none",
        use_cpu=not GPU,
        bf16=GPU,
        gradient_checkpointing=GPU,
        model_init_kwargs={"dtype": DTYPE, "device_map": None if GPU else {"": "cpu"}},
    ),
    train_dataset=load_dataset("json", data_files="examples/data/learn.jsonl", split="train"),
    processing_class=AutoTokenizer.from_pretrained(MODEL),
    quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    strategies=["distill", "ewc"],  # the line
    protect="examples/data/protect.jsonl",
)

trainer.train()
trainer.save_model()
