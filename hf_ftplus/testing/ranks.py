"""The same training on two gloo processes."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..strategy import Strategy, settings
from .bench import Bench, Weights, strategy_of, weights_of

SPAWN_SECONDS = 120.0


def two_processes(bench: Bench, args: dict[str, Any]) -> tuple[Weights, Weights]:
    """Weights and state at the end of a run on two gloo processes, of each."""
    from safetensors.torch import load_file

    folder = bench.new_folder()
    kind = type(bench.strategy)
    reachable = "<locals>" not in kind.__qualname__ and kind.__module__ != "__main__"
    advice = "move it to a module, or give processes=False"
    bench.demand(reachable, f"{kind.__qualname__} cannot be imported by another process: {advice}")
    protect = bench.protect if bench.protect is None or isinstance(bench.protect, dict) else {"protect": bench.protect}
    task = {
        "module": kind.__module__, "file": inspect.getfile(kind), "class": kind.__qualname__, "args": args,
        "settings": {item.name: getattr(bench.strategy, item.name) for item in settings(kind)},
        "protect": protect and {name: [_listed(batch) for batch in batches] for name, batches in protect.items()},
        "first": {str(int(lora)): str(path) for lora, path in bench.first.items()},
        "learn": None if bench.learn is None else bench.learn.to_list(),
    }  # fmt: skip
    (folder / "task.json").write_text(json.dumps(task))
    ranks = []
    try:
        for rank in range(2):
            inside = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
            path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            environment = {**os.environ, **path, **{key: str(value) for key, value in inside.items()}}
            command = f"from hf_ftplus.testing.ranks import one_rank; one_rank({str(folder)!r}, {rank})"
            with (folder / f"rank{rank}.txt").open("w") as said:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-c", command], env=environment, stdout=subprocess.DEVNULL, stderr=said
                    )
                )
        _wait(ranks, folder)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return load_file(folder / "rank0.safetensors"), load_file(folder / "rank1.safetensors")


def _wait(ranks: list[subprocess.Popen], folder: Path) -> None:
    """Until both have ended, or one has failed: that one is named, and not the other, which then misses it."""
    end = time.monotonic() + SPAWN_SECONDS
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                said = (folder / f"rank{rank}.txt").read_text().strip().splitlines()
                raise RuntimeError(f"process {rank} of two failed: {said[-1] if said else f'exit code {code}'}")
        if None not in codes:
            return
        if time.monotonic() > end:
            raise RuntimeError(f"two processes took more than {SPAWN_SECONDS:.0f} s")
        time.sleep(0.05)


def one_rank(folder: str, rank: int) -> None:
    """What each of the two processes does."""
    from datetime import timedelta

    from datasets import Dataset
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    task = json.loads((Path(folder) / "task.json").read_text())
    bound = timedelta(seconds=SPAWN_SECONDS / 2)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=bound
    )
    given = task["protect"]
    protect = given and {name: [_tensors(batch) for batch in batches] for name, batches in given.items()}
    first = {lora == "1": Path(path) for lora, path in task["first"].items()}
    learn = task["learn"] and Dataset.from_list(task["learn"])
    bench = Bench(_class(task)(**task["settings"]), Path(folder), protect, learn=learn, first=first)
    trainer = bench.train(bench.fresh(), **task["args"])
    if trainer.accelerator.num_processes != 2:
        raise RuntimeError(f"trained on {trainer.accelerator.num_processes} processes, expected 2")
    found = {f"weights.{name}": weight for name, weight in weights_of(trainer).items()}
    found |= {
        f"state.{name}": tensor.detach().clone().contiguous()
        for name, tensor in strategy_of(trainer).state_dict().items()
    }
    save_file(found, Path(folder) / f"rank{rank}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    compat.leave(0)


def _listed(batch: dict[str, Tensor]) -> dict[str, list]:
    return {key: tensor.tolist() for key, tensor in batch.items()}


def _tensors(batch: dict[str, list]) -> dict[str, Tensor]:
    return {key: torch.tensor(values) for key, values in batch.items()}


def _class(task: dict[str, str]) -> type[Strategy]:
    """A strategy class by its module, or by its file when the module has no importable name (as under pytest)."""
    try:
        module = importlib.import_module(task["module"])
    except ImportError:
        from ..plugins import load

        return load(f"{task['file']}:{task['class']}")
    return getattr(module, task["class"])
