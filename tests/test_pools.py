"""Rows of several tasks in one dataset: counted, packed apart, with the learn rows' columns, and refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from batches import padded, padding_free, random_rows
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value

from hf_ftplus.errors import DataError, IncompatibleError, UsageError
from hf_ftplus.pools import Pools, learn_tasks, supervised_tokens, together


def rows(count: int, seed: int = 0, longest: int = 9, **columns) -> Dataset:
    found = random_rows(count, 64, longest, seed)
    made = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in found]
    return Dataset.from_list([{**row, **{k: v[n] for k, v in columns.items()}} for n, row in enumerate(made)])


def protect(count: int = 6, seed: int = 1):
    return padded(random_rows(count, 64, seed=seed), 4)


# ---- counting --------------------------------------------------------------------------------------------------------


def test_supervised_tokens_are_those_that_something_predicts(monkeypatch):
    monkeypatch.setattr("hf_ftplus.pools.CHUNK", 3)
    labels = [[1, 2, 3], [-100, -100], [], [-100, 5, -100, 6], [7], [8, 9], [-100, 1]]
    data = Dataset.from_dict({"input_ids": labels, "labels": labels})
    slowly = [sum(label != -100 for label in row[1:]) for row in labels]
    assert supervised_tokens(data).tolist() == slowly == [2, 0, 0, 2, 0, 1, 1]
    some = data.select([6, 0, 3])
    assert supervised_tokens(some).tolist() == [1, 2, 2]
    small = data.cast(Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))}))
    assert supervised_tokens(small).tolist() == slowly


def test_the_first_token_of_each_document_packed_into_a_row_is_not_predicted_either():
    labels = [[1, 2, 3, 4, 5], [6, 7], [8, -100, 9]]
    data = Dataset.from_dict({"input_ids": labels, "labels": labels, "seq_lengths": [[2, 1, 2], [2], [2, 1]]})
    assert supervised_tokens(data).tolist() == [2, 1, 0]
    assert supervised_tokens(data.select([2, 0])).tolist() == [0, 2]


def test_what_there_is_of_each_task():
    learn = rows(10, task=["a"] * 4 + ["b"] * 6)
    pools = Pools(learn, {"chat": protect()})
    assert {name: (task.role, task.rows) for name, task in pools.tasks.items()} == {
        "a": ("learn", 4),
        "b": ("learn", 6),
        "chat": ("protect", 6),
    }
    assert pools.tasks["b"].tokens == sum(len(labels) - 2 for labels in learn["labels"][4:])
    assert pools.tasks["chat"].tokens == sum(int((batch["labels"] != -100).sum()) for batch in protect())
    assert pools.shares() == {"a": 0.4, "b": 0.6, "chat": 0.0}


def test_the_training_set_holds_learn_rows_then_protect_rows_unpadded():
    learn = rows(10)
    pools = Pools(learn, {"chat": protect()})
    mixed, sampler = pools.mixed({"learn": 0.75, "chat": 0.25}, seed=3)
    assert mixed.column_names == ["input_ids", "labels"]
    assert mixed[:10] == learn[:]
    assert mixed["input_ids"][10:] == [ids.tolist() for ids, _ in random_rows(6, 64, seed=1)]
    assert mixed["labels"][10:] == [labels.tolist() for _, labels in random_rows(6, 64, seed=1)]
    drawn = list(sampler)
    assert sorted(drawn)[:10] == list(range(10))
    assert pools.tasks["chat"].drawn == len(drawn) - 10 == 3
    counts = supervised_tokens(mixed)
    assert pools.tasks["chat"].drawn_tokens == counts[[i for i in drawn if i >= 10]].sum()
    assert pools.tasks["learn"].drawn_tokens == counts[:10].sum()


def test_protect_rows_take_the_columns_and_types_of_the_learn_rows():
    learn = rows(4, attention_mask=[[1]] * 4, seq_lengths=[[1]] * 4, text=["x"] * 4)
    kinds = {name: List(Value("int32")) for name in ("input_ids", "labels", "seq_lengths")}
    learn = learn.cast(Features({**kinds, "attention_mask": List(Value("int8")), "text": Value("string")}))
    mixed, _ = Pools(learn, {"chat": protect()}).mixed({"learn": 0.5, "chat": 0.5}, seed=0)
    assert mixed.column_names == ["input_ids", "labels", "attention_mask", "seq_lengths"]
    assert mixed.features["labels"] == List(Value("int32"))
    row = mixed[5]
    assert row["attention_mask"] == [1] * len(row["input_ids"])
    assert row["seq_lengths"] == [len(row["input_ids"])]


# ---- several learn tasks ---------------------------------------------------------------------------------------------


def test_together_keeps_every_row_with_its_task_and_the_first_rows_are_of_all():
    big, small = rows(30), rows(10, seed=5)
    learn = together({"big": big, "small": small})
    assert sorted(learn["task"]) == ["big"] * 30 + ["small"] * 10
    assert learn["task"][:8].count("small") == 2
    assert [row["input_ids"] for row in learn if row["task"] == "small"] == small["input_ids"][:]
    assert [row["input_ids"] for row in learn if row["task"] == "big"] == big["input_ids"][:]


def test_together_aligns_types_and_names_a_task_without_rows():
    small = rows(3).cast(Features({name: List(Value("int32")) for name in ("input_ids", "labels")}))
    assert len(together({"a": rows(3), "b": small})) == 6
    with pytest.raises(DataError, match=r"learn task 'b' has no row left with a supervised token.*--max_length"):
        together({"a": rows(3), "b": rows(3).select([])})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "dict of nothing; expected names of learn tasks"),
        ({"a": [1, 2]}, "dict of list; expected names of learn tasks"),
        ({"a": rows(2), "b": IterableDataset.from_generator(lambda: iter(()))}, "dict of Dataset, IterableDataset"),
        ({"a": rows(2), "A": rows(2)}, "Two tasks have the name 'A'"),
    ],
)
def test_a_dict_of_anything_else_is_refused(given, words):
    with pytest.raises(UsageError, match=words):
        learn_tasks(given)


def test_the_column_task_holds_words_or_means_nothing():
    assert list(Pools(rows(2, task=[1, 2]), {}).tasks) == ["learn"]
    labelled = rows(3, task=[0, 1, 1]).cast_column("task", ClassLabel(names=["sums", "chat"]))
    assert {name: task.rows for name, task in Pools(labelled, {}).tasks.items()} == {"sums": 1, "chat": 2}
    with pytest.raises(DataError, match=r"learn, row 2: its task is empty"):
        Pools(rows(2, task=["a", None]), {})


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_learn_and_a_protect_task_of_one_name_are_refused():
    with pytest.raises(UsageError, match=r"both called 'chat'.*--protect OTHER=DATA"):
        Pools(rows(2, task=["chat", "sums"]), {"chat": protect()})


def test_protect_rows_that_cannot_be_told_apart_or_carry_no_loss_are_refused():
    with pytest.raises(DataError, match="padding-free micro-batches"):
        Pools(rows(2), {"chat": padding_free(random_rows(3, 64), 3)})
    silent = [{**batch, "labels": batch["labels"].clone().fill_(-100)} for batch in protect()]
    with pytest.raises(DataError, match="no token of its 6 rows carries loss"):
        Pools(rows(2), {"chat": silent})


@pytest.mark.parametrize(
    "learn",
    [
        Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3),
        IterableDataset.from_generator(lambda: iter([{"prompt": "a", "chosen": "b", "rejected": "c"}])),
    ],
)
def test_rows_that_are_not_tokens_with_labels_cannot_be_mixed(learn):
    pools = Pools(learn, {"chat": protect()})
    assert pools.shares() == {"learn": 1.0, "chat": 0.0}
    with pytest.raises(IncompatibleError, match="training rows of this trainer have prompt, chosen, rejected"):
        pools.mixed({"learn": 0.5, "chat": 0.5}, seed=0)


def test_an_empty_learn_set_is_refused():
    with pytest.raises(DataError, match=r"learn has no row with a supervised token.*--max_length"):
        Pools(rows(3).select([]), {})


def test_a_trainer_without_a_learn_set_has_a_learn_task_all_the_same():
    assert Pools(None, {}).shares() == {"learn": 1.0}


# ---- size ------------------------------------------------------------------------------------------------------------


def test_a_large_set_is_counted_and_ordered_in_no_time():
    """A million rows: some tenths of a second, against hours of training."""
    import time

    labels = Dataset.from_dict({"labels": [[-100, 1, 2]] * 1000})
    owners = np.array(["learn"] * 900_000 + ["chat"] * 100_000, dtype=object)
    from hf_ftplus.mixture import MixtureSampler

    begin = time.perf_counter()
    assert supervised_tokens(labels).sum() == 2000
    sampler = MixtureSampler(owners, {"learn": 900_000, "chat": 100_000}, 0, {"chat"})
    assert len(list(sampler)) == 1_000_000
    assert time.perf_counter() - begin < 5
