"""SI records the line integral of the task's own gradient along the true path, and holds what earlier runs learnt."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import trl
from batches import padded, random_rows
from datasets import Dataset
from distributed.test_two_ranks import launch
from lawful import L2SP
from peft import LoraConfig
from reference import line_integral
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from training import LEARN, arguments, far, same, sequence, trainer, weights_of

import hf_ftplus
from hf_ftplus import EWC, Batch, Memory, Run, Strategy, StrategyCallback
from hf_ftplus.errors import DataError, IncompatibleError, StorageError, UsageError
from hf_ftplus.strategies.si import SI, Line
from hf_ftplus.testing import check_strategy
from hf_ftplus.weights import trainable

UNCLIPPED = {"max_grad_norm": 0.0}


class Watched(hf_ftplus.SFTTrainer):
    """Notes weights and gradients of every step as the backward pass leaves them: nothing clipped, nothing added."""

    path, gradients = (), ()

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            weights = trainable(self.model)
            self.path = [*self.path, copied(weights)]
            self.gradients = [
                *self.gradients,
                {name: w.grad.clone() for name, w in weights.items() if w.grad is not None},
            ]
        return loss


def copied(weights):
    return {name: weight.detach().clone() for name, weight in weights.items()}


def followed(folder, *strategies, **kwargs):
    """(SI's omega, the truth) of a run with `strategies`."""
    it = trainer(folder, *strategies, cls=Watched, **kwargs)
    it.train()
    (si,) = [strategy for strategy in it.ftplus.strategies if isinstance(strategy, SI)]
    return omega(si), line_integral([*it.path, copied(trainable(it.model))], it.gradients)


def omega(si):
    return {name: line.closed() for name, line in si.lines.items()}


def assert_equals(found, truth, rel=1e-4):
    """Each weight's omega, to a small part of the largest: what fp32 leaves of sums with both signs."""
    assert found.keys() == truth.keys()
    size = torch.cat([tensor.flatten() for tensor in truth.values()]).norm()
    assert size > 0
    for name, tensor in truth.items():
        assert (found[name].double() - tensor).norm() <= rel * tensor.norm() + 1e-6 * size, name


def memory_of(folder):
    """What a run left, without what tells models apart."""
    return {
        name: tensor
        for name, tensor in load_file(folder / "ftplus" / "memory" / "si.safetensors").items()
        if name in trainable(tiny_llama())
    }


def bare(model, strategy, clip=1.0, **kwargs):
    """The strategy after prepare, without a trainer, and its Run."""
    memory = kwargs.pop("memory", None) or Memory()
    run = Run(model, trainable(model), {}, lambda rows: [], torch.device("cpu"), 0, memory, clip=clip, **kwargs)
    strategy.prepare(run)
    return strategy, run


# ---- the line integral -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("followed", [False, True], ids=["by parts", "followed"])
@pytest.mark.parametrize("shape", [(7,), (600, 500)])  # one piece, and several
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_omega_is_the_line_integral_by_hand_on_a_quadratic(shape, dtype, followed):
    generator = torch.Generator().manual_seed(0)
    curvature, at = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    last = weight.detach().float().clone() if followed else torch.zeros(shape)
    line = Line(weight, weight.detach().clone(), torch.zeros(shape), last, followed=followed)
    optimizer = torch.optim.SGD([weight], lr=0.3, momentum=0.9)
    path, gradients = [], []
    for _ in range(5):
        weight.grad = (curvature * (weight.detach().float() - at)).to(dtype)
        path.append({"w": weight.detach().clone()}), gradients.append({"w": weight.grad.clone()})
        None if followed else line.read(1.0)
        optimizer.step()
        line.follow(1.0) if followed else None
    path.append({"w": weight.detach().clone()})
    truth = line_integral(path, gradients)
    assert line.omega.dtype == torch.float32
    assert_equals({"w": line.closed()}, truth, 1e-5)
    assert line.total().item() == pytest.approx(truth["w"].sum().item(), rel=1e-4)


def test_omegas_sum_up_to_the_fall_of_the_loss_for_small_steps():
    model, batch = tiny_llama(), padded(random_rows(8, 384), 8)[0]
    si, run = bare(model, SI())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        loss.backward()
        si.read_gradients(run), optimizer.step(), si.after_step(run), optimizer.zero_grad()
        losses.append(loss.item())
    fall = losses[0] - model(**batch).loss.item()
    assert fall > 0.1
    assert si.metrics()["explained"] == pytest.approx(fall, rel=0.01)


@pytest.mark.fault("D3")
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_it_follows_adam_and_weight_decay_and_undoes_clipping(tmp_path, clip):
    found, truth = followed(tmp_path, SI(), max_grad_norm=clip, weight_decay=0.3, learning_rate=0.01)
    assert_equals(found, truth)


@pytest.mark.parametrize(("where", "clip"), [("before", 0.1), ("after", 0.0)])
def test_what_others_add_to_gradients_is_not_the_tasks(tmp_path, where, clip):
    others = [L2SP(strength=3.0), EWC(strength=1000)]
    strategies = [*others, SI()] if where == "before" else [SI(), *others]
    found, truth = followed(tmp_path, *strategies, max_grad_norm=clip)
    assert_equals(found, truth)


@pytest.mark.parametrize("others", [[], [L2SP(strength=3.0)]], ids=["alone", "after another"])
def test_its_own_pull_is_not_the_tasks(tmp_path, others):
    """Alone it reads and adds in one pass, behind others in two; the figures' step is always in two."""
    one = trainer(tmp_path / "one", SI())
    one.train()
    again = {"model": one.model, "memory": tmp_path / "one" / "ftplus" / "memory", "max_grad_norm": 0.1}
    found, truth = followed(tmp_path / "two", *others, SI(strength=100.0), **again)
    assert_equals(found, truth)


def test_one_pass_and_two_give_the_same_bits(tmp_path):
    one = trainer(tmp_path / "one", SI())
    one.train()
    start = copied(one.model.state_dict())
    left = []
    for steps in (1, 100):  # figures at every step, and at the last one only
        one.model.load_state_dict(start)
        it = trainer(
            tmp_path / str(steps),
            SI(strength=10.0),
            model=one.model,
            memory=tmp_path / "one/ftplus/memory",
            logging_steps=steps,
        )
        it.train()
        left.append(weights_of(it) | it.ftplus.strategies[0].state_dict())
    assert same(*left)


def test_rows_at_once_and_accumulated_give_the_same_omega(tmp_path):
    layouts = [(8, 1), (2, 4)]
    (whole, _), (parts, truth) = [
        followed(
            tmp_path / str(rows),
            SI(),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=times,
            optim="sgd",
            learning_rate=0.05,
        )
        for rows, times in layouts
    ]
    assert_equals(parts, truth)
    assert_equals(whole, truth, 1e-3)


def test_steps_that_a_scaler_skips_leave_no_trace():
    """fp16 overflows: gradients are not finite, weights stay, after_step is not called."""

    def taken(scaler):
        model, batch = tiny_llama(), padded(random_rows(4, 384), 4)[0]
        si, run = bare(model, SI())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        skipped, steps = 0, 0
        while steps < 3:
            optimizer.zero_grad()
            scaler.scale(model(**batch).loss).backward()
            scaler.unscale_(optimizer)
            run.clip = 1.0 / torch.as_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).clamp(min=1)
            run.device = torch.device("cuda")  # on a CPU no step is ever skipped
            before = copied(run.weights)
            si.read_gradients(run)
            scaler.step(optimizer), scaler.update()
            if same(before, copied(run.weights)):
                skipped += 1
                continue
            si.after_step(run)
            steps += 1
        return omega(si), skipped

    (plain, none), (scaled, some) = (
        taken(torch.amp.GradScaler("cpu", enabled=False)),
        taken(torch.amp.GradScaler("cpu", init_scale=2.0**127)),
    )
    assert none == 0
    assert some > 0
    assert_equals(scaled, {name: tensor.double() for name, tensor in plain.items()}, 1e-3)


