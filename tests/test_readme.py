"""The README tells the truth: its Python runs, its commands exist, its tree is the tree."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from datasets import Dataset
from pages import example, settings_table
from tiny import tiny_llama, tiny_tokenizer
from training import LEARN, PROTECT, arguments

import hf_ftplus
from hf_ftplus import Strategy
from hf_ftplus.cli import ALIASES, COMMANDS, ELSEWHERE, cli
from hf_ftplus.cli.sft import configured
from hf_ftplus.errors import FTPlusError
from hf_ftplus.stages.plan import read
from hf_ftplus.task_keys import KEYS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BLOCKS = [block for block in PYTHON if "trainer.train()" in block]
"""The others are tests of their own."""


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
    assert [block for block in PYTHON if block not in BLOCKS] == [example()]


# ---- commands --------------------------------------------------------------------------------------------------------

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.yaml")),
    *sorted((ROOT / "plugins").rglob("*.md")),
]
TYPED = re.compile(r"^[$# ]*(?:python -m hf_)?ftplus ([a-z]+(?: [^`\n]*)?)$|`ftplus ([a-z]+(?: [^`]*)?)`", re.M)


def typed() -> list[str]:
    """Every `ftplus ...` that a page tells to type, in a block or in a sentence."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for one, other in TYPED.findall(re.sub(r"\\\n", " ", text)):
            words = " ".join((one or other).split())
            found.append(re.split(r" +# ", words)[0])
    return sorted(set(found))


def options_of(words: list[str]) -> set[str]:
    """The flags of the command that stands at the beginning of `words`, with TRL's and accelerate's where it takes them."""
    from hf_ftplus.cli.launch import flags
    from hf_ftplus.cli.sft import Sft, _trl_parser

    command, context = cli, click.Context(cli)
    words = list(words)
    if words[0] in ELSEWHERE:  # a plugin brings it, which need not be installed
        sys.path.append(str(ROOT / "plugins" / ELSEWHERE[words[0]]))
        command = importlib.import_module(f"{ELSEWHERE[words[0]].replace('-', '_')}.command").repair
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        command = command.get_command(context, ALIASES.get(words[0], words[0])) or pytest.fail(f"no command {words}")
        words.pop(0)
    known = {flag for option in command.params if isinstance(option, click.Option) for flag in option.opts}
    if isinstance(command, Sft):
        known |= {flag for action in _trl_parser()._actions for flag in action.option_strings}
    if isinstance(command, Sft) or command.name == "doctor":
        known |= {f"--{flag}" for flag in flags()}
    return {flag.replace("-", "_") for flag in known} | {"__help", "__version", "__help_all"}


@pytest.mark.parametrize("line", typed())
def test_every_command_on_a_page_exists_with_its_flags(line):
    words = shlex.split(line, comments=True)
    flags = [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
    unknown = [flag for flag in flags if flag.replace("-", "_") not in options_of(words)]
    assert unknown == []


@pytest.mark.parametrize("line", [line for line in typed() if re.search(r"--plugin ewc\b", line)])
def test_a_command_with_ewc_does_what_the_readme_says_of_clipping(line):
    assert "--max_grad_norm 0" in line


def with_ewc(given) -> bool:
    names = [name for item in given.get("plugins", ()) for name in (item if isinstance(item, dict) else [item])]
    return "ewc" in names


def test_so_do_yaml_and_python_with_ewc():
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    files = [page.read_text(encoding="utf-8") for page in PAGES if page.suffix == ".yaml"]
    found = [given for given in map(yaml.safe_load, [*blocks, *files]) if with_ewc(given)]
    assert len(found) >= 3
    assert {given.get("max_grad_norm") for given in found} == {0}
    scripts = [page.read_text(encoding="utf-8") for page in (ROOT / "examples").glob("*.py")]
    named = [text for text in [*BLOCKS, *scripts] if re.search(r"[\"(]ewc\"|EWC\(", text)]
    own = [text for text in named if "from trl import SFTTrainer, get_dataset" not in text]
    assert len(own) >= 7
    assert [text for text in own if "max_grad_norm=0" not in text] == []
    for adapter in (ROOT / "examples" / "adapters").glob("*.py"):
        assert re.search(r"max_grad_norm:? 0", adapter.read_text(encoding="utf-8")), adapter.name


def test_the_lines_of_shells_are_those_of_click():
    from click.shell_completion import get_completion_class

    for shell, file in {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/config.fish"}.items():
        (line,) = [line for line in README.splitlines() if f"_FTPLUS_COMPLETE={shell}_source ftplus" in line]
        assert file in line
        assert get_completion_class(shell) is not None
        assert line.startswith("eval ") or re.match(r"\S+ ftplus \| source", line)


def test_there_are_commands_to_look_at():
    assert len(typed()) > 25


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name):
    assert re.search(rf"ftplus {name}\b", README), f"`ftplus {name}` has no sentence in the README"


LEFT_TO_HELP = {
    *("--help-all", "--json", "--no-plugin", "--dtype", "--device", "--bf16", "--batch_size"),
    *("--rows", "--max_new_tokens", "--top_p", "--hardware", "--author", "--law", "--seed", "--debug", "--version"),
}
"""Flags of whose meaning their help says all."""


def flags(command, context=None) -> Iterator[str]:
    """The longest spelling of each flag of a command, and of the commands below it."""
    if isinstance(command, click.Group):
        context = context or click.Context(command)
        for name in command.list_commands(context):
            yield from flags(command.get_command(context, name), context)
    yield from (max(item.opts, key=len) for item in command.params if isinstance(item, click.Option))


@pytest.mark.parametrize("name", sorted(set(flags(cli))))
def test_every_flag_of_ours_is_in_the_readme_or_the_decision_to_leave_it_to_help_stands_here(name):
    pages = README + (ROOT / "plugins" / "README.md").read_text(encoding="utf-8")
    assert bool(re.search(rf"{re.escape(name)}\b", pages)) != (name in LEFT_TO_HELP)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_a_task_is_in_the_readme(key):
    section = README[README.index("## Several tasks in one run") : README.index("## Runs that follow one another")]
    assert re.search(rf"\b{key}\b", section)


def test_every_variable_of_the_environment_is_in_the_readme():
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "hf_ftplus").rglob("*.py"))
    for name in set(re.findall(r'"(FTPLUS_[A-Z_]+)"', sources)) - {"FTPLUS_RANKS"}:  # between our own processes
        assert f"`{name}" in README, name


