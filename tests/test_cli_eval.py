"""`ftplus eval`: what it measures beside plain forward passes, what it calls lost, what it keeps, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import make_place, words
from evaluation.cases import brute_force, brute_force_kl, moved
from hub import hub
from memorised import ASKED, CHOICES, rows_of, save, scored, that_says, write
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_ftplus.cli import main
from hf_ftplus.data import load
from hf_ftplus.evaluation import EvalTask, Evaluation
from hf_ftplus.evaluation.drift import keep_head
from hf_ftplus.evaluation.found import as_found
from hf_ftplus.evaluation.scoring import Start
from hf_ftplus.examples import tokenize
from hf_ftplus.measured import hold_out
from hf_ftplus.page.read import scores
from hf_ftplus.page.write import answers
from hf_ftplus.report.text import short
from hf_ftplus.scored import content, measuring


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`base` knows its answers by heart, `worse` is the same model shaken; `lora` is a run with two checkpoints."""
    place = make_place(tmp_path_factory.mktemp("place"))
    base = that_says(ASKED)
    save(base, place / "base")
    save(moved(base, by=0.12), place / "worse")
    write(place / "asked.jsonl", ASKED)
    write(place / "quiz.jsonl", CHOICES)
    write(place / "questions.jsonl", [{"prompt": row["prompt"]} for row in ASKED])
    flags = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--learning_rate", "5e-2"]
    assert main(words(place, place / "lora", *flags, "--measure_rows", "0", plugin=None, protect=None)) == 0
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing was measured before a test."""
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path / "cache" / "eval"


def model_at(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_figures_are_those_of_two_models_that_were_both_kept(place, tmp_path):
    found = scored(place, tmp_path / "out", ["base", "worse"], "--measure", f"asked={place / 'asked.jsonl'}")
    examples = tokenize(ASKED, tiny_tokenizer(), None, "rows").examples
    base, worse = model_at(place / "base"), model_at(place / "worse")
    for model, (entry,) in zip((base, worse), found["results"], strict=True):
        truth = brute_force(model, examples)
        tokens = sum(row[1] for row in truth)
        assert entry["after"]["loss"]["value"] == pytest.approx(sum(row[0] for row in truth) / tokens, rel=1e-5)
        assert entry["after"]["token_accuracy"]["value"] == pytest.approx(sum(row[2] for row in truth) / tokens)
        assert [(row["tokens"], row["correct"]) for row in rows_of(tmp_path / "out", entry)] == [r[1:] for r in truth]
    drift = sum(brute_force_kl(base, worse, examples)) / tokens
    assert found["results"][1][0]["drift"]["value"] == pytest.approx(drift, rel=1e-4)
    assert found["results"][0][0]["verdict"] is None
    assert all(model["tokens_per_second"] > 0 for model in found["models"])


@pytest.mark.parametrize(("order", "word"), [(["base", "worse"], "lost"), (["worse", "base"], "gained")])
def test_what_was_lost_one_way_is_gained_the_other_with_the_rows_that_flipped(place, tmp_path, capsys, order, word):
    flags = ["--measure", f"asked={place / 'asked.jsonl'}", "--metric", "asked=exact_match"]
    found = scored(place, tmp_path / "out", order, *flags)
    first, second = (entries[0] for entries in found["results"])
    assert second["verdict"] == word
    fewer, more = ("right_only_now", "right_only_first")[:: -1 if word == "gained" else 1]
    assert len(second[more]) > len(second[fewer])
    rows = {side: rows_of(tmp_path / "out", entry) for side, entry in (("first", first), ("second", second))}
    for row in second["right_only_first"]:
        one, two = (rows[side][row["row"]] for side in ("first", "second"))
        assert (one["score"], two["score"]) == (1, 0)
        assert one["answer"] == one["expected"].strip() == row["expected"].strip() != two["answer"]
        assert (row["before"], row["after"]) == (one["answer"], two["answer"])
    assert sum(row["score"] for row in rows["second"]) / 64 == second["after"]["metric"]["value"]
    line = capsys.readouterr().out.splitlines()[3].split()
    assert line[0] == order[1]
    assert line[-3:] == [word, f"-{len(second['right_only_first'])}", f"+{len(second['right_only_now'])}"]


def test_the_same_model_twice_kept_everything(place, tmp_path):
    flags = ["--measure", f"asked={place / 'asked.jsonl'}", "--measure", f"quiz={place / 'quiz.jsonl'}"]
    found = scored(place, tmp_path / "out", ["base", "base"], *flags)
    assert [entry["verdict"] for entry in found["results"][1]] == ["kept", "kept"]
    assert [entry["drift"]["value"] for entry in found["results"][1]] == [0, 0]
    few = scored(place, tmp_path / "few", ["base", "base"], *flags, "--measure_rows", "20")
    assert [entry["verdict"] for entry in few["results"][1]] == ["not resolved"] * 2
    assert "54 rows" in few["results"][1][0]["notes"][-1]


def test_adapters_and_checkpoints_are_what_peft_makes_of_them(place, tmp_path):
    names = ["model", "lora/checkpoint-2", "lora"]
    found = scored(place, tmp_path / "out", names, "--measure", f"asked={place / 'asked.jsonl'}")
    examples = tokenize(ASKED, tiny_tokenizer(), None, "rows").examples
    for name, (entry,) in zip(names[1:], found["results"][1:], strict=True):
        truth = brute_force(PeftModel.from_pretrained(model_at(place / "model"), place / name).eval(), examples)
        loss = sum(row[0] for row in truth) / sum(row[1] for row in truth)
        assert entry["after"]["loss"]["value"] == pytest.approx(loss, rel=1e-5)
        assert entry["drift"]["value"] > 0


def test_a_fresh_adapter_has_neither_lost_nor_gained(place, tmp_path):
    get_peft_model(model_at(place / "base"), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "new")
    found = scored(place, tmp_path / "out", ["base", tmp_path / "new"], "--measure", f"asked={place / 'asked.jsonl'}")
    assert found["results"][1][0]["verdict"] == "kept"


def test_models_and_adapters_of_the_hub_are_scored_as_those_of_a_folder(place, tmp_path, monkeypatch, capsys):
    flags = ["--measure", f"asked={place / 'asked.jsonl'}"]
    names = ["me/base", "me/lora"]
    found = scored(place, tmp_path / "out", ["model", "lora"], *flags)
    capsys.readouterr()
    with hub(monkeypatch, tmp_path / "hub") as there:
        there.put("me/base", place / "model")
        there.put("me/lora", place / "lora", base="me/base")
        apart = scored(Path(), tmp_path / "apart", names, *flags)
        assert "3 of 3 cells" in capsys.readouterr().err
        assert [[one["after"], one["drift"]] for (one,) in apart["results"]] == [
            [one["after"], one["drift"]] for (one,) in found["results"]
        ]
        assert main(["eval", *names, *flags]) == 0
        assert "0 of 3 cells" in capsys.readouterr().err
        weights = load_file(place / "lora" / "adapter_model.safetensors")
        there.repos["me/lora"]["adapter_model.safetensors"] = to_bytes({key: 2 * it for key, it in weights.items()})
        assert main(["eval", *names, *flags]) == 0
        assert "1 of 3 cells" in capsys.readouterr().err
        there.put("me/alone", place / "lora", base="me/nothing")
        assert main(["eval", "me/alone", *flags]) == 3
        assert (
            "me/alone is an adapter of 'me/nothing'. The model 'me/nothing' cannot be loaded: me/nothing is not"
            in capsys.readouterr().err
        )


# ---- what is kept ----------------------------------------------------------------------------------------------------


def without_command(found):
    return {key: value for key, value in found.items() if key != "command"}


def test_some_answers_of_every_task_are_shown_whatever_scores_it(place, tmp_path, capsys):
    tasks = ["--measure", f"asked={place / 'asked.jsonl'}", "--measure", f"told={place / 'asked.jsonl'}"]
    line = [*tasks, "--metric", "told=exact_match", "--completions", "2"]
    for _ in range(2):  # measured, and kept from before
        found = scored(place, tmp_path / "out", ["base", "worse"], *line)
        asked, told = found["results"][1]
        assert len(asked["completions"]) == len(told["completions"]) == 2
        for item in asked["completions"]:
            assert item["before"] == greedily(place / "base", item["prompt"])
            assert item["after"] == greedily(place / "worse", item["prompt"])
            assert item["before"].startswith(item["expected"].strip())
        for side, results in zip(("before", "after"), found["results"], strict=True):
            rows = {row["prompt"]: row["answer"] for row in rows_of(tmp_path / "out", results[1])}
            assert all(item[side] == rows[item["prompt"]] for item in told["completions"])
    assert "0 of 6 cells measured now" in capsys.readouterr().err
    other = ["--measure", f"again={place / 'asked.jsonl'}", "--seed", "7", *line[:2], *line[6:]]
    for entry in scored(place, tmp_path / "out", ["base", "worse"], *other)["results"][1]:  # the same rows
        assert all(item["before"] == greedily(place / "base", item["prompt"]) for item in entry["completions"])
        assert all(item["after"] == greedily(place / "worse", item["prompt"]) for item in entry["completions"])
    assert capsys.readouterr().err.count("0 of 6 cells measured now") == 1
    assert sides_of(tmp_path / "out") == {(str(place / "base"), str(place / "worse"))}
    scored(place, tmp_path / "one", ["base"], *other)
    assert sides_of(tmp_path / "one") == {(str(place / "base"),)}
    entries = scored(place, tmp_path / "none", ["base", "worse"], *line[:-1], "0")["results"][1]
    assert not any(entry["completions"] for entry in entries)


def sides_of(out):
    """What a page calls the answers that stand side by side."""
    tasks = answers(scores(out / "eval.json").runs, 1000)
    return {tuple(name for name, _ in item["cells"]) for task in tasks for item in task["items"]}


def greedily(model, prompt):
    """What it goes on with, as transformers' own `generate` says it."""
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    written = model_at(model).generate(input_ids=ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True).strip()