def test_an_optimizer_that_changes_gradients_is_refused(tmp_path):
    """SGD's foreach step with nesterov leaves g + momentum * buffer in .grad: ten times as much at a momentum of 0.9."""
    for foreach in (False, True):
        model = tiny_llama()
        sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, foreach=foreach)
        it = trainer(tmp_path / str(foreach), SI(), model=model, max_steps=2)
        it.optimizer = sgd
        if foreach:
            with pytest.raises(IncompatibleError, match="foreach=False"):
                it.train()
        else:
            it.train()


@pytest.mark.parametrize("clip", [torch.tensor(0.0), torch.tensor(float("nan"))])
def test_a_gradient_that_was_clipped_away_counts_for_nothing(clip):
    model = tiny_llama()
    si, run = bare(model, SI(), clip=clip)
    for weight in run.weights.values():
        weight.grad = torch.full_like(weight, float("nan"))
    si.read_gradients(run)
    with torch.no_grad():
        for weight in run.weights.values():
            weight.mul_(1.1)
    si.after_step(run)
    assert not any(tensor.any() for tensor in omega(si).values())


@pytest.mark.fault("D7")
@pytest.mark.parametrize("followed", [False, True], ids=["by parts", "followed"])
def test_a_weight_without_gradient_in_some_steps_is_followed(followed):
    weight = torch.nn.Parameter(torch.ones(3))
    last = torch.ones(3) if followed else torch.zeros(3)
    line = Line(weight, torch.ones(3), torch.zeros(3), last, followed=followed)
    for gradient, move in ((torch.ones(3), 0.5), (None, 7.0), (torch.ones(3), 0.25)):
        weight.grad = gradient
        None if followed else line.read(1.0)
        weight.data.sub_(move)
        line.follow(1.0) if followed else None
    assert line.closed().tolist() == [0.75] * 3


