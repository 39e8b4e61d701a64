"""Claims about the rule that says lost or kept: by simulation, and word by word."""

from __future__ import annotations

import numpy as np
import pytest

from hf_ftplus.evaluation import statistics
from hf_ftplus.evaluation.statistics import NOT_MEASURED, Estimate, change_of_share, per_row, per_token
from hf_ftplus.evaluation.verdict import noise_floor, rows_to_keep, verdict

HALF = Estimate(0.5, 0.4, 0.6)


@pytest.mark.parametrize(
    ("change", "floor", "rows", "word"),
    [
        (Estimate(-0.10, -0.15, -0.05), 0.0, 64, "lost"),
        (Estimate(0.10, 0.05, 0.15), 0.0, 64, "gained"),
        (Estimate(-0.01, -0.015, -0.005), 0.0, 64, "lost"),  # small, and there
        (Estimate(-0.10, -0.15, -0.05), 0.12, 64, "not resolved"),  # rounding alone does as much
        (Estimate(-0.01, -0.02, 0.01), 0.0, 64, "kept"),
        (Estimate(-0.01, -0.02, 0.01), 0.06, 64, "not resolved"),
        (Estimate(-0.01, -0.06, 0.01), 0.0, 64, "not resolved"),
        (Estimate(0.01, -0.01, 0.06), 0.0, 64, "not resolved"),
        (Estimate(0.0, 0.0, 0.0), 0.0, 53, "not resolved"),
        (Estimate(0.0, 0.0, 0.0), 0.0, 54, "kept"),
        (Estimate(-1.0, -1.0, -1.0), 0.0, 7, "not resolved"),
        (Estimate(-1.0), 0.0, 64, "not resolved"),
        (NOT_MEASURED, 0.0, 64, "not measured"),
        (Estimate(0.0, 0.0, 0.0), None, 64, "not measured"),
    ],
)
def test_the_word_for_every_case(change, floor, rows, word):
    assert verdict(HALF, change, floor, rows) == word


def test_what_scores_nothing_has_nothing_to_keep():
    same = Estimate(0.0, 0.0, 0.0)
    assert verdict(Estimate(0.04), same, 0.0, 64) == "not resolved"
    assert verdict(Estimate(0.06), same, 0.0, 64) == "kept"
    assert verdict(NOT_MEASURED, same, 0.0, 64) == "not measured"


@pytest.mark.parametrize("margin", [0.02, 0.05, 0.1])
def test_rows_to_keep_are_those_whose_interval_fits(margin):
    rows = rows_to_keep(margin)
    for count, fits in ((rows, True), (rows - 1, False)):
        assert (change_of_share([1] * count, [1] * count).high <= margin) == fits


def test_the_noise_floor_is_the_far_end():
    assert noise_floor(Estimate(0.01, -0.03, 0.02)) == 0.03
    assert noise_floor(Estimate(-0.01)) == 0.01
    assert noise_floor(NOT_MEASURED) is None


def test_a_change_of_share_is_the_normal_interval_with_a_flip_each_way_added():
    before, after = [1] * 30 + [0] * 20, [1] * 24 + [0] * 24 + [1] * 2
    found = change_of_share(before, after)
    lost, gained, n = 6, 2, 50  # Bonett and Price 2012: p = (f + 1) / (n + 2)
    p, q = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = 1.959964 * np.sqrt((p + q - (p - q) ** 2) / (n + 2))
    assert (found.value, found.low, found.high) == pytest.approx((-0.08, q - p - half, q - p + half), abs=1e-6)
    assert change_of_share([1], [0]) == Estimate(-1)
    assert change_of_share([1, np.nan], [0, 1]) == change_of_share([], []) == NOT_MEASURED


def paired(draw, trials, rows, down, up):
    """before, after: right or wrong, [trials, rows]; a row goes down or up with these probabilities."""
    what = draw.choice(3, (trials, rows), p=[down, up, 1 - down - up])
    same = draw.random((trials, rows)) < 0.6
    return np.where(what == 0, True, np.where(what == 1, False, same)), np.where(
        what == 0, False, np.where(what == 1, True, same)
    )


