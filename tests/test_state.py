"""What is on disk is verified before it is believed: whose it is, of what shape, and every byte of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from hf_ftplus import Strategy, state
from hf_ftplus.disk import sha256
from hf_ftplus.errors import IncompatibleError, StorageError
from hf_ftplus.strategy import Memory, Run
from hf_ftplus.weights import trainable


@dataclass
class Box(Strategy):
    """Holds what it is given."""

    name: ClassVar[str] = "box"

    def __post_init__(self):
        self.held = {
            "w": torch.arange(6.0).reshape(2, 3),
            "half": torch.ones(2, dtype=torch.bfloat16),
            "n": torch.tensor(3),
        }

    def state_dict(self):
        return self.held


def run_of(model):
    return Run(model, trainable(model), {}, lambda rows: [], torch.device("cpu"), 0, Memory())


BOX = {"box": "Box()"}


def save(folder, box, model, step, **facts):
    state.save_checkpoint(folder, {"box": box.state_dict()}, model, step, settings=BOX, **facts)


@pytest.fixture
def saved(tmp_path):
    save(tmp_path / "ftplus", Box(), tiny_llama(), step=3)
    return tmp_path / "ftplus"


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.fault("B7")
def test_tensors_come_back_bit_for_bit_in_their_dtype(saved):
    found = state.load_checkpoint(saved, BOX, tiny_llama(), step=3)["box"]
    for name, tensor in Box().held.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_views_that_share_memory_and_live_weights_can_be_saved(tmp_path):
    box = Box()
    base = torch.arange(12.0).reshape(3, 4)
    box.held = {"a": base, "b": base.T, "c": base[1:], "weight": tiny_llama().lm_head.weight}
    save(tmp_path / "ftplus", box, tiny_llama(), step=1)
    found = state.load_checkpoint(tmp_path / "ftplus", BOX, tiny_llama())["box"]
    assert torch.equal(found["b"], base.T)
    assert torch.equal(found["c"], base[1:])


def test_only_safetensors_and_json_are_written_and_no_half_file_stays(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["box.safetensors", "manifest.json"]


@pytest.mark.fault("B1")
def test_a_flipped_byte_is_noticed(saved):
    path = saved / "box.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(StorageError, match=r"box\.safetensors is missing or not what was written there"):
        state.load_checkpoint(saved, BOX, tiny_llama())


@pytest.mark.fault("B1")
def test_a_missing_file_is_noticed(saved):
    (saved / "box.safetensors").unlink()
    with pytest.raises(StorageError, match="is missing"):
        state.load_checkpoint(saved, BOX, tiny_llama())


@pytest.mark.fault("B1")
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "?"'])
def test_a_damaged_manifest_is_told_as_such(saved, text):
    (saved / "manifest.json").write_text(text)
    with pytest.raises(StorageError, match=r"damaged\. Use an earlier checkpoint"):
        state.load_checkpoint(saved, BOX, tiny_llama())


@pytest.mark.fault("B12")
def test_a_format_of_the_future_is_refused(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(IncompatibleError, match=r"format 99.*Upgrade hf-ftplus"):
        state.load_checkpoint(saved, BOX, tiny_llama())


def test_without_manifest_there_is_no_state_however_many_files(saved):
    """The manifest is written last: a folder without one was never finished."""
    (saved / "manifest.json").unlink()
    with pytest.raises(
        IncompatibleError, match="holds no strategy state, so box would start from the weights of the checkpoint"
    ):
        state.load_checkpoint(saved, BOX, tiny_llama())


@pytest.mark.fault("B3", "B11", "B13")
def test_another_step_other_strategies_and_another_model_are_refused(saved):
    with pytest.raises(IncompatibleError, match="is of step 3; the trainer resumes at step 4"):
        state.load_checkpoint(saved, BOX, tiny_llama(), step=4)
    with pytest.raises(IncompatibleError, match=r"strategies \['box'\]; this run has \['ewc'\]"):
        state.load_checkpoint(saved, {"ewc": "EWC()"}, tiny_llama())
    with pytest.raises(
        IncompatibleError, match=r"other shapes: model\.embed_tokens\.weight \[384, 32\] there, \[384, 16\] here"
    ):
        state.load_checkpoint(saved, BOX, tiny_llama(hidden=16))
    with pytest.raises(IncompatibleError, match=r"Missing there: model\.layers\.2\."):
        state.load_checkpoint(saved, BOX, tiny_llama(layers=3))
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(IncompatibleError, match=r"fits 0 of 4 .*lora_A"):
        state.load_checkpoint(saved, BOX, adapted)


@pytest.mark.fault("B3")
def test_other_settings_are_named_and_those_of_one_version_alone_do_not_count(saved):
    assert state.load_checkpoint(saved, {"box": "Box()"}, tiny_llama())
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["settings"] = {"box": "Box(size=3, shape='round', older=1)"}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    same = {"box": "Box(size=3, shape='round', newer=2)"}
    assert state.load_checkpoint(saved, same, tiny_llama())
    with pytest.raises(
        IncompatibleError, match=r"box\.size 3 there, 4 here; box\.shape 'round' there, 'flat' here\. Put"
    ):
        state.load_checkpoint(saved, {"box": "Box(size=4, shape='flat')"}, tiny_llama())


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("EWC(strength=3.0, on='a b')", {"strength": "3.0", "on": "'a b'"}),
        ("EWC()", {}),
        ("EWC(3.0, **more)", {}),
        ("EWC", {}),
        ("<EWC object>", {}),
        ("\0", {}),
        ("(" * 100_000, {}),
    ],
)
def test_settings_are_read_of_a_call_and_of_nothing_else(text, settings):
    assert state.settings_in(text) == settings


@pytest.mark.fault("B11")
def test_a_strategy_that_is_not_installed_is_named_with_what_to_install(tmp_path):
    for step, version in ((3, "1.2"), (4, "1.3")):
        folder = tmp_path / f"checkpoint-{step}" / "ftplus"
        published = {"plugins": {"box": ["ftplus-box", version]}}
        save(folder, Box(), tiny_llama(), step=step, **published)
        os.utime(folder, (step, step))
    says = "checkpoint-4 was written with it. box came from ftplus-box 1.3: install it from where you had it."
    assert state.missing_plugin(tmp_path, "box").endswith(says)
    assert state.missing_plugin(tmp_path, "ewc") == ""
    with pytest.raises(
        IncompatibleError, match=r"strategies \['box'\]; this run has none.*box came from ftplus-box 1.3: install"
    ):
        state.load_checkpoint(tmp_path / "checkpoint-4" / "ftplus", {}, tiny_llama())
    (tmp_path / "checkpoint-4" / "ftplus" / "manifest.json").write_text("{")  # the one before still tells
    assert state.missing_plugin(tmp_path, "box").endswith("ftplus-box 1.2: install it from where you had it.")


def test_facts_are_read_back_and_one_that_is_not_there_is_none(saved, tmp_path):
    assert state.checkpoint_fact(saved, "step") == 3
    assert state.checkpoint_fact(saved, "mixture") is None
    assert state.checkpoint_fact(tmp_path / "nowhere", "step") is None


@pytest.mark.fault("B4")
def test_another_adapter_of_the_same_shapes_is_refused_and_what_an_earlier_version_did_not_know_is_not(tmp_path):
    def adapted(**kwargs):
        return get_peft_model(tiny_llama(), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **kwargs}))

    folder = tmp_path / "ftplus"
    save(folder, Box(), adapted(lora_alpha=16), step=1)
    assert state.load_checkpoint(folder, BOX, adapted(lora_alpha=16))
    with pytest.raises(
        IncompatibleError, match=r"another adapter: lora_alpha 16 there, 8 here; use_rslora False there, True"
    ):
        state.load_checkpoint(folder, BOX, adapted(lora_alpha=8, use_rslora=True))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model"]["adapters"]["default"]["target_modules"] == ["q_proj"]
    del manifest["model"]["adapters"]["default"]["use_rslora"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert state.load_checkpoint(folder, BOX, adapted(lora_alpha=16, use_rslora=True))


def test_a_wrapped_model_is_the_same_model(saved):
    assert state.load_checkpoint(saved, BOX, torch.compile(tiny_llama()))


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "ftplus").write_text("a file")
    with pytest.raises(StorageError, match=r"Could not write strategy state.*--output_dir"):
        save(tmp_path / "ftplus", Box(), tiny_llama(), step=1)


def test_a_manifest_that_cannot_be_written_is_a_storage_error_too(tmp_path):
    (tmp_path / "ftplus" / "manifest.json").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"Could not write strategy state.*manifest\.json"):
        save(tmp_path / "ftplus", Box(), tiny_llama(), step=1)


@pytest.mark.fault("B1")
def test_a_file_that_somebody_wrote_anew_with_its_sum_is_refused_as_no_tensors(saved):
    (saved / "box.safetensors").write_bytes(b"no tensors")
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["box"]["sha256"] = sha256(saved / "box.safetensors")
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match=r"box\.safetensors is no safetensors file.*Use an earlier checkpoint"):
        state.load_checkpoint(saved, BOX, tiny_llama())


@pytest.mark.fault("D1", "D2")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_state_and_memory_that_are_not_finite_are_refused_by_name_and_nothing_is_touched(saved, tmp_path, value):
    box, before = Box(), (saved / "manifest.json").read_text()
    box.held["half"][1] = value
    with pytest.raises(IncompatibleError, match=r"State of box: half is not finite at step 4.*Lower the strength"):
        save(saved, box, tiny_llama(), step=4)
    assert (saved / "manifest.json").read_text() == before
    assert state.load_checkpoint(saved, BOX, tiny_llama(), step=3)
    with pytest.raises(IncompatibleError, match="State of box: half is not finite"):
        state.save_memory(tmp_path / "memory", "box", box.held, run_of(tiny_llama()))
    assert not (tmp_path / "memory").exists()


def test_writing_again_replaces(saved):
    box = Box()
    box.held = {"w": torch.zeros(1)}
    save(saved, box, tiny_llama(), step=4)
    assert state.load_checkpoint(saved, BOX, tiny_llama(), step=4)["box"].keys() == {"w"}


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memories_of_several_strategies_live_in_one_folder(tmp_path):
    run = run_of(tiny_llama())
    state.save_memory(tmp_path, "one", {"a": torch.ones(2)}, run)
    state.save_memory(tmp_path, "two", {"b": torch.zeros(3)}, run)
    assert state.load_memory(tmp_path, "one", run).keys() == {"a"}
    assert state.load_memory(tmp_path, "two", run).keys() == {"b"}


def test_no_memory_says_what_is_there_and_what_to_give(tmp_path):
    run = run_of(tiny_llama())
    with pytest.raises(StorageError, match=r"found: nothing.*OUTPUT/ftplus/memory"):
        state.load_memory(tmp_path, "ewc", run)
    state.save_memory(tmp_path, "si", {"a": torch.ones(2)}, run)
    with pytest.raises(StorageError, match=r"no memory of 'ewc' \(found: \['si'\]\)"):
        state.load_memory(tmp_path, "ewc", run)


@pytest.mark.fault("B2")
def test_memory_knows_its_model_adapted_merged_or_in_bf16_and_no_other(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    state.save_memory(tmp_path, "box", {"a": torch.ones(2)}, run_of(model))
    assert state.load_memory(tmp_path, "box", run_of(model)).keys() == {"a"}
    merged = model.merge_and_unload().requires_grad_(True)
    for same in (merged, merged.to(torch.bfloat16)):
        assert state.load_memory(tmp_path, "box", run_of(same)).keys() == {"a"}
    for other in (tiny_llama(seed=1), tiny_llama()):
        with pytest.raises(IncompatibleError, match=r"another model: [1-9][\d,]* of [\d,]+ sampled weights differ"):
            state.load_memory(tmp_path, "box", run_of(other))


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
def test_memory_of_a_model_of_other_shapes_says_so_first(tmp_path, adapted):
    made = [tiny_llama(), tiny_llama(hidden=16)]
    if adapted:
        made = [get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) for model in made]
    state.save_memory(tmp_path, "box", {"a": torch.ones(2)}, run_of(made[0]))
    words = (
        r"another model: \d+ weights have other shapes \(model.embed_tokens.weight \[\d+, 32\] there, \[\d+, 16\] here"
    )
    with pytest.raises(IncompatibleError, match=words + r"\), and [\d,]+ of [\d,]+ sampled weights differ"):
        state.load_memory(tmp_path, "box", run_of(made[1]))