def test_a_choice_is_kept_beside_its_score(place, tmp_path):
    rows = [{"prompt": f"{i}? ", "completion": "yes" if i % 2 else "no", "choices": ["yes", "no"]} for i in range(8)]
    (tmp_path / "picks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scored(place, tmp_path / "out", ["base"], "--measure", f"picks={tmp_path / 'picks.jsonl'}")
    kept = rows_of(tmp_path / "out", found["results"][0][0])
    assert {row["answer"] for row in kept} <= {"yes", "no"}
    assert [row["score"] for row in kept] == [float(row["answer"] == row["expected"].strip()) for row in kept]
    assert all(("yes", "no")[row["likelihoods"][0] < row["likelihoods"][1]] == row["answer"] for row in kept)


def test_nothing_is_measured_twice_and_a_model_that_changed_is(place, tmp_path, capsys, monkeypatch, cache):
    shutil.copytree(place / "worse", tmp_path / "worse")
    flags = [["base", tmp_path / "worse"], "--measure", f"quiz={place / 'quiz.jsonl'}"]
    once = scored(place, tmp_path / "out", *flags)
    assert "3 of 3 cells" in capsys.readouterr().err
    for file in cache.iterdir():
        file.read_text().encode("ascii")
    with monkeypatch.context() as patch:
        patch.delattr(measuring, "load")  # nothing may load
        again = scored(place, tmp_path / "out", *flags)
    assert "0 of 3 cells" in capsys.readouterr().err
    assert without_command(again) == without_command(once)
    file = tmp_path / "worse" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1
    save_file(weights, file, {"format": "pt"})
    scored(place, tmp_path / "out", *flags)
    assert "1 of 3 cells" in capsys.readouterr().err
    scored(place, tmp_path / "out", *flags, "--dtype", "bfloat16")
    assert "3 of 3 cells" in capsys.readouterr().err
    scored(place, tmp_path / "out", *flags, "--metric", "quiz=exact_match")
    assert "3 of 3 cells" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(content, "of_code", lambda: "of another version")
        scored(place, tmp_path / "out", *flags)
    assert "3 of 3 cells" in capsys.readouterr().err
    lines = (place / "quiz.jsonl").read_text().splitlines()
    (tmp_path / "quiz.jsonl").write_text("\n".join([*lines[:-1], lines[0]]))
    scored(place, tmp_path / "out", flags[0], "--measure", f"quiz={tmp_path / 'quiz.jsonl'}")
    assert "3 of 3 cells" in capsys.readouterr().err


def test_interrupted_it_goes_on_and_finds_the_same(place, tmp_path, capsys, monkeypatch):
    flags = [["base", "worse", "model"], "--measure", f"asked={place / 'asked.jsonl'}", "--metric", "asked=exact_match"]
    whole = scored(place, tmp_path / "whole", *flags, "--cache", tmp_path / "other")
    loaded, measure, seen, together = measuring.load, Evaluation.measure, [], []

    def counting(self, model, task, start, hidden, **how):
        seen.append((self.batch_size, task.metric, hidden))
        together.append(self.together)
        return measure(self, model, task, start, hidden, **how)

    def stopping(name, *how):
        if name.endswith("worse"):
            raise KeyboardInterrupt
        return loaded(name, *how)

    monkeypatch.setattr(measuring, "load", stopping)
    out = tmp_path / "out"
    assert main(["eval", *(str(place / name) for name in flags[0]), *flags[1:], "--out", str(out)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (out / "eval.json").exists()
    monkeypatch.setattr(measuring, "load", loaded)
    monkeypatch.setattr(Evaluation, "measure", counting)
    resumed = scored(place, out, *flags)
    assert "2 of 4 cells" in capsys.readouterr().err
    # of the first model the hidden states alone; those of other batches were there
    assert seen == [(8, None, True), (8, "exact_match", False), (8, "exact_match", False)]
    seen.clear()
    scored(place, out, *flags, "--cache", tmp_path / "third", "--batch_size", "32")
    assert [size for size, _, _ in seen] == [32, 16, 32, 32]
    assert together[-4:] == [128, 32, 128, 128]  # the 64 answers, too, are written in other batches
    for one, two in zip(resumed["results"], whole["results"], strict=True):
        assert one == two


def test_tasks_are_exported_without_a_model_and_what_cannot_be_is_named(place, tmp_path, capsys, caplog):
    out = tmp_path / "tasks"
    line = ["eval", "--export", str(out), "--measure", f"a quiz={place / 'quiz.jsonl'}"]
    assert main(line) == 0
    assert f"lm-eval run --include_path {out} --tasks ftplus_a_quiz" in capsys.readouterr().err
    assert {file.name for file in out.iterdir()} == {"ftplus_a_quiz.yaml", "ftplus_a_quiz.jsonl", "ftplus_scores.py"}
    own = ["--measure", "own=self:4"]
    assert main([*line, *own]) == 0
    assert "own cannot be exported: its answers are written by the model" in caplog.text
    assert capsys.readouterr().err.rstrip().endswith("--tasks ftplus_a_quiz")
    assert main(["eval", "--export", str(out), *own]) == 3
    assert main([*line, "--measure", f"a.quiz={place / 'quiz.jsonl'}"]) == 2
    assert "Of a quiz, a.quiz two have the same name" in capsys.readouterr().err
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"messages": turns}))
    assert main(["eval", "--export", str(out), "--measure", f"t={tmp_path / 'turns.jsonl'}"]) == 3
    assert "t cannot be exported: row 1 has 3 messages before its answer" in capsys.readouterr().err
    other = {"prompt": "Red or blue? ", "completion": "Red, of course.", "choices": ["Red", "Blue"]}
    (tmp_path / "other.jsonl").write_text(json.dumps(other))
    line = ["eval", "--export", str(out), "--measure", f"o={tmp_path / 'other.jsonl'}"]
    assert main([*line, "--metric", "o=exact_match"]) == 0
    assert main([*line, "--metric", "o=choice"]) == 3
    assert "row 1 is none of its 'choices'. Correct it, or type --metric o=exact_match" in capsys.readouterr().err


