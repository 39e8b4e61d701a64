"""`ftplus data`: what training would see, from the tokenizer alone; every fault at once; and `ftplus sft` on tasks."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from commands import make_place, words
from datasets import Dataset
from tiny import tiny_llama, tiny_tokenizer
from training import LEARN, arguments

from hf_ftplus import SFTTrainer
from hf_ftplus.cli import main
from hf_ftplus.errors import DataError, IncompatibleError
from hf_ftplus.mixing import as_trained

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "demo"))

from make_data import make_data  # noqa: E402

NOTES = [{"article": f"Boat {i} is home \x1b[31m.", "headline": f"Home {i}"} for i in range(20)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}]} for i in range(9)
]
RUN = {
    "max_steps": 4, "report_to": "none", "learning_rate": 1e-3, "gradient_checkpointing": False, "save_strategy": "no",
    "per_device_train_batch_size": 4, "max_length": 64, "completions": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_place(tmp_path_factory.mktemp("place"))
    for name, rows in (("notes", NOTES), ("chats", CHATS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tasks_of(place) -> list[dict]:
    return [
        {
            "name": "notes", "dataset": f"{place}/notes.jsonl", "template": "Sum up: {{ article }}",
            "completion": "{{ headline }}", "share": 0.25,
        },
        {"name": "names", "dataset": f"{place}/learn.jsonl", "metric": "exact_match", "measure": f"{place}/learn.jsonl:train[:6]"},
        {"name": "old", "dataset": f"{place}/protect.jsonl", "role": "protect", "share": 0.25, "measure": False},
    ]  # fmt: skip


def file(place, tmp_path, tasks=None, **more) -> str:
    content = {"model_name_or_path": str(place / "model"), "output_dir": str(tmp_path / "out"), **RUN, **more}
    content |= {"tasks": tasks_of(place) if tasks is None else tasks}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "run.yaml")


@pytest.mark.fault("E11")
def test_the_preview_shows_rendered_rows_masks_and_counts(place, tmp_path, capsys):
    assert main(["data", "preview", "--config", file(place, tmp_path), "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert "«Home 0<|im_end|>\\n»" in shown
    assert "Sum up: Boat 1 is home \\x1b[31m." in shown
    assert "\x1b" not in shown
    assert shown.count("«") == 8
    counts = (
        r"^names \(learn\): 24 rows, \d+ tokens, \d+ supervised \(\d+%\), longest \d+; at max_length 64 0 are cut, 0"
    )
    assert re.search(counts, shown, re.M)
    assert re.search(r"^notes \(learn, share 0\.25\): 20 rows", shown, re.M)
    assert re.search(r"^old \(protect, share 0\.25\): 16 rows", shown, re.M)
    assert re.search(r"^names \(measured\): 6 rows", shown, re.M)
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("E8")
def test_it_takes_the_words_of_sft_and_counts_what_truncation_takes(place, tmp_path, capsys):
    taken = ["data", "check", *words(place, tmp_path / "out", "--dry-run", "--max_length", "40")[1:]]
    long = {"prompt": "Question " * 40, "completion": "It is."}
    (tmp_path / "cut.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [long, *LEARN[:3]]))
    assert main([*taken, "--protect", f"cut={tmp_path}/cut.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert "learn (learn): 24 rows" in shown
    assert "protect (protect): 13 rows" in shown
    assert re.search(r"cut \(protect\): 4 rows, .* longest \d{3}; at max_length 40 1 are cut, 1 dropped", shown)


def test_a_metric_that_rows_of_a_flag_cannot_be_scored_by_is_a_fault(place, tmp_path, capsys):
    taken = words(place, tmp_path / "out", "--metric", "protect=choice", "--measure", f"m={place}/learn.jsonl")[1:]
    assert main(["data", "check", *taken, "--metric", "m=choice"]) == 3
    said = capsys.readouterr().err
    assert "Task 'protect', row 1 has no 'choices'" in said
    assert "Task 'm', row 1 has no 'choices'" in said
    assert main(["data", "check", *taken, "--measure-rows", "0"]) == 0


@pytest.mark.parametrize("more", [{}, {"completion_only_loss": False}, {"max_length": 16}, {"shuffle_dataset": True}])
@pytest.mark.parametrize(
    "rows", [LEARN, CHATS, [{"text": row["completion"]} for row in LEARN]], ids=["pairs", "chats", "text"]
)
def test_rows_seen_without_a_trainer_are_those_of_a_trainer(tmp_path, rows, more):
    args = arguments(tmp_path, **more)
    it = SFTTrainer(
        tiny_llama(), args=args, train_dataset={"a": Dataset.from_list(rows)}, processing_class=tiny_tokenizer()
    )
    seen = as_trained(Dataset.from_list(rows), "a", tiny_tokenizer(), args)
    part = slice(args.max_length)
    kept = [(row["input_ids"][part], row["labels"][part]) for row in seen]
    kept = [(ids, labels) for ids, labels in kept if any(label != -100 for label in labels)]
    found = list(zip(it.train_dataset["input_ids"], it.train_dataset["labels"], strict=True))
    assert (sorted(found) if args.shuffle_dataset else found) == (sorted(kept) if args.shuffle_dataset else kept)
    assert args.max_length == more.get("max_length", 64)


def test_turns_of_the_assistant_are_marked_as_a_trainer_marks_them(tmp_path):
    turn = (
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"
    )
    marks = f"{{% for m in messages %}}{{% if m['role'] == 'assistant' %}}{turn}{{% else %}}{{{{ m['content'] }}}}{{% endif %}}{{% endfor %}}"
    args, rows = arguments(tmp_path, assistant_only_loss=True), Dataset.from_list(CHATS)
    it = SFTTrainer(tiny_llama(), args=args, train_dataset={"a": rows}, processing_class=tiny_tokenizer(marks))
    seen = as_trained(rows, "a", tiny_tokenizer(marks), args)
    assert seen["labels"][:] == it.train_dataset["labels"][:]
    assert tiny_tokenizer().decode([label for label in seen["labels"][0] if label != -100]) == "Yes."
    with pytest.raises(DataError, match="Learn task 'a': TRL cannot make tokens of it"):
        as_trained(rows, "a", tiny_tokenizer(), args)  # a template without marks, and unknown to TRL
    with pytest.raises(IncompatibleError, match="rows of learn task 'a' are no conversations"):
        as_trained(Dataset.from_list(LEARN), "a", tiny_tokenizer(), args)


def test_every_fault_of_every_task_is_listed_at_once_and_sft_says_the_same(place, tmp_path, capsys):
    notes = f"{place}/notes.jsonl"
    wrong = [
        {"name": "gone", "dataset": f"{place}/note.jsonl"},
        {"name": "reach", "dataset": notes, "template": "{{ article.__class__ }}", "completion": "x"},
        {"name": "missing", "dataset": notes, "template": "{{ artcle }}", "completion": "{{ headline }}"},
        {"name": "quiz", "dataset": notes, "template": "{{ article }}", "completion": "a", "choices": ["b", "c"]},
        {"name": "long", "dataset": notes, "template": "{{ article * 40 }}", "completion": "{{ headline }}"},
    ]
    pick = {"template": "{{ article }}", "completion": "{{ headline }}", "metric": "choice"}
    declared = [
        {"name": "typo", "dataset": f"{place}/nothing.jsonl", "templte": "x"},
        {"name": "pick", "dataset": notes, "choices": "one", **pick},
        {"name": "Gone", "dataset": notes},
    ]
    assert main(["data", "check", "--config", file(place, tmp_path, wrong)]) == 3
    found = capsys.readouterr().err
    for says in (
        f"tasks.gone: {place}/note.jsonl does not exist",
        f"tasks.reach: {notes}:1: template: the sandbox refuses it",
        "template names 'artcle', which is no column of this row; it has 'article', 'headline'. Did you mean 'article'",
        "the completion 'a' is not among the choices 'b', 'c' (the same in 19 more)",
        "long: none of 20 rows has a supervised token left after truncation to max_length 64",
    ):
        assert says in found
    assert found.count("tasks.") == 4
    assert main(["data", "check", "--config", file(place, tmp_path, [*wrong, *declared])]) == 3
    more = capsys.readouterr().err
    assert "Did you mean 'template'" in more
    assert "Two tasks have the name 'Gone'" in more
    assert "nothing.jsonl does not exist" in more
    assert more.count("tasks.pick: ") == 1  # and nothing of rows that no template made
    assert all(line in more for line in found.partition("error: ")[2].splitlines())
    assert main(["sft", "--config", file(place, tmp_path, wrong)]) == 3
    assert capsys.readouterr().err == found.replace(f"\n{found.splitlines()[-1]}", "")
    assert main(["sft", "--config", file(place, tmp_path, declared)]) == 2
    assert capsys.readouterr().err.splitlines()[0].partition("error: ")[2] in more
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("E9")
def test_what_is_no_fault_of_a_task_ends_as_it_does_in_sft(place, tmp_path, capsys):
    assert main(["data", "check", "--config", str(tmp_path / "nothing.yaml")]) == 2
    assert main(["data", "check", "--config", file(place, tmp_path, dataset_name="x.jsonl")]) == 2
    assert "tasks and dataset_name both say what to learn" in capsys.readouterr().err
    assert main(["data", "check", "--config", file(place, tmp_path, lerning_rate=1)]) == 2
    assert main(["data", "check", "--config", file(place, tmp_path, model_name_or_path=str(tmp_path / "no"))]) == 3
    assert "No model at" in capsys.readouterr().err
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "base")
    assert main(["data", "check", "--config", file(place, tmp_path, model_name_or_path=str(tmp_path / "base"))]) == 3
    says = "Learn task 'notes': TRL cannot make tokens of it: Cannot use chat template"
    assert says in capsys.readouterr().err
    assert main(["sft", "--config", file(place, tmp_path, model_name_or_path=str(tmp_path / "base"))]) == 3
    assert says in capsys.readouterr().err


def test_a_share_of_less_than_a_row_is_found_before_a_model_is_loaded(place, tmp_path, capsys):
    few = [{**task, "share": 1e-4} if task["name"] == "old" else task for task in tasks_of(place)]
    for command in (["data", "check"], ["sft"]):
        assert main([*command, "--config", file(place, tmp_path, tasks=few, model_name_or_path="nothing/there")]) == 3
        assert "Task 'old' would get no row: its share of 0.0001 of an epoch of 44 rows" in capsys.readouterr().err


def test_the_keys_of_a_task_are_in_the_help(capsys):
    from hf_ftplus.task_keys import KEYS

    assert main(["data", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", shown, re.M) for name in KEYS)


def test_tasks_train_in_their_shares_and_are_measured_each(place, tmp_path, capsys, caplog):
    with caplog.at_level("INFO", logger="hf_ftplus"):
        assert main(["sft", "--config", file(place, tmp_path)]) == 0
    report = json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())
    assert [(task["name"], task["role"], task["rows"]) for task in report["tasks"]] == [
        ("notes", "learn", 20),
        ("names", "learn", 6),
    ]
    assert report["facts"]["config"]["tasks"] == tasks_of(place)
    assert "notes: measured on trained rows; for held-out ones give measure: DATA in the task." in caplog.text
    table = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("mixture"))
    drawn = {line.split()[0]: int(line.split()[3]) for line in table.splitlines()[2:]}
    assert drawn == {"notes": 15, "names": 29, "old": 15}  # 44 learn rows, as there are, and a quarter beside them


def test_a_run_goes_on_in_its_own_shares_only(place, tmp_path, capsys):
    def ended(name, *flags, **more) -> int:
        more |= {
            "output_dir": str(tmp_path / name),
            "measure_rows": 0,
            "save_strategy": "steps",
            "save_steps": 2,
            "lr_scheduler_type": "constant",
        }
        return main(["sft", "--config", file(place, tmp_path, **more), *flags])

    assert ended("whole") == 0
    assert ended("half", "--max_steps", "2") == 0
    half = str(tmp_path / "half" / "checkpoint-2")
    tasks = tasks_of(place)
    tasks[0]["share"] = 0.4
    assert ended("half", "--resume_from_checkpoint", half, tasks=tasks) == 4
    assert "The checkpoint drew 29 of 24 rows of task 'names' in an epoch, this run draws 2" in capsys.readouterr().err
    assert ended("half", "--resume_from_checkpoint", half) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "half")]
    assert weights[0] == weights[1]


def test_a_dry_run_shows_rows_of_every_task(place, tmp_path, capsys):
    assert main(["sft", "--config", file(place, tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^row       notes: .*«Home 0", shown, re.M)
    assert re.search(r"^row       names: .*«It is lantern", shown, re.M)


def test_held_out_rows_of_tasks_are_what_evaluation_is_on(place, tmp_path, capsys):
    more = {"eval_strategy": "steps", "eval_steps": 2, "plugins": "multitask"}
    tasks = [{key: value for key, value in task.items() if key != "share"} for task in tasks_of(place)]
    assert main(["sft", "--config", file(place, tmp_path, tasks, measure_rows=0, **more)]) == 0
    shown = capsys.readouterr().out
    assert "eval_names_loss" in shown
    assert "eval_notes_loss" not in shown  # it has no rows but those that are trained on


def test_one_local_file_with_a_column_of_tasks_is_enough_for_multitask(place, tmp_path, capsys):
    content = [{**row, "task": "sums" if i % 4 else "chat"} for i, row in enumerate(LEARN)]
    (tmp_path / "learn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    taken = words(
        place, tmp_path / "out", "--dataset_name", f"{tmp_path}/learn.jsonl", plugin="multitask", protect=None
    )
    assert main([*taken, "--set", "multitask.mode=equal", "--measure_rows", "0", "--save_strategy", "no"]) == 0
    report = json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())
    assert report["facts"]["strategies"]["multitask"]["rows/chat"] == 0.5
    assert main(words(place, tmp_path / "one", plugin="multitask", protect=None)) == 3
    assert "Declare several under tasks: in YAML" in capsys.readouterr().err


def test_the_shipped_example_has_no_fault(place, tmp_path, monkeypatch, capsys):
    make_data(tmp_path / "demo_output" / "data")
    monkeypatch.chdir(tmp_path)
    example = str(ROOT / "examples" / "multitask.yaml")
    assert (
        main(
            ["data", "check", "--config", example, "--model_name_or_path", str(place / "model"), "--max_length", "1024"]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert re.search(r"^summaries \(learn\): 480 rows", shown, re.M)
    assert re.search(r"^facts \(learn\): 96 rows", shown, re.M)
    assert re.search(r"^python \(protect, share 0\.125\): 64 rows", shown, re.M)
