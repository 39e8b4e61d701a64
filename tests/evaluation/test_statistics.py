"""Claims about figures: paired, honest about zero and about too few rows, and as sure as they say."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from hf_ftplus.evaluation import statistics
from hf_ftplus.evaluation.statistics import (
    NOT_MEASURED,
    Estimate,
    Flips,
    change_of_share,
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


def test_a_share_has_the_interval_of_wilson_everywhere():
    for rows, right in [(2, 1), (10, 0), (10, 10), (16, 15), (64, 13), (200, 199)]:
        found = share([1.0] * right + [0.0] * (rows - right))
        assert found.value == right / rows
        assert (found.low, found.high) == pytest.approx(binomtest(right, rows).proportion_ci(method="wilson"))
        assert found.low <= found.value <= found.high
    assert share([1.0]) == Estimate(1)
    assert share([1.0, np.nan]) == share([]) == NOT_MEASURED


def test_scores_between_right_and_wrong_are_no_share():
    assert share([1.0, 0.5, 0.0, 1.0]) == per_row([1.0, 0.5, 0.0, 1.0])


def test_retention_over_nothing_is_undefined_and_never_infinite():
    assert retention([0, 0, 0], [1, 0, 1]) == NOT_MEASURED
    assert retention([0, 0, 0], [0, 0, 0]) == NOT_MEASURED


def test_retention_of_right_rows_is_bonett_and_prices_ratio():
    before, after = [1] * 20 + [0] * 44, [1] * 14 + [0] * 6 + [1] * 3 + [0] * 41
    found = retention(before, after)
    was, now, n = 20, 17, 23  # of the rows that were right at least once
    together, one, two = 11 / (21 * 18), (1 - 21 / 25) / 21, (1 - 18 / 25) / 18
    k = together**0.5 / (one**0.5 + two**0.5) * 1.959964
    (low_was, high_was), (low_now, high_now) = (
        [(2 * x + k * k + side * k * (k * k + 4 * x * (1 - x / n)) ** 0.5) / (2 * n + 2 * k * k) for side in (-1, 1)]
        for x in (was, now)
    )
    assert (found.value, found.low, found.high) == pytest.approx((0.85, low_now / high_was, high_now / low_was))


def test_retention_of_a_few_right_rows_leaves_room():
    one = retention([1] + [0] * 19, [1, 1] + [0] * 18)
    assert one.value == 2
    assert one.low < 0.5
    assert one.high > 8
    kept, lost = retention([1] * 64, [1] * 64), retention([1] * 4, [0] * 4)
    assert (kept.value, kept.low, kept.high) == pytest.approx((1, 0.97, 1.03), abs=1e-3)
    assert (lost.value, lost.low) == (0, 0)
    assert lost.high > 0.3


def test_retention_of_tokens_has_no_interval_where_a_resample_may_have_nothing_to_keep():
    found = retention([3] + [0] * 19, [3, 3] + [0] * 18)
    assert (found.value, found.low, found.high) == (2, None, None)


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


# ---- as sure as they say -------------------------------------------------------------------------------------------

EASY_TO_HARD = (0.05, 0.1, 0.2, 0.5, 0.8, 0.95)
"""Shares of rows that are right."""


def covered(found, truth):
    """How often an interval held the truth, of those that are intervals."""
    return np.mean([item.low <= truth <= item.high for item in found if item.low is not None])


@pytest.mark.parametrize("rows", [16, 64, 200])
def test_shares_hold_the_truth_as_often_as_they_say(rows):
    found = [share([1.0] * right + [0.0] * (rows - right)) for right in range(rows + 1)]  # all there are, weighed
    each = [
        sum(binom.pmf(right, rows, p) for right, item in enumerate(found) if item.low <= p <= item.high)
        for p in EASY_TO_HARD
    ]
    assert 0.93 <= fmean(each) <= 0.97
    assert min(each) >= 0.91  # counts are whole, so it jumps about


def flipped(draw, rows, right, down, up):
    """before, after of rows that are right or wrong: a right one goes down, a wrong one up with these probabilities."""
    before = draw.random(rows) < right
    return before, np.where(before, draw.random(rows) >= down, draw.random(rows) < up)


@pytest.mark.parametrize(("rows", "down", "up"), [(16, 0.5, 0.1), (64, 0.3, 0.02), (64, 0.1, 0.1), (200, 0.3, 0.3)])
def test_retention_of_right_rows_holds_the_truth_as_often_as_it_says(rows, down, up):
    draw = np.random.default_rng(10)
    each = []
    for right in EASY_TO_HARD:
        found = [retention(*flipped(draw, rows, right, down, up)) for _ in range(600)]
        each.append(covered(found, (right * (1 - down) + (1 - right) * up) / right))
    assert 0.93 <= fmean(each) <= 0.97
    assert min(each) >= 0.91


@pytest.mark.parametrize(("rows", "down", "up"), [(32, 0.3, 0.3), (64, 0.3, 0.1), (200, 0.1, 0.1)])
def test_changes_of_a_share_hold_the_truth_as_often_as_they_say(rows, down, up):
    draw = np.random.default_rng(11)
    each = []
    for right in EASY_TO_HARD:
        found = [change_of_share(*flipped(draw, rows, right, down, up)) for _ in range(500)]
        each.append(covered(found, (1 - right) * up - right * down))
    assert 0.93 <= fmean(each) <= 0.97


def graded(draw, rows):
    """Scores as of F1: some right, some wrong, some in between. 0.42 in truth."""
    return np.where(draw.random(rows) < 0.3, 0.0, np.where(draw.random(rows) < 0.2, 1.0, draw.beta(2, 2, rows)))


def moved(draw, rows, part=0.3):
    """Changes of a graded score, -0.15 where it moves."""
    return np.where(draw.random(rows) < part, draw.normal(-0.15, 0.2, rows), 0.0)


def tokens(draw, rows):
    """Right tokens before and after, and all of them; rows differ in length and in how hard they are."""
    length = draw.integers(3, 60, rows)
    easy = np.clip(0.6 + draw.normal(0, 0.15, rows), 0, 1)
    return draw.binomial(length, easy), draw.binomial(length, 0.8 * easy), length


BOOTSTRAPS = {
    "loss per token": (lambda draw: per_token(draw.gamma(0.5 * (n := tokens(draw, 64)[2]), 2.0), n, 1), 1.0),
    "retention of tokens": (lambda draw: retention(*tokens(draw, 64)[:2], 1), 0.8),
    "graded score": (lambda draw: per_row(graded(draw, 64), 1), 0.7 * (0.2 + 0.8 * 0.5)),
    "change of a graded score": (lambda draw: per_row(moved(draw, 64), 1), -0.045),
}


@pytest.mark.parametrize(("measured", "truth"), BOOTSTRAPS.values(), ids=BOOTSTRAPS)
def test_bootstraps_hold_the_truth_as_often_as_they_say(measured, truth, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    draw = np.random.default_rng(12)
    assert 0.93 <= covered([measured(draw) for _ in range(300)], truth) <= 0.97


def test_a_bootstrap_of_few_rows_that_moved_promises_too_much_as_its_docstring_says(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    draw = np.random.default_rng(13)
    assert 0.78 <= covered([per_row(moved(draw, 16, 0.2), 1) for _ in range(300)], -0.03) <= 0.88
