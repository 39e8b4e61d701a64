"""The first ten minutes: `ftplus` alone, `ftplus init`, `ftplus advise`, and the shell that completes them."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import command, make_place

from hf_ftplus.advice import TABLE
from hf_ftplus.cli import COMMANDS, main
from hf_ftplus.cli.init import MARK, QUESTIONS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*more, hardware="cpu", protect="protect.jsonl"):
    words = ["--model", "model", "--learn", "learn.jsonl", "--protect", protect, "--hardware", hardware]
    return main(["init", *words, *more])


# ---- ftplus alone ----------------------------------------------------------------------------------------------------


def test_alone_in_an_empty_folder_it_says_how_to_begin(here, capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "ftplus init" in said
    assert "What next?" in said
    named = {line.split()[1] for line in said.splitlines() if line.startswith("  ftplus ")}
    assert named <= set(COMMANDS)


def test_every_line_that_it_prints_in_an_empty_folder_works_there(here, monkeypatch, tmp_path_factory):
    """As bash runs them; a tiny model stands where the demo model is kept, and `ftplus init` is told what it asks."""
    from hf_ftplus.cli.begin import NOTHING_YET
    from hf_ftplus.model import FOLDER

    cache, bin = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("bin")
    make_place(cache)
    (cache / "model").rename(cache / FOLDER)
    (bin / "ftplus").write_text(f'#!/bin/sh\nexec {sys.executable} -m hf_ftplus "$@"\n')
    (bin / "ftplus").chmod(0o755)
    environment = {**os.environ, "FTPLUS_CACHE": str(cache), "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"}
    text = re.sub(r" *\\\n *", " ", NOTHING_YET)
    lines = [re.split(r" {3,}", line.strip())[0] for line in text.splitlines() if line.startswith("  ")]
    assert len(lines) == 8
    for line in lines:
        typed = line + " --learn learn.jsonl --model demo --protect self:8 --hardware cpu" * (line == "ftplus init")
        done = subprocess.run(["bash", "-c", typed], cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr[-2000:])
    assert (here / "out" / "ftplus" / "report.html").is_file()


def test_alone_it_knows_what_init_wrote_and_what_was_trained(here, capsys):
    assert init() == 0
    capsys.readouterr()
    assert main([]) == 0
    assert "ftplus sft --config run.yaml --dry-run" in capsys.readouterr().out
    report = here / "out" / "ftplus" / "report.json"
    report.parent.mkdir(parents=True)
    report.touch()
    assert main([]) == 0
    assert "ftplus generate --model out" in capsys.readouterr().out


def test_what_it_tells_to_type_in_an_empty_folder_writes_over_no_file_that_init_proposes():
    from hf_ftplus.cli.begin import NOTHING_YET

    written = re.findall(r"> (\S+)", NOTHING_YET)
    assert written
    assert not set(written) & {proposed for _, proposed in QUESTIONS.values()}


@pytest.mark.parametrize("hardware", ["cpu", "small"])
def test_every_line_that_it_prints_after_a_run_works_there(here, capsys, hardware):
    """But `ftplus compare`, which takes minutes and has tests of its own."""
    make_place(here)
    quick = ["--max_steps", "1", "--measure_rows", "2", "--completions", "0"]
    assert init(hardware=hardware) == 0
    assert main(["sft", "--config", "run.yaml", "--plugin", "ewc", *quick]) == 0
    capsys.readouterr()
    assert main([]) == 0
    text = re.sub(r" *\\\n *", " ", capsys.readouterr().out)
    lines = [re.split(r" {2,}", line.strip())[0] for line in text.splitlines() if line.startswith("  ftplus ")]
    assert len(lines) == (5 if hardware == "small" else 4)
    for line in lines:
        words = shlex.split(line.replace("NEW.jsonl", "learn.jsonl"))[1:]
        more = [*quick, "--gradient_checkpointing", "false", "--report_to", "none"] if words[0] == "sft" else []
        assert words[0] == "compare" or main([*words, *more]) == 0, line
    report = json.loads((here / "next" / "ftplus" / "report.json").read_text())
    assert report["facts"]["config"]["memory"] == "out/ftplus/memory"
    assert list(report["facts"]["strategies"]) == ["ewc"]


def test_a_run_that_left_no_memory_is_not_said_to_protect_the_next(here, capsys):
    assert init() == 0
    (here / "out" / "ftplus").mkdir(parents=True)
    (here / "out" / "ftplus" / "report.json").touch()
    capsys.readouterr()
    assert main([]) == 0
    assert "--memory" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "output_dir: [", "- 1", "output_dir:"])
def test_a_file_that_it_cannot_read_does_not_stop_it(here, capsys, text):
    (here / "run.yaml").write_text(f"{MARK}\n{text}")
    assert main([]) == 0
    assert "ftplus init" in capsys.readouterr().out


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag",
    [
        "generate --max-new-tokens", "generate --batch-size", "generate --top-p", "memory make --max-length",
        "memory make --batch-size", "eval --batch-size", "eval --measure-rows", "compare --learning-rates",
        "plugin test --tasks", "sft --measure-rows", "data preview --stop-when",
    ],
)  # fmt: skip
def test_a_flag_of_any_command_is_written_with_dashes_or_underscores(flag, capsys):
    command, dashed = flag.rsplit(" ", 1)
    for spelt in (dashed, "--" + dashed.removeprefix("--").replace("-", "_")):
        assert main([*command.split(), spelt]) == 2
        assert "requires an argument" in capsys.readouterr().err


# ---- init ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "protect", "plugins"),
    [
        ("cpu", "protect.jsonl", {"distill", "ewc"}),
        ("cpu", "own=self:4x8", {"replay", "ewc"}),
        ("small", "protect.jsonl", {"distill"}),
        ("large", "protect.jsonl", {"distill", "ewc"}),
    ],
)
def test_what_init_writes_trains_as_it_is(here, capsys, hardware, protect, plugins):
    make_place(here)
    assert init(hardware=hardware, protect=protect) == 0
    assert "Next: ftplus data preview --config run.yaml" in capsys.readouterr().out
    assert main(["data", "preview", "--config", "run.yaml"]) == 0
    assert main(["sft", "--config", "run.yaml", "--max_steps", "1", "--measure_rows", "2"]) == 0
    report = json.loads((here / "out" / "ftplus" / "report.json").read_text())
    assert set(report["facts"]["strategies"]) == plugins


def test_several_gpus_are_launched(here):
    from hf_ftplus.cli.sft import configured

    assert init(hardware="4") == 0
    _, launch, _ = configured({}, [], yaml.safe_load((here / "run.yaml").read_text()))
    assert launch == ["--num_processes", "4", "--accelerate_config", "multi_gpu"]


@pytest.mark.parametrize("protect", ["protect.jsonl", "self:64"])
@pytest.mark.parametrize("hardware", ["cpu", "small", "large", "2"])
def test_every_key_is_explained_or_speaks_for_itself(here, hardware, protect):
    assert init(hardware=hardware, protect=protect) == 0
    lines = (here / "run.yaml").read_text().splitlines()
    assert max(map(len, lines)) <= 120
    assert sum("#" in line for line in lines) >= 10


def test_it_asks_what_it_was_not_told(here):
    """On a terminal: enter takes what is proposed."""
    ours, theirs = pty.openpty()
    line = command("init", "--learn", "learn.jsonl")
    process = subprocess.Popen(line, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here)
    os.write(ours, b"some/model\n\ncpu\n")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    asked = [name for name, (question, _) in QUESTIONS.items() if question in error]
    assert asked == ["model", "protect", "hardware"]
    assert "learn.jsonl is not there yet" in error
    found = yaml.safe_load((here / "run.yaml").read_text())
    assert (found["model_name_or_path"], found["protect"], found["use_cpu"]) == ("some/model", ["self:64x48"], True)


def test_a_wrong_answer_is_asked_again_and_the_others_stay(here):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("init"), stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here
    )
    os.write(ours, b"some/model\nown.jsonl\nself\nself:8x4\ntoaster\n GPU \n")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "expected self:64, or self:64x48" in error
    assert "'toaster'; expected cpu, small" in error
    found = yaml.safe_load((here / "run.yaml").read_text())
    assert (found["model_name_or_path"], found["dataset_name"]) == ("some/model", "own.jsonl")
    assert (found["protect"], found["use_peft"]) == (["self:8x4"], True)


@pytest.mark.parametrize(("found", "proposed"), [(set(), "cpu"), ({"nvidia-smi"}, "small"), ({"rocm-smi"}, "small")])
def test_a_cpu_is_proposed_where_there_is_no_gpu(monkeypatch, found, proposed):
    from hf_ftplus.cli import init

    monkeypatch.setattr(init.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(init.sys, "platform", "linux")
    assert init.here() == proposed
    monkeypatch.setattr(init.sys, "platform", "darwin")
    monkeypatch.setattr(init.platform, "machine", lambda: "arm64")
    assert init.here() == "small"


@pytest.mark.parametrize("protect", ["protect.jsonl", "self:64"])
@pytest.mark.parametrize("hardware", ["cpu", "small", "large", "2"])
def test_the_file_names_no_strategy_but_its_own(here, hardware, protect):
    assert init(hardware=hardware, protect=protect) == 0
    text = (here / "run.yaml").read_text()
    own = {name for item in yaml.safe_load(text)["plugins"] for name in item}
    assert set(re.findall(r"\b(?:ewc|si|distill|replay|multitask)\b", text)) == own


def test_the_rate_of_an_adapter_is_the_advised_one(here):
    assert init(hardware="small") == 0
    advised = next(item.take for item in TABLE if item.key == "small")
    found = yaml.safe_load((here / "run.yaml").read_text())
    assert f"--learning_rate {found['learning_rate'] * 1000:g}e-3" in advised
    assert f"--set distill.share={found['plugins'][0]['distill']['share']}" in advised


def test_names_that_yaml_would_misread_come_back_as_typed(here):
    words = [
        "--model",
        "a: b",
        "--learn",
        "#x",
        "--protect",
        "no",
        "--protect",
        "ä=s.jsonl:train[:5]",
        "--hardware",
        "cpu",
    ]
    assert main(["init", *words]) == 0
    found = yaml.safe_load((here / "run.yaml").read_text(encoding="utf-8"))
    assert (found["model_name_or_path"], found["dataset_name"]) == ("a: b", "#x")
    assert found["protect"] == ["no", "ä=s.jsonl:train[:5]"]


def test_what_is_wrong_is_said(here, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["init", "--model", "demo"]) == 2
    said = "This is not a terminal, so nothing can be asked. Type --learn ... --protect ... --hardware ..."
    assert said in capsys.readouterr().err
    assert init(hardware="toaster") == 2
    assert "--hardware 'toaster'; expected cpu, small" in capsys.readouterr().err
    assert not (here / "run.yaml").exists()
    assert init() == 0
    assert init() == 6
    assert "run.yaml exists" in capsys.readouterr().err
    assert main(["init", "--out", "run.yaml/x.yaml"]) == 6  # before anything is asked
    assert "--out run.yaml cannot be written: Not a directory" in capsys.readouterr().err
    assert init("--out", "new/run.yaml") == 0
    assert (here / "new" / "run.yaml").is_file()


# ---- advise ----------------------------------------------------------------------------------------------------------


def test_advise_has_the_table_of_the_readme(capsys):
    assert main(["advise", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in rows] == ["data", "none", "sequence", "small"]
    table = [f"| {row['situation']} | `{row['take']}` | {row['why']} |" for row in rows]
    assert "\n".join(table) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_advise_answers_one_situation(capsys):
    assert main(["advise", "none"]) == 0
    said = capsys.readouterr().out
    assert "--protect self:64" in said
    assert "sequence" not in said
    assert main(["advise", "nothing"]) == 2


@pytest.mark.parametrize("item", [item for item in TABLE if item.take.startswith("ftplus sft")], ids=lambda it: it.key)
def test_what_is_advised_passes_a_dry_run(item, tmp_path, capsys):
    place, out = make_place(tmp_path / "place"), tmp_path / "out"
    typed = item.take.replace("self:64x48", "self:2x4").replace("FILE", str(place / "protect.jsonl"))
    more = ["--model", str(place / "model"), "--dataset_name", str(place / "learn.jsonl"), "--output_dir", str(out)]
    assert main([*typed.split()[1:], *more, "--dry-run"]) == 0, capsys.readouterr().err
    assert "steps of 8 rows, learning rate" in capsys.readouterr().out


def test_what_is_advised_can_be_typed():
    from hf_ftplus.cli.sft import configured
    from hf_ftplus.config import OPTIONS

    ours = {f"--{option.name}": option for option in OPTIONS}
    for item in TABLE:
        words = item.take.partition("#")[0].split()[2:]
        if item.take.startswith("ftplus sft"):
            flags = {option.name: [] for option in OPTIONS if option.many}
            rest = []
            while words:
                word = words.pop(0)
                if word in ours:
                    flags[ours[word].name].append(words.pop(0).replace("FILE", "self:1"))
                else:
                    rest.append(word)
            config, _, _ = configured(flags, [*rest, "--model_name_or_path", "x", "--dataset_name", "y"], {})
            assert len(config.strategies) == len(flags["plugin"])
            assert config.protect


# ---- light -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [[], ["advise"], ["init", "--model", "m", "--learn", "l", "--protect", "p", "--hardware", "cpu", "--out", "-"]],
)
def test_beginning_imports_nothing_heavy(here, words):
    code = (
        "import sys; from hf_ftplus.cli import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'trl', 'transformers', 'datasets') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def completed(typed, monkeypatch, capsys):
    """As bash asks for it once `eval "$(_FTPLUS_COMPLETE=bash_source ftplus)"` stands in ~/.bashrc."""
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1), "_FTPLUS_COMPLETE": "bash_complete"}
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main([])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("ftplus se", "plain,sequence"),
        ("ftplus sft --prot", "plain,--protect"),
        ("ftplus sft --dataset_na", "plain,--dataset_name"),
        ("ftplus data preview --learning_r", "plain,--learning_rate"),
        ("ftplus sft --config ru", "file,ru"),
        ("ftplus sft --dataset_name le", "file,le"),
        ("ftplus sft --model_name_or_path ", "file,"),
        ("ftplus sft --protect pro", "file,pro"),
        ("ftplus sft --protect chat = pro", "file,pro"),  # bash takes a word apart at =
        ("ftplus sft --memory ou", "file,ou"),
        ("ftplus sft --plugin ew", "plain,ewc"),
        ("ftplus sft --plugin ./my", "file,./my"),
        ("ftplus plugins ew", "plain,ewc"),
        ("ftplus plugin te", "plain,test"),
        ("ftplus plugin test ew", "plain,ewc"),
        ("ftplus plugin test ./my", "file,./my"),
        ("ftplus init --hardware sm", "plain,small"),
        ("ftplus init --learn le", "file,le"),
        ("ftplus generate --model ou", "file,ou"),
        ("ftplus sequence ru", "file,ru"),
        ("ftplus eval demo ou", "file,ou"),
        ("ftplus report ou", "file,ou"),
        ("ftplus memory push me", "file,me"),
        ("ftplus merge --model ou", "file,ou"),
        ("ftplus compare --config ru", "file,ru"),
        ("ftplus advise no", "plain,none"),
    ],
)
def test_the_shell_completes(typed, found, monkeypatch, capsys):
    assert found in completed(typed, monkeypatch, capsys)


def test_no_line_of_a_completion_takes_back_another(monkeypatch, capsys):
    """bash forgets what it has when it is told to look for files."""
    for typed in ("ftplus sft --", "ftplus sft --plugin ", "ftplus plugins ", "ftplus plugin test "):
        kinds = {line.partition(",")[0] for line in completed(typed, monkeypatch, capsys)}
        assert kinds == {"plain"}, typed


def test_the_flags_of_trl_are_completed_without_its_parser():
    from hf_ftplus.cli.completion import flags_of_trl
    from hf_ftplus.cli.sft import _trl_parser

    assert set(flags_of_trl()) == {f"--{action.dest}" for action in _trl_parser()._actions} - {"--help"}


def test_completing_imports_nothing_heavy():
    words = {"COMP_WORDS": "ftplus sft --da", "COMP_CWORD": "2", "_FTPLUS_COMPLETE": "bash_complete"}
    code = (
        "import atexit, sys; from hf_ftplus.cli import main; "
        "atexit.register(lambda: print([n for n in ('torch', 'trl', 'transformers') if n in sys.modules])); main([])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **words})
    assert done.stdout.splitlines()[-1] == "[]"
    assert "plain,--dataset_name" in done.stdout