def test_whatever_moves_weights_after_the_optimizer_counts_to_its_step(tmp_path):
    """And omega alone is followed after the step, which is shorter."""

    @dataclass
    class Shrink(Strategy):
        name: ClassVar[str] = "shrink"

        def after_step(self, run):
            with torch.no_grad():
                for weight in run.weights.values():
                    weight.mul_(0.999)

    for order in ([SI(), Shrink()], [Shrink(), SI()]):
        it = trainer(tmp_path / order[0].name, *order, cls=Watched)
        it.train()
        si = next(strategy for strategy in order if isinstance(strategy, SI))
        assert not si.alone
        assert_equals(omega(si), line_integral([*it.path, copied(trainable(it.model))], it.gradients))
    it = trainer(tmp_path / "alone", SI())
    it.train()
    assert it.ftplus.strategies[0].alone


def test_a_tied_embedding_counts_once_and_frozen_layers_not(tmp_path):
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    found, truth = followed(tmp_path, SI(), model=model)
    assert "lm_head.weight" not in found
    assert not any("layers.0." in name for name in found)
    assert_equals(found, truth)


def test_bf16_weights_are_summed_in_fp32_and_a_warning_says_what_is_lost(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_ftplus"):
        found, truth = followed(tmp_path, SI(), model=tiny_llama(dtype=torch.bfloat16), bf16=True)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert_equals(found, truth, 5e-3)  # clipping rounded the gradient to 8 bits
    assert any("weights are kept in 16 bits" in record.message for record in caplog.records)


# ---- as a callback ---------------------------------------------------------------------------------------------------


def as_callback(folder, **kwargs):
    return trainer(folder, cls=trl.SFTTrainer, callbacks=[StrategyCallback(SI(), **kwargs.pop("given", {}))], **kwargs)


@pytest.mark.fault("D3")
def test_a_callback_refuses_gradients_that_were_clipped(tmp_path):
    with pytest.raises(IncompatibleError, match=r"si needs the gradients .*attach\(trainer, 'si'.*--max_grad_norm 0"):
        as_callback(tmp_path, max_grad_norm=1.0).train()


def test_as_a_callback_without_clipping_it_is_the_same_bit_for_bit(tmp_path):
    inside, outside = trainer(tmp_path / "one/a", SI(), **UNCLIPPED), as_callback(tmp_path / "one/b", **UNCLIPPED)
    inside.train(), outside.train()
    assert same(memory_of(tmp_path / "one/a"), memory_of(tmp_path / "one/b"))
    memory = tmp_path / "one/a/ftplus/memory"
    inside = trainer(tmp_path / "two/a", SI(), model=inside.model, memory=memory, **UNCLIPPED)
    outside = as_callback(tmp_path / "two/b", model=outside.model, given={"memory": memory}, **UNCLIPPED)
    inside.train(), outside.train()
    assert same(weights_of(inside), weights_of(outside))
    assert same(memory_of(tmp_path / "two/a"), memory_of(tmp_path / "two/b"))


@dataclass
class Again(Strategy):
    """Adds the loss of the task once more."""

    name: ClassVar[str] = "again"

    def token_loss(self, run: Run, batch: Batch) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(batch.logits(batch.hidden).float(), batch.labels, reduction="sum")


def test_what_another_adds_to_the_loss_is_credited_too_and_said(tmp_path, caplog):
    """Twice the loss at half the rate is the same path, and explains twice as much."""
    how = {"optim": "sgd", "lr_scheduler_type": "constant", **UNCLIPPED}
    alone = trainer(tmp_path / "alone", SI(), learning_rate=0.02, **how)
    with caplog.at_level(logging.INFO, "hf_ftplus"):
        alone.train()
        assert "adds to the loss" not in caplog.text
        beside = trainer(tmp_path / "beside", SI(), Again(), learning_rate=0.01, **how)
        beside.train()
    assert "si: again adds to the loss, so importances also count what lowered that" in caplog.text
    assert far(weights_of(alone), weights_of(beside)) < 1e-5
    single, double = (omega(it.ftplus.strategies[0]) for it in (alone, beside))
    assert_equals(double, {name: 2 * tensor for name, tensor in single.items()}, rel=1e-3)


# ---- memory: one run after another -----------------------------------------------------------------------------------


def test_a_first_run_only_records_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hf_ftplus"):
        it, plain = trainer(tmp_path / "a", SI()), trainer(tmp_path / "b", cls=trl.SFTTrainer)
        it.train(), plain.train()
    assert same(weights_of(it), weights_of(plain))
    assert any("si: no --memory of an earlier run, so nothing is protected" in r.message for r in caplog.records)
    assert not any("si/penalty" in log for log in it.state.log_history)
    assert memory_of(tmp_path / "a").keys() == trainable(it.model).keys()


def test_importance_is_relu_of_omega_over_the_damped_square_of_the_way(tmp_path):
    decaying = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 2.0}  # uphill for some weights
    found, truth = followed(tmp_path / "one", SI(damping=0.5), **decaying)
    it = trainer(tmp_path / "again", SI(damping=0.5), **decaying)  # the same run, for its weights
    it.train()
    way = {
        name: weight.detach() - dict(tiny_llama().named_parameters())[name]
        for name, weight in trainable(it.model).items()
    }
    flat = torch.cat([d.flatten() for d in way.values()])
    xi = 0.5 * flat[flat != 0].square().mean()
    assert any((tensor < 0).any() for tensor in truth.values())
    left = memory_of(tmp_path / "one")
    for name, importance in left.items():
        assert torch.allclose(importance, found[name].relu() / (way[name].square() + xi), rtol=1e-4, atol=1e-9), name
        assert importance.min() >= 0


