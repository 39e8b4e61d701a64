"""Three tasks that a tiny model learns in seconds, and the YAML of a sequence over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import tiny_llama, tiny_tokenizer

ANSWERS = {
    "colours": ("Colour {}: ", ["blue as ever.", "green as ever.", "amber as ever."]),
    "fruits": ("Fruit {}: ", ["pear of course!", "plum of course!", "fig of course!"]),
    "cities": ("City {}: ", ["Lisbon by the sea", "Bergen by the sea", "Bari by the sea"]),
}


def make_sequence_place(folder: Path) -> Path:
    """Fill `folder` with a tiny model and the rows of each task."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, (prompt, answers) in ANSWERS.items():
        rows = [{"prompt": prompt.format(i), "completion": answers[i % 3]} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sequence_yaml(place: Path, out: Path, stages: int = 3, each: dict[str, dict] | None = None, **shared: Any) -> dict:
    """The mapping of a sequence on the CPU, each task measured on its own rows; `each` changes a stage by name."""
    names = list(ANSWERS)[:stages]
    data = {name: str(place / f"{name}.jsonl") for name in names}
    return {
        "model_name_or_path": str(place / "model"), "output_dir": str(out), "max_steps": 6, "learning_rate": 5e-3,
        "per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "gradient_checkpointing": False,
        "report_to": "none", "save_steps": 2, "logging_steps": 2, "max_length": 64, "measure_rows": 12, "completions": 0,
        "use_cpu": True, "bf16": False, "max_grad_norm": 0.0, "disable_tqdm": True, "measure": data, "keep": 8,
        **shared,
        "stages": [{"name": name, "dataset_name": data[name], **(each or {}).get(name, {})} for name in names],
    }  # fmt: skip
