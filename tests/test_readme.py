"""The README tells the truth: its Python runs, its commands exist, its tree is the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from datasets import Dataset
from tiny import tiny_llama, tiny_tokenizer
from training import LEARN, PROTECT, arguments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:40])
def test_every_python_block_runs(block, tmp_path):
    known = {
        "model": tiny_llama(),
        "args": arguments(tmp_path, max_steps=2),
        "learn": Dataset.from_list(LEARN),
        "protect": Dataset.from_list(PROTECT),
        "tokenizer": tiny_tokenizer(),
    }
    exec(compile(block, "README.md", "exec"), known)
    assert known["trainer"].state.global_step == 2


def test_the_readme_has_blocks_to_run():
    assert len(BLOCKS) >= 3


def test_every_flag_of_ours_that_the_readme_names_exists():
    from hf_ftplus.cli.sft import sft

    known = CliRunner().invoke(sft, ["--help"]).output
    for flag in [
        "--plugin",
        "--protect",
        "--measure",
        "--metric",
        "--memory",
        "--dry-run",
        "--fail-if-retention-below",
    ]:
        assert flag in README
        assert flag in known


def test_every_file_in_the_readmes_tree_exists():
    tree = README[README.rindex("```\nhf_ftplus/") :].split("```")[1]
    names = [
        name
        for line in tree.splitlines()
        for name in re.findall(r"[\w/]+(?:\.py|/)", re.split(r"  +", line.strip())[0])
    ]
    assert len(names) > 20
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "hf_ftplus" / name).exists(), name
