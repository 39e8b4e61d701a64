"""Replay: exact shares of rows or tokens in every step, each learn row once an epoch, whatever else trains with it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter

import pytest
import torch
import trl
from batches import padded, random_rows
from commands import make_place, words
from datasets import Dataset, IterableDataset
from tiny import tiny_llama, tiny_tokenizer
from training import LEARN, PROTECT, arguments, first_gradient, same, trainer, weights_of
from transformers import DataCollatorForSeq2Seq, Trainer

import hf_ftplus
from hf_ftplus import MultiTask, SFTTrainer, testing
from hf_ftplus.batches import examples_of
from hf_ftplus.cli import main
from hf_ftplus.errors import DataError, IncompatibleError, UsageError
from hf_ftplus.pools import supervised_tokens
from hf_ftplus.preview import training
from hf_ftplus.strategies.replay import Replay, rehearsed
from hf_ftplus.testing import check_strategy

LONG = [
    {"prompt": f"Tell of {i}. ", "completion": "Once there was a dog who slept by the door. " * 3} for i in range(16)
]
EVEN = [{"prompt": f"Name number {i}. ", "completion": "It is a lantern."} for i in range(56)]


def chunks(items, size: int) -> list[list]:
    items = list(items)
    return [items[start : start + size] for start in range(0, len(items), size)]


def batches(it) -> list[list[bool]]:
    """Whether each row of each micro-batch that training would draw next protects."""
    first = it.ftplus.learn_rows
    it._mixture.set_epoch(0)
    return [[row >= first for row in rows] for rows in chunks(it._mixture, 8)]


def tokens_of(batches) -> int:
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_the_share_is_of_rows_and_divided_alike():
    found = rehearsed({"learn": 1.0, "a": 0.0, "b": 0.0}, 0.25, {"a": 1, "b": 1}, dict.fromkeys(["learn", "a", "b"], 1))
    assert found == {"learn": 0.75, "a": 0.125, "b": 0.125}


def test_the_share_of_tokens_makes_rows_of_long_tasks_rarer():
    length = {"learn": 5.0, "a": 50.0, "b": 10.0}
    found = rehearsed({"learn": 1.0, "a": 0.0, "b": 0.0}, 0.2, {"a": 1, "b": 1}, length)
    tokens = {task: share * length[task] for task, share in found.items()}
    assert sum(found.values()) == pytest.approx(1)
    assert tokens["a"] == pytest.approx(tokens["b"])
    assert (tokens["a"] + tokens["b"]) / sum(tokens.values()) == pytest.approx(0.2)


def test_what_was_mixed_before_keeps_its_proportions():
    before = {"x": 0.6, "y": 0.3, "p": 0.1}
    found = rehearsed(before, 0.5, {"p": 1}, dict.fromkeys(before, 1))
    assert found == pytest.approx({"x": 0.3, "y": 0.15, "p": 0.55})


# ---- the stream of rows ----------------------------------------------------------------------------------------------


def test_one_row_in_eight_of_every_step_and_each_learn_row_once(tmp_path):
    it = trainer(tmp_path, "replay", learn=EVEN, per_device_train_batch_size=8, max_steps=-1, num_train_epochs=1)
    assert [sum(step) for step in batches(it)] == [1] * 8
    assert sorted(row for row in it._mixture if row < 56) == list(range(56))
    it.train()
    assert (
        it.state.global_step == 8
    )  # 56 learn rows in batches of eight are 7 steps; an epoch is 1 / (1 - share) longer
    assert it.ftplus.strategies[0].metrics()["share_of_rows"] == 0.125
    logged = [log for log in it.state.log_history if "loss" in log]
    assert all(log["replay/share_of_rows"] == 0.125 for log in logged)


def test_rows_per_second_are_those_that_were_drawn(tmp_path):
    """Of 2000 protect rows an epoch draws four."""
    many = [{"prompt": f"Question {i}? ", "completion": "Yes."} for i in range(2000)]
    it = trainer(tmp_path, Replay(share=0.125), protect=many, max_steps=-1, num_train_epochs=1)
    found = it.train().metrics
    rows = found["train_samples_per_second"] / found["train_steps_per_second"]
    assert rows == pytest.approx(28 / it.state.global_step, abs=0.5)


@pytest.mark.parametrize("layout", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_every_optimizer_step_holds_its_share_whatever_the_accumulation(tmp_path, layout):
    """The rows that reach the model, not those that the sampler means to give."""
    size, accumulation = layout
    seen: list[int] = []

    class Watching(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(sum(bool((row == 3).any()) for row in inputs["input_ids"]))
            return super().training_step(model, inputs, *args, **kwargs)

    rare, usual = padded(random_rows(9, 60), 3), random_rows(56, 60)  # only protect rows have a token 3
    for batch in rare:
        batch["input_ids"][:, 3] = 3
    it = Watching(
        tiny_llama(),
        args=arguments(
            tmp_path, max_steps=8, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
        ),
        train_dataset=Dataset.from_list([{"input_ids": i.tolist(), "labels": each.tolist()} for i, each in usual]),
        processing_class=tiny_tokenizer(),
        strategies=["replay"],
        protect=rare,
    )
    it.train()
    assert [sum(step) for step in chunks(seen, accumulation)] == [1] * 8


def test_protect_tasks_divide_the_share_alike_or_by_size(tmp_path):
    protect = {"few": PROTECT[:4], "many": PROTECT[4:]}
    counts = []
    for divide in ("equal", "size"):
        it = trainer(tmp_path, Replay(share=0.25, divide=divide), protect=protect)
        counts.append(dict(it._mixture.counts))
    assert counts == [{"learn": 24, "few": 4, "many": 4}, {"learn": 24, "few": 2, "many": 6}]


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_share_of_tokens_is_met_although_protect_rows_are_long(tmp_path, share):
    it = trainer(tmp_path, Replay(share=share, unit="tokens"), protect=LONG, learn=LEARN * 40)
    counts = supervised_tokens(it.train_dataset)
    drawn = list(it._mixture)
    realised = counts[[row for row in drawn if row >= 960]].sum() / counts[drawn].sum()
    assert realised == pytest.approx(share, abs=0.005)
    figures = it.ftplus.strategies[0].metrics()
    assert figures["share_of_tokens"] == pytest.approx(realised)
    assert figures["share_of_rows"] < share / 2


def test_the_seed_of_the_order_is_data_seed_even_if_zero(tmp_path):
    streams = [list(trainer(tmp_path, "replay", data_seed=seed)._mixture) for seed in (None, 5, 0)]
    assert streams[0] == streams[1] != streams[2]  # the tests' seed is 5


def test_masks_of_protect_rows_are_kept(tmp_path):
    it = trainer(tmp_path, "replay")
    tokenizer = tiny_tokenizer()
    for row in list(it.train_dataset)[24:]:
        prompt = tokenizer.decode(
            [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        )
        answer = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert prompt.startswith("Question")
        assert answer.startswith("It is")
        assert answer.endswith("<|im_end|>")


@pytest.mark.filterwarnings("ignore:The `'keep_end'`:FutureWarning")
def test_protect_rows_are_cut_at_the_end_that_learn_rows_are(tmp_path):
    long = [{"prompt": "alpha " * 20 + f"Question {i}. ", "completion": f"It is {i}."} for i in range(8)]
    how = {"learn": long, "protect": long, "max_length": 16, "truncation_mode": "keep_end"}
    it = trainer(tmp_path, Replay(share=0.5), **how)
    rows = it.train_dataset
    learnt = {tuple(row["input_ids"][-16:]) for row in rows.select(range(8))}
    assert {tuple(row["input_ids"]) for row in rows.select(range(8, len(rows)))} == learnt


def test_what_strategies_learn_from_learn_rows_is_not_from_protect_rows(tmp_path):
    it = trainer(tmp_path, Replay(share=0.5), "ewc", max_steps=1)
    it.train()
    rows = [ids for batch in it.ftplus.run.learn(100) for ids in batch["input_ids"]]
    assert len(rows) == 24
    assert all(tiny_tokenizer().decode(ids).startswith("Name number") for ids in rows)


# ---- training --------------------------------------------------------------------------------------------------------


def test_share_zero_trains_as_trl_does_and_needs_no_protect_data(tmp_path):
    none, plain = trainer(tmp_path, Replay(share=0), protect=None), trainer(tmp_path, cls=trl.SFTTrainer)
    assert none._mixture is None
    none.train(), plain.train()
    assert same(weights_of(none), weights_of(plain))


@pytest.mark.dist
def test_replay_keeps_every_law_on_one_process_and_two():
    check_strategy(Replay(share=0.25))


def test_a_share_of_tokens_keeps_the_laws():
    laws = [testing.law_silent_at_zero, testing.law_acts, testing.law_remembers]
    check_strategy(Replay(share=0.25, unit="tokens"), peft=False, laws=laws)


def test_resumed_in_its_second_epoch_with_ewc_it_ends_where_it_would_have(tmp_path):
    common = {"max_steps": 10, "save_strategy": "steps", "save_steps": 8, "per_device_train_batch_size": 4}
    whole = trainer(tmp_path, "replay", "ewc", **common)  # 27 rows, 7 steps an epoch
    whole.train()
    assert whole.state.epoch > 1.2
    resumed = trainer(tmp_path, "replay", "ewc", **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert same(weights_of(whole), weights_of(resumed))
    assert not same(weights_of(whole), weights_of(trainer(tmp_path / "b", "ewc", **common)))


def test_resuming_with_other_rows_or_another_share_is_refused(tmp_path):
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, "replay", **common).train()
    for strategy, protect, why in (
        ("replay", PROTECT[:9], "The checkpoint drew 3 of 16 rows of task 'protect'"),
        (Replay(share=0.5), PROTECT, "replay.share 0.125 there, 0.5 here"),
    ):
        resumed = trainer(tmp_path, strategy, protect=protect, **common)
        with pytest.raises(IncompatibleError, match=why):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_text_of_the_model_itself_is_replayed(tmp_path, monkeypatch):
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "cache"))
    it = trainer(tmp_path, "replay", protect="self:8", max_steps=2)
    assert it._mixture.counts["self"] == 3
    it.train()


def test_the_evaluation_loss_is_that_of_plain_trl(tmp_path):
    losses = []
    for kind, more in ((trl.SFTTrainer, {}), (SFTTrainer, {"strategies": [Replay(share=0.5)], "protect": PROTECT})):
        it = kind(
            tiny_llama(),
            args=arguments(tmp_path),
            train_dataset=Dataset.from_list(LEARN),
            eval_dataset={"held": Dataset.from_list(LEARN[:5])},
            processing_class=tiny_tokenizer(),
            **more,
        )
        losses.append(it.evaluate()["eval_held_loss"])
    assert losses[0] == losses[1]


def test_the_mixture_is_logged_as_a_table(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hf_ftplus"):
        it = trainer(tmp_path, Replay(share=0.25), max_steps=16)
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("mixture")]
    counts = supervised_tokens(it.train_dataset)
    drawn = list(it._mixture)
    tokens = 100 * counts[[row for row in drawn if row >= 24]].sum() / counts[drawn].sum()
    assert said.splitlines()[2].split()[:5] == ["learn", "learn", "24", "24", "75.00"]
    assert said.splitlines()[3].split() == ["protect", "protect", "16", "8", "25.00", f"{tokens:.2f}", "1.00"]
    # 16 steps of 4 rows are two epochs of 32, in which 16 protect rows come once


def test_a_tiny_share_is_warned_of(tmp_path, caplog):
    trainer(tmp_path, Replay(share=0.009), learn=LEARN * 8)
    assert "a share of 0.009 is little" in caplog.text


# ---- packing and streams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bfd", "wrapped", "bfd_split"])
def test_protect_rows_are_packed_on_their_own_as_the_learn_rows_were(tmp_path, how):
    """Rows of both kinds never share a packed row, and positions begin again with each document."""
    packing = {"packing": True, "packing_strategy": how, "max_length": 100, "per_device_train_batch_size": 2}
    it = trainer(tmp_path, Replay(share=0.25), learn=LEARN * 3, **packing)
    plain = trainer(tmp_path, cls=trl.SFTTrainer, learn=LEARN * 3, **packing)
    learn = len(plain.train_dataset)
    assert it.train_dataset.column_names == plain.train_dataset.column_names
    assert it.train_dataset.select(range(learn))[:] == plain.train_dataset[:]
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode(ids) for ids in it.train_dataset["input_ids"]]
    assert not any("Question" in text for text in texts[:learn])
    assert not any("Name number" in text for text in texts[learn:])
    assert len(texts) - learn < len(PROTECT)
    together = "".join(texts[learn:])
    assert all(row["prompt"] in together and row["completion"] in together for row in PROTECT[:3]) or how == "wrapped"
    if how != "wrapped":
        assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) for row in it.train_dataset)
        batch = it.data_collator([it.train_dataset[learn], it.train_dataset[learn + 1]])
        begins = int((batch["position_ids"] == 0).sum())
        assert begins == sum(len(it.train_dataset[learn + i]["seq_lengths"]) for i in range(2))
    assert it._mixture.counts["protect"] == round(learn / 3)
    it.train()


def test_a_stream_is_interleaved_and_resumes(tmp_path):
    def made(**kwargs):
        return SFTTrainer(
            tiny_llama(),
            args=arguments(tmp_path, **{"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **kwargs}),
            train_dataset=IterableDataset.from_generator(lambda: iter(LEARN * 100)),
            processing_class=tiny_tokenizer(),
            strategies=[Replay(share=0.25)],
            protect=PROTECT,
        )

    it = made()
    tokenizer = tiny_tokenizer()
    kinds = [tokenizer.decode(row["input_ids"]).startswith("Question") for row in it.train_dataset.take(2000)]
    share = sum(kinds) / len(kinds)
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    it.train()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights_of(it), weights_of(resumed))


def test_a_stream_cannot_be_shared_by_tokens(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(LEARN))
    with pytest.raises(UsageError, match=r"tokens', but those of 'learn' cannot be counted"):
        SFTTrainer(
            tiny_llama(),
            args=arguments(tmp_path),
            train_dataset=stream,
            processing_class=tiny_tokenizer(),
            strategies=[Replay(unit="tokens")],
            protect=PROTECT,
        )


# ---- refusals, and other trainers ------------------------------------------------------------------------------------


def test_without_protect_data_it_says_what_to_type(tmp_path):
    with pytest.raises(DataError, match=r"replay has nothing to replay.*--protect self:256"):
        trainer(tmp_path, "replay", protect=None)


def test_a_plan_counts_the_steps_of_an_epoch_that_is_drawn_and_not_of_all_rows(tmp_path):
    it = trainer(tmp_path, Replay(share=0.25), learn=LEARN[:6], max_steps=-1, num_train_epochs=3)
    assert len(it.train_dataset) == 6 + len(PROTECT)
    assert training(it).startswith("6 steps of 4 rows")
    it.train()
    assert it.state.global_step == 6


@pytest.mark.parametrize("order", ["group_by_length", "sequential", "batch_rebalance"])
def test_another_order_of_rows_is_refused(tmp_path, order):
    with pytest.raises(IncompatibleError, match=rf"train_sampling_strategy '{order}' chooses the order"):
        trainer(tmp_path, "replay", train_sampling_strategy=order)
    trainer(tmp_path, Replay(share=0), train_sampling_strategy=order)


def test_a_callback_cannot_replay():
    with pytest.raises(IncompatibleError, match=r"replay uses mix, which a callback cannot serve"):
        hf_ftplus.StrategyCallback("replay")


def test_preference_pairs_are_refused_by_their_columns(tmp_path):
    pairs = [{"prompt": "Why? ", "chosen": "Because.", "rejected": "No."}] * 4
    it = trl.DPOTrainer(
        tiny_llama(),
        ref_model=tiny_llama(seed=1),
        args=trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tiny_tokenizer(),
    )
    with pytest.raises(IncompatibleError, match=r"rows of input_ids and labels.*training rows of this trainer have"):
        hf_ftplus.attach(it, "replay", protect=PROTECT)


def plain_trainer(folder, **columns):
    rows = [{"input_ids": i.tolist(), "labels": each.tolist()} for i, each in random_rows(24, 384)]
    rows = [{**row, **{name: [1] * len(row["input_ids"]) for name in columns}} for row in rows]
    from transformers import TrainingArguments

    return Trainer(
        tiny_llama(),
        args=TrainingArguments(str(folder), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        processing_class=tiny_tokenizer(),
    )


def test_it_attaches_to_a_plain_trainer_of_tokenised_rows(tmp_path):
    it = hf_ftplus.attach(plain_trainer(tmp_path, attention_mask=1), Replay(share=0.25), protect=PROTECT)
    assert Counter(row >= 24 for row in it._mixture) == {False: 24, True: 8}
    batch = next(iter(it.get_train_dataloader()))
    assert torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != tiny_tokenizer().pad_token_id)
    it.train()


def test_columns_that_protect_rows_do_not_have_are_refused(tmp_path):
    with pytest.raises(IncompatibleError, match="The model is given position_ids of each training row"):
        hf_ftplus.attach(plain_trainer(tmp_path, position_ids=1), "replay", protect=PROTECT)


def test_dry_run_knows_what_it_costs(tmp_path):
    it = trainer(tmp_path, "replay")
    assert it.ftplus.strategies[0].preview(it.ftplus.run) == {"bytes": 0, "rows": 16, "seconds": 0}


def test_from_the_command_line_shares_are_in_the_report_and_the_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "cache"))
    place = make_place(tmp_path)
    line = words(place, tmp_path / "out", "--protect", "self:8", "--set", "replay.share=0.25", plugin="replay")
    assert main([*line, "--dry-run"]) == 0
    assert "Replay(share=0.25, unit='rows', divide='equal')" in capsys.readouterr().out
    assert main(line) == 0
    facts = json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())["facts"]["strategies"]["replay"]
    assert facts["share_of_rows"] == 0.25
    assert 0 < facts["share_of_tokens"] < 1


def test_two_tasks_of_text_of_the_model_itself_are_no_copies(tmp_path, monkeypatch):
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "cache"))
    it = trainer(tmp_path, "replay", protect={"one": "self:8", "two": "self:8"})
    one, two = (examples_of(it.ftplus.run.protect[name]) for name in ("one", "two"))
    alone = trainer(tmp_path, "replay", protect="self:8").ftplus.run.protect["self"]
    assert one == examples_of(alone)
    assert one != two


@pytest.mark.parametrize("strategy", [Replay(share=0.25), MultiTask(mode="equal")], ids=["replay", "multitask"])
def test_rows_without_padding_teach_what_padded_ones_do(tmp_path, strategy):
    learn = [{"text": row["prompt"] + row["completion"], "task": "ab"[i % 3 == 0]} for i, row in enumerate(LEARN)]
    how = {"learn": learn, "protect": PROTECT if strategy.name == "replay" else None, "per_device_train_batch_size": 8}
    one, _ = first_gradient(tmp_path / "padded", dataclasses.replace(strategy), **how)
    two, _ = first_gradient(tmp_path / "free", dataclasses.replace(strategy), **how, padding_free=True, max_length=None)
    assert max(gradient.abs().max() for gradient in one.values()) > 1e-3
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
