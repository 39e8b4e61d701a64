"""EWC adds exactly the gradient of its penalty, at any batch layout and precision, and holds what is protected."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from batches import padded, random_rows
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from reference import drift, lora_penalty
from tiny import tiny_llama
from training import LEARN, PROTECT, far, sequence, trainer, weights_of
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ftplus import EWC, Run, Strategy, state
from hf_ftplus.batches import first_rows
from hf_ftplus.errors import DataError, IncompatibleError, UsageError
from hf_ftplus.fisher import fisher
from hf_ftplus.quadratic import fitted, importance_names
from hf_ftplus.strategy import Memory
from hf_ftplus.weights import split, trainable

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


@dataclass
class Gradients(Strategy):
    """Keeps the gradient and the weights of every step as they are when its turn comes."""

    name: ClassVar[str] = "gradients"

    def __post_init__(self):
        self.kept, self.weights = [], []

    def before_step(self, run):
        self.kept.append({name: weight.grad.clone() for name, weight in run.weights.items() if weight.grad is not None})
        self.weights.append({name: weight.detach().clone() for name, weight in run.weights.items()})


@dataclass
class GradientsAfter(Gradients):
    """The same, later."""

    name: ClassVar[str] = "gradients-after"


def added(folder, strategy, **kwargs):
    """(what the strategy added to the gradients, the weights then) of each step, and the trainer."""
    before, after = Gradients(), GradientsAfter()
    it = trainer(folder, before, strategy, after, **{"max_steps": 3, **kwargs})
    it.train()
    steps = [
        {name: b[name].float() - a[name].float() for name in a} for a, b in zip(before.kept, after.kept, strict=True)
    ]
    return steps, before.weights, it


def penalty_gradient(strategy: EWC, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Autograd of 1/2 strength sum F (w - w*)^2, written out."""
    leaves = {name: weights[name].float().clone().requires_grad_() for name in strategy.plain}
    penalty = sum(
        (strategy.importance[f"diagonal.{name}"] * (leaf - strategy.start[name].float()).square()).sum()
        for name, leaf in leaves.items()
    )
    (0.5 * strategy.strength * penalty).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def assert_autograds(found, expected, rel=1e-3):
    """Equal up to the rounding of adding to a gradient and taking it away again."""
    assert found.keys() == expected.keys()
    for name in expected:
        size = expected[name].abs().max()
        assert (found[name] - expected[name]).abs().max() <= rel * size + 2e-7, name


# ---- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4, 8])
def test_the_gradient_added_is_autograds_at_any_accumulation(tmp_path, accumulation):
    ewc = EWC(strength=1000)
    steps, weights, _ = added(
        tmp_path,
        ewc,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
        learn=LEARN,
    )
    assert all(not tensor.any() for tensor in steps[0].values())  # at the start
    for step, now in list(zip(steps, weights, strict=True))[1:]:
        expected = penalty_gradient(ewc, now)
        assert max(tensor.abs().max() for tensor in expected.values()) > 1e-3
        assert_autograds(step, expected)


def test_the_last_short_accumulation_window_is_no_exception(tmp_path):
    """24 rows by 2, five at a time: the third step accumulates two micro-batches only."""
    ewc = EWC(strength=1000)
    steps, weights, _ = added(tmp_path, ewc, gradient_accumulation_steps=5, per_device_train_batch_size=2)
    assert_autograds(steps[2], penalty_gradient(ewc, weights[2]))


@pytest.mark.fault("D3")
def test_clipping_applies_to_the_task_and_not_to_the_penalty(tmp_path):
    ewc = EWC(strength=1e5)
    steps, weights, it = added(tmp_path, ewc, max_grad_norm=1e-3)
    task = it.ftplus.strategies[0].kept
    norms = [torch.stack([g.float().norm() for g in gradients.values()]).norm().item() for gradients in task]
    assert max(norms) <= 1.001e-3
    assert_autograds(steps[2], penalty_gradient(ewc, weights[2]))
    assert torch.stack([g.norm() for g in steps[2].values()]).norm() > 10e-3