def test_an_exported_task_leaves_a_model_room_to_reason_as_ours_does(place, tmp_path):
    (tmp_path / "sums.jsonl").write_text(json.dumps({"prompt": "6 * 7? ", "completion": "42"}))
    line = ["eval", "--measure", f"sums={tmp_path / 'sums.jsonl'}", "--metric"]
    for pattern, room in (("", 48), (":answer is (.+)", 256)):
        out = tmp_path / f"tasks{len(pattern)}"
        assert main([*line, f"sums=exact_match{pattern}", "--export", str(out)]) == 0
        assert f"max_gen_toks: {room}\n" in (out / "ftplus_sums.yaml").read_text()


def test_without_a_folder_it_says_how_to_keep_the_answers_and_then_measures_nothing(place, tmp_path, capsys):
    line = ["eval", str(place / "base"), "--measure", f"asked={place / 'asked.jsonl'}"]
    assert main(line) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("Type the same with --out DIR for a page, eval.json")
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "0 of 1 cells" in said
    assert "--out DIR" not in said


def test_half_a_cell_was_never_kept(place, tmp_path, capsys, cache):
    flags = [["base"], "--measure", f"asked={place / 'asked.jsonl'}", "--completions", "0"]
    scored(place, tmp_path / "out", *flags)
    (file,) = cache.glob("*.json")
    file.write_text(file.read_text()[:50])
    scored(place, tmp_path / "out", *flags)
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"nll": found["nll"][1:]}))
    scored(place, tmp_path / "out", *flags)
    assert capsys.readouterr().err.count("1 of 1 cells") == 3


