"""Several learn tasks: each mode's formula, a cap on epochs, tasks prepared apart, and replay taking its share on top."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from tiny import MARKED, tiny_llama, tiny_tokenizer
from training import PROTECT, arguments, same, trainer, weights_of

from hf_ftplus import SFTTrainer
from hf_ftplus.errors import DataError, IncompatibleError, UsageError
from hf_ftplus.strategies.multitask import MultiTask, limited, parse, tempered, unimax
from hf_ftplus.strategies.replay import Replay
from hf_ftplus.testing import check_strategy

SIZES = {"sums": 8, "chat": 32, "code": 128}
CHAT = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}]} for i in range(6)
]
SUMS = [{"prompt": f"What is {i} and {i}? ", "completion": f"It is {2 * i}."} for i in range(12)]
TEXT = [{"text": f"Boat {i} is in the harbour of Velmora."} for i in range(9)]


def labelled(sizes=SIZES) -> list[dict]:
    return [
        {"prompt": f"{task} {i}: ", "completion": f"lantern {i}.", "task": task}
        for task, size in sizes.items()
        for i in range(size)
    ]


def by_name(folder, learn, *strategies, protect=None, kind=Dataset.from_list, **kwargs):
    """An SFTTrainer of learn tasks given by name."""
    return SFTTrainer(
        tiny_llama(),
        args=arguments(folder, **kwargs),
        train_dataset={name: kind(rows) for name, rows in learn.items()},
        processing_class=tiny_tokenizer(MARKED),
        strategies=strategies,
        protect=protect,
    )


def drawn_of(it, epochs: int = 1) -> Counter:
    found = Counter()
    for epoch in range(epochs):
        it._mixture.set_epoch(epoch)
        found += Counter(it._mixture)
    return found


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_temperature_lies_between_proportional_and_equal():
    assert tempered(SIZES, 1.0) == {"sums": 8 / 168, "chat": 32 / 168, "code": 128 / 168}
    roots = [8**0.5, 32**0.5, 128**0.5]  # 1 : 2 : 4
    assert list(tempered(SIZES, 2.0).values()) == pytest.approx([root / sum(roots) for root in roots])
    assert list(tempered(SIZES, 1e9).values()) == pytest.approx([1 / 3] * 3)


def test_a_cap_counts_no_task_for_more_and_comes_before_the_temperature():
    assert tempered(SIZES, 1.0, 40) == {"sums": 0.1, "chat": 0.4, "code": 0.5}
    assert list(tempered(SIZES, 2.0, 32).values()) == pytest.approx([0.2, 0.4, 0.4])


def test_unimax_agrees_with_a_published_example():
    """Characters of five languages, a budget of 250 G, at most 4 epochs (package unimax_sampling 's README)."""
    sizes = {
        "swe": 179_955_884_499,
        "fas": 184_595_788_282,
        "ekk": 42_541_080_893,
        "isl": 10_027_573_389,
        "fao": 549_707_867,
    }
    expected = {
        "fao": 0.008795325872,
        "isl": 0.160441174224,
        "ekk": 0.2769211666346667,
        "swe": 0.27692116663466665,
        "fas": 0.27692116663466665,
    }
    assert unimax(sizes, 250e9, 4) == pytest.approx(expected)


def test_unimax_is_equal_with_little_to_draw_and_proportional_with_very_much():
    assert list(unimax(SIZES, 12, 4).values()) == pytest.approx([1 / 3] * 3)
    assert unimax(SIZES, 168 * 10, 4) == pytest.approx(tempered(SIZES, 1.0))


@pytest.mark.parametrize("seed", range(30))
def test_a_limit_binds_exactly_and_leaves_the_others_in_proportion(seed):
    generator = random.Random(seed)
    raw = [generator.random() for _ in range(5)]
    shares = {i: value / sum(raw) for i, value in enumerate(raw)}
    most = {i: generator.uniform(0.1, 0.6) for i in range(5)}
    if sum(most.values()) < 1:
        most = {i: value / sum(most.values()) * 1.1 for i, value in most.items()}
    found = limited(shares, most)
    assert sum(found.values()) == pytest.approx(1)
    free = [i for i in shares if found[i] < most[i] * (1 - 1e-9)]
    assert all(found[i] <= most[i] * (1 + 1e-9) for i in shares)
    assert all(found[i] >= shares[i] * (1 - 1e-9) for i in free)
    assert all(found[i] / found[j] == pytest.approx(shares[i] / shares[j]) for i, j in itertools.pairwise(free))


def test_equal_with_a_limit_is_unimax():
    most = {task: 4 * size / 300 for task, size in SIZES.items()}
    assert limited(dict.fromkeys(SIZES, 1 / 3), most) == pytest.approx(unimax(SIZES, 300, 4))


# ---- in a trainer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "counts"),
    [
        (MultiTask(), [24, 48, 96]),
        (MultiTask(mode="equal"), [56, 56, 56]),
        (MultiTask(mode="temperature", temperature=1e9), [56, 56, 56]),
        (MultiTask(mode="cap", cap=20), [28, 70, 70]),
        (MultiTask(weights="code=1, sums=2,chat=3"), [56, 84, 28]),
        (MultiTask(weights={"code": 0, "sums": 1, "chat": 1}), [84, 84, 0]),
        (MultiTask(mode="unimax"), [32, 68, 68]),
        (MultiTask(mode="equal", max_epochs=2), [16, 64, 88]),
        (MultiTask(weights="sums=1,chat=1,code=8", max_epochs=1), [8, 32, 128]),
    ],
)
def test_an_epoch_draws_exactly_the_rows_of_each_mode(tmp_path, strategy, counts):
    it = trainer(tmp_path, strategy, protect=None, learn=labelled(), max_steps=-1, num_train_epochs=1)
    if it._mixture is None:  # every row once, which is plain shuffling
        assert counts == list(SIZES.values())
        return
    found = drawn_of(it)
    tasks = it._mixture.members
    assert [sum(found[row] for row in tasks[name].tolist()) for name in SIZES] == counts
    assert len(it._mixture) == 168
    for rows in tasks.values():  # none twice more than another
        times = [found[row] for row in rows.tolist()]
        assert max(times) - min(times) <= 1
    figures = strategy.metrics()
    assert [figures[f"rows/{name}"] * 168 for name in SIZES] == pytest.approx(counts)
    assert sum(figures[f"tokens/{name}"] for name in SIZES) == pytest.approx(1)


