"""LoRA on a base of 4-bit weights (QLoRA), on the CPU path of bitsandbytes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from batches import padded, random_rows
from commands import make_place, words
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from training import trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_ftplus import Distill
from hf_ftplus.cli import main
from hf_ftplus.errors import IncompatibleError
from hf_ftplus.fisher import fisher
from hf_ftplus.trainer import stay_differentiable
from hf_ftplus.weights import split

four_bit = pytest.importorskip("bitsandbytes.functional")
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The usual place, with a model that can be packed: 64 weights share a scale."""
    place = make_place(tmp_path_factory.mktemp("place"))
    wide().save_pretrained(place / "model")
    return place


def wide():
    return tiny_llama(hidden=64)


def quantised(place):
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(place / "model", quantization_config=how, device_map={"": "cpu"})
    stay_differentiable(model)
    return model


def packed(model):
    return {name: weight.clone() for name, weight in model.named_parameters() if weight.dtype == torch.uint8}


def test_the_fisher_is_that_of_the_same_weights_unpacked(place):
    model = quantised(place)
    whole = wide()
    for name, weight in model.named_parameters():
        if weight.dtype == torch.uint8:
            whole.get_parameter(name).data = four_bit.dequantize_4bit(weight.data, weight.quant_state)
    found = []
    for base in (model, whole):
        torch.manual_seed(0)
        adapted = get_peft_model(base, copy.deepcopy(LORA))
        found.append(fisher(adapted, padded(random_rows(6, 300), 3), *split(adapted)))
    assert found[0].rows.keys() == found[1].rows.keys() != set()
    for (name, one), (_, other) in zip(found[0].named(), found[1].named(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 * other.max().item(), msg=name)


def test_a_look_in_eval_mode_leaves_the_gradient_as_it_was(place):
    """On CPUs with AVX-512; on others there is nothing that could change it."""
    torch.manual_seed(0)
    model = get_peft_model(quantised(place), copy.deepcopy(LORA))
    batch = padded(random_rows(4, 300), 4)[0]

    def gradient():
        model.zero_grad()
        model.train()(**batch).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}

    before = gradient()
    with torch.no_grad():
        model.eval()(**batch)
    after = gradient()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.fault("D4")
@pytest.mark.parametrize("strategy", [("ewc", {"strength": 1e4}), "distill", "replay"], ids=str)
def test_strategies_act_and_the_packed_weights_stay(place, tmp_path, strategy):
    model = quantised(place)
    before = packed(model)
    assert before
    it = trainer(tmp_path, strategy, model=model, peft_config=copy.deepcopy(LORA), learning_rate=1e-2)
    it.train()
    after = packed(it.model.get_base_model())
    assert len(after) == len(before)
    assert all(torch.equal(one, other) for one, other in zip(before.values(), after.values(), strict=True))
    logs = {key: value for log in it.state.log_history for key, value in log.items()}
    acts = {"ewc": "ewc/penalty", "distill": "distill/kl_protect", "replay": "replay/share_of_rows"}
    assert logs[acts[strategy if isinstance(strategy, str) else strategy[0]]] > 0


def test_the_starting_model_is_the_adapter_switched_off_and_costs_nothing(place, tmp_path):
    it = trainer(tmp_path, Distill(), model=quantised(place), peft_config=copy.deepcopy(LORA), logging_steps=1)
    it.train()
    kl = [log["distill/kl_protect"] for log in it.state.log_history if "distill/kl_protect" in log]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 0
    assert it.ftplus.bytes()["distill"] == 0


@pytest.mark.fault("D4")
def test_si_refuses_and_says_why(place, tmp_path):
    with pytest.raises(IncompatibleError, match="si"):
        trainer(tmp_path, "si", model=quantised(place), peft_config=copy.deepcopy(LORA)).train()


def test_one_command(place, tmp_path):
    flags = ["--use_peft", "true", "--load_in_4bit", "true", "--lora_target_modules", "all-linear", "--use_cpu", "true"]
    assert main(words(place, tmp_path / "out", *flags)) == 0
    report = json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())
    assert report["facts"]["strategies"]["ewc"]["penalty"] > 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "ftplus" / "memory" / "ewc.safetensors").is_file()
