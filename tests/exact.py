"""Runs that are stopped and resumed, and what must be the same after it: in this process, or in processes of their own.

The settings are those that break a careless resume: dropout, accumulation with a short last window, clipping, warm-up,
shuffled rows that no batch divides.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from safetensors.torch import load_file
from storm import Countdown
from tiny import tiny_llama
from training import LEARN, TASKS, trainer
from transformers import TrainerCallback, set_seed
from two import meet

from hf_ftplus import commit
from hf_ftplus.interrupt import SaveOnInterrupt
from hf_ftplus.trainer import SFTTrainer

STEPS, EPOCH = 9, 6
"""22 rows in steps of 2 x 2: the sixth has two rows alone."""
EXACT = {
    "gradient_accumulation_steps": 2, "max_steps": STEPS, "logging_steps": 1, "lr_scheduler_type": "cosine",
    "warmup_steps": 2, "save_strategy": "steps", "save_steps": 1, "ddp_timeout": 60,
}  # fmt: skip
ALONE = ("ewc", "si", "distill", "replay", "multitask")
PAIRS = (("distill", "ewc"), ("replay", "ewc"), ("replay", "distill"), ("multitask", "ewc"))
KINDS = {" + ".join(names) or "plain": (names, False) for names in ((), *((name,) for name in ALONE), *PAIRS)}
KINDS |= {f"{kind}, LoRA": (names, True) for kind, (names, _) in KINDS.items() if "si" not in names}
"""Strategies, and whether on an adapter. SI refuses those: the loss depends on a change B A that it cannot follow."""
EARLIER: dict[str, Path] = {}
"""Kind -> folder of the run whose weights it starts from, and whose memory it has."""


def make(folder, kind, cls=SFTTrainer, world=1, **kwargs):
    strategies, lora = KINDS[kind]
    model, memory = tiny_llama(), None
    if kind in EARLIER:
        model.load_state_dict(load_file(EARLIER[kind] / f"checkpoint-{STEPS}" / "model.safetensors"), strict=False)
        memory = EARLIER[kind] / "ftplus" / "memory"
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    peft = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.2) if lora else None
    return trainer(
        folder, *strategies, model=model, memory=memory, peft_config=peft, cls=cls,
        learn=(TASKS if "multitask" in kind else LEARN)[:22], per_device_train_batch_size=2 // world, **{**EXACT, **kwargs},
    )  # fmt: skip


def held(folder: Path, step: int) -> dict[str, str]:
    """Sums of all that decides how a run goes on."""
    files = commit.read_commit(folder / f"checkpoint-{step}")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith((".safetensors", ".pt", ".pth"))}


def comparable(log: dict) -> dict:
    """But for TRL's count of tokens, which it begins anew."""
    return {key: value for key, value in log.items() if key != "num_tokens"}


# ---- processes of their own ------------------------------------------------------------------------------------------

STOPPED, TOLD, KILLED, TORN = "planned stop", "SIGTERM", "kill -9 in a step", "kill -9 in a save"
CODES = {STOPPED: 0, TOLD: 143, KILLED: -9, TORN: -9}
"""Ways to end a run after step `cut`, whose checkpoint is its last whole one. Killed are runs that are a step further."""


class Ending(SFTTrainer):
    """Saves when it is told to, and ends in one of these ways; of two processes one is killed, or told."""

    def until(self, how: str | None, cut: int, saves: Iterable[int]) -> SFTTrainer:
        self.how, self.cut, self.saves, self.rows = how, cut, saves, {}
        self.victim = self.args.process_index == (0 if how == TORN else self.args.world_size - 1)
        self.add_callback(Saves(self))
        if how == TOLD:
            self.add_callback(SaveOnInterrupt())
        return self

    def training_step(self, model, inputs, *args, **kwargs):
        step, last = self.state.global_step + 1, self.accelerator.sync_gradients
        first = step not in self.rows
        self.rows.setdefault(step, []).extend(zlib.crc32(ids.numpy()) for ids in inputs["input_ids"])
        if self.how == TOLD and self.victim and step == self.cut and (last if step % 2 else first):
            os.kill(os.getpid(), signal.SIGTERM)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.how == KILLED and self.victim and step == self.cut + 1 and last:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    def _save_checkpoint(self, *args):
        if self.how == TORN and self.victim and self.state.global_step == self.cut + 1:
            Countdown(Path(self.args.output_dir), 3 + self.cut)  # at another write for each step
        super()._save_checkpoint(*args)