@pytest.mark.parametrize("decay", [0.25, 0.0])
def test_importances_add_up_over_runs_with_decay(tmp_path, decay):
    one = trainer(tmp_path / "one", SI())
    one.train()
    start = copied(one.model.state_dict())
    two = trainer(
        tmp_path / "two", SI(decay=decay, strength=0.0), model=one.model, memory=tmp_path / "one/ftplus/memory"
    )
    two.train()
    alone = trainer(tmp_path / "alone", SI(), model=tiny_llama())
    alone.model.load_state_dict(start)
    alone.train()
    first, both, second = (memory_of(tmp_path / name) for name in ("one", "two", "alone"))
    assert far(weights_of(two), weights_of(alone)) == 0
    for name in first:
        assert torch.allclose(both[name], decay * first[name] + second[name], rtol=1e-5), name


def test_it_holds_the_weights_where_the_run_found_them_by_twice_the_strength(tmp_path):
    """The gradient of strength * sum importance (w - w*)^2, by autograd, at every step."""
    one = trainer(tmp_path / "one", SI())
    one.train()
    si, run = bare(one.model, SI(strength=3.0), memory=Memory(read=tmp_path / "one/ftplus/memory"))
    start = copied(run.weights)
    with torch.no_grad():
        for weight in run.weights.values():
            weight.mul_(1.05)
            weight.grad = torch.zeros_like(weight)
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in run.weights.items()}
    importance = memory_of(tmp_path / "one")
    penalty = 3.0 * sum((importance[name] * (leaf - start[name]).square()).sum() for name, leaf in leaves.items())
    penalty.backward()
    with torch.no_grad():
        si.read_gradients(run), si.before_step(run)
    for name, leaf in leaves.items():
        assert torch.allclose(run.weights[name].grad, leaf.grad, rtol=1e-5, atol=1e-7), name
    assert si.metrics()["penalty"] == pytest.approx(penalty.item(), rel=1e-4)


