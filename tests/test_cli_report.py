"""`ftplus report`: one page of one run or of many, one sentence for bad input, and never a run lost to a page."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
from commands import make_place, words
from report.test_record import result

from hf_ftplus.cli import main
from hf_ftplus.report import Report, history
from hf_ftplus.report.matrix import Matrix


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """out/plain and out/ewc, and the folder above them as the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "ewc"):
        Report([result("facts", "learn"), result()], {"seconds": {"training": 1.0}}).save(
            f"out/{name}/ftplus/report.json"
        )
    return tmp_path / "out"


def test_one_folder_leaves_its_page_beside_its_report(runs, capsys):
    assert main(["report", "out/ewc"]) == 0
    assert capsys.readouterr().out.strip() == "out/ewc/ftplus/report.html"
    assert {path.name for path in (runs / "ewc/ftplus").iterdir()} == {
        "report.json",
        "report.html",
        "report.md",
        "report.csv",
    }
    assert "ftplus report out/ewc" in (runs / "ewc/ftplus/report.html").read_text()
    assert main(["report", "out/ewc"]) == 0  # again, over its own


def test_several_are_joined_under_names_that_tell_them_apart(runs, capsys):
    assert main(["report", "out/plain", "out/ewc/", "out/ewc/ftplus/report.json", "--out", "both.html"]) == 0
    text = (runs.parent / "both.md").read_text()
    assert "| 1 plain | 25.0 [10.0, 40.0] |" in text
    assert "| 2 ewc |" in text
    assert "| 3 " not in text  # given twice, shown once


def test_a_sequence_shows_its_matrix_and_its_stages(runs, capsys):
    matrix = Matrix(
        ["sums", "chat"],
        [],
        [[0.0, 0.5], [0.9, 0.4], [None] * 2],
        [[3.0, 1.0], [1.0, 2.0], [None] * 2],
        [[]] * 3,
        [[]] * 3,
    )
    matrix.save(runs / "seq")
    Report([result("learn", "learn")]).save(runs / "seq/01-sums/ftplus/report.json")
    assert main(["report", "out/seq"]) == 0
    html = (runs / "seq/report.html").read_text()
    assert 'class="heat learnt">90.0<small>1.000</small>' in html
    assert "1 sums" in html
    assert ">sums <small" in html  # what it learnt, under the name that the matrix knows
    assert "| sums | 90.0 (1.000) | 40.0 (2.000) |" in (runs / "seq/report.md").read_text()


def evaluated(*models):
    """An eval.json as `ftplus eval` writes it."""
    change = {**result().to_dict()["change"], "metric": {"value": -0.25, "low": -0.4, "high": -0.1}}
    said = {"before": "me", "after": "<b>you</b>"}
    flips = {"right_only_first": [{"row": 7, "prompt": "Who?", "expected": "me", **said}], "right_only_now": []}
    entry = {**result("quiz", "measure").to_dict(), "change": change, "verdict": "lost", "rows_file": "rows/1.jsonl"}
    return {
        "kind": "eval",
        "format": 1,
        "command": [],
        "versions": {},
        "plan": {"margin": 0.05},
        "noise_floor": {"quiz": {"score": 0.01, "loss": None, "drift": None}},
        "models": [{"name": name} for name in models],
        "results": [[entry | flips] for _ in models],
    }


def test_a_single_model_of_an_eval_has_a_page_too(runs):
    (runs / "eval.json").write_text(json.dumps(evaluated("base")))
    assert main(["report", "out"]) == 0
    html = (runs / "report.html").read_text()
    assert "1 base" in html
    assert "Verdicts" not in html
    heads = (runs / "report.md").read_text().split("| run |")[1].splitlines()[0]
    assert not any(cost in heads for cost in ("steps", "seconds", "state"))  # of a run, which this is not


def compared(runs):
    """A compare.json of two candidates; the first cell of `ewc` is still there."""
    Report([result("facts", "learn"), result()]).save(runs / "cells/ewc/seed-42/ftplus/report.json")
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    figures = dict.fromkeys(("learning", "retention", "drift", "learn_loss"), estimate)
    costs = {"negative_flips": 1.5, "steps": 62.5, "seconds": 12.0, "bytes": 5000, "peak_bytes": None}
    cells = [{"seed": 42, "state": "finished", "folder": "elsewhere/cells/ewc/seed-42", "error": None}]
    lost = [{"seed": 42, "state": "failed", "folder": "elsewhere/cells/none/seed-42", "error": "it broke"}]
    none = {"value": None, "low": None, "high": None}
    return {
        "kind": "compare",
        "format": 1,
        "command": "ftplus compare --plugins none,ewc",
        "rows": [
            {"name": "ewc", "n": 3, **figures, **costs, "front": True, "cells": cells},
            {
                "name": "none",
                "n": 0,
                **dict.fromkeys(figures, none),
                **dict.fromkeys(costs),
                "front": False,
                "cells": lost,
            },
        ],
        "recommended": {"row": "ewc", "reason": "ewc keeps most.", "command": "ftplus sft --config x.yaml"},
        "left_out": ["none, seed 43"],
        "notes": [],
    }