def test_the_exit_codes_are_those_of_the_errors():
    said = re.search(r"Exit codes: (.*?)\.", README, re.DOTALL)[1]
    for kind in FTPlusError.__subclasses__():
        assert re.search(rf"\b{kind.exit_code} ", said), kind.__name__


# ---- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.DOTALL), ids=lambda text: text[:30])
def test_every_yaml_block_is_read(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in set(re.findall(r"[\w-]+\.jsonl", block)):
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n')
    given = yaml.safe_load(block)
    if "stages" in given:
        assert [stage.name for stage in read(given).stages] == [stage["name"] for stage in given["stages"]]
    else:
        config, _, _ = configured({}, [], given)
        assert [task.name for task in config.tasks] == [task["name"] for task in given["tasks"]]


# ---- strategies ------------------------------------------------------------------------------------------------------


def test_the_diagram_has_every_moment_of_a_strategy_and_no_other():
    diagram = re.search(r"```\nrefuse\(run\).*?```", README, re.DOTALL)[0]
    shown = set(re.findall(r"^[│├ ]*([a-z_]+)\(run\b", diagram, re.M))
    moments = {name for name, item in vars(Strategy).items() if takes_run(item)}
    beside = {"load_state_dict", "preview"}  # not moments: they are in strategy.py, to which the README sends authors
    assert shown == moments - beside
    assert beside <= moments


def takes_run(item) -> bool:
    return inspect.isfunction(item) and "run" in inspect.signature(item).parameters


def test_every_moment_is_in_the_docstring_that_authors_read():
    page = inspect.getdoc(sys.modules[Strategy.__module__])
    public = [name for name, item in vars(Strategy).items() if inspect.isfunction(item) and not name.startswith("_")]
    for name in set(public) - {"overrides"}:  # asked by the host, not a moment of a run
        assert name in page, name
    assert all(inspect.getdoc(getattr(Strategy, name)) for name in public)


BUILT_IN = re.findall(r'^(\w+) = "hf_ftplus\.strategies\.', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)


def test_every_setting_is_in_the_readme():
    table = settings_table(*BUILT_IN)
    assert table in README, f"Put this table under Strategies in the README:\n\n{table}\n"


def test_every_public_name_has_a_docstring():
    for name in hf_ftplus.__all__:
        assert inspect.getdoc(getattr(hf_ftplus, name)), name


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:\s]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


TREE = README[README.rindex("```\nhf_ftplus/") :].split("```")[1]
HEADS = [
    name
    for line in TREE.splitlines()
    for name in re.findall(r"[\w/]+(?:\.py|/)", re.split(r"  +", line.strip())[0])
]  # fmt: skip


def test_every_file_in_the_readmes_tree_exists():
    for name in HEADS:
        assert (ROOT / name).exists() or (ROOT / "hf_ftplus" / name).exists(), name


def test_every_file_of_ours_is_in_the_readmes_tree_and_heads_one_line_at_most():
    ours = {file.name for file in (ROOT / "hf_ftplus").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert ours <= set(re.findall(r"\w+\.py", TREE))
    assert len(HEADS) == len(set(HEADS))
