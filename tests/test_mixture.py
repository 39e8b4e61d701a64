"""Exact shares in every window of rows, no row twice before all were seen, one stream for a seed, and a table of it."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from hf_ftplus.errors import DataError, IncompatibleError
from hf_ftplus.mixture import (
    SHOWN,
    MixtureSampler,
    allocate,
    check_drawn,
    epoch_counts,
    realised,
    rows_drawn,
    spread,
    table,
)
from hf_ftplus.strategy import Task

OWNERS = ["learn"] * 10 + ["a"] * 3 + ["b"] * 7


def sampler(counts=None, seed=0, owners=OWNERS, apart=()):
    return MixtureSampler(owners, counts or {"learn": 6, "a": 3, "b": 3}, seed, apart)


def epochs(it, count):
    found = []
    for epoch in range(count):
        it.set_epoch(epoch)
        found.append(list(it))
    return found


def windows(inside: np.ndarray, size: int) -> set[int]:
    """How many of the chosen rows any window of `size` places holds."""
    before = np.concatenate([[0], inside.cumsum()])
    return set((before[size:] - before[:-size]).tolist())


# ---- whole numbers ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("learn", [24, 96, 1000, 99_991])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.125, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_an_epoch_has_every_learn_row_once_and_protect_rows_beside_them(learn, share, tasks):
    shares = {"learn": 1 - share} | {f"p{i}": share / tasks for i in range(tasks)}
    if learn * share < tasks:
        return
    counts = epoch_counts(shares, {"learn": learn})
    assert counts["learn"] == learn
    beside = sum(counts.values()) - learn
    assert abs(beside - learn * share / (1 - share)) <= 0.5
    assert max(counts[f"p{i}"] for i in range(tasks)) - min(counts[f"p{i}"] for i in range(tasks)) <= 1


def test_learn_tasks_divide_the_learn_rows_whatever_protect_takes():
    shares = {"a": 0.6, "b": 0.2, "p": 0.2}
    assert epoch_counts(shares, {"a": 10, "b": 30}) == {"a": 30, "b": 10, "p": 10}


def test_protect_rows_alone_make_an_epoch_of_the_same_length():
    assert epoch_counts({"learn": 0.0, "p": 1.0}, {"learn": 24}) == {"learn": 0, "p": 24}


def test_a_share_that_rounds_to_no_row_is_an_error_and_says_what_would_do():
    with pytest.raises(DataError, match=r"'p' would get no row: its share of 0\.01 of an epoch of 24 rows.* 0\.042"):
        epoch_counts({"learn": 0.99, "p": 0.01}, {"learn": 24})
    with pytest.raises(DataError, match="'b' would get no row"):
        epoch_counts({"a": 0.999, "b": 0.001}, {"a": 10, "b": 10})


# ---- evenly spread ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(7, 1), (56, 8), (90, 10), (24, 3), (100, 7), (13, 13), (5, 0), (1, 40)])
@pytest.mark.parametrize("seed", range(5))
def test_of_two_tasks_every_window_holds_its_share_rounded_down_or_up(counts, seed):
    order = spread(counts, torch.Generator().manual_seed(seed))
    assert Counter(order.tolist()) == Counter({i: count for i, count in enumerate(counts) if count})
    for size in range(1, len(order) + 1):
        exact = size * counts[1] / len(order)
        assert windows(order == 1, size) <= {int(np.floor(exact + 1e-9)), int(np.ceil(exact - 1e-9))}, size


def test_protect_tasks_hold_their_share_of_every_window_together():
    owners = ["x"] * 40 + ["y"] * 16 + [f"p{i}" for i in range(4) for _ in range(9)]
    counts = {"x": 40, "y": 16, "p0": 2, "p1": 2, "p2": 2, "p3": 2}
    it = sampler(counts, owners=owners, apart={"p0", "p1", "p2", "p3"})
    for drawn in epochs(it, 4):
        protect = np.array(drawn) >= 56
        assert windows(protect, 8) == {1}
        assert windows(protect, 16) == {2}
        assert windows(protect, 3) == {0, 1}


def test_learn_tasks_are_spread_too():
    owners = ["a"] * 100 + ["b"] * 50 + ["c"] * 50
    (drawn,) = epochs(sampler({"a": 100, "b": 50, "c": 50}, owners=owners), 1)
    assert windows(np.array(drawn) < 100, 8) <= {3, 4, 5}
    assert windows(np.array(drawn) >= 150, 8) <= {1, 2, 3}


def test_the_same_place_of_a_step_is_not_always_the_protect_row():
    """Else the same process would get them in every epoch."""
    it = sampler({"learn": 56, "p": 8}, owners=["learn"] * 56 + ["p"] * 8)
    places = {next(place for place, row in enumerate(drawn) if row >= 56) for drawn in epochs(it, 20)}
    assert len(places) > 4


# ---- the stream ------------------------------------------------------------------------------------------------------


def test_every_epoch_has_the_counts_asked_for():
    for drawn in epochs(sampler(), 5):
        assert Counter(OWNERS[i] for i in drawn) == {"learn": 6, "a": 3, "b": 3}
        assert len(drawn) == len(sampler()) == 12


def test_no_row_comes_twice_before_all_of_its_task_were_seen_across_epochs():
    stream = [[i for i in drawn if OWNERS[i] == "b"] for drawn in epochs(sampler(), 7)]
    seen = sorted(i for drawn in stream for i in drawn)
    assert seen == sorted(list(range(13, 20)) * 3)  # 7 epochs of 3 rows are 3 laps over 7 rows
    assert len({i for drawn in stream[:2] for i in drawn}) == 6


def test_a_small_task_with_a_large_share_is_repeated_evenly():
    (drawn,) = epochs(sampler({"learn": 0, "a": 31, "b": 0}), 1)
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


def test_rows_of_a_task_come_in_another_order_each_lap():
    drawn = epochs(sampler({"learn": 10}), 3)
    assert all(sorted(each) == list(range(10)) for each in drawn)
    assert len({tuple(each) for each in drawn}) == 3


def test_tasks_of_one_size_are_not_drawn_in_lock_step():
    owners = ["task_a1"] * 20 + ["task_b0"] * 20  # names whose letters add up to the same
    it = sampler({"task_a1": 20, "task_b0": 20}, owners=owners)
    assert it._draw("task_a1").tolist() != [i - 20 for i in it._draw("task_b0")]


@pytest.mark.parametrize("seed", [20_260_101, 2**32 - 1])
def test_any_seed_that_torch_takes_is_taken(seed):
    assert len(epochs(sampler(seed=seed), 1)[0]) == 12


# ---- what was drawn --------------------------------------------------------------------------------------------------


def tasks() -> dict[str, Task]:
    return {
        "learn": Task("learn", 24, 240, 24.0, 240.0),
        "chat": Task("protect", 16, 400, 4.0, 120.0),
    }


def test_the_table_says_rows_tokens_and_how_often_each_row_is_seen():
    assert table(tasks(), epochs=3).splitlines() == [
        "mixture:",
        "task   role     rows  an epoch  % of rows  % of tokens  each seen",
        "learn  learn      24        24      85.71        66.67       3.00",
        "chat   protect    16         4      14.29        33.33       0.75",
    ]


def test_the_table_of_streams_leaves_out_what_is_not_known():
    streams = {"learn": Task("learn", None, None, 0.9), "chat": Task("protect", 16, None, 0.1)}
    assert table(streams, epochs=3).splitlines()[2:] == [
        "learn  learn    stream                90.00",
        "chat   protect      16                10.00",
    ]


def test_the_table_of_very_many_tasks_is_cut():
    many = {f"task {i}": Task("learn", 1, 1, 1.0, 1.0) for i in range(SHOWN + 5)}
    lines = table(many, epochs=1).splitlines()
    assert "\x1b" not in table({"\x1b[31mred": next(iter(many.values()))}, epochs=1)
    assert len(lines) == SHOWN + 3
    assert lines[-1] == "... and 5 more"


def test_realised_shares_sum_to_one_and_are_left_out_where_unknown():
    assert realised(tasks()) == {"learn": 24 / 28, "chat": 4 / 28}
    assert realised(tasks(), tokens=True) == {"learn": 240 / 360, "chat": 120 / 360}
    assert realised({"learn": Task("learn", None, None, 1.0)}, tokens=True) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chat": Task("protect", 17, 400, 4.0)}, r"drew 4 of 16 rows of task 'chat'.* draws 4 of 17 rows"),
        ({"chat": Task("protect", 16, 400, 3.0)}, r"drew 4 of 16 rows of task 'chat'.* draws 3 of 16 rows"),
        ({"code": Task("protect", 9, 90, 1.0)}, r"drew no row of task 'code'.* draws 1 of 9 rows"),
    ],
)
def test_a_resumed_run_with_another_mixture_is_refused(change, words):
    was = json.loads(json.dumps(rows_drawn(tasks())))
    check_drawn(was, tasks())
    with pytest.raises(IncompatibleError, match=words):
        check_drawn(was, tasks() | change)
    with pytest.raises(IncompatibleError, match="does not say which rows of"):
        check_drawn(None, tasks())
    check_drawn(None, {})