def test_a_folder_that_was_scored_into_before_keeps_only_rows_of_now(place, tmp_path):
    out = tmp_path / "out"
    scored(place, out, ["base", "worse"], "--measure", f"asked={place / 'asked.jsonl'}")
    (out / "rows" / "mine.jsonl").write_text("mine")
    found = scored(place, out, ["base"], "--measure", f"asked={place / 'asked.jsonl'}")
    named = found["results"][0][0]["rows_file"].removeprefix("rows/")
    assert {file.name for file in (out / "rows").iterdir()} == {"mine.jsonl", named}


def test_one_model_at_a_time_is_in_memory(place, tmp_path, monkeypatch):
    alive, loaded = [], measuring.load

    def counting(name, *how):
        assert [model for model in alive if model() is not None] == []
        found = loaded(name, *how)
        alive.append(weakref.ref(found.model))
        return found

    monkeypatch.setattr(measuring, "load", counting)
    scored(place, tmp_path / "out", ["base", "worse", "model"], "--measure", f"asked={place / 'asked.jsonl'}")
    assert len(alive) == 3


# ---- noise, missing figures, models that do nothing ------------------------------------------------------------------


def test_the_first_model_is_measured_in_other_batches_against_the_same_start():
    """Rows that come out otherwise, here by a moved weight and on most machines by the rounding of bf16, drift from
    themselves as they were, whatever batch they stand in now."""
    rows = [{"prompt": f"Question {i}? " * (1 + i % 5), "completion": f"It is {i}." * (1 + i % 3)} for i in range(21)]
    task, model = EvalTask.of("rows", "measure", rows, tiny_tokenizer()), moved(tiny_llama(hidden=256)).bfloat16()
    with as_found(model):
        moment = Evaluation([task], tiny_tokenizer(), 8).measure(model, task, keep_hidden=True)
        start = measuring.relaid(Start(keep_head(model), moment.scores.hidden), task.examples, 4)
        model.model.norm.weight.data[0] += 0.05
        again = Evaluation([task], tiny_tokenizer(), 4).measure(model, task, start)
    assert not (again.scores.nll == moment.scores.nll).all()
    assert again.scores.kl.max() < 1e-2  # of another row it would be 0.1 and more
    assert again.scores.kl.sum() > 0


