"""The plan of a run that is not here: what small models measure is what the formulas say, and the guide is theirs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from training import trainer
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from hf_ftplus import EWC, Run, scaling
from hf_ftplus.as_if import AsIf, numbers, optimizer_bytes, size
from hf_ftplus.cli import main
from hf_ftplus.errors import UsageError
from hf_ftplus.scaling import Layout, Model
from hf_ftplus.strategies.distill import Distill
from hf_ftplus.strategies.si import SI
from hf_ftplus.strategy import Memory
from hf_ftplus.weights import trainable

GUIDE = Path(__file__).parents[1] / "examples" / "scaling"
ALONE = Layout(world=1, sharding="ddp", bf16=False, checkpointing=False)


def test_numbers_are_those_of_the_model():
    model = tiny_llama(tie=False)
    found = numbers(model)
    assert found.weights == found.trained == sum(weight.numel() for weight in model.parameters())
    assert found.root + 2 * found.layer == found.weights
    assert found.active == found.weights - model.get_input_embeddings().weight.numel()
    assert found.top == model.lm_head.weight.numel() + 32
    assert numbers(tiny_llama()).top == numbers(tiny_llama()).root


def test_optimizers_keep_what_they_keep():
    known = {
        "adamw_torch_fused": 8, "paged_adamw_8bit": 2, "adamw_torch_4bit": 1, "lion_32bit": 4, "paged_lion_8bit": 1,
        "rmsprop_bnb": 4, "adafactor": 0, "sgd": 0, "schedule_free_sgd": 4, "ademamix": 12, "schedule_free_adamw": 8,
    }  # fmt: skip
    assert {kind: optimizer_bytes(kind, 4) for kind in known} == known


def test_of_experts_a_token_meets_the_chosen_ones():
    config = Qwen3MoeConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=64,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        found = numbers(AutoModelForCausalLM.from_config(config))
    each = 3 * 32 * 16
    assert found.active == found.weights - 2 * 6 * each - 64 * 32
    assert found.inner == 2 * 16


def saved(model, ids, bf16) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights left out."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
        alive.append(tensor)
        return tensor

    precision = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        model.base_model(input_ids=ids, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("inner", [64, 256])
def test_activations_are_what_autograd_keeps(bf16, inner):
    def kept(layers):
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        copies = (
            2 * sum(weight.numel() for weight in model.model.layers[0].parameters() if weight.dim() == 2) if bf16 else 0
        )
        layout = Layout(1, "ddp", rows=4, length=256, bf16=bf16, checkpointing=False)
        return saved(model, torch.zeros(4, 256, dtype=torch.long), bf16) - layers * copies, scaling.activations(
            numbers(model), layout
        )

    (few, said_few), (many, said_many) = kept(1), kept(3)
    assert many - few == pytest.approx(said_many - said_few, rel=0.05)


def counted(folder, *strategies, **kwargs) -> int:
    """FLOPs of a step of 4 rows of 32 tokens."""
    rows = [{"input_ids": [i % 300 + 4] * 32, "labels": [i % 300 + 4] * 32} for i in range(8)]
    batch = {key: torch.tensor([row[key] for row in rows[:4]]) for key in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["labels"])
    it = trainer(
        folder, *strategies, learn=rows, model=tiny_llama(hidden=64), max_steps=2, protect=[batch] if strategies else None,
        **kwargs,
    )  # fmt: skip
    step, found = it.training_step, []

    def measured(*args):
        with FlopCounterMode(display=False) as counter:
            loss = step(*args)
        found.append(counter.get_total_flops())
        return loss

    it.training_step = measured
    it.train()
    return found[-1]


def test_flops_are_six_a_weight_and_token_and_distill_adds_what_it_says(tmp_path):
    layout, model = Layout(1, "ddp", rows=4, length=32, checkpointing=False), numbers(tiny_llama(hidden=64))
    plain = counted(tmp_path)
    assert plain == pytest.approx(scaling.flops(model, layout), rel=0.1)  # attention's own products are not counted
    adapter = LoraConfig(r=2, target_modules="all-linear")
    frozen = Model(**vars(model) | {"trained": 0})  # next to nothing is
    assert counted(tmp_path, peft_config=adapter) == pytest.approx(scaling.flops(frozen, layout), rel=0.15)
    for on, cache in (("protect", False), ("learn", False), ("protect", True)):
        more = counted(tmp_path, Distill(on=on, share=1.0, cache=cache, strength=1.0)) - plain
        said = scaling.distill(model, layout, 0, share=1.0, cache=cache, on=(on,), lora=False).flops
        assert more == pytest.approx(said, rel=0.25), (on, cache)  # heads are computed for supervised tokens alone


class Touched(TorchDispatchMode):
    """Bytes that operations read and write, numbers on their own left out."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not any(word in str(func) for word in ("view", "detach", "empty")):
            read = args[1:] if "copy_" in str(func) else args  # what is overwritten is not read
            tensors = [t for t in tree_leaves((read, result)) if torch.is_tensor(t) and t.numel() > 1]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