def test_under_a_gradient_scaler_the_step_is_the_unscaled_one():
    """fp16 training unscales before clipping, so hooks see true gradients. Here with the scaler itself, fp32 weights
    and a bare loop: a trainer in fp16 wants an accelerator (see the test marked gpu)."""

    def stepped(scaler):
        model = tiny_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        strategy, run = prepared(model, EWC(strength=100))
        for _ in range(3):
            batch = padded(random_rows(4, 384, seed=3), 4)[0]
            loss = model(**batch).loss
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.unscale_(optimizer)
            with torch.no_grad():
                strategy.before_step(run)
            scaler.step(optimizer) if scaler else optimizer.step()
            if scaler:
                scaler.update()
            optimizer.zero_grad()
        return {name: weight.detach() for name, weight in model.named_parameters()}

    scaled, plain = stepped(torch.amp.GradScaler("cpu", init_scale=2.0**12)), stepped(None)
    assert far(scaled, plain) < 1e-6
    assert far(plain, dict(tiny_llama().named_parameters())) > 1e-3


@pytest.fixture
def in_fp16(monkeypatch):
    """Has a trainer scale its loss, and autocast to fp16, as accelerate sets it up on a GPU."""

    def on(it, scale):
        it.accelerator.native_amp, it.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
        monkeypatch.setitem(vars(it.accelerator.state), "_mixed_precision", "fp16")
        it.args.fp16, it.args.mixed_precision = True, "fp16"
        return it

    return on


@pytest.mark.parametrize("clip", [0.0, 1e9])
def test_a_loss_scale_is_off_the_gradients_whether_or_not_they_are_clipped(tmp_path, in_fp16, clip):
    """The Trainer takes it off to clip, or to measure the norm; beside it the penalty was divided by 65,536."""

    def make(folder):
        return trainer(folder, EWC(strength=100), optim="sgd", learning_rate=0.1, max_grad_norm=clip)

    plain = make(tmp_path / "a")
    plain.train()
    scaled = in_fp16(make(tmp_path / "b"), 2.0**12)
    scaled.train()
    assert far(weights_of(scaled), weights_of(plain)) < 0.02 * far(
        dict(tiny_llama().named_parameters()), weights_of(plain)
    )