def test_a_second_run_forgets_less_than_plain_sft_at_equal_learning(tmp_path):
    """With the default settings; plain fine-tuning is stopped where it has learnt as much as SI learns in all its steps."""
    before, held_kept, held_learnt = sequence(tmp_path / "si", SI(), first_with=[SI()], protect=False)
    for steps in (30, 45, 60, 90):
        _, plain_kept, plain_learnt = sequence(tmp_path / f"plain{steps}", steps=steps)
        if plain_learnt <= held_learnt:
            break
    assert plain_learnt <= held_learnt < 1.0
    assert held_kept - before < 0.5 * (plain_kept - before), (before, held_kept, plain_kept, held_learnt, plain_learnt)


@pytest.mark.fault("B2")
def test_memory_of_another_model_or_of_another_strategy_is_refused(tmp_path):
    trainer(tmp_path / "one", SI(), max_steps=1).train()
    memory = tmp_path / "one" / "ftplus" / "memory"
    with pytest.raises(IncompatibleError, match="left with another model"):
        trainer(tmp_path / "two", SI(), model=tiny_llama(seed=9), memory=memory).train()
    trainer(tmp_path / "ewc", EWC(remember=False), max_steps=1).train()
    with pytest.raises(StorageError, match=r"holds no memory of 'si' \(found: \['ewc'\]\)"):
        trainer(tmp_path / "two", SI(), memory=tmp_path / "ewc" / "ftplus" / "memory").train()


def test_a_run_that_moves_nothing_says_so_and_its_memory_is_refused(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_ftplus"):
        it = trainer(tmp_path / "one", SI(), learning_rate=0.0, max_steps=1)
        it.train()
    assert any("si: no weight moved in this run" in record.message for record in caplog.records)
    with pytest.raises(DataError, match=r"The memory of si in .* is 0 throughout"):
        trainer(tmp_path / "two", SI(), model=it.model, memory=tmp_path / "one" / "ftplus" / "memory").train()


def test_with_the_best_checkpoint_put_back_the_memory_is_of_the_path_to_it(tmp_path):
    def run(folder, steps, **kwargs):
        kwargs = {
            "lr_scheduler_type": "constant",
            "max_steps": steps,
            "save_strategy": "steps",
            "save_steps": 2,
            **kwargs,
        }
        it = hf_ftplus.SFTTrainer(
            tiny_llama(), args=arguments(folder, **kwargs), train_dataset=Dataset.from_list(LEARN),
            eval_dataset=Dataset.from_list(LEARN[:4]), processing_class=tiny_tokenizer(), strategies=[SI()],
        )  # fmt: skip
        it.train()
        return weights_of(it), memory_of(folder)

    earliest = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "load_best_model_at_end": True}
    best = run(tmp_path / "best", 6, eval_strategy="steps", eval_steps=2, **earliest)
    short, whole = run(tmp_path / "short", 2), run(tmp_path / "whole", 6)
    assert same(best[0], short[0])
    assert same(best[1], short[1])
    assert not same(best[1], whole[1])


