"""Which checkpoint a run goes on from: the newest that is whole and of this run, whatever happened to the others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from tiny import tiny_llama
from training import LEARN, PROTECT, same, trainer, weights_of

from hf_ftplus import EWC, commit, disk
from hf_ftplus.errors import IncompatibleError, StorageError
from hf_ftplus.origin import SAID, refuse_other, rows

SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run of six steps with three checkpoints, and the weights it ended with."""
    folder = tmp_path_factory.mktemp("ended")
    it = trainer(folder, "ewc", **SAVING)
    it.train()
    return folder, weights_of(it)


@pytest.fixture
def run(ended, tmp_path):
    shutil.copytree(ended[0], tmp_path / "run")
    return tmp_path / "run"


def commit_again(checkpoint):
    """The sums of its files as they are now, by somebody who means it."""
    file = checkpoint / commit.COMMIT
    found = json.loads(file.read_text())
    for name, entry in found["files"].items():
        entry |= {"bytes": (checkpoint / name).stat().st_size, "sha256": disk.sha256(checkpoint / name)}
    said = {key: value for key, value in found.items() if key not in ("format", "sha256")}
    file.write_text(json.dumps({**found, "sha256": commit._sum(said)}))


def unfinished(checkpoint):
    """As a kill leaves it that comes before the commit."""
    (checkpoint / commit.COMMIT).rename(checkpoint / commit.WRITING)


def foreign(checkpoint):
    """As another program writes it."""
    shutil.rmtree(checkpoint / "ftplus")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


# ---- what is whole ---------------------------------------------------------------------------------------------------


def test_a_commit_lists_every_file_and_what_run_it_is_of(run):
    found = json.loads((run / "checkpoint-2" / commit.COMMIT).read_text())
    there = {path.relative_to(run / "checkpoint-2").as_posix() for path in (run / "checkpoint-2").rglob("*.*")}
    assert set(found["files"]) == there - {commit.COMMIT}
    assert {"optimizer.pt", "rng_state.pth", "trainer_state.json", "ftplus/ewc.safetensors"} <= set(found["files"])
    assert found["step"] == 2
    assert found["resumable"] is True
    assert found["run"]["batch"] == 4


@pytest.mark.fault("B12")
def test_a_sum_is_of_what_was_written_and_not_of_what_a_migration_makes_of_it(run, monkeypatch):
    monkeypatch.setattr(commit, "FORMAT", 2)
    monkeypatch.setattr(commit, "MIGRATIONS", {1: lambda found: {**found, "more": True}})
    assert commit.fault(run / "checkpoint-6") == ""
    assert commit.read_commit(run / "checkpoint-6")["more"]


@pytest.mark.fault("B1")
def test_a_commit_that_says_another_thing_than_was_written_is_damaged(run):
    file = run / "checkpoint-6" / commit.COMMIT
    written = file.read_text()
    for said, other in (
        ('"batch": 4', '"batch": 5'),
        ('"rows": {', '"rows": [], "rose": {'),
        ('"run"', '"ran"'),
        ('\n "sha256"', '\n "sha"'),
    ):
        assert said in written
        file.write_text(written.replace(said, other, 1))
        assert "not what a commit holds" in commit.fault(run / "checkpoint-6")
        assert commit.newest(run, aside=False) == run / "checkpoint-4"


@pytest.mark.fault("B1", "B10")
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "ftplus/ewc.safetensors",
        "ftplus/manifest.json",
    ],
)
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_file_that_is_not_what_was_written_is_seen(run, name, harm):
    file = run / "checkpoint-6" / name
    if harm == "flip":
        flip(file)
    elif harm == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    assert name in commit.fault(run / "checkpoint-6")
    assert commit.newest(run) == run / "checkpoint-4"
    assert (run / "_damaged-checkpoint-6").is_dir()
    assert not commit.fault(run / "checkpoint-4")


