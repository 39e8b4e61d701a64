"""Claims about figures: paired, honest about zero and about too few rows."""

from __future__ import annotations

import numpy as np
import pytest

from hf_ftplus.evaluation.statistics import (
    NOT_MEASURED,
    Estimate,
    Flips,
    estimate,
    flips,
    per_row,
    per_token,
    retention,
    share,
)


def test_a_mean_per_token_weighs_rows_by_their_tokens():
    assert per_token([10.0, 1.0], [5, 1]).value == pytest.approx(11 / 6)  # and not the mean of 2 and 1


def test_rows_without_a_supervised_token_change_nothing():
    assert per_token([3.0, 0.0, 4.0], [2, 0, 2], seed=1) == per_token([3.0, 4.0], [2, 2], seed=1)


def test_the_interval_is_the_textbook_one_where_the_textbook_has_one():
    rows = np.random.default_rng(0).normal(5.0, 2.0, 400)
    found = per_row(rows)
    half = 1.96 * rows.std(ddof=1) / 20
    assert found.low == pytest.approx(rows.mean() - half, abs=0.03)
    assert found.high == pytest.approx(rows.mean() + half, abs=0.03)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    draw = np.random.default_rng(1)
    trials = 150
    covered = 0
    for trial in range(trials):
        tokens = draw.integers(1, 30, 60)
        found = per_token(draw.gamma(2.0 * tokens, 0.5), tokens, seed=trial)  # one nat per token in truth
        covered += found.low <= 1.0 <= found.high
    assert 0.87 <= covered / trials <= 0.99


def test_a_change_is_paired_so_that_differences_between_rows_do_not_blur_it():
    before = np.random.default_rng(2).normal(10, 5, 50)
    after = before + 1.0
    change = per_row(after - before)
    assert (change.value, change.low, change.high) == pytest.approx((1, 1, 1))


def test_nothing_changed_is_an_interval_of_no_width():
    rows = [0, 1, 1, 0, 1, 3]
    kept, change = retention(rows, rows), per_row(np.subtract(rows, rows))
    assert (kept.value, kept.low, kept.high) == (1, 1, 1)
    assert (change.value, change.low, change.high) == (0, 0, 0)


def test_rows_that_all_agree_leave_room_for_one_that_does_not():
    for rows in ([1.0] * 10, [0.0] * 10):
        found = share(rows)
        assert found.value == rows[0]
        assert abs(found.value - (found.low if rows[0] else found.high)) == pytest.approx(0.2775, abs=1e-3)  # Wilson
        assert found.low <= found.value <= found.high
    assert share([1.0, 0.0, 1.0, 1.0]) == per_row([1.0, 0.0, 1.0, 1.0])
    assert share([1.0]) == Estimate(1)


def test_retention_over_nothing_is_undefined_and_never_infinite():
    assert retention([0, 0, 0], [1, 0, 1]) == NOT_MEASURED
    assert retention([0, 0, 0], [0, 0, 0]) == NOT_MEASURED


def test_retention_of_one_right_row_in_twenty_has_a_value_and_no_interval():
    before = [1] + [0] * 19
    found = retention(before, [1, 1] + [0] * 18)
    assert found.value == 2
    assert (found.low, found.high) == (None, None)  # a third of the resamples have nothing to keep


def test_one_row_has_no_interval_and_no_row_no_value():
    assert per_row([1.0]) == estimate([1.0], [1.0])
    assert (per_row([1.0]).value, per_row([1.0]).low) == (1.0, None)
    assert per_row([]) == NOT_MEASURED


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_is_missing_and_not_averaged(bad):
    assert per_token([1.0, bad], [1, 1]) == NOT_MEASURED


def test_the_same_seed_gives_the_same_interval_and_numpy_is_left_alone():
    rows = np.random.default_rng(3).random(30)
    np.random.seed(7)
    expected = np.random.random()
    np.random.seed(7)
    assert per_row(rows, seed=4) == per_row(rows, seed=4)
    assert per_row(rows, seed=4) != per_row(rows, seed=5)
    assert np.random.random() == expected


def test_many_rows_are_drawn_in_pieces_with_the_same_result(monkeypatch):
    from hf_ftplus.evaluation import statistics

    rows = np.random.default_rng(6).random(50)
    whole = per_row(rows)
    monkeypatch.setattr(statistics, "HELD", 50 * 7)
    pieces = per_row(rows)
    assert (pieces.low, pieces.high) == pytest.approx((whole.low, whole.high), abs=0.01)


def test_flips_count_both_directions():
    assert flips([1, 1, 0, 0, 1], [1, 0, 1, 0, 0]) == Flips(negative=2, positive=1)
