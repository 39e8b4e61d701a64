"""Claims about the matrix of a sequence: what is still to come is not measured, and unlike figures are pointed out."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from hf_ftplus.errors import DataError, StorageError
from hf_ftplus.evaluation import Estimate, Level, TaskResult
from hf_ftplus.report import Report
from hf_ftplus.report.matrix import Matrix


def task(name, before, after, metric=None, tokens=100):
    levels = [
        Level(Estimate(loss), Estimate(score), Estimate(score if metric else None)) for loss, score in (before, after)
    ]
    return TaskResult(name, "measure", 10, tokens, metric, *levels)


def reports(**changes):
    first = [task("learn", (3.0, 0.1), (1.0, 0.9)), task("sums", (4.0, 0.0), (3.5, 0.25), "choice")]
    second = [task("learn", (3.5, 0.25), (0.5, 1.0), "choice", **changes), task("chat", (1.0, 0.9), (2.0, 0.6))]
    return [Report(first), Report(second)]


def shown(matrix):
    console = Console(width=80, record=True, file=io.StringIO())
    matrix.show(console)
    return console.export_text()


@pytest.mark.fault("F6")
def test_no_name_becomes_a_formula_of_a_spreadsheet():
    one = [[0.0], [0.5]]
    assert "'=1+1,'@chat,0.5,0.5" in Matrix(["=1+1"], ["@chat"], one, one, one, one).to_csv()


def test_rows_are_stages_and_columns_their_tasks():
    matrix = Matrix.of(["chat", "sums"], [], ["learn", "learn"], reports())
    assert matrix.score == [[0.1, 0.0], [0.9, 0.25], [0.6, 1.0]]
    assert matrix.loss == [[3.0, 4.0], [1.0, 3.5], [2.0, 0.5]]
    assert matrix.metrics == {"chat": "token_accuracy", "sums": "choice"}
    assert matrix.summary()["BWT"] == pytest.approx(-0.3)
    assert matrix.summary(losses=True)["BWT"] == pytest.approx(1.0)
    assert matrix.notes == []
    text = shown(matrix)
    assert "score  ACC 80.0  BWT -30.0  FWT 25.0  forgetting 30.0  LA 95.0" in text
    assert "loss   ACC 1.250  BWT 1.000  FWT -0.500  forgetting 1.000  LA 0.750" in text


def test_what_is_still_to_come_is_not_measured():
    matrix = Matrix.of(["chat", "sums", "facts"], ["other"], ["learn"] * 3, reports()[:1])
    assert matrix.score[1:] == [[0.9, 0.25, None], [None] * 3, [None] * 3]
    assert set(matrix.summary().values()) == {None}
    assert "ACC n/m" in shown(matrix)


def test_figures_of_other_rows_are_pointed_out():
    matrix = Matrix.of(["chat", "sums"], [], ["learn", "learn"], reports(tokens=80))
    assert len(matrix.notes) == 1
    assert "sums is measured on 10 rows with 80 tokens in sums, on 10 with 100 in chat" in matrix.notes[0]
    assert "cannot be compared" in " ".join(shown(matrix).split())


def test_it_is_read_back_as_it_was_written(tmp_path):
    matrix = Matrix.of(["chat", "sums"], ["chat"], ["learn", "learn"], reports())
    assert Matrix.load(matrix.save(tmp_path)) == matrix
    (tmp_path / "sequence.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(DataError, match="another format"):
        Matrix.load(tmp_path / "sequence.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Choose another output_dir"):
        matrix.save(tmp_path / "file")