@pytest.mark.fault("A1")
def test_what_was_never_finished_is_set_aside_and_one_of_it_kept(run, caplog):
    for step in (4, 6):
        unfinished(run / f"checkpoint-{step}")
    assert commit.newest(run) == run / "checkpoint-2"
    assert sorted(path.name for path in run.glob("_*")) == ["_incomplete-checkpoint-4"]
    assert "checkpoint-6 is not whole: it was being written when the run ended" in caplog.text


@pytest.mark.fault("A1")
def test_what_is_killed_before_its_mark_or_while_it_is_deleted_is_not_taken_for_another_programs(run, monkeypatch):
    """It would stay for ever."""
    (run / "_incomplete-checkpoint-3").mkdir()  # killed before the mark was there
    unfinished(run / "checkpoint-4")
    unfinished(run / "checkpoint-6")
    rmtree = shutil.rmtree

    def killed(folder, **_):
        (folder / commit.WRITING).unlink(missing_ok=True)  # deleted first, as it may be
        if folder.is_dir():
            raise KeyboardInterrupt

    monkeypatch.setattr(commit.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        commit.newest(run)
    monkeypatch.setattr(commit.shutil, "rmtree", rmtree)
    assert commit.newest(run) == run / "checkpoint-2"
    assert [path.name for path in run.glob("_*")] == ["_incomplete-checkpoint-4"]


@pytest.mark.fault("A1")
def test_what_another_program_left_unfinished_is_set_aside_and_all_of_it_stays(run):
    """Its own reader may make something of it; ours deletes only what we began."""
    theirs = shutil.copytree(run / "checkpoint-6", run / "theirs")
    foreign(theirs)
    (theirs / "trainer_state.json").unlink()
    for _ in range(2):
        for step in (2, 4, 6):
            shutil.rmtree(run / f"checkpoint-{step}", ignore_errors=True)
            shutil.copytree(theirs, run / f"checkpoint-{step}")
        assert commit.newest(run) is None
        assert len(list(run.glob("_incomplete-checkpoint-*/model.safetensors"))) == 3
    assert len(list(run.glob("_foreign-*/model.safetensors"))) == 3


def test_what_deepspeed_wrote_without_gathering_it_has_weights(run):
    foreign(run / "checkpoint-6")
    (run / "checkpoint-6" / "model.safetensors").unlink()
    assert commit.fault(run / "checkpoint-6") == "it holds no weights"
    (run / "checkpoint-6" / "global_step6").mkdir()
    assert not commit.fault(run / "checkpoint-6")


def test_a_push_to_the_hub_leaves_out_what_is_set_aside_and_who_has_the_folder(run):
    """transformers leaves out what begins so; what begins with a dot it takes along."""
    unfinished(run / "checkpoint-4")
    flip(run / "checkpoint-6" / "model.safetensors")
    with disk.locked(run):
        assert commit.newest(run) == run / "checkpoint-2"
        found = [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()]
        pushed = filter_repo_objects(found, ignore_patterns=["_*", "checkpoint-*"])
        assert {Path(name).parts[0] for name in pushed} == {"README.md", "ftplus"}
        assert {Path(name).parts[0] for name in found} >= {
            disk.LOCK,
            "_damaged-checkpoint-6",
            "_incomplete-checkpoint-4",
        }


def test_what_cannot_be_set_aside_is_said_to_stay(run, caplog, monkeypatch):
    unfinished(run / "checkpoint-6")

    def refused(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(commit.os, "replace", refused)
    assert commit.newest(run) == run / "checkpoint-4"
    assert "It stays, for it cannot be renamed (Permission denied)." in caplog.text


def test_whoever_only_looks_moves_nothing(run):
    flip(run / "checkpoint-6" / "model.safetensors")
    before = sorted(run.iterdir())
    assert commit.newest(run, aside=False) == run / "checkpoint-4"
    assert sorted(run.iterdir()) == before


def test_the_first_checkpoint_may_be_broken_too(run):
    for step in (2, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    (run / "checkpoint-6" / commit.COMMIT).unlink()
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    assert commit.newest(run) is None


def test_checkpoints_without_commits_are_whole_when_what_is_written_last_is_there(run):
    for step in (2, 4, 6):
        (run / f"checkpoint-{step}" / commit.COMMIT).unlink()
    assert commit.newest(run) == run / "checkpoint-6"
    os.truncate(run / "checkpoint-6" / "model.safetensors", 1000)
    assert commit.newest(run) == run / "checkpoint-4"
    (run / "checkpoint-4" / "trainer_state.json").write_text("{")
    assert commit.newest(run) == run / "checkpoint-2"


@pytest.mark.fault("B12")
def test_a_commit_of_the_future_is_not_taken_for_damage(run):
    file = run / "checkpoint-6" / commit.COMMIT
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(IncompatibleError, match=r"format 99.*Upgrade hf-ftplus"):
        commit.newest(run)
    assert (run / "checkpoint-6").is_dir()


@pytest.mark.fault("A10")
def test_however_often_it_is_written_again_another_programs_checkpoint_stays(tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_text("theirs")
    for _ in range(3):
        with commit.writing(checkpoint):
            (checkpoint / "model.safetensors").write_text("ours")
            commit.commit(checkpoint, 2, True, {})
    theirs = [path for path in tmp_path.glob("_*/model.safetensors") if path.read_text() == "theirs"]
    assert len(theirs) == 1
    assert (checkpoint / "model.safetensors").read_text() == "ours"


@pytest.mark.fault("A4")
def test_what_fails_after_the_commit_does_not_cost_the_checkpoint(run):
    checkpoint = run / "checkpoint-8"

    def copied_to_the_hub():
        with commit.writing(checkpoint):
            (checkpoint / "model.safetensors").write_bytes(b"weights")
            commit.commit(checkpoint, 8, True, {})
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"checkpoint-8 is whole, but what followed failed: .*No space left"):
        copied_to_the_hub()
    assert commit.newest(run) == checkpoint


@pytest.mark.fault("A4")
def test_one_that_cannot_even_be_begun_costs_nothing_that_was_there(run, monkeypatch):
    before = commit.read_commit(run / "checkpoint-6")

    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(StorageError, match="checkpoint-6 could not be written"), commit.writing(run / "checkpoint-6"):
        pass
    monkeypatch.undo()
    assert commit.read_commit(run / "checkpoint-6") == before
    assert not commit.fault(run / "checkpoint-6")


@pytest.mark.fault("F7")
def test_a_commit_that_names_files_elsewhere_is_damaged(run):
    file = run / "checkpoint-6" / commit.COMMIT
    found = json.loads(file.read_text())
    for name in ("../checkpoint-4/model.safetensors", "/etc/passwd"):
        file.write_text(json.dumps({**found, "files": {name: found["files"]["model.safetensors"]}}))
        assert "damaged" in commit.fault(run / "checkpoint-6")


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("A1")
def test_resuming_takes_the_newest_whole_checkpoint_and_ends_with_the_same_bits(run, ended, caplog):
    flip(run / "checkpoint-6" / "model.safetensors")
    unfinished(run / "checkpoint-4")
    it = trainer(run, "ewc", **SAVING)
    it.train(resume_from_checkpoint=True)
    assert it.ftplus.resumed_from == str(run / "checkpoint-2")
    assert same(weights_of(it), ended[1])
    assert "model.safetensors is not what was written there (sha256 differs)" in caplog.text


@pytest.mark.fault("B1")
def test_a_checkpoint_asked_for_by_name_is_that_one_or_an_error(run):
    flip(run / "checkpoint-6" / "optimizer.pt")
    with pytest.raises(StorageError, match=r"checkpoint-6 cannot be resumed: optimizer\.pt is not what was written"):
        trainer(run, "ewc", **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert (run / "checkpoint-6").is_dir()


@pytest.mark.fault("B10")
def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path):
    trainer(tmp_path, "ewc", save_only_model=True, **SAVING).train()
    with pytest.raises(IncompatibleError, match=r"lacks the optimizer and the learning-rate schedule and the random"):
        trainer(tmp_path, "ewc", **SAVING).train(resume_from_checkpoint=True)


@pytest.mark.fault("B4", "B9")
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 6}, r"another seed \(\[5, None\] there, \[6, None\] here\)"),
        ({"per_device_train_batch_size": 2}, r"another number of rows per step \(4 there, 2 here\)"),
        ({"learn": LEARN[:-1]}, r"another number or order of them \(24 there, 23 here\)"),
        ({"learn": LEARN[1:] + LEARN[:1]}, "other training rows, or another number or order of them"),
        ({"template": "{{ messages }}"}, "another tokenizer or chat template"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("strategies", [(), ("ewc",)], ids=["plain", "EWC"])
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(ended, tmp_path, changed, says, strategies):
    run = ended[0]
    if not strategies:
        run = tmp_path
        trainer(run, max_steps=2, **SAVING).train()
    it = trainer(tmp_path / "other", *strategies, **{**SAVING, **changed})
    start = weights_of(it)
    with pytest.raises(IncompatibleError, match=says):
        it.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert same(weights_of(it), start)


@pytest.mark.fault("B9")
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"optim": "sgd"}, r"another optim \(adamw_torch there, sgd here\)"),
        ({"lr_scheduler_type": "cosine"}, r"another lr_scheduler_type \(linear there, cosine here\)"),
        ({"train_sampling_strategy": "sequential"}, r"another train_sampling_strategy \(random there, sequential here\)"),
        ({"protect": PROTECT[1:]}, r"other rows to protect \(protect\)"),
        ({"protect": {"other": PROTECT}}, r"other rows to protect \(protect there, other here\)"),
        ({"strategies": [EWC(strength=1e-9)]}, r"other settings: ewc.strength None there, 1e-09 here. Put them back"),
    ],
)  # fmt: skip
def test_what_the_trainer_would_take_in_silence_is_refused_by_name(ended, tmp_path, changed, says):
    it = trainer(tmp_path, *changed.pop("strategies", ["ewc"]), **{**SAVING, **changed})
    start = weights_of(it)
    with pytest.raises(IncompatibleError, match=says):
        it.train(resume_from_checkpoint=str(ended[0] / "checkpoint-2"))
    assert same(weights_of(it), start)


