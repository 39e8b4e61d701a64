"""`ftplus sft` from the command line to the report: what works, what is refused and how, and that nothing is lost."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from commands import command, make_place, same_file, stopped, words
from held import held
from tiny import tiny_llama, tiny_tokenizer
from training import LEARN, PROTECT

from hf_ftplus.cli import main
from hf_ftplus.errors import StorageError

FEWEST = ["--model_name_or_path", "m", "--dataset_name", "d"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


def test_one_command_trains_measures_and_reports(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out", "--set", "ewc.strength=500")) == 0
    report = json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())
    tasks = {task["name"]: task for task in report["tasks"]}
    assert tasks["learn"]["after"]["loss"]["value"] < tasks["learn"]["before"]["loss"]["value"]
    assert tasks["protect"]["drift"]["value"] > 0
    assert tasks["protect"]["role"] == "protect"
    facts = report["facts"]
    assert facts["config"]["strategies"] == [
        "EWC(strength=500.0, fisher='sign', rows=256, decay=1.0, remember=True, first=False)"
    ]
    assert facts["strategies"]["ewc"]["bytes"] > 0
    assert facts["versions"]["trl"]
    assert facts["seed"] == 42
    assert "protect" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "ftplus" / "memory" / "ewc.safetensors").is_file()


def test_settings_that_trl_refuses_end_in_its_sentence(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out", "--padding_free", "true", plugin=None, protect=None)) == 2
    said = capsys.readouterr().err
    assert "type --max_length null beside --padding_free true; or --packing true" in said
    assert main(words(place, tmp_path / "out", "--eos_token", "<none>", plugin=None, protect=None)) == 2
    said = capsys.readouterr().err
    assert "trl refuses these settings: The specified `eos_token` ('<none>') is not found" in said
    assert "traceback" not in said


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("--learning_rate nan", "--learning_rate is nan; expected 0 or above."),
        ("--learning_rate -1", "--learning_rate is -1.0; expected 0 or above."),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size is 0; expected 1 or above."),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps is 0; expected 1 or above."),
        ("--max_steps -1 --num_train_epochs 0", "--num_train_epochs is 0.0; expected above 0, or nothing is trained."),
        ("--max_steps 0", "--max_steps is 0; expected above 0, or -1 for --num_train_epochs; 0 trains nothing."),
        ("--fail-if-retention-below 95", "expected a share above 0 and up to 1. 95 looks like percent: type 0.95."),
        ("--lr 1e-4", "Unknown flag --lr. Did you mean '--learning_rate'?"),
        ("--batch_size 4", "Unknown flag --batch_size. Did you mean '--per_device_train_batch_size'?"),
        ("--strategy ewc", "Unknown flag --strategy. Did you mean '--plugin'?"),
        ("--output out", "Unknown flag --output. Did you mean '--output_dir'?"),
        ("--data x", "Unknown flag --data. Did you mean '--dataset_name'?"),
        ("--learn x", "Unknown flag --learn. Did you mean '--dataset_name'?"),
    ],
)
def test_what_nobody_means_is_refused_with_what_to_type(place, tmp_path, capsys, typed, says):
    assert main([*words(place, tmp_path / "out", plugin=None), *typed.split(), "--dry-run"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("--resume_from_checkpoint nosuch", "--resume_from_checkpoint nosuch: no such folder"),
        ("--output_dir {file}", "learn.jsonl cannot be written: it is a file. Choose another."),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(place, tmp_path, capsys, typed, says):
    more = typed.format(file=place / "learn.jsonl").split()
    assert main([*words(place, tmp_path / "out", plugin=None), *more, "--dry-run"]) == 6
    assert says in capsys.readouterr().err


def test_the_yaml_of_a_sequence_is_told_whose_it_is(place, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text("stages: [{name: one}]")
    assert main([*words(place, tmp_path / "out", plugin=None), "--config", str(tmp_path / "s.yaml")]) == 2
    assert "The YAML file has stages, and this command runs one. Type ftplus sequence FILE." in capsys.readouterr().err


def test_protect_rows_that_nothing_holds_are_said(place, tmp_path, caplog):
    assert main(words(place, tmp_path / "out", "--dry-run", plugin=None)) == 0
    assert "--protect (protect): only measured" in caplog.text


def test_a_model_of_an_unknown_kind_is_named(place, tmp_path, capsys):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "nothing-known"}')
    line = words(place, tmp_path / "out", plugin=None, protect=None)
    line[line.index("--model_name_or_path") + 1] = str(tmp_path / "odd")
    assert main(line) == 3
    assert "odd' cannot be loaded: The checkpoint you are trying to load has model type" in capsys.readouterr().err


def test_without_plugins_it_is_trl_sft_bit_for_bit(place, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes((place / "learn.jsonl").read_bytes())
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    flags = ["--dataset_name", str(tmp_path / "data"), "--use_cpu", "true", *_bf16()]
    assert main(words(place, ours, *flags, plugin=None, protect=None)) == 0
    trl = [sys.executable, "-m", "trl.scripts.sft", *words(place, theirs, *flags, plugin=None, protect=None)[1:]]
    done = subprocess.run(trl, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    from safetensors.torch import load_file

    one, other = (load_file(out / "model.safetensors") for out in (ours, theirs))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("more", "yaml", "cpu"),
    [
        ([], {}, False),
        (["--use_cpu"], {}, True),
        (["--use_cpu", "true"], {}, True),
        (["--use_cpu", "false"], {}, False),
        ([], {"use_cpu": True}, True),
        ([], {"use_cpu": False}, False),
        (["--use_cpu=false"], {"use_cpu": True}, False),
    ],
)
def test_what_a_machine_can_do_is_asked_of_the_device_that_was_meant(monkeypatch, more, yaml, cpu):
    from hf_ftplus.cli import sft

    asked = []
    monkeypatch.setattr(sft, "_that_work_here", lambda given, use_cpu, trains: asked.append(use_cpu) or {"bf16": False})
    sft.parse_trl([*FEWEST, *more], yaml)
    assert asked == [cpu]


def test_resume_from_checkpoint_false_is_the_word_for_no():
    from hf_ftplus.cli.sft import parse_trl

    given, _, _ = parse_trl([*FEWEST, "--resume_from_checkpoint", "false"], {})
    assert given["training"].resume_from_checkpoint is None


def _bf16():
    from hf_ftplus.cli.sft import has_bf16

    return [] if has_bf16(on_cpu=True) else ["--bf16", "false"]


def test_yaml_holds_everything_and_flags_win(place, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {place / 'model'}\ndataset_name: {place / 'learn.jsonl'}\noutput_dir: {tmp_path / 'out'}\n"
        f"plugins:\n  - ewc: {{strength: 7, rows: 4}}\nprotect:\n  baker: {place / 'protect.jsonl'}\nmax_steps: 9\n"
        "report_to: none\nmeasure_rows: 3\ncompletions: 0\nsave_strategy: 'no'\nlearning_rate: 0.001\n"
    )
    assert main(["sft", "--config", str(config), "--set", "ewc.strength=8", "--max_steps", "2"]) == 0
    report = json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())
    assert "strength=8.0" in report["facts"]["config"]["strategies"][0]
    assert "rows=4" in report["facts"]["config"]["strategies"][0]
    assert report["facts"]["steps"] == 2
    assert report["tasks"][1]["name"] == "baker"
    assert report["tasks"][1]["rows"] == 3


def test_a_dry_run_shows_rows_mask_and_cost_and_writes_nothing(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out", "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert shown.count("«") == 3
    assert "MB of state" in shown
    assert "protect rows" in shown
    assert not (tmp_path / "out").exists()


def test_the_starting_model_can_write_what_is_protected(place, tmp_path, monkeypatch):
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "cache"))
    assert main(words(place, tmp_path / "out", "--completions", "0", "--max_steps", "1", protect="self:10x5")) == 0
    (file,) = (tmp_path / "cache" / "self").glob("self-*.jsonl")
    answers = [json.loads(line)["completion"][0]["content"] for line in file.read_text().splitlines()]
    assert len(answers) == 10
    assert max(map(len, answers)) <= 5 * max(map(len, tiny_tokenizer().get_vocab()))
    report = json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())
    assert report["tasks"][1]["name"] == "self"
    assert report["tasks"][1]["rows"] == 2


def test_a_run_says_what_preparing_will_cost_before_it_does(place, tmp_path, caplog):
    with caplog.at_level("INFO", logger="hf_ftplus"):
        assert main(words(place, tmp_path / "out", "--max_steps", "1", "--completions", "0")) == 0
    said = [record.getMessage() for record in caplog.records]
    cost = next(i for i, line in enumerate(said) if "protect rows, about" in line)
    assert "MB of state, 13 protect rows, about" in said[cost]
    assert cost < next(i for i, line in enumerate(said) if "ready after" in line)


def test_the_report_says_what_rows_a_figure_is_of(place, tmp_path, capsys, caplog):
    few = jsonl(tmp_path / "few.jsonl", *(json.dumps(row) for row in PROTECT[:3]))
    long = {"prompt": "Question " * 40, "completion": "It is."}
    cut = jsonl(tmp_path / "cut.jsonl", *(json.dumps(row) for row in [long, *PROTECT[:12]]))
    more = ["--protect", f"few={few}", "--protect", f"cut={cut}", "--max_length", "60", "--max_steps", "1"]
    assert main(words(place, tmp_path / "out", *more, "--measure", f"long={cut}")) == 0
    tasks = {
        task["name"]: task for task in json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())["tasks"]
    }
    assert any("trained rows" in note for note in tasks["learn"]["notes"])
    assert any(
        "measured on the rows that protect it" in note and "there are 3" in note for note in tasks["few"]["notes"]
    )
    assert any(
        "1 of 13 rows are not measured at max_length 60: 1 are cut before" in note for note in tasks["long"]["notes"]
    )
    assert not any("rows" in note for note in tasks["protect"]["notes"])
    assert "learn: measured on trained rows" in capsys.readouterr().out
    assert "cut: nothing is left to protect in 1 of 11 rows (9 %) at max_length 60: 1 are cut" in caplog.text


@pytest.mark.fault("E8", "E10", "E11")
def test_rows_that_do_not_train_are_said_with_share_reason_and_numbers_and_so_is_what_carries_loss(
    place, tmp_path, caplog
):
    long = [{"prompt": "Question " * 40, "completion": "It is."}] * 7
    rows = [row for pair in zip(LEARN, long, strict=False) for row in pair] + LEARN[7:9]
    half = jsonl(tmp_path / "half.jsonl", *map(json.dumps, rows))
    few = ["--dataset_name", str(half), "--max_length", "60", "--max_steps", "1", "--measure_rows", "0"]
    with caplog.at_level("INFO", logger="hf_ftplus"):
        assert main(words(place, tmp_path / "out", *few, plugin=None, protect=None)) == 0
    assert re.search(r"learn: 9 rows, [1-9]\d % of the tokens carry loss", caplog.text)
    assert (
        "learn: 7 of 16 rows (44%) do not train at max_length 60: 7 are cut before what is supervised (rows 2, 4, 6, 8, "
        "10, ...). Type a larger --max_length, or shorten the prompts."
    ) in caplog.text


def test_memory_of_one_run_serves_the_next(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "one")) == 0
    next_run = words(place, tmp_path / "two", "--memory", str(tmp_path / "one"), protect=None)
    next_run[next_run.index("--model_name_or_path") + 1] = str(tmp_path / "one")
    assert main(next_run) == 0
    assert (
        json.loads((tmp_path / "two" / "ftplus" / "report.json").read_text())["facts"]["strategies"]["ewc"]["penalty"]
        > 0
    )
    assert main(words(place, tmp_path / "three", "--memory", str(tmp_path / "one"), protect=None)) == 4
    assert "left with another model" in capsys.readouterr().err


def test_lora_by_trls_own_flags(place, tmp_path):
    assert (
        main(words(place, tmp_path / "out", "--use_peft", "--lora_r", "2", "--lora_target_modules", "all-linear")) == 0
    )
    facts = json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())["facts"]
    assert facts["strategies"]["ewc"]["held_weights"] == 1  # a fresh adapter, too: it is the change that is held
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


# ---- bad input: message, exit code, nothing written ------------------------------------------------------------------


def jsonl(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


REFUSED = [
    (2, ["--plugin", "ewcc"], "Did you mean 'ewc'"),
    (2, ["--set", "ewc.strenth=1"], "Did you mean 'strength'"),
    (2, ["--set", "ewc.strength=-1"], "ewc.strength is -1.0; expected 0 or more"),
    (2, ["--set", "ewc.strength=nan"], "ewc.strength is nan"),
    (2, ["--set", "ewc.strength"], "NAME.SETTING=VALUE"),
    (2, ["--set", "si.strength=1"], "no strategy 'si' in this run"),
    (2, ["--ewc.lam", "0.4"], "A setting of a strategy is given so: --set ewc.strength=0.4. All: ftplus plugins ewc."),
    (2, ["--ewc.row=9"], "--set ewc.rows=9"),
    (2, ["--plugin", "distill,replay"], "expected one each: --plugin distill --plugin replay."),
    (2, ["--set", "ewc.fisher=sing"], "Did you mean 'sign'"),
    (2, ["--learning_rat", "1"], None),  # TRL's parser completes it, as it does for `trl sft`
    (2, ["--lerning_rate", "1"], "Did you mean '--learning_rate'"),
    (2, ["--metric", "learn=exactmatch"], "Did you mean 'exact_match'"),
    (2, ["--fail-if-retention-below", "most"], "fail-if-retention-below"),
    (2, ["--measure_rows", "-3"], "expected a whole number of 0 or more"),
    (2, ["--memory", "nowhere"], "nowhere is no folder; expected OUTPUT/ftplus/memory"),
    (3, ["--model_name_or_path", "./nothing/here"], "No model at './nothing/here'"),
    (3, ["--protect", "missing.jsonl"], "missing.jsonl does not exist"),
    (3, ["--dataset_name", "missing.jsonl"], "missing.jsonl does not exist"),
    (3, ["--max_length", "3"], "supervised token"),
    (4, ["--auto_find_batch_size", "true"], "auto_find_batch_size"),
]


@pytest.mark.parametrize(
    ("code", "more", "says"),
    [item for item in REFUSED if item[2]],
    ids=lambda item: " ".join(item) if isinstance(item, list) else None,
)
def test_bad_input_is_one_clear_line_an_exit_code_and_no_file(place, tmp_path, capsys, code, more, says):
    assert main(words(place, tmp_path / "out", *more)) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not list((tmp_path / "out").glob("*/*"))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_model_may_be_called_as_the_other_commands_call_it(place, tmp_path, capsys):
    line = [word.replace("--model_name_or_path", "--model") for word in words(place, tmp_path / "out", "--dry-run")]
    assert "--model" in line
    assert main(line) == 0, capsys.readouterr().err


@pytest.mark.fault("E2")
def test_bad_rows_are_named_by_file_and_line(place, tmp_path, capsys):
    bad = jsonl(tmp_path / "bad.jsonl", '{"prompt": "a", "completion": "b"}', '{"prompt": "a", "completion" "b"}')
    assert main(words(place, tmp_path / "out", "--dataset_name", bad)) == 3
    assert "bad.jsonl:2:" in capsys.readouterr().err
    assert main(words(place, tmp_path / "out", "--dataset_name", jsonl(tmp_path / "empty.jsonl"))) == 3
    assert "0 rows" in capsys.readouterr().err
    odd = jsonl(tmp_path / "odd.jsonl", '{"promt": "a", "completion": "b"}')
    assert main(words(place, tmp_path / "out", "--dataset_name", odd)) == 3
    assert "Did you mean 'prompt'" in capsys.readouterr().err


@pytest.mark.fault("E7")
def test_chats_without_a_chat_template_are_refused(place, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "base")
    chat = jsonl(
        tmp_path / "chat.jsonl",
        '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}',
    )
    assert (
        main(
            words(place, tmp_path / "out", "--model_name_or_path", str(tmp_path / "base"), "--protect", f"chat={chat}")
        )
        == 3
    )
    assert "chat template" in capsys.readouterr().err


def test_nothing_to_protect_is_said_before_the_model_loads(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out", protect=None)) == 3
    assert "self:256" in capsys.readouterr().err


PEFT = ["--use_peft", "true", "--lora_r", "2"]


@pytest.mark.parametrize(
    ("plugin", "more", "says"),
    [
        ("si", PEFT, "si cannot follow an adapter"),
        ("ewc", [*PEFT, "--use_dora", "true"], "does not change a weight by scale * B A"),
        ("distill", ["--set", "distill.teacher=OTHER"], "has other tokens: "),
    ],
)
def test_what_a_strategy_cannot_train_is_refused_before_the_model_loads(
    place, tmp_path, capsys, monkeypatch, plugin, more, says
):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "other"), tiny_llama(vocab=len(tokenizer)).save_pretrained(tmp_path / "other")
    more = [word.replace("OTHER", str(tmp_path / "other")) for word in more]
    monkeypatch.setattr("hf_ftplus.run.sft_trainer", None)  # no model may load
    assert main(words(place, tmp_path / "out", *more, plugin=plugin)) == 4
    assert says in capsys.readouterr().err


@pytest.mark.fault("A7")
def test_another_runs_folder_is_not_overwritten(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out")) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert main(words(place, tmp_path / "out")) == 6
    assert "--resume_from_checkpoint true" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.fault("A7")
@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors", "config.json", "ftplus/memory"])
def test_what_trl_or_an_older_run_left_is_not_overwritten(place, tmp_path, capsys, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    assert main(words(place, tmp_path / "out")) == 6
    assert f"holds another run ({name})" in capsys.readouterr().err
    assert (tmp_path / "out" / name).read_text() == "mine"


@pytest.mark.fault("A7")
def test_of_another_run_the_newest_checkpoint_is_named(place, tmp_path, capsys):
    for age, step in ((20, 100), (10, 900)):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        os.utime(folder, (1e9 - age, 1e9 - age))
    assert main(words(place, tmp_path / "out")) == 6
    assert "holds another run (checkpoint-900)" in capsys.readouterr().err


def test_the_model_is_not_overwritten_by_its_own_training(place, tmp_path, capsys):
    before = (place / "model" / "model.safetensors").read_bytes()
    for more in ([], ["--resume_from_checkpoint", "true"]):
        assert main(words(place, place / "model" / ".." / "model", *more)) == 6
        assert "is the model that is to be trained" in capsys.readouterr().err
    assert (place / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.fault("A5")
def test_an_output_that_is_no_folder_is_refused(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(words(place, tmp_path / "file")) == 6
    assert "cannot be written: it is a file." in capsys.readouterr().err


def as_nobody(command: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a command line of a user who owns nothing here."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if not child:
        try:
            os.setgroups([]), os.setgid(65534), os.setuid(65534)
            with redirect_stderr(io.StringIO()) as said:
                code = main(command)
            os.write(write, said.getvalue().encode())
            os._exit(code)
        finally:
            os._exit(99)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


@pytest.fixture
def seen_by_all():
    """A folder that everybody may look into and root may write: pytest's own are for one user alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


