"""Watch a real model learn 96 facts twice, plain and with EWC, and see what each left of what it knew.

    python examples/demo/run.py            (or: make demo)

Both are ordinary `ftplus sft` commands, printed before they run; their folders keep log, report and model.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from make_data import make_data
from rich.console import Console

from hf_ftplus.report import Report, joined_completions, joined_table

HERE = Path(__file__).parent
OUT = Path("demo_output")
RUNS = {
    "plain": ["--learning_rate", "1e-4"],
    "ewc": ["--plugin", "ewc", "--set", "ewc.strength=30000", "--set", "ewc.remember=false", "--learning_rate", "2e-4"],
}
"""The same data, steps and seed. EWC holds back what a higher rate would break, so it can use one."""
ENVIRONMENT = {
    "THP_MEM_ALLOC_ENABLE": "1",  # PyTorch: huge pages for large tensors, a sixth of the time of a step here
    "GOMP_SPINCOUNT": "20000",  # threads wait awake for a moment: they wait often and briefly, a fifth of a step in all
    # glibc: tensors up to 32 MB are cut from memory that is kept, not asked from the system anew at every operation
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4294967296",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",  # kernels kept ready, each with memory of its own: by default 1024
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    """Write the data, run both commands, show both reports beside each other."""
    os.chdir(HERE.parents[1])  # demo.yaml names its files from the top of the repository
    console = Console(highlight=False)
    make_data(OUT / "data")
    reports, costs = {}, {}
    for number, (name, flags) in enumerate(RUNS.items(), 1):
        command = ["ftplus", "sft", "--config", "examples/demo/demo.yaml", "--output_dir", str(OUT / name), *flags]
        console.print(f"[bold]{number}/{len(RUNS)} {name}[/]: {shlex.join(command)}")
        begin = time.perf_counter()
        run(command, OUT / name)
        reports[name] = Report.load(OUT / name / "ftplus" / "report.json")
        costs[name] = {
            "steps": reports[name].facts["steps"],
            "seconds of training": reports[name].facts["seconds"]["training"],
            "seconds in all": time.perf_counter() - begin,
        }
    tasks = {name: report.tasks for name, report in reports.items()}
    console.print(joined_completions(tasks), "", joined_table(tasks, costs))


def run(command: list[str], folder: Path) -> None:
    """One command in a fresh folder; its own words go to a log, its progress stays on the screen."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command[0] = str(Path(sys.executable).parent / "ftplus")
    with (OUT / f"{folder.name}.log").open("w") as log:
        code = subprocess.run(command, stdout=log, env={**os.environ, **ENVIRONMENT}, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
