"""wise keeps the laws, its averages are those of a slow loop, and ftplus repair brings back what was forgotten."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from ftplus_wise import Wise, repair
from ftplus_wise.curve import Point, choose, learnt, table
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_ftplus import Strategy, plugins, testing
from hf_ftplus.cli import main
from hf_ftplus.errors import DataError, IncompatibleError
from hf_ftplus.testing import check_strategy
from hf_ftplus.testing.tiny import tiny_llama, tiny_tokenizer
from hf_ftplus.testing.training import LEARN, PROTECT, far, sequence, trainer


def test_it_keeps_every_law():
    check_strategy(Wise(keep=0.8), processes=False)


def test_it_remembers_and_is_silent_at_zero():
    laws = [testing.law_introduces_itself, testing.law_silent_at_zero, testing.law_remembers]
    check_strategy(Wise(keep=0.8), laws=laws, peft=False, processes=False)


# ---- the average and the line, slowly --------------------------------------------------------------------------------


@dataclass
class Noting(Strategy):
    """Keeps the weights of every step."""

    name: ClassVar[str] = "noting"

    def after_step(self, run):
        self.kept = [*getattr(self, "kept", []), {name: weight.clone() for name, weight in run.weights.items()}]


def test_the_result_is_the_average_of_the_steps(tmp_path):
    it = trainer(tmp_path, Wise(decay=0.5, keep=1.0), Noting())
    it.train()
    average = {name: weight.detach() for name, weight in tiny_llama().named_parameters()}
    for step, weights in enumerate(it.ftplus.strategies[1].kept):
        decay = min(0.5, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * weight for name, weight in weights.items()}
    assert far(average, dict(it.model.named_parameters())) < 1e-6


@pytest.mark.parametrize("name", ["whole", "adapter"])
def test_it_stays_at_the_chosen_point_of_the_line(place, tmp_path, name):
    base = LlamaForCausalLM.from_pretrained(place / "base")
    held = tuned(place, tmp_path, name, Wise(decay=0.0, keep=0.5))
    plain = tuned(place, tmp_path / "plain", name)
    alpha = json.loads((tmp_path / "ftplus" / "wise.json").read_text())["chosen"]
    assert 0 < alpha < 1
    ids = torch.arange(5, 35)[None]
    end = plain.model.merge_and_unload() if name == "adapter" else plain.model
    start, end = base.state_dict(), end.state_dict()
    base.load_state_dict({key: start[key].lerp(end[key], alpha) for key in start})
    torch.testing.assert_close(held.model.eval()(ids).logits, base.eval()(ids).logits, rtol=1e-3, atol=1e-3)


def test_on_a_second_task_less_is_forgotten_and_nearly_all_is_learnt(tmp_path):
    known, kept, learned = sequence(tmp_path / "wise", Wise(keep=0.8), steps=30)
    _, plain, learned_plain = sequence(tmp_path / "plain", steps=30)
    assert kept - known < 0.8 * (plain - known)
    assert learned < learned_plain + 0.25 * (6 - learned_plain)


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_the_least_loss_on_protect_among_those_that_learnt_enough():
    points = [
        Point(1.0, 1.0, {"a": 3.0}),
        Point(0.5, 1.2, {"a": 2.0}),
        Point(0.2, 2.0, {"a": 1.5}),
        Point(0.0, 3.0, {"a": 1.0}),
    ]
    assert [learnt(point, points) for point in points] == [1.0, 0.9, 0.5, 0.0]
    assert [choose(points, keep).alpha for keep in (1.0, 0.9, 0.5, 0.0)] == [1.0, 0.5, 0.2, 0.0]
    mended = Point(1.0, 1.1, {"a": 1.2}, "intruders 0.75")
    assert choose([*points, mended], 0.9) is mended
    assert "intruders 0.75" in table([*points, mended], mended).splitlines()[-1]
    assert table(points, points[1]).splitlines()[2].endswith("<- taken")


def test_where_nothing_was_learnt_the_result_stays():
    points = [Point(1.0, 3.0, {"a": 3.0}), Point(0.0, 3.0, {"a": 1.0})]
    assert choose(points, 0.5) is points[0]
    assert " - " in table(points, points[0])


# ---- what it refuses -------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"there is none. Type --protect.*--set wise\.keep=1"):
        trainer(tmp_path, Wise(), protect=None)
    before = trainer(tmp_path / "b", peft_config=LoraConfig(r=3, target_modules=["q_proj"]), max_steps=2)
    before.train()
    with pytest.raises(IncompatibleError, match=r"was trained before. Merge it"):
        trainer(tmp_path, Wise(), model=before.model)
    it = trainer(tmp_path, Wise(), max_steps=1)
    it.train_dataset = it.train_dataset.to_iterable_dataset()
    with pytest.raises(IncompatibleError, match=r"a stream, DPO.*--set wise\.keep=1"):
        it.train()


def test_memory_of_the_others_is_of_the_averaged_weights(tmp_path):
    it = trainer(tmp_path / "first", Wise(keep=1.0), "ewc")
    it.train()
    again = trainer(tmp_path / "second", "ewc", model=it.model, memory=tmp_path / "first" / "ftplus" / "memory")
    again.train()  # refuses memory of other weights


def test_a_strategy_that_remembers_before_weights_move_is_warned_of(tmp_path, caplog):
    trainer(tmp_path, "ewc", Wise(), max_steps=1).train()
    said = [record.getMessage() for record in caplog.records if "Give wise first" in record.getMessage()]
    assert len(said) == 1
    assert "ewc remembers them before that" in said[0]
    assert "--plugin wise --plugin ewc" in said[0]


# ---- ftplus repair ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base that knows PROTECT, and two models that learnt LEARN from it: whole, and a LoRA."""
    folder = tmp_path_factory.mktemp("repair")
    base = trainer(folder / "run", learn=PROTECT, protect=None, max_steps=40, learning_rate=5e-3)
    base.train()
    for name, rows in (("learn", LEARN), ("protect", PROTECT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fresh = tiny_llama()
    fresh.load_state_dict(base.model.state_dict())
    fresh.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for name in ("whole", "adapter"):
        tuned(folder, folder / f"run {name}", name).save_model(str(folder / name))
    return folder


def tuned(place, folder, name, *strategies):
    """The base after 40 steps on LEARN."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if name == "adapter" else None
    model, rate = LlamaForCausalLM.from_pretrained(place / "base"), 1e-2 if lora else 5e-3
    it = trainer(folder, *strategies, model=model, peft_config=lora, max_steps=40, learning_rate=rate)
    it.train()
    return it


def mend(capsys, place, name, *more):
    line = [
        "repair",
        str(place / name),
        "--learn",
        str(place / "learn.jsonl"),
        "--protect",
        str(place / "protect.jsonl"),
    ]
    code = main([*line, *more])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("name", ["whole", "adapter"])
def test_a_damaged_model_is_repaired_and_the_table_says_how(capsys, place, tmp_path, name):
    more = ["--keep", "0.7", "--points", "5", "--out", str(tmp_path / "mended")]
    base = ["--base", str(place / "base")] if name == "whole" else []
    code, out, err = mend(capsys, place, name, *base, *more)
    assert (code, "<- taken" in out) == (0, True), err
    assert "before, " in out
    assert f"ftplus eval {place / name} {tmp_path / 'mended'}" in out
    code, again, _ = mend(capsys, place, str(tmp_path / "mended"), *base, "--points", "1", "--json")
    code, first, _ = mend(capsys, place, name, *base, "--keep", "0.7", "--points", "5", "--json")
    points = json.loads(first)
    (taken,) = [point for point in points if point["taken"]]
    written = json.loads(again)[0]
    assert written["learn"] == pytest.approx(taken["learn"], rel=1e-4)
    assert written["protect"] == pytest.approx(taken["protect"], rel=1e-4)
    assert taken["learnt"] >= 0.7
    assert taken["protect"]["protect"] < points[0]["protect"]["protect"] - 0.1
    assert ("intruders 0.75" in [point["point"] for point in points]) == (name == "adapter")


def test_a_repaired_adapter_is_the_scaled_one(capsys, place, tmp_path):
    code, out, _ = mend(
        capsys,
        place,
        "adapter",
        "--keep",
        "0",
        "--points",
        "2",
        "--mitigation",
        "0",
        "--out",
        str(tmp_path / "m"),
        "--json",
    )
    assert code == 0
    (alpha,) = [point["alpha"] for point in json.loads(out) if point["taken"]]
    assert alpha < 1
    then, now = (load_file(folder / "adapter_model.safetensors") for folder in (place / "adapter", tmp_path / "m"))
    assert then.keys() == now.keys()
    for key in then:
        torch.testing.assert_close(now[key], then[key] * (alpha if "lora_B" in key else 1))


@torch.no_grad()
def test_without_its_intruders_an_adapter_is_what_is_left_of_the_sum(capsys, monkeypatch, place, tmp_path):
    base = LlamaForCausalLM.from_pretrained(place / "base")
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    start, change = layer.base_layer.weight.clone(), layer.get_delta_weight("default")
    tuned.save_pretrained(tmp_path / "odd")
    tiny_tokenizer().save_pretrained(tmp_path / "odd")
    monkeypatch.setattr(repair, "choose", lambda points, keep: points[-1])
    more = ["--points", "1", "--mitigation", "0.75", "--out", str(tmp_path / "mended"), "--json"]
    code, out, err = mend(capsys, place, str(tmp_path / "odd"), *more)
    assert (code, json.loads(out)[-1]["point"]) == (0, "intruders 0.75"), err

    known, _, _ = torch.linalg.svd(start)
    left, sizes, right = torch.linalg.svd(start + change)
    strange = [i for i in range(10) if (left[:, i] @ known).abs().max() < 0.5]
    assert strange
    less = change - sum(0.75 * sizes[i] * torch.outer(left[:, i], right[i]) for i in strange)
    one, scale, other = torch.linalg.svd(less)
    wanted = one[:, :2] @ torch.diag(scale[:2]) @ other[:2]  # as far as rank 2 can hold it
    mended = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(place / "base"), tmp_path / "mended")
    found = mended.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "more", "code", "said"),
    [
        ("whole", [], 2, "name the one that it was trained from: --base MODEL"),
        ("adapter", ["--base", "other"], 2, "Leave --base out."),
        ("whole", ["--base", "odd"], 4, "Name the model that it was trained from."),
        ("adapter", ["--out", "adapter"], 6, "is not an empty folder"),
        ("adapter", ["--learn", "self:4"], 2, "Give held-out rows of what the model learnt"),
    ],
)
def test_a_mistake_is_a_sentence(capsys, monkeypatch, place, name, more, code, said):
    monkeypatch.chdir(place)
    tiny_llama(hidden=16).save_pretrained(place / "odd")
    found, _, err = mend(capsys, place, name, *more)
    assert (found, said in err) == (code, True), err


def test_an_adapter_that_b_alone_does_not_move_is_refused(capsys, place, tmp_path):
    """At alpha 0 its embeddings would stay as they were trained."""
    base = LlamaForCausalLM.from_pretrained(place / "base")
    both = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, both).save_pretrained(tmp_path / "odd")
    tiny_tokenizer().save_pretrained(tmp_path / "odd")
    code, _, err = mend(capsys, place, str(tmp_path / "odd"))
    assert (code, "embeddings, modules_to_save and biases, too" in err) == (4, True), err


def test_nothing_to_repair_for_is_said(capsys, place):
    assert main(["repair", str(place / "whole"), "--learn", str(place / "learn.jsonl")]) == 3
    assert "--protect self:64" in capsys.readouterr().err


def test_the_command_line_finds_it():
    assert plugins.load("wise") is Wise
    assert ("repair", "ftplus-wise") in [(offer.name, offer.distribution) for offer in plugins.commands()]


def test_a_run_of_ours_says_what_it_began_with(capsys, place, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(place / "whole", run)
    (run / "ftplus").mkdir()
    config = {"model": {"model_name_or_path": str(place / "base")}}
    (run / "ftplus" / "report.json").write_text(json.dumps({"facts": {"config": config}}))
    code, out, err = mend(capsys, place, str(run), "--points", "1", "--json")
    assert code == 0, err
    base = json.loads(out)[-1]
    assert base["protect"]["protect"] < json.loads(out)[0]["protect"]["protect"]
