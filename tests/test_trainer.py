"""Strategies act inside every kind of Trainer, at the moments of the contract, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import transformers
import trl
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from held import held
from lawful import Sorry
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama, tiny_mixtral, tiny_tokenizer
from training import LEARN, PROTECT, Diary, arguments, far, moved, same, trainer, weights_of
from transformers import DataCollatorForLanguageModeling, LlamaForCausalLM, Trainer, TrainingArguments

from hf_ftplus import EWC, SI, Distill, Replay, SFTTrainer, Strategy, StrategyCallback, attach, commit, setting
from hf_ftplus.batches import examples_of
from hf_ftplus.disk import LOCK, locked
from hf_ftplus.errors import DataError, IncompatibleError, PluginError, StorageError, UsageError
from hf_ftplus.logits import causal_lm
from hf_ftplus.precision import autocast
from hf_ftplus.refusals import clipping, devices_of, offloads, refuse, refuse_answers, refuse_parted
from hf_ftplus.specs import TaskSpec


def test_without_strategies_training_is_trls_bit_for_bit(tmp_path):
    ours, theirs = trainer(tmp_path / "a"), trainer(tmp_path / "b", cls=trl.SFTTrainer)
    ours.train(), theirs.train()
    assert same(weights_of(ours), weights_of(theirs))
    assert moved(ours) > 0.1
    assert [log["loss"] for log in ours.state.log_history if "loss" in log] == [
        log["loss"] for log in theirs.state.log_history if "loss" in log
    ]


@pytest.mark.parametrize("given", [("ewc", {"rows": 8}), ["ewc"], "ewc", EWC, {"ewc": {"rows": 8}}], ids=str)
def test_one_strategy_may_be_said_in_any_way(tmp_path, given):
    ours = SFTTrainer(tiny_llama(), args=arguments(tmp_path), train_dataset=Dataset.from_list(LEARN), processing_class=tiny_tokenizer(), strategies=given, protect=PROTECT)  # fmt: skip
    theirs = attach(
        trainer(tmp_path, cls=trl.SFTTrainer),
        given if not isinstance(given, dict) else ("ewc", given["ewc"]),
        protect=PROTECT,
    )
    assert [it.ftplus.strategies[0].name for it in (ours, theirs)] == ["ewc", "ewc"]


def test_clipping_is_told_to_those_whom_it_concerns(tmp_path):
    clipped = arguments(tmp_path, max_grad_norm=1.0)
    for strategies, protect, memory, said in (
        ([EWC()], True, False, True),
        ([EWC()], False, True, True),
        ([EWC(first=True)], False, False, False),
        ([EWC(strength=0)], True, False, False),
        ([SI()], True, False, False),
        ([SI()], False, True, True),
        ([Distill(), Replay()], True, False, False),
    ):
        assert bool(clipping(strategies, clipped, protect, memory)) is said, strategies
        assert not clipping(strategies, arguments(tmp_path, max_grad_norm=0.0), protect, memory)


def test_no_strategies_are_none(tmp_path):
    args, rows = arguments(tmp_path), Dataset.from_list(LEARN)
    it = SFTTrainer(tiny_llama(), args=args, train_dataset=rows, processing_class=tiny_tokenizer(), strategies=None)
    assert it.ftplus is None


@pytest.mark.parametrize("strategies", [(), ("distill",)])
def test_lora_of_experts_trains_as_in_trl(tmp_path, strategies):
    """Two parameters of one module have an adapter each, and both are saved."""
    targets = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": ["q_proj"]}
    how = {"peft_config": LoraConfig(r=2, **targets), "save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    ours = trainer(tmp_path / "a", *strategies, model=tiny_mixtral(), **how)
    theirs = trainer(tmp_path / "b", model=tiny_mixtral(), cls=trl.SFTTrainer, **how)
    ours.train(), theirs.train()
    assert same(weights_of(ours), weights_of(theirs)) == (not strategies)
    assert (tmp_path / "a" / "checkpoint-3" / "adapter_model.safetensors").is_file()


def test_the_moments_come_in_the_order_of_the_contract(tmp_path):
    diary = Diary()
    trainer(tmp_path, diary, max_steps=2, gradient_accumulation_steps=2).train()
    step = ["token_loss", "token_loss", "read_gradients", "before_step", "after_step"]
    assert [hook for hook, _ in diary.entries] == ["mix", "prepare", *step, *step, "finish"]
    assert [s for hook, s in diary.entries if hook == "before_step"] == [0, 1]
    assert [s for hook, s in diary.entries if hook == "token_loss"] == [0, 0, 1, 1]


@dataclass
class Reader(Strategy):
    """Notes the gradients of each step, and by how much they were clipped."""

    name: ClassVar[str] = "reader"

    def __post_init__(self):
        self.norms, self.clips = [], []

    def read_gradients(self, run):
        self.norms.append(torch.stack([w.grad.norm() for w in run.weights.values() if w.grad is not None]).norm())
        self.clips.append(run.clip)


def test_gradients_are_read_before_any_strategy_adds_to_them(tmp_path):
    behind, alone = Reader(), Reader()
    trainer(tmp_path / "a", EWC(strength=1e5), behind, max_steps=1, max_grad_norm=0.0).train()
    trainer(tmp_path / "b", alone, max_steps=1, max_grad_norm=0.0).train()
    assert behind.norms == alone.norms
    assert alone.clips == [1.0]


def test_the_clip_factor_undoes_clipping(tmp_path):
    clipped, free = Reader(), Reader()
    trainer(tmp_path / "a", clipped, max_steps=1, max_grad_norm=0.1).train()
    trainer(tmp_path / "b", free, max_steps=1, max_grad_norm=0.0).train()
    assert clipped.clips[0] < 0.5
    torch.testing.assert_close(clipped.norms[0] / clipped.clips[0], free.norms[0], rtol=1e-6, atol=0)
    unknown = Reader()
    trainer(tmp_path / "c", cls=trl.SFTTrainer, callbacks=[StrategyCallback(unknown)], max_steps=1).train()
    assert unknown.clips == [None]


def test_a_strategy_that_only_watches_changes_nothing(tmp_path):
    watched, plain = trainer(tmp_path / "a", Diary()), trainer(tmp_path / "b")
    watched.train(), plain.train()
    assert same(weights_of(watched), weights_of(plain))


def test_metrics_reach_the_log_before_any_tracker(tmp_path):
    it = trainer(tmp_path, "ewc", logging_steps=3)
    it.train()
    logs = [log for log in it.state.log_history if "loss" in log]
    assert len(logs) == 2
    assert all(log["ewc/penalty"] > 0 and log["ewc/grad_ratio"] > 0 for log in logs)
    assert 0 < logs[0]["ewc/held_weights"] <= 1
    assert "ewc/penalty" not in it.state.log_history[-1]  # the summary at the end is not a logging window


@pytest.mark.parametrize(
    ("figure", "logged"),
    [(torch.tensor(2.5), [2.5]), (torch.ones(2), []), (10**400, []), ("2.5", [])],
    ids=["tensor", "two numbers", "huge", "text"],
)
def test_a_figure_is_logged_as_a_number_or_left_out_and_ends_no_run(tmp_path, figure, logged, caplog):
    @dataclass
    class Figure(Strategy):
        """Says one figure."""

        name: ClassVar[str] = "figure"

        def metrics(self):
            return {"it": figure}

    it = trainer(tmp_path, Figure(), logging_steps=6, save_strategy="steps", save_steps=6)
    it.train()
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert [log["figure/it"] for log in saved["log_history"] if "figure/it" in log] == logged
    assert ("figure says no figures, and training goes on" in caplog.text) is not bool(logged)


@pytest.mark.parametrize("how", ["name", "object", "name and settings", "mapping", "class", "class alone"])
def test_strategies_are_given_as_a_user_would(tmp_path, how):
    given = {
        "name": ["ewc"], "object": [EWC(strength=5.0)], "name and settings": [("ewc", {"strength": 5})],
        "mapping": {"ewc": {"strength": "5"}}, "class": [EWC], "class alone": EWC,
    }[how]  # fmt: skip
    it = SFTTrainer(
        tiny_llama(), args=arguments(tmp_path), train_dataset=Dataset.from_list(LEARN), processing_class=tiny_tokenizer(),
        strategies=given, protect=PROTECT,
    )  # fmt: skip
    (strategy,) = it.ftplus.strategies
    assert strategy.strength == (5.0 if how in ("object", "name and settings", "mapping") else EWC().strength)


@pytest.mark.parametrize("how", ["SFTTrainer", "attach"])
def test_what_only_a_strategy_reads_is_said_to_do_nothing_without_one(tmp_path, how, caplog):
    given = {"protect": PROTECT, "memory": tmp_path}
    it = trainer(tmp_path, **given) if how == "SFTTrainer" else attach(trainer(tmp_path, cls=trl.SFTTrainer), **given)
    assert "protect= and memory=: nothing without a strategy, and training is plain" in caplog.text
    caplog.clear()
    attach(it, "ewc", protect=PROTECT)
    trainer(tmp_path, protect=None)
    assert "nothing without a strategy" not in caplog.text


# ---- attach ----------------------------------------------------------------------------------------------------------


def test_attach_gives_what_the_subclass_gives(tmp_path):
    attached = attach(trainer(tmp_path / "a", cls=trl.SFTTrainer), "ewc", protect=PROTECT)
    subclass, plain = trainer(tmp_path / "b", "ewc"), trainer(tmp_path / "c")
    for it in (attached, subclass, plain):
        it.train()
    assert same(weights_of(attached), weights_of(subclass))
    assert moved(attached) < 0.9 * moved(plain)


def attached(folder, *strategies, protect, **kwargs):
    return attach(trainer(folder, cls=trl.SFTTrainer, **kwargs), *strategies, protect=protect)


@pytest.mark.parametrize("how", [trainer, attached], ids=["SFTTrainer", "attach"])
@pytest.mark.parametrize("more", [{}, {"packing": True}], ids=["plain", "packed"])
@pytest.mark.parametrize("strategy", ["ewc", "replay"])
def test_protect_rows_that_are_learnt_too_are_said_once(tmp_path, caplog, how, more, strategy):
    how(tmp_path / "one", strategy, protect={"old": PROTECT}, max_steps=1, **more).train()
    assert "are learnt, too" not in caplog.text
    how(tmp_path / "two", strategy, protect={"old": [*PROTECT, *LEARN[:5]]}, max_steps=1, **more).train()
    assert caplog.text.count("old: 5 of its 21 protect rows are learnt, too, word for word.") == 1


class FailsToEvaluate(SFTTrainer):
    def evaluate(self, *args, **kwargs):
        raise RuntimeError("evaluation failed")


def _protecting(folder, protect, **kwargs):
    """The protect micro-batches of a run, as its strategy is given them."""
    it = trainer(folder, EWC(strength=1), protect=protect, max_steps=1, **kwargs)
    it.train()
    return it.ftplus.run.protect


@pytest.mark.parametrize("length", [None, 64])
def test_protect_rows_are_cut_where_learn_rows_are(tmp_path, length):
    row = {"prompt": "Say: ", "completion": "a word" * 400}
    whole = len(tiny_tokenizer()(row["prompt"] + row["completion"] + "<|im_end|>")["input_ids"])
    (batch,) = _protecting(tmp_path, [row], max_length=length)["protect"]
    assert whole > 1024
    assert batch["input_ids"].shape[1] == (length or whole)


def test_a_task_spec_reads_its_rows_as_it_says(tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"question": "Why?", "answer": "Because."}\n')
    spec = TaskSpec(
        "asked",
        str(tmp_path / "asked.jsonl"),
        through=lambda seed: lambda row: {"prompt": row["question"], "completion": row["answer"]},
    )
    (batch,) = _protecting(tmp_path, {"asked": spec})["asked"]
    assert "Because." in tiny_tokenizer().decode(batch["input_ids"][0])


def test_a_failure_before_the_save_leaves_no_half_checkpoint(tmp_path):
    it = trainer(tmp_path, "ewc", cls=FailsToEvaluate, save_strategy="steps", save_steps=2, eval_strategy="no")
    it.eval_dataset, it.args.eval_strategy = it.train_dataset, "steps"
    it.args.eval_steps = it.state.eval_steps = 2
    with pytest.raises(RuntimeError, match="evaluation failed"):
        it.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.fault("A6")
@pytest.mark.parametrize("strategies", [(), ("ewc",)], ids=["plain", "EWC"])
def test_a_script_keeps_out_of_a_folder_that_another_run_writes_to(tmp_path, strategies):
    it = trainer(tmp_path, *strategies, save_strategy="steps", save_steps=3)
    with held(tmp_path), pytest.raises(StorageError, match=r"is in use by another run \(pid 1 on elsewhere\)"):
        it.train()
    assert it.state.global_step == 0
    assert not list(tmp_path.glob("checkpoint-*"))
    it.train()
    assert not (tmp_path / LOCK).exists()
    with locked(tmp_path):  # a process may ask for what it has
        it.train(resume_from_checkpoint=True)
        assert (tmp_path / LOCK).is_file()


@pytest.mark.fault("A4")
def test_the_last_checkpoint_stays_although_another_is_the_best_and_one_is_asked_for(tmp_path):
    """What follows training may fail yet, and has it to go on from; the Trainer would have deleted it."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # the first
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    it = trainer(tmp_path, held_out=Dataset.from_list(LEARN), save_total_limit=1, **saving, **best)
    it.train()
    assert it.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    assert it.args.save_total_limit == 1