ROOT_ALONE = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.mark.fault("A5")
@ROOT_ALONE
def test_a_folder_of_somebody_elses_is_refused_before_anything_is_loaded(place, seen_by_all):
    (seen_by_all / "closed").mkdir(mode=0o700)
    for out in (seen_by_all / "new", seen_by_all / "closed", seen_by_all / "closed" / "new"):
        code, said = as_nobody([*words(place, out), "--resume_from_checkpoint", "auto"])
        assert (code, "cannot be written: Permission denied. Choose another." in said) == (6, True)
    assert [path.name for path in seen_by_all.rglob("*")] == ["closed"]


def test_too_little_retention_exits_5_after_saving_everything(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out", "--fail-if-retention-below", "1e9", "--learning_rate", "1e-2")) == 5
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "ftplus" / "report.json").is_file()
    assert "protect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("learning_rte: 1", "Did you mean 'learning_rate'"),
        ("dataset_name: 3", "dataset_name: 3 in the YAML file; expected text. Write it in quotes: dataset_name: '3'"),
        ("seed: [1]", "seed is [1]; expected a whole number"),
        ("seed: true", "seed is True; expected a whole number"),
        (
            "lora_target_modules: {a: 1}",
            "lora_target_modules: {'a': 1} in the YAML file; expected text or a list of it.",
        ),
        ("seed: 4294967296", "seed is 4294967296; expected a whole number from 0 to 4294967295."),
        ("data_seed: -1", "data_seed is -1; expected a whole number from 0"),
    ],
)
def test_a_bad_yaml_key_is_one_sentence(place, tmp_path, capsys, yaml, says):
    (tmp_path / "run.yaml").write_text(yaml + "\n")
    assert main(words(place, tmp_path / "out", "--config", str(tmp_path / "run.yaml"))) == 2
    assert says in capsys.readouterr().err


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("A2")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_saves_and_can_be_resumed_to_the_same_weights(place, tmp_path, number, code):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    steps = ["--max_steps", "40", "--save_strategy", "no", "--measure_rows", "0", "--logging_steps", "1"]
    assert main(words(place, whole, *steps)) == 0
    ended, error = stopped(command(*words(place, cut, *steps)), lambda pid: os.kill(pid, number))
    assert ended == code, error
    assert "--resume_from_checkpoint true" in error
    assert "Traceback" not in error
    saved = list(cut.glob("checkpoint-*"))
    assert len(saved) == 1
    assert (saved[0] / "ftplus" / "manifest.json").is_file()
    assert main(words(place, cut, *steps, "--resume_from_checkpoint", "true")) == 0
    assert same_file(whole / "model.safetensors", cut / "model.safetensors")