# ---- settings, figures, alarms, refusals -----------------------------------------------------------------------------


def test_figures_are_the_penalty_the_ratio_of_gradients_and_what_the_path_explains(tmp_path):
    one = trainer(tmp_path / "one", SI(), logging_steps=6)
    one.train()
    (log,) = [log for log in one.state.log_history if "si/explained" in log]
    assert log["si/explained"] == pytest.approx(
        sum(t.sum().item() for t in omega(one.ftplus.strategies[0]).values()), rel=1e-3
    )
    two = trainer(
        tmp_path / "two",
        SI(strength=5.0),
        cls=Watched,
        model=one.model,
        memory=tmp_path / "one/ftplus/memory",
        max_steps=3,
        logging_steps=3,
        **UNCLIPPED,
    )
    two.train()
    (log,) = [log for log in two.state.log_history if "si/penalty" in log]
    importance = memory_of(tmp_path / "one")
    way = {name: two.path[2][name] - two.path[0][name] for name in importance}
    pull = torch.cat([(10.0 * importance[name] * way[name]).flatten() for name in way]).norm()
    task = torch.cat([two.gradients[2][name].flatten() for name in way]).norm()
    assert log["si/penalty"] == pytest.approx(
        sum((5.0 * importance[name] * way[name].square()).sum().item() for name in way), rel=1e-3
    )
    assert log["si/grad_ratio"] == pytest.approx((pull / task).item(), rel=1e-3)


@pytest.mark.parametrize("rate", [0.0, 3e-3])
def test_a_penalty_that_stays_zero_is_an_alarm(tmp_path, caplog, rate):
    one = trainer(tmp_path / "one", SI())
    one.train()
    with caplog.at_level(logging.WARNING, "hf_ftplus"):
        trainer(
            tmp_path / "two",
            SI(),
            model=one.model,
            memory=tmp_path / "one/ftplus/memory",
            learning_rate=rate,
            logging_steps=1,
            max_steps=4,
        ).train()
    rung = [record for record in caplog.records if "the penalty stayed 0 for 3 logging windows" in record.message]
    assert len(rung) == (rate == 0)


@pytest.mark.parametrize("second", [False, True], ids=["first run", "second run"])
def test_the_preview_says_the_bytes_that_the_state_will_have(tmp_path, second):
    it = trainer(tmp_path, SI(), max_steps=1)
    it.train()
    memory = Memory(read=tmp_path / "ftplus" / "memory") if second else None
    si, run = bare(it.model, SI(), memory=memory)
    assert SI().preview(run)["bytes"] == sum(t.numel() * t.element_size() for t in si.state_dict().values())


def test_an_adapter_is_refused_with_the_reason_and_what_to_use(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(IncompatibleError, match=r"si cannot follow an adapter: .* Use --plugin ewc.* or fine-tune all"):
        trainer(tmp_path, SI(), peft_config=config).train()


@pytest.mark.parametrize(("setting", "value"), [("strength", -1), ("damping", 0), ("damping", "nan"), ("decay", 1.5)])
def test_bad_settings_are_refused_by_name(setting, value):
    with pytest.raises(UsageError, match=rf"si\.{setting} is "):
        SI(**{setting: value})


# ---- everywhere ------------------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_si_keeps_every_law_on_one_process_and_two():
    check_strategy(SI())


@pytest.mark.dist
def test_on_shards_it_is_what_it_is_on_whole_weights(tmp_path):
    """fully_shard over two processes, with clipping: sums, importances and figures of one process."""
    from distributed.ranks import si

    one, (first, second) = si(tmp_path / "one"), launch("si", tmp_path)
    assert same(first, second)
    assert first.keys() == one.keys()
    for name, tensor in one.items():
        assert (first[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