def test_a_step_that_fp16_skips_ends_no_run(tmp_path, in_fp16):
    """A scale that is still too large makes infinite gradients, and clipping makes nan of them."""
    it = in_fp16(trainer(tmp_path, EWC(strength=100), max_grad_norm=1.0, logging_steps=1, max_steps=4), 2.0**60)
    it.train()
    windows = [log for log in it.state.log_history if "ewc/penalty" in log]
    assert len(windows) == 4
    assert "ewc/grad_ratio" not in windows[0]
    assert it.accelerator.scaler.get_scale() < 2.0**60


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 training needs an accelerator")
def test_fp16_training_adds_the_unscaled_gradient(tmp_path):
    """Would prove that hooks come after the trainer's own unscaling, with weights on the device."""
    ewc = EWC(strength=1000)
    steps, weights, _ = added(tmp_path, ewc, use_cpu=False, fp16=True)
    assert_autograds(steps[2], penalty_gradient(ewc, weights[2]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_change_nothing(tmp_path, reentrant):
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    saving, plain = trainer(tmp_path / "a", "ewc", **kwargs), trainer(tmp_path / "b", "ewc")
    saving.train(), plain.train()
    assert far(weights_of(saving), weights_of(plain)) < 1e-5


@pytest.mark.fault("B7")
def test_bf16_weights_are_held_by_fp32_arithmetic(tmp_path):
    """The pull of a small move would vanish in bf16: importances stay fp32, and only the sum is rounded."""
    ewc = EWC(strength=1000)
    steps, weights, it = added(tmp_path, ewc, model=tiny_llama(dtype=torch.bfloat16), bf16=True)
    assert {weight.dtype for weight in it.model.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in ewc.importance.values()} == {torch.float32}
    expected = penalty_gradient(ewc, weights[2])
    for name in expected:
        error, allowed = (
            (steps[2][name] - expected[name]).norm(),
            0.02 * expected[name].norm() + 0.01 * 2**-8 * weights[2][name].numel() ** 0.5,
        )
        assert error <= allowed, name


def test_bf16_autocast_changes_the_fisher_little_and_the_anchor_not_at_all(tmp_path):
    half, full = trainer(tmp_path / "a", "ewc", bf16=True, max_steps=1), trainer(tmp_path / "b", "ewc", max_steps=1)
    half.train(), full.train()
    one, other = half.ftplus.strategies[0], full.ftplus.strategies[0]
    assert all(tensor.dtype == torch.float32 for tensor in one.state_dict().values())
    assert all(torch.equal(one.start[name], other.start[name]) for name in other.start)
    flat = [
        torch.cat([strategy.importance[name].flatten() for name in sorted(strategy.importance)])
        for strategy in (one, other)
    ]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.98
    assert flat[0].sum() / flat[1].sum() == pytest.approx(1, abs=0.05)


# ---- LoRA, frozen layers, tied embeddings ----------------------------------------------------------------------------


def prepared(model, strategy, batches=None, memory=None):
    """The strategy after prepare, without a trainer, and its Run."""
    batches = padded(random_rows(6, 384), 3) if batches is None else batches
    run = Run(
        model,
        trainable(model),
        {"it": batches} if batches else {},
        lambda rows: [],
        torch.device("cpu"),
        0,
        memory or Memory(),
    )
    strategy.prepare(run)
    return strategy, run


@pytest.mark.parametrize("accumulation", [1, 4])
def test_under_lora_the_gradient_is_autograds_through_the_change_of_the_weight(tmp_path, accumulation):
    ewc = EWC(strength=1e5)
    steps, weights, _ = added(
        tmp_path, ewc, peft_config=LoraConfig(**LORA), gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4 // accumulation, max_steps=4,
    )  # fmt: skip
    assert len(ewc.adapters) == 4
    assert not ewc.plain
    for name, adapter in ewc.adapters.items():
        A, B = (weights[3][f"{name}.lora_{part}.weight"].clone().requires_grad_() for part in "AB")
        rows, columns = ewc.importance[f"rows.{name}"], ewc.importance[f"columns.{name}"]
        moved_adapter = type(adapter)(adapter.layer, A, B, adapter.scale)
        (ewc.strength * lora_penalty(moved_adapter, None, rows, columns / columns.sum())).backward()
        for part, leaf in (("A", A), ("B", B)):
            assert leaf.grad.abs().max() > 1e-5
            found = steps[3][f"{name}.lora_{part}.weight"]
            assert (found - leaf.grad).abs().max() <= 2e-3 * leaf.grad.abs().max() + 1e-6, (name, part)


def test_a_fresh_adapter_is_held_although_its_own_fisher_would_be_zero(tmp_path):
    """B = 0 makes the gradient of A exactly 0, so a Fisher of A would hold nothing."""
    held, free = (
        trainer(tmp_path / str(i), *given, peft_config=LoraConfig(**LORA), learning_rate=0.02, max_steps=10)
        for i, given in enumerate(([EWC(strength=1e6)], []))
    )
    held.train(), free.train()

    def change(it):
        return sum((a.scale * a.B @ a.A).square().sum().item() for a in split(it.model)[1].values()) ** 0.5

    assert 0 < change(held) < 0.7 * change(free)


def test_modules_saved_whole_beside_an_adapter_are_held_too(tmp_path):
    ewc = EWC(strength=1000)
    config = LoraConfig(**LORA, modules_to_save=["model.norm"], task_type="CAUSAL_LM")
    steps, weights, _ = added(tmp_path, ewc, model=tiny_llama(tie=False), peft_config=config)
    assert list(ewc.plain) == ["model.norm.weight"]
    assert len(ewc.adapters) == 4
    expected = penalty_gradient(ewc, weights[2])
    assert_autograds({name: steps[2][name] for name in expected}, expected)


@pytest.mark.fault("D7")
def test_frozen_layers_cost_nothing_and_are_left_alone(tmp_path):
    model = tiny_llama()
    for layer in model.model.layers[:1]:
        layer.requires_grad_(False)
    ewc = EWC(strength=1000)
    steps, weights, it = added(tmp_path, ewc, model=model)
    assert ewc.start.keys() == trainable(it.model).keys()
    assert not any("layers.0." in name for name in ewc.importance)
    assert_autograds(steps[2], penalty_gradient(ewc, weights[2]))


@pytest.mark.fault("D5")
def test_a_tied_embedding_is_held_once(tmp_path):
    ewc = EWC(strength=1000)
    steps, weights, it = added(tmp_path, ewc)
    assert it.model.lm_head.weight is it.model.model.embed_tokens.weight
    assert "model.embed_tokens.weight" in ewc.start
    assert "lm_head.weight" not in ewc.start
    assert_autograds(steps[2], penalty_gradient(ewc, weights[2]))


@pytest.mark.parametrize(
    "layout",
    [{"packing": True, "packing_strategy": "wrapped"}, {"packing": True}, {"padding_free": True, "max_length": None}],
    ids=["wrapped", "packed", "padding-free"],
)
def test_packed_and_padding_free_training_is_held(tmp_path, layout):
    """Without FlashAttention rows attend across borders, as TRL warns; the penalty is the same all the same."""
    ewc = EWC(strength=1000)
    learn = [{"text": row["prompt"] + row["completion"]} for row in LEARN]
    steps, weights, _ = added(tmp_path, ewc, learn=learn, per_device_train_batch_size=2, **layout)
    assert_autograds(steps[2], penalty_gradient(ewc, weights[2]))


# ---- what it is for --------------------------------------------------------------------------------------------------


def test_ewc_forgets_less_than_plain_sft_at_equal_learning(tmp_path):
    """Plain fine-tuning is stopped where it has learnt as much as EWC learns in all its steps."""
    before, ewc_kept, ewc_learnt = sequence(tmp_path / "ewc", EWC(strength=100))
    for steps in (15, 20, 30, 60):
        _, plain_kept, plain_learnt = sequence(tmp_path / f"plain{steps}", steps=steps)
        if plain_learnt <= ewc_learnt:
            break
    assert plain_learnt <= ewc_learnt < 1.5
    assert ewc_kept - before < 0.6 * (plain_kept - before), (
        before,
        ewc_kept,
        plain_kept,
        ewc_learnt,
        plain_learnt,
        steps,
    )


def test_more_strength_is_less_drift(tmp_path):
    batches, drifts = padded(random_rows(8, 384), 4), []
    for strength in (0, 1e3, 1e4, 1e5):
        it = trainer(tmp_path / str(strength), EWC(strength=strength), protect=batches, max_steps=8)
        it.train()
        drifts.append(drift(tiny_llama(), it.model.eval(), batches))
    assert drifts == sorted(drifts, reverse=True)
    assert drifts[3] < 0.5 * drifts[0]


def test_predicted_drift_is_measured_drift_for_small_moves(tmp_path):
    """To second order and on average over directions; a diagonal cannot see how weights act together."""
    batches, ratios = padded(random_rows(16, 384), 8), []
    model, start = tiny_llama(), tiny_llama()
    strategy, run = prepared(model, EWC(strength=1), batches)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for (_, weight), origin in zip(model.named_parameters(), start.parameters(), strict=True):
                weight.copy_(origin + 1e-3 * torch.randn(weight.shape, generator=generator))
                weight.grad = torch.zeros_like(weight)
            strategy.before_step(run)
        ratios.append(strategy.metrics()["predicted_drift"] / drift(start, model, batches))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.25)


# ---- settings, figures, alarms ---------------------------------------------------------------------------------------


def test_figures_are_penalty_over_strength_and_the_ratio_of_gradients(tmp_path):
    ewc = EWC(strength=1000)
    steps, _, it = added(tmp_path, ewc, max_steps=2, max_grad_norm=0, logging_steps=2)
    (log,) = [log for log in it.state.log_history if "ewc/penalty" in log]
    assert log["ewc/predicted_drift"] == pytest.approx(log["ewc/penalty"] / 1000)
    task = it.ftplus.strategies[0].kept[1]
    expected = (
        torch.cat([g.flatten() for g in steps[1].values()]).norm()
        / torch.cat([g.flatten() for g in task.values()]).norm()
    )
    assert log["ewc/grad_ratio"] == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.fault("D6")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_held_weights_is_the_share_that_the_protect_data_says_something_about(lora):
    """Of an embedding that is not the head as well, only the rows of tokens that were seen."""
    model = tiny_llama(tie=False)
    model = get_peft_model(model, LoraConfig(**LORA)) if lora else model
    strategy, run = prepared(model, EWC(strength=1))
    if lora:  # a column that no input reaches
        strategy.importance["columns.model.layers.0.self_attn.q_proj"][:8] = 0
        strategy._hold(strategy.start, strategy.importance)
        full, one = sum(a.A.shape[1] * a.B.shape[0] for a in strategy.adapters.values()), 8 * 32
        expected = 1 - one / full
    else:
        seen = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in run.protect["it"]]).unique()
        total = sum(weight.numel() for weight in model.parameters())
        expected = 1 - (384 - len(seen)) * 32 / total
        assert 0.5 < expected < 0.9
    for weight in run.weights.values():
        weight.grad = torch.zeros_like(weight)
    strategy.before_step(run)
    assert strategy.metrics()["held_weights"] == pytest.approx(expected, abs=0.01)