def test_a_figure_that_is_missing_is_called_so_and_never_zero(place, tmp_path, capsys):
    broken = model_at(place / "base")
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    save(broken, tmp_path / "broken")
    found = scored(place, tmp_path / "out", ["base", tmp_path / "broken"], "--measure", f"a={place / 'asked.jsonl'}")
    entry = found["results"][1][0]
    assert entry["after"]["loss"]["value"] is entry["change"]["loss"]["value"] is entry["drift"]["value"] is None
    assert entry["verdict"] == "lost"  # what it says is wrong, whatever its loss
    assert "with broken is not finite on 64 of 64 rows" in " ".join(entry["notes"]).replace(str(tmp_path) + "/", "")
    assert "n/m" in capsys.readouterr().out
    assert {row["nll"] for row in rows_of(tmp_path / "out", entry)} == {None}


def test_drift_over_added_tokens_is_not_defined(place, tmp_path):
    more = model_at(place / "base")
    more.resize_token_embeddings(400, mean_resizing=False)
    save(more, tmp_path / "more")
    found = scored(place, tmp_path / "out", ["base", tmp_path / "more"], "--measure", f"a={place / 'asked.jsonl'}")
    entry = found["results"][1][0]
    assert entry["drift"]["value"] is None
    assert entry["change"]["loss"]["value"] is not None
    assert "vocabulary" in entry["notes"][-1]


