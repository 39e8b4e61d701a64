"""Claims about a sequence that is asked again: what changed or went away since is noticed before anything is touched."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import transformers
import yaml
from commands import same_file
from sequences import make_sequence_place, sequence_yaml

import hf_ftplus
from hf_ftplus import contents
from hf_ftplus.errors import StorageError
from hf_ftplus.report.matrix import Matrix
from hf_ftplus.stages import runner
from hf_ftplus.stages.plan import read
from hf_ftplus.stages.reservoir import rows_taken

LORA = {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_sequence_place(tmp_path_factory.mktemp("sequence"))


def given(place, out, **changes):
    shared = {"stages": 2, "max_steps": 2, "save_strategy": "no", "plugins": [{"replay": {"share": 0.25}}]}
    return sequence_yaml(place, out, **{**shared, **changes})


@pytest.fixture
def done(place, tmp_path):
    """Two finished stages."""
    asked = given(place, tmp_path)
    hf_ftplus.sequence(asked)
    return asked, tmp_path


def test_what_changed_is_said_by_its_place_and_the_matrix_stays(done):
    asked, out = done
    before = Matrix.load(out / "sequence.json")
    plugins = {"plugins": [{"replay": {"share": 0.5}}]}
    with pytest.raises(StorageError, match=r"Stage 'fruits': .*plugins\[0\]\.replay\.share was 0\.25, is 0\.5"):
        hf_ftplus.sequence({**asked, "stages": [asked["stages"][0], {**asked["stages"][1], **plugins}]})
    assert Matrix.load(out / "sequence.json") == before
    with pytest.raises(StorageError, match=r"pools.colours\.jsonl holds 8 rows, but with keep: 12 it would be 12"):
        hf_ftplus.sequence({**asked, "keep": 12})
    hf_ftplus.sequence(asked)


def test_a_setting_that_a_later_version_has_changes_nothing_of_what_was_made_before_it(done):
    asked, out = done
    for file in out.glob("0*/**/*.yaml"):
        made = yaml.safe_load(file.read_text())
        if "plugins" in made:
            del made["plugins"][0]["replay"]["unit"]
            file.write_text(yaml.safe_dump(made))
    hf_ftplus.sequence(asked)
    other = {"plugins": [{"replay": {"share": 0.25, "unit": "tokens"}}]}
    with pytest.raises(StorageError, match=r"plugins\[0\]\.replay\.unit was not there, is 'tokens'"):
        hf_ftplus.sequence({**asked, "stages": [{**stage, **other} for stage in asked["stages"]]})


def test_several_gpus_are_the_business_of_what_each_stage_launches(place, tmp_path, monkeypatch):
    """The process that runs the stages trains none where there are several; only their count is made up here."""
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 4))
    plan = read(given(place, tmp_path))
    runner.check(plan)
    facts = {"steps": 3, "processes": 4}
    assert (
        rows_taken(plan.stages[0].config, facts) == 3 * 4 * plan.stages[0].config.training.per_device_train_batch_size
    )


def test_rows_that_changed_since_are_not_mixed_with_those_of_before(done, place):
    asked, out = done
    file = place / "fruits.jsonl"
    before = file.read_text()
    file.touch()
    pool = out / "pools" / "colours.jsonl"
    kept = pool.read_text()
    pool.unlink()  # is drawn again
    hf_ftplus.sequence(asked)
    pool.write_text(kept.replace("amber", "azure"))
    with pytest.raises(
        StorageError, match=r"Stage 'fruits': .*colours\.jsonl changed since .*02-fruits was made of it"
    ):
        hf_ftplus.sequence(asked)
    pool.write_text(kept)
    file.write_text(before.replace("pear", "kiwi"))
    try:
        with pytest.raises(
            StorageError, match=r"fruits\.jsonl changed since .*01-colours .*remove .*01-colours and what"
        ):
            hf_ftplus.sequence(asked)  # measured there
        shutil.rmtree(out)
        hf_ftplus.sequence(asked)
    finally:
        file.write_text(before)


@pytest.mark.parametrize("named", ["{}/rows.jsonl", "{}/*.jsonl"])
def test_files_of_a_mixture_are_known_too(place, tmp_path, named):
    file = tmp_path / "rows.jsonl"
    shutil.copy(place / "colours.jsonl", file)
    mixture = {"dataset_name": None, "datasets": [{"path": "json", "data_files": {"train": [named.format(tmp_path)]}}]}
    asked = given(place, tmp_path / "out", stages=1, max_steps=1, plugins=[], each={"colours": mixture})
    hf_ftplus.sequence(asked)
    file.write_text(file.read_text().replace("amber", "azure"))
    with pytest.raises(StorageError, match=r"\.jsonl changed since"):
        hf_ftplus.sequence(asked)


def test_rows_of_a_later_stage_that_are_edited_while_an_earlier_one_trains(place, tmp_path, monkeypatch):
    """All stages are checked before the first trains; what is edited after that has not been."""
    for name in ("colours", "fruits"):
        shutil.copy(place / f"{name}.jsonl", tmp_path)
    later, trained = tmp_path / "fruits.jsonl", runner.train

    def edited(stage, *rest):
        if stage.number == 1:
            later.write_text(later.read_text().replace("pear", "kiwi"))
        trained(stage, *rest)

    data = {name: {"dataset_name": str(tmp_path / f"{name}.jsonl")} for name in ("colours", "fruits")}
    asked = given(place, tmp_path / "out", max_steps=1, plugins=[], each=data)
    monkeypatch.setattr(runner, "train", edited)
    with pytest.raises(StorageError, match=r"Stage 'fruits': .*fruits\.jsonl changed since all stages were checked"):
        hf_ftplus.sequence(asked)
    hf_ftplus.sequence(asked)


def test_a_folder_of_rows_that_leads_back_into_itself_is_read_once(tmp_path):
    (tmp_path / "rows.jsonl").write_text("one")
    before = contents.of_path(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tmp_path)
    assert contents.of_path(tmp_path) == before
    (tmp_path / "rows.jsonl").write_text("other")
    assert contents.of_path(tmp_path) != before


def test_a_stage_is_not_put_under_those_that_were_trained_from_another(done):
    asked, out = done
    shutil.rmtree(out / "01-colours")
    with pytest.raises(StorageError, match="02-fruits was trained from an earlier 'colours', which has no report"):
        hf_ftplus.sequence(asked)
    assert not (out / "01-colours").exists()
    shutil.rmtree(out / "02-fruits")
    asked["stages"][0]["learning_rate"] = 1e-5  # nothing is left of what it was
    hf_ftplus.sequence(asked)


def test_what_was_made_of_a_stage_goes_with_it(place, tmp_path, capsys):
    """A pool of other rows and a merged model of another adapter would be handed on."""
    asked = given(place, tmp_path, **LORA)
    hf_ftplus.sequence(asked)
    shutil.rmtree(tmp_path / "02-fruits")
    first = asked["stages"][0] | {"learning_rate": 0.1, "dataset_name": str(place / "cities.jsonl")}
    (tmp_path / "01-colours" / "ftplus" / "report.json").unlink()
    merged = tmp_path / "01-colours" / "merged" / "model.safetensors"
    kept = tmp_path / "old.safetensors"
    shutil.copy(merged, kept)
    (tmp_path / "01-colours" / ".merged-killed").mkdir()
    hf_ftplus.sequence({**asked, "stages": [first, asked["stages"][1]]})
    assert not same_file(kept, merged)
    rows = [json.loads(line)["prompt"] for line in (tmp_path / "pools" / "colours.jsonl").read_text().splitlines()]
    assert {row.split()[0] for row in rows} == {"City"}
    assert not (tmp_path / "01-colours" / ".merged-killed").exists()
    assert "Checkpoints" not in capsys.readouterr().err


def test_a_checkpoint_that_says_nothing_is_passed_over_and_what_checkpoints_take_is_said(place, tmp_path, capsys):
    asked = given(place, tmp_path, save_strategy="steps", save_steps=1)
    matrix = hf_ftplus.sequence(asked)
    folders = [f"{tmp_path / name}/checkpoint-*" for name in ("01-colours", "02-fruits")]
    assert f"no stage needs them any more: rm -r {' '.join(folders)}" in capsys.readouterr().err
    report, model = tmp_path / "02-fruits" / "ftplus" / "report.json", tmp_path / "02-fruits" / "model.safetensors"
    model.rename(tmp_path / "before.safetensors")
    report.unlink()  # killed before either was written
    assert hf_ftplus.sequence(asked) == matrix
    assert "02-fruits, on from checkpoint-2" in capsys.readouterr().err
    assert same_file(model, tmp_path / "before.safetensors")
    report.unlink()
    for state in tmp_path.glob("02-fruits/checkpoint-*/trainer_state.json"):
        state.write_text("null")
    assert hf_ftplus.sequence(asked) == matrix
    assert "on from" not in capsys.readouterr().err


def interrupted(*_):
    raise KeyboardInterrupt  # no signal: a suite in the background is deaf to SIGINT


def test_what_taught_a_finished_stage_may_go(place, tmp_path, monkeypatch):
    asked = given(place, tmp_path, max_steps=1, save_strategy="steps", save_steps=1, plugins=[])
    monkeypatch.setattr("hf_ftplus.stages.runner.hand_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hf_ftplus.sequence(asked)
    monkeypatch.undo()
    teacher = tmp_path / "01-colours" / "checkpoint-1"
    asked["stages"][1]["plugins"] = [{"distill": {"teacher": str(teacher), "on": "learn"}}]
    matrix = hf_ftplus.sequence(asked)
    shutil.rmtree(teacher)
    assert hf_ftplus.sequence(asked) == matrix


def test_no_token_is_kept_where_a_push_would_take_it_along(place, tmp_path):
    asked = given(place, tmp_path, stages=1, plugins=[], hub_token="hf_secret")
    hf_ftplus.sequence(asked)
    assert "hf_secret" not in (tmp_path / "01-colours" / "ftplus" / "stage.yaml").read_text()
    hf_ftplus.sequence({**asked, "hub_token": "hf_another"})  # no other settings


def test_a_token_reaches_processes_of_their_own_all_the_same(place, tmp_path, monkeypatch):
    found = []

    def start(asked, words, strategies, precision):
        found.extend([*words, os.environ.get("HF_TOKEN")])
        raise KeyboardInterrupt

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("hf_ftplus.cli.launch.start", start)
    with pytest.raises(KeyboardInterrupt):
        hf_ftplus.sequence(given(place, tmp_path, stages=1, plugins=[], hub_token="hf_secret", num_processes=2))
    assert found == ["sft", "--config", str(tmp_path / "01-colours" / "ftplus" / "stage.yaml"), "hf_secret"]
    assert "HF_TOKEN" not in os.environ


def test_a_stage_that_stopped_early_ends_the_same_after_a_kill(place, tmp_path):
    stops = {"stop_when": "learn-plateaus:1:100", "eval_strategy": "steps", "eval_steps": 1}
    asked = given(place, tmp_path, max_steps=9, save_strategy="steps", save_steps=1, each={"fruits": stops})
    matrix = hf_ftplus.sequence(asked)
    model, report = (tmp_path / "02-fruits" / name for name in ("model.safetensors", "ftplus/report.json"))
    assert json.loads(report.read_text())["facts"]["steps"] == 2
    shutil.copy(model, tmp_path / "before.safetensors")
    report.unlink()
    assert hf_ftplus.sequence(asked) == matrix
    assert same_file(model, tmp_path / "before.safetensors")


def test_a_folder_of_the_users_home_is_found_again(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = given(place, "~/out", stages=1, plugins=[])
    hf_ftplus.sequence(asked)
    hf_ftplus.sequence(asked)
    assert "colours: finished before" in capsys.readouterr().err
    assert (tmp_path / "out" / "01-colours" / "model.safetensors").is_file()