@pytest.mark.fault("D1")
@pytest.mark.parametrize(
    ("steps", "says"), [("3", "is nan at step 2. Training stopped"), ("1", "weights are not finite at step 1")]
)
def test_a_run_that_blows_up_exits_with_4_and_leaves_no_such_weights(place, tmp_path, capsys, monkeypatch, steps, says):
    from hf_ftplus import SFTTrainer

    def spoil(self, *args, **kwargs):
        torch.nn.init.constant_(self.model.lm_head.weight, float("inf"))  # as the last step of a run may
        return 1.0

    out = tmp_path / "out"
    if steps == "1":
        monkeypatch.setattr(SFTTrainer, "_get_learning_rate", spoil)
    few = ["--learning_rate", "1e30", "--max_steps", steps, "--save_strategy", "no", "--measure_rows", "0"]
    assert main(words(place, out, *few, plugin=None, protect=None)) == 4
    assert says in capsys.readouterr().err
    assert not (out / "model.safetensors").exists()


@pytest.mark.fault("A8")
def test_a_run_killed_before_its_report_is_only_measured_when_it_is_resumed(place, tmp_path, capsys):
    out, steps = tmp_path / "out", ["--max_steps", "3", "--save_strategy", "steps", "--save_steps", "3"]
    assert main(words(place, out, *steps)) == 0
    weights = (out / "model.safetensors").rename(tmp_path / "ended.safetensors")
    (out / "ftplus" / "report.json").write_text("{")
    assert main(words(place, out, *steps, "--resume_from_checkpoint", "true")) == 3
    assert "Remove it, and type the same again: the run goes on from" in capsys.readouterr().err
    (out / "ftplus" / "report.json").unlink()
    assert main(words(place, out, *steps, "--resume_from_checkpoint", "true")) == 0
    assert json.loads((out / "ftplus" / "report.json").read_text())["facts"]["steps"] == 3
    assert same_file(weights, out / "model.safetensors")