def test_proportional_trains_as_trl_does(tmp_path):
    learn = labelled({"a": 6, "b": 18})
    ours = trainer(tmp_path, MultiTask(mode="proportional"), protect=None, learn=learn)
    plain = trainer(tmp_path, cls=trl.SFTTrainer, learn=learn)
    ours.train(), plain.train()
    assert same(weights_of(ours), weights_of(plain))
    assert ours.ftplus.strategies[0].metrics()["rows/a"] == 0.25


@pytest.mark.parametrize(
    ("replay", "steps"), [((), -1), ((), 126), ((Replay(share=0.5),), -1), ((Replay(share=0.5),), 252)]
)
def test_a_small_task_comes_at_most_max_epochs_times_in_the_whole_run(tmp_path, replay, steps):
    how = {"learn": labelled(), "protect": PROTECT if replay else None, "max_steps": steps, "num_train_epochs": 3}
    it = trainer(tmp_path, MultiTask(mode="equal", max_epochs=6), *replay, **how)
    times = drawn_of(it, epochs=3)  # 504 rows to learn, which 126 steps of 4 draw, too, and 252 where half are replayed
    assert {times[row] for row in it._mixture.members["sums"].tolist()} == {6}
    assert max(times[row] for task in SIZES for row in it._mixture.members[task].tolist()) == 6


@pytest.mark.parametrize(("mode", "sizes", "epochs", "most"), [
    ("equal", {"a": 8, "b": 100}, 3, 4), ("equal", {"a": 2, "b": 30}, 10, 16), ("unimax", {"a": 7, "b": 90}, 3, 4),
])  # fmt: skip
def test_nor_does_it_where_an_epoch_has_no_such_number_of_rows(tmp_path, mode, sizes, epochs, most):
    how = {"learn": labelled(sizes), "protect": None, "max_steps": -1, "num_train_epochs": epochs}
    it = trainer(tmp_path, MultiTask(mode=mode, max_epochs=most), **how)
    times = drawn_of(it, epochs=epochs)
    assert max(times[row] for row in it._mixture.members["a"].tolist()) in (most, most - 1)
    assert max(times.values()) <= most
    assert sum(it._mixture.counts.values()) == sum(sizes.values())


def test_steps_hold_their_shares_of_every_task(tmp_path):
    it = trainer(tmp_path, MultiTask(mode="equal"), protect=None, learn=labelled({"a": 8, "b": 56}))
    drawn = list(it._mixture)
    steps = [drawn[start : start + 8] for start in range(0, 64, 8)]
    small = set(it._mixture.members["a"].tolist())
    assert [sum(row in small for row in step) for step in steps] == [4] * 8


@pytest.mark.parametrize(
    "order", [(MultiTask(mode="equal"), Replay(share=0.2)), (Replay(share=0.2), MultiTask(mode="equal"))]
)
def test_replay_takes_its_share_off_the_top_in_either_order(tmp_path, order):
    it = trainer(tmp_path, *order, learn=labelled({"a": 8, "b": 16}))
    assert it._mixture.counts == {"a": 12, "b": 12, "protect": 6}
    it.train()
    it = trainer(tmp_path, *order, "ewc", learn=labelled({"a": 8, "b": 16}))
    it.train()
    assert it.ftplus.strategies[0].metrics()