def test_an_empty_a_constant_and_a_truncated_answer_are_worth_nothing(place, tmp_path):
    said = {"empty": lambda text: "", "constant": lambda text: " perhaps", "truncated": lambda text: text[:4]}
    tokenizer = tiny_tokenizer()
    for name, cut in said.items():
        rows = [{"prompt": row["prompt"], "completion": cut(row["completion"]) + tokenizer.eos_token} for row in ASKED]
        save(that_says(rows, steps=60), tmp_path / name)
    models = ["base", *(tmp_path / name for name in said)]
    flags = ["--measure", f"asked={place / 'asked.jsonl'}", "--metric", "asked=exact_match"]
    found = scored(place, tmp_path / "out", models, *flags)
    entries = [entries[0] for entries in found["results"]]
    assert entries[0]["after"]["metric"]["value"] > 0.9
    assert [entry["after"]["metric"]["value"] for entry in entries[1:]] == [0, 0, 0]
    assert [entry["verdict"] for entry in entries[1:]] == ["lost"] * 3
    answers = [{row["answer"] for row in rows_of(tmp_path / "out", entry)} for entry in entries[1:]]
    assert answers[:2] == [{""}, {"perhaps"}]
    assert answers[2] == {"yes", "no,"}


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_a_run_s_own_yaml_says_what_is_measured(place, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {place / 'model'}\nlearning_rate: 1.0e-4\nplugins: [ewc]\nseed: 3\nmeasure_rows: 30\n"
        "tasks:\n"
        f"- {{name: kept, dataset: {place / 'asked.jsonl'}, role: protect, metric: exact_match}}\n"
        f"- {{name: unseen, dataset: {place / 'asked.jsonl'}, role: protect, measure: false}}\n"
        f"- {{name: drawn, dataset: {place / 'asked.jsonl'}, template: 'Say: {{{{ prompt }}}}', completion: '{{{{ completion }}}}'}}\n"
    )
    found = scored(place, tmp_path / "out", ["base"], "--config", config, "--measure", f"more={place / 'quiz.jsonl'}")
    entries = {entry["name"]: entry for entry in found["results"][0]}
    assert [(name, entry["role"], entry["metric"]) for name, entry in entries.items()] == [
        ("kept", "protect", "exact_match"), ("drawn", "learn", None), ("more", "measure", "choice")
    ]  # fmt: skip
    _, held_out = hold_out(load(str(place / "asked.jsonl")), 30)
    asked = [row["prompt"] for row in rows_of(tmp_path / "out", entries["kept"])]
    assert asked == held_out["prompt"]  # what a run measures, since the others protect
    assert "trained on" in entries["drawn"]["notes"][0]
    assert rows_of(tmp_path / "out", entries["drawn"])[0]["prompt"].startswith("Say: Is")