@pytest.mark.fault("A8")
def test_the_same_command_with_auto_begins_goes_on_and_then_has_nothing_to_do(place, tmp_path, capsys):
    out, steps = tmp_path / "out", ["--max_steps", "4", "--save_steps", "2", "--resume_from_checkpoint", "auto"]
    again = words(place, out, *steps, "--measure_rows", "0")
    assert main(again) == 0
    weights = (out / "model.safetensors").rename(tmp_path / "ended.safetensors")
    (out / "ftplus" / "report.json").unlink()
    (out / "checkpoint-4" / "ftplus" / "commit.json").unlink()
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    assert main(again) == 0
    assert same_file(weights, out / "model.safetensors")
    assert (out / "_incomplete-checkpoint-4").is_dir()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert main(again) == 0
    assert "Already complete: 4 steps" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert main([*again, "--max_steps", "5"]) == 0
    assert (out / "checkpoint-5").is_dir()


@pytest.mark.fault("A1", "A8")
def test_a_run_that_goes_on_is_not_complete_by_the_report_of_its_shorter_self(place, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    again = words(place, out, "--save_steps", "2", "--resume_from_checkpoint", "auto", "--measure_rows", "0")
    assert main([*again, "--max_steps", "2"]) == 0

    def killed(*args):
        raise KeyboardInterrupt(130)

    monkeypatch.setattr("hf_ftplus.evaluation.Evaluation.after", killed)
    assert main([*again, "--max_steps", "4"]) == 130
    monkeypatch.undo()
    capsys.readouterr()
    assert not (out / "ftplus" / "report.json").exists()
    assert main([*again, "--max_steps", "4"]) == 0
    assert json.loads((out / "ftplus" / "report.json").read_text())["facts"]["steps"] == 4


@pytest.fixture(scope="module")
def complete(place, tmp_path_factory):
    """A finished run, and its command without a word about going on."""
    out = tmp_path_factory.mktemp("complete") / "out"
    command = words(
        place, out, "--measure_rows", "0", "--use_peft", "--lora_r", "2", "--packing", "--max_length", "128"
    )
    assert main(command) == 0
    return out, command


@pytest.mark.fault("A8")
@pytest.mark.parametrize("how", ["auto", "true", "path"])
def test_a_finished_run_is_complete_where_nothing_can_be_written(complete, capsys, monkeypatch, how):
    out, again = complete

    def read_only(*args):
        raise StorageError("cannot be written")

    monkeypatch.setattr("hf_ftplus.output.locked", read_only)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main([*again, "--resume_from_checkpoint", str(out / "checkpoint-4") if how == "path" else how]) == 0
    assert "Already complete: 4 steps" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert main([*again, "--resume_from_checkpoint", str(out / "checkpoint-2")]) == 6  # trains again, and may not


@pytest.mark.fault("A5", "A8")
@ROOT_ALONE
def test_a_finished_run_of_somebody_elses_is_complete(complete, seen_by_all):
    out = shutil.copytree(complete[0], seen_by_all / "out")
    code, said = as_nobody([*complete[1], "--output_dir", str(out), "--resume_from_checkpoint", "auto"])
    assert (code, "Already complete: 4 steps" in said) == (0, True)


@pytest.mark.fault("A8", "B9", "C1")
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--plugin", "distill"], "strategies EWC there, EWC, Distill here"),
        (["--set", "ewc.strength=7"], "ewc.strength None there, 7.0 here"),
        (["--seed", "7"], "seed 42 there, 7 here"),
        (["--learning_rate", "0.5"], "learning_rate 0.001 there, 0.5 here"),
        (["--per_device_train_batch_size", "2"], "rows per step 8 there, 2 here"),
        (["--lora_alpha", "5"], "lora_alpha 32 there, 5 here"),
        (["--dataset_name", "protect.jsonl"], "dataset_name "),
        (["--protect", "more=learn.jsonl"], "protect "),
    ],
)
def test_a_finished_run_with_other_settings_is_not_taken_for_it(place, complete, capsys, monkeypatch, changed, says):
    out, again = complete
    monkeypatch.chdir(place)
    assert main([*again, *changed, "--resume_from_checkpoint", "auto"]) == 6
    said = capsys.readouterr().err
    assert f"{out} holds another run, which is complete: {says}" in said
    assert "Choose another --output_dir" in said


