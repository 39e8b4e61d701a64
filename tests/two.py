"""A script on two gloo processes, none of which outlives the call."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_ftplus import compat

SECONDS = 120


def part() -> None:
    """The end of a rank's script."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    compat.leave(0)


def launch(script: Path, what: str, folder: Path, seconds: float = SECONDS) -> list[dict[str, torch.Tensor]]:
    """What both ranks found, who each ran `script WHAT FOLDER RANK` and left FOLDER/rankN.safetensors."""
    ranks = []
    try:
        for rank in range(2):
            inside = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
            environment = {
                **os.environ,
                **{key: str(value) for key, value in inside.items()},
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            }
            command = [sys.executable, str(script), what, str(folder), str(rank)]
            ranks.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
        for process in ranks:
            errors = process.communicate(timeout=seconds)[1]
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


def meet(folder: Path, rank: int) -> None:
    """Join the other rank: no port is taken, and nobody waits for ever."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    assert torch.distributed.get_world_size() == 2
    assert torch.distributed.get_backend() == "gloo"
