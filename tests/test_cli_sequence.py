"""`ftplus sequence` on the command line: the plan, bad input before any model loads, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from sequences import make_sequence_place, sequence_yaml
from test_sequence import STOP
from tiny import tiny_llama, tiny_tokenizer

from hf_ftplus.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_sequence_place(tmp_path_factory.mktemp("sequence"))


def written(given, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(given, sort_keys=False))
    return str(file)


def test_one_command_runs_all_stages_and_prints_the_matrix(place, tmp_path, capsys):
    out = tmp_path / "out"
    given = sequence_yaml(place, out, stages=2, max_steps=2, save_strategy="no", metric={"fruits": "exact_match"})
    assert main(["sequence", written(given, tmp_path)]) == 0
    shown, said = capsys.readouterr()
    table = shown[shown.rindex("after  ") :]
    assert f"Page: {out}/report.html" in said
    assert 'class="matrix"' in (out / "report.html").read_text()
    for word in ("the start", "colours", "fruits", "token acc. %", "exact match %", "ACC", "BWT", "FWT", "LA"):
        assert word in table
    assert json.loads((out / "sequence.json").read_text())["metrics"] == {
        "colours": "token_accuracy",
        "fruits": "exact_match",
    }


def test_the_plan_is_shown_and_nothing_is_written(place, tmp_path, capsys):
    out = tmp_path / "out"
    given = sequence_yaml(
        place, out, plugins=["ewc"], each={"cities": {"plugins": [{"ewc": {"strength": 5}}, "replay"]}}
    )
    del given["measure"]["cities"]
    assert main(["sequence", written(given, tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "24 rows, 6 steps" in shown
    assert "nothing to protect yet" in shown
    assert "EWC(strength=5.0" in shown
    assert "with its memory of fruits" in shown
    assert "hands on  its model, memory of ewc, 8 rows" in shown
    assert "cities is measured on trained rows" in shown
    assert not out.exists()


def test_a_later_stage_may_evaluate_the_held_out_rows_of_its_tasks(place, tmp_path):
    given = sequence_yaml(place, tmp_path / "out")
    evaluated_task()(given)
    assert main(["sequence", written(given, tmp_path), "--dry-run"]) == 0


def test_its_file_may_be_given_as_to_other_commands(place, tmp_path, capsys):
    file = written(sequence_yaml(place, tmp_path / "out"), tmp_path)
    assert main(["sequence", "--config", file, "--dry-run"]) == 0
    assert "Dry run" in capsys.readouterr().out
    assert main(["sequence"]) == main(["sequence", file, "--config", "other.yaml"]) == 2
    said = capsys.readouterr().err
    assert "There is no file. Expected one, with its stages: ftplus sequence run.yaml" in said
    assert "There are two files" in said


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(place, tmp_path, capsys, monkeypatch):
    (tmp_path / "stop.py").write_text(STOP)
    monkeypatch.setenv("STOP_AT", "01-colours:1")
    given = sequence_yaml(place, tmp_path / "out", stages=1, plugins=[str(tmp_path / "stop.py")])
    assert main(["sequence", written(given, tmp_path)]) == 130
    error = capsys.readouterr().err
    assert "Saved checkpoint-1. Go on with the same command." in error
    assert "--resume_from_checkpoint" not in error


# ---- bad input: one line, an exit code, before any model loads -------------------------------------------------------


def stages(given, *changes):
    for stage, change in zip(given["stages"], changes, strict=False):
        stage.update(change)


def put(**keys):
    return lambda given: given.update(keys)


def in_stage(number, **keys):
    return lambda given: given["stages"][number].update(keys)


def no_stages(given):
    given["stages"] = []


def nothing_left(given):
    del given["stages"]


def taught(number, folder):
    """A stage with a teacher in the output folder."""

    def change(given):
        given["stages"][number]["plugins"] = [{"distill": {"teacher": f"{given['output_dir']}/{folder}"}}]

    return change


def taught_by_another(given):
    """A second stage whose teacher has one token more than the student."""
    folder, tokenizer = given["output_dir"] + "-other", tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder), tiny_llama(vocab=len(tokenizer)).save_pretrained(folder)
    given["stages"][1]["plugins"] = [{"distill": {"teacher": folder}}]


def evaluated_task(measure=None):
    """A second stage with one task under `tasks:`, evaluated on its own held-out rows."""

    def change(given):
        stage = given["stages"][1]
        rows = stage.pop("dataset_name")
        stage |= {"tasks": {"sums": {"dataset": rows, "measure": measure or rows}}, "eval_strategy": "steps"}

    return change


def streamed_task(given):
    evaluated_task()(given)
    stage = given["stages"][1]
    stage["tasks"]["sums"]["streaming"] = True
    stage["measure"] = {"fruits": stage["tasks"]["sums"]["dataset"]}


def an_adapter_alone(given):
    folder = Path(given["output_dir"] + "-adapter")
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    given["model_name_or_path"] = str(folder)


def bad_json(given):
    file = given["output_dir"] + "-bad.jsonl"
    with open(file, "w") as f:
        f.write('{"prompt": "a", "completion" "b"}\n')
    given["stages"][2]["dataset_name"] = file


REFUSED = {
    "unknown key": (2, put(learning_rte=1), "Unknown key 'learning_rte' in the YAML. Did you mean 'learning_rate'"),
    "unknown key of ours": (2, put(kep=1), "Did you mean 'keep'"),
    "unknown key in a stage": (2, in_stage(1, max_step=1), "in stage 'fruits'. Did you mean 'max_steps'"),
    "no stages": (2, no_stages, "There are no stages"),
    "no stages at all": (2, nothing_left, "There are no stages"),
    "stages as text": (2, put(stages="reviews"), "There are no stages"),
    "two of one name": (2, in_stage(1, name="Colours"), "Two tasks have the name"),
    "a name with a slash": (2, in_stage(1, name="a/b"), "Stage 2 has the name 'a/b'; expected letters"),
    "a name with dots": (2, in_stage(1, name=".."), "Stage 2 has the name '..'"),
    "a number for a name": (2, in_stage(0, name=1), "Stage 1 has the name 1"),
    "no name": (2, lambda given: given["stages"][1].pop("name"), "Stage 2 has no name"),
    "learn for a name": (2, in_stage(0, name="learn"), "not 'learn'"),
    "output_dir in a stage": (2, in_stage(1, output_dir="x"), "'fruits' has output_dir, which is one for all stages"),
    "no output_dir": (2, lambda given: given.pop("output_dir"), "output_dir: out"),
    "a model in a later stage": (2, in_stage(1, model_name_or_path="x"), "starts from the model of the stage before"),
    "resume": (2, put(resume_from_checkpoint=True), "goes on by itself"),
    "keep": (2, put(keep=-1), "keep: -1; expected the number of rows"),
    "a bad setting in a stage": (2, in_stage(2, plugins=[{"ewc": {"strength": -1}}]), "Stage 'cities': ewc.strength"),
    "an unknown strategy": (2, in_stage(2, plugins=["ewcc"]), "Did you mean 'ewc'"),
    "a bad training argument": (2, in_stage(2, max_steps="many"), "Stage 'cities': "),
    "nothing to learn": (
        2,
        lambda given: given["stages"][2].pop("dataset_name"),
        "Stage 'cities': There is nothing to",
    ),
    "nothing is measured": (2, put(measure_rows=0), "measure_rows is 0"),
    "one task, two measures": (2, in_stage(1, measure={"colours": "x.jsonl"}), "expected one, the same in every stage"),
    "measure learn for all": (2, put(measure={"learn": "x.jsonl"}), "Say of which"),
    "nothing to rehearse": (2, put(plugins=["replay"], keep=0), "Stage 'fruits': replay would find nothing to protect"),
    "memory of some": (2, in_stage(1, plugins=["ewc", "si"]), None),
    "a metric of nothing": (2, put(metric={"colors": "f1"}), "Stage 'colours': --metric 'colors=f1': no task 'colors'"),
    "a task of the stage's name": (
        2,
        in_stage(1, dataset_name=None, tasks=[{"name": "fruits", "dataset": "x.jsonl"}]),
        "Stage 'fruits': One of its tasks has the name of the stage",
    ),
    "a gate that nothing can open": (2, in_stage(0, fail_if_retention_below=0.9), "has no protect task to judge"),
    "a later stage as teacher": (3, taught(1, "03-cities"), "Stage 'fruits': distill cannot load the teacher"),
    "its own model as teacher": (3, taught(1, "02-fruits"), "Stage 'fruits': distill cannot load the teacher"),
    "si with an adapter in a later stage": (
        4,
        in_stage(2, plugins=["si"], use_peft=True),
        "Stage 'cities': si cannot follow an adapter",
    ),
    "ewc with dora": (4, put(plugins=["ewc"], use_peft=True, use_dora=True), "Stage 'colours': The adapter trains"),
    "ewc with dora in a later stage": (
        4,
        in_stage(1, plugins=["ewc"], use_peft=True, use_dora=True),
        "Stage 'fruits': The adapter trains",
    ),
    "a teacher of other tokens": (4, taught_by_another, "Stage 'fruits': The teacher"),
    "a teacher that may be gone": (2, taught(1, "01-colours/checkpoint-2"), "will not leave there"),
    "no teacher there": (
        2,
        taught(1, "01-colours/merged"),
        "'colours' will not leave there; expected the model that it does",
    ),
    "a pool's name taken": (2, in_stage(1, protect={"colours": "x.jsonl"}), "Two tasks have the name"),
    "no such model": (3, put(model_name_or_path="./nothing/here"), "No model at './nothing/here'"),
    "later data missing": (3, in_stage(2, dataset_name="none.jsonl"), "Stage 'cities': none.jsonl does not exist"),
    "later measure missing": (3, put(measure={"cities": "none.jsonl"}), "Stage 'cities': none.jsonl does not exist"),
    "rows kept of streamed tasks": (
        2,
        streamed_task,
        "Stage 'fruits': Which rows of a streamed task were trained on is not known",
    ),
    "a later task's measure missing": (3, evaluated_task("none.jsonl"), "tasks.sums: none.jsonl does not exist"),
    "an adapter as the model": (2, an_adapter_alone, "-adapter holds an adapter, not a model"),
    "later data broken": (3, bad_json, "Stage 'cities': "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(place, tmp_path, capsys, monkeypatch, case):
    code, change, says = REFUSED[case]
    given = sequence_yaml(place, tmp_path / "out")
    if says is None:
        given["plugins"], says = ["si"], "ewc would look for its memory of the stage before, which has only si"
    change(given)
    monkeypatch.setattr("hf_ftplus.run.sft_trainer", None)  # no model may load
    assert main(["sequence", written(given, tmp_path)]) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_missing_or_no_yaml_is_said(tmp_path, capsys):
    assert main(["sequence", str(tmp_path / "none.yaml")]) == 2
    assert "expected a YAML file" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("stages: [")
    assert main(["sequence", str(tmp_path / "run.yaml")]) == 2
    assert "is not YAML" in capsys.readouterr().err
    assert main(["sequence"]) == 2


def test_a_folder_of_somebody_else_is_not_touched(place, tmp_path, capsys):
    mine = tmp_path / "out" / "02-fruits" / "config.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    given = sequence_yaml(place, tmp_path / "out", stages=2)
    for _ in range(2):
        assert main(["sequence", written(given, tmp_path)]) == 6
        assert "02-fruits holds another run (config.json)" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert not (tmp_path / "out" / "01-colours").exists()


def test_under_a_launcher_it_is_refused_by_name(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["sequence", written(sequence_yaml(place, tmp_path / "out"), tmp_path)]) == 2
    assert "num_processes: N" in capsys.readouterr().err
