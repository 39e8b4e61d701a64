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
import tempfile
import time
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .errors import IncompatibleError
from .tensorfile import whole
from .weights import full_shape, local, sharded, trainable

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from .strategies.ewc import EWC
    from .strategy import Strategy

Rows = dict[str, "Tensor"]

SECONDS = 60
"""That ranks wait for one another."""
MESSAGE = 2**24
"""Elements of the largest message that is timed (64 MB); a slow wire gets smaller ones."""
STEPS, ROWS, RATE = 3, 2, 0.5
"""Of the trial run: steps, rows of each rank in each, learning rate."""
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
    """Train a tiny model with EWC as a run of this launch does, and on every rank alone on all rows."""
    from .testing import tiny_batches

    world, device = accelerator.num_processes, accelerator.device
    learn = tiny_batches(seed=2, count=ROWS * world, size=1)
    protect = tiny_batches(seed=1, count=2 * world, size=1)
    try:
        trainer = run(learn, protect, accelerator)
    except IncompatibleError as error:
        found.facts["sharding"] = {"strategies": "refused"}
        found.faults.append(str(error).rstrip("."))
        return
    found.facts["sharding"] = held(trainer, found)
    strategies = trainer.ftplus.strategies if hasattr(trainer, "ftplus") else []
    together, single = weights_and_state(trainer.model, strategies), alone(learn, protect, device, bool(strategies))
    most = 1e-4 if accelerator.mixed_precision == "no" else 0.05
    found.facts["laws"] = compared(together, single, start(), most, found)


def ewc() -> EWC:
    from .strategies.ewc import EWC

    return EWC(strength=1.0, fisher="empirical", remember=False)


def run(learn: list[Rows], protect: list[Rows], accelerator: Accelerator) -> Any:
    """A trainer after some steps on all rows, shared out to ranks; with EWC, but under ZeRO-3, which keeps weights in
    parts.

    Raises:
        IncompatibleError: strategies cannot act in what this launch makes of a model.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from .refusals import zero_stage
    from .testing import tiny_model
    from .trainer import attach

    precision = accelerator.mixed_precision
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=ROWS, optim="sgd",
            learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to="none",
            disable_tqdm=True, bf16=precision == "bf16", fp16=precision == "fp16", ddp_timeout=SECONDS,
            use_cpu=accelerator.device.type == "cpu",
        )  # fmt: skip
        trainer = Trainer(tiny_model(), args, train_dataset=[unbatched(rows) for rows in learn])
        trainer.remove_callback(PrinterCallback)
        trainer = attach(trainer, *([ewc()] if zero_stage(args) != 3 else []), protect=protect)
        trainer.train()
    return trainer


def unbatched(rows: Rows) -> Rows:
    return {key: tensor[0] for key, tensor in rows.items()}


def held(trainer: Any, found: Found) -> dict[str, str]:
    """What of the weights this rank holds, as their tensors say."""
    from .refusals import zero_stage

    weights, cpu = list(trainer.model.parameters()), trainer.args.device.type == "cpu"
    every = sum(full_shape(weight).numel() for weight in weights)
    mine = sum(getattr(weight, "ds_tensor", local(weight)).numel() for weight in weights)
    zero = f"DeepSpeed ZeRO-{zero_stage(trainer.args)}" if trainer.is_deepspeed_enabled else ""
    for name, there in (("FSDP", sharded(weights)), ("DEEPSPEED", zero)):
        if asked_for(name) and not there:
            why = ": accelerate shards on no CPU" if cpu else ""
            found.faults.append(f"{name} was asked for, and every rank holds the whole model{why}")
    said = f"on: {zero or 'FSDP2'}, a rank holds {mine / every:.0%} of the weights"
    if mine == every:
        said = f"off: every rank holds all{f' ({zero} shares out the optimizer)' if zero else ''}"
    return {"weights": said, "launched as": str(trainer.args.distributed_state.distributed_type).rpartition(".")[2]}


def asked_for(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "").lower() == "true"


def alone(learn: list[Rows], protect: list[Rows], device: torch.device, with_ewc: bool) -> dict[str, Tensor]:
    """The same steps in a bare loop on this rank, in fp32."""
    from .strategy import Memory, Run
    from .testing import tiny_model

    model, strategies = tiny_model().to(device), [ewc()] if with_ewc else []
    weights = trainable(model)
    optimizer = torch.optim.SGD(weights.values(), lr=RATE)
    run = Run(model, weights, {"protect": protect}, lambda rows: [], device, 0, Memory())
    for strategy in strategies:
        strategy.prepare(run)
    tokens = sum(int((rows["labels"][:, 1:] != -100).sum()) for rows in learn)
    for _ in range(STEPS):
        for rows in learn:
            count = (rows["labels"][:, 1:] != -100).sum().to(device)
            (model(**{key: tensor.to(device) for key, tensor in rows.items()}).loss * count / tokens).backward()
        for strategy in strategies:
            with torch.no_grad():
                strategy.before_step(run)
        optimizer.step()
        optimizer.zero_grad()
    return weights_and_state(model, strategies)


def weights_and_state(model: nn.Module, strategies: list[Strategy]) -> dict[str, Tensor]:
    found = {f"weights.{name}": whole(weight) for name, weight in trainable(model).items()}
    for strategy in strategies:
        found |= {f"state.{name}": whole(tensor) for name, tensor in strategy.state_dict().items()}
    return found


def start() -> dict[str, Tensor]:
    from .testing import tiny_model

    return weights_and_state(tiny_model(), [])


def compared(
    together: dict[str, Tensor], single: dict[str, Tensor], start: dict[str, Tensor], most: float, found: Found
) -> dict[str, str]:
    """Same on all ranks to the bit; and that of one process, within `most` of the way that the weights went."""
    bits = [float(sum(tensor.double().sum() for tensor in together.values()))]
    everywhere: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, bits)
    alike = all(one == everywhere[0] for one in everywhere)
    far = max((together[name].float() - single[name]).abs().max().item() for name in start)
    went = max((single[name] - begun).abs().max().item() for name, begun in start.items())
    how = "with ewc" if single.keys() > start.keys() else "without ewc, which ZeRO-3 does not allow"
    if not alike:
        found.faults.append("ranks end with different weights or strategy state; expected the same on all")
    if not far <= most * went:
        found.faults.append(
            f"an update {how} is not that of one process: {far / went:.1e} of the way apart, expected {most:.0e}"
        )
    return {
        "same on all ranks": "yes, weights and state of strategies" if alike else "no",
        "as one process": f"{far / went:.0e} of the way apart after {STEPS} steps {how} (allowed {most:.0e})",
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
