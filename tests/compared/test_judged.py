"""Claims about means, the front and the recommendation, against slow and obvious ones."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from scipy import stats

from hf_ftplus.compared.candidates import Row
from hf_ftplus.compared.cells import Cell
from hf_ftplus.compared.judged import (
    Judged,
    allowance,
    judge,
    mixed_versions,
    on_front,
    over_seeds,
    recommended,
    reproduced,
)
from hf_ftplus.compared.saved import save, to_csv
from hf_ftplus.compared.shown import table
from hf_ftplus.evaluation.results import Level, TaskResult
from hf_ftplus.evaluation.statistics import NOT_MEASURED, Estimate, Flips
from hf_ftplus.report import Report
from hf_ftplus.stages.plan import Stage

MEASURED = Estimate(1.5)


def task(name, role, change, retention, flips=None, metric=None):
    level = Level(loss=MEASURED, token_accuracy=Estimate(change))
    return TaskResult(
        name, role, 8, 80, metric, after=level, change=Level(token_accuracy=Estimate(change)), drift=Estimate(0.1),
        retention=Estimate(retention), flips=flips,
    )  # fmt: skip


def cell(folder, row, seed, learnt=0.2, kept=0.9, seconds=2.0, resumed=False, more=()):
    """A finished one, with its report on disk."""
    stage = Stage(1, row.name, folder / row.name / str(seed), {})
    tasks = [task("learn", "learn", learnt, None), task("chat", "protect", -0.1, kept, Flips(3, 1)), *more]
    costs = {name: {"seconds": 0.5, "bytes": 1000} for item in row.plugins for name in item}
    made = Cell(row, seed, stage, "finished")
    (stage.folder / "ftplus").mkdir(parents=True)
    Report(tasks, {"seconds": {"preparing": 0.5, "training": seconds}, "strategies": costs}).save(stage.report)
    made.keep(pid=1, created=1.0, resumed=resumed, seconds=9.0, peak_bytes=5000, code=0)
    return made


def judged(learning, retention, seconds=1.0, held=0.0, n=1, half=None, name="x", each=()):
    """`each`: retention by seed; `retention` is then their mean."""
    ends = () if half is None else (learning - half, learning + half)
    learnt = NOT_MEASURED if learning is None else Estimate(learning, *ends)
    made = Judged(Row(name, 1e-3), [], n, learnt, retention=Estimate(retention), seconds=seconds, bytes=held)
    made.each = {seed: {"retention": kept} for seed, kept in enumerate(each)}
    return made


def keeping(*each, seconds, name):
    """A row of as many seeds that learns 40 points."""
    return judged(0.4, float(np.mean(each)), seconds, n=len(each), half=0.01, name=name, each=each)


def test_a_mean_over_seeds_has_students_interval():
    values = [0.3, 0.5, 0.45, 0.6]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = over_seeds(values)
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high))
    assert over_seeds([0.3]) == over_seeds([0.3, 0.3, 0.3]) == Estimate(0.3)  # that they agree makes nothing certain
    assert over_seeds([0.3, None]) == over_seeds([]) == NOT_MEASURED


def test_rows_that_one_answer_tells_apart_are_alike(tmp_path):
    """Twenty rows measured, half of them right at the start: an answer is worth a tenth of the retention of that task."""

    def asked(kept):
        before, after = Level(metric=Estimate(0.5)), Level(loss=MEASURED, metric=Estimate(0.5 * kept))
        quiz = TaskResult("quiz", "protect", 20, 40, "choice", before, after, drift=MEASURED, retention=Estimate(kept))
        return [quiz]

    dear, cheap, lost = Row("dear", 1e-3), Row("cheap", 1e-3), Row("lost", 1e-3)
    cells = [cell(tmp_path, dear, 0, seconds=90.0, more=asked(1.0)), cell(tmp_path, cheap, 0, more=asked(0.9))]
    found = judge([dear, cheap], cells)
    assert [row.answer for row in found.rows] == [0.05, 0.05]  # of the mean of two tasks
    assert found.best.row is cheap
    assert judge([dear, lost], [cells[0], cell(tmp_path, lost, 0, more=asked(0.7))]).best.row is dear


def test_few_answers_do_not_excuse_a_row_that_forgot():
    kept, gone = judged(0.4, 1.0, 90.0, n=3), judged(0.4, 0.0, 10.0, n=3)
    kept.answer = gone.answer = 1.0
    best, _ = recommended([kept, gone])
    assert best is kept


def test_a_comparison_says_that_it_chose_and_what_it_measured_on(tmp_path):
    note = "measured on trained rows; for held-out ones give --measure learn=DATA."
    rows = [Row("one", 1e-3), Row("two", 1e-3)]
    cells = [cell(tmp_path, row, 0) for row in rows]
    for it in cells:
        report = it.report()
        report.tasks[0].notes.append(note)
        report.save(it.stage.report)
    notes = judge(rows, cells).notes
    assert notes.count(f"learn: {note}") == 1
    assert any("looks a little better than it is" in said for said in notes)
    assert not any("looks a little better than it is" in said for said in judge(rows[:1], cells[:1]).notes)


def test_one_of_several_devices_is_named_in_the_command(tmp_path):
    row = Row("one", 1e-3)
    it = cell(tmp_path, row, 0)
    assert reproduced(judge([row], [it]).rows[0]).startswith("ftplus sft --config ")
    it.keep(**it.kept, device="3")
    assert reproduced(judge([row], [it]).rows[0]).startswith("CUDA_VISIBLE_DEVICES=0 ftplus sft --config ")


def test_the_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = [judged(*rng.integers(0, 4, 2).tolist()) for _ in range(rng.integers(1, 7))]
        points.append(judged(None, 3))
        for item in points:
            a, b = item.learning.value, item.retention.value
            beaten = a is None
            for other in points:
                c, d = other.learning.value, other.retention.value
                if a is not None and c is not None and ((c > a and d >= b) or (c >= a and d > b)):
                    beaten = True
            assert on_front(item, points) is not beaten


def test_the_recommendation_is_what_keeps_most_of_those_that_learn_enough():
    rng = np.random.default_rng(1)
    for _ in range(300):
        n = int(rng.choice([1, 2, 3, 5]))
        rows = [
            judged(
                rng.choice([0.5, 0.9, 0.97, 1.0]) * 0.4,
                rng.choice([0.7, 0.8, 0.9]),
                rng.choice([1, 2]),
                n=n,
                half=0.05,
            )
            for _ in range(rng.integers(1, 6))
        ]
        best, reason = recommended(rows)
        most = max(row.learning.value for row in rows)
        room = min(max(0.05 * most, 0.05), 0.25 * most) if n >= 3 else 0.05 * most
        enough = [row for row in rows if most - row.learning.value <= room + 1e-12]
        kept = max(row.retention.value for row in enough)
        cheapest = min(row.seconds for row in enough if row.retention.value == kept)
        assert (best.retention.value, best.seconds) == (kept, cheapest)
        assert best in enough
        assert reason.count(". ") == 0
        assert reason.endswith(".")
        assert ("a hint, not a result" in reason) == (n < 3)


def test_bytes_break_a_tie_of_seconds_and_what_is_not_measured_is_no_cheap_one():
    dear, cheap, unknown = (judged(0.4, 0.9, 1.0, held, name=str(held)) for held in (9.0, 1.0, None))
    assert recommended([unknown, dear, cheap])[0] is cheap


@pytest.mark.parametrize(("half", "points"), [(0.01, 2), (0.06, 6), (0.45, 10)])
def test_noise_excuses_learning_less_up_to_a_quarter(half, points):
    assert 100 * allowance(judged(0.4, 0.7, n=3, half=half)) == pytest.approx(points)


def test_a_row_that_learnt_nothing_is_never_recommended_however_noisy_the_best_is():
    plain, frozen = judged(0.4, 0.7, n=3, half=0.45, name="plain"), judged(-0.01, 1.0, n=3, half=0.02, name="frozen")
    best, reason = recommended([plain, frozen])
    assert best is plain
    assert "no other row learns nearly as much" in reason


def test_the_cheaper_of_two_that_cannot_be_told_apart_is_taken_and_the_sentence_says_so():
    slow, fast = judged(0.4, 0.9001, 900.0, name="slow"), judged(0.4, 0.9, 10.0, name="fast")
    best, reason = recommended([slow, fast])
    assert best is fast
    assert "fast keeps 90.0 %, cannot be told apart from slow (90.0 %) and costs less, of the 2 rows" in reason
    fast.retention = Estimate(0.88)  # on one seed, a point is where they part
    best, reason = recommended([slow, fast])
    assert best is slow
    assert "slow keeps most, 90.0 %" in reason


@pytest.mark.parametrize(
    ("dear", "cheap", "apart"),
    [
        ((0.90, 0.80, 0.70), (0.88, 0.84, 0.65), False),  # one seed says this, another that
        ((0.90, 0.80, 0.70), (0.87, 0.77, 0.67), True),  # three points on every seed, far apart as the seeds are
        ((0.9001, 0.8001, 0.7001), (0.90, 0.80, 0.70), False),  # on every seed, and nobody would mind
        ((0.95, 0.95, 0.95), (0.99, 0.70, 0.80), True),  # noise, and more than 5 points
    ],
)
def test_three_seeds_tell_rows_apart_in_pairs(dear, cheap, apart):
    rows = [keeping(*dear, seconds=900.0, name="dear"), keeping(*cheap, seconds=10.0, name="cheap")]
    assert recommended(rows)[0].row.name == ("dear" if apart else "cheap")


def test_a_second_in_a_hundred_is_no_lower_cost():
    slow, fast = judged(0.4, 0.905, 100.0, name="slow"), judged(0.4, 0.9, 99.0, name="fast")
    assert recommended([fast, slow])[0] is slow
    slow.bytes = 1.0
    assert recommended([fast, slow])[0] is fast


def test_nothing_is_recommended_where_nothing_was_learnt_or_measured():
    for rows, said in (([judged(0.0, 0.9), judged(-0.1, 1)], "no row learnt"), ([judged(None, 1)], "no row has both")):
        best, reason = recommended(rows)
        assert best is None
        assert said in reason


def test_figures_are_means_over_the_cells_of_a_row(tmp_path):
    plain, ewc = Row("none", 1e-3), Row("ewc", 1e-3, [{"ewc": {}}])
    cells = [cell(tmp_path, plain, 1, 0.2, 0.5), cell(tmp_path, plain, 2, 0.4, 0.7, seconds=4.0)]
    cells += [
        cell(tmp_path, ewc, 1, 0.25, 0.9, resumed=True),
        Cell(ewc, 2, Stage(1, "", tmp_path, {}), "failed", "Oh."),
    ]
    found = judge([plain, ewc], cells)
    one, two = found.rows
    assert (one.n, two.n) == (2, 1)
    assert one.learning.value == pytest.approx(0.3)
    assert one.retention.value == pytest.approx(0.6)
    assert one.negative_flips == 3
    assert one.seconds == pytest.approx((2.5 + 4.5) / 2)
    assert (one.bytes, two.bytes) == (0, 1000)
    assert two.seconds is None  # its report knows only what came after it was resumed
    assert two.learning == Estimate(0.25)
    assert any("different numbers of seeds" in note for note in found.notes)


def test_a_task_whose_retention_is_undefined_in_one_cell_is_in_no_mean(tmp_path):
    row = Row("none", 1e-3)
    cells = [
        cell(tmp_path, row, 1, kept=0.5, more=[task("empty", "protect", 0.0, None)]),
        cell(tmp_path, row, 2, kept=0.7, more=[task("empty", "protect", 0.0, 0.0)]),
    ]
    found = judge([row], cells)
    assert found.rows[0].retention.value == pytest.approx(0.6)
    assert any(note.startswith("empty is left out") for note in found.notes)


def test_steps_that_differ_between_rows_are_said(tmp_path):
    rows = [Row("plain", 1e-3), Row("replay", 1e-3)]
    made = [cell(tmp_path, row, seed) for row in rows for seed in (1, 2)]
    for it, steps in zip(made, (60, 60, 69, 69), strict=True):
        report = it.report()
        report.facts["steps"] = steps
        report.save(it.stage.report)
    found = judge(rows, made)
    assert [item.steps for item in found.rows] == [60, 69]
    assert any(note.startswith("Rows took 60 to 69 steps") for note in found.notes)
    assert not any("steps" in note for note in judge(rows[:1], made[:2]).notes)


def test_cells_of_different_versions_are_said(tmp_path):
    made = [cell(tmp_path, Row("one", 1e-3), seed) for seed in (1, 2)]
    for it, version in zip(made, ("2.12.0", "2.13.0"), strict=True):
        report = it.report()
        report.facts["versions"] = {"torch": version, "trl": "1.16.0"}
        report.save(it.stage.report)
    assert any(
        note.endswith("part of a difference: torch 2.12.0 and 2.13.0.") for note in judge([made[0].row], made).notes
    )
    assert mixed_versions([{"torch": "2", "osf": "1"}, {"torch": "2"}]) == ""
    assert mixed_versions([{"torch": "2"}] * 2) == mixed_versions([]) == ""


def test_files_say_what_the_table_says_and_cells_are_no_formulas(tmp_path):
    row, other = Row("=cmd()", 1e-3), Row("ewc", 1e-3, [{"ewc": {}}])
    cells = [cell(tmp_path, row, 1, kept=0.5), cell(tmp_path, other, 1, kept=0.8)]
    cells.append(Cell(other, 2, Stage(1, "", tmp_path, {}), "failed", "[red]Oh\x1b[2J"))
    found = judge([row, other], cells)
    facts = save(found, tmp_path / "out", "ftplus compare")
    assert facts["recommended"]["row"] == "ewc"
    assert facts["rows"][1]["cells"][1]["state"] == "failed"
    assert facts["rows"][0]["learning"] == {"value": 0.2, "low": None, "high": None}
    lines = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert [line["row"] for line in lines] == ["'=cmd()", "ewc"]
    assert [line["recommended"] for line in lines] == ["0", "1"]
    assert lines[0]["learning_low"] == ""

    from rich.console import Console

    console = Console(width=80, file=io.StringIO())
    console.print(table(found))
    shown = console.file.getvalue()
    assert "[red]Oh" in shown
    assert "\x1b[2J" not in shown
    assert "+20.0" in shown
    assert "80.0" in shown