@pytest.mark.fault("A8")
def test_how_a_finished_run_is_measured_logged_and_shared_out_makes_no_other_run(place, complete, capsys):
    more = ["--logging_steps", "3", "--completions", "1", "--report_to", "none", "--save_total_limit", "7"]
    split = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    again = [*complete[1], *more, *split, "--resume_from_checkpoint", "auto"]
    assert main(again) == 0
    said = capsys.readouterr().err
    assert "Already complete: 4 steps" in said
    assert "measured again" not in said
    assert main([*again, "--measure_rows", "5", "--measure", f"other={place / 'learn.jsonl'}"]) == 0
    said = capsys.readouterr().err
    assert "not measured again with another measure and measure_rows: type ftplus eval" in said
    assert said.rstrip().endswith("--measure NAME=DATA --measure_rows N")


@pytest.mark.fault("A8")
def test_a_finished_run_stays_complete_where_only_one_version_knows_a_setting(complete, tmp_path, capsys):
    out = shutil.copytree(complete[0], tmp_path / "out")
    file = out / "ftplus" / "report.json"
    was = file.read_text()
    other = was.replace("EWC(strength=", "EWC(older=1, strength=").replace(", rows=", ", newer=")
    assert "EWC(older=1, strength=None" in other
    assert other.count(", newer=") == 1
    file.write_text(other)
    again = [*complete[1], "--output_dir", str(out), "--resume_from_checkpoint", "auto"]
    assert main(again) == 0
    assert "Already complete: 4 steps" in capsys.readouterr().err
    assert main([*again, "--set", "ewc.strength=7"]) == 6
    assert "complete: ewc.strength None there, 7.0 here. Choose" in capsys.readouterr().err