def test_rows_limits_the_rows_looked_at(tmp_path):
    found, protect = [], PROTECT
    for strategy in (EWC(rows=5), EWC()):
        it = trainer(tmp_path, strategy, protect=protect, max_steps=1)
        it.train()
        found.append(strategy.importance)
        protect = first_rows(it.ftplus.run.protect["protect"], 5)
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-9) for name in found[0])
    assert EWC(rows=5).preview(prepared(tiny_llama(), EWC())[1])["rows"] == 5


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_the_preview_says_the_bytes_that_the_state_will_have(lora):
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA)) if lora else tiny_llama()
    strategy, run = prepared(model, EWC())
    preview = EWC().preview(run)
    assert preview["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in strategy.state_dict().values())
    assert preview["rows"] == 6
    assert 0 < preview["seconds"] < 60


def test_a_task_counts_the_same_however_many_rows_it_has():
    one, many = padded(random_rows(2, 384, seed=1), 1), padded(random_rows(6, 384, seed=2), 1)
    run = prepared(tiny_llama(), EWC(fisher="empirical"))[1]
    alone = []
    for tasks in ({"one": one}, {"many": many}, {"one": one, "many": many}):
        run.protect = tasks
        strategy = EWC(fisher="empirical")
        strategy.prepare(run)
        alone.append(strategy.importance)
    for name, both in alone[2].items():
        assert torch.allclose(both, (alone[0][name] + alone[1][name]) / 2, rtol=1e-4, atol=1e-10)


def test_a_penalty_that_stays_zero_is_an_alarm(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_ftplus"):
        trainer(tmp_path, "ewc", learning_rate=0.0, logging_steps=1, max_steps=4).train()
    assert (
        len([record for record in caplog.records if "the penalty stayed 0 for 3 logging windows" in record.message])
        == 1
    )


def test_no_alarm_while_it_acts(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_ftplus"):
        trainer(tmp_path, "ewc", logging_steps=1, max_grad_norm=0.0).train()
    assert not [record for record in caplog.records if record.name == "hf_ftplus"]


@pytest.mark.fault("D11")
def test_protect_data_that_no_trained_weight_matters_for_is_refused():
    class Deaf(torch.nn.Module):
        """In front of the LM head: nothing below it matters."""

        def forward(self, hidden):
            return hidden.detach() * 0 + 1

    model = tiny_llama(tie=False)
    model.lm_head.requires_grad_(False)
    model.model.norm = Deaf()
    with pytest.raises((DataError, RuntimeError), match=r"every importance to be 0|does not require grad"):
        prepared(model, EWC())


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "trains a prompt, "),
        (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "trains a prompt, "),
        (LoraConfig(**LORA, use_dora=True), r"trains .*q_proj\.lora_A.*"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), r"trains .*q_proj\.ia3_l.*"),
    ],
    ids=["prompt tuning", "prefix tuning", "DoRA", "IA3"],
)
def test_adapters_that_cannot_be_held_are_refused_before_training(tmp_path, config, found):
    with pytest.raises(IncompatibleError, match=rf"The adapter {found}.*Use plain LoRA or rsLoRA, or full fine-tuning"):
        trainer(tmp_path, "ewc", peft_config=config)


