"""`ftplus eval --lm-eval`: local tasks of lm-evaluation-harness, asked of models that are in memory."""

from __future__ import annotations

import pytest
from evaluation.cases import moved
from memorised import ASKED, CHOICES, rows_of, save, scored, that_says, write
from tiny import tiny_tokenizer

from hf_ftplus.cli import main
from hf_ftplus.measured import places
from hf_ftplus.trained import load

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'hf-ftplus[lm-eval]'")
pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # the harness's own

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{target}"
output_type: {kind}
metric_list: [{{metric: {metric}, aggregation: {how}, higher_is_better: {better}}}]
{more}
"""
KINDS = {
    "even": ("multiple_choice", "acc", "mean", "true", 'doc_to_choice: ["yes, it is", "no, it is odd"]'),
    "said": ("generate_until", "exact_match", "mean", "true", "generation_kwargs: {until: [END], max_gen_toks: 12, do_sample: false}"),
    "shown": ("multiple_choice", "acc", "mean", "true", 'num_fewshot: 2\nfewshot_split: test\ndoc_to_choice: ["yes, it is", "no, it is odd"]'),
    "perplexity": ("loglikelihood_rolling", "word_perplexity", "weighted_perplexity", "false", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    base = that_says(ASKED)
    save(base, place / "base")
    save(moved(base, by=0.12), place / "worse")
    silent = [{"prompt": row["prompt"], "completion": tiny_tokenizer().eos_token} for row in ASKED]
    save(that_says(silent, steps=60), place / "empty")
    write(place / "rows.jsonl", CHOICES)
    write(place / "odd.jsonl", [{**row, "completion": " no, it is odd"} for row in ASKED])
    (place / "tasks").mkdir()
    for name, (kind, metric, how, better, more) in KINDS.items():
        target = "{{ 0 if 'yes' in completion else 1 }}" if name in ("even", "shown") else "{{completion}}"
        known = {"name": name, "file": place / "rows.jsonl", "target": target, "kind": kind, "metric": metric}
        (place / "tasks" / f"{name}.yaml").write_text(TASK.format(**known, how=how, better=better, more=more))
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "cache"))


def test_scores_are_those_of_the_harness_alone_and_are_compared_as_others_are(place, tmp_path, capsys):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    flags = ["--lm-eval", "even,said", "--lm-eval-include", place / "tasks"]
    found = scored(place, tmp_path / "out", ["base", "worse", "empty"], *flags)
    assert "8 of 8 cells" in capsys.readouterr().err
    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    for name, entries in zip(["base", "worse", "empty"], found["results"], strict=True):
        it = load(str(place / name))
        harness = HFLM(pretrained=it.model, tokenizer=it.tokenizer)
        truth = lm_eval.simple_evaluate(harness, tasks=["even", "said"], task_manager=manager, bootstrap_iters=0)[
            "results"
        ]
        assert entries[0]["after"]["metric"]["value"] == truth["even"]["acc,none"]
        assert entries[1]["after"]["metric"]["value"] == truth["said"]["exact_match,none"]
        assert entries[0]["after"]["loss"]["value"] is entries[0]["drift"]["value"] is None
    assert [[entry["verdict"] for entry in entries] for entries in found["results"][1:]] == [["lost"] * 2] * 2
    assert found["results"][2][1]["after"]["metric"]["value"] == 0  # an empty answer is worth nothing
    worse = found["results"][1][1]
    rows = rows_of(tmp_path / "out", worse)
    assert all(row["written"] for row in rows)
    assert [row["row"] for row in worse["right_only_first"]] == [row["row"] for row in rows if not row["score"]]
    assert scored(place, tmp_path / "out", ["base", "worse", "empty"], *flags)["results"] == found["results"]
    assert "0 of 8 cells" in capsys.readouterr().err


def test_our_tasks_are_scored_there_as_they_are_here(place, tmp_path, capsys):
    chat = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}]
    write(tmp_path / "chat.jsonl", chat)
    flags = ["--measure", f"even={place / 'rows.jsonl'}", "--measure", f"my quiz={place / 'odd.jsonl'}"]
    flags += ["--metric", "my quiz=f1:(?:no|yes), (.+)", "--measure", f"chat={tmp_path / 'chat.jsonl'}"]
    assert main(["eval", *flags, "--export", str(tmp_path / "tasks")]) == 0
    assert "--tasks ftplus_even,ftplus_my_quiz,ftplus_chat" in capsys.readouterr().err
    there = ["--lm-eval", "ftplus_even,ftplus_my_quiz", "--lm-eval-include", tmp_path / "tasks"]
    found = scored(place, tmp_path / "out", ["base", "worse", "empty"], *flags[:6], *there)  # the second rambles
    values = [[entry["after"]["metric"]["value"] for entry in model] for model in found["results"]]
    for even, quiz, even_there, quiz_there in (values[0], values[2]):
        assert even_there == even
        assert quiz_there == pytest.approx(quiz)
    assert 0.5 < values[0][1] < 1  # `it is` for `it is odd`
    assert values[0][0] > values[1][0]


def test_the_same_model_twice_kept_a_benchmark_and_other_rows_are_another_task(place, tmp_path, capsys):
    flags = ["--lm-eval", "even", "--lm-eval-include", place / "tasks"]
    found = scored(place, tmp_path / "out", ["base", "base"], *flags, "--measure", f"own={place / 'rows.jsonl'}")
    assert [(entry["name"], entry["verdict"]) for entry in found["results"][1]] == [("own", "kept"), ("even", "kept")]
    assert found["noise_floor"]["even"] == {"score": 0, "loss": None, "drift": None}
    capsys.readouterr()
    few = scored(place, tmp_path / "few", ["base"], *flags, "--measure-rows", "10")
    assert few["results"][0][0]["rows"] == 10
    assert "1 of 1 cells" in capsys.readouterr().err


def test_every_model_is_shown_the_same_examples_and_a_resumed_run_too(place, tmp_path, monkeypatch):
    flags = ["--lm-eval", "shown", "--lm-eval-include", place / "tasks"]
    whole = scored(place, tmp_path / "out", ["base", "worse"], *flags)
    prompts = [[row["prompt"] for row in rows_of(tmp_path / "out", entries[0])] for entries in whole["results"]]
    assert prompts[0] == prompts[1]
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "other"))
    scored(place, tmp_path / "part", ["base"], *flags)
    resumed = scored(place, tmp_path / "resumed", ["base", "worse"], *flags)
    assert resumed["results"] == whole["results"]


def test_rows_are_spread_over_the_benchmark_and_the_result_says_so(place, tmp_path):
    flags = ["--lm-eval", "even", "--lm-eval-include", place / "tasks", "--measure-rows", "4"]
    (entry,) = scored(place, tmp_path / "out", ["base"], *flags)["results"][0]
    asked = [row["prompt"] for row in rows_of(tmp_path / "out", entry)]
    assert asked == [CHOICES[place]["prompt"] for place in places(len(CHOICES), 4)]
    assert f"4 of {len(CHOICES)} rows, spread evenly." in entry["notes"]


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--lm-eval evn --lm-eval-include tasks", 2, "--lm-eval evn: no such task."),
        ("--lm-eval even --lm-eval-include nowhere", 2, "--lm-eval-include nowhere is no folder"),
        (
            "--lm-eval perplexity --lm-eval-include tasks",
            3,
            "its metrics are word_perplexity; expected one with a score",
        ),
    ],
)
def test_careless_acts(place, monkeypatch, capsys, flags, code, said):
    monkeypatch.chdir(place)
    assert main(["eval", "base", *flags.split()]) == code
    assert said in capsys.readouterr().err
