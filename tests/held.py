"""An output folder that another process has locked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_ftplus.disk import LOCK

HOLDS = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); f.write('pid 1 on elsewhere'); f.flush(); "
    "print(flush=True); input()"
)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """`pid 1 on elsewhere` has it meanwhile, and is killed after."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = [sys.executable, "-c", HOLDS, str(folder / LOCK)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            yield
        finally:
            process.kill()