def test_nodes_with_disks_of_their_own_are_refused_to_strategies(tmp_path):
    args = arguments(tmp_path, save_on_each_node=True)
    refuse([], args)
    with pytest.raises(IncompatibleError, match="save_on_each_node: what strategies remember"):
        refuse([EWC()], args)


def test_a_callback_is_not_fooled_by_a_checkpoint_elsewhere(tmp_path):
    def make(folder, lr):
        callback = StrategyCallback("ewc", protect=PROTECT)
        return trainer(
            folder, cls=trl.SFTTrainer, callbacks=[callback], save_strategy="steps", save_steps=2, learning_rate=lr
        )

    make(tmp_path / "here", 3e-3).train(), make(tmp_path / "there", 1e-3).train()
    again = make(tmp_path / "here", 1e-3)
    with pytest.raises(IncompatibleError, match="a callback is not told which"):
        again.train(resume_from_checkpoint=str(tmp_path / "there" / "checkpoint-2"))
    make(tmp_path / "here", 3e-3).train(resume_from_checkpoint=str(tmp_path / "here" / "checkpoint-2"))


def test_a_callback_in_an_untouched_script_gives_the_same_weights(tmp_path):
    callback = trainer(tmp_path / "a", cls=trl.SFTTrainer, callbacks=[StrategyCallback("ewc", protect=PROTECT)])
    subclass = trainer(tmp_path / "b", "ewc")
    callback.train(), subclass.train()
    assert same(weights_of(callback), weights_of(subclass))
    assert any("ewc/penalty" in log for log in callback.state.log_history)


