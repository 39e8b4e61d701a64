"""What the ranks of a launch really do, in seconds: `ftplus doctor --distributed`.

    check() -> Found     on every rank: who is here, how fast ranks send, and how a tiny run fares here (trial.py)

A launcher may leave out what a config asks for, and nothing says so: accelerate shards on no CPU, and two ranks may sit
on one device. Everything here is looked at, not read from a config.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from . import trial
from .errors import IncompatibleError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

SECONDS = 60
"""That ranks wait for one another."""
MESSAGE = 2**24
"""Elements of the largest message that is timed (64 MB); a slow wire gets smaller ones."""
VERSIONS = ("hf-ftplus", "torch", "transformers", "trl", "accelerate", "peft")


@dataclass
class Found:
    """What to show, and what is wrong."""

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def check() -> Found:
    """Look at the ranks of this launch; every rank calls, and all find the same.

    Raises:
        IncompatibleError: the ranks cannot meet, or there is one only.
    """
    accelerator = meet()
    found = Found()
    ranks(accelerator, found)
    device = accelerator.device  # which is not to be asked any more once a trainer's arguments are made
    trial.see(accelerator, found)
    found.facts["wire"] = wire(device)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


def meet() -> Accelerator:
    """The accelerator of this launch, whose ranks all answered."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    try:
        cpu = not torch.accelerator.is_available()  # which accelerate must be told, else it finds one process
        accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=SECONDS))])
        if accelerator.num_processes > 1:
            accelerator.wait_for_everyone()
    except (RuntimeError, ValueError) as error:  # torch's errors of stores, sockets and collectives among them
        raise IncompatibleError(
            f"Rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')} on {socket.gethostname()} "
            f"could not meet the others within {SECONDS} s: {str(error).splitlines()[0]} Mind --main_process_ip, "
            "--main_process_port, --machine_rank and the firewall between machines."
        ) from error
    if accelerator.num_processes == 1:
        raise IncompatibleError("There is one process only. Type --num_processes N, as for `ftplus sft`.")
    return accelerator


# ---- who is here -----------------------------------------------------------------------------------------------------


def ranks(accelerator: Accelerator, found: Found) -> None:
    """Hosts, devices and versions; alike versions, and a device for each rank."""
    device = accelerator.device
    mine = {
        "host": socket.gethostname(),
        "device": described(device),
        "place": f"{socket.gethostname()} {device}" if device.type != "cpu" else f"rank {accelerator.process_index}",
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in VERSIONS}},
        "sees": sees_cache_of_first(accelerator),
    }
    all_of_them: list[dict[str, Any]] = [{} for _ in range(accelerator.num_processes)]
    dist.all_gather_object(all_of_them, mine)
    hosts = {one["host"]: 0 for one in all_of_them}
    for one in all_of_them:
        hosts[one["host"]] += 1
    first = all_of_them[0]["versions"]
    differ = sorted({name for one in all_of_them for name in first if one["versions"][name] != first[name]})
    places = [one["place"] for one in all_of_them]
    shared = all(one["sees"] for one in all_of_them)
    found.facts["ranks"] = {
        "ranks": f"{accelerator.num_processes} on {len(hosts)} machine{'s' * (len(hosts) > 1)}: "
        + ", ".join(f"{host} {count}" for host, count in sorted(hosts.items())),
        "backend": dist.get_backend(),
        "devices": ", ".join(sorted({one["device"] for one in all_of_them})),
        "mixed precision": accelerator.mixed_precision,
        "versions": f"differ: {', '.join(differ)}" if differ else "alike",
        "cache folder": "seen by all ranks"
        if shared
        else "not shared: set FTPLUS_CACHE to a folder that all ranks see (distill.cache=true needs it)",
    }
    if differ:
        found.faults.append(f"ranks have different versions of {', '.join(differ)}; install the same everywhere")
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        found.faults.append(f"several ranks share {twice}; start as many processes as there are devices")


def described(device: torch.device) -> str:
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads each" if device.type == "cpu" else str(device)


def sees_cache_of_first(accelerator: Accelerator) -> bool:
    """Whether this rank sees a file that the first one has just put into the cache folder."""
    from .model import cache

    name = [f"doctor-{os.getpid()}-{time.monotonic_ns()}"]
    dist.broadcast_object_list(name)
    file = cache() / name[0]
    try:
        if accelerator.is_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    except OSError:  # then nobody sees it
        pass
    accelerator.wait_for_everyone()
    sees = file.is_file()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        file.unlink(missing_ok=True)
    return sees


# ---- how fast they send ----------------------------------------------------------------------------------------------


def wire(device: torch.device) -> dict[str, str]:
    """Latency, and what a rank sends in a second while all reduce a large message (ring: 2 (n-1)/n of it)."""
    world = dist.get_world_size()
    small = timed(torch.ones(1, device=device), 20)
    elements = 2**16
    while (taken := timed(torch.ones(elements, device=device), 3)) < 0.1 and elements < MESSAGE:
        elements *= 4
    rate = 2 * (world - 1) / world * 4 * elements / taken
    return {
        "latency": f"{small * 1e6:,.0f} us to agree on one number",
        "bandwidth": f"{rate / 1e9:.3g} GB/s sent by each rank ({4 * elements / 1e6:.3g} MB reduced)",
    }


def timed(message: Tensor, times: int) -> float:
    """Seconds of one all-reduce, of the slowest rank; all ranks decide alike."""
    dist.all_reduce(message)  # connections are made at the first one
    if message.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        dist.all_reduce(message)
    if message.is_cuda:
        torch.cuda.synchronize()
    taken = torch.tensor((time.perf_counter() - begin) / times, device=message.device, dtype=torch.float32)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()