@pytest.mark.parametrize(
    ("rows", "down", "up"), [(32, 0.1, 0.1), (64, 0.1, 0.1), (64, 0.2, 0.05), (200, 0.02, 0.05), (200, 0.3, 0.1)]
)
def test_intervals_of_flips_cover_what_they_say(rows, down, up):
    before, after = paired(np.random.default_rng(0), 2000, rows, down, up)
    found = [change_of_share(*pair) for pair in zip(before, after, strict=True)]
    assert 0.93 <= np.mean([item.low <= up - down <= item.high for item in found]) <= 0.97


@pytest.mark.parametrize(("rows", "down"), [(8, 0.02), (8, 0.3), (64, 0.0), (64, 0.01), (64, 0.1), (200, 0.02)])
def test_equal_models_with_answers_that_flip_are_rarely_called_anything_else(rows, down):
    before, after = paired(np.random.default_rng(1), 2000, rows, down, down)
    words = [verdict(HALF, change_of_share(*pair), 0.0, rows) for pair in zip(before, after, strict=True)]
    assert words.count("lost") / 2000 <= 0.035  # 0.025 in truth, of 2000
    assert (words.count("lost") + words.count("gained")) / 2000 <= 0.06


def tokens(draw, rows, shift):
    """How many of the tokens of each row changed sides, and how many it has; rows differ in how much they move."""
    length = draw.integers(3, 60, rows)
    was = draw.binomial(length, 0.6)
    now = draw.binomial(length, np.clip(0.6 + shift + draw.normal(0, 0.08, rows), 0, 1))
    return now - was, length


@pytest.mark.parametrize("rows", [16, 64, 200])
def test_intervals_of_tokens_cover_what_they_say_and_equal_models_are_rarely_called_lost(rows, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    draw, trials = np.random.default_rng(2), 800
    found = [per_token(*tokens(draw, rows, 0.0), seed=trial) for trial in range(trials)]
    covered = np.mean([item.low <= 0 <= item.high for item in found])
    assert 0.93 <= covered <= 0.97
    words = [verdict(HALF, item, 0.0, rows) for item in found]
    assert words.count("lost") / trials <= 0.05


@pytest.mark.parametrize(("rows", "part"), [(64, 0.1), (32, 0.15)])
def test_equal_models_of_which_few_rows_moved_are_rarely_called_anything_else(rows, part, monkeypatch):
    """Four of 64 that happen to move one way are no loss: a graded score, and tokens."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    draw, trials = np.random.default_rng(5), 400
    grades = [per_row(np.where(draw.random(rows) < part, draw.normal(0, 0.3, rows), 0)) for _ in range(trials)]
    flips = (np.where(draw.random(rows) < part, draw.choice([-2, -1, 1, 2], rows), 0) for _ in range(trials))
    sides = [per_token(moved, draw.integers(5, 60, rows)) for moved in flips]
    for found in (grades, sides):
        words = [verdict(HALF, item, 0.0, rows) for item in found]
        assert words.count("lost") / trials <= 0.03
        assert words.count("gained") / trials <= 0.03


def test_a_loss_is_seen_and_the_same_model_in_other_batches_is_none():
    draw = np.random.default_rng(3)
    moved, length = tokens(draw, 64, -0.15)
    assert verdict(HALF, per_token(moved, length), 0.0, 64) == "lost"
    again = np.where(draw.random(64) < 0.1, draw.choice([-1, 1], 64), 0)  # a token here and there
    floor = noise_floor(per_token(again, length))
    assert 0 < floor < 0.01
    assert verdict(HALF, per_token(again, length), floor, 64) == "kept"


def test_few_rows_get_the_interval_of_student():
    """scipy's t interval, where rows are normal; the plain percentile would be a sixth narrower at eight rows."""
    from scipy.stats import ttest_1samp

    ratios = []
    for seed in range(40):
        rows = np.random.default_rng(seed).normal(0, 1, 8)
        found, truth = per_row(rows, seed), ttest_1samp(rows, 0).confidence_interval()
        ratios.append((found.high - found.low) / (truth.high - truth.low))
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)