def plain_trainer(folder, cls=Trainer, **kwargs):
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(row["prompt"] + row["completion"]) for row in LEARN]
    defaults = {
        "output_dir": str(folder), "max_steps": 4, "learning_rate": 3e-3, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 2, "seed": 5,
    }  # fmt: skip
    return cls(
        tiny_llama(), TrainingArguments(**{**defaults, **kwargs}), train_dataset=Dataset.from_list([dict(r) for r in rows]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), processing_class=tokenizer,
    )  # fmt: skip


class OwnLoss(Trainer):
    """A user's subclass that overrides compute_loss and keeps count, and whose `train` takes fewer arguments."""

    calls = 0

    def train(self, resume_from_checkpoint=None, **kwargs):
        return super().train(resume_from_checkpoint, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        loss = super().compute_loss(model, inputs, return_outputs=False, num_items_in_batch=num_items_in_batch)
        return loss * 1.5


@pytest.mark.parametrize("cls", [Trainer, OwnLoss])
def test_attach_serves_a_plain_trainer_and_a_users_own(tmp_path, cls):
    held = attach(plain_trainer(tmp_path / "a", cls), EWC(strength=1e5), Diary(), protect=PROTECT)
    free = plain_trainer(tmp_path / "b", cls)
    held.train(), free.train()
    assert moved(held) < 0.8 * moved(free)
    assert {hook for hook, _ in held.ftplus.strategies[1].entries} >= {
        "token_loss",
        "before_step",
        "after_step",
        "finish",
    }
    if cls is OwnLoss:
        assert held.calls == free.calls == 4
        assert isinstance(held, OwnLoss)


def test_attach_serves_dpo(tmp_path):
    rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No."} for row in LEARN]

    def dpo(folder):
        args = trl.DPOConfig(
            str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=3e-3, use_cpu=True, bf16=False,
            report_to="none", gradient_checkpointing=False, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        return trl.DPOTrainer(
            tiny_llama(),
            ref_model=tiny_llama(),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )

    held, free = attach(dpo(tmp_path / "a"), EWC(strength=1e6), protect=PROTECT), dpo(tmp_path / "b")
    held.train(), free.train()
    assert 0 < moved(held) < 0.8 * moved(free)


def test_a_loss_on_outputs_says_that_it_needs_labels(tmp_path):
    class Unlabelled(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits.mean()

        def get_train_dataloader(self):
            return [{"input_ids": torch.tensor([[5, 6, 7]])}] * 4

    it = attach(plain_trainer(tmp_path, Unlabelled), "distill", protect=PROTECT)
    with pytest.raises(IncompatibleError, match=r"distill compares at labels.* this Unlabelled have input_ids\. Use"):
        it.train()


def test_a_model_in_parts_is_refused_where_parts_would_be_taken_for_the_whole(tmp_path):
    it = trainer(tmp_path / "a")
    it.model._tp_size = 2
    for strategy in ("ewc", "si", "distill"):
        with pytest.raises(IncompatibleError, match=f"{strategy} cannot tell .* over 2 processes.*without it"):
            attach(it, strategy, protect=PROTECT)
        it.ftplus = None
    attach(it, Replay(share=0.2), protect=PROTECT)
    it = trainer(tmp_path / "b")
    it.args._n_gpu = 2
    with pytest.raises(IncompatibleError, match=r"distill reads .* 2 devices .*--num_processes 2"):
        attach(it, "distill", protect=PROTECT)
    refuse([Distill()], it.args)  # as `ftplus compare` asks, which gives each of its cells one device


def test_parallelism_is_refused_where_whole_rows_or_weights_are_needed(tmp_path, monkeypatch):
    args, it = arguments(tmp_path), trainer(tmp_path)

    def refused(*strategies):
        with pytest.raises(IncompatibleError) as found:
            refuse(list(strategies), args)
        return str(found.value)

    args.parallelism_config = ParallelismConfig(cp_size=2)
    assert "distill needs whole rows, which context parallelism splits over 2 processes" in refused(EWC(), Distill())
    refuse([EWC(), SI(), Replay(share=0.2)], args)  # they see whole protect rows, and gradients that are whole again
    args.parallelism_config = ParallelismConfig(tp_size=4)
    assert "ewc cannot tell the parts of a weight that tensor parallelism" in refused(EWC())
    with pytest.raises(IncompatibleError, match=r"tensor parallelism \(tp_size: 4\) the model can neither be measured"):
        refuse_answers(args, "")
    args.parallelism_config = None
    for absent in (None, {}, {"autotp_size": None}, {"autotp_size": "auto"}, {"autotp_size": 1}):
        args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"tensor_parallel": absent})
        refuse([SI()], args)
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"tensor_parallel": {"autotp_size": 2}})
    assert "si cannot tell" in refused(SI())
    args.deepspeed_plugin = None
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    refuse([EWC()], args)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    assert "ewc, distill needs whole rows, which sequence parallelism" in refused(EWC(), Distill())
    refuse([Replay(share=0.2)], args)
    with pytest.raises(IncompatibleError, match=r"sequence parallelism \(sp_size: 2\) .* exists instead of self:N"):
        attach(it, Replay(share=0.2), protect="self:4")


