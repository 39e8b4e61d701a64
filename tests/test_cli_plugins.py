"""The command line answers fast, in plain words, with the exit code of what happened."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_ftplus
from hf_ftplus.cli import COMMANDS, main

HEAVY = ("torch", "trl", "transformers", "datasets", "accelerate", "peft", "numpy")
NOT_FOR_HELP = (*HEAVY, "rich", "pluggy", "importlib.metadata")
IDEA = """
from dataclasses import dataclass
from typing import ClassVar
from hf_ftplus import Strategy, setting

@dataclass
class Idea(Strategy):
    '''[bold]Not markup[/bold] \\x1b[31m and :smile: neither.

    The first paragraph of a longer story, which was
    broken where the source was broken.

        formula = stays
    '''
    name: ClassVar[str] = "idea"
    strength: float = setting(0.5, "how hard [red]it pulls", unit="nats", low=0)
    mode: str = setting("a", "which way", choices=("a", "b"))
    cap: int | None = setting(None, "at most so many rows", unit="rows")
    loud: bool = setting(False, "say more")
"""


@pytest.fixture
def idea(tmp_path, monkeypatch) -> str:
    (tmp_path / "idea.py").write_text(IDEA)
    monkeypatch.chdir(tmp_path)
    return "./idea.py"


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def modules_after(*words: str) -> set[str]:
    code = f"import sys; from hf_ftplus.cli import main; main({list(words)!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


# ---- fast ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--help"], ["plugins"], ["plugins", "ewc"], ["plugins", "--json"], ["doctor", "--help"]]
)
def test_help_and_plugins_import_nothing_heavy(words):
    assert modules_after(*words).isdisjoint(HEAVY)


def test_what_authors_import_is_not_heavy():
    """Else every plugin that is installed would slow the list of plugins."""
    names = "Batch, Memory, Run, Strategy, hookimpl, place, setting"
    code = f"import sys; from hf_ftplus import {names}; from hf_ftplus.errors import IncompatibleError; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()).isdisjoint(HEAVY)


def test_help_imports_only_what_it_prints():
    loaded = modules_after("--help")
    assert "click" in loaded
    assert loaded.isdisjoint(NOT_FOR_HELP)


# ---- words -----------------------------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(re.search(rf"^  {name} ", out, re.M) for name in COMMANDS)
    assert all((Path(hf_ftplus.__file__).parent / "cli" / f"{name}.py").exists() for name in COMMANDS)


def test_the_version_is_that_of_the_package(capsys):
    assert run(capsys, "--version") == (0, f"ftplus {hf_ftplus.__version__}\n", "")


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "hf_ftplus", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ftplus {hf_ftplus.__version__}\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ["plugns"],
            2,
            f"No command 'plugns'. Did you mean 'plugins'? Commands: {', '.join(COMMANDS)}.",
        ),
        (["train", "--model", "x"], 2, "No command 'train'. Did you mean 'sft'?"),
        (["--plugin", "ewc"], 2, "--plugin is a flag of ftplus sft. Type ftplus sft --plugin ..."),
        (["--learning_rate", "1"], 2, "is a flag of ftplus sft. Type ftplus sft --learning"),
        (["--nothing"], 2, "No such option"),
        (["sft", "--plugin", "EWC"], 2, "No plugin 'EWC'. Did you mean 'ewc'?"),
        (["plugins", "ewcc"], 2, "No plugin 'ewcc'. Did you mean 'ewc'?"),
        (["plugins", "./gone.py"], 2, "No plugin file at 'gone.py'"),
        (["plugins", "--jsn"], 2, "--json"),
        (["plugins", "ewc", "--no-plugin", "ewc"], 2, "Plugin 'ewc' is blocked by --no-plugin"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code(capsys, words, code, said):
    found, out, err = run(capsys, *words)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("ftplus: error: ")
    assert said in err


@pytest.mark.parametrize("words", [["--debug", "plugins", "ewcc"], ["plugins", "ewcc", "--debug"]])
def test_the_traceback_is_for_debug(capsys, words):
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("ftplus: error: No plugin 'ewcc'")


def test_debug_with_a_value_is_left_to_transformers():
    from hf_ftplus.cli import _take_debug

    words = ["sft", "--debug", "underflow_overflow", "--debug", "--bf16", "true"]
    assert _take_debug(words) == (["sft", "--debug", "underflow_overflow", "--bf16", "true"], True)


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt, 130), (RuntimeError("tripped"), 1), (BrokenPipeError, 1)]
)
def test_whatever_a_command_raises_ends_in_an_exit_code(capfd, monkeypatch, error, code):
    def stumble(**_):
        raise error

    monkeypatch.setattr("hf_ftplus.cli._close_stdout", lambda: None)
    monkeypatch.setattr("hf_ftplus.plugins.discover", stumble)
    assert main(["plugins"]) == code
    err = capfd.readouterr().err
    assert "Traceback" not in err
    if code == 1 and "tripped" in err:
        kept = Path(re.search(r"The traceback is in (\S+)\.$", err.strip())[1])
        assert "RuntimeError: tripped" in kept.read_text()
        kept.unlink()


def test_a_reader_that_leaves_early_is_no_error():
    line = f"{sys.executable} -m hf_ftplus plugins ewc | head -c 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stderr == ""


# ---- plugins ---------------------------------------------------------------------------------------------------------


def test_the_table_says_who_published_what_and_what_it_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = run(capsys, "plugins")
    assert code == 0
    assert re.search(rf"^ewc +hf-ftplus {hf_ftplus.__version__} +ok +\w", out, re.M)


def test_the_json_has_one_row_per_plugin(capsys):
    code, out, _ = run(capsys, "plugins", "--json", "--no-plugin", "ewc")
    (row,) = [item for item in json.loads(out) if item["name"] == "ewc"]
    assert code == 0
    assert {"name", "distribution", "version", "status", "reason", "help", "strategies"} <= set(row)
    assert (row["distribution"], row["status"], row["reason"]) == ("hf-ftplus", "blocked", "--no-plugin")


def test_the_json_says_which_api_hooks_and_requirements(capsys, idea, monkeypatch):
    rows = {row["name"]: row for row in json.loads(run(capsys, "plugins", "--json")[1])}
    assert rows["ewc"]["hooks"]["ewc"] == json.loads(run(capsys, "plugins", "ewc", "--json")[1])["hooks"]
    assert {"prepare", "before_step", "finish"} <= set(rows["ewc"]["hooks"]["ewc"])
    assert "mix" in rows["replay"]["hooks"]["replay"]
    assert "token_loss" not in rows["ewc"]["hooks"]["ewc"]
    assert rows["ewc"]["api"] == json.loads(run(capsys, "plugins", "ewc", "--json")[1])["api"] == 1
    assert any(line.startswith("trl") for line in rows["ewc"]["requires"])
    facts = json.loads(run(capsys, "plugins", idea, "--json")[1])
    assert (facts["api"], facts["hooks"], facts["requires"]) == (None, [], [])
    monkeypatch.syspath_prepend(Path(__file__).parent / "frozen")
    (row,) = [row for row in json.loads(run(capsys, "plugins", "--json")[1]) if row["distribution"] == "ftplus-frozen"]
    assert row["api"] == 1
    assert row["hooks"]
    assert all(row["hooks"].values())


def test_the_table_fits_80_columns_without_colour(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "plugins")
    assert max(map(len, out.splitlines())) <= 80
    assert len(out.splitlines()) <= 1 + 4 * out.count(" ok ")  # help broken into readable lines, not into syllables
    assert "\x1b" not in out


def test_every_setting_is_shown_with_default_unit_range_and_help(capsys, idea):
    code, out, _ = run(capsys, "plugins", idea)
    assert code == 0
    text = " ".join(out.split())
    assert "strength = 0.5 nats, 0 or more how hard [red]it pulls" in text
    assert "mode = a one of 'a', 'b' which way" in text
    assert "cap = None rows, a whole number or none at most so many rows" in text
    assert "loud = False true or false say more" in text
    assert "ftplus sft --plugin ./idea.py --set idea.strength=0.5" in out


def test_text_of_a_plugin_is_shown_as_it_is_written(capsys, idea):
    _, out, _ = run(capsys, "plugins", idea)
    assert "[bold]Not markup[/bold]  [31m and :smile: neither." in out
    assert "\x1b" not in out
    assert "    formula = stays" in out
    assert "which was broken where" in " ".join(out.split("\n"))


def test_one_plugin_as_json(capsys, idea):
    _, out, _ = run(capsys, "plugins", idea, "--json")
    facts = json.loads(out)
    assert facts["name"] == "idea"
    assert facts["settings"][0] == {
        "name": "strength",
        "type": "float",
        "default": 0.5,
        "unit": "nats",
        "range": "0 or more",
        "help": "how hard [red]it pulls",
    }
    assert facts["settings"][2]["type"] == "int | None"


def test_ewc_shows_its_settings(capsys):
    from hf_ftplus.strategies.ewc import EWC
    from hf_ftplus.strategy import settings

    code, out, _ = run(capsys, "plugins", "ewc")
    assert code == 0
    assert all(f"  {item.name} = {item.default}" in out for item in settings(EWC))


@pytest.mark.parametrize("line", [[], ["ewc"], ["--json"], ["ewc", "--json"], ["--json", "ewc"]])
def test_plugin_and_plugins_are_one_command(capsys, line):
    assert run(capsys, "plugin", *line) == run(capsys, "plugins", *line)


def test_the_commands_for_authors_are_found_without_help_and_not_cut_in_help(capsys):
    assert "ftplus plugin new NAME, ftplus plugin test NAME|PATH" in run(capsys, "plugin")[1]
    help = run(capsys, "plugins", "--help")[1]
    assert "…" not in help
    assert "..." not in help.partition("Commands:")[2]


def test_both_forms_of_json_of_one_plugin_are_the_same(capsys):
    assert run(capsys, "plugins", "ewc", "--json") == run(capsys, "plugins", "--json", "ewc")


# ---- plugin test -----------------------------------------------------------------------------------------------------

GOOD = """
from dataclasses import dataclass
from typing import ClassVar
from hf_ftplus import Strategy, setting