@pytest.mark.parametrize(("name", "memory"), [("ewc", False), ("si", False), ("si", True)])
def test_a_step_of_ewc_and_si_reads_and_writes_what_is_said(name, memory):
    model = tiny_llama()
    weights = trainable(model)
    strategy = EWC(strength=1.0) if name == "ewc" else SI()
    run = Run(model, weights, {}, lambda rows: [], torch.device("cpu"), 0, Memory(), strategies=(strategy,))
    parts = (
        ("start", "importance.diagonal")
        if name == "ewc"
        else ("start", "omega", *(("gradient", "importance") if memory else ("before",)))
    )
    strategy.load_state_dict(
        {f"{p}.{key}": torch.ones_like(w.detach()) for p in parts for key, w in weights.items()}, run
    )
    run.device, run.measuring, run.clip = torch.device("cuda"), False, torch.tensor(0.5)  # as where nobody waits
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    with torch.no_grad():
        strategy.read_gradients(run), strategy.before_step(run), strategy.after_step(run)  # the first also looks around
        with Touched() as touched:
            strategy.read_gradients(run), strategy.before_step(run), strategy.after_step(run)
    formula = scaling.ewc if name == "ewc" else scaling.si
    found = numbers(model)
    said = formula(found, ALONE, 0, **({"memory": memory} if name == "si" else {})).touched
    assert touched.bytes == pytest.approx(said, rel=0.02)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, num_attention_heads=64,
                                           num_key_value_heads=8, vocab_size=128256).to_dict()))  # fmt: skip
    return file


def test_a_plan_needs_a_config_alone(config, capsys):
    """4.4 B weights would be 18 GB; the meta device holds none of them."""
    line = ["sft", "--dry-run", "--as-if", f"model={config},world=64,sharding=fsdp2", "--max_length", "2048"]
    assert main([*line, "--plugin", "ewc", "--plugin", "si", "--plugin", "replay", "--plugin", "distill"]) == 0
    said = capsys.readouterr().out
    assert "5.52 B weights, 5.52 B trained" in said
    assert "64, fsdp2; on each 8 rows of 2048 tokens" in said
    assert f"ewc: {size(8 * 5.524e9 / 64)} of state and 0 B of wire on each rank" in said
    assert "si: 1.04 GB of state" in said
    assert "replay: 0 B of state" in said
    assert "an epoch 14% longer" in said
    assert "distill: refused" in said
    assert "cache=true" in said