@pytest.mark.parametrize(
    ("places", "devices"),
    [
        ([0, 1], ["0", "1"]),
        (["cuda:0", torch.device("cuda", 1), 1], ["cuda:0", "cuda:1"]),
        (["xpu:1", "cpu", "disk"], ["xpu:1", "cpu", "disk"]),
        ([0, "cuda:0", "cuda", torch.device("cuda")], ["0"]),
        (["cpu", torch.device("cpu")], ["cpu"]),
        ([], []),
    ],
)
def test_a_device_named_twice_is_one(places, devices):
    model = tiny_llama()
    model.hf_device_map = {f"model.layers.{n}": place for n, place in enumerate(places)}
    assert devices_of(model) == devices


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_on_several_devices_of_one_process_is_refused_by_what_compares_tensors(lora, tmp_path):
    """TRL loads a model by its name with device_map="auto", on all devices that it finds."""
    it = trainer(tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM") if lora else None)
    causal_lm(it.model).hf_device_map = {"model": 0, "lm_head": "cuda:1"}
    says = r" compares .* 2 devices of one process \(0, cuda:1\).*device_map=\{'': 0\}.*accelerate launch.*--fsdp_version 2"
    for strategy in ("ewc", "si", "distill"):
        with pytest.raises(IncompatibleError, match=strategy + says):
            attach(it, strategy, protect=PROTECT)
        it.ftplus = None
    attach(it, Replay(share=0.2), protect=PROTECT)
    it.ftplus = None
    causal_lm(it.model).hf_device_map = {"": "cpu"}
    attach(it, "ewc", protect=PROTECT)


def test_weights_that_fsdp_keeps_in_cpu_memory_are_refused_before_a_model_loads(tmp_path, monkeypatch):
    def told(**given):
        args = arguments(tmp_path)
        args.fsdp_plugin_args, args.distributed_state = given or None, SimpleNamespace(distributed_type="MULTI_GPU")
        return args

    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    for use, offload in ((None, "true"), ("true", "false"), ("true", "true")):
        monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", offload)
        if use:
            monkeypatch.setenv("ACCELERATE_USE_FSDP", use)
        assert offloads(told()) == (use == offload == "true")
    assert not offloads(told(cpu_offload=False))
    assert not offloads(arguments(tmp_path))  # on CPUs
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.delenv("FSDP_OFFLOAD_PARAMS")
    assert not offloads(told(fsdp_version=2))
    for strategy in (EWC(), SI(), Distill()):
        with pytest.raises(
            IncompatibleError, match=f"{strategy.name} works on the device.*Set fsdp_offload_params: false"
        ):
            refuse([strategy], told(cpu_offload=True))
    refuse([Replay(share=0.2)], told(cpu_offload=True))
    existing, written = TaskSpec.parse("protect.jsonl"), TaskSpec.parse("self:8")
    for rows, spec, says in ((4, existing, "--measure-rows 0"), (0, written, "instead of self:N")):
        config = SimpleNamespace(training=told(cpu_offload=True), measure_rows=rows, protect=[spec])
        with pytest.raises(IncompatibleError, match=f"Under FSDP with weights in CPU memory.*nor write rows.*{says}"):
            refuse_parted(config)
    refuse_parted(SimpleNamespace(training=told(cpu_offload=True), measure_rows=0, protect=[existing]))


def test_under_fsdp_no_row_is_written_that_is_mixed_before_training(tmp_path):
    it = trainer(tmp_path)
    it.is_fsdp_enabled = True
    with pytest.raises(IncompatibleError, match=r"under FSDP the model can write none.*instead of self:N"):
        attach(it, Replay(share=0.2), protect="self:4")


def test_what_cannot_be_attached_to_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"got str; expected a transformers\.Trainer"):
        attach("trainer", "ewc")
    it = trainer(tmp_path, "ewc")
    with pytest.raises(UsageError, match="already has strategies"):
        attach(it, "ewc")
    with pytest.raises(UsageError, match="given twice"):
        trainer(tmp_path, "ewc", EWC(strength=2))


def test_a_memory_in_the_home_is_looked_for_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert StrategyCallback("ewc", memory="~/run/ftplus/memory").memory == tmp_path / "run" / "ftplus" / "memory"


def test_a_callback_refuses_what_it_cannot_serve():
    with pytest.raises(IncompatibleError, match=r"diary uses token_loss.*hf_ftplus\.attach"):
        StrategyCallback(Diary())


# ---- losses on outputs -----------------------------------------------------------------------------------------------


@dataclass
class LogitPull(Strategy):
    """Squared logits, a loss on outputs that anybody can recompute."""

    name: ClassVar[str] = "pull"
    strength: float = setting(0.01, "pull of logits towards zero", low=0)

    def token_loss(self, run, batch):
        assert batch.hidden.requires_grad
        assert batch.logits(batch.hidden).shape == (len(batch.labels), 384)
        return self.strength * batch.logits(batch.hidden).square().sum()


