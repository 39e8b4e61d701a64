"""What goes wrong when something is added to training on today's stack, and does not go wrong here.

Only what no other test file holds: scaling of penalties is in test_ewc.py, resume and rotation in test_trainer.py,
names in test_weights.py, two processes in distributed/.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import trl
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset, IterableDataset
from lawful import L2SP, Quarter, SmallLogits
from tiny import tiny_llama, tiny_tokenizer
from training import LEARN, PROTECT, Diary, arguments, far, moved, same, trainer, weights_of
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

from hf_ftplus import EWC, SFTTrainer, Strategy, StrategyCallback, attach, setting, testing
from hf_ftplus.errors import IncompatibleError
from hf_ftplus.strategy import refuse_deepspeed

GENTLE = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}


# ---- scaling ---------------------------------------------------------------------------------------------------------


class Untold(Trainer):
    """A trainer whose model takes no loss arguments, so that no number of tokens is handed to the loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert num_items_in_batch is None
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_without_a_token_count_the_trainer_divides_by_accumulation_and_we_follow(tmp_path):
    """Then the loss is a mean per micro-batch, divided by the accumulation steps; an extra loss must be one too."""
    rows = [tiny_tokenizer()(f"{i % 10} lanterns for the harbour") for i in range(16)]
    length = min(len(row["input_ids"]) for row in rows)
    rows = [{key: value[:length] for key, value in row.items()} for row in rows]  # means of means are means only then
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        args = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            seed=5,
            **GENTLE,
        )
        it = Untold(
            tiny_llama(),
            args,
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            processing_class=tiny_tokenizer(),
            data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        )
        attach(it, SmallLogits(strength=1.0)).train()
        found.append(weights_of(it))
    assert far(*found) < 1e-6


def test_a_short_last_window_counts_its_own_tokens(tmp_path):
    """12 rows: a step of 8 and one of 4, whether the second is one batch or two micro-batches of four."""
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        it = trainer(
            tmp_path / str(size), SmallLogits(strength=1.0), protect=None, learn=LEARN[:12],
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=2, **GENTLE,
        )  # fmt: skip
        it.train()
        assert it.state.epoch == 1
        found.append(weights_of(it))
    assert far(*found) < 1e-6


@pytest.mark.dist
def test_an_extra_loss_gets_the_world_factor_of_the_task_loss():
    """With tokens averaged across devices the task loss is multiplied by the number of processes before DDP divides."""
    testing.check_strategy(SmallLogits(), laws=[testing.law_same_anywhere])


def test_a_penalty_that_is_not_finite_is_not_filtered_out_of_the_log(tmp_path):
    """Trainers replace a NaN loss in the log by the average so far; a run would look healthy and be dead."""

    @dataclass
    class Poison(Strategy):
        """Fine for two steps."""

        name: ClassVar[str] = "poison"

        def token_loss(self, run, batch):
            return batch.hidden.sum() * (float("nan") if run.step >= 2 else 0.0)

    with pytest.raises(IncompatibleError, match="loss is nan at step"):
        trainer(tmp_path, Poison(), protect=None, logging_nan_inf_filter=True).train()

    @dataclass
    class Gauge(Strategy):
        """Its figure breaks."""

        name: ClassVar[str] = "gauge"

        def metrics(self):
            return {"penalty": float("inf")}

    with pytest.raises(IncompatibleError, match=r"gauge/penalty is inf at step"):
        trainer(tmp_path, Gauge(), protect=None).train()


# ---- one forward pass, with graph ------------------------------------------------------------------------------------


