"""Models, tasks and code known by what they hold: what was measured once need not be measured again.

A local model is known by every byte of its weights, configuration and tokenizer, which takes as long as reading it
(about a second per GB), and so is an adapter of the Hub, which is small; a whole model of the Hub by its commit.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from ..contents import of_file
from ..evaluation import EvalTask
from ..trained import at, base_of, placed

HELD = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
"""Suffixes of files that a model or its tokenizer is made of."""
OTHERS = (
    "training_args.bin",
    "trainer_state.json",
    "eval.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
)
CODE = (
    "evaluation.runner", "evaluation.scoring", "evaluation.drift", "evaluation.metrics", "evaluation.greedy",
    "evaluation.tasks", "evaluation.found", "logits", "examples", "generate", "metric", "trained", "scored.measuring",
    "scored.cells", "scored.harness",
)  # fmt: skip
"""What a figure of one row comes from."""
METRICS = ("torchmetrics", "regex")
"""Packages that grade answers; the first need not be there."""


def digest(thing: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True, default=str).encode()).hexdigest()


def of_model(name: str) -> str:
    """The model of a folder, of the Hub or `demo`; an adapter together with its base."""
    path, base = placed(name), base_of(name)
    own = of_folder(Path(path)) if Path(path).is_dir() else _of_hub(path)
    return own if base is None else digest([own, of_model(base)])


def of_folder(folder: Path) -> str:
    """Weights, configuration and tokenizer; not what else a run leaves beside them."""
    files = [file for file in sorted(folder.iterdir()) if held(file)]
    return digest([(file.name, of_file(file)) for file in files])


def held(file: Path) -> bool:
    return file.suffix in HELD and file.name not in OTHERS and file.is_file()


def _of_hub(name: str) -> str:
    """A model without a commit is like no other, and measured every time."""
    # not the configuration's `_commit_hash`, which transformers 5 no longer sets
    there, revision = at(name)
    found = extract_commit_hash(cached_file(there, CONFIG_NAME, revision=revision), None)
    return f"{there}@{found or secrets.token_hex()}"


def of_task(task: EvalTask) -> str:
    """Its rows, as text and as tokens, and how they are scored; not its name."""
    return digest([task.examples, task.rows, task.metric])


@cache
def of_code() -> str:
    """What figures are computed by, and the libraries below it."""
    files = [Path(import_module(f"hf_ftplus.{name}").__file__) for name in CODE]
    return digest([[of_file(file) for file in files], versions(), {name: _version(name) for name in METRICS}])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    names = ("hf-ftplus", "torch", "transformers", "tokenizers", "peft")
    return {name: metadata.version(name) for name in names}
