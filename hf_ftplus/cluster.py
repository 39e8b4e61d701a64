"""What the ranks of a launch really do, in seconds: `ftplus doctor --distributed`.

    check() -> Found     on every rank: who is here, whether weights are in shards, how fast ranks send, and whether
                         EWC makes the update of one process on the same rows

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

from .errors import IncompatibleError
from .weights import local, sharded, trainable

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

SECONDS = 60
"""That ranks wait for one another."""
MESSAGE = 2**24
"""Elements of the largest message that is timed (64 MB); a slow wire gets smaller ones."""
STEPS, ROWS, RATE = 3, 2, 0.5
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
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":  # of which accelerate makes DDP on CPUs
        found.facts["sharding"] = {
            "DeepSpeed": "strategies that act on weights (ewc, si) train under ZeRO-1 and ZeRO-2, with gradients and "
            "state whole on each rank; under ZeRO-3 they are refused: use zero2, fsdp2 or multi_gpu"
        }
    else:
        sharding_and_laws(accelerator, found)
    found.facts["wire"] = wire(accelerator.device)
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


# ---- what they hold, and what a strategy does there ------------------------------------------------------------------


def sharding_and_laws(accelerator: Accelerator, found: Found) -> None:
    """Train a tiny model with EWC as this launch would, and on every rank alone on all rows."""
    from .testing import tiny_model

    torch.manual_seed(0)  # accelerate may load from the first rank only
    model = tiny_model().to(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    alone = tiny_model().to(accelerator.device)
    start = {name: weight.detach().clone() for name, weight in trainable(alone).items()}
    model, optimizer = accelerator.prepare(model, optimizer)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        found.facts["sharding"] = {"FSDP version 1": "strategies are refused; set fsdp_version: 2"}
        found.faults.append(
            "FSDP version 1 flattens weights into one; set fsdp_version: 2, or --accelerate_config fsdp2"
        )
        return
    if any(local(weight).device.type != accelerator.device.type for weight in model.parameters()):
        found.facts["sharding"] = {"weights in CPU memory": "strategies are refused; set fsdp_offload_params: false"}
        found.faults.append("FSDP keeps weights in CPU memory; set fsdp_offload_params: false in the accelerate config")
        return
    found.facts["sharding"] = held(accelerator, model, found)
    together = trained(model, optimizer, accelerator.process_index, accelerator)
    single = trained(alone, torch.optim.SGD(alone.parameters(), lr=RATE), None, accelerator)
    found.facts["laws"] = compared(together, single, start, accelerator, found)


def held(accelerator: Accelerator, model: nn.Module, found: Found) -> dict[str, str]:
    """What of the weights this rank holds, as their tensors say."""
    weights = list(model.parameters())
    whole, mine = sum(weight.numel() for weight in weights), sum(local(weight).numel() for weight in weights)
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    said = (
        f"on: FSDP2, a rank holds {mine / whole:.0%} of the weights"
        if sharded(weights)
        else "off: every rank holds all"
    )
    if asked and not sharded(weights):
        found.faults.append(
            "FSDP was asked for, and every rank holds the whole model: accelerate shards on no CPU"
            if accelerator.device.type == "cpu"
            else "FSDP was asked for, and every rank holds the whole model"
        )
    return {"weights": said, "launched as": str(accelerator.distributed_type).rpartition(".")[2]}


def trained(model: nn.Module, optimizer: Any, rank: int | None, accelerator: Accelerator) -> dict[str, Tensor]:
    """Whole weights, and EWC's importances, after some steps on the rows of `rank`, or on all where it is None."""
    from .strategies.ewc import EWC
    from .strategy import Memory, Run
    from .tensorfile import whole
    from .testing import tiny_batches

    world, device = accelerator.num_processes, accelerator.device
    batches = tiny_batches(seed=2, count=ROWS * world, size=1)
    inner = accelerator.unwrap_model(model)  # which strategies are given, as in a trainer
    weights = trainable(inner)
    strategy = EWC(strength=1.0, fisher="empirical", remember=False)
    protect = {"protect": tiny_batches(seed=1, count=2 * world, size=1)}
    run = Run(inner, weights, protect, lambda rows: [], device, 0, Memory(), autocast=accelerator.autocast)
    strategy.prepare(run)
    mine = batches if rank is None else batches[rank::world]
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for _ in range(STEPS):
        for number, batch in enumerate(mine):
            inputs = {key: tensor.to(device) for key, tensor in batch.items()}
            count = (inputs["labels"][:, 1:] != -100).sum()
            if hasattr(model, "require_backward_grad_sync"):
                model.require_backward_grad_sync = number == len(mine) - 1
            with accelerator.autocast():
                loss = model(**inputs).loss * count / tokens
            (loss * (1 if rank is None else world)).backward()  # gradients are averaged over ranks
        with torch.no_grad():
            strategy.before_step(run)
        optimizer.step()
        optimizer.zero_grad()
    found = {f"weights.{name}": whole(weight) for name, weight in weights.items()}
    return found | {f"state.{name}": whole(tensor) for name, tensor in strategy.state_dict().items()}


def compared(
    together: dict[str, Tensor],
    single: dict[str, Tensor],
    start: dict[str, Tensor],
    accelerator: Accelerator,
    found: Found,
) -> dict[str, str]:
    """Same on all ranks to the bit; and that of one process, beside how far the weights went."""
    bits = [float(sum(tensor.double().sum() for tensor in together.values()))]
    everywhere: list[list[float]] = [[] for _ in range(accelerator.num_processes)]
    dist.all_gather_object(everywhere, bits)
    alike = all(one == everywhere[0] for one in everywhere)
    ends = {name: single[f"weights.{name}"] for name in start}
    far = torch.stack([(together[f"weights.{name}"] - end).abs().max() for name, end in ends.items()]).max().item()
    went = torch.stack([(end - start[name].cpu()).abs().max() for name, end in ends.items()]).max().item()
    most = 1e-4 if accelerator.mixed_precision == "no" else 0.05
    if not alike:
        found.faults.append("ranks end with different weights or strategy state; expected the same on all")
    if not far <= most * went:
        found.faults.append(
            f"an update with ewc is not that of one process: {far / went:.1e} of the way apart, expected {most:.0e}"
        )
    return {
        "same on all ranks": "yes, weights and state of ewc" if alike else "no",
        "as one process": f"{far / went:.0e} of the way apart after {STEPS} steps with ewc (allowed {most:.0e})",
    }


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
