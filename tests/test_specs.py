"""What a user may type or pass as data is understood, or refused with what was expected."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset

from hf_ftplus.errors import UsageError
from hf_ftplus.specs import TaskSpec, as_tasks, is_batches, parse_all

ROW = {"prompt": "Name a colour.", "completion": " Blue."}


# ---- what the user typed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("old.jsonl", TaskSpec("old", "old.jsonl")),
        ("old.jsonl:train[:10]", TaskSpec("old", "old.jsonl", "train[:10]")),
        ("old.jsonl:train[:9]+train[90%:]", TaskSpec("old", "old.jsonl", "train[:9]+train[90%:]")),
        ("org/set:train+test", TaskSpec("set", "org/set", "train+test")),
        ("chat=data/old.jsonl", TaskSpec("chat", "data/old.jsonl")),
        ("chat=org/set:test", TaskSpec("chat", "org/set", "test")),
        ("org/set", TaskSpec("set", "org/set")),
        ("org/set-1.5", TaskSpec("set-1.5", "org/set-1.5")),
        ("C:\\data\\old.jsonl", TaskSpec(Path("C:\\data\\old.jsonl").stem, "C:\\data\\old.jsonl")),
        ("we:ird.jsonl", TaskSpec("we:ird", "we:ird.jsonl")),
        ("runs/lr=3/old.csv", TaskSpec("old", "runs/lr=3/old.csv")),
        ("self:256", TaskSpec("self", "self", generate=256)),
        ("own words=self:8", TaskSpec("own words", "self", generate=8)),
        ("own words=self:8x24", TaskSpec("own words", "self", generate=8, tokens=24)),
    ],
)
def test_task_specifications(text, expected):
    assert TaskSpec.parse(text) == expected


def test_what_the_model_writes_is_said_as_it_is_typed():
    assert [str(TaskSpec.parse(text)) for text in ("self:8", "own=self:8x24")] == ["self=self:8", "own=self:8x24"]


def test_a_file_that_exists_is_never_taken_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b:c").write_text(json.dumps(ROW))
    assert TaskSpec.parse("a=b:c").source == "a=b:c"


@pytest.mark.parametrize(
    "text", ["self", "self:", "self:0", "self:many", "self:-3", "x=self:1.5", "self:8x", "self:8x0", "self:x8"]
)
def test_self_needs_a_number_of_rows(text):
    with pytest.raises(UsageError, match="self:256"):
        TaskSpec.parse(text)


@pytest.mark.fault("E13")
def test_two_tasks_of_one_name_are_refused_however_they_are_spelt():
    for pair in (["a/old.jsonl", "b/OLD.jsonl"], ["\u00e9=x.csv", unicodedata.normalize("NFD", "É") + "=y.csv"]):
        with pytest.raises(UsageError, match="OTHER_NAME=FILE"):
            parse_all(pair)
    assert [spec.name for spec in parse_all(["a/old.jsonl", "older=b/old.jsonl"])] == ["old", "older"]


# ---- what the Python API accepts -----------------------------------------------------------------------------------


def test_everything_accepted_as_protect(chat_rows):
    dataset = Dataset.from_list(chat_rows)
    batches = [{"input_ids": torch.ones(1, 2).long(), "labels": torch.ones(1, 2).long()}]
    assert as_tasks(None) == {}
    assert as_tasks(dataset) == {"protect": dataset}
    assert as_tasks({"a": dataset, "b": chat_rows, "c": batches, "d": "x/old.jsonl:test", "e": "self:4"}) == {
        "a": dataset,
        "b": chat_rows,
        "c": batches,
        "d": TaskSpec("d", "x/old.jsonl", "test"),
        "e": TaskSpec("e", "self", generate=4),
    }
    assert as_tasks(datasets.DatasetDict(test=dataset))["test"] is dataset
    assert as_tasks("self:8") == {"self": TaskSpec("self", "self", generate=8)}
    assert list(as_tasks(["a.csv", "b=b.csv", Path("c.csv")])) == ["a", "b", "c"]
    assert as_tasks(Path("x/old.jsonl")) == as_tasks({"old": Path("x/old.jsonl")}) == as_tasks("x/old.jsonl")
    assert is_batches(as_tasks(batches)["protect"])
    assert not is_batches(as_tasks(chat_rows)["protect"])


@pytest.mark.parametrize(
    ("wrong", "called"),
    [
        (5, "builtins.int"),
        ([], "an empty list"),
        ([1], "a list of int"),
        (torch.ones(2), "torch.Tensor"),
        ({"a": 3.0}, "builtins.float"),
        (Dataset.from_list([ROW]).to_iterable_dataset(), "list.stream.take"),
    ],
)
def test_a_wrong_type_is_named_beside_what_is_accepted(wrong, called):
    with pytest.raises(UsageError, match=f"{called}.*expected a datasets.Dataset, a list of rows"):
        as_tasks(wrong)


def test_names_that_differ_in_case_alone_are_refused(chat_rows):
    with pytest.raises(UsageError, match="'Chat'"):
        as_tasks({"chat": chat_rows, "Chat": chat_rows})