def test_batch_8x1_and_2x4_give_the_same_update(tmp_path):
    layouts = [(8, 1), (2, 4)]
    found = []
    for size, accumulation in layouts:
        it = trainer(
            tmp_path / str(size), LogitPull(), EWC(strength=100), optim="sgd", learning_rate=0.1, max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        it.ftplus.protect = [it.data_collator([it.train_dataset[i] for i in range(8)])]  # the same Fisher batches
        it.train()
        found.append(weights_of(it))
    assert far(*found) < 1e-6


class MeanOfBatches(Trainer):
    """Says of its loss that it is of a batch alone, though it is told the tokens of all."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


class PartOfStep(MeanOfBatches):
    """Divides its loss itself, and is told no number of tokens."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) / self.current_gradient_accumulation_steps


@pytest.mark.skipif(not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="transformers 5.19 reads it")
@pytest.mark.parametrize("kind", [MeanOfBatches, PartOfStep])
def test_batch_8x1_and_2x4_give_the_same_update_in_a_trainer_that_scales_its_loss_itself(tmp_path, kind):
    rows = [{"input_ids": row, "labels": row} for row in ([i + 5, 6, 7 * i + 9, 8] for i in range(8))]
    found = []
    for size, accumulation in [(8, 1), (2, 4)]:
        given = TrainingArguments(
            str(tmp_path), optim="sgd", learning_rate=0.1, max_steps=2, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, use_cpu=True, report_to="none", save_strategy="no",
        )  # fmt: skip
        it = attach(kind(tiny_llama(), given, train_dataset=Dataset.from_list(rows)), LogitPull(1.0))
        it.train()
        found.append(weights_of(it))
    assert far(*found) < 1e-6


def test_a_step_without_a_token_to_learn_trains_as_in_trl(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 8
    it = trainer(tmp_path, LogitPull(), learn=rows, dataset_kwargs={"skip_prepare_dataset": True}, max_steps=1)
    before = weights_of(it)
    it.train()
    assert same(before, weights_of(it))


def test_a_token_loss_has_the_gradient_of_its_definition(tmp_path):
    """One SGD step of the trainer against autograd on the loss written out from full logits."""
    start = tiny_llama()
    it = trainer(
        tmp_path,
        LogitPull(),
        optim="sgd",
        learning_rate=1.0,
        max_steps=1,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        protect=None,
    )
    sampler = next(iter(it.get_train_dataloader()))
    batch = {key: value for key, value in sampler.items() if key in ("input_ids", "labels", "attention_mask")}
    torch.manual_seed(5)
    it.train()
    step = {
        n: (a.detach() - b.detach()) for (n, a), b in zip(start.named_parameters(), it.model.parameters(), strict=True)
    }
    candidates = []
    for rows in it.get_train_dataloader():
        start.zero_grad()
        logits = start(rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
        targets = rows["labels"][:, 1:]
        kept = targets != -100
        (
            torch.nn.functional.cross_entropy(logits[kept], targets[kept])
            + 0.01 * logits[kept].square().sum() / kept.sum()
        ).backward()
        candidates.append(max((step[n] - w.grad).abs().max().item() for n, w in start.named_parameters()))
    assert min(candidates) < 1e-5  # one of the batches is the one that was drawn
    assert batch


def test_a_token_loss_stays_out_of_the_evaluation_loss(tmp_path):
    losses = []
    for strategies in ([], [LogitPull(strength=10.0)]):
        it = trainer(tmp_path, *strategies, protect=None)
        losses.append(it.evaluate(Dataset.from_list(LEARN[:4]))["eval_loss"])
    assert losses[0] == losses[1]


# ---- mixture ---------------------------------------------------------------------------------------------------------


@dataclass
class Quarter(Strategy):
    """A quarter of the rows from protect."""

    name: ClassVar[str] = "quarter"
    share: float = setting(0.25, "share of protect rows", low=0, high=1)

    def mix(self, run, shares):
        protect = [task for task in shares if task not in ("learn",)]
        return {"learn": 1 - self.share, **{task: self.share / len(protect) for task in protect}}


def test_mix_draws_exact_shares_and_share_zero_changes_nothing(tmp_path):
    it = trainer(tmp_path / "a", Quarter())
    drawn = list(it._get_train_sampler())
    assert sorted(index for index in drawn if index < 24) == list(range(24))
    assert sum(index >= 24 for index in drawn) == 8
    none, plain = trainer(tmp_path / "b", Quarter(share=0.0)), trainer(tmp_path / "c")
    none.train(), plain.train()
    assert same(weights_of(none), weights_of(plain))
    it.train()
    assert not same(weights_of(it), weights_of(plain))


def test_shares_that_do_not_sum_to_one_are_the_plugins_fault(tmp_path):
    @dataclass
    class Greedy(Strategy):
        """Takes too much."""

        name: ClassVar[str] = "greedy"

        def mix(self, run, shares):
            return dict.fromkeys(shares, 1.0)

    with pytest.raises(PluginError, match=r"greedy\.mix returned"):
        trainer(tmp_path, Greedy())


# ---- saving and resuming ---------------------------------------------------------------------------------------------


@pytest.mark.fault("A10")
def test_state_lies_in_the_checkpoint_before_an_older_one_is_deleted(tmp_path, monkeypatch):
    seen, whole, remove = [], [], shutil.rmtree

    def watch(path, **kwargs):
        newest = max(Path(path).parent.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        seen.append((newest / "ftplus" / "manifest.json").is_file())
        whole.append((newest / commit.COMMIT).is_file() and not commit.fault(newest))
        remove(path, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watch)
    for cls, kwargs in ((SFTTrainer, {}), (trl.SFTTrainer, {"callbacks": [StrategyCallback("ewc", protect=PROTECT)]})):
        seen.clear(), whole.clear()
        strategies, folder = ["ewc"] if cls is SFTTrainer else [], tmp_path / cls.__module__
        trainer(folder, *strategies, cls=cls, save_strategy="steps", save_steps=2, save_total_limit=1, **kwargs).train()
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]
        assert seen == [True] * 2
        assert whole == [cls is SFTTrainer] * 2


@pytest.mark.fault("A2")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("callback", [False, True], ids=["mixin", "callback"])
def test_stop_and_resume_is_bit_identical(tmp_path, lora, callback):
    from peft import LoraConfig

    def make(folder, **kwargs):
        peft = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1) if lora else None
        common = dict(
            peft_config=peft,
            save_strategy="steps",
            save_steps=3,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            **kwargs,
        )
        if callback:
            return trainer(folder, cls=trl.SFTTrainer, callbacks=[StrategyCallback("ewc", protect=PROTECT)], **common)
        return trainer(folder, "ewc", **common)

    whole = make(tmp_path / "whole")
    whole.train()
    resumed = make(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same(weights_of(resumed), weights_of(whole))

    def strategy(it):
        return next(c for c in it.callback_handler.callbacks if isinstance(c, StrategyCallback)).strategies[0]

    assert same(strategy(resumed).state_dict(), strategy(whole).state_dict())


@pytest.mark.fault("A8")
@pytest.mark.parametrize("strategies", [(), ("ewc",)], ids=["plain", "EWC"])
@pytest.mark.parametrize("epochs", [None, 2], ids=["within an epoch", "at the end of one"])
def test_a_run_resumed_at_its_end_takes_no_further_step(tmp_path, strategies, epochs):
    length = {"max_steps": -1, "num_train_epochs": epochs} if epochs else {"max_steps": 3}
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, **length}
    ended = trainer(tmp_path, *strategies, **saving)
    ended.train()
    again = trainer(tmp_path, *strategies, **saving)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == ended.state.global_step
    assert same(weights_of(again), weights_of(ended))


def test_state_lies_beside_the_weights_wherever_the_trainer_puts_its_checkpoints(tmp_path):
    """Each trial of a hyperparameter search has a folder of its own."""

    class Trial(SFTTrainer):
        def _get_output_dir(self, trial):
            return str(tmp_path / "run-3")

    it = trainer(tmp_path, EWC(strength=10), cls=Trial, save_strategy="steps", save_steps=3, max_steps=3)
    it.train()
    assert (tmp_path / "run-3" / "checkpoint-3" / "ftplus" / "ewc.safetensors").is_file()
    assert not (tmp_path / "checkpoint-3").exists()


def test_the_anchor_is_not_taken_again_from_resumed_weights(tmp_path):
    trainer(tmp_path, "ewc", save_strategy="steps", save_steps=3).train()
    resumed = trainer(tmp_path, "ewc", save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    start = dict(tiny_llama().named_parameters())
    assert all(torch.equal(tensor, start[name]) for name, tensor in resumed.ftplus.strategies[0].start.items())


@pytest.mark.fault("C1")
def test_resuming_with_other_strategies_or_none_saved_is_refused(tmp_path):
    trainer(tmp_path, "ewc", save_strategy="steps", save_steps=3).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(
        IncompatibleError, match=r"was written with the strategies \['ewc'\]; this run has \['diary', 'ewc'\]"
    ):
        trainer(tmp_path, "ewc", Diary()).train(resume_from_checkpoint=checkpoint)
    trainer(tmp_path / "plain", save_strategy="steps", save_steps=3).train()
    with pytest.raises(IncompatibleError, match="holds no strategy state"):
        trainer(tmp_path, "ewc").train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3"))


@pytest.mark.fault("B5", "B6")
def test_a_checkpoint_of_another_adapter_is_refused_before_it_is_loaded(tmp_path):
    from peft import LoraConfig

    trainer(
        tmp_path, "ewc", peft_config=LoraConfig(r=2, target_modules=["q_proj"]), save_strategy="steps", save_steps=3
    ).train()
    for other, words in (
        (LoraConfig(r=2, target_modules=["v_proj"]), "Missing there"),
        (LoraConfig(r=4, target_modules=["q_proj"]), "other shapes"),
        (LoraConfig(r=2, lora_alpha=99, target_modules=["q_proj"]), "lora_alpha 8 there, 99 here"),
    ):
        with pytest.raises(IncompatibleError, match=words):
            trainer(tmp_path, "ewc", peft_config=other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# ---- text that the starting model writes ----------------------------------------------------------------------------


LONG = {"max_length": 400, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 3}
"""Room for what a random model writes, and steps that change what it would write next."""


@pytest.mark.parametrize("callback", [False, True], ids=["mixin", "callback"])
def test_a_resumed_run_protects_what_the_starting_model_wrote(tmp_path, monkeypatch, callback):
    def make(cache, model=None, **kwargs):
        monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / cache))
        given = {"protect": {"mine/own": "self:4"}}
        common = {**LONG, "model": model, **kwargs}
        if callback:
            return trainer(tmp_path / "out", cls=trl.SFTTrainer, callbacks=[StrategyCallback("ewc", **given)], **common)
        return trainer(tmp_path / "out", "ewc", **given, **common)

    def protected(it):
        found = next(c for c in it.callback_handler.callbacks if isinstance(c, StrategyCallback))
        return examples_of(found.run.protect["mine/own"])

    whole = make("cache")
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    # not from the cache, nor by the weights that are given, which people take from the checkpoint
    resumed = make("empty", LlamaForCausalLM.from_pretrained(checkpoint))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert protected(resumed) == protected(whole)
    assert same(weights_of(resumed), weights_of(whole))
    assert not (tmp_path / "empty").exists()
    again = make("empty", LlamaForCausalLM.from_pretrained(checkpoint), max_steps=1)
    again.train()  # a new run in the same folder writes its own
    assert protected(again) != protected(whole)
    (tmp_path / "out" / "_self" / "mine%2Fown.jsonl").unlink()
    with pytest.raises(StorageError, match=r"_self/mine%2Fown\.jsonl is missing: the text that the model wrote"):
        make("empty").train(resume_from_checkpoint=str(checkpoint))


def test_a_run_that_goes_on_in_another_folder_takes_its_text_there(tmp_path, monkeypatch):
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "cache"))

    def go_on(folder, start, steps):
        it = trainer(tmp_path / folder, "ewc", protect="self:4", max_steps=steps, **LONG)
        it.train(resume_from_checkpoint=start and str(tmp_path / start))
        return examples_of(it.ftplus.run.protect["self"])

    first = go_on("a", None, 3)
    assert first == go_on("b", "a/checkpoint-3", 6)
    shutil.rmtree(tmp_path / "a"), shutil.rmtree(tmp_path / "cache")
    assert first == go_on("b", "b/checkpoint-6", 9)