@pytest.mark.dist
def test_it_keeps_every_law_on_one_process_and_two():
    check_strategy(MultiTask())


def test_resumed_in_its_second_epoch_it_ends_where_it_would_have(tmp_path):
    common = {"max_steps": 10, "save_strategy": "steps", "save_steps": 7, "learn": labelled({"a": 4, "b": 20})}
    whole = trainer(tmp_path, MultiTask(mode="equal"), protect=None, **common)
    whole.train()
    resumed = trainer(tmp_path, MultiTask(mode="equal"), protect=None, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert same(weights_of(whole), weights_of(resumed))
    other = trainer(tmp_path, MultiTask(), protect=None, **common)
    with pytest.raises(IncompatibleError, match=r"multitask.mode 'equal' there, 'temperature' here"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


# ---- tasks by name ---------------------------------------------------------------------------------------------------


def alone(folder, rows, **kwargs) -> list[list[int]]:
    it = trl.SFTTrainer(
        tiny_llama(),
        args=arguments(folder, **kwargs),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    return sorted(zip(it.train_dataset["input_ids"], it.train_dataset["labels"], strict=True))


@pytest.mark.parametrize("order", [("text", "sums", "chat"), ("sums", "chat", "text")])
@pytest.mark.parametrize("packing", [{}, {"packing": True, "packing_strategy": "bfd", "max_length": 48}])
def test_each_task_is_prepared_as_if_it_were_alone(tmp_path, order, packing):
    """Formats differ; TRL itself would mask prompts, and pack, as the first row of all of them needs it."""
    learn = {"text": TEXT, "sums": SUMS, "chat": CHAT}
    it = by_name(tmp_path, {name: learn[name] for name in order}, **packing)
    rows = it.train_dataset
    for name in order:
        mine = rows.select([i for i, task in enumerate(rows["task"]) if task == name])
        assert sorted(zip(mine["input_ids"], mine["labels"], strict=True)) == alone(tmp_path, learn[name], **packing)
    assert ("seq_lengths" in rows.column_names) == bool(packing)
    it.train()


def test_named_tasks_are_mixed_with_packing_and_replay(tmp_path):
    packing = {"packing": True, "packing_strategy": "bfd", "max_length": 48, "per_device_train_batch_size": 2}
    strategies = MultiTask(weights="text=1,sums=1"), Replay(share=0.25)
    it = by_name(tmp_path, {"text": TEXT, "sums": SUMS}, *strategies, protect=PROTECT, **packing)
    counts = it._mixture.counts
    assert abs(counts["text"] - counts["sums"]) <= 1
    assert counts["protect"] == round((counts["text"] + counts["sums"]) / 3)
    it.train()


def test_rows_that_trl_need_not_prepare_are_put_together_as_they_are(tmp_path):
    learn = {"a": [{"input_ids": [5, 6], "labels": [5, 6]}], "b": [{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}]}
    it = by_name(tmp_path, learn, dataset_kwargs={"skip_prepare_dataset": True})
    assert it.train_dataset["task"][:] == ["a", "b"]


def test_tasks_may_be_given_by_place_as_trl_takes_its_rows(tmp_path):
    tasks = {"sums": Dataset.from_list(SUMS), "text": Dataset.from_list(TEXT)}
    it = SFTTrainer(tiny_llama(), arguments(tmp_path), None, tasks, processing_class=tiny_tokenizer())
    assert set(it.train_dataset["task"]) == {"sums", "text"}


def test_an_evaluation_set_that_is_one_of_the_tasks_is_left_alone(tmp_path):
    sums = Dataset.from_list(SUMS)
    it = SFTTrainer(
        tiny_llama(),
        args=arguments(tmp_path),
        train_dataset={"sums": sums, "text": Dataset.from_list(TEXT)},
        eval_dataset=sums,
        processing_class=tiny_tokenizer(),
    )
    assert len(it.eval_dataset) == 12
    assert len(it.train_dataset) == 21


def test_assistant_only_loss_is_refused_for_a_task_without_an_assistant(tmp_path):
    with pytest.raises(IncompatibleError, match=r"rows of learn task 'text' are no conversations"):
        by_name(tmp_path, {"chat": CHAT, "text": TEXT}, assistant_only_loss=True)
    it = by_name(tmp_path, {"chat": CHAT, "more": CHAT}, assistant_only_loss=True)
    assert tiny_tokenizer().decode([i for i in it.train_dataset[1]["labels"] if i != -100]) == "Yes.<|im_end|>"


def test_a_task_that_loses_every_row_to_truncation_is_named(tmp_path):
    long = [{"prompt": "word " * 40, "completion": "end"}] * 3
    with pytest.raises(DataError, match=r"learn task 'long' has no row left.*--max_length"):
        by_name(tmp_path, {"sums": SUMS, "long": long}, max_length=32)


# ---- streams ---------------------------------------------------------------------------------------------------------


def stream(rows) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


def test_streams_by_name_are_interleaved_by_weight_and_start_again_where_they_end(tmp_path):
    strategies = MultiTask(weights="sums=3,text=1"), Replay(share=0.2)
    it = by_name(tmp_path, {"sums": SUMS, "text": TEXT}, *strategies, protect=PROTECT, kind=stream)
    tokenizer = tiny_tokenizer()
    starts = {"What": 0.6, "Boat": 0.2, "Quest": 0.2}
    drawn = [tokenizer.decode(row["input_ids"]) for row in it.train_dataset.take(1500)]
    found = Counter(next(start for start in starts if text.startswith(start)) for text in drawn)
    expected = {start: share * 1500 for start, share in starts.items()}
    chi_square = sum((found[start] - expected[start]) ** 2 / expected[start] for start in starts)
    assert chi_square < 13.8  # two degrees of freedom: beyond this in one of a thousand
    it.train()
    again = by_name(tmp_path, {"sums": SUMS, "text": TEXT}, *strategies, protect=PROTECT, kind=stream)
    again.train()
    assert same(weights_of(it), weights_of(again))


def test_streams_need_an_end_and_modes_that_count_no_rows(tmp_path):
    learn = {"sums": SUMS, "text": TEXT}
    with pytest.raises(UsageError, match=r"cannot count the rows of streams.*multitask\.mode=equal"):
        by_name(tmp_path, learn, "multitask", kind=stream)
    with pytest.raises(ValueError, match="max_steps"):  # the Trainer says so itself
        by_name(tmp_path, learn, MultiTask(mode="equal"), kind=stream, max_steps=-1)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["a", "a=", "=2", "a=x", "a=-1", "a=nan", "a=1,a=2", "a=inf"])
def test_a_bad_weight_is_shown(weights):
    with pytest.raises(UsageError, match=r"multitask\.weights holds .*NAME=WEIGHT"):
        MultiTask(weights=weights)


def test_weights_that_sum_to_nothing_are_refused():
    with pytest.raises(UsageError, match="sums to 0; expected a weight above 0"):
        MultiTask(weights="a=0,b=0")


def test_names_may_hold_spaces_and_equals_signs():
    assert parse(" a b = 2 , x=y=0.5 ,") == {"a b": 2.0, "x=y": 0.5}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "weights"}, r"mode is 'weights', but there are none\. Type --set multitask\.weights"),
        ({"mode": "cap"}, r"mode is 'cap', but there is none\. Type --set multitask\.cap"),
        ({"mode": "equal", "weights": "a=1"}, r"expected one of the two"),
        (
            {"mode": "equal", "temperature": 3},
            r"temperature is 3, but does nothing in mode 'equal'; expected mode temp",
        ),
        ({"weights": "a=1", "cap": 3}, r"cap is 3, but does nothing in mode 'weights'"),
        ({"mode": "equl"}, r"multitask\.mode is 'equl'.*Did you mean 'equal'"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_before_anything_loads(settings, words):
    with pytest.raises(UsageError, match=words):
        MultiTask(**settings)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("sums=1,chat=1,cod=1", r"no learn task 'cod'\. Did you mean 'code'\? Learn tasks: sums, chat, code\."),
        ("sums=1,chat=1", r"leaves out 'code'; to train without it, add code=0"),
    ],
)
def test_weights_are_of_the_learn_tasks(tmp_path, weights, words):
    with pytest.raises(UsageError, match=words):
        trainer(tmp_path, MultiTask(weights=weights), protect=None, learn=labelled())


def test_one_learn_task_is_not_several(tmp_path):
    with pytest.raises(DataError, match=r"found one learn task, 'learn'; expected several.*column 'task'"):
        trainer(tmp_path, "multitask", protect=None)


def test_a_limit_that_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"max_epochs is 2, but a run of 504 rows is 3 epochs over all 168 rows"):
        trainer(tmp_path, MultiTask(max_epochs=2), learn=labelled(), max_steps=-1, num_train_epochs=3)
    few = MultiTask(weights="sums=1,chat=0,code=0", max_epochs=2)
    with pytest.raises(UsageError, match=r"take 9\.5% of the run"):
        trainer(tmp_path, few, learn=labelled(), max_steps=-1, num_train_epochs=1)


def test_repr_pastes_back_with_weights_and_sampling_is_of_torch_alone():
    assert eval(repr(MultiTask(weights={"a": 1}))) == MultiTask(weights="a=1")
    before = torch.get_rng_state()
    MultiTask(mode="equal")
    assert torch.equal(before, torch.get_rng_state())
