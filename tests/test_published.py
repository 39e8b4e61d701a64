"""What an author does from nothing to a package works as it is written, without network and untouched."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import make_place, words
from published import ROOT, workplace

from hf_ftplus.cli import main, plugin_new

STEPS = re.search(r"```console\n(.*?)```", (ROOT / "plugins" / "README.md").read_text(encoding="utf-8"), re.S)[1]
LINES = [line.removeprefix("$ ").split("  #")[0].strip() for line in STEPS.splitlines()]


@pytest.mark.slow
def test_the_steps_from_nothing_to_a_package_work_as_they_are_written(tmp_path):
    env, folder = workplace(tmp_path / "venv"), tmp_path
    assert LINES[-1] == "twine upload dist/*"
    said = {}
    for line in LINES[:-1]:
        if line.startswith("cd "):
            folder = folder / line.removeprefix("cd ")
            continue
        done = subprocess.run(line, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
        said[line] = done.stdout
        assert done.returncode == 0, f"{line}: {done.stdout[-3000:]} {done.stderr[-1000:]}"
    assert "strength = 0.1" in said["ftplus plugins slow-start"]
    assert "8 of 8 laws kept" in said["ftplus plugin test slow-start"]
    assert "2 passed" in said["pytest"]
    (wheel,) = (folder / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == {"ftplus_slow_start.py"}
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    place = make_place(tmp_path / "place")
    line = ["ftplus", *words(place, tmp_path / "out", "--use_cpu", "true", plugin="slow-start", protect=None)]
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "checkpoint-4" / "ftplus" / "slow-start.safetensors").exists()


def test_a_new_distribution_is_complete_and_names_nothing_but_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plugin", "new", "ftplus-my-idea", "--author", "Ada"]) == 0
    folder = tmp_path / "ftplus-my-idea"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(
        [
            ".github/workflows/test.yml", ".gitignore", "CHANGELOG.md", "LICENSE", "README.md", "ftplus_my_idea.py",
            "pyproject.toml", "tests/test_my_idea.py",
        ]
    )  # fmt: skip
    text = "".join((folder / name).read_text() for name in files)
    assert not re.search(r"ownidea|OwnIdea|THE-[A-Z]", text)
    assert "Ada" in (folder / "LICENSE").read_text()
    assert "class MyIdea(Strategy)" in text
    said = capsys.readouterr().out
    assert "pytest" in said
    assert "a line of .github/workflows/test.yml says where CI gets it" in said
    steps = (folder / ".github" / "workflows" / "test.yml").read_text()
    assert steps.index('# - run: pip install "hf-ftplus @') < steps.index('pip install ".[test]"')
    lint = [sys.executable, "-m", "ruff", "check", "--isolated"]
    linted = subprocess.run(lint, cwd=folder, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (["ewc"], 2, "'ewc' is a strategy of hf-ftplus"),
        (["kfac"], 2, "'kfac' is the strategy of ftplus-kfac"),
        (["My Idea"], 2, "expected lower-case letters and digits"),
        (["../up"], 2, "expected lower-case letters and digits"),
        (["test"], 2, "neither new nor test"),
        (["idea", "--author", 'a"b'], 2, "expected a name without quotes"),
        (["idea", "--out", "full"], 6, "full is not an empty folder"),
    ],
)
def test_what_could_not_be_published_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, line, code, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert main(["plugin", "new", *line]) == code
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_every_file_of_the_template_is_in_the_package():
    assert plugin_new.TEMPLATE.is_relative_to(Path(plugin_new.__file__).parents[1])
    assert len(list(plugin_new.TEMPLATE.rglob("*.txt"))) == 8


@pytest.mark.parametrize("folder", sorted((ROOT / "plugins").glob("ftplus-*")), ids=lambda folder: folder.name)
def test_our_plugins_have_what_a_new_distribution_has(tmp_path, folder):
    name = folder.name.removeprefix("ftplus-")
    made = {path.relative_to(tmp_path / "new") for path in plugin_new.write(tmp_path / "new", name, "nobody")}
    module = Path(f"ftplus_{name}.py")  # or a package of this name
    assert [str(file) for file in made - {module} if not (folder / file).exists()] == []
    assert (folder / module).exists() or (folder / module.stem / "__init__.py").exists()
    for file in (".gitignore", ".github/workflows/test.yml"):
        assert (folder / file).read_text() == (tmp_path / "new" / file).read_text(), file
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    ours, theirs = ((place / "pyproject.toml").read_text() for place in (folder, tmp_path / "new"))
    for line in ('license-files = ["LICENSE"]', 'test = ["pytest>=8.3"]'):
        assert line in ours
        assert line in theirs


def test_the_tests_of_our_plugins_stand_alone(tmp_path):
    """As the CI file of each runs them: from its folder, with hf-ftplus and nothing of this repository's tests."""
    folders = sorted((ROOT / "plugins").glob("ftplus-*"))
    for folder in folders:
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    line = [sys.executable, "-W", "error", "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(ROOT), *(str(tmp_path / folder.name) for folder in folders)])
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout[-3000:]
    assert "warning" not in done.stdout
    assert all(f"{folder.name}/tests/" in done.stdout for folder in folders)
