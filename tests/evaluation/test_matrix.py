"""Claims about the metrics of a sequence: the papers' definitions, and no number where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from reference import sequence_metrics

from hf_ftplus.evaluation.matrix import backward_transfer, forgetting, forward_transfer, summary

R = [[0.1, 0.2, 0.3], [0.9, 0.4, 0.3], [0.5, 0.8, 0.2], [0.6, 0.3, 1.0]]
"""Three stages: the first task is learnt (.9), half lost (.5) and partly back (.6); the second is lost (.8 -> .3)."""


@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
@pytest.mark.parametrize("losses", [False, True])
def test_the_definitions_word_for_word(tasks, losses):
    R = np.random.default_rng(tasks).normal(size=(tasks + 1, tasks))
    expected = sequence_metrics(R.tolist())
    if losses:
        expected["forgetting"] = sequence_metrics((-R).tolist())["forgetting"]
    for name, value in summary(R, losses).items():
        assert value == (pytest.approx(expected[name]) if expected[name] is not None else None), name


def test_a_matrix_that_can_be_worked_out_by_hand():
    assert summary(R) == {
        "ACC": pytest.approx((0.6 + 0.3 + 1.0) / 3),
        "BWT": pytest.approx(((0.6 - 0.9) + (0.3 - 0.8)) / 2),
        "FWT": pytest.approx(((0.4 - 0.2) + (0.2 - 0.3)) / 2),
        "forgetting": pytest.approx(((0.9 - 0.6) + (0.8 - 0.3)) / 2),
        "LA": pytest.approx((0.9 + 0.8 + 1.0) / 3),
    }


def test_forgetting_is_from_the_best_and_never_from_the_start_or_the_end():
    worse_than_the_start = [[0.9, 0.1], [0.5, 0.1], [0.4, 0.7]]
    assert forgetting(worse_than_the_start) == pytest.approx(0.1)
    better_at_the_end = [[0.1, 0.1], [0.5, 0.1], [0.8, 0.7]]
    assert forgetting(better_at_the_end) == pytest.approx(-0.3)
    best_before_its_own_stage = [[0.1] * 3, [0.5, 0.9, 0.1], [0.5, 0.7, 0.1], [0.5, 0.6, 0.8]]
    assert forgetting(best_before_its_own_stage) == pytest.approx(0.3 / 2)


def test_what_is_undefined_or_was_not_measured_is_none_and_never_zero():
    alone = summary([[0.2], [0.7]])
    assert alone == {"ACC": 0.7, "BWT": None, "FWT": None, "forgetting": None, "LA": 0.7}
    half_way = [R[0], R[1], [None] * 3, [None] * 3]
    assert set(summary(half_way).values()) == {None}
    start_unseen = [[None] * 3, *R[1:]]
    assert forward_transfer(start_unseen) is None
    assert backward_transfer(start_unseen) == pytest.approx(-0.4)


def test_a_matrix_of_another_shape_is_no_sequence():
    with pytest.raises(ValueError, match=r"\[2, 2\]; expected \[T \+ 1, T\]"):
        summary([[1, 2], [3, 4]])
