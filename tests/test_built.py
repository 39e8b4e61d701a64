"""Wheel and sdist as they would be published: only the package inside, and it trains from an empty environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from commands import make_place, words

pytest.importorskip("hatchling", reason="builds with hatchling: pip install 'hf-ftplus[test]'")

ROOT = Path(__file__).parents[1]


def build(folder, out, kind):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


def tracked(folder: str) -> set[str]:
    """Files of the package that git knows; of a checkout without git, all but caches."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", folder], cwd=ROOT, capture_output=True, check=True
        )
        return set(done.stdout.decode().split())
    except (OSError, subprocess.CalledProcessError):
        return {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """From the sdist, as pip builds it where there is no wheel."""
    place = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    return build(next(place.iterdir()), tmp_path_factory.mktemp("wheel"), "wheel")


def test_the_sdist_holds_the_package_and_its_papers(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    package = {name for name in names if name.startswith("hf_ftplus/")}
    assert package == tracked("hf_ftplus")
    assert names - package == {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"}


def test_the_wheel_holds_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == tracked("hf_ftplus")
    assert {name.rpartition("/")[2] for name in about} == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "LICENSE"}


def test_it_trains_from_an_empty_environment(wheel, tmp_path):
    """Empty but for what it depends on, which is found where it is installed already."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    inside = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (inside / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # ours there is editable, and not reached

    place = make_place(tmp_path / "place")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*line):
        done = subprocess.run(
            [folder / "bin" / line[0], *line[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(inside) in run("python", "-c", "import hf_ftplus; print(hf_ftplus.__file__)")
    found = {row["name"]: row["status"] for row in json.loads(run("ftplus", "plugins", "--json"))}
    assert {name: found[name] for name in ("ewc", "si", "distill", "replay", "multitask")} == dict.fromkeys(
        ("ewc", "si", "distill", "replay", "multitask"), "ok"
    )
    run("ftplus", *words(place, tmp_path / "out"))
    assert (tmp_path / "out" / "ftplus" / "report.html").is_file()
    assert (tmp_path / "out" / "ftplus" / "memory" / "ewc.safetensors").is_file()