@pytest.mark.fault("D11")
@pytest.mark.parametrize(
    ("setting", "value"), [("strength", -1), ("strength", "nan"), ("rows", 0), ("decay", 1.5), ("fisher", "exact")]
)
def test_bad_settings_are_refused_by_name(setting, value):
    with pytest.raises(UsageError, match=rf"ewc\.{setting} is "):
        EWC(**{setting: value})


# ---- memory: one run after another -----------------------------------------------------------------------------------


def two_runs(folder, second=None, first=None, protect=PROTECT, **kwargs):
    one = trainer(folder / "one", first or EWC(remember=False), **kwargs)
    one.train()
    two = trainer(
        folder / "two",
        second or EWC(remember=False),
        model=one.model,
        memory=folder / "one" / "ftplus" / "memory",
        protect=protect,
        max_steps=1,
    )
    two.train()
    return one.ftplus.strategies[0], two.ftplus.strategies[0]


@pytest.mark.parametrize("decay", [1.0, 0.25, 0.0])
def test_importances_add_up_over_runs_with_decay(tmp_path, decay):
    one, two = two_runs(tmp_path, EWC(remember=False, decay=decay))
    again = tiny_llama()
    again.load_state_dict(two.start, strict=False)  # tied: the head comes with the embedding
    fresh = trainer(tmp_path / "fresh", EWC(remember=False), model=again, max_steps=1)
    fresh.train()
    fresh = fresh.ftplus.strategies[0]
    for name, tensor in two.importance.items():
        assert torch.allclose(tensor, decay * one.importance[name] + fresh.importance[name], rtol=1e-4, atol=1e-9), name