@pytest.mark.fault("A8")
def test_fewer_steps_than_were_made_are_another_run(complete, tmp_path, capsys):
    out = shutil.copytree(complete[0], tmp_path / "out")
    report = (out / "ftplus" / "report.json").read_bytes()
    assert main([*complete[1], "--output_dir", str(out), "--max_steps", "2", "--resume_from_checkpoint", "auto"]) == 6
    assert "holds another run, which is complete: max_steps 4 there, 2 here" in capsys.readouterr().err
    assert (out / "ftplus" / "report.json").read_bytes() == report


@pytest.mark.fault("A8")
def test_a_finished_run_whose_weights_are_gone_saves_them_again(complete, tmp_path, capsys):
    out = shutil.copytree(complete[0], tmp_path / "out")
    kept = (out / "adapter_model.safetensors").rename(tmp_path / "kept.safetensors")
    assert main([*complete[1], "--output_dir", str(out), "--resume_from_checkpoint", "auto"]) == 0
    assert "Already complete" not in capsys.readouterr().err
    assert same_file(kept, out / "adapter_model.safetensors")


@pytest.mark.fault("A7", "A8")
def test_a_run_without_checkpoints_is_not_told_to_go_on(place, tmp_path, capsys):
    again = words(place, tmp_path / "out", "--measure_rows", "0", "--save_strategy", "no")
    assert main(again) == 0
    for more in ([], *(["--max_steps", "9", "--resume_from_checkpoint", how] for how in ("true", "auto"))):
        capsys.readouterr()
        assert main([*again, *more]) == 6
        said = capsys.readouterr().err
        assert said.count("o checkpoint") == 1
        assert "To train its model on, name it as --model_name_or_path" in said
        assert "--resume_from_checkpoint true. Or" not in said
    assert main([*again, "--resume_from_checkpoint", "auto"]) == 0
    assert "--max_steps N" not in capsys.readouterr().err


def test_seconds_of_a_resumed_run_say_since_when(place, tmp_path):
    again = words(place, tmp_path / "out", "--save_steps", "2", "--resume_from_checkpoint", "auto")
    assert main([*again, "--max_steps", "2"]) == 0
    assert " since step " not in (tmp_path / "out" / "ftplus" / "report.md").read_text()
    assert main([*again, "--max_steps", "4"]) == 0
    assert re.search(r"\| \d+\.\d since step 2 \|", (tmp_path / "out" / "ftplus" / "report.md").read_text())


def test_what_clipping_does_is_said_before_and_during_training(place, tmp_path, capsys, caplog):
    command = words(place, tmp_path / "out", "--measure_rows", "0", "--max_steps", "1", "--max_grad_norm", "1.0")
    said = "gradients are clipped to 1 before strategies add to them"
    assert main([*command, "--dry-run"]) == 0
    assert said in capsys.readouterr().out
    assert main(command) == 0
    assert said in caplog.text
    assert main([*words(place, tmp_path / "free", "--max_grad_norm", "0"), "--dry-run"]) == 0
    assert said not in capsys.readouterr().out


