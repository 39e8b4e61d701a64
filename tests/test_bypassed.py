"""Trainers whose own code goes past ours, models and data that are not what strategies know: refused, never silent."""

from __future__ import annotations

import types

import pytest
import torch
import trl
from datasets import Dataset, DatasetDict
from tiny import CHATML, tiny_llama, tiny_tokenizer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from training import LEARN, PROTECT, arguments, trainer
from transformers import BartConfig, BartForConditionalGeneration, Trainer, TrainingArguments, default_data_collator

import hf_ftplus
from hf_ftplus import EWC, SI, Distill, Replay, StrategyCallback, attach
from hf_ftplus.batches import learn_batches
from hf_ftplus.errors import IncompatibleError, UsageError
from hf_ftplus.evaluation.tasks import question
from hf_ftplus.examples import in_blocks, tokenize
from hf_ftplus.generate import open_user_turn
from hf_ftplus.mixing import on_its_device

BLOCKS = CHATML.replace(
    "message['content']", "(message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join)"
)
"""As SmolVLM's: of a string, whose characters have no type, it shows nothing."""


# ---- losses ----------------------------------------------------------------------------------------------------------


class OwnLoss(hf_ftplus.SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


class OwnStep(trl.SFTTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


def patched(it):
    it.compute_loss = types.MethodType(OwnLoss.compute_loss, it)
    return it


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: trainer(folder, Distill(), cls=OwnLoss),
        lambda folder: attach(trainer(folder, cls=OwnStep), Distill(), protect=PROTECT),
        lambda folder: patched(trainer(folder, Distill())),
    ],
    ids=["subclass", "step", "instance"],
)
def test_a_loss_that_nobody_adds_to_is_refused_at_the_first_step(make, tmp_path):
    it = make(tmp_path)
    with pytest.raises(IncompatibleError, match="distill adds to the loss, and was never asked"):
        it.train()
    assert it.state.global_step == 0


def test_a_loss_of_its_own_is_added_to_through_attach(tmp_path):
    class Plain(trl.SFTTrainer):
        compute_loss = OwnLoss.compute_loss

    it = attach(trainer(tmp_path, cls=Plain), Distill(), protect=PROTECT)
    it.train()
    assert "distill/kl_protect" in it.state.log_history[0]


# ---- rows ------------------------------------------------------------------------------------------------------------


class OwnLoader(trl.SFTTrainer):
    def get_train_dataloader(self):
        rows = self._remove_unused_columns(self.train_dataset)
        return self.accelerator.prepare(DataLoader(rows, 2, shuffle=True, collate_fn=self.data_collator))


def test_rows_in_another_order_than_the_mixtures_are_refused(tmp_path):
    it = attach(trainer(tmp_path, cls=OwnLoader), Replay(share=0.25), protect=PROTECT)
    with pytest.raises(IncompatibleError, match="OwnLoader has a get_train_dataloader"):
        it.train()


def test_a_collator_that_pads_nothing_cannot_mix(tmp_path):
    """run_clm.py cuts all text into rows of one length, and never pads."""
    rows = Dataset.from_list([{"input_ids": list(range(4, 20)), "labels": list(range(4, 20))}] * 8)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=1, save_strategy="no")
    it = Trainer(tiny_llama(), args, default_data_collator, rows, processing_class=tiny_tokenizer())
    with pytest.raises(IncompatibleError, match=r"default_data_collator makes no micro-batch of rows of 16 and \d+ "):
        attach(it, Replay(share=0.25), protect=PROTECT)


def test_splits_are_no_tasks(tmp_path):
    rows = Dataset.from_list(LEARN[:4])
    with pytest.raises(UsageError, match=r"has splits \(train, test\); expected one: data\['train'\]"):
        hf_ftplus.SFTTrainer(
            tiny_llama(),
            args=arguments(tmp_path),
            train_dataset=DatasetDict(train=rows, test=rows),
            processing_class=tiny_tokenizer(),
        )


class Stream(IterableDataset):
    """As accelerate's shards of a stream: it knows its length, and gives no row by its place."""

    def __len__(self):
        return 4

    def __iter__(self):
        return iter([{"input_ids": [1, 2], "labels": [1, 2]}] * 4)