@dataclass
class Forwards(Strategy):
    """Counts forward passes of the backbone, and whether hidden states carry a graph."""

    name: ClassVar[str] = "forwards"
    teach: bool = setting(False, "run the model once more inside the loss")

    def __post_init__(self):
        super().__post_init__()
        self.seen, self.count = [], 0

    def prepare(self, run):
        run.model.model.register_forward_hook(self._one)

    def _one(self, *_):
        self.count += 1

    def token_loss(self, run, batch):
        self.seen.append((self.count, batch.hidden.requires_grad, batch.hidden.shape[0] == len(batch.labels)))
        if self.teach:
            with torch.no_grad():
                run.model(input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"])
        self.count = 0
        return 0.1 * batch.logits(batch.hidden).square().sum()


def test_an_extra_loss_costs_no_second_forward_and_has_a_gradient(tmp_path):
    """Asking the trainer for its outputs gives logits without graph and a second forward pass: distillation that
    trains nothing, with no error."""
    counter = Forwards()
    trainer(tmp_path, counter, protect=None, gradient_accumulation_steps=2, max_steps=2).train()
    assert counter.seen == [(1, True, True)] * 4


def test_a_teachers_pass_inside_the_loss_is_not_taken_for_the_students(tmp_path):
    """The same module run again, as with an adapter turned off, fires the same hook."""
    alone, taught = (trainer(tmp_path / str(teach), Forwards(teach=teach), protect=None) for teach in (False, True))
    alone.train(), taught.train()
    assert same(weights_of(alone), weights_of(taught))
    assert taught._hidden == []


def test_the_hook_is_gone_after_training_and_back_for_more(tmp_path):
    it = trainer(tmp_path, SmallLogits(), protect=None, max_steps=1)
    it.train()
    assert not it.model.model._forward_hooks
    it.train()  # a second call trains again, with the loss
    assert not it.model.model._forward_hooks


def test_the_hook_is_gone_after_a_crash(tmp_path):
    @dataclass
    class Crash(Strategy):
        """Raises."""

        name: ClassVar[str] = "crash"

        def token_loss(self, run, batch):
            raise KeyError("lost")

    it = trainer(tmp_path, Crash(), protect=None)
    with pytest.raises(Exception, match="lost"):
        it.train()
    assert not it.model.model._forward_hooks
    assert it._hidden == []


@pytest.mark.fault("E9")
def test_an_extra_loss_follows_packed_rows_by_their_labels(tmp_path):
    """A padding-free batch is one row without attention mask; supervised positions are told by labels alone."""

    @dataclass
    class Same(SmallLogits):
        """Compares what it is given with a forward pass of its own."""

        name: ClassVar[str] = "same"

        def token_loss(self, run, batch):
            assert batch.inputs["input_ids"].shape[0] == 1
            assert "attention_mask" not in batch.inputs
            with torch.no_grad():
                logits = run.model(**{key: batch.inputs[key] for key in ("input_ids", "position_ids")}).logits[0, :-1]
            mask = batch.inputs["labels"][0, 1:] != -100
            assert torch.equal(batch.labels, batch.inputs["labels"][0, 1:][mask])
            assert torch.allclose(batch.logits(batch.hidden), logits[mask].float(), atol=1e-5)
            return super().token_loss(run, batch)

    learn = [{"prompt": row["prompt"], "completion": row["completion"]} for row in LEARN]
    it = trainer(tmp_path, Same(), protect=None, learn=learn, padding_free=True, max_length=None, max_steps=2)
    it.train()
    assert moved(it) > 0


def test_an_lm_head_with_an_adapter_is_refused_in_words(tmp_path):
    """Its weight alone is not what the model says."""
    from peft import LoraConfig, get_peft_model

    from hf_ftplus.logits import lm_head

    model = get_peft_model(tiny_llama(tie=False), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(IncompatibleError, match=r"Take 'lm_head' out of target_modules"):
        lm_head(model)


# ---- state, resume, logging ------------------------------------------------------------------------------------------


def test_nothing_of_a_strategy_goes_through_the_trainers_own_callback_state(tmp_path):
    """That state is JSON only, is restored into new objects by class name, and only if asked for."""
    it = trainer(
        tmp_path,
        cls=trl.SFTTrainer,
        callbacks=[StrategyCallback("ewc", protect=PROTECT)],
        save_strategy="steps",
        save_steps=3,
    )
    it.train()
    kept = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert not any("Strategy" in name for name in kept)
    callback = next(c for c in it.callback_handler.callbacks if isinstance(c, StrategyCallback))
    again = trainer(
        tmp_path,
        cls=trl.SFTTrainer,
        callbacks=[callback],
        save_strategy="steps",
        save_steps=3,
        restore_callback_states_from_checkpoint=True,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback in again.callback_handler.callbacks  # the very object, and where it was


@pytest.mark.fault("C1")
def test_a_strategy_that_is_new_on_resume_is_refused_rather_than_anchored_late(tmp_path):
    trainer(tmp_path, cls=trl.SFTTrainer, save_strategy="steps", save_steps=3).train()
    it = trainer(tmp_path, "ewc", save_strategy="steps", save_steps=3)
    with pytest.raises(IncompatibleError, match="holds no strategy state"):
        it.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_figures_reach_callbacks_that_run_before_ours(tmp_path):
    """Trackers run before a user's callbacks, and the history is written before both: figures must be in by then."""
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    it = trainer(tmp_path, "ewc", callbacks=[Tracker()])
    it.train()
    assert [log["ewc/penalty"] for log in seen if "loss" in log] == [
        log["ewc/penalty"] for log in it.state.log_history if "loss" in log
    ]


def test_resuming_a_mixture_in_its_second_epoch_continues_its_stream(tmp_path):
    """A sampler that loses its epoch seed on resume draws the first epoch's rows again."""
    common = {
        "max_steps": 13,
        "save_strategy": "steps",
        "save_steps": 11,
        "per_device_train_batch_size": 4,
        "learn": LEARN,
    }  # 8 steps an epoch
    whole = trainer(tmp_path, Quarter(), **common)
    whole.train()
    assert whole.state.epoch > 1.5
    resumed = trainer(tmp_path, Quarter(), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-11"))
    assert same(weights_of(whole), weights_of(resumed))


# ---- gradients and the optimizer step --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["trainer", "callback"])
def test_after_step_sees_moved_weights_and_the_gradient_that_moved_them(tmp_path, how):
    """By the end of a step gradients are gone; SI needs both, at the same step number as before."""

    @dataclass
    class Step(Strategy):
        """Recomputes plain SGD."""

        name: ClassVar[str] = "step"

        def __post_init__(self):
            self.off = []

        def before_step(self, run):
            self.rate, self.at = run.learning_rate, run.step
            self.before = {name: (weight.detach().clone(), weight.grad.clone()) for name, weight in run.weights.items()}

        def after_step(self, run):
            assert run.step == self.at
            for name, weight in run.weights.items():
                old, gradient = self.before[name]
                assert torch.equal(weight.grad, gradient)
                self.off.append((old - self.rate * gradient - weight).abs().max().item())

    step = Step()
    sgd = {**GENTLE, "max_steps": 3}
    if how == "trainer":
        trainer(tmp_path, step, protect=None, **sgd).train()
    else:
        trainer(tmp_path, cls=trl.SFTTrainer, callbacks=[StrategyCallback(step)], **sgd).train()
    assert len(step.off) == 3 * len(list(tiny_llama().parameters()))
    assert max(step.off) < 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_fp16_skips_is_no_step(fused, tmp_path):
    """Nothing moved, so after_step must not be told that it did. accelerate sees a step that GradScaler leaves out, and
    not a fused one, which leaves itself out."""
    model, diary = tiny_llama(), Diary()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), fused=fused), scaler=scaler)
    callback = StrategyCallback(L2SP())
    callback.strategies, callback.seconds, callback.added = [diary], {"diary": 0.0}, True
    callback.run = SimpleNamespace(step=0, weights=dict(model.named_parameters()))
    args, state = trainer(tmp_path).args, SimpleNamespace(global_step=0, logging_steps=1, max_steps=9)
    for overflows in (True, False):
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, float("inf") if overflows else 1.0)
        scaler.scale(torch.zeros(()))
        callback.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
        optimizer.step()
        callback.on_optimizer_step(args, state, None, optimizer=optimizer)
        assert ("after_step" in dict(diary.entries)) is not overflows


