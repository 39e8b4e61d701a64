"""Command lines of `ftplus sft` on a tiny model, and the folder that they read."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from training import LEARN, PROTECT

QUICK = {
    "max_steps": 2, "report_to": "none", "gradient_checkpointing": False, "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16, "max_length": 64, "completions": 1, "measure_rows": 8,
}  # fmt: skip
QUICKLY = [f"--{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in QUICK.items()]
"""What makes a run of any `ftplus sft` short: in YAML, and as flags."""


def make_place(folder: Path) -> Path:
    """Fill `folder` with a tiny model that can be loaded by path, and data files."""
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, rows in (("learn", LEARN), ("protect", PROTECT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(place, out, *more, plugin="ewc", protect="protect.jsonl"):
    """`sft ...`: four steps on the CPU."""
    chosen = [] if plugin is None else ["--plugin", plugin]
    kept = [] if protect is None else ["--protect", str(place / protect) if "self" not in protect else protect]
    return [
        "sft", *chosen, "--model_name_or_path", str(place / "model"), "--dataset_name", str(place / "learn.jsonl"), *kept,
        "--output_dir", str(out), "--max_steps", "4", "--report_to", "none", "--learning_rate", "1e-3",
        "--gradient_checkpointing", "false", "--save_steps", "2", *more,
    ]  # fmt: skip


def command(*arguments) -> list[str]:
    """The same for another process."""
    return [sys.executable, "-m", "hf_ftplus", *map(str, arguments)]


def stopped(line: list[str], stop: Callable[[int], None], seconds: float = 120) -> tuple[int, str]:
    """Start a command, call `stop(pid)` once it has logged two steps; its exit code and stderr. None of it outlives us."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    ranks = []
    try:
        steps = (text for text in process.stdout if "'loss'" in text)
        next(steps), next(steps)
        ranks = psutil.Process(process.pid).children(recursive=True)
        stop(process.pid)
        _, error = process.communicate(timeout=seconds)
        assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
        return process.returncode, error
    finally:
        for left in (process, *ranks):
            with suppress(psutil.NoSuchProcess):
                left.kill()


def same_file(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold the same weights, bit for bit."""
    these, those = load_file(one), load_file(other)
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


def typed(text: str) -> list[list[str]]:
    """Every `ftplus ...` of the blocks of a page, as words."""
    blocks = "".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL))
    return [shlex.split(line, comments=True) for line in re.findall(r"^\$ ftplus (.*)", blocks, re.M)]