def test_a_comparison_says_which_to_take_and_shows_the_answers_of_each(runs):
    (runs / "compare.json").write_text(json.dumps(compared(runs)))
    assert main(["report", "out"]) == 0
    html, text = (runs / "report.html").read_text(), (runs / "report.md").read_text()
    for said in ("ewc keeps most.", "ftplus sft --config x.yaml", "none, seed 42: it broke", "none, seed 43"):
        assert said in html
        assert said.split(",")[0] in text
    assert "| 1 ewc **recommended** | 3 | yes | +50.0 [40.0, 60.0] | 50.0 [40.0, 60.0] |" in text
    assert "| 1.5 | 62.5 | 12.0 | 5.0 kB | n/m |" in text
    assert "| 2 none | 0 |  | n/m | n/m | n/m | n/m | n/m | n/m | n/m | n/m |" in text
    assert "1 ewc, seed 42" in html
    lines = list(csv.reader((runs / "report.csv").read_text().splitlines()))
    assert ["ewc", "", "", "3", "learning", "recommended", "0.5", "0.4", "0.6"] in lines
    assert ["ewc", "", "", "3", "steps", "recommended", "62.5", "", ""] in lines
    assert ["none", "", "", "0", "seconds", "", "", "", ""] in lines


def test_the_candidates_of_a_comparison_are_shown_with_a_seed_that_all_have(runs):
    """Those of one seed were asked the same."""
    found = compared(runs)
    for name, seeds, row in zip(("ewc", "none"), ((42, 43), (43,)), found["rows"], strict=True):
        row["cells"] = []
        for seed in seeds:
            folder = f"cells/{name}/seed-{seed}"
            Report([result("facts", "learn")]).save(runs / folder / "ftplus/report.json")
            row["cells"].append({"seed": seed, "state": "finished", "folder": folder, "error": None})
    (runs / "compare.json").write_text(json.dumps(found))
    assert main(["report", "out"]) == 0
    html = (runs / "report.html").read_text()
    assert "1 ewc, seed 43" in html
    assert "2 none, seed 43" in html


def test_a_comparison_that_lacks_something_is_one_sentence(runs, capsys):
    found = compared(runs)
    del found["rows"][0]["learning"]["low"]
    (runs / "compare.json").write_text(json.dumps(found))
    assert main(["report", "out"]) == 3
    assert "is no whole compare.json (KeyError: 'low')" in capsys.readouterr().err


def test_the_models_of_an_eval_stand_beside_each_other(runs):
    found = evaluated("base", "tuned", "other")
    found["models"][1]["tokens_per_second"] = 1234.4
    (runs / "eval.json").write_text(json.dumps(found))
    assert main(["report", "out"]) == 0
    text = (runs / "report.md").read_text()
    assert "| 1 tuned | 0.500 [0.410, 0.580] | 1234 |" in text
    assert "| 2 other | 0.500 [0.410, 0.580] | n/m |" in text
    assert "2 other" in text
    assert "| quiz | 48 | 50.0 | 1.0 | lost -25.0 [-40.0, -10.0] | lost -25.0 [-40.0, -10.0] |" in text
    html = (runs / "report.html").read_text()
    assert "quiz with tuned: 1 lost" in html
    assert '<p class="prompt"><small>row 7</small> Who?</p>' in html
    assert "<dt>base</dt><dd><del>me</del></dd>" in html
    assert "<dt>tuned</dt><dd><ins>&lt;b&gt;you&lt;/b&gt;</ins></dd>" in html
    lines = list(csv.reader((runs / "report.csv").read_text().splitlines()))
    assert ["tuned", "quiz", "measure", "48", "verdict", "lost", "", "", ""] in lines
    assert ["base", "quiz", "", "", "noise_floor", "again", "0.01", "", ""] in lines
    assert "3 " not in [line[2:4] for line in text.splitlines()]  # the first is the start of the others


def test_an_eval_of_before_answers_were_kept_has_its_page_without_them(runs):
    found = evaluated("base", "tuned")
    for key in ("before", "after"):
        del found["results"][1][0]["right_only_first"][0][key]
    (runs / "eval.json").write_text(json.dumps(found))
    assert main(["report", "out"]) == 0
    html = (runs / "report.html").read_text()
    flipped, _, _ = html.partition("<h2>Answers</h2>")
    assert "Who?" in flipped
    assert "<dt>base</dt>" not in flipped