def test_a_plan_knows_its_precision(config, capsys):
    line = ["sft", "--dry-run", "--as-if", f"model={config},world=8"]
    lora = ["--use_peft", "--lora_target_modules", "all-linear"]

    def said(*more):
        assert main([*line, *more]) == 0
        return capsys.readouterr().out.splitlines()

    usual, full, half = said(), said("--bf16", "false"), said("--fp16", "true")
    assert [found[1].rpartition(" ")[2] for found in (usual, full, half)] == ["bf16", "fp32", "fp16"]
    assert usual[2] == half[2] != full[2]
    assert usual[3] == half[3] != full[3]  # what is gathered and scattered
    assert said(*lora)[2] != said(*lora, "--load_in_4bit", "true")[2]


def test_a_plan_knows_adapters_and_ddp(config, capsys):
    line = [
        "sft",
        "--dry-run",
        "--as-if",
        f"model={config},world=8,sharding=ddp",
        "--use_peft",
        "--lora_target_modules",
        "q_proj",
    ]
    assert main([*line, "--plugin", "ewc", "--plugin", "distill"]) == 0
    said = capsys.readouterr().out
    assert f"ewc: {size(4 * 4 * (8192 + 8192))} of state" in said
    assert "the adapter switched off" in said


@pytest.mark.parametrize("on", ["auto", "protect", "both"])
def test_a_plan_asks_nothing_of_a_teacher_whose_answers_are_kept(config, capsys, on):
    line = ["sft", "--dry-run", "--as-if", f"model={config},world=8", "--protect", "self:8", "--plugin", "distill"]
    assert main([*line, "--set", "distill.cache=true", "--set", f"distill.on={on}"]) == 0
    assert "distill: 0 B of state" in capsys.readouterr().out


def test_under_zero_2_strategies_hold_whole_gradients_and_weights_for_the_step():
    model = scaling.Model(
        weights=1000, trained=1000, active=900, layer=100, root=100, top=50, layers=9, width=8, inner=16
    )
    shards, zero2, fp32 = Layout(4), Layout(4, "zero2"), Layout(4, "zero2", bf16=False)
    assert scaling.si(model, shards, 0.0).state == scaling.si(model, shards, 0.0).wire == 0
    assert scaling.si(model, zero2, 0.0).state == 8 * 1000
    assert scaling.ewc(model, fp32, 0.0).state == 4 * 1000
    assert scaling.ewc(model, fp32, 0.0).wire == 2 * 3 / 4 * 4 * 1000
    assert scaling.ewc(model, zero2, 0.0).wire == 2 * scaling.ewc(model, fp32, 0.0).wire
    assert scaling.si(model, zero2, 0.0).wire == 3 * scaling.ewc(model, fp32, 0.0).wire


@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        ("wrld=8", 2, "'wrld=8'; expected model=..., world=..., sharding=..."),
        ("world=many", 2, "world is 'many'; expected the number of ranks"),
        ("sharding=fsdp", 2, "expected one of ddp, fsdp2, zero1, zero2, zero3. Did you mean 'fsdp2'?"),
        ("model=/nowhere/config.json", 3, "No model at '/nowhere/config.json'"),
        ("sharding=zero3", 4, "ewc acts on weights between backward and optimizer step"),
    ],
)
def test_what_cannot_be_planned_is_said(config, capsys, asked, code, says):
    asked = asked if "model" in asked else f"model={config},{asked}"
    assert main(["sft", "--dry-run", "--as-if", asked, "--plugin", "ewc"]) == code
    assert says in capsys.readouterr().err


def test_as_if_trains_nothing(config, capsys):
    assert main(["sft", "--as-if", f"model={config}"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_defaults_are_eight_ranks_in_shards():
    assert AsIf.parse("model=x") == AsIf("x", 8, "fsdp2")
    with pytest.raises(UsageError, match="world is '0'"):
        AsIf.parse("world=0")


def test_the_guide_is_what_the_formulas_say():
    table = runpy.run_path(str(GUIDE / "table.py"))
    text = (GUIDE.parent / "scaling.md").read_text(encoding="utf-8")
    for made in table["tables"]():
        assert made in text
