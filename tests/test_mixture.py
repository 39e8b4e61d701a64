"""Exact shares, no row twice before all were seen, one stream for a seed, and a resumed run continues it."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from hf_ftplus.mixture import MixtureSampler, allocate

TASKS = ["learn"] * 10 + ["a"] * 3 + ["b"] * 7


def sampler(shares=None, rows=12, seed=0, tasks=TASKS):
    return MixtureSampler(tasks, shares or {"learn": 0.5, "a": 0.25, "b": 0.25}, rows, seed)


def epochs(it, count):
    found = []
    for epoch in range(count):
        it.set_epoch(epoch)
        found.append(list(it))
    return found


@pytest.mark.parametrize("rows", [1, 7, 10, 1001])
@pytest.mark.parametrize(
    "shares",
    [
        {"x": 1.0},
        {"x": 0.5, "y": 0.5},
        {"x": 1 / 3, "y": 1 / 3, "z": 1 / 3},
        {"x": 0.999, "y": 0.001},
        {"x": 1.0, "y": 0.0},
    ],
)
def test_allocation_is_whole_exact_and_within_one_row_of_the_share(shares, rows):
    counts = allocate(shares, rows)
    assert sum(counts.values()) == rows
    assert all(abs(counts[task] - share * rows) < 1 for task, share in shares.items())
    assert all(counts[task] == 0 for task, share in shares.items() if share == 0)


def test_every_epoch_has_the_shares_asked_for():
    for drawn in epochs(sampler(), 5):
        assert Counter(TASKS[i] for i in drawn) == {"learn": 6, "a": 3, "b": 3}
        assert len(drawn) == len(sampler()) == 12


def test_no_row_comes_twice_before_all_of_its_task_were_seen_across_epochs():
    stream = [[i for i in drawn if TASKS[i] == "b"] for drawn in epochs(sampler(), 7)]
    seen = sorted(i for drawn in stream for i in drawn)
    assert seen == sorted(list(range(13, 20)) * 3)  # 7 epochs of 3 rows are 3 laps over 7 rows
    assert len({i for drawn in stream[:2] for i in drawn}) == 6


def test_a_small_task_with_a_large_share_is_repeated_evenly():
    (drawn,) = epochs(sampler({"learn": 0.0, "a": 1.0, "b": 0.0}, rows=31), 1)
    assert sorted(Counter(drawn).values()) == [10, 10, 11]


def test_the_stream_depends_on_seed_and_epoch_alone():
    assert epochs(sampler(), 3) == epochs(sampler(), 3)
    one, other = epochs(sampler(), 2), epochs(sampler(seed=1), 2)
    assert one[0] != one[1]
    assert one != other


def test_an_epoch_can_be_entered_in_the_middle_as_a_resumed_run_does():
    resumed = sampler()
    resumed.set_epoch(4)
    assert list(resumed) == epochs(sampler(), 5)[4]


def test_tasks_are_shuffled_into_one_another():
    (drawn,) = epochs(sampler(rows=200), 1)
    owners = [TASKS[i] for i in drawn]
    assert sum(one != other for one, other in itertools.pairwise(owners)) > 60


def test_tasks_of_one_size_are_not_drawn_in_lock_step():
    tasks = ["task_a1"] * 20 + ["task_b0"] * 20  # names whose letters add up to the same
    drawn = epochs(sampler({"task_a1": 0.5, "task_b0": 0.5}, rows=40, tasks=tasks), 1)[0]
    assert [i for i in drawn if i < 20] != [i - 20 for i in drawn if i >= 20]
    it = sampler({"task_a1": 0.5, "task_b0": 0.5}, rows=40, tasks=tasks)
    assert it._draw("task_a1") != [i - 20 for i in it._draw("task_b0")]


@pytest.mark.parametrize("seed", [20_260_101, 2**32 - 1])
def test_any_seed_that_torch_takes_is_taken(seed):
    assert len(epochs(sampler(seed=seed), 1)[0]) == 12
