"""Plugins as a stranger has them: built to wheels and installed beside everything else, without network."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
OFFLINE = {
    "PIP_NO_BUILD_ISOLATION": "0",  # which means: no isolation
    "PIP_NO_DEPS": "1",
    "PIP_NO_INDEX": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def environment(**more: str) -> dict[str, str]:
    """Of a command that needs no network and sees this checkout."""
    return {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT), **more}


def wheels(folders: list[Path], out: Path) -> list[Path]:
    """One wheel of each distribution, built from a copy: setuptools leaves things beside its sources."""
    copies = []
    for folder in folders:
        copies.append(out / "sources" / folder.name)
        shutil.copytree(folder, copies[-1], ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    _run([sys.executable, "-m", "pip", "wheel", "-q", "-w", str(out / "wheels"), *map(str, copies)])
    return sorted((out / "wheels").glob("*.whl"))


def install(built: list[Path], target: Path) -> Path:
    """Wheels in a folder for PYTHONPATH."""
    _run([sys.executable, "-m", "pip", "install", "-q", "--target", str(target), *map(str, built)])
    return target


def workplace(folder: Path) -> dict[str, str]:
    """The environment of an author: a venv that sees what this one has, with pip, pytest and ftplus on its PATH."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    ours = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages / "ours.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in ours))
    for command, module in {"pip": "pip", "pytest": "pytest", "ftplus": "hf_ftplus"}.items():
        script = folder / "bin" / command
        script.write_text(f'#!/bin/sh\nexec {python} -m {module} "$@"\n')
        script.chmod(0o755)
    return environment(PATH=f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", VIRTUAL_ENV=str(folder))


def _run(line: list[str]) -> None:
    done = subprocess.run(line, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