CASES = {
    "nothing there": (["nowhere"], 3, "nowhere does not exist; expected the folder of a run or a sequence"),
    "no run": (["empty"], 3, "empty holds no ftplus/report.json, sequence.json, eval.json or compare.json"),
    "cells": (["cells/cells"], 3, "compare.json lies above it: ftplus report cells"),
    "a row of cells": (["cells/cells/ewc"], 3, "compare.json lies above it: ftplus report cells"),
    "cells without": (["begun"], 3, "Runs lie below it: ftplus report begun/cells/ewc/seed-42"),
    "rows": (["scores/rows"], 3, "eval.json lies above it: ftplus report scores"),
    "runs below": (["out"], 3, "Runs lie below it: ftplus report out/ewc out/plain"),
    "damaged": (["damaged"], 3, "cannot be read as JSON"),
    "no figure": (["infinite"], 3, "cannot be read as JSON: Infinity is no number"),
    "older": (["older"], 3, "has format 0; expected a report.json of format 1"),
    "no number": (["wrong"], 3, "'much' is no number"),
    "half a sequence": (["half"], 3, "is no whole sequence.json"),
    "no eval": (["scores"], 3, "is no whole eval.json (ValueError: format 2 of 'eval' instead of 1 of 'eval')"),
    "other file": (["note.txt"], 3, "note.txt is no report.json, sequence.json, eval.json or compare.json"),
    "not html": (["out/ewc", "--out", "x.pdf"], 2, "expected a file that ends in .html, such as x.html"),
    "a folder": (["out/ewc", "--out", "empty"], 2, "such as empty/report.html"),
    "foreign": (["out/ewc", "--out", "mine.html"], 6, "mine.md is there already, and not from `ftplus report`"),
    "unwritable": (["out/ewc", "--out", "note.txt/x.html"], 6, "cannot be written"),
    "none": ([], 2, "Missing argument 'DIR...'"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_one_sentence(runs, capsys, case):
    given, code, sentence = CASES[case]
    here = runs.parent
    for name, text in {"damaged": "{", "older": '{"format": 0}'}.items():
        (here / name).mkdir()
        (here / name / "report.json").write_text(text)
    (here / "empty").mkdir()
    for folder in ("cells", "begun"):
        Report([result()]).save(here / folder / "cells/ewc/seed-42/ftplus/report.json")
    (here / "cells" / "compare.json").write_text("{}")
    (here / "scores" / "rows").mkdir(parents=True)
    (here / "note.txt").write_text("mine")
    (here / "mine.md").write_text("mine")
    wrong = Report([result()]).to_dict()
    wrong["tasks"][0]["drift"]["value"] = "much"
    (here / "wrong").mkdir()
    (here / "wrong" / "report.json").write_text(json.dumps(wrong))
    wrong["tasks"][0]["drift"]["value"] = float("inf")
    (here / "infinite").mkdir()
    (here / "infinite" / "report.json").write_text(json.dumps(wrong))
    (here / "scores" / "eval.json").write_text('{"kind": "eval", "format": 2}')
    (here / "half").mkdir()
    half = {"format": 1, "stages": ["a"], "others": [], "score": [[0.0], ["x"]], "loss": [[1.0], [1.0]], "summary": {}}
    (here / "half" / "sequence.json").write_text(json.dumps(half))
    assert main(["report", *given]) == code
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert "\n" not in said
    assert (here / "mine.md").read_text() == "mine"


def test_help_imports_nothing_of_it():
    code = "import sys, hf_ftplus.cli as c; c.main(['--help']); print(sorted({'jinja2', 'torch', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "report " in done.stdout
    assert done.stdout.strip().endswith("[]")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


def test_every_run_leaves_its_page_and_what_it_logged(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out", "--logging_steps", "1", "--save_strategy", "no")) == 0
    file = tmp_path / "out/ftplus/report.html"
    assert f"Page: {file}" in capsys.readouterr().err
    assert f"ftplus report {file.with_suffix('.json')}" in file.read_text()
    logged = Report.load(file.with_suffix(".json")).facts["history"]
    assert [log["step"] for log in logged if "ewc/penalty" in log] == [1, 2, 3, 4]


def test_a_page_that_cannot_be_made_costs_a_warning_and_not_the_run(place, tmp_path, capsys):
    (tmp_path / "out/ftplus/report.html").mkdir(parents=True)
    assert main(words(place, tmp_path / "out", "--save_strategy", "no", plugin=None)) == 0
    assert "warning: no page could be made" in capsys.readouterr().err
    assert (tmp_path / "out/ftplus/report.json").is_file()


def test_a_long_history_is_thinned_but_no_kind_of_entry_is_lost():
    log = [{"step": i, "eval_loss" if i % 100 == 99 else "loss": 1.0} for i in range(10_000)]
    kept = history(log)
    assert len(kept) <= 400
    assert sum("eval_loss" in entry for entry in kept) == 100
    assert kept[-2:] == log[-2:]
    assert [entry["step"] for entry in kept] == sorted(entry["step"] for entry in kept)
    assert history([]) == []
    assert history(log[:7]) == log[:7]
