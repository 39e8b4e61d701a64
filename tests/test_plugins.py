"""Plugins are found by name, one at a time, and a stranger's mistake stays a stranger's."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from commands import make_place, words
from training import trainer

from hf_ftplus import Strategy, contract, plugins
from hf_ftplus.cli import main
from hf_ftplus.errors import IncompatibleError, PluginError, UsageError

MODULE = """
    from dataclasses import dataclass
    from typing import ClassVar
    from hf_ftplus import Strategy, hookimpl, setting

    @dataclass
    class {cls}(Strategy):
        '''Do {name} things.

        And explain them.
        '''
        name: ClassVar[str] = "{name}"
        strength: float = setting(0.5, "how hard", unit="nats", low=0)

    @hookimpl
    def ftplus_strategies():
        return [{cls}]
"""


def module(name: str) -> str:
    return MODULE.format(name=name, cls=name.capitalize())


@pytest.fixture(autouse=True)
def fresh_warnings():
    plugins._warn.cache_clear()


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """publish("ftplus-x", "x", source): a real installed distribution: a module and its dist-info on sys.path."""
    before = set(sys.modules)

    def make(distribution: str, entry: str, source: str | None, version: str = "1.2") -> None:
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        name = distribution.replace("-", "_")
        (info / "entry_points.txt").write_text(entry if "\n" in entry else f"[ftplus]\n{entry} = {name}\n")
        if source is not None:
            (site / f"{name}.py").write_text(dedent(source))
        monkeypatch.syspath_prepend(site)

    yield make
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def row(name: str) -> plugins.Plugin:
    (found,) = [item for item in plugins.discover() if item.name == name]
    return found


# ---- finding ---------------------------------------------------------------------------------------------------------


def test_ewc_comes_in_by_the_same_door_as_strangers():
    from hf_ftplus.strategies.ewc import EWC

    assert plugins.load("ewc") is EWC
    assert [(item.distribution, item.value) for item in plugins.offers() if item.name == "ewc"] == [
        ("hf-ftplus", "hf_ftplus.strategies.ewc")
    ]
    assert plugins.origin(EWC)[0] == "hf-ftplus"


def test_a_published_strategy_is_loaded_by_its_name(publish):
    publish("ftplus-pull", "pull", module("pull"))
    found = plugins.load("pull")
    assert (found.name, plugins.origin(found)) == ("pull", ("ftplus-pull", "1.2"))
    assert row("pull") == plugins.Plugin("pull", "ftplus-pull", "1.2", "ok", "", {"pull": "Do pull things."})


def test_a_strategy_is_of_who_published_the_package_that_it_lies_in(publish, tmp_path):
    publish("ftplus-parts", "[ftplus]\npart = parts.hooks\n", None)
    (tmp_path / "ftplus-parts" / "parts").mkdir()
    (tmp_path / "ftplus-parts" / "parts" / "strategy.py").write_text(dedent(module("part")).partition("@hookimpl")[0])
    hooks = "from hf_ftplus import hookimpl\nfrom .strategy import Part\n\n@hookimpl\n"
    (tmp_path / "ftplus-parts" / "parts" / "hooks.py").write_text(
        f"{hooks}def ftplus_strategies():\n    return [Part]\n"
    )
    assert plugins.origin(plugins.load("part")) == ("ftplus-parts", "1.2")


@pytest.mark.fault("C3")
def test_loading_one_plugin_imports_no_other(publish, caplog):
    publish("ftplus-pull", "pull", module("pull"))
    publish("ftplus-other", "other", "raise RuntimeError('imported')")
    plugins.load("pull")
    assert "ftplus_other" not in sys.modules
    assert caplog.records == []


def test_a_strategy_is_found_although_its_entry_point_has_another_name(publish):
    publish("ftplus-zoo", "zoo", module("lion"))
    assert plugins.load("lion").name == "lion"
    assert plugins.load("ftplus-zoo:lion").name == "lion"


def test_discovery_makes_no_object(publish):
    publish("ftplus-shy", "shy", module("shy") + "\n    Shy.__post_init__ = lambda self: 1 / 0\n")
    assert row("shy").status == "ok"
    with pytest.raises(ZeroDivisionError):
        plugins.resolve("shy")


@pytest.mark.fault("F4")
def test_an_unknown_plugin_names_the_nearest_the_available_and_what_to_type():
    with pytest.raises(UsageError, match=r"No plugin 'ewcc'\. Did you mean 'ewc'\? Available: [\w, ]*ewc[\w, ]*\.$"):
        plugins.load("ewcc")
    with pytest.raises(UsageError, match=r"No plugin 'EWC'\. Did you mean 'ewc'\? Available: [\w, ]*ewc[\w, ]*\.$"):
        plugins.load("EWC")
    with pytest.raises(UsageError, match=r"Of a distribution in a folder: pip install -e FOLDER\.$"):
        plugins.load("nobodys")
    for folder in (Path(__file__).parents[1] / "plugins").glob("ftplus-*"):
        name = folder.name.removeprefix("ftplus-")
        assert plugins._what_to_type(name, []).endswith(
            f" In a clone of hf-ftplus: pip install ./plugins/{folder.name}."
        )
    with pytest.raises(UsageError, match=r"For a file of your own, give its path"):
        plugins.load("My Idea")


def test_what_was_begun_and_not_installed_says_what_to_type(tmp_path, monkeypatch):
    from hf_ftplus.cli.plugin_new import write

    write(tmp_path / "ftplus-idea", "idea", "nobody")
    for place, folder in ((tmp_path, "ftplus-idea"), (tmp_path / "ftplus-idea", r"\.")):
        monkeypatch.chdir(place)
        with pytest.raises(UsageError, match=rf"It is not installed yet\. Type pip install -e {folder}$"):
            plugins.load("idea")


def test_nobody_is_sent_to_a_name_that_is_not_ours():
    """On an index anybody could register it."""
    root = Path(__file__).parents[1]
    pages = [*root.glob("*.md"), *root.glob("plugins/**/*.md"), *root.glob("hf_ftplus/**/*.*")]
    texts = {
        page: page.read_text(encoding="utf-8") for page in pages if page.suffix in (".md", ".py", ".txt", ".jinja")
    }
    assert len(texts) > 100
    sent = re.compile(r"pip install ['\"]?(ftplus-|hf-ftplus\b(?!\[| @))|pypi\.org")
    assert [page for page, text in texts.items() if page.name != "CHANGELOG.md" and sent.search(text)] == []


def test_several_names_in_one_are_told_apart():
    with pytest.raises(UsageError, match=r"'distill,ewc' names 2 plugins.*one each: --plugin distill --plugin ewc\."):
        plugins.load("distill,ewc")


@pytest.mark.parametrize("ask", [plugins.load, plugins.find])
def test_a_path_at_which_nothing_stands_is_not_told_to_give_a_path(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"^nowhere/ is not there; expected a Python file with a Strategy in it"):
        ask("nowhere/")
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(UsageError, match=r"^\./rows\.jsonl is no \.py file; expected a Python file"):
        ask("./rows.jsonl")
    (tmp_path / "here").mkdir()
    with pytest.raises(UsageError, match=r"^\./here is a folder; expected a Python file"):
        plugins.load("./here")


def test_a_file_that_calls_itself_what_is_ours_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom hf_ftplus import Strategy\n\n"
        '@dataclass\nclass Mine(Strategy):\n    """Mine."""\n    name = \'ewc\'\n'
    )
    with pytest.raises(UsageError, match=r"calls its strategy 'ewc', which is ours\. Give it another name"):
        plugins.load(str(file))


# ---- a stranger's mistakes -------------------------------------------------------------------------------------------


@pytest.mark.fault("C3")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_library_that_is_gone", "ModuleNotFoundError: No module named 'a_library_that_is_gone'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = (", "SyntaxError"),
        (None, "No module named 'ftplus_broken'"),
        ("", "offers no strategy"),
    ],
)
def test_a_broken_stranger_costs_one_warning_and_never_the_command(publish, caplog, source, reason):
    publish("ftplus-broken", "broken", source)
    publish("ftplus-pull", "pull", module("pull"))
    for _ in range(2):
        assert {item.name: item.status for item in plugins.discover()}["pull"] == "ok"
        assert reason in row("broken").reason
        with pytest.raises(UsageError, match="No plugin 'nothing'"):  # looks into every module
            plugins.load("nothing")
    (warning,) = [item for item in caplog.records if "'broken'" in item.getMessage()]
    assert warning.levelno == logging.WARNING
    assert "ftplus-broken 1.2" in warning.getMessage()
    assert reason in warning.getMessage()


def test_a_broken_plugin_that_was_asked_for_is_an_error_that_names_it(publish):
    publish("ftplus-broken", "broken", "import a_library_that_is_gone")
    with pytest.raises(PluginError, match=r"'broken' of ftplus-broken 1\.2 cannot be loaded: ModuleNotFoundError"):
        plugins.load("broken")


def test_damaged_metadata_hides_nobody_else(publish, caplog):
    publish("ftplus-damaged", "[ftplus]\nno equals sign\n", None)
    publish("ftplus-pull", "pull", module("pull"))
    assert plugins.load("pull").name == "pull"
    assert ["ftplus_damaged" in item.getMessage() for item in caplog.records] == [True]  # loading pull imports no other


@pytest.mark.fault("C4")
def test_two_distributions_that_claim_one_name_are_an_error_naming_both(publish):
    publish("ftplus-pull", "pull", module("pull"))
    publish("their-pull", "pull", module("pull"), version="7.0")
    with pytest.raises(
        UsageError, match=r"claimed by .*their-pull 7\.0.*Choose one: --plugin .*ftplus-pull:pull"
    ) as error:
        plugins.load("pull")
    assert "ftplus-pull 1.2" in str(error.value)
    assert {item.status for item in plugins.discover() if item.name == "pull"} == {"failed"}
    assert plugins.load("their-pull:pull").__module__ == "their_pull"
    assert plugins.load("pull", blocked=["their-pull"]).__module__ == "ftplus_pull"


def test_two_modules_that_return_one_name_are_an_error_naming_both(publish):
    publish("ftplus-zoo", "zoo", module("lion"))
    publish("ftplus-park", "park", module("lion"))
    with pytest.raises(UsageError, match=r"claimed by ftplus-park 1\.2 and ftplus-zoo 1\.2"):
        plugins.load("lion")


def test_one_distribution_found_twice_on_the_path_is_one(publish, tmp_path, monkeypatch):
    publish("ftplus-pull", "pull", module("pull"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "." / "ftplus-pull") + "/"])
    assert plugins.load("pull").name == "pull"


@pytest.mark.fault("C5", "C6")
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            "@hookimpl\ndef ftplus_strategie(): return []",
            r"unknown hook 'ftplus_strategie'\. Did you mean 'ftplus_strategies'",
        ),
        ("def ftplus_stratgies(): return []", r"unknown hook 'ftplus_stratgies'\. Did you mean 'ftplus_strategies'"),
        ("@hookimpl\ndef strategies(): return []", r"unknown hook 'strategies'\. Did you mean 'ftplus_strategies'"),
        ("def ftplus_strategies(): return []", "ftplus_strategies is not marked; write @hookimpl above it"),
        ("@hookimpl\ndef ftplus_strategies(config): return []", "breaks the plugin contract: PluginValidationError"),
        ("@hookimpl\ndef ftplus_strategies(): return 'ewc'", "returned 'ewc'; expected a list of strategy classes"),
        ("@hookimpl\ndef ftplus_strategies(): return [int]", "offers <class 'int'>; expected a subclass"),
        ("@hookimpl\ndef ftplus_strategies(): return []", "offers no strategy"),
        ("@hookimpl\ndef ftplus_strategies(): 1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_wrong_hook_is_an_error_that_says_what_to_write(publish, wrong, said):
    publish("ftplus-typo", "typo", f"from hf_ftplus import hookimpl\n{wrong}\n")
    with pytest.raises(PluginError, match=said):
        plugins.load("typo")
    assert row("typo").status == "failed"


# ---- leaving out -----------------------------------------------------------------------------------------------------


@pytest.mark.fault("C10")
@pytest.mark.parametrize("blocked", ["pull", "ftplus-pull", "ftplus_pull", "ftplus-pull:pull"])
def test_a_blocked_plugin_is_neither_imported_nor_used(publish, blocked):
    publish("ftplus-pull", "pull", module("pull"))
    assert {item.name: item.status for item in plugins.discover(blocked=[blocked])}["pull"] == "blocked"
    with pytest.raises(UsageError, match="'pull' is blocked by --no-plugin"):
        plugins.load("pull", blocked=[blocked])
    assert "ftplus_pull" not in sys.modules


def test_blocking_a_name_that_nobody_has_is_said(caplog):
    plugins.load("ewc", blocked=["ewcc"])
    assert ["Did you mean 'ewc'" in item.getMessage() for item in caplog.records] == [True]


@pytest.mark.fault("C10")
def test_without_autoload_only_the_built_ins_are_left(publish, monkeypatch):
    publish("ftplus-pull", "pull", module("pull"))
    monkeypatch.setenv("FTPLUS_DISABLE_PLUGIN_AUTOLOAD", "1")
    assert {item.distribution for item in plugins.discover()} == {"hf-ftplus"}
    with pytest.raises(UsageError, match="FTPLUS_DISABLE_PLUGIN_AUTOLOAD is set: unset it"):
        plugins.load("pull")
    monkeypatch.setenv("FTPLUS_DISABLE_PLUGIN_AUTOLOAD", "0")
    assert plugins.load("pull").name == "pull"


# ---- files -----------------------------------------------------------------------------------------------------------

IMPORTS = "from dataclasses import dataclass\nfrom typing import ClassVar\n"
HEAD = IMPORTS + "from hf_ftplus import Strategy, hookimpl, setting\n"
ONE = "@dataclass\nclass One(Strategy):\n    name: ClassVar[str] = 'one'\n"
TWO = "@dataclass\nclass Two(Strategy):\n    name: ClassVar[str] = 'two'\n"
HOOK = "@hookimpl\ndef ftplus_strategies():\n    return [One]\n"


@pytest.fixture
def idea(tmp_path):
    def write(*parts: str, folder: str = "lab") -> str:
        path = tmp_path / folder / "idea.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("from __future__ import annotations\n" + HEAD + "".join(parts))
        return str(path)

    return write


def test_a_file_with_one_strategy_is_a_plugin(idea):
    path = idea(ONE)
    found = plugins.load(path)
    assert (found.name, plugins.origin(found)) == ("one", (path, ""))
    assert plugins.load(path) is found


def test_a_strategy_with_two_names_in_its_file_is_one(idea):
    assert plugins.load(idea(ONE, "Default = One\n")).name == "one"


def test_an_edited_file_is_read_again(idea):
    assert plugins.load(idea(ONE)).name == "one"
    assert plugins.load(idea(TWO)).name == "two"


def test_a_file_with_several_needs_a_class(idea):
    path = idea(ONE, TWO)
    assert plugins.load(f"{path}:Two").name == "two"
    assert plugins.load(f"{path}:two").name == "two"
    with pytest.raises(UsageError, match=r"holds One, Two\. Choose one: --plugin .*idea\.py:One"):
        plugins.load(path)
    with pytest.raises(UsageError, match=r"No strategy 'Too' in .*Did you mean 'Two'\?"):
        plugins.load(f"{path}:Too")


def test_the_hook_of_a_file_decides_what_it_offers(idea):
    assert plugins.load(idea(ONE, TWO, HOOK)).name == "one"


def test_two_files_of_one_name_do_not_mix(idea):
    first, second = plugins.load(idea(ONE, folder="a")), plugins.load(idea(TWO, folder="b"))
    assert (first.name, second.name) == ("one", "two")
    assert first.__module__ != second.__module__


def test_a_setting_of_a_file_reads_its_types(idea):
    path = idea(ONE, "    strength: float = setting(1.0, 'how hard')\n")
    assert plugins.resolve(path, {"strength": "3"}).strength == 3.0


def test_a_bad_file_is_an_error_that_names_it(idea, tmp_path):
    with pytest.raises(UsageError, match=r"No plugin file at .*gone\.py"):
        plugins.load(str(tmp_path / "gone.py"))
    with pytest.raises(PluginError, match=r"idea\.py cannot be loaded: SyntaxError"):
        plugins.load(idea("x = ("))
    with pytest.raises(UsageError, match=r"No strategy in .*idea\.py; expected a subclass"):
        plugins.load(idea(""))
    with pytest.raises(PluginError, match=r"unknown hook 'ftplus_strategy'"):
        plugins.load(idea(ONE, HOOK.replace("strategies", "strategy")))


# ---- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class One(Strategy):\n    name = 'one'\n", "not a dataclass; write @dataclass above it"),
        ("@dataclass\nclass One(Strategy):\n    pass\n", "name is ''; expected lower-case letters"),
        ("@dataclass\nclass One(Strategy):\n    name: ClassVar[str] = 'L2 SP'\n", "name is 'L2 SP'"),
        (ONE + "    strength: float = 1.0\n", r"field 'strength' is not a setting; write strength: \.\.\. = setting"),
        (ONE + "    strength: float = setting(1.0, ' ')\n", "setting 'strength' has no help"),
        (
            ONE + "    strength: float = setting(-1.0, 'x', low=0)\n",
            r"default .*one\.strength is -1\.0; expected 0 or more",
        ),
        (ONE + "    strength: Floot = setting(1.0, 'x')\n", "types of its settings cannot be read: NameError"),
        (ONE + "    def before_stp(self, run): pass\n", r"before_stp\(\) is no hook\. Did you mean 'before_step'\?"),
        (ONE + "    def load_state(self, state): pass\n", r"Did you mean 'load_state_dict'\?"),
        (ONE + "    def before_step(self): pass\n", r"takes other arguments than before_step\(self, run\)"),
    ],
)
def test_a_class_that_breaks_the_contract_is_refused_with_the_cure(idea, source, said):
    with pytest.raises(PluginError, match=said):
        plugins.load(idea(source))


def test_a_plugin_with_methods_of_its_own_loads_though_a_law_objects(idea):
    own = "".join(
        f"    def {name}(self): pass\n"
        for name in ("penalty", "state", "teacher", "_before_stp", "predict", "override")
    )
    assert plugins.load(idea(ONE, own)).name == "one"


# ---- the API ---------------------------------------------------------------------------------------------------------


def test_a_new_hook_does_not_break_a_plugin_whose_own_methods_begin_with_an_underscore(idea, monkeypatch):
    def after_epoch(self, run): ...

    def teacher(self, run): ...

    for hook in (after_epoch, teacher):
        monkeypatch.setattr(Strategy, hook.__name__, hook, raising=False)
    monkeypatch.setattr(contract, "HOOKS", (*contract.HOOKS, "after_epoch", "teacher"))
    own = "".join(f"    def {name}(self): pass\n" for name in ("_after_epochs", "_teacher"))
    assert plugins.load(idea(ONE, own)).name == "one"


@pytest.mark.fault("C7")
@pytest.mark.parametrize(
    ("line", "cure"),
    [
        ("ftplus_api = 2", "Install a newer hf-ftplus."),
        ("ftplus_api: int = 0", "Look for a newer version of it, or install an older hf-ftplus."),
    ],
)
def test_a_plugin_of_another_api_is_refused_before_it_is_imported(publish, line, cure):
    publish("ftplus-later", "later", f"{line}\nfrom hf_ftplus import WhatTomorrowBrings\n")
    with pytest.raises(
        PluginError, match=r"'later' of ftplus-later 1\.2 is written for plugin API \d; .* speaks 1\."
    ) as error:
        plugins.load("later")
    assert cure in str(error.value)
    assert "ftplus_later" not in sys.modules
    assert row("later").status == "failed"


def test_a_plugin_of_this_api_or_of_none_is_taken(publish, idea):
    publish("ftplus-now", "now", "    ftplus_api = 1\n" + module("now"))
    publish("ftplus-silent", "silent", module("silent"))
    assert (plugins.load("now").name, plugins.load("silent").name) == ("now", "silent")
    with pytest.raises(PluginError, match=r"idea\.py is written for plugin API 2"):
        plugins.load(idea(ONE, "ftplus_api = 2\n"))
    with pytest.raises(PluginError, match=r"written for plugin API 'x'.*Write ftplus_api = 1"):
        plugins.load(idea(ONE, "ftplus_api = 'x'\n"))


FROZEN = {
    "Strategy": {
        "refuse": ("run",), "prepare": ("run",), "mix": ("run", "shares"), "token_loss": ("run", "batch"),
        "read_gradients": ("run",), "before_step": ("run",), "after_step": ("run",), "finish": ("run",),
        "state_dict": (), "load_state_dict": ("state", "run"), "preview": ("run",), "metrics": (), "overrides": ("hook",),
    },
    "Run": (
        "model", "weights", "protect", "learn", "device", "seed", "memory", "autocast", "tokenizer", "tasks", "rows",
        "step", "learning_rate", "clip", "strategies", "measuring",
    ),
    "Task": ("role", "rows", "tokens", "drawn", "drawn_tokens"),
    "Batch": ("inputs", "hidden", "labels", "logits"),
    "Memory": ("read", "write"),
    "names": {
        "hf_ftplus": "Batch Distill EWC Memory MultiTask Replay Run SFTTrainer SI SaveOnInterrupt Strategy StrategyCallback StrategyMixin attach hookimpl place sequence setting",
        "hf_ftplus.testing": "LAWS VOCAB Verdict check_strategy judge law_acts law_gets_along law_introduces_itself law_leaves_no_trace law_remembers law_same_anywhere law_silent_at_zero law_travels_light tiny_batches tiny_model tiny_rows tiny_tokenizer",
    },
    "functions": {
        "hf_ftplus:setting": ("default", "help", "unit", "low", "high", "above", "choices"),
        "hf_ftplus:place": ("tensor", "like"),
        "hf_ftplus:Memory.load": ("self", "name", "run"),
        "hf_ftplus:Memory.save": ("self", "name", "tensors", "run"),
        "hf_ftplus.testing:check_strategy": (
            "strategy", "protect", "peft", "processes", "second_run", "from_start", "zero", "learn", "finish", "breaks", "laws",
        ),
    },
}  # fmt: skip
"""What API 1 promised on its first day; it may grow, and nothing of it may go without a new number."""


def test_nothing_that_the_api_promised_is_gone():
    import dataclasses
    import importlib
    import inspect
    import operator

    from hf_ftplus import Batch, Memory, Run, strategy

    for hook, arguments in FROZEN["Strategy"].items():
        assert tuple(inspect.signature(getattr(Strategy, hook)).parameters)[1:] == arguments, hook
    for where, names in FROZEN["names"].items():
        assert set(names.split()) <= set(importlib.import_module(where).__all__), where
    for where, arguments in FROZEN["functions"].items():
        home, name = where.split(":")
        known = inspect.signature(operator.attrgetter(name)(importlib.import_module(home))).parameters
        assert list(known)[: len(arguments)] == list(arguments), where
        assert all(more.default is not more.empty for more in list(known.values())[len(arguments) :]), where
    for kind in (Run, strategy.Task, Batch, Memory):
        known = [item.name for item in dataclasses.fields(kind)]
        assert [name for name in FROZEN[kind.__name__] if name not in known] == [], kind


@pytest.mark.fault("B12")
def test_a_plugin_of_the_first_day_trains_resumes_and_is_listed_as_it_did(tmp_path, monkeypatch):
    from pathlib import Path

    from training import same, trainer, weights_of

    monkeypatch.syspath_prepend(Path(__file__).parent / "frozen")
    listed = row("frozen")
    assert (listed.status, listed.distribution) == ("ok", "ftplus-frozen")
    saving = {"save_strategy": "steps", "save_steps": 3}
    chosen = ("frozen", {"strength": "0.2", "share": "0.25"})
    whole = trainer(tmp_path / "out", chosen, **saving)
    whole.train()
    assert list(dict.fromkeys(whole.ftplus.strategies[0].calls)) == ["refuse", "mix", "prepare", "finish"]
    assert whole.state.log_history[0]["frozen/steps"] == 2.0
    again = trainer(tmp_path / "out", chosen, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert "load_state_dict" in again.ftplus.strategies[0].calls
    assert same(weights_of(whole), weights_of(again))
    assert (tmp_path / "out" / "ftplus" / "memory").is_dir()
    plain = trainer(tmp_path / "plain")
    plain.train()
    assert not same(weights_of(whole), weights_of(plain))


@pytest.mark.filterwarnings("ignore:.*will drop:DeprecationWarning")
def test_a_moment_that_will_go_is_announced_and_called_until_then(tmp_path, monkeypatch):
    from pathlib import Path

    from training import trainer

    from hf_ftplus import hookspecs

    monkeypatch.syspath_prepend(Path(__file__).parent / "frozen")
    monkeypatch.setitem(hookspecs.LEAVING, "finish", "prepare")
    with pytest.warns(DeprecationWarning, match=r"^plugin API 2 will drop finish\(\); override prepare\(\)") as told:
        plugins.load("frozen")
    assert told[0].filename.endswith("ftplus_frozen.py")
    trained = trainer(tmp_path / "out", "frozen")
    trained.train()
    assert "finish" in trained.ftplus.strategies[0].calls


# ---- what a user may write -------------------------------------------------------------------------------------------


def test_names_classes_objects_and_settings_become_objects(publish):
    publish("ftplus-pull", "pull", module("pull"))
    pull = plugins.load("pull")
    for item in ("pull", pull, pull(), ("pull", {}), (pull, {"strength": 0.5})):
        assert plugins.resolve(item) == pull(strength=0.5)
    assert plugins.resolve(("pull", {"strength": "2"})).strength == 2.0
    assert plugins.resolve("pull", {"strength": 3}).strength == 3.0
    mine = pull(strength=4)
    assert plugins.resolve(mine) is mine


def test_what_is_no_strategy_is_refused(publish):
    publish("ftplus-pull", "pull", module("pull"))
    with pytest.raises(UsageError, match=r"A strategy is 7; expected a name \('ewc'\)"):
        plugins.resolve(7)
    with pytest.raises(UsageError, match=r"Pull\(strength=0\.5\) has its settings already; give strength to it"):
        plugins.resolve(plugins.load("pull")(), {"strength": 1})
    with pytest.raises(UsageError, match=r"pull has no setting 'strenght'\. Did you mean 'strength'\?"):
        plugins.resolve("pull", {"strenght": 1})
    with pytest.raises(PluginError, match="expected a subclass"):
        plugins.resolve(Strategy)


# ---- a run that a plugin was in --------------------------------------------------------------------------------------

RESUMED = (
    "Resume with the same --plugin names, or start a new run. pull came from ftplus-pull 1.2: install it "
    "from where you had it."
)


@pytest.mark.fault("C1")
def test_a_resumed_run_without_its_plugin_says_which_version_to_install(publish, tmp_path, monkeypatch, capsys):
    place, out, saving = make_place(tmp_path), tmp_path / "out", {"save_strategy": "steps", "save_steps": 2}
    publish("ftplus-pull", "pull", module("pull"))
    trainer(out, "pull", max_steps=2, **saving).train()
    with pytest.raises(IncompatibleError) as raised:
        trainer(out, "ewc", **saving).train(resume_from_checkpoint=True)
    assert str(raised.value).endswith(RESUMED)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "ftplus-pull" not in entry])
    again = words(place, out, "--resume_from_checkpoint", "true", plugin="pull", protect=None)
    assert main(again) == 4
    assert "checkpoint-2 was written with it. pull came from ftplus-pull 1.2: install it" in capsys.readouterr().err
    assert main(words(place, tmp_path / "other", plugin="pull", protect=None)) == 2


FAULTY = """
    from dataclasses import dataclass
    from typing import ClassVar
    from hf_ftplus import Strategy, hookimpl, setting

    @dataclass
    class Faulty(Strategy):
        name: ClassVar[str] = "faulty"
        where: str = setting("metrics", "the hook that fails")

        def before_step(self, run):
            if self.where == "before_step":
                raise KeyError("lost")

        def metrics(self):
            return {"metrics": 1 / 0} if self.where == "metrics" else {"figure": self.where}

    @hookimpl
    def ftplus_strategies():
        return [Faulty]
"""


@pytest.mark.fault("C2")
def test_a_published_strategy_that_fails_is_named_with_its_version_and_costs_no_run_for_a_figure(
    publish, tmp_path, caplog
):
    publish("ftplus-faulty", "faulty", FAULTY)
    with pytest.raises(
        PluginError, match=r"'faulty' of ftplus-faulty 1\.2 failed in before_step at step 0: KeyError.*\(\w+\.py:\d+\)"
    ):
        trainer(tmp_path, ("faulty", {"where": "before_step"})).train()
    it = trainer(tmp_path, "faulty")
    it.train()
    assert it.state.global_step == 6
    said = [record.getMessage() for record in caplog.records if "says no figures" in record.getMessage()]
    assert said == [
        "faulty says no figures, and training goes on: Strategy 'faulty' of ftplus-faulty 1.2 failed in metrics at step "
        "1: ZeroDivisionError: division by zero (ftplus_faulty.py:16)"
    ]
    trainer(tmp_path, ("faulty", {"where": "text"})).train()
    assert "faulty says no figures, and training goes on: must be real number, not str" in caplog.text