@pytest.mark.parametrize("word", ["--quiet", "-q"])
def test_a_flag_of_a_launch_launches_nothing_by_itself(place, tmp_path, capsys, word):
    assert main([*words(place, tmp_path / "out", "--max_steps", "1", "--measure_rows", "0"), word]) == 0
    assert "accelerate launch" not in capsys.readouterr().err


@pytest.mark.fault("A1")
def test_auto_begins_anew_where_the_first_checkpoint_was_never_finished_and_true_says_so(place, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "checkpoint-2").mkdir(parents=True)
    again = words(place, out, "--measure_rows", "0", "--max_steps", "2", "--resume_from_checkpoint")
    assert main([*again, "true"]) == 6
    assert "holds no whole checkpoint" in capsys.readouterr().err
    (out / "checkpoint-2").mkdir()
    assert main([*again, "auto"]) == 0
    assert (out / "checkpoint-2" / "trainer_state.json").is_file()


@pytest.mark.fault("A8")
def test_the_gate_of_a_finished_run_still_judges_it(place, tmp_path):
    gate = ["--fail-if-retention-below", "1e9", "--max_steps", "2", "--resume_from_checkpoint", "auto"]
    for _ in range(2):
        assert main(words(place, tmp_path / "out", *gate)) == 5


@pytest.mark.fault("A6")
def test_a_folder_is_for_one_run_at_a_time(place, tmp_path, capsys):
    from hf_ftplus.disk import LOCK, locked

    with held(tmp_path / "out"):
        assert main(words(place, tmp_path / "out")) == 6
    assert "is in use by another run (pid 1 on elsewhere)" in capsys.readouterr().err
    with locked(tmp_path / "out"):  # nobody holds it who was killed
        assert (tmp_path / "out" / LOCK).is_file()
    assert not (tmp_path / "out" / LOCK).exists()
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "precious")
    assert main(words(place, tmp_path / "out")) == 6
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_strategy_from_a_file_runs_with_its_settings(place, tmp_path):
    (tmp_path / "idea.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom hf_ftplus import Strategy, setting\n\n\n"
        '@dataclass\nclass Shrink(Strategy):\n    """Shrink gradients."""\n\n    name: ClassVar[str] = "shrink"\n'
        '    factor: float = setting(0.5, "gradients are multiplied by this", unit="of the gradient", low=0, high=1)\n\n'
        "    def before_step(self, run):\n        for weight in run.weights.values():\n            weight.grad.mul_(self.factor)\n"
    )
    run = words(place, tmp_path / "out", "--set", "shrink.factor=0", plugin=str(tmp_path / "idea.py"), protect=None)
    assert main([*run, "--weight_decay", "0"]) == 0
    report = json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())
    assert report["facts"]["config"]["strategies"] == ["Shrink(factor=0.0)"]
    learn = report["tasks"][0]
    assert learn["after"]["loss"]["value"] == learn["before"]["loss"]["value"]  # nothing moved


def test_an_adapter_alone_cannot_be_trained(place, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert main(words(place, tmp_path / "out", "--model_name_or_path", str(tmp_path / "adapter"))) == 2
    assert f"ftplus merge --model {tmp_path / 'adapter'} --out MERGED" in capsys.readouterr().err


def test_chats_for_a_model_without_a_template(place, tmp_path, capsys):
    shutil.copytree(place / "model", tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    chats = jsonl(tmp_path / "chats.jsonl", *[json.dumps({"messages": turns})] * 8)
    run = words(place, tmp_path / "out", "--model_name_or_path", str(tmp_path / "plain"), plugin=None, protect=None)
    assert main([*run, "--dataset_name", str(chats)]) == 3
    assert "has no chat template. Type --chat_template_path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*run, "--dataset_name", str(chats), "--chat_template_path", str(place / "model")]) == 0


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_a_flag_for_a_package_that_is_not_there(place, tmp_path, capsys):
    (tmp_path / "ds.json").write_text("{}")
    assert main(words(place, tmp_path / "out", "--deepspeed", str(tmp_path / "ds.json"))) == 4
    error = capsys.readouterr().err
    assert "deepspeed" in error
    assert "Install it, or leave the flag out." in error


def test_questions_alone_cannot_protect_and_nothing_is_left_behind(place, tmp_path, capsys):
    questions = jsonl(tmp_path / "questions.jsonl", '{"prompt": "What is new?"}', '{"prompt": "And now?"}')
    assert main(words(place, tmp_path / "out", "--protect", f"asked={questions}")) == 3
    assert "--measure" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_gate_that_cannot_judge_is_refused_before_training(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out", "--fail-if-retention-below", "nan")) == 2
    assert main(words(place, tmp_path / "out", "--fail-if-retention-below", "0.9", "--measure_rows", "0")) == 2
    assert main(words(place, tmp_path / "out", "--resume_from_checkpoint", "true")) == 6
    assert "holds no checkpoint-N" in capsys.readouterr().err


def test_a_text_field_of_another_name_trains_and_is_measured_as_trl_reads_it(place, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(
        "".join(json.dumps({"content": row["completion"]}) + "\n" for row in LEARN)
    )
    flags = ["--dataset_name", str(tmp_path / "data"), "--dataset_text_field", "content"]
    assert main(words(place, tmp_path / "out", *flags, plugin=None, protect=None)) == 0
    report = json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())
    assert report["tasks"][0]["after"]["loss"]["value"] < report["tasks"][0]["before"]["loss"]["value"]


@pytest.mark.fault("A4")
@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(28, "No space left on device"), 6, "No space left on device"),
        (OSError(""), 3, "cannot be loaded: OSError"),
        (OSError("config.json is not there\nmore"), 3, "cannot be loaded: config.json is not there"),
    ],
)
def test_a_full_disk_is_not_taken_for_a_missing_model(place, tmp_path, capsys, monkeypatch, error, code, says):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("hf_ftplus.configured.SFTTrainer", fail)
    assert main(words(place, tmp_path / "out")) == code
    assert says in capsys.readouterr().err


