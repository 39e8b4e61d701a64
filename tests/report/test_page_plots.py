"""Claims about the plots: there is one where the data has one, without text of the data, in the colours of the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from report.hostile import full
from report.test_page import COMMAND, Parsed, of
from report.test_record import result

from hf_ftplus.evaluation import Estimate
from hf_ftplus.page import Run, plots
from hf_ftplus.page.drawn import figures
from hf_ftplus.page.write import page
from hf_ftplus.report import Report

FACTS = {
    "seconds": {"training": 3.0, "measuring": 1.0},
    "strategies": {"replay": {"share_of_rows": 0.125, "share_of_tokens": 0.25}},
    "history": [{"step": i, "loss": 1 / i, "ewc/penalty": 0.1, "ewc/grad_ratio": 2} for i in (1, 2, 3)],
}


@pytest.fixture
def drawing():
    pytest.importorskip("matplotlib", reason="plots need pip install 'hf-ftplus[report]'")


def test_only_what_the_data_has_is_drawn(drawing):
    learn = result("facts", "learn")
    found = figures(of(learn, result("chat"), result("code"), facts=FACTS, runs=2).runs)
    assert [figure["title"] for figure in found["learning"]] == [
        "facts, and what is kept of chat",
        "facts, and what is kept of code",
    ]
    assert [figure["title"] for figure in found["steps"]] == ["training loss", "ewc/penalty"]
    assert found["mixture"][0]["keys"] == ["learn", "protect"]
    assert found["costs"][0]["keys"] == ["training", "measuring"]
    assert figures(of(learn).runs) == {}


def test_points_and_both_error_bars_stand_where_the_figures_are(drawing):
    both = [Run(n, Report([result("facts", "learn"), result("chat")]), Path(n)) for n in "ab"]
    svg = figures(both)["learning"][0]["svg"]
    assert [part for part in (">1</text>", ">2</text>", "retention (after / before)") if part not in svg] == []
    assert "var(--s1)" in svg
    assert "var(--s2)" in svg
    assert "#" not in svg.replace("url(#", "").replace('href="#', "")  # no colour of its own
    less = Report([result("facts", "learn"), result("chat", retention=Estimate(0.5))])
    assert figures([Run("a", less, Path("a"))])["learning"][0]["svg"].count("var(--s1)") < svg.count("var(--s1)")


def test_plots_hold_no_text_of_the_data_and_a_name_for_who_cannot_see(drawing):
    parsed = Parsed(page(full("sentinel"), COMMAND))
    drawings = parsed.all("svg")
    assert drawings
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in drawings)
    section = figures(full("sentinel").runs)
    texts = [figure["svg"] for found in section.values() for figure in found]
    assert not [text for text in texts if "sentinel" in text[text.index(">") :]]


def test_the_same_runs_give_the_same_plots(drawing):
    assert figures(full("word").runs) == figures(full("word").runs)


def test_without_matplotlib_the_tables_stay_and_the_page_says_what_to_type(monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    parsed = Parsed(page(of(result("facts", "learn"), result("chat"), facts=FACTS), COMMAND))
    assert not parsed.all("svg")
    assert parsed.all("table")
    assert "pip install 'hf-ftplus[report]'" in "".join(parsed.text)