class Saves(TrainerCallback):
    def __init__(self, it: Ending) -> None:
        self.it = it

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step in self.it.saves
        control.should_training_stop |= self.it.how == STOPPED and state.global_step == self.it.cut


def part(folder: Path, kind: str, world: int, how: str | None = None, cut: int = STEPS, saves=None, named=None) -> None:
    """Begin, or go on from the newest checkpoint in `folder`, or the one named; come to the end, or be ended at `cut`."""
    saves = saves or (() if how == TOLD else (cut, cut + 1))  # told, it saves by itself
    meeting = Path(tempfile.mkdtemp(dir=folder))

    def act(rank: int) -> None:
        set_seed(5)  # before PEFT draws an adapter
        torch.use_deterministic_algorithms(True)
        if world > 1:
            ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ |= {name: str(value) for name, value in ours.items()}
            meet(meeting, rank)
        it = make(folder, kind, Ending, world, save_strategy="no").until(how, cut, saves)
        it.train(resume_from_checkpoint=str(named or "") or any(folder.glob("checkpoint-*")) or None)
        (folder / f"rows-{rank}.json").write_text(json.dumps(it.rows))
        if world > 1:
            torch.distributed.barrier()

    codes = forked(act, world, meeting / "log")
    if how in (KILLED, TORN):
        codes = [code for code in codes if code is not None]
    assert set(codes) == {CODES.get(how, 0)}, (codes, (meeting / "log").read_text()[-3000:])
    assert commit.newest(folder, aside=False).name == f"checkpoint-{cut}"


def forked(act: Callable[[int], None], world: int, log: Path, seconds: float = 120) -> list[int | None]:
    """Exit codes of processes that `act(rank)`; once one was killed or fails the others are ended, and have none."""
    left, codes, until = {}, [None] * world, time.monotonic() + seconds
    try:
        for rank in range(world):
            if not (child := os.fork()):
                acted(act, rank, log)
            left[child] = rank
        while left and not {1, -signal.SIGKILL} & set(codes):
            for child in list(left):
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[left.pop(child)] = os.waitstatus_to_exitcode(status)
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.003)
    finally:
        for child in left:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return codes


def acted(act: Callable[[int], None], rank: int, log: Path) -> None:
    """What a child does; it never returns."""
    code = 1
    try:
        sys.stdout = sys.stderr = log.open("a", buffering=1)
        os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
        AcceleratorState._reset_state(reset_partial_state=True)  # which is of the process that it was forked from
        act(rank)
        code = 0
    except KeyboardInterrupt as told:
        code = told.args[0]
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


# ---- what must be the same -------------------------------------------------------------------------------------------


def differing(folder: Path, whole: Path, cut: int) -> tuple[int, dict[str, int]]:
    """Bytes compared of a run that was last cut there and of the uninterrupted one; and how many differ, of what."""
    steps = [int(checkpoint.name.split("-")[1]) for checkpoint in folder.glob("checkpoint-*")]
    ours, truth = traces(folder, steps, cut), traces(whole, steps, cut)
    found = {name: unlike(ours.get(name, b""), truth.get(name, b"")) for name in ours.keys() | truth.keys()}
    return sum(map(len, truth.values())), {name: count for name, count in sorted(found.items()) if count}


def traces(folder: Path, steps: Iterable[int], cut: int) -> dict[str, bytes]:
    """What decides how a run goes on, of its checkpoints at these steps; what was logged; which rows came after `cut`."""
    found = {}
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        found |= {f"{checkpoint.name}/{name}": (checkpoint / name).read_bytes() for name in held(folder, step)}
    found |= {f"log of step {log['step']}": json.dumps(log).encode() for log in logs(folder)}
    for file in folder.glob("rows-*.json"):
        rows = json.loads(file.read_text())
        found |= {f"{file.stem} of step {step}": json.dumps(rows[step]).encode() for step in rows if int(step) > cut}
    return found


def logs(folder: Path) -> list[dict]:
    """Of each step of a finished run."""
    found = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [comparable(log) for log in found["log_history"]]


def unlike(one: bytes, other: bytes) -> int:
    both = min(len(one), len(other))
    here, there = (np.frombuffer(content[:both], np.uint8) for content in (one, other))
    return int((here != there).sum()) + abs(len(one) - len(other))
