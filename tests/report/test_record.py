"""Claims about report.json: strict, whole or not there, and read back as it was written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_ftplus.errors import DataError, StorageError
from hf_ftplus.evaluation import Completion, Estimate, Flips, Level, TaskResult
from hf_ftplus.report import Report


def result(name: str = "chat", role: str = "protect", **changes) -> TaskResult:
    facts = {
        "rows": 48,
        "tokens": 1200,
        "metric": "exact_match",
        "before": Level(Estimate(1.02, 0.9, 1.1), Estimate(0.71), Estimate(0.5, 0.3, 0.7)),
        "after": Level(Estimate(1.88, 1.7, 2.0), Estimate(0.52), Estimate(0.25, 0.1, 0.4)),
        "change": Level(Estimate(0.86, 0.7, 1.0)),
        "drift": Estimate(0.412, 0.38, 0.45),
        "retention": Estimate(0.5, 0.41, 0.58),
        "flips": Flips(13, 1),
        "completions": [Completion("Tell me a story.", "Once.", "Once there was a dog.", "Maximize")],
    }
    return TaskResult(name, role, **{**facts, **changes})


def no_constants(text: str):
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_was_saved_is_what_is_loaded(tmp_path):
    tasks = [result(), result("facts", "learn", metric=None, flips=None)]
    report = Report(tasks, {"seed": 3, "versions": {"trl": "1"}})
    path = report.save(tmp_path / "deep" / "ftplus" / "report.json")
    assert Report.load(path) == report


def test_a_missing_figure_is_null_and_not_zero(tmp_path):
    path = Report([TaskResult("chat", "protect", rows=4, tokens=0)]).save(tmp_path / "report.json")
    task = no_constants(path.read_text())["tasks"][0]
    assert task["drift"] == {"value": None, "low": None, "high": None}
    assert task["after"]["loss"]["value"] is None
    assert task["flips"] is None


def test_json_is_strict_whatever_the_facts_hold(tmp_path):
    facts = {
        "path": Path("out"),
        "nan": float("nan"),
        "inf": [float("inf"), -float("inf")],
        "numpy": np.float32(0.5),
        "array": np.arange(2),
        "tensor": torch.tensor(2.5),
        "dtype": torch.bfloat16,
        7: {"a"},
        "half": "\ud83d",
    }
    path = Report([result(drift=Estimate(float("nan")))], facts).save(tmp_path / "report.json")
    found = no_constants(path.read_text(encoding="utf-8"))
    assert found["tasks"][0]["drift"]["value"] is None
    assert found["facts"] == {
        "path": "out",
        "nan": None,
        "inf": [None, None],
        "numpy": 0.5,
        "array": [0, 1],
        "tensor": 2.5,
        "dtype": "torch.bfloat16",
        "7": ["a"],
        "half": "\\ud83d",
    }


def test_text_of_other_languages_stays_readable(tmp_path):
    done = [Completion("Qual é a cor?", "Azul", "海", "🐈")]
    text = Report([result(completions=done)]).save(tmp_path / "report.json").read_text(encoding="utf-8")
    assert all(word in text for word in ("é", "海", "🐈"))


def test_a_report_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = Report([result()]).save(tmp_path / "report.json")
    old = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"Cannot write .*report.json \(No space left on device\)"):
        Report([]).save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_report_is_as_readable_as_any_other_file(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert Report([]).save(tmp_path / "report.json").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ("[]", "has format None"),
        ('{"format": 99}', "has format 99; expected a report.json of format 1"),
        ('{"format": 1, "tasks": [{"name": "x"}], "facts": {}}', "is not a whole report"),
    ],
)
def test_what_is_no_report_is_said_to_be_none(tmp_path, text, reason):
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=reason):
        Report.load(path)