def test_the_anchor_of_the_second_run_is_where_the_first_ended(tmp_path):
    one, two = two_runs(tmp_path)
    assert far(one.start, dict(tiny_llama().named_parameters())) == 0
    assert far(two.start, one.start) > 1e-3


def test_memory_alone_protects_without_protect_data(tmp_path):
    one, two = two_runs(tmp_path, protect=None)
    assert all(torch.equal(two.importance[name], one.importance[name]) for name in one.importance)


def test_remember_leaves_the_next_run_what_this_one_learnt(tmp_path):
    (_, only), (_, learnt) = (
        two_runs(tmp_path / "a", protect=None),
        two_runs(tmp_path / "b", first=EWC(remember=True), protect=None),
    )
    more = [(learnt.importance[name] - only.importance[name]).min().item() for name in only.importance]
    assert min(more) >= -1e-9
    assert sum(tensor.sum() for tensor in learnt.importance.values()) > 1.2 * sum(
        tensor.sum() for tensor in only.importance.values()
    )


def test_the_first_of_several_runs_needs_nothing_to_protect_and_holds_nothing(tmp_path):
    one = trainer(tmp_path / "one", EWC(first=True, rows=8), protect=None)
    one.train()
    plain = trainer(tmp_path / "plain", protect=None)
    plain.train()
    assert far(weights_of(one), weights_of(plain)) == 0
    memory = tmp_path / "one" / "ftplus" / "memory"
    two = trainer(tmp_path / "two", EWC(), model=one.model, protect=None, memory=memory)
    two.train()
    assert sum(tensor.sum() for tensor in two.ftplus.strategies[0].importance.values()) > 0
    for first in (EWC(), EWC(first=True, remember=False)):
        with pytest.raises(DataError, match=r"nothing to protect.*self:256.*--set ewc\.first=true"):
            trainer(tmp_path / "refused", first, protect=None).train()