def test_mixed_in_text_of_other_weights_than_the_first_is_noticed_on_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "cache"))
    common = {"protect": "self:4", **LONG}
    trainer(tmp_path, Quarter(), **common).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    trainer(tmp_path, Quarter(), **common).train(resume_from_checkpoint=checkpoint)
    other = trainer(tmp_path, Quarter(), model=LlamaForCausalLM.from_pretrained(checkpoint), **common)
    with pytest.raises(IncompatibleError, match="Make the trainer with the starting model"):
        other.train(resume_from_checkpoint=checkpoint)


# ---- failing well ----------------------------------------------------------------------------------------------------


@pytest.mark.fault("C2")
def test_a_strategy_that_raises_is_named_with_hook_and_step(tmp_path):
    @dataclass
    class Broken(Strategy):
        """Fails at the second step."""

        name: ClassVar[str] = "broken"

        def before_step(self, run):
            if run.step == 1:
                raise KeyError("lost")

    with pytest.raises(PluginError, match=r"'broken' failed in before_step at step 1: KeyError"):
        trainer(tmp_path, Broken(), protect=None).train()


@pytest.mark.fault("C2")
def test_a_strategy_that_cannot_say_its_state_is_named(tmp_path):
    @dataclass
    class Broken(Strategy):
        """Fails at its second checkpoint."""

        name: ClassVar[str] = "broken"

        def state_dict(self):
            if self.run.step == 2:
                raise KeyError("lost")
            return {}

        def prepare(self, run):
            self.run = run

    with pytest.raises(PluginError, match=r"'broken' failed in state_dict at step 2: KeyError"):
        trainer(tmp_path, Broken(), protect=None, save_strategy="steps", save_steps=1).train()