@pytest.mark.fault("B9")
def test_a_learning_rate_that_the_checkpoint_overrules_is_said_and_changes_nothing(ended, tmp_path, caplog):
    other = {"learning_rate": 1.0, "weight_decay": 0.5, "max_grad_norm": 1e9, "max_steps": 7, "ignore_data_skip": True}
    it = trainer(tmp_path, "ewc", **{**SAVING, **other})
    it.train(resume_from_checkpoint=str(ended[0] / "checkpoint-4"))
    assert (
        "another learning_rate (0.003 there, 1.0 here); weight_decay (0.0 there, 0.5 here): the checkpoint's go on"
        in caplog.text
    )
    assert (
        "another max_grad_norm (1.0 there, 1000000000.0 here); ignore_data_skip (False there, True here); "
        in caplog.text
    )
    assert "max_steps (6 there, 7 here): what is given now holds" in caplog.text
    assert it.state.log_history[-2]["learning_rate"] < 3e-3


@pytest.mark.fault("B9")
@pytest.mark.parametrize(
    ("schedule", "says"),
    [("warmup_stable_decay", "what is given now holds"), ("reduce_lr_on_plateau", "the checkpoint's go on")],
)
def test_settings_of_a_schedule_hold_or_do_not_as_is_said(caplog, schedule, says):
    then, now = ({"arguments": {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": {"factor": f}}} for f in (1, 2))
    refuse_other(
        then, {**dict.fromkeys((*SAID, "split"), None), "protect": {}, "versions": {}, **now}, Path("checkpoint-2")
    )
    assert f"another lr_scheduler_kwargs ({{'factor': 1}} there, {{'factor': 2}} here): {says}" in caplog.text


@pytest.mark.fault("B9")
def test_one_row_of_many_or_its_place_is_seen_and_nothing_else_is():
    listed = [{"input_ids": [i, i + 1], "text": f"row {i}", "labels": [-100, None]} for i in range(2500)]
    known = rows(Dataset.from_list(listed))
    edited, swapped = list(listed), list(listed)
    edited[1234] = {**listed[1234], "input_ids": [1234, 1236]}
    swapped[1233:1235] = listed[1234:1232:-1]
    parted = [*listed[:7], {**listed[7], "input_ids": [7, 8, 8]}, {**listed[8], "input_ids": [9]}, *listed[9:]]
    said, unseen = list(listed), list(listed)
    said[1234] = {**listed[1234], "text": "another"}
    unseen[1234] = {**listed[1234], "labels": [-100, 1]}
    for other in (edited, swapped, parted, said, unseen):
        assert rows(Dataset.from_list(other)) != known
    pieces = [Dataset.from_list(part) for part in (listed[:100], listed[100:1001], listed[1001:])]
    assert rows(concatenate_datasets(pieces)) == known
    assert rows(Dataset.from_list(listed[::-1]).select(range(2499, -1, -1))) == known
    assert rows(Dataset.from_list([*listed, listed[0]]), 2500) == known
    narrow = Features({"input_ids": LargeList(Value("int32")), "labels": List(Value("int16")), "text": Value("string")})
    assert rows(Dataset.from_list(listed, features=narrow).select_columns(["labels", "text", "input_ids"])) == known
    pictures = [{"image": {"bytes": bytes([i] * 9), "path": None}} for i in range(120)]
    seen = rows(Dataset.from_list(pictures))
    pictures[70]["image"]["bytes"] = b"another"
    assert rows(Dataset.from_list(pictures)) != seen


@pytest.mark.fault("B12")
def test_a_checkpoint_that_knew_less_of_its_run_still_goes_on(run, ended):
    for file in (run / "checkpoint-4" / commit.COMMIT, run / "checkpoint-4" / "ftplus" / "manifest.json"):
        found = json.loads(file.read_text())
        for facts in (found, found.get("run", {})):
            for key in ("settings", "arguments", "protect", "dtype"):
                facts.pop(key, None)
            if "rows" in facts:
                facts["rows"] = {"count": 24, "digest": "of some of them, as it once was"}
        file.write_text(json.dumps(found))
        commit_again(run / "checkpoint-4")
    it = trainer(run, "ewc", **SAVING)
    it.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert same(weights_of(it), ended[1])


@pytest.mark.fault("B7")
def test_full_weights_of_another_dtype_are_refused(tmp_path):
    trainer(tmp_path, max_steps=2, **SAVING).train()
    it = trainer(tmp_path, model=tiny_llama(dtype=torch.bfloat16), **SAVING)
    with pytest.raises(IncompatibleError, match=r"weights of another dtype \(float32 there, bfloat16 here\)"):
        it.train(resume_from_checkpoint=True)


@pytest.mark.fault("B6")
@pytest.mark.parametrize("changed", [{"alpha_pattern": {"q_proj": 7}}, {"lora_dropout": 0.5}, {"use_dora": True}])
def test_an_adapter_that_trains_otherwise_is_refused(tmp_path, changed):
    lora = {"r": 2, "target_modules": ["q_proj"]}
    trainer(tmp_path, peft_config=LoraConfig(**lora), max_steps=2, **SAVING).train()
    it = trainer(tmp_path, peft_config=LoraConfig(**lora, **changed), **SAVING)
    with pytest.raises(IncompatibleError, match=r"of another adapter: .* there, .* here|Missing there"):
        it.train(resume_from_checkpoint=True)


@pytest.mark.fault("B2", "B6", "B7")
def test_another_model_below_an_adapter_is_refused_and_another_dtype_of_it(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    trainer(tmp_path, peft_config=lora, max_steps=2, **SAVING).train()
    for other in (tiny_llama(seed=1), tiny_llama(dtype=torch.bfloat16)):
        with pytest.raises(IncompatibleError, match="other weights below the adapter"):
            trainer(tmp_path, peft_config=lora, model=other, **SAVING).train(resume_from_checkpoint=True)
    again = trainer(tmp_path, peft_config=lora, max_steps=3, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


@pytest.mark.fault("B5", "B11")
def test_without_strategies_other_targets_of_an_adapter_and_full_weights_are_refused_too(tmp_path):
    """The Trainer would load another adapter's optimizer, and fused AdamW then writes where it must not."""
    saving = {"max_steps": 2, **SAVING}
    trainer(tmp_path / "lora", peft_config=LoraConfig(r=2, target_modules=["q_proj"]), **saving).train()
    trainer(tmp_path / "full", **saving).train()
    other = LoraConfig(r=2, target_modules=["v_proj"])
    for there, here in (("lora", other), ("lora", None), ("full", other)):
        with pytest.raises(IncompatibleError, match="Missing there"):
            trainer(tmp_path, peft_config=here, **saving).train(
                resume_from_checkpoint=str(tmp_path / there / "checkpoint-2")
            )


@pytest.mark.fault("B8")
def test_rows_of_a_step_may_be_shared_out_otherwise_and_it_is_said(tmp_path, caplog):
    trainer(tmp_path, max_steps=2, **SAVING).train()
    again = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    trainer(tmp_path, **SAVING, **again).train(resume_from_checkpoint=True)
    assert "the rows of a step shared out otherwise: the run goes on, but not bit for bit" in caplog.text


@pytest.mark.fault("D1")
@pytest.mark.parametrize("strategies", [(), ("ewc",)], ids=["plain", "EWC"])
def test_weights_that_are_not_finite_are_not_committed(tmp_path, strategies):
    it = trainer(tmp_path, *strategies, **SAVING)
    it.train()
    with torch.no_grad():
        next(it.model.parameters())[0, 0] = float("nan")
    it.state.global_step = 8
    with pytest.raises(IncompatibleError, match="1 weights are not finite at step 8"):
        it._save_checkpoint(it.model)
    assert not (tmp_path / "checkpoint-8").exists()
    assert commit.newest(tmp_path) == tmp_path / "checkpoint-6"


@pytest.mark.fault("A1")
@pytest.mark.parametrize("moment", ["killed", "full disk"])
def test_a_checkpoint_that_is_written_again_stays_until_the_new_one_is_whole(run, monkeypatch, moment):
    it, before = trainer(run, "ewc", **SAVING), commit.read_commit(run / "checkpoint-4")
    (run / "checkpoint-4" / commit.WRITING).touch()  # a kill came right after its commit

    def fails(*args):
        raise KeyboardInterrupt if moment == "killed" else OSError(28, "No space left on device")

    monkeypatch.setattr(it, "_save_rng_state", fails)
    with pytest.raises(KeyboardInterrupt if moment == "killed" else StorageError):
        it.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    if moment == "killed":
        assert "was being written" in commit.fault(run / "checkpoint-4")
        assert not commit.fault(run / "_replaced-checkpoint-4")
    assert commit.newest(run) == run / "checkpoint-6"
    assert commit.read_commit(run / "checkpoint-4") == before
    assert not commit.fault(run / "checkpoint-4")
    assert not (run / "_replaced-checkpoint-4").exists()


@pytest.mark.fault("A1")
def test_written_again_and_whole_it_takes_the_place_of_the_earlier(run, ended):
    it = trainer(run, "ewc", **SAVING)
    it.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert sorted(path.name for path in run.glob("*checkpoint*")) == [f"checkpoint-{step}" for step in (2, 4, 6)]
    assert [commit.fault(path) for path in sorted(run.glob("checkpoint-*"))] == ["", "", ""]
    assert (run / "checkpoint-6" / "ftplus" / "ewc.safetensors").is_file()
    assert not (run / "checkpoint-6" / commit.WRITING).exists()


@pytest.mark.fault("A1")
def test_saved_twice_at_one_step_it_has_the_state_of_strategies_still(tmp_path):
    it = trainer(tmp_path, "ewc", max_steps=2, **SAVING)
    it.train()
    it._save_checkpoint(it.model)
    assert (tmp_path / "checkpoint-2" / "ftplus" / "ewc.safetensors").is_file()
    assert not commit.fault(tmp_path / "checkpoint-2")


@pytest.mark.fault("A1", "A10")
def test_a_whole_checkpoint_of_another_program_is_gone_on_from_and_never_destroyed(tmp_path, caplog):
    """As `trl sft` leaves them after a run of ours."""
    trainer(tmp_path, save_total_limit=1, **SAVING).train()
    plain = {"max_steps": 10, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, cls=trl.SFTTrainer, **plain).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert commit.newest(tmp_path) == tmp_path / "checkpoint-10"
    with pytest.raises(IncompatibleError, match="checkpoint-10/ftplus holds no strategy state"):
        trainer(tmp_path, "ewc", **plain).train(resume_from_checkpoint=True)
    weights = (tmp_path / "checkpoint-8" / "model.safetensors").read_bytes()
    it = trainer(tmp_path, save_total_limit=1, **plain)
    it.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert "checkpoint-8 is of another program, and is written again: it is now _replaced-checkpoint-8" in caplog.text
    assert (tmp_path / "_replaced-checkpoint-8" / "model.safetensors").read_bytes() == weights
    os.truncate(tmp_path / "checkpoint-10" / "model.safetensors", 1000)
    assert commit.newest(tmp_path) == tmp_path / "checkpoint-8"
    assert (tmp_path / "checkpoint-8" / "model.safetensors").read_bytes() == weights


@pytest.mark.fault("F7")
def test_a_link_among_the_checkpoints_is_never_followed(run, ended, tmp_path):
    elsewhere = shutil.copytree(run / "checkpoint-6", tmp_path / "elsewhere")
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    for step in (4, 6, 8):
        shutil.rmtree(run / f"checkpoint-{step}", ignore_errors=True)
        (run / f"checkpoint-{step}").symlink_to(elsewhere)
    assert commit.newest(run) == run / "checkpoint-2"
    trainer(run, "ewc", **SAVING).train(resume_from_checkpoint=True)
    assert not (run / "checkpoint-4").is_symlink()
    assert not commit.fault(run / "checkpoint-6")
    commit.rotate(run / "checkpoint-6", 1)
    assert (run / "checkpoint-8").is_symlink()
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before


@pytest.mark.fault("A10")
@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(None, None, [2, 4, 6]), (0, None, [2, 4, 6]), (1, None, [6]), (2, None, [4, 6]), (1, 2, [2, 6]), (2, 2, [2, 6]), (9, None, [2, 4, 6])],
)  # fmt: skip
def test_the_oldest_are_deleted_but_neither_the_newest_nor_the_best(run, limit, best, left):
    (run / "checkpoint-later").mkdir()
    commit.rotate(run / "checkpoint-6", limit, best and str(run / f"checkpoint-{best}"))
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        *(f"checkpoint-{n}" for n in left),
        "checkpoint-later",
    ]


@pytest.mark.fault("A10")
def test_what_is_not_whole_neither_counts_nor_goes(run):
    foreign(run / "checkpoint-2")
    os.truncate(run / "checkpoint-4" / "optimizer.pt", 10)
    shutil.copytree(run / "checkpoint-6", run / "checkpoint-5")
    (run / "_deleted-checkpoint-1").mkdir()  # a kill came in between
    commit.rotate(run / "checkpoint-6", 2)
    assert sorted(path.name for path in run.glob("*checkpoint*")) == [f"checkpoint-{step}" for step in (2, 4, 5, 6)]
    commit.rotate(run / "checkpoint-6", 1)
    assert sorted(path.name for path in run.glob("*checkpoint*")) == [f"checkpoint-{step}" for step in (2, 4, 6)]


def test_what_was_just_written_stays_though_older_runs_went_further(run):
    commit.rotate(run / "checkpoint-2", 1)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