def test_what_could_not_be_remembered_is_refused_before_training(tmp_path):
    learn = [{"text": row["prompt"] + row["completion"]} for row in LEARN]
    packed = {"learn": learn, "padding_free": True, "max_length": None}
    with pytest.raises(IncompatibleError, match=r"one example at a time.*ewc\.fisher=sign.*ewc\.remember=false"):
        trainer(tmp_path, EWC(fisher="empirical"), **packed).train()
    it = trainer(tmp_path, EWC(fisher="empirical", remember=False), max_steps=1, **packed)
    it.train()
    assert it.state.global_step == 1
    it = trainer(tmp_path, EWC(rows=8))
    it.train_dataset = it.train_dataset.map(
        lambda row, i: {"labels": [-100] * len(row["labels"]) if i < 8 else row["labels"]}, with_indices=True
    )
    with pytest.raises(DataError, match=r"first 8 training rows teach.*ewc\.rows=N"):
        it.train()
    it.ftplus.strategies[0].rows = 9
    it.train()


def test_rows_without_labels_leave_the_next_run_only_what_was_protected(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_ftplus"):
        strategy, run = prepared(tiny_llama(), EWC(), memory=Memory(write=tmp_path / "memory"))
    assert "the next run gets no importances of what this one learns" in caplog.text
    strategy.finish(run)
    left = state.load_memory(tmp_path / "memory", "ewc", run)
    assert all(torch.equal(left[name], tensor) for name, tensor in strategy.importance.items())


def test_while_it_learns_what_to_remember_it_holds_no_importances_but_those(tmp_path, monkeypatch):
    """The optimizer's state is still there. Those of before, in host memory, are added in place, and come back."""
    strategy, run = prepared(tiny_llama(), EWC(strength=10), memory=Memory(write=tmp_path))
    run.learn = lambda rows: padded(random_rows(4, 384, seed=1), 2)
    made, left, before = {}, {}, {name: tensor.clone() for name, tensor in strategy.state_dict().items()}

    def looked(*args, **kwargs):
        assert not strategy.wells
        assert {tensor.device.type for tensor in strategy.importance.values()} == {"cpu"}
        found = fisher(*args, **kwargs)
        made.update({name: (tensor, tensor.clone()) for name, tensor in found.named()})
        return found

    monkeypatch.setattr("hf_ftplus.fisher.fisher", looked)
    monkeypatch.setattr(run.memory, "save", lambda name, tensors, run: left.update(tensors))
    strategy.finish(run)
    assert left.keys() == made.keys() == strategy.importance.keys()
    for name, (tensor, alone) in made.items():
        assert left[name] is tensor
        assert torch.equal(tensor, before[f"importance.{name}"] + alone)
    assert far(strategy.state_dict(), before) == 0
    for weight in run.weights.values():
        weight.data.add_(1e-3)
        weight.grad = torch.zeros_like(weight)
    now = {name: weight.detach() for name, weight in run.weights.items()}
    with torch.no_grad():
        strategy.before_step(run)
    assert_autograds({name: weight.grad for name, weight in run.weights.items()}, penalty_gradient(strategy, now))


def test_memory_of_another_model_is_refused(tmp_path):
    trainer(tmp_path / "one", "ewc", max_steps=1).train()
    with pytest.raises(IncompatibleError, match=r"left with another model.*differ.*--model_name_or_path"):
        trainer(
            tmp_path / "two", "ewc", model=tiny_llama(seed=9), memory=tmp_path / "one" / "ftplus" / "memory"
        ).train()


def test_memory_of_the_same_model_in_another_precision_is_taken(tmp_path):
    it = trainer(tmp_path / "one", "ewc")
    it.train()
    two = trainer(
        tmp_path / "two",
        "ewc",
        model=it.model.to(torch.bfloat16),
        memory=tmp_path / "one" / "ftplus" / "memory",
        protect=None,
        max_steps=1,
        bf16=True,
    )
    two.train()
    assert two.ftplus.strategies[0].importance.keys() == it.ftplus.strategies[0].importance.keys()


def test_memory_of_an_adapter_serves_a_new_adapter_on_the_merged_model(tmp_path):
    it = trainer(tmp_path / "one", "ewc", peft_config=LoraConfig(**LORA), learning_rate=0.02)
    it.train()
    merged = it.model.merge_and_unload()
    two = trainer(
        tmp_path / "two",
        "ewc",
        model=merged,
        peft_config=LoraConfig(**LORA),
        memory=tmp_path / "one" / "ftplus" / "memory",
        protect=None,
        max_steps=1,
    )
    two.train()
    assert set(two.ftplus.strategies[0].importance) == set(importance_names(*split(two.model)))


def test_memory_of_full_fine_tuning_serves_an_adapter_as_its_own_pass_would(tmp_path):
    """Row and column sums of the diagonal are what a pass under LoRA estimates: exactly so on short batches."""
    batches = padded(random_rows(8, 384), 1)
    whole, run = prepared(tiny_llama(), EWC(remember=False), batches, Memory(write=tmp_path))
    whole.finish(run)
    adapted, _ = prepared(get_peft_model(tiny_llama(), LoraConfig(**LORA)), EWC(remember=False), batches)
    without = Memory(read=tmp_path)
    given, _ = prepared(get_peft_model(tiny_llama(), LoraConfig(**LORA)), EWC(remember=False), [], without)
    assert given.importance.keys() == adapted.importance.keys()
    for name, sums in given.importance.items():
        kind, _, module = name.partition(".")
        diagonal = whole.importance[f"diagonal.{module}.weight"]
        assert torch.allclose(sums, diagonal.sum(1 if kind == "rows" else 0), rtol=1e-5)
        # both are random estimates of the same sums
        assert (sums.sum() / adapted.importance[name].sum()).log().abs() < 0.5


def test_what_a_run_does_not_hand_on_is_said(tmp_path, caplog):
    """Of q_proj and down_proj in two layers a run on q_proj alone remembers only that."""
    caplog.set_level("INFO", "hf_ftplus")
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    both, run = prepared(model, EWC(remember=False), memory=Memory(write=tmp_path))
    both.finish(run)
    assert "ends here" not in caplog.text
    fewer = get_peft_model(tiny_llama(), LoraConfig(**{**LORA, "target_modules": ["q_proj"]}))
    prepared(fewer, EWC(remember=False), [], Memory(read=tmp_path))
    assert "what it says of 2 weights that this run does not train ends here" in caplog.text


def test_memory_of_a_model_whose_weights_are_turned_serves_an_adapter():
    """GPT-2 keeps its weights as [in, out]."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    diagonal = torch.rand(32, 96)  # of c_attn, which makes 96 of 32
    name = "transformer.h.0.attn.c_attn"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    found = fitted({f"diagonal.{name}.weight": diagonal}, *split(adapted), adapted)
    assert torch.equal(found[f"rows.{name}"], diagonal.sum(0))
    assert torch.equal(found[f"columns.{name}"], diagonal.sum(1))


def test_memory_of_an_adapter_does_not_fit_full_fine_tuning(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    adapted, run = prepared(model, EWC(remember=False), memory=Memory(write=tmp_path))
    adapted.finish(run)
    with pytest.raises(IncompatibleError, match="The memory of ewc fits 0 of"):
        prepared(tiny_llama(), EWC(), [], Memory(read=tmp_path))