@dataclass
class Good(Strategy):
    '''Pull weights down.'''
    name: ClassVar[str] = "good"
    strength: float = setting(0.5, "how hard", unit="nats", low=0)

    def before_step(self, run):
        for weight in run.weights.values():
            if weight.grad is not None:
                weight.grad.add_(weight.detach(), alpha=self.strength)
"""
REFUSES = """
    def refuse(self, run):
        from hf_ftplus.errors import IncompatibleError
        if run is not None and any("lora" in name for name in run.weights):
            raise IncompatibleError("good has no word for adapters.")
"""


@pytest.fixture
def good(tmp_path, monkeypatch) -> Path:
    (tmp_path / "good.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "good.py"


def test_broken_laws_are_a_table_with_the_reason_and_the_fix(capsys, monkeypatch, good):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = run(capsys, "plugin", "test", "good.py", "--no-lora", "--law", "acts", "--law", "travels light")
    assert code == 7
    assert "good breaks acts. The reason and the fix stand above." in err
    text = " ".join(out.split())
    assert "Good(strength=0.5)" in text
    assert "acts broken it moves weights by" in text
    assert "If it is meant to act from the first step" in text
    assert "travels light kept" in text
    assert "1 of 2 laws kept" in text
    assert "judged = {'from_start': False} in its class" in text


def test_what_a_class_declares_needs_no_flag_and_an_excuse_is_printed(capsys, good):
    good.write_text(GOOD.replace("    strength:", "    judged: ClassVar[dict] = {'from_start': False}\n    strength:"))
    line = ["plugin", "test", "good.py", "--no-lora", "--law", "acts"]
    assert run(capsys, *line)[0] == 0
    excuse = "{'breaks': {'acts': 'a pull at the start is the idea'}}"
    good.write_text(GOOD.replace("    strength:", f"    judged: ClassVar[dict] = {excuse}\n    strength:"))
    code, out, _ = run(capsys, *line)
    assert code == 0
    assert "excused" in out
    assert "a pull at the start is the idea" in " ".join(out.split())
    assert "0 of 1 laws kept, 1 broken knowingly" in out


def test_its_author_is_told_which_moments_will_go(good, tmp_path):
    code = (
        "import sys; from hf_ftplus import hookspecs; from hf_ftplus.cli import main; "
        "hookspecs.LEAVING['before_step'] = 'after_step'; "
        "sys.exit(main(['plugin', 'test', 'good.py', '--no-lora', '--law', 'travels light']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    said = "good.py:12: DeprecationWarning: plugin API 2 will drop before_step(); override after_step() instead\n"
    assert done.stderr.count(said) == 1


def test_each_law_is_printed_when_it_is_known(capsys, monkeypatch, good):
    from hf_ftplus import testing

    seen = []

    def judge(*_, **__):
        for law in ("first", "second"):
            yield testing.Verdict(law, True)
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(testing, "judge", judge)
    run(capsys, "plugin", "test", "good.py", "--no-lora")
    assert ("first" in seen[0], "second" in seen[0], "second" in seen[1]) == (True, False, True)


def test_what_the_fix_says_mends_it(capsys, good):
    line = ["plugin", "test", "good.py", "--no-lora", "--law", "acts", "--acts-at-start", "--json"]
    code, out, _ = run(capsys, *line, "--set", "strength=0.7")
    (report,) = json.loads(out)
    assert code == 0
    assert (report["settings"], report["lora"], report["two_processes"]) == ("Good(strength=0.7)", "not judged", False)
    assert [(law["law"], law["kept"]) for law in report["laws"]] == [("acts", True)]
    code, out, _ = run(capsys, *line, "--set", "strength=0")
    assert code == 7
    assert "Nothing changed beside plain TRL" in json.loads(out)[0]["laws"][0]["fix"]


def test_refusing_an_adapter_breaks_no_law_and_is_said(capsys, good):
    good.write_text(GOOD + REFUSES)
    code, out, _ = run(capsys, "plugin", "test", "good.py", "--law", "travels light")
    assert code == 0
    assert "Not judged on a LoRA adapter, which it refuses: good has no word for adapters." in out


def test_a_folder_that_is_not_installed_is_judged_by_its_pyproject(capsys, monkeypatch, good):
    folder = good.parent / "lab"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "ftplus_good_lab.py").write_text(
        GOOD + "from hf_ftplus import hookimpl\n@hookimpl\ndef ftplus_strategies():\n    return [Good]\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    law = ["--law", "introduces itself"]
    assert (
        "lab holds no pyproject.toml; expected the folder of a distribution, a Python file such as"
        in run(capsys, "plugin", "test", "lab", *law)[2]
    )
    (folder / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert "offers no strategy; expected [project.entry-points.ftplus]" in run(capsys, "plugin", "test", "lab", *law)[2]
    (folder / "pyproject.toml").write_text("[project.entry-points.ftplus]\ngood = 'ftplus_good_lab'\n")
    assert run(capsys, "plugin", "test", "lab", "--no-lora", *law)[0] == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["ewc", "--law", "act"], "--law 'act' is none. Did you mean 'acts'?"),
        (["ewc", "--set", "strength"], "'strength'; expected SETTING=VALUE"),
        (["ewc", "--set", "strenght=1"], "ewc has no setting 'strenght'. Did you mean 'strength'?"),
        (["ewcc"], "No plugin 'ewcc'. Did you mean 'ewc'?"),
    ],
)
def test_a_mistake_in_a_test_is_one_line(capsys, line, said):
    code, out, err = run(capsys, "plugin", "test", *line)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


# ---- commands of plugins ---------------------------------------------------------------------------------------------


def test_a_plugin_brings_a_command(capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "frozen")
    assert run(capsys, "frozen") == (0, "hello from ftplus-frozen\n", "")
    assert run(capsys, "frozen", "--fail") == (6, "", "ftplus: error: frozen found no room. Make some.\n")
    assert "ftplus frozen comes with ftplus-frozen 1.0." in run(capsys, "plugins")[1]
    monkeypatch.setenv("FTPLUS_DISABLE_PLUGIN_AUTOLOAD", "1")
    assert run(capsys, "frozen")[0] == 2


def test_a_command_of_a_plugin_that_is_not_installed_says_what_to_install(capsys, monkeypatch):
    from hf_ftplus.cli import ELSEWHERE

    scripts = {}
    for file in (Path(__file__).parents[1] / "plugins").glob("*/pyproject.toml"):
        found = re.findall(r"^ftplus-(\w+) = ", file.read_text(encoding="utf-8"), re.M)
        scripts |= dict.fromkeys(found, file.parent.name)
    assert scripts == ELSEWHERE
    built = [entry for entry in sys.path if "ftplus-plugins-" in entry]  # where tests of plugins/ install them
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in built])
    for word, distribution in scripts.items():
        code, _, err = run(capsys, word, "anything")
        assert code == 2
        assert f"ftplus {word} comes with {distribution}. In a clone: pip install ./plugins/{distribution}." in err


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "raise RuntimeError('lost')",
            "The command ftplus odd of ftplus-odd 1.2 cannot be loaded: RuntimeError: lost.",
        ),
        ("run = 3", "The command ftplus odd of ftplus-odd 1.2 is 3; expected a click command."),
    ],
)
def test_a_broken_command_of_a_plugin_is_named(capsys, monkeypatch, tmp_path, source, said):
    info = tmp_path / "ftplus_odd-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ftplus-odd\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nftplus-odd = ftplus_odd_command:run\n")
    (tmp_path / "ftplus_odd_command.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("ftplus_odd_command", None)
    code, _, err = run(capsys, "odd")
    assert (code, said in err) == (7, True)
    sys.modules.pop("ftplus_odd_command", None)


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_the_doctor_answers_in_json(capsys):
    import torch

    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert list(report) == ["versions", "bounds", "devices", "paths", "plugins", "models"]
    assert report["versions"]["torch"].startswith(torch.__version__)
    assert "cpu" in report["devices"]
    assert report["devices"]["bf16"]
    assert report["plugins"]["ewc"].startswith("hf-ftplus ")
    assert "not known" not in json.dumps(report)


def test_the_doctor_prints_a_page(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert all(name in out for name in ("versions", "fused AdamW", "bitsandbytes", "deepspeed", "demo"))
    assert "\x1b" not in out


def test_a_failing_probe_is_a_line_and_not_the_end(capsys, monkeypatch):
    from hf_ftplus.cli import doctor

    monkeypatch.setitem(doctor.SECTIONS, "devices", lambda: 1 / 0)
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 0
    assert json.loads(out)["devices"] == {"not known": "ZeroDivisionError: division by zero"}


def test_the_doctor_sees_a_version_outside_the_bounds(monkeypatch):
    from hf_ftplus.cli import doctor

    assert "inside the declared bounds" in doctor.bounds()["stack"]
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: "2.0.0" if name == "trl" else real(name))
    assert doctor.bounds() == {"trl": "2.0.0; needs <2,>=1.16: pip install 'trl<2,>=1.16'"}
    assert doctor.versions()["trl"] == "2.0.0 (tested with 1.16.0)"
