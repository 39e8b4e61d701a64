"""What holds for every plugin here: it passes `ftplus plugin test` as it is, and its page says its settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import QUICKLY, make_place, typed
from pages import settings_table

from hf_ftplus import Strategy, contract, plugins
from hf_ftplus.cli import main

ROOT = Path(__file__).parents[1]
NAMES = sorted(folder.parent.name.removeprefix("ftplus-") for folder in Path(__file__).parent.glob("*/pyproject.toml"))
DECLARED = ("silent at zero", "acts", "leaves no trace", "travels light", "same anywhere")
"""Laws that a declaration can change, and the one of two processes; the tests of each plugin try the others."""


@pytest.mark.laws
@pytest.mark.parametrize("name", NAMES)
def test_the_command_passes_every_plugin_without_a_flag(capsys, name):
    code = main(["plugin", "test", name, "--distributed", *(word for law in DECLARED for word in ("--law", law))])
    out, err = capsys.readouterr()
    assert code == 0, out + err
    if "excused" in out:
        assert "knowingly" in out


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_on_its_page(name):
    table = settings_table(name)
    page = ROOT / "plugins" / f"ftplus-{name}" / "README.md"
    assert table in page.read_text(encoding="utf-8"), f"Put this table into {page}:\n\n{table}\n"


@pytest.mark.parametrize("name", NAMES)
def test_what_its_page_tells_to_type_works(tmp_path, monkeypatch, name):
    """One after the other, on a tiny model, in two steps."""
    monkeypatch.chdir(make_place(tmp_path))
    (tmp_path / "old.jsonl").symlink_to("protect.jsonl")
    (tmp_path / "chat.jsonl").symlink_to("protect.jsonl")
    (tmp_path / "held_out.jsonl").symlink_to("learn.jsonl")
    page = (ROOT / "plugins" / f"ftplus-{name}" / "README.md").read_text(encoding="utf-8")
    found, outputs = typed(page), ["OUTPUT", "ADAPTER"]
    whole = next(line for line in found if line[0] == "sft")
    if any("ADAPTER" in line for line in found):
        found.insert(1, ["sft", "--use_peft", *whole[3:]])
    for line in found:
        line = [*whole, *(word for word in line if word not in ("...", *whole))] if "..." in line else line
        more = [*QUICKLY, "--output_dir", outputs.pop(0)] if line[0] == "sft" else []
        assert main([*("model" if word == "demo" else word for word in line), *more]) == 0, line


@pytest.mark.parametrize("name", NAMES)
def test_its_page_is_a_method_card_and_its_row_is_in_the_benchmark(name):
    page = (ROOT / "plugins" / f"ftplus-{name}" / "README.md").read_text(encoding="utf-8")
    for what in ("source", "formula", "helps when", "costs", "measured", "does not help when"):
        assert f"\n| {what} | " in page, what
    measured = json.loads((ROOT / "examples" / "benchmarks" / "strategies.json").read_text(encoding="utf-8"))
    rows = (ROOT / "examples" / "benchmarks" / "strategies.py").read_text(encoding="utf-8")
    named = re.findall(rf'^    "(.+?)": f?"--plugin {name} ', rows, re.M)
    assert [row for row in named if measured.get(row)], f"a row of strategies.py with --plugin {name}, measured"


ONE_SIDED = {"mix", "read_gradients"}
"""Moments that no built-in strategy uses, or no plugin: they were there before the rule, and none may join them."""


def test_no_moment_is_there_for_a_built_in_or_a_plugin_alone():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    built_in = [plugins.load(name) for name in re.findall(r'^(\w+) = "hf_ftplus\.strategies\.', text, re.M)]
    ours = [plugins.load(name) for name in NAMES]

    def used(hook, classes):
        return any(getattr(kind, hook) is not getattr(Strategy, hook) for kind in classes)

    hooks = set(contract.HOOKS) - {"overrides"}  # asked by the host, and never overridden
    assert {hook for hook in hooks if not (used(hook, built_in) and used(hook, ours))} == ONE_SIDED