@pytest.mark.parametrize("how", ["callback", "attach", "trainer"])
def test_every_strategy_may_refuse_the_loaded_model(tmp_path, how):
    @dataclass
    class Picky(Strategy):
        """Wants adapters."""

        name: ClassVar[str] = "picky"

        def refuse(self, run):
            if run is not None and not any("lora" in name for name in run.weights):
                raise IncompatibleError("picky wants LoRA")

    ways = {
        "callback": lambda: trainer(tmp_path, cls=trl.SFTTrainer, callbacks=[StrategyCallback(Picky())]).train(),
        "attach": lambda: attach(trainer(tmp_path, cls=trl.SFTTrainer), Picky()),
        "trainer": lambda: trainer(tmp_path, Picky()),
    }
    with pytest.raises(IncompatibleError, match="picky wants LoRA"):
        ways[how]()


def test_a_model_that_is_made_when_training_starts_is_refused_by_what_watches_it(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 8, "labels": [[1, 2, 3]] * 8})
    given = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "max_steps": 2}
    it = Trainer(model_init=lambda: tiny_llama(), args=TrainingArguments(**given), train_dataset=rows)
    with pytest.raises(IncompatibleError, match=r"model_init= makes another model.*Give the trainer model= instead"):
        attach(it, Distill(on="learn"))
    again = Trainer(model_init=lambda: tiny_llama(), args=TrainingArguments(**given), train_dataset=rows)
    attach(
        again, EWC(), protect=[{"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}]
    ).train()
    assert far(dict(again.model.state_dict()), dict(tiny_llama().state_dict())) > 0


@pytest.mark.parametrize("said", ["no", "bf16", "fp16"])
def test_precision_is_that_which_trains_also_where_only_accelerate_says_it(tmp_path, monkeypatch, said):
    """TRL's configurations for accelerate say bf16, and `--bf16 false` beside it does not take it back."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
    it = trainer(tmp_path, EWC())
    assert it.accelerator.mixed_precision == said
    with autocast(it.args)():
        assert torch.is_autocast_enabled("cpu") == (said != "no")
        assert said == "no" or torch.get_autocast_dtype("cpu") == {"bf16": torch.bfloat16, "fp16": torch.float16}[said]
    assert it._skips() == (said == "fp16")


@pytest.mark.parametrize("strategy", [Distill(), EWC()])
def test_a_memory_that_nobody_reads_is_said(tmp_path, caplog, strategy):
    first = trainer(tmp_path / "first", EWC())
    first.train()
    trainer(tmp_path / "out", strategy, model=first.model, memory=tmp_path / "first", max_steps=1).train()
    assert ("no strategy of this run has read it" in caplog.text) == (strategy.name == "distill")


PLAIN_TOO = pytest.mark.parametrize("strategies", [(), ("ewc",)], ids=["plain", "EWC"])


@pytest.mark.fault("D1")
@PLAIN_TOO
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, strategies):
    class Poisoned(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    it = trainer(tmp_path, *strategies, cls=Poisoned)
    with pytest.raises(IncompatibleError, match="loss is nan at step 3"):
        it.train()
    assert all(torch.isfinite(weight).all() for weight in it.model.parameters())
    assert it.state.global_step == 2


@pytest.mark.fault("D1")
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_update_whatever_the_loss(tmp_path, clip):
    @dataclass
    class Poison(Strategy):
        """Spoils a gradient."""

        name: ClassVar[str] = "poison"

        def token_loss(self, run, batch):
            hidden = batch.hidden * 1.0
            hidden.register_hook(lambda gradient: gradient * (float("inf") if run.step == 2 else 1.0))
            return hidden.sum()

    it = trainer(tmp_path, Poison(), max_grad_norm=clip, logging_nan_inf_filter=False)
    with pytest.raises(IncompatibleError, match=r"gradient's norm is (inf|nan) at step 3\. Training stopped before"):
        it.train()
    assert all(torch.isfinite(weight).all() for weight in it.model.parameters())


@pytest.mark.fault("D1")
def test_a_model_that_blows_up_never_ends_well_without_strategies(tmp_path, monkeypatch):
    """Whichever looks first: at the loss or the gradient, at the weights, or at what is logged."""
    saving = {"learning_rate": 1e30, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(IncompatibleError, match=r"is (inf|nan) at step 2\. Training stopped before the update"):
        trainer(tmp_path, **saving).train()
    monkeypatch.setattr(transformers.Trainer, "_get_grad_norm", lambda *args, **kwargs: 1.0)
    with pytest.raises(IncompatibleError, match="weights are not finite at step 2"):
        trainer(tmp_path, **saving).train()
    it = trainer(tmp_path, logging_nan_inf_filter=False, logging_steps=1)
    monkeypatch.setattr(
        trl.SFTTrainer, "compute_loss", lambda self, *args, **kwargs: self.model.lm_head.weight.sum() / 0
    )
    with pytest.raises(IncompatibleError, match=r"The loss is (-?inf|nan) at step 1\. The update was made"):
        it.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@dataclass
class Impatient(Sorry):
    """Is interrupted when all is done."""

    name: ClassVar[str] = "impatient"
    error: ClassVar[type[BaseException]] = KeyboardInterrupt


@pytest.mark.fault("C2")
@pytest.mark.parametrize("how", ["trainer", "attach", "callback", "LoRA", "Ctrl-C"])
def test_what_was_trained_survives_a_failing_finish(tmp_path, how, caplog):
    strategy = Impatient() if how == "Ctrl-C" else Sorry()
    peft = LoraConfig(r=2, target_modules=["q_proj"]) if how == "LoRA" else None
    if how == "callback":
        it = trainer(tmp_path, cls=trl.SFTTrainer, callbacks=[StrategyCallback(strategy)])
    elif how == "attach":
        it = attach(trainer(tmp_path, cls=trl.SFTTrainer), strategy)
    else:
        it = trainer(tmp_path, strategy, peft_config=peft)
    with pytest.raises(KeyboardInterrupt if how == "Ctrl-C" else PluginError) as raised:
        it.train()
    said = caplog.text if how == "Ctrl-C" else str(raised.value)
    assert how == "Ctrl-C" or said.startswith("Strategy 'sorry' failed in finish at step 6: KeyError: 'lost'")
    assert f"The trained model is saved in {tmp_path}." in said
    saved = PeftModel.from_pretrained(tiny_llama(), tmp_path) if peft else LlamaForCausalLM.from_pretrained(tmp_path)
    assert same(dict(saved.state_dict()), weights_of(it))
    assert peft or far(weights_of(it), dict(tiny_llama().state_dict())) > 1e-3
    assert (tmp_path / "tokenizer.json").is_file()


def test_a_finish_that_works_saves_nothing_by_itself(tmp_path):
    trainer(tmp_path, Diary()).train()
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_model_that_cannot_be_saved_is_said_too(tmp_path):
    @dataclass
    class Taker(Sorry):
        """Puts a file where the folder was."""

        def finish(self, run):
            shutil.rmtree(tmp_path / "out")
            (tmp_path / "out").write_text("a file")
            super().finish(run)

    with pytest.raises(PluginError, match=r"'sorry' failed in finish.*could not be saved: "):
        trainer(tmp_path / "out", Taker()).train()


def test_a_script_s_folder_that_is_a_file_is_refused_before_anything_is_trained(tmp_path):
    it = trainer(tmp_path / "out", Diary())
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match=r"out cannot be written: it is a file\. Choose another"):
        it.train()
    assert it.state.global_step == 0


def test_two_callbacks_would_share_a_folder_and_are_refused(tmp_path):
    words = r"strategies twice \(ewc; sorry\).*StrategyCallback\('ewc', 'sorry', protect=\.\.\.\)"
    both = [StrategyCallback("ewc", protect=PROTECT), StrategyCallback(Sorry())]
    with pytest.raises(UsageError, match=words):
        trainer(tmp_path, cls=trl.SFTTrainer, callbacks=both)
    it = trainer(tmp_path, "ewc")
    it.add_callback(StrategyCallback(Sorry()))
    with pytest.raises(UsageError, match=words):
        it.train()
    trainer(tmp_path, "ewc", max_steps=1, callbacks=[StrategyCallback()]).train()  # none is none


def test_ewc_without_anything_to_protect_says_what_to_type(tmp_path):
    with pytest.raises(DataError, match="self:256"):
        trainer(tmp_path, "ewc", protect=None).train()


def test_without_strategies_any_adapters_are_trained_as_trl_trains_them(tmp_path):
    """A strategy would have to tell the two apart; without one nobody asks."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), "one")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["one", "other"])
    it = trainer(tmp_path, model=model, save_strategy="steps", save_steps=3, max_steps=3)
    it.train()
    assert sum(weight.requires_grad for weight in model.parameters()) == 8
    assert (tmp_path / "checkpoint-3" / "other" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("optimizer", ["galore_adamw_layerwise", "adalomo"])
def test_an_optimizer_that_steps_layer_by_layer_is_refused_where_gradients_are_acted_on(tmp_path, optimizer):
    args = arguments(tmp_path, optim=optimizer)
    refuse([Distill()], args)
    for strategy in (EWC(), SI()):
        with pytest.raises(IncompatibleError, match=f"{strategy.name} acts on whole gradients.*--optim {optimizer}"):
            refuse([strategy], args)


def test_a_step_within_the_backward_pass_is_refused_where_gradients_are_acted_on(tmp_path):
    """What frees each gradient as soon as it is used would leave a strategy nothing to act on, in silence."""

    def hooked(*strategies):
        it = trainer(tmp_path, *strategies, protect=None)
        for weight in it.model.parameters():
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        return it

    with pytest.raises(IncompatibleError, match=r"No weight has a gradient when si is to act on it"):
        hooked(SI()).train()
    hooked().train()


@pytest.mark.parametrize("strategy", [EWC(rows=8), SI()])
def test_weights_in_16_bits_are_said_to_lose_what_is_small(tmp_path, strategy, caplog):
    trainer(tmp_path, strategy, model=tiny_llama().bfloat16(), max_steps=1).train()
    assert f"{strategy.name}: 20 of 20 weights are kept in 16 bits" in caplog.text


@pytest.mark.fault("A9")
def test_settings_under_which_a_strategy_would_act_wrongly_are_refused(tmp_path):
    with pytest.raises(IncompatibleError, match="auto_find_batch_size"):
        trainer(tmp_path, "ewc", auto_find_batch_size=True)


def test_the_manifest_names_step_settings_and_files(tmp_path):
    trainer(tmp_path, EWC(strength=7.0), save_strategy="steps", save_steps=3, max_steps=3).train()
    manifest = json.loads((tmp_path / "checkpoint-3" / "ftplus" / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert "strength=7.0" in manifest["settings"]["ewc"]
    assert set(manifest["files"]) == {"ewc"}
    assert len(manifest["files"]["ewc"]["sha256"]) == 64


@pytest.mark.slow
def test_a_compiled_model_trains_the_same_with_losses_on_outputs(tmp_path):
    """Compiled models do not see hooks that come after compilation; ours is there before."""
    found = []
    for compiled in (False, True):
        it = trainer(
            tmp_path / str(compiled),
            "ewc",
            LogitPull(),
            model=tiny_llama(layers=1),
            max_steps=2,
            torch_compile=compiled,
        )
        it.train()
        found.append(weights_of(it))
    assert far(*found) < 1e-5
    assert far(found[0], dict(tiny_llama(layers=1).state_dict())) > 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_train_bit_identically(tmp_path, reentrant):
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    saving, plain = trainer(tmp_path / "a", "ewc", LogitPull(), **kwargs), trainer(tmp_path / "b", "ewc", LogitPull())
    saving.train(), plain.train()
    assert same(weights_of(saving), weights_of(plain))