def test_a_dataset_that_fails_without_a_word_is_named(place, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError

    monkeypatch.setattr("hf_ftplus.rows.load_dataset", fail)
    assert main(words(place, tmp_path / "out", "--dataset_name", "someone/something")) == 3
    assert "--dataset_name someone/something: RuntimeError" in capsys.readouterr().err


@pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16", "bf16", None])
def test_bf16_is_on_where_the_doctor_finds_units_for_it(monkeypatch, unit):
    from hf_ftplus.cli import doctor
    from hf_ftplus.cli.sft import has_bf16

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, unit: True}, raising=False)
    assert has_bf16(on_cpu=True) == bool(doctor.cpu_bf16_units()) == (unit is not None)


def test_one_lora_target_is_a_name_and_no_pattern(place, tmp_path):
    lora = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "--measure_rows", "0"]
    assert main(words(place, tmp_path / "out", *lora)) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]


def test_the_model_card_says_what_was_kept(place, tmp_path, capsys, monkeypatch):
    out, few = tmp_path / "out", ["--completions", "0", "--max_steps", "2"]
    assert main(words(place, out, *few)) == 0
    card, report = (out / "README.md").read_text(), json.loads((out / "ftplus" / "report.json").read_text())
    loss = report["tasks"][1]["after"]["loss"]["value"]
    assert card.count("## What was learnt, what was kept") == 1
    assert re.search(rf"### protect\n\nprotect, n = .*\n\n.*\n.*\n(.*\n)*\| loss.* \| {loss:.3f} ", card)
    assert "library_name: transformers" in card
    monkeypatch.setattr(importlib.import_module("hf_ftplus.page.write"), "to_card", None)
    capsys.readouterr()
    assert main(words(place, tmp_path / "other", *few)) == 0
    assert "warning: no model card could be made" in capsys.readouterr().err


def test_trackers_hear_of_every_task_before_and_after(place, tmp_path, monkeypatch, capsys):
    from transformers import TrainerCallback, trainer

    heard, ended = [], []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            assert not ended
            heard.append((state.global_step, dict(logs)))

        def on_train_end(self, args, state, control, model=None, **kwargs):
            ended.append(model)

    monkeypatch.setattr(trainer, "get_reporting_integration_callbacks", lambda names: [Tracker] if names else [])
    run = words(place, tmp_path / "out", "--logging_steps", "1", "--completions", "0", "--metric", "learn=exact_match")
    assert main([*run, "--report_to", "trackio"]) == 0
    report = json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())
    tasks = {task["name"]: task for task in report["tasks"]}
    before, after = ({k: v for _, logs in group for k, v in logs.items()} for group in (heard[:1], heard[-1:]))
    assert [heard[0][0], heard[-1][0]] == [0, 4]
    for name, task in tasks.items():
        assert before[f"loss/{name}"] == task["before"]["loss"]["value"]
        assert after[f"loss/{name}"] == task["after"]["loss"]["value"]
        assert after[f"drift/{name}"] == task["drift"]["value"]
    assert after["exact_match/learn"] == tasks["learn"]["after"]["metric"]["value"]
    assert not any(key.startswith("drift/") for key in before)
    assert len(ended) == 1  # once, when all was said
    assert ended.pop() is not None
    assert ["mean_token_accuracy" in logs for _, logs in heard if "loss" in logs] == [True] * 4
    heard.clear()

    def fails_after(self, args, state, control, logs=None, **kwargs):
        if "drift/learn" in logs:
            raise ConnectionError("the tracker is away")

    monkeypatch.setattr(Tracker, "on_log", fails_after)
    assert main([*words(place, tmp_path / "broken", "--completions", "0"), "--report_to", "trackio"]) == 0
    assert "warning: no tracker got the figures after training (ConnectionError" in capsys.readouterr().err
    assert (tmp_path / "broken" / "ftplus" / "report.json").is_file()
    assert main([*words(place, tmp_path / "silent", "--completions", "0"), "--report_to", "none"]) == 0
    assert not heard


def test_tensorboard_keeps_the_figures_of_the_report(place, tmp_path, monkeypatch):
    """A tracker that needs no network, read back as its own pages read it."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    run = words(place, tmp_path / "out", "--logging_steps", "1", "--completions", "0")
    assert main([*run, "--report_to", "tensorboard"]) == 0
    read = events.EventAccumulator(str(tmp_path / "logs"))
    read.Reload()
    scalars = {tag.removeprefix("train/"): read.Scalars(tag) for tag in read.Tags()["scalars"]}
    report = json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())
    for task in report["tasks"]:
        before, after = scalars[f"loss/{task['name']}"]
        assert [before.step, after.step] == [0, 4]
        assert before.value == pytest.approx(task["before"]["loss"]["value"], rel=1e-6)
        assert after.value == pytest.approx(task["after"]["loss"]["value"], rel=1e-6)
        assert scalars[f"drift/{task['name']}"][0].value == pytest.approx(task["drift"]["value"], rel=1e-5)
    assert [found.step for found in scalars["ewc/penalty"]] == [1, 2, 3, 4]