@pytest.mark.parametrize("loader", [DataLoader(Stream(), 2), DataLoader(LEARN, 2, collate_fn=lambda rows: rows)])
def test_rows_that_cannot_be_read_beforehand_are_none(loader):
    """A stream, and GRPO, whose collator leaves rows as they are."""
    assert list(learn_batches(loader, 2, 4)) == []


# ---- models ----------------------------------------------------------------------------------------------------------


def bart():
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
    return BartForConditionalGeneration(BartConfig(vocab_size=384, d_model=32, **sizes, **widths))


@pytest.mark.parametrize(
    ("strategy", "protect"),
    [(EWC(), PROTECT), (EWC(first=True), None), (Distill(), PROTECT), (Replay(), PROTECT)],
    ids=["ewc", "ewc to remember", "distill", "replay"],
)
def test_an_encoder_with_a_decoder_is_refused(strategy, protect, tmp_path):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [8, 9]}] * 4)
    it = Trainer(bart(), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True), train_dataset=rows)
    it.processing_class = tiny_tokenizer()
    with pytest.raises(IncompatibleError, match="BartForConditionalGeneration is an encoder with a decoder"):
        attach(it, strategy, protect=protect)


class Net(nn.Module):
    """A model that transformers never heard of."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(self, x, labels=None):
        return {"loss": (self.line(x).squeeze(-1) - labels).square().mean()}


def test_a_model_without_a_configuration_trains(tmp_path):
    rows = Dataset.from_list([{"x": [1.0, 2.0, float(i)], "labels": float(i)} for i in range(8)])
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=2, save_strategy="no")
    it = attach(Trainer(Net(), args, train_dataset=rows), SI())
    it.train()
    assert (tmp_path / "ftplus" / "memory" / "si.safetensors").is_file()


def test_a_callback_in_a_search_for_hyperparameters_is_refused(tmp_path):
    it = trainer(tmp_path, cls=trl.SFTTrainer, callbacks=[StrategyCallback(EWC(), protect=PROTECT)])
    it.add_callback(Searching())
    it.callback_handler.callbacks.reverse()
    with pytest.raises(IncompatibleError, match=r"attach\(trainer, 'ewc', \.\.\.\)"):
        it.train()


class Searching(hf_ftplus.StrategyCallback.__mro__[1]):
    """What the Trainer notes in a trial."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.is_hyper_param_search = True


def test_memory_is_of_the_trial(tmp_path, monkeypatch):
    it = trainer(tmp_path, SI())
    monkeypatch.setattr(it, "_get_output_dir", lambda trial=None: str(tmp_path / "run-0"))
    it.train()
    assert (tmp_path / "run-0" / "ftplus" / "memory" / "si.safetensors").is_file()


@pytest.mark.parametrize("full_eval", [False, True])
def test_a_model_is_on_its_device_before_it_is_asked(full_eval, tmp_path, monkeypatch):
    """With bf16_full_eval, or under DeepSpeed, the Trainer itself moves it only when training starts."""
    found = []
    monkeypatch.setattr(Trainer, "_move_model_to_device", lambda self, model, device: found.append(device))
    it = trainer(tmp_path, bf16_full_eval=full_eval)
    assert len(found) == (not full_eval)
    on_its_device(it)
    assert found == [torch.device("cpu")]


# ---- templates -------------------------------------------------------------------------------------------------------


def test_what_is_said_in_blocks_alone_is_not_lost():
    """Templates of models that read images, too: given a string as content they show none of it."""
    chat = [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "Blue."}]
    plain, tokenizer = tiny_tokenizer(), tiny_tokenizer(BLOCKS)
    assert (in_blocks(plain), in_blocks(tokenizer)) == (False, True)
    assert "Blue" not in tokenizer.apply_chat_template(chat, tokenize=False)
    for row in ({"messages": chat}, {"prompt": chat[:1], "completion": chat[1:]}):
        assert tokenize([row], tokenizer, 64, "chat").examples == tokenize([row], plain, 64, "chat").examples
        assert question(row, tokenizer) == question(row, plain)
    assert open_user_turn(tokenizer) == open_user_turn(plain)
