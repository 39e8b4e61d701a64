"""`ftplus compare` on the command line, with cells that fail and one that is killed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from commands import same_file
from held import held
from sequences import make_sequence_place

from hf_ftplus.cli import main
from hf_ftplus.compared import plan
from hf_ftplus.compared.cells import created, slug

NAP = """
import os, time
from dataclasses import dataclass
from typing import ClassVar
from hf_ftplus import Strategy

@dataclass
class Nap(Strategy):
    name: ClassVar[str] = "nap"

    def after_step(self, run):
        if os.path.exists(%r):
            time.sleep(1.0)
"""
BROKEN = """
from dataclasses import dataclass
from typing import ClassVar
from hf_ftplus import Strategy

@dataclass
class Broken(Strategy):
    name: ClassVar[str] = "broken"

    def prepare(self, run):
        raise ValueError("nothing holds")
"""
RATE = "none:learning_rate=0.005"


def options(place, out, *candidates, config=None, seeds=1):
    return [
        "compare", "--config", str(config or place / "run.yaml"), "--plugins", ",".join(candidates),
        "--seeds", str(seeds), "--out", str(out),
    ]  # fmt: skip


def kill_midway(folder):
    """SIGKILL for the process of a cell once its first checkpoint is whole; the thread that does so."""

    def wait():
        until = time.monotonic() + 240
        while time.monotonic() < until and not list(folder.glob("checkpoint-2/ftplus/commit.json")):
            time.sleep(0.05)
        os.kill(json.loads((folder / "ftplus" / "cell.json").read_text())["pid"], signal.SIGKILL)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_sequence_place(tmp_path_factory.mktemp("compare"))
    (folder / "nap.py").write_text(NAP % str(folder / "slowly"))
    (folder / "broken.py").write_text(BROKEN)
    given = {
        "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "fruits.jsonl"), "max_steps": 6,
        "protect": {"colours": str(folder / "colours.jsonl")}, "learning_rate": 5e-3, "per_device_train_batch_size": 8,
        "gradient_checkpointing": False, "report_to": "none", "save_steps": 2, "max_length": 64, "measure_rows": 12,
        "completions": 0, "use_cpu": True, "bf16": False, "env": {"OMP_NUM_THREADS": "1", "LANTERNS": "lit", "LANTERN_KEY": "secret"},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(given))
    return folder


@pytest.fixture(scope="module")
def first(place):
    """One comparison: plain, a strategy that is killed midway, and one that fails. Exit code and folder."""
    out = place / "out"
    (place / "slowly").touch()
    killer = kill_midway(out / "cells" / "nap" / "seed-42")
    code = main(options(place, out, RATE, f"{place}/nap.py", f"{place}/broken.py"))
    killer.join()
    (place / "slowly").unlink()
    return code, out, json.loads((out / "compare.json").read_text())


@pytest.mark.parametrize("taken", ["out", "out/probe"])
def test_a_folder_that_another_process_writes_to_is_left_alone(place, tmp_path, capsys, taken):
    (tmp_path / "out" / "probe").mkdir(parents=True)
    (tmp_path / "out" / "probe" / "precious").touch()
    with held(tmp_path / taken):
        assert main(options(place, tmp_path / "out", "none")) == 6
    assert "in use by another run (pid 1 on elsewhere)" in capsys.readouterr().err
    assert (tmp_path / "out" / "probe" / "precious").is_file()


def test_the_home_in_output_dir_is_where_its_cells_are(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    given = yaml.safe_load((place / "run.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**given, "output_dir": "~/it"}))
    with held(tmp_path / "it-compare"):
        assert main(["compare", "--config", "run.yaml", "--plugins", "none"]) == 6
    assert f"{tmp_path}/it-compare is in use" in capsys.readouterr().err
    assert not (tmp_path / "~").exists()


def test_a_cell_that_fails_is_said_and_the_others_go_on(first):
    code, out, facts = first
    assert code == 1
    states = {row["name"]: row["cells"][0] for row in facts["rows"]}
    assert states[RATE]["state"] == "finished"
    assert "killed by signal 9" in states["nap"]["error"]
    assert "nothing holds" in states["broken"]["error"]
    assert facts["rows"][2]["learning"]["value"] is None
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in (RATE, "nap", "broken"))
    assert (out / "probe" / "ftplus" / "report.json").is_file()
    assert not list((out / "probe").glob("*.safetensors"))
    assert not list((out / "cells").glob("*/*/checkpoint-6"))


def test_after_kill_9_the_same_command_goes_on_from_the_checkpoint_to_the_same_weights(first, place, capsys):
    _, out, _ = first
    assert main(options(place, out, RATE, f"{place}/nap.py")) == 0
    shown, said = capsys.readouterr()
    assert "1 of 2 cells to run" in shown
    assert "[2/2] nap, seed 42" in said
    assert RATE + ", seed" not in said
    folders = [out / "cells" / name / "seed-42" for name in ("none-learning_rate=0.005", "nap")]
    kept = json.loads((folders[1] / "ftplus" / "cell.json").read_text())
    assert kept["resumed"] is True
    assert kept["spent"] > kept["seconds"]  # of the start that was killed, too
    assert same_file(*(folder / "model.safetensors" for folder in folders))
    rows = {row["name"]: row for row in json.loads((out / "compare.json").read_text())["rows"]}
    assert rows[RATE]["seconds"] > 0
    assert rows["nap"]["seconds"] is None


@pytest.mark.storm
def test_four_candidates_survive_kill_9_in_each_of_their_cells(place, tmp_path, capsys):
    """Each is killed once it has saved; asked again, all go on, and end with the weights of a run that was not killed."""
    config, out = tmp_path / "run.yaml", tmp_path / "out"
    longer = {"max_steps": 60, "eval_strategy": "no", "measure": {"fruits": str(place / "fruits.jsonl")}}
    config.write_text(yaml.safe_dump(yaml.safe_load((place / "run.yaml").read_text()) | longer))
    line = options(place, out, RATE, "ewc:strength=1", "replay", "distill", config=config)
    killers = [kill_midway(out / "cells" / slug(name) / "seed-42") for name in (RATE, *line[4].split(",")[1:])]
    assert main(line) == 1
    for killer in killers:
        killer.join()
    assert "4 of 4 cells failed" in capsys.readouterr().err
    assert main(line) == 0
    for row in json.loads((out / "compare.json").read_text())["rows"]:
        assert row["cells"][0]["state"] == "finished"
        folder = Path(row["cells"][0]["folder"])
        again = tmp_path / "again" / folder.parent.name
        assert json.loads((folder / "ftplus" / "cell.json").read_text())["resumed"] is True
        assert main(["sft", "--config", str(folder / "ftplus" / "stage.yaml"), "--output_dir", str(again)]) == 0
        assert same_file(folder / "model.safetensors", again / "model.safetensors")


def test_settings_and_data_that_changed_are_refused_by_name(first, place, tmp_path, capsys):
    _, out, _ = first
    given = yaml.safe_load((place / "run.yaml").read_text())
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump({**given, "max_steps": 7}))
    assert main(options(place, out, RATE, config=changed)) == 6
    error = capsys.readouterr().err
    assert f"Cell {RATE}, seed 42" in error
    assert "max_steps was 6, is 7" in error
    assert "choose a new --out" in error
    changed.write_text(yaml.safe_dump({**given, "env": {"LANTERNS": "out"}}))
    assert main(options(place, out, RATE, config=changed)) == 0  # a variable of the shell is no setting
    file = place / "fruits.jsonl"
    before = file.read_text()
    file.write_text(before.replace("pear", "kiwi"))
    try:
        assert main(options(place, out, RATE)) == 6
        assert "fruits.jsonl changed since" in capsys.readouterr().err
    finally:
        file.write_text(before)


def test_another_model_or_strategy_behind_the_same_name_is_refused(first, place, capsys):
    _, out, _ = first
    for file, candidates in (
        (place / "nap.py", [f"{place}/nap.py"]),
        (place / "model" / "config.json", [RATE]),
    ):
        before = file.read_text()
        file.write_text(before.replace("import os, time", "import os, time, sys") + "\n")
        try:
            assert main(options(place, out, *candidates)) == 6
        finally:
            file.write_text(before)
        said = capsys.readouterr().err
        assert f"{file if file.suffix == '.py' else file.parent} changed since" in said
        assert main(options(place, out, *candidates)) == 0


def test_a_budget_leaves_out_what_would_end_too_late_and_says_so(first, place, capsys):
    _, out, _ = first
    assert main([*options(place, out, RATE, "ewc", seeds=2), "--budget", "1s", "--json"]) == 0
    shown, said = capsys.readouterr()
    facts = json.loads(shown)
    assert facts["left_out"] == [f"{RATE}, seed 43", "ewc, seed 42", "ewc, seed 43"]
    assert [row["n"] for row in facts["rows"]] == [1, 0]
    assert "no cell starts that would end after 1 s" in said
    assert not (out / "cells" / "ewc").exists()


def test_a_budget_is_of_the_whole_comparison_and_what_finished_cells_took_is_spent(first, place, capsys):
    """500 s are said to have been taken of 600: the next cell, of as many, no longer fits."""
    _, out, _ = first
    file = out / "cells" / "none-learning_rate=0.005" / "seed-42" / "ftplus" / "cell.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"seconds": 500.0, "spent": 500.0}))
    try:
        assert main([*options(place, out, RATE, "ewc"), "--budget", "10m"]) == 0
    finally:
        file.write_text(before)
    shown = " ".join(capsys.readouterr().out.split())
    assert "no cell starts that would end after 10 min, of which 8 min are spent" in shown
    assert "Left out for the budget: ewc, seed 42" in shown


def test_a_budget_below_the_limit_says_yes(first, place, monkeypatch):
    _, out, _ = first
    monkeypatch.setattr(plan, "LIMIT", 1)
    assert main([*options(place, out, RATE, "ewc"), "--budget", "1s"]) == 0
    assert not (out / "cells" / "ewc").exists()


def test_above_the_limit_nothing_starts_and_the_command_to_type_is_said(first, place, capsys, monkeypatch):
    _, out, _ = first
    monkeypatch.setattr(plan, "LIMIT", 1)
    words = options(place, out, RATE, "ewc")
    assert main(words) == 2
    shown, said = capsys.readouterr()
    assert "1 cells of other rows" in shown
    assert f"Type ftplus {shlex.join(words)} --yes" in said
    assert not (out / "cells" / "ewc").exists()
    assert main(options(place, out, RATE)) == 0  # nothing is left to run


def test_a_cell_that_still_runs_is_left_alone(first, place, capsys):
    _, out, _ = first
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    folder = out / "cells" / "si" / "seed-42" / "ftplus"
    folder.mkdir(parents=True)
    try:
        (folder / "cell.json").write_text(json.dumps({"pid": process.pid, "created": created(process.pid)}))
        assert main(options(place, out, "si")) == 6
        assert f"still runs as process {process.pid}" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()


def test_the_command_at_the_end_makes_the_run_again(first, place, tmp_path):
    _, out, _ = first
    told = out / "cells" / "none-learning_rate=0.005" / "seed-42"
    stage = told / "ftplus" / "stage.yaml"
    assert yaml.safe_load(stage.read_text())["env"] == {
        "OMP_NUM_THREADS": "1",
        "LANTERNS": "lit",
    }  # another shell may lack them
    assert main(["sft", "--config", str(stage), "--output_dir", str(tmp_path / "again")]) == 0
    assert same_file(told / "model.safetensors", tmp_path / "again" / "model.safetensors")


def test_the_recommendation_ends_with_a_command_on_one_line(first, place, capsys):
    """The tiny model knows nothing that it could keep, so its report is given something."""
    _, out, _ = first
    file = out / "cells" / "none-learning_rate=0.005" / "seed-42" / "ftplus" / "report.json"
    before = file.read_text()
    report = json.loads(before)
    for task in report["tasks"]:
        task["retention"]["value"], task["change"]["token_accuracy"]["value"] = 0.5, 0.25
    file.write_text(json.dumps(report))
    try:
        assert main(options(place, out, RATE)) == 0
    finally:
        file.write_text(before)
    shown = capsys.readouterr().out
    assert f"{RATE} keeps 50.0 %" in " ".join(shown.split())
    assert f"\nftplus sft --config {file.with_name('stage.yaml')} --output_dir again\n" in shown


def without(*keys, **more):
    return lambda given: {key: value for key, value in given.items() if key not in keys} | more


EWC_ALONE = ["--plugins", "ewc", "--learning-rates", "1e-4"]
REFUSED = {
    "no config": (None, ["compare", "--plugins", "none"], "There is no config"),
    "no candidates": (None, ["compare", "--config", "{run}"], "There are no candidates"),
    "unknown": (None, ["--plugins", "replai"], "Did you mean 'replay'"),
    "a bare budget": (None, ["--budget", "2"], "expected a time with its unit: 2h"),
    "no seeds": (None, ["--seeds", "0"], "0 is not in the range x>=1"),
    "nothing to keep": (without("protect"), [], "names nothing that could be forgotten. Add it: protect:"),
    "nothing measured": (without(measure_rows=0), [], "measures nothing of what is learnt"),
    "resumed": (without(resume_from_checkpoint=True), [], "goes on by itself"),
    "a seed in words": (without(seed="x"), [], "seed: 'x' in the config"),
    "strengths of none": (None, ["--strengths", "1,2"], "no candidate has a strength that is still to be set"),
    "rates without none": (None, ["compare", "--config", "{run}", *EWC_ALONE], "Add none"),
    "an unknown key": (without(learning_rte=1), [], "Did you mean 'learning_rate'"),
}


@pytest.mark.parametrize(("change", "words", "said"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_before_anything_starts(place, tmp_path, capsys, change, words, said):
    given = yaml.safe_load((place / "run.yaml").read_text())
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(change(given) if change else given))
    line = [word.format(run=file) for word in words]
    if not line or line[0] != "compare":
        line = [*options(place, tmp_path / "out", "none", config=file), *line]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert said in error
    assert not (tmp_path / "out").exists()


def test_a_candidate_that_cannot_train_is_refused_before_any_does(place, tmp_path, capsys):
    given = yaml.safe_load((place / "run.yaml").read_text()) | {"use_peft": True, "lora_target_modules": ["q_proj"]}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(given))
    assert main(options(place, tmp_path / "out", "none", "si", config=file)) == 4
    assert "si cannot follow an adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("holds", [[], ["config.json"], ["config.json", "model.safetensors"]])
def test_a_folder_that_is_no_model_is_one_line_before_anything_starts(place, tmp_path, capsys, holds):
    folder = tmp_path / "no-model"
    folder.mkdir()
    for name in holds:
        shutil.copy(place / "model" / name, folder)
    given = yaml.safe_load((place / "run.yaml").read_text()) | {"model_name_or_path": str(folder)}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(given))
    assert main(options(place, tmp_path / "out", "none", config=file)) == 3
    error = capsys.readouterr().err
    assert "no-model" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
