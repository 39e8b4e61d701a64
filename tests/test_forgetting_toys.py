"""examples/benchmarks/forgetting/: the two that need no real model, tiny.py and digits.py, cut to a few steps."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[1] / "examples" / "benchmarks" / "forgetting"


def script(name: str):
    """By its file: tests/ has a tiny.py, too."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARK / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def four_tasks(monkeypatch):
    module = script("tiny")
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "ROWS", 128)
    monkeypatch.setattr(module, "PROBLEMS", 4)
    monkeypatch.setattr(module, "OWN", 4)
    return module


def test_answers_are_those_of_the_problems(four_tasks):
    for task, solve in {
        "add": lambda q: f"{int(q[1:3]) + int(q[4:6]):03}",
        "reverse": lambda q: q[2] + q[1],
        "sort": lambda q: "".join(sorted(q[1:3])),
        "add modulo": lambda q: str((int(q[1:3]) + int(q[4:6])) % 10),
    }.items():
        found = four_tasks.problems(task, 50, seed=0)
        assert [answer for _, answer in found] == [solve(asked) for asked, _ in found], task
        assert found != four_tasks.problems(task, 50, seed=1)
        tokens = four_tasks.tokenizer()("".join(found[0])).input_ids
        assert len(tokens) == 1 + len("".join(found[0])), "a token for each symbol"


@pytest.mark.parametrize("name", ["replay 1/3, own text", "distill on learn", "EWC 1,000", "SI 5", "joint"])
def test_a_row_is_four_stages_or_one(four_tasks, name):
    candidate = four_tasks.CANDIDATES[name]
    R = four_tasks.run(candidate, rate=1e-3, seed=0, scored_on=1)
    assert [len(row) for row in R] == [4] * (2 if candidate.joint else 5)
    assert all(0 <= score <= 1 for row in R for score in row)
    assert (four_tasks.figures(R)[1] is None) == candidate.joint


def test_the_rate_that_learns_best_is_chosen_on_a_seed_of_its_own(four_tasks):
    nothing, something, most = ([[0.0] * 4] * 4 + [[share] * 4] for share in (0.0, 0.2, 0.4))
    assert four_tasks.chosen({"0.001 choosing": nothing, "0.002 choosing": most, "0.004 choosing": something}) == 2e-3
    assert four_tasks.CHOOSING not in four_tasks.SEEDS


def test_another_file_measures_anew(four_tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(four_tasks, "SEEDS", (0,))
    monkeypatch.setattr(four_tasks, "LEARNING_RATES", (1e-3,))
    monkeypatch.setattr(logging.getLogger("hf_ftplus"), "setLevel", lambda level: None)  # other tests listen
    monkeypatch.setattr(four_tasks, "disable_progress_bars", lambda: None)
    before = four_tasks.KEPT.read_bytes()
    four_tasks.main(["--only", "joint", "--out", str(tmp_path / "mine.json")], standalone_mode=False)
    assert list(json.loads((tmp_path / "mine.json").read_text())["joint"]) == ["0.001 choosing", "0.001 0"]
    assert four_tasks.KEPT.read_bytes() == before


def test_what_is_kept_makes_the_tables(four_tasks, capsys):
    kept = json.loads(four_tasks.KEPT.read_text())
    four_tasks.print_table(kept)
    said = capsys.readouterr().out
    assert [name for name in four_tasks.CANDIDATES if name not in said] == []
    digits = script("digits")
    assert len(digits.table(json.loads(digits.KEPT.read_text())).rows) == len(digits.ESTIMATORS)


# ---- digits ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def digits(monkeypatch):
    module = script("digits")
    monkeypatch.setattr(module, "WIDTH", 6)
    monkeypatch.setattr(module, "STEPS", 2)
    return module


def example_by_example(network, split, task, labels_of):
    """The mean over examples of squared gradients of their own loss, each by a backward pass of its own."""
    total = {name: torch.zeros_like(weight) for name, weight in network.body.named_parameters()}
    for image, label in zip(*split, strict=True):
        logits = network(image[None], task)
        for y, chance in labels_of(logits.detach(), label):
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([y]))
            found = torch.autograd.grad(loss, list(network.body.parameters()), retain_graph=True)
            for (name, _), g in zip(network.body.named_parameters(), found, strict=True):
                total[name] += chance * g.square() / len(split[0])
    return total


def test_estimates_are_those_of_a_slow_loop(digits):
    torch.manual_seed(0)
    network, split = digits.Network(), (torch.rand(7, 64), torch.tensor([0, 1, 1, 0, 1, 0, 0]))
    every = example_by_example(network, split, 2, lambda logits, _: enumerate(logits.softmax(-1)[0].tolist()))
    true = example_by_example(network, split, 2, lambda _, label: [(label.item(), 1.0)])
    for how, expected in (("exact", every), ("empirical", true)):
        found = digits.estimate(how, network, split, 2, seed=0)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-9), (how, name)
    draws = [digits.estimate("sign", network, split, 2, seed=seed) for seed in range(1000)]
    for name, value in every.items():
        mean = torch.stack([draw[name].sum() for draw in draws]).mean()
        assert mean == pytest.approx(value.sum().item(), rel=0.1), f"{name}: signs are right on average"


@pytest.mark.parametrize("how", ["exact", "sign", "sampled", "empirical", "batched"])
def test_every_estimate_runs_through_all_pairs(digits, how):
    data = [(torch.rand(8, 64), torch.tensor([0, 1] * 4)) for _ in digits.TASKS]
    found = digits.run(how, 10.0, 0, data, data)
    assert 0 <= found["accuracy"] <= 1
    assert found["trace"] > 0
