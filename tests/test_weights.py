"""One name for a weight whoever wrapped it; a partial match is an error; what cannot be held is refused."""

from __future__ import annotations

import pytest
import torch
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny import tiny_llama, tiny_mixtral

from hf_ftplus.errors import IncompatibleError
from hf_ftplus.weights import canonical, lora, match, split, trainable

LORA = {"r": 2, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "wrapped",
    [
        "model.layers.0.mlp.up_proj.weight",
        "module.model.layers.0.mlp.up_proj.weight",
        "_orig_mod.module.model.layers.0.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
        "_fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight",
        "module.base_model.model.model.layers.0._orig_mod.mlp.up_proj.modules_to_save.default.weight",
    ],
)
def test_every_wrapper_is_taken_off(wrapped):
    assert canonical(wrapped) == "model.layers.0.mlp.up_proj.weight"


def test_the_adapter_name_goes_but_the_factor_stays():
    assert canonical("base_model.model.model.q_proj.lora_A.default.weight") == "model.q_proj.lora_A.weight"


def test_adapters_inside_one_another_keep_apart():
    """PEFT wraps a module once for each of its parameters that has an adapter."""
    wraps = "base_model.model.mlp.experts", "base_model.model.mlp.experts.base_layer.base_layer"
    assert [canonical(f"{name}.lora_A.default.weight") for name in wraps] == [
        "mlp.experts.lora_A.weight",
        "mlp.experts.base_layer.base_layer.lora_A.weight",
    ]
    assert canonical(f"{wraps[1]}.down_proj") == "mlp.experts.down_proj"


def test_names_survive_peft_and_compile():
    plain = trainable(tiny_llama())
    assert trainable(torch.compile(tiny_llama())).keys() == plain.keys()
    adapted = get_peft_model(tiny_llama(), LoraConfig(**LORA, modules_to_save=["norm"]))
    assert "model.norm.weight" in trainable(adapted)
    assert all(name in plain for name in split(adapted)[0])


@pytest.mark.fault("D11")
def test_nothing_trainable_is_an_error():
    with pytest.raises(IncompatibleError, match="No weight of the model is trainable"):
        trainable(tiny_llama().requires_grad_(False))


@pytest.mark.fault("B3")
def test_a_partial_match_lists_the_misses():
    with pytest.raises(IncompatibleError, match=r"fits 1 of 2 .* Missing there: b\. Unknown here: c"):
        match(["a", "b"], ["a", "c"], "The state")
    match(["a"], ["a"], "The state")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA, use_dora=True),
        LoraConfig(**LORA, lora_bias=True),
        AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["embed_tokens"]),
        FourierFTConfig(target_modules=["q_proj"], n_frequency=8),
        HRAConfig(target_modules=["q_proj"], r=2),
    ],
    ids=["DoRA", "LoRA bias", "AdaLoRA", "IA3", "prompt tuning", "LoRA on embeddings", "FourierFT", "HRA"],
)
def test_adapters_that_do_not_add_scale_B_A_are_refused(config):
    with pytest.raises(IncompatibleError, match="plain LoRA or rsLoRA"):
        split(get_peft_model(tiny_llama(), config))


@pytest.mark.parametrize(
    "config",
    [LNTuningConfig(target_modules=["input_layernorm"]), LoraConfig(**LORA, trainable_token_indices=[3, 4])],
    ids=["norms", "tokens"],
)
def test_what_peft_trains_in_the_place_of_a_models_own_weights_is_held_as_such(config):
    plain, _ = split(get_peft_model(tiny_llama(), config))
    assert plain


def test_a_module_may_be_called_like_an_adapter():
    model = tiny_llama()
    model.model.prompt_norm = torch.nn.LayerNorm(4)
    assert "model.prompt_norm.weight" in split(model)[0]


@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]])
def test_lora_of_experts_is_refused(parameters):
    """One A and one B hold those of all experts: their product is the change of no weight."""
    targets = {"target_parameters": [f"mlp.experts.{name}" for name in parameters], "target_modules": []}
    model = get_peft_model(tiny_mixtral(intermediate=32), LoraConfig(r=2, **targets))
    with pytest.raises(IncompatibleError, match=r"experts\.(base_layer\.)?lora_A.*LoRA of a mixture's experts"):
        split(model)


def test_lora_of_a_linear_layers_parameter_is_lora():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_parameters=["q_proj.weight"], target_modules=[]))
    plain, adapters = split(model)
    assert not plain
    assert set(adapters) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}


def test_a_merged_adapter_is_refused():
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    model.merge_adapter()
    with pytest.raises(IncompatibleError, match="unmerge_adapter"):
        lora(model)


def test_rslora_scale_is_the_layers_own():
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA, lora_alpha=8, use_rslora=True))
    assert {adapter.scale for adapter in lora(model).values()} == {8 / 2**0.5}