def test_a_callback_and_the_trainer_agree_under_clipping(tmp_path):
    """A penalty in the loss would be clipped with it, one added by a callback would not, and the two would differ."""
    ours = trainer(tmp_path / "a", EWC(strength=1e5), max_grad_norm=1e-2)
    theirs = trainer(
        tmp_path / "b",
        cls=trl.SFTTrainer,
        callbacks=[StrategyCallback(EWC(strength=1e5), protect=PROTECT)],
        max_grad_norm=1e-2,
    )
    ours.train(), theirs.train()
    assert same(weights_of(ours), weights_of(theirs))


@pytest.mark.fault("D9")
def test_deepspeed_is_refused_where_what_acts_between_backward_and_step_finds_nothing_whole():
    """There backward() already steps: an injected gradient would come too late, in silence."""
    for stage, why in ((3, "ZeRO-3 keeps every weight in parts"), (0, "without ZeRO shows no gradient")):
        with pytest.raises(IncompatibleError, match=rf"ewc acts on weights between backward .* {why}.*zero2, fsdp2"):
            refuse_deepspeed([SmallLogits(), EWC()], stage)
    for stage in (1, 2):
        refuse_deepspeed([SmallLogits(), EWC()], stage)
    refuse_deepspeed([SmallLogits(), Quarter()], 0)


def test_memory_is_written_also_when_the_trainer_loads_its_best_checkpoint_at_the_end(tmp_path):
    best = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    it = SFTTrainer(
        tiny_llama(),
        args=arguments(tmp_path, load_best_model_at_end=True, **best),
        train_dataset=Dataset.from_list(LEARN),
        eval_dataset=Dataset.from_list(LEARN[:4]),
        processing_class=tiny_tokenizer(),
        strategies=["ewc"],
        protect=PROTECT,
    )
    it.train()
    assert (tmp_path / "ftplus" / "memory" / "manifest.json").is_file()
    assert it.state.best_model_checkpoint


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_a_task_column_decides_the_mixture_although_it_never_reaches_a_batch(tmp_path):
    """Collators pick their own columns, so a row's task is looked up by its index instead."""
    rows = [{**row, "task": "even" if i % 2 else "odd"} for i, row in enumerate(LEARN)]

    @dataclass
    class Evens(Strategy):
        """Only every other row."""

        name: ClassVar[str] = "evens"

        def mix(self, run, shares):
            assert shares == {"odd": 0.5, "even": 0.5}
            return {"odd": 0.0, "even": 1.0}

    it = trainer(tmp_path, Evens(), protect=None, learn=rows)
    assert all(index % 2 for index in it._get_train_sampler())
    assert "task" not in next(iter(it.get_train_dataloader()))
    it.train()


def test_a_stream_of_rows_is_trained_on_and_held(tmp_path):
    """A dataset without length has no sampler and no first rows to look at again."""
    stream = IterableDataset.from_generator(lambda: iter(LEARN * 4))
    it = SFTTrainer(
        tiny_llama(),
        args=arguments(tmp_path),
        train_dataset=stream,
        processing_class=tiny_tokenizer(),
        strategies=["ewc"],
        protect=PROTECT,
    )
    it.train()
    free = SFTTrainer(tiny_llama(), args=arguments(tmp_path), train_dataset=stream, processing_class=tiny_tokenizer())
    free.train()
    assert 0 < moved(it) < moved(free)