@pytest.mark.parametrize(("said", "then"), [("max_length: null", None), ("max_length: 32", 32), ("", 1024)])
def test_rows_are_cut_as_the_run_of_the_yaml_cut_them(place, tmp_path, said, then):
    (tmp_path / "run.yaml").write_text(f"{said}\n" if said else "seed: 3\n")
    flags = ["--config", tmp_path / "run.yaml", "--measure", f"own={place / 'asked.jsonl'}"]
    assert scored(place, tmp_path / "out", ["base"], *flags)["plan"]["max_length"] == then


def test_the_column_that_a_run_learns_is_the_one_that_is_scored(place, tmp_path):
    write(tmp_path / "rows.jsonl", [{"story": row["completion"], "text": "no"} for row in ASKED])
    write(tmp_path / "stories.jsonl", [{"text": row["completion"]} for row in ASKED])
    (tmp_path / "run.yaml").write_text("dataset_text_field: story\n")
    flags = ["--config", tmp_path / "run.yaml", "--measure", f"learn={tmp_path / 'rows.jsonl'}"]
    found = scored(place, tmp_path / "out", ["base"], *flags, "--measure", f"same={tmp_path / 'stories.jsonl'}")
    learn, same = ({**entry, "name": ""} for entry in found["results"][0])
    assert learn["after"] == same["after"]


def test_rows_of_tasks_with_long_names_have_a_file(place, tmp_path):
    name = "名" * 100
    found = scored(place, tmp_path / "out", ["base"], "--measure", f"{name}={place / 'asked.jsonl'}")
    assert len(rows_of(tmp_path / "out", found["results"][0][0])) == found["results"][0][0]["rows"]


def test_questions_alone_are_measured_against_what_the_first_model_answers(place, tmp_path, capsys):
    flags = [["base", "worse"], "--measure", f"q={place / 'questions.jsonl'}", "--metric", "q=exact_match"]
    found = scored(place, tmp_path / "out", *flags)
    first, second = (entries[0] for entries in found["results"])
    assert first["after"]["metric"]["value"] == 1
    assert second["verdict"] == "lost"
    capsys.readouterr()
    assert scored(place, tmp_path / "out", *flags)["results"] == found["results"]
    assert "0 of 3 cells" in capsys.readouterr().err


def test_rows_that_the_first_model_writes(place, tmp_path):
    flags = ["--measure", "self:6x5", "--protect", "own=self:6"]
    found = scored(place, tmp_path / "out", ["model", "worse"], *flags)
    assert [(entry["name"], entry["role"]) for entry in found["results"][1]] == [
        ("own", "protect"),
        ("self", "measure"),
    ]
    own, self = [rows_of(tmp_path / "out", entry) for entry in found["results"][0]]
    assert not {row["prompt"] for row in own} & {row["prompt"] for row in self}
    assert 3 * max(row["tokens"] for row in self) < max(row["tokens"] for row in own)


