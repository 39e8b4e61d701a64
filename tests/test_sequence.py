"""Runs that follow one another: what is handed on, what the matrix shows, and that no interruption changes it."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from commands import same_file
from held import held
from safetensors.torch import load_file
from scipy.stats import chisquare
from sequences import make_sequence_place, sequence_yaml
from transformers import AutoModelForCausalLM

import hf_ftplus
from hf_ftplus import run
from hf_ftplus.errors import DataError, RetentionError, StorageError, UsageError
from hf_ftplus.report import Report
from hf_ftplus.report.matrix import Matrix
from hf_ftplus.stages.plan import read
from hf_ftplus.stages.reservoir import divided, reservoir

LORA = {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"}
LORA_QV = {**LORA, "lora_target_modules": ["q_proj", "v_proj"]}
STOP = '''
import os
import re
import signal
from dataclasses import dataclass
from typing import ClassVar

from hf_ftplus import Strategy


@dataclass
class Stop(Strategy):
    """Presses Ctrl-C where it is told to."""

    name: ClassVar[str] = "stop"

    def after_step(self, run):
        if os.environ.get("STOP_AT") == f"{run.memory.write.parents[1].name}:{run.step + 1}":
            os.kill(os.getpid(), signal.SIGINT)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_sequence_place(tmp_path_factory.mktemp("sequence"))
    (folder / "stop.py").write_text(STOP)
    return folder


@pytest.fixture(scope="module")
def whole(place):
    """Three stages of EWC, SI and replay that nothing interrupts."""
    out = place / "whole"
    return out, hf_ftplus.sequence(everything(place, out))


def everything(place, out, **changes):
    return sequence_yaml(place, out, plugins=["ewc", "si", "replay", str(place / "stop.py")], **changes)


def stage_of(out, name):
    return yaml.safe_load((out / name / "ftplus" / "stage.yaml").read_text())


def reports(out):
    return [Report.load(file) for file in sorted(out.glob("*/ftplus/report.json"))]


# ---- the matrix ------------------------------------------------------------------------------------------------------


def test_plain_forgets_and_strategies_do_not(place, tmp_path):
    shared = {"max_steps": 30, "save_strategy": "no"}
    plain = hf_ftplus.sequence(sequence_yaml(place, tmp_path / "plain", **shared))
    held = [{"ewc": {"strength": 30}}, {"replay": {"share": 0.5}}]
    kept = hf_ftplus.sequence(sequence_yaml(place, tmp_path / "kept", plugins=held, keep=24, **shared))
    assert plain.summary()["LA"] > 0.5  # there was something to forget
    assert kept.summary()["LA"] > 0.9 * plain.summary()["LA"]
    assert plain.summary()["BWT"] < -0.4
    assert kept.summary()["BWT"] > -0.05
    assert plain.summary(losses=True)["BWT"] > 2
    assert kept.summary(losses=True)["BWT"] < 0.2
    assert kept.summary()["ACC"] > plain.summary()["ACC"] + 0.3


def test_every_task_is_measured_at_the_start_and_after_each_stage(whole):
    out, matrix = whole
    assert matrix.stages == ["colours", "fruits", "cities"]
    assert np.array(matrix.loss).shape == (4, 3)
    found = reports(out)
    for i, report in enumerate(found):
        tasks = {task.name: task for task in report.tasks}
        for j, name in enumerate(matrix.stages):
            task = tasks["learn" if i == j else name]
            assert task.after.loss.value == matrix.loss[i + 1][j]
            assert task.after.token_accuracy.value == matrix.score[i + 1][j]
            assert task.before.loss.value == pytest.approx(
                matrix.loss[i][j], abs=1e-6
            )  # what was handed on is what was left
    assert len({round(value, 6) for row in matrix.loss for value in row}) == 12


def test_the_matrix_is_kept_as_json_and_csv(whole):
    out, matrix = whole
    found = json.loads((out / "sequence.json").read_text())
    assert found["summary"] == {"score": matrix.summary(), "loss": matrix.summary(losses=True)}
    assert Matrix.load(out / "sequence.json") == matrix
    lines = (out / "sequence.csv").read_text().splitlines()
    assert lines[0] == "after,task,score,loss"
    assert len(lines) == 1 + 12
    assert lines[-1] == f"cities,cities,{matrix.score[3][2]},{matrix.loss[3][2]}"


# ---- what is handed on -----------------------------------------------------------------------------------------------


def test_a_stage_starts_from_the_model_memory_and_pools_of_those_before(whole):
    out, _ = whole
    first, second, third = (stage_of(out, name) for name in ("01-colours", "02-fruits", "03-cities"))
    assert "memory" not in first
    assert "protect" not in first
    assert third["model_name_or_path"] == str(out / "02-fruits")
    assert third["memory"] == str(out / "02-fruits" / "ftplus" / "memory")
    assert second["protect"] == {"colours": str(out / "pools" / "colours.jsonl")}
    assert list(third["protect"]) == ["colours", "fruits"]
    roles = {task.name: task.role for task in reports(out)[2].tasks}
    assert roles == {"learn": "learn", "colours": "protect", "fruits": "protect"}


def test_the_first_stage_has_nothing_to_protect_and_only_remembers(whole):
    out, _ = whole
    settings = {name: values for item in stage_of(out, "01-colours")["plugins"] for name, values in item.items()}
    assert settings["ewc"]["first"] is True
    assert settings["replay"]["share"] == 0
    later = {name: values for item in stage_of(out, "02-fruits")["plugins"] for name, values in item.items()}
    assert later["ewc"]["first"] is False
    assert later["replay"]["share"] == 0.125
    facts = [report.facts["strategies"]["ewc"] for report in reports(out)]
    assert "penalty" not in facts[0]
    assert facts[1]["penalty"] > 0


def test_recording_alone_trains_as_plain_does(place, tmp_path):
    common = {"stages": 1, "save_strategy": "no"}
    hf_ftplus.sequence(sequence_yaml(place, tmp_path / "plain", **common))
    hf_ftplus.sequence(sequence_yaml(place, tmp_path / "ewc", plugins=["ewc", "replay"], **common))
    weights = [tmp_path / arm / "01-colours" / "model.safetensors" for arm in ("plain", "ewc")]
    assert same_file(*weights)
    left = load_file(tmp_path / "ewc" / "01-colours" / "ftplus" / "memory" / "ewc.safetensors")
    assert sum(tensor.sum() for name, tensor in left.items() if name.startswith("diagonal.")) > 0


def test_memory_goes_on_without_any_rows_kept(place, tmp_path):
    given = sequence_yaml(place, tmp_path, stages=2, plugins=["si"], keep=0, save_strategy="no")
    hf_ftplus.sequence(given)
    second = stage_of(tmp_path, "02-fruits")
    assert "protect" not in second
    assert not (tmp_path / "pools").exists()
    assert reports(tmp_path)[1].facts["strategies"]["si"]["penalty"] > 0
    shutil.rmtree(tmp_path / "02-fruits")
    shutil.rmtree(tmp_path / "01-colours" / "ftplus" / "memory")
    with pytest.raises(StorageError, match=r"01-colours/ftplus/memory is gone, and si looks for it\. Put it back; or"):
        hf_ftplus.sequence(given)


def test_a_stage_without_the_strategy_ends_what_it_remembered(place, tmp_path):
    plan = read(sequence_yaml(place, tmp_path, keep=0, plugins=["si"], each={"fruits": {"plugins": []}}))
    assert [stage.remembers for stage in plan.stages] == [[], [], []]
    assert "cities: si remembers nothing of colours, for fruits is trained without it." in " ".join(plan.notes)


def test_memory_of_an_earlier_run_is_for_the_first_stage(place, whole, tmp_path):
    earlier = whole[0] / "03-cities"
    given = sequence_yaml(place, tmp_path, stages=2, max_steps=2, save_strategy="no", plugins=["ewc"], keep=0)
    hf_ftplus.sequence({**given, "model_name_or_path": str(earlier), "memory": str(earlier)})
    assert stage_of(tmp_path, "01-colours")["memory"] == str(earlier)
    assert stage_of(tmp_path, "02-fruits")["memory"] == str(tmp_path / "01-colours" / "ftplus" / "memory")
    assert all(report.facts["strategies"]["ewc"]["penalty"] > 0 for report in reports(tmp_path))


def test_metrics_of_tasks_are_for_all_stages_and_those_of_protect_data_for_their_own(place, tmp_path):
    protects = {"protect": {"chat": str(place / "colours.jsonl")}, "metric": {"chat": "exact_match", "learn": "f1"}}
    first, second = read(sequence_yaml(place, tmp_path, stages=2, each={"fruits": protects})).stages
    assert first.config.metrics == {"fruits": "f1"}
    assert second.config.metrics == {"chat": "exact_match", "learn": "f1"}


def test_what_judges_protect_data_waits_until_there_is_some(place, tmp_path):
    judges = {"fail_if_retention_below": 0.5, "stop_when": ["learn-plateaus:9", "retention-falls-below 0.5"]}
    plan = read(sequence_yaml(place, tmp_path, stages=2, **judges))
    first, second = (stage.config for stage in plan.stages)
    assert (first.fail_if_retention_below, first.stop_when) == (None, ["learn-plateaus:9"])
    assert (second.fail_if_retention_below, second.stop_when) == tuple(judges.values())
    assert "stop_when does not judge colours, where there is nothing to protect yet." in plan.notes


def test_the_first_stage_alone_may_name_the_model(place, tmp_path):
    given = sequence_yaml(place, tmp_path, stages=2)
    model = given["stages"][0]["model_name_or_path"] = given.pop("model_name_or_path")
    assert [stage.config.model.model_name_or_path for stage in read(given).stages] == [model, model]


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        ({}, {"use_peft": True}, False),
        ({"use_peft": True}, {}, False),
        (LORA, LORA, True),
        (LORA_QV, LORA, True),
        (LORA, LORA_QV, False),
        ({**LORA, "lora_target_modules": ["q_proj", "v_proj", "k_proj"]}, LORA_QV, False),
        (LORA_QV, {**LORA, "lora_target_modules": ["q_proj", "v_proj", "k_proj"]}, True),
        ({**LORA, "lora_modules_to_save": ["lm_head"]}, LORA, False),
        (LORA, {**LORA, "lora_modules_to_save": ["lm_head"]}, True),
        ({"use_peft": True}, {"use_peft": True}, True),
        ({"use_peft": True}, LORA_QV, False),
    ],
)
def test_memory_goes_to_what_trains_all_that_was_trained(place, tmp_path, first, second, fits):
    each = {"colours": first, "fruits": second}
    plan = read(sequence_yaml(place, tmp_path, stages=2, plugins=["ewc"], each=each))
    assert plan.stages[1].remembers == (["ewc"] if fits else [])
    said = "what ewc remembers of colours is not used"
    assert [said in note for note in plan.notes] == ([] if fits else [True])


def test_a_stage_is_measured_on_the_split_that_it_learns(place, tmp_path):
    given = sequence_yaml(place, tmp_path, stages=2, measure={}, each={"colours": {"dataset_train_split": "train[:9]"}})
    plan = read(given)
    assert {name: spec.rpartition("/")[2] for name, spec in plan.measure.items()} == {
        "colours": "colours.jsonl:train[:9]",
        "fruits": "fruits.jsonl",
    }


@pytest.mark.parametrize(("first", "teacher"), [({}, "01-colours"), (LORA, "01-colours/merged")])
def test_the_model_that_an_earlier_stage_leaves_may_teach_a_later_one(place, tmp_path, first, teacher):
    """Two stages later, when it is no longer the starting model."""
    taught = {"plugins": [{"distill": {"teacher": str(tmp_path / teacher), "on": "learn"}}]}
    given = sequence_yaml(place, tmp_path, max_steps=2, save_strategy="no", each={"colours": first, "cities": taught})
    hf_ftplus.sequence(given)
    assert reports(tmp_path)[2].facts["strategies"]["distill"]["kl_learn"] > 0
    hf_ftplus.sequence(given)


def test_a_stage_may_learn_several_tasks_and_keeps_rows_of_all(place, tmp_path):
    given = sequence_yaml(place, tmp_path, stages=3, max_steps=2, save_strategy="no", keep=12, plugins=["replay"])
    several = given["stages"][1]
    several["tasks"] = [
        {"name": f"some {name}", "dataset": f"{place / name}.jsonl:train[:{count}]", "measure": False}
        for name, count in (("fruits", 4), ("cities", 20))
    ]  # of the fruits two are measured
    several["name"] = "both"
    del several["dataset_name"]
    given["measure"]["both"] = f"{place / 'fruits.jsonl'}:train[:2]"
    matrix = hf_ftplus.sequence(given)
    assert matrix.stages == ["colours", "both", "cities"]
    assert matrix.others == ["fruits"]
    assert None not in [value for row in matrix.loss for value in row]
    kept = [json.loads(line)["prompt"] for line in (tmp_path / "pools" / "both.jsonl").read_text().splitlines()]
    assert Counter(prompt.split()[0] for prompt in kept) == {"Fruit": 2, "City": 10}
    assert not matrix.notes or "are measured, too" not in " ".join(matrix.notes)


def test_each_task_of_a_stage_is_measured_in_all_stages_through_its_templates(place, tmp_path):
    held_out = tmp_path / "asked.jsonl"
    held_out.write_text("".join(json.dumps({"word": f"Nr {i}", "answer": f"red {i % 2}"}) + "\n" for i in range(9)))
    given = sequence_yaml(place, tmp_path / "out", stages=2, max_steps=2, save_strategy="no")
    del given["measure"]["fruits"]
    asked = {
        "name": "asked it?", "dataset": f"{held_out}:train[:3]", "measure": f"{held_out}:train[3:]",
        "templates": ["Which is {{ word }}?", "{{ word }}:"], "completion": "{{ answer }}", "metric": "exact_match",
    }  # fmt: skip
    given["stages"][1] = {"name": "both", "tasks": [asked, {"name": "cities", "dataset": str(place / "cities.jsonl")}]}
    with pytest.raises(UsageError, match=r"kinds \(asked it\?: messages \(prompt, completion\); cities: strings"):
        hf_ftplus.sequence(given)
    asked["chat"] = False
    matrix = hf_ftplus.sequence(given)
    assert (matrix.stages, matrix.others) == (["colours", "both"], ["asked it?", "cities"])
    assert matrix.metrics["asked it?"] == "exact_match"
    assert any("cities is measured on trained rows" in note for note in matrix.notes)
    first, second = ({task.name: task for task in report.tasks} for report in reports(tmp_path / "out"))
    for name, rows in (("asked it?", 6), ("cities", 12), ("both", 12)):
        assert first[name].rows == second[name].rows == rows
        assert first[name].after.loss.value == pytest.approx(second[name].before.loss.value, abs=1e-6), name
    together = (second["asked it?"].after.loss.value, second["cities"].after.loss.value)
    assert min(together) < second["both"].after.loss.value < max(together)
    hf_ftplus.sequence(given)
    held_out.write_text(held_out.read_text().replace("red", "sea"))
    shutil.rmtree(tmp_path / "out" / "02-both")
    with pytest.raises(
        StorageError, match=r"asked.jsonl, its templates or the seed changed since earlier stages measured it"
    ):
        hf_ftplus.sequence(given)


def test_what_is_kept_of_tasks_is_not_what_any_column_measures(place, tmp_path):
    given = sequence_yaml(place, tmp_path, stages=1, max_steps=1, save_strategy="no", measure_rows=6, keep=8)
    tasks = [{"name": name, "dataset": str(place / f"{name}.jsonl")} for name in ("fruits", "cities")]
    given["stages"].insert(0, {"name": "both", "tasks": tasks})
    given["metric"] = {"both": "choice"}
    with pytest.raises(DataError, match=r"Stage 'both': .*no 'choices'"):
        hf_ftplus.sequence(given, dry_run=True)
    del given["metric"]
    hf_ftplus.sequence(given)
    kept = lines_of(tmp_path / "pools" / "both.jsonl")
    files = sorted((tmp_path / "measured").iterdir())
    assert [file.stem for file in files] == ["01-fruits", "02-cities", "03-both"]
    assert [len(lines_of(file)) for file in files] == [6, 6, 6]
    assert len(kept) == 8
    assert not [row for file in files for row in lines_of(file) if row in kept]


def test_what_all_measure_is_made_again_and_is_still_the_same(place, tmp_path):
    data = tmp_path / "fruits.jsonl"
    shutil.copy(place / "fruits.jsonl", data)
    given = sequence_yaml(place, tmp_path / "out", stages=1, max_steps=1, save_strategy="no", keep=0)
    tasks = [{"name": "fruits", "dataset": str(data)}, {"name": "cities", "dataset": str(place / "cities.jsonl")}]
    given["stages"].append({"name": "both", "tasks": tasks})
    hf_ftplus.sequence(given)
    measured = tmp_path / "out" / "measured"
    before = [file.read_bytes() for file in sorted(measured.iterdir())]
    shutil.rmtree(measured)
    hf_ftplus.sequence(given)
    assert [file.read_bytes() for file in sorted(measured.iterdir())] == before
    (measured / "01-fruits.jsonl").write_text("{")
    shutil.rmtree(tmp_path / "out" / "02-both")
    with pytest.raises(StorageError, match=r"01-fruits.jsonl"):
        hf_ftplus.sequence(given)
    shutil.rmtree(measured)
    data.write_text(data.read_text().replace("Fruit", "Berry"))
    with pytest.raises(StorageError, match=r"Stage 'colours': .*01-fruits.jsonl.* changed since"):
        hf_ftplus.sequence(given)


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "colours"}, "'colours' has the name of a stage, or"),
        (
            {"template": "{{ prompt }}?", "completion": "{{ completion }}"},
            "differs in completion, template: ",
        ),
        ({"name": "chat"}, "'chat' stands under measure: and tasks:. Write measure: .*colours.jsonl in"),
        ({"name": "learn"}, "has the name of a stage, or of its data"),
        ({"measure": False}, r"measure: \{again: DATA\}, or measure: DATA to each"),
        ({"role": "protect"}, "learnt in 'both', too, and protects here"),
        ({"rolle": "learn"}, "rolle"),
    ],
)
def test_tasks_of_stages_that_cannot_be_measured_as_one_are_refused(place, tmp_path, change, says):
    given = sequence_yaml(place, tmp_path, stages=1)
    given["measure"]["chat"] = given["measure"]["colours"]
    cities, fruits = ({"name": name, "dataset": str(place / f"{name}.jsonl")} for name in ("cities", "fruits"))
    given["stages"] += [
        {"name": "both", "tasks": [cities, fruits]},
        {"name": "again", "tasks": [cities | change, fruits]},
    ]
    with pytest.raises(UsageError, match=f"Stage 'again': .*{says}"):
        read(given)
    given["stages"][2]["tasks"] = [{**cities, "share": 0.5, "role": "learn"}, fruits]
    assert [*read(given).gathered] == ["cities", "fruits", "both", "again"]


def test_an_adapter_is_merged_before_the_next_stage_makes_its_own(place, tmp_path):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "learning_rate": 2e-2}
    matrix = hf_ftplus.sequence(sequence_yaml(place, tmp_path, stages=2, plugins=["ewc"], save_strategy="no", **lora))
    assert stage_of(tmp_path, "02-fruits")["model_name_or_path"] == str(tmp_path / "01-colours" / "merged")
    first, second = reports(tmp_path)
    learnt, start = (
        first.tasks[0].after.loss.value,
        {task.name: task for task in second.tasks}["colours"].before.loss.value,
    )
    assert learnt < first.tasks[0].before.loss.value - 0.1
    assert start == pytest.approx(learnt, abs=1e-5)
    assert second.facts["strategies"]["ewc"]["penalty"] > 0  # its memory fits the fresh adapter
    assert (tmp_path / "02-fruits" / "adapter_config.json").is_file()
    assert not (tmp_path / "02-fruits" / "merged").exists()
    assert matrix.loss[2][1] < matrix.loss[0][1]


@pytest.mark.parametrize(
    ("rate", "dtype", "kept"),
    [(1e-5, "bfloat16", torch.float32), (5e-2, "bfloat16", torch.bfloat16), (5e-2, "float32", torch.float32)],
)
def test_what_rounding_would_take_away_is_handed_on_in_fp32(place, tmp_path, capsys, rate, dtype, kept):
    shutil.copytree(place / "model", tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    few = {"model_name_or_path": str(tmp_path / "model"), "dtype": dtype, "learning_rate": rate, **LORA}
    hf_ftplus.sequence(sequence_yaml(place, tmp_path, max_steps=2, save_strategy="no", keep=0, **few))
    said = capsys.readouterr().err
    assert ("colours: its merged model is kept in float32, as rounding to bfloat16" in said) == (rate == 1e-5)
    assert "fruits: its merged model" not in said  # its base is fp32 already
    folders = [tmp_path / "model", tmp_path / "01-colours" / "merged", tmp_path / "02-fruits" / "merged"]
    start, first, second = (load_file(folder / "model.safetensors") for folder in folders)
    name = "model.layers.1.mlp.down_proj.weight"
    assert first[name].dtype == second[name].dtype == kept
    for one, other in ((start, first), (first, second)):  # none was lost
        assert (one[name].float() != other[name].float()).float().mean() > 0.5


def test_a_finished_stage_leaves_no_model_in_memory(place, tmp_path, monkeypatch):
    alive = []
    make = run.sft_trainer

    def watched(*args):
        gc.collect()
        assert not [weight for weight in alive if weight() is not None]
        trainer = make(*args)
        alive.append(weakref.ref(next(trainer.model.parameters())))  # strategies hold weights, not models
        return trainer

    monkeypatch.setattr(run, "sft_trainer", watched)
    hf_ftplus.sequence(everything(place, tmp_path, save_strategy="no", max_steps=2))
    assert len(alive) == 3


# ---- pools -----------------------------------------------------------------------------------------------------------


def test_every_row_is_kept_with_the_same_chance():
    counts = np.zeros(40)
    for seed in range(2000):
        counts[reservoir(range(40), 10, seed)] += 1
    assert counts.sum() == 20_000
    # rows of one draw exclude each other: the variance is (1 - 10/40) of independent draws, so the test is the stricter
    assert chisquare(counts).pvalue > 0.01
    assert counts.std() > 5  # and it is a draw


def test_a_reservoir_is_bounded_ordered_and_depends_on_its_seed():
    assert reservoir(iter("abc"), 5, 0) == ["a", "b", "c"]
    assert reservoir(iter("abc"), 0, 0) == []
    drawn = reservoir(iter(range(1000)), 20, 1)
    assert drawn == sorted(set(drawn))
    assert drawn == reservoir(range(1000), 20, 1)
    assert drawn != reservoir(range(1000), 20, 2)


def test_what_is_kept_of_several_tasks_is_as_many_rows_of_each():
    assert divided(12, {"a": 100, "b": 7, "c": 3}) == {"c": 3, "b": 4, "a": 5}
    assert divided(2, {"a": 9, "b": 9, "c": 9}) == {"a": 0, "b": 1, "c": 1}
    assert divided(64, {"a": 5, "b": 6}) == {"a": 5, "b": 6}


def test_a_pool_holds_rows_of_its_task_for_its_owner_alone(whole, place):
    out, _ = whole
    files = sorted((out / "pools").iterdir())
    assert [file.name for file in files] == ["colours.jsonl", "fruits.jsonl"]  # nobody comes after the last stage
    for file in files:
        kept = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [json.loads(line) for line in (place / file.name).read_text().splitlines()]
        assert len(kept) == 8
        assert all(row in rows for row in kept)
        assert file.stat().st_mode & 0o077 == 0


def test_rows_are_kept_that_are_not_measured_where_enough_remain_and_else_the_matrix_says_so(place, tmp_path, caplog):
    """Of 24 rows, every second one is measured."""
    given = sequence_yaml(
        place, tmp_path / "few", stages=2, max_steps=1, save_strategy="no", keep=12, plugins=["replay"]
    )
    matrix = hf_ftplus.sequence(given)
    every = [json.loads(line) for line in (place / "colours.jsonl").read_text().splitlines()]
    kept = [json.loads(line) for line in (tmp_path / "few" / "pools" / "colours.jsonl").read_text().splitlines()]
    assert kept == every[::2]
    assert "protect, too, word for word" not in caplog.text
    assert not any("measured, too" in note for note in matrix.notes)
    given |= {"keep": 13, "output_dir": str(tmp_path / "many")}
    note = r"\d of 13 rows kept of colours are measured, too, .* its BWT looks better than it is"
    for _ in range(2):  # also of what was finished before
        assert len([it for it in hf_ftplus.sequence(given).notes if re.match(note, it)]) == 1
    assert "protect, too, word for word" in caplog.text
    assert re.search(note, (tmp_path / "many" / "sequence.json").read_text())


def test_of_a_stream_the_rows_that_were_trained_on_are_kept(place, tmp_path):
    """Two steps of eight; the next stage has more steps, and what was taken is not a matter of its settings."""
    (tmp_path / "rows").mkdir()
    rows = (place / "colours.jsonl").read_text().splitlines()
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(rows) + "\n")
    streamed = {"dataset_name": str(tmp_path / "rows"), "dataset_streaming": True, "max_steps": 99}
    stops = {"stop_when": "learn-plateaus:1:100", "eval_strategy": "steps", "eval_steps": 1}
    given = sequence_yaml(
        place, tmp_path / "out", stages=2, keep=20, max_steps=1, save_strategy="no", each={"colours": streamed | stops}
    )
    hf_ftplus.sequence(given)
    assert (tmp_path / "out" / "pools" / "colours.jsonl").read_text().splitlines() == rows[:16]
    (tmp_path / "rows" / ".hidden").touch()
    (tmp_path / "rows" / "gone").symlink_to(tmp_path / "nowhere")
    hf_ftplus.sequence(given)
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(reversed(rows)) + "\n")
    with pytest.raises(StorageError, match=r"rows changed since .*01-colours was made of it"):
        hf_ftplus.sequence(given)


# ---- interrupted and gone on -----------------------------------------------------------------------------------------


def same_outcome(one, other):
    for stage in ("01-colours", "02-fruits", "03-cities"):
        assert same_file(one / stage / "model.safetensors", other / stage / "model.safetensors"), stage
        for name in ("ewc", "si"):
            memory = f"{stage}/ftplus/memory/{name}.safetensors"
            assert same_file(one / memory, other / memory), memory
    for file in ("sequence.json", "sequence.csv", "pools/colours.jsonl", "pools/fruits.jsonl"):
        assert (one / file).read_text() == (other / file).read_text(), file


def test_interrupted_and_gone_on_is_uninterrupted_bit_for_bit(place, whole, tmp_path, monkeypatch, capsys):
    given = everything(place, tmp_path)
    for stop in ("01-colours:1", "02-fruits:3", "02-fruits:6"):
        monkeypatch.setenv("STOP_AT", stop)
        with pytest.raises(KeyboardInterrupt):
            hf_ftplus.sequence(given)
        assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.delenv("STOP_AT")
    assert hf_ftplus.sequence(given) == whole[1]
    said = capsys.readouterr().err
    assert "colours: finished before" in said
    assert "fruits: " + str(tmp_path / "02-fruits") + ", on from checkpoint-" in said
    same_outcome(tmp_path, whole[0])


def test_whatever_a_kill_left_half_made_is_made_again(place, whole, tmp_path, capsys):
    out = tmp_path / "out"
    given = everything(place, out)
    hf_ftplus.sequence(given)
    (out / "03-cities" / "ftplus" / "report.json").unlink()
    state = out / "03-cities" / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:100])  # killed before it was whole
    (out / "pools" / "fruits.jsonl").unlink()
    hf_ftplus.sequence(given)
    assert "on from checkpoint-4" in capsys.readouterr().err
    same_outcome(out, whole[0])


@pytest.mark.parametrize("taken", ["out", "out/02-fruits"])
def test_what_another_process_writes_to_is_not_cleared(place, tmp_path, taken):
    """The same command twice, or a stage whose sequence was killed and that trains on by itself."""
    given = sequence_yaml(place, tmp_path / "out", stages=2, save_strategy="no", max_steps=2)
    hf_ftplus.sequence(given)
    (tmp_path / "out" / "02-fruits" / "ftplus" / "report.json").unlink()  # as if it were being measured
    with held(tmp_path / taken), pytest.raises(StorageError, match=r"in use by another run \(pid 1 on elsewhere\)"):
        hf_ftplus.sequence(given)
    assert (tmp_path / "out" / "02-fruits" / "model.safetensors").is_file()
    hf_ftplus.sequence(given)


def test_without_a_checkpoint_a_stage_starts_anew(place, tmp_path, capsys):
    given = sequence_yaml(place, tmp_path, stages=2, save_strategy="no", max_steps=2)
    hf_ftplus.sequence(given)
    before = load_file(tmp_path / "02-fruits" / "model.safetensors")
    (tmp_path / "02-fruits" / "ftplus" / "report.json").unlink()
    hf_ftplus.sequence(given)
    assert "on from" not in capsys.readouterr().err
    after = load_file(tmp_path / "02-fruits" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_finished_is_not_run_again_and_not_with_other_settings(place, whole):
    out, matrix = whole
    files = {file: file.stat().st_mtime_ns for file in out.glob("*/model.safetensors")}
    assert hf_ftplus.sequence(everything(place, out)) == matrix
    assert {file: file.stat().st_mtime_ns for file in files} == files
    with pytest.raises(StorageError, match=r"01-colours.*learning_rate was 0.005, is 0.001.*new output_dir"):
        hf_ftplus.sequence(everything(place, out, learning_rate=1e-3))
    with pytest.raises(StorageError, match=r"Stage 'fruits': .*02-fruits.*max_steps was 6, is 9"):
        hf_ftplus.sequence(everything(place, out, each={"fruits": {"max_steps": 9}}))
    assert {file: file.stat().st_mtime_ns for file in files} == files


def test_a_gate_that_closed_is_not_passed_by_asking_again(place, tmp_path):
    given = sequence_yaml(
        place, tmp_path, stages=2, max_steps=2, save_strategy="no", each={"fruits": {"fail_if_retention_below": 1e9}}
    )
    for _ in range(2):
        with pytest.raises(RetentionError, match="Stage 'fruits': colours: retention"):
            hf_ftplus.sequence(given)
    assert Matrix.load(tmp_path / "sequence.json").loss[2][1] is not None


def test_a_stage_can_be_repeated_by_hand(place, whole, tmp_path):
    from hf_ftplus.cli import main

    file = whole[0] / "02-fruits" / "ftplus" / "stage.yaml"
    assert main(["sft", "--config", str(file), "--output_dir", str(tmp_path / "again")]) == 0
    assert same_file(tmp_path / "again" / "model.safetensors", whole[0] / "02-fruits" / "model.safetensors")


def test_signals_are_as_they_were(place, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setenv("STOP_AT", "01-colours:1")
    with pytest.raises(KeyboardInterrupt):
        hf_ftplus.sequence(everything(place, tmp_path, stages=1))
    assert signal.getsignal(signal.SIGINT) is before
    assert not os.environ.get("RANK")


def test_other_tasks_are_measured_beside_and_count_in_no_metric(place, tmp_path):
    chat = place / "chat.jsonl"
    chat.write_text('{"prompt": "Is the harbour open?", "completion": "Yes."}\n' * 3)
    asked = place / "asked.jsonl"
    asked.write_text('{"prompt": "Is the harbour open?"}\n' * 3)
    given = sequence_yaml(place, tmp_path, stages=2, max_steps=1, save_strategy="no")
    given["measure"] |= {"chat": str(chat), "asked": str(asked)}
    plan = read(given)
    assert plan.names == ["colours", "fruits"]
    matrix = hf_ftplus.sequence(given)
    assert matrix.others == ["chat"]
    assert np.array(matrix.other_loss).shape == (3, 1)
    assert any("asked has questions without completions" in note for note in matrix.notes)
    assert len(matrix.score[0]) == 2