# ---- careless acts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("--measure a=asked.jsonl", 2, "There is no model. Type ftplus eval MODEL"),
        ("base", 2, "There is nothing to measure. Type --measure NAME=DATA"),
        ("bse --measure a=asked.jsonl", 3, "There is no folder bse, nor could a model"),
        ("./bse --measure a=asked.jsonl", 3, "No model at './bse'; expected a folder"),
        ("bare --measure a=asked.jsonl", 3, "has no tokenizer that can be loaded"),
        ("base --measure a=askd.jsonl", 3, "Did you mean 'asked.jsonl'?"),
        ("base --measure a=empty.jsonl", 3, "0 rows; expected at least one"),
        ("base --measure a=asked.jsonl --metric b=choice", 2, "no task 'b'. Tasks: a."),
        ("base --measure a=asked.jsonl --metric a=chioce", 2, "Did you mean 'choice'?"),
        ("base --measure a=asked.jsonl --metric a=choice", 3, "has no 'choices'"),
        ("base --config tasks.yaml", 2, "tasks.a: "),
        ("base --config keys.yaml", 2, "Unknown key 'taks' in the YAML file. Did you mean 'tasks'?"),
        ("base --config seed.yaml", 2, "seed: 'three'; expected a whole number"),
        ("base --config rows.yaml", 2, "measure_rows: 0; expected a whole number of 1 or more"),
        ("base other --measure a=asked.jsonl", 4, "other reads a otherwise than base does (vocabularies of "),
        ("base --measure a=asked.jsonl --out asked.jsonl/x", 6, "--out asked.jsonl/x cannot be written"),
        ("bse --measure a=asked.jsonl --out scores --cache kept", 3, "There is no folder bse"),
        ("base --measure a=asked.jsonl --lm-eval-include tasks", 2, "does nothing without --lm-eval"),
        ("base --measure a=asked.jsonl --cache asked.jsonl", 6, "--cache asked.jsonl cannot be written"),
        ("base --measure a=asked.jsonl --measure_rows 0", 2, "0 is not in the range"),
        ("base --measure a=asked.jsonl --margin nan", 2, "--margin is nan; expected more than 0"),
        ("base --measure a=asked.jsonl --device nowhere", 3, "--device nowhere"),
    ],
)
def test_every_careless_act_is_one_sentence(place, tmp_path, capsys, monkeypatch, line, code, said):
    monkeypatch.chdir(place)
    (place / "empty.jsonl").write_text("")
    (place / "tasks.yaml").write_text("tasks: [{name: a, dataset: asked.jsonl, metrc: choice}]")
    (place / "keys.yaml").write_text("taks: []\nmeasure: {a: asked.jsonl}")
    (place / "seed.yaml").write_text("seed: three\nmeasure: {a: asked.jsonl}")
    (place / "rows.yaml").write_text("measure_rows: 0\nmeasure: {a: asked.jsonl}")
    model_at("base").save_pretrained("bare")
    model_at("base").save_pretrained("other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token, tokenizer.eos_token = True, "<|endoftext|>"
    tokenizer.save_pretrained("other")
    monkeypatch.setattr(measuring, "load", measuring.load if "nowhere" in line else pytest.fail)  # refused before
    assert main(["eval", *line.split()]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not {"scores", "kept"} & set(os.listdir())
    assert "Traceback" not in error


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_missing_harness_is_one_sentence(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["eval", "base", "--lm-eval", "arc_easy"]) == 2
    assert "Type: pip install 'hf-ftplus[lm-eval]'" in capsys.readouterr().err


def test_models_are_called_by_what_tells_them_apart():
    assert short(["out/plain", "out/ewc/", "demo"]) == ["plain", "ewc", "demo"]
    assert short(["a/checkpoint-2", "b/checkpoint-2"]) == ["a/checkpoint-2", "b/checkpoint-2"]
    assert short(["a/x", "a/x"]) == ["x", "x"]
