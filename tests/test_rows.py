"""Which rows a run learns from, protects with and is measured on."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from commands import make_place, words
from datasets import Dataset
from tiny import CHATML, tiny_tokenizer
from training import LEARN, arguments
from trl import ModelConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

from hf_ftplus.cli import main
from hf_ftplus.config import RunConfig
from hf_ftplus.data import load
from hf_ftplus.errors import DataError
from hf_ftplus.measured import hold_out
from hf_ftplus.row_checks import without
from hf_ftplus.rows import gather, learn_rows
from hf_ftplus.specs import TaskSpec

SHORT = ["--max_steps", "2", "--save_strategy", "no", "--completions", "0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


def learning(place, tmp_path, rows, *more, model="model") -> list[str]:
    """`sft` on these rows, read by datasets as those of the Hub are, without a strategy."""
    (tmp_path / "rows").mkdir(exist_ok=True)
    (tmp_path / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = words(place, tmp_path / "out", *SHORT, *more, plugin=None, protect=None)
    line[line.index("--dataset_name") + 1] = str(tmp_path / "rows")
    line[line.index("--model_name_or_path") + 1] = str(place / model)
    return line


def report(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())


def of_tasks(place, tmp_path, *words_, **more) -> list[str]:
    """`sft` on the tasks of a YAML file."""
    given = {"tasks": [{"name": "a", "dataset": f"{place}/learn.jsonl", "measure": f"{place}/protect.jsonl"}], **more}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    line = words(place, tmp_path / "out", "--config", str(tmp_path / "run.yaml"), plugin=None, protect=None)
    at = line.index("--dataset_name")
    return [*line[:at], *line[at + 2 :], "--completions", "0", *words_]


# ---- what is learnt, as TRL reads it ---------------------------------------------------------------------------------


def test_an_empty_text_is_trained_on_as_trl_does_and_is_an_error_only_to_who_asked(place, tmp_path, capsys, caplog):
    rows = [{"text": row["completion"]} for row in LEARN[:7]] + [{"text": ""}]
    with caplog.at_level("WARNING", logger="hf_ftplus"):
        assert main(learning(place, tmp_path, rows)) == 0
    assert "learn is not measured: learn, row 8: 'text' is empty" in caplog.text
    assert "measured on trained rows" not in caplog.text
    assert report(tmp_path)["tasks"] == []
    asked = learning(place, tmp_path, rows, "--metric", "learn=rouge")
    assert main([*asked, "--output_dir", str(tmp_path / "asked")]) == 3
    assert "learn, row 8: 'text' is empty" in capsys.readouterr().err


@pytest.mark.fault("E2", "E6", "E10")
@pytest.mark.parametrize("command", ["sft", "data check"])
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*LEARN[:2], {"prompt": "a", "completion": None}], "learn: 'completion' is missing in 1 of 3 rows (rows 3)"),
        ([{"messages": []}, {"messages": [{"role": "user", "content": "a"}]}], "'messages' is missing in 1 of 2 rows"),
        ([{"input_ids": [5, 6]}, {"input_ids": [5, 7777]}], "learn, row 2: 'input_ids' holds 7777; the "),
        ([{"input_ids": [5, 6], "labels": [-100, 9999]}], "learn, row 1: 'labels' holds 9999; the "),
        ([{"input_ids": [5, 6], "labels": [-1, 6]}], "learn, row 1: 'labels' holds -1; the model has 384 tokens"),
    ],
)
def test_what_the_hub_brings_is_looked_through_too(place, tmp_path, capsys, command, rows, said):
    line = learning(place, tmp_path, rows)
    assert main([*command.split(), *line[1:]]) == 3
    assert said in capsys.readouterr().err


def test_what_is_not_trained_on_may_be_missing(place, tmp_path):
    """A prompt or a text beside messages."""
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]} for _ in range(6)]
    beside = [{**row, "prompt": None if i % 2 else "x", "text": "t" if i else None} for i, row in enumerate(rows)]
    assert main(["data", "check", *learning(place, tmp_path, beside)[1:]]) == 0


@pytest.mark.parametrize(
    "flags", [["--lora_target_modules", "q_proj", "embed_tokens"], ["--lora_modules_to_save", "embed_tokens"]]
)
def test_tokens_are_counted_where_an_adapter_is_on_them(place, tmp_path, flags):
    assert main(learning(place, tmp_path, LEARN, "--use_peft", "--lora_r", "2", *flags)) == 0


def test_a_line_that_datasets_cannot_read_is_said_with_its_reason(place, tmp_path, capsys):
    line = learning(place, tmp_path, LEARN)
    with (tmp_path / "rows" / "train.jsonl").open("a") as file:
        file.write('{"prompt": "a", "compl\n')
    assert main(line) == 3
    assert "JSON parse error" in capsys.readouterr().err


def test_text_that_trl_trains_on_is_what_is_measured(place, tmp_path):
    rows = [{"text": row["completion"], "instruction": "Say.", "output": "Words " * 30} for row in LEARN]
    assert main(learning(place, tmp_path, rows, "--measure", f"learn={tmp_path}/rows/train.jsonl")) == 0
    [measured] = report(tmp_path)["tasks"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert main(learning(place, plain, [{"text": row["text"]} for row in rows])) == 0
    [expected] = report(plain)["tasks"]
    assert measured["before"]["loss"] == expected["before"]["loss"]


def test_measured_rows_that_are_trained_on_are_counted_in_the_report(place, tmp_path):
    half = ["--dataset_train_split", "train[:6]", "--dataset_test_split", "train[4:]"]
    line = learning(place, tmp_path, LEARN[:8], *half, "--measure", f"other={place}/protect.jsonl")
    assert main([*line, "--measure", f"same={tmp_path}/rows/train.jsonl"]) == 0
    notes = {task["name"]: " ".join(task["notes"]) for task in report(tmp_path)["tasks"]}
    assert "2 of its 4 measured rows are trained on, word for word." in notes["learn"]
    assert "6 of its 8 measured rows are trained on, word for word." in notes["same"]
    assert "trained on" not in notes["other"]


def test_rows_are_compared_by_the_column_that_is_trained_on(place, tmp_path):
    rows = [{"story": row["completion"] + str(n), "text": "The same."} for n, row in enumerate(LEARN[:8])]
    half = ["--dataset_text_field", "story", "--dataset_train_split", "train[:5]", "--dataset_test_split", "train[5:]"]
    line = learning(place, tmp_path, rows, *half, "--measure", f"all={tmp_path}/stories.jsonl")
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": row["story"]}) + "\n" for row in rows))
    assert main(line) == 0
    notes = {task["name"]: " ".join(task["notes"]) for task in report(tmp_path)["tasks"]}
    assert "trained on" not in notes["learn"]
    assert "5 of its 8 measured rows are trained on, word for word." in notes["all"]


def test_a_template_that_hides_earlier_turns_trains_and_is_not_measured(place, tmp_path, caplog):
    hides = CHATML.replace("message['content'] +", "(message['content'] if loop.last else 'hidden') +")
    tiny_tokenizer(hides).save_pretrained(place / "hides")
    for file in (place / "model").glob("*model*"):
        (place / "hides" / file.name).write_bytes(file.read_bytes())
    (place / "hides" / "config.json").write_bytes((place / "model" / "config.json").read_bytes())
    turns = [{"role": role, "content": "Yes."} for role in ("user", "assistant") * 2]
    with caplog.at_level("WARNING", logger="hf_ftplus"):
        assert main(learning(place, tmp_path, [{"messages": turns}] * 8, model="hides")) == 0
    assert "learn is not measured: learn, row 1: the chat template of" in caplog.text


def test_a_prompt_beside_messages_is_left_out_and_alone_it_is_refused(place, tmp_path, capsys, monkeypatch):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Odile."}]
    assert main(learning(place, tmp_path, [{"prompt": "Who?", "messages": turns}] * 8)) == 0
    monkeypatch.setattr("hf_ftplus.run.sft_trainer", None)  # no model may load
    assert (
        main(
            learning(place, tmp_path / "..", [{"prompt": "Who?", "score": 1}] * 8, "--output_dir", str(tmp_path / "no"))
        )
        == 3
    )
    assert "questions without completions" in capsys.readouterr().err


def test_a_stream_is_not_said_to_be_measured(place, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="hf_ftplus"):
        assert main(learning(place, tmp_path, LEARN, "--dataset_streaming", "true")) == 0
    assert "learn is a stream and is not measured" in caplog.text
    assert "measured on trained rows" not in caplog.text


def test_a_local_file_is_streamed_if_that_is_asked_for(place, tmp_path, monkeypatch, capsys):
    """In whatever format, each row when its turn comes: what is wrong with a late one is no matter until then."""
    rows = [{"instruction": f"Name {i}.", "output": f"Lantern {i}."} for i in range(600)] + [{"odd": 1}]
    (tmp_path / "late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [*SHORT, "--dataset_name", str(tmp_path / "late.jsonl"), "--dataset_streaming", "true"]
    monkeypatch.setattr("hf_ftplus.data.load", None)
    assert main(words(place, tmp_path / "out", *more, plugin=None, protect=None)) == 0
    (tmp_path / "late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[-3:]))
    assert main(words(place, tmp_path / "again", *more, plugin=None, protect=None)) == 3
    assert "late.jsonl:3: has no 'instruction'" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["datasets", "folder", "file", "task"])
def test_a_stream_without_a_last_step_is_refused_before_the_model_loads(place, tmp_path, capsys, monkeypatch, how):
    monkeypatch.setattr("hf_ftplus.run.sft_trainer", None)  # no model may load
    line = learning(place, tmp_path, LEARN, "--max_steps", "-1")
    at = line.index("--dataset_name")
    if how == "file":
        line[at + 1] += "/train.jsonl"
    if how in ("folder", "file"):
        line += ["--dataset_streaming", "true"]
    else:
        given = {"datasets": [{"path": line[at + 1]}], "streaming": True}
        if how == "task":
            given = {"tasks": {"a": {"dataset": f"{line[at + 1]}/train.jsonl", "streaming": True}}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
        line[at : at + 2] = ["--config", str(tmp_path / "run.yaml")]
    assert main(line) == 2
    assert "streaming: a stream has no end; type --max_steps N" in capsys.readouterr().err


def test_tasks_may_be_streams_that_are_drawn_from_in_their_shares(place, tmp_path, caplog, capsys):
    tasks = {
        "names": {"dataset": f"{place}/learn.jsonl", "streaming": True, "share": 0.75, "template": "Q: {{ prompt }}",
                  "completion": "{{ completion }}", "measure": f"{place}/learn.jsonl"},
        "sums": {"dataset": f"{place}/protect.jsonl", "streaming": True},
    }  # fmt: skip
    line = of_tasks(place, tmp_path, "--max_steps", "3", tasks=tasks)
    assert main([*line, "--dry-run"]) == 0
    assert "streamed rows" in capsys.readouterr().out
    with caplog.at_level("INFO", logger="hf_ftplus"):
        assert main(line) == 0
    assert "sums is a stream and is not measured; give measure: DATA in the task" in caplog.text
    assert [task["name"] for task in report(tmp_path)["tasks"]] == ["names"]
    assert re.search(r"names +.*75", caplog.text)
    assert main(["data", "preview", *line[1:]]) == 0
    assert "streamed: the first 500 rows were looked at" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["data", "check"], ["sft"]])
def test_a_metric_that_learn_rows_cannot_be_scored_by_is_said_before_a_model_loads(place, tmp_path, capsys, command):
    line = words(place, tmp_path / "out", *SHORT, "--metric", "learn=choice", plugin=None, protect=None)
    line[line.index("--model_name_or_path") + 1] = "no/such-model"
    assert main([*command, *line[1:]]) == 3
    assert "Task 'learn', row 1 has no 'choices'" in capsys.readouterr().err


def test_learn_rows_that_are_not_measured_need_no_metric(place):
    script = ScriptArguments(dataset_name=str(place / "learn.jsonl"))
    config = RunConfig(arguments(place), ModelConfig(), script, DatasetMixtureConfig(), metrics={"learn": "choice"})
    _, faults = gather(replace(config, measure=[TaskSpec.parse(f"learn={place}/held.jsonl")]))
    assert not any("choices" in str(fault) for fault in faults)
    _, faults = gather(config)
    assert any("no 'choices'" in str(fault) for fault in faults)


def test_a_mixture_that_is_not_there_is_one_of_the_faults(place, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"datasets": [{"path": "nobody/nothing"}]}))
    line = words(place, tmp_path / "out", "--config", str(tmp_path / "run.yaml"), plugin=None, protect=None)
    at = line.index("--dataset_name")
    assert main([*line[:at], *line[at + 2 :]]) == 3
    assert "datasets: Couldn't reach 'nobody/nothing' on the Hub" in capsys.readouterr().err


def test_a_mixture_is_split_the_same_at_every_look(place):
    given = DatasetMixtureConfig([DatasetConfig("json", data_files=str(place / "learn.jsonl"))], test_split_size=0.25)
    looks = []
    for process in range(2):
        np.random.seed(process)  # as whatever ran before left it
        looks.append(learn_rows(RunConfig(arguments(place), ModelConfig(), ScriptArguments(), given)))
    assert [part["prompt"] for part in looks[0]] == [part["prompt"] for part in looks[1]]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_text_under_another_name_is_learnt_from_a_file(place, tmp_path, streaming):
    rows = [{"body": f"Row {i} of the harbour.", "text": "Not this."} for i in range(8)]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset_text_field", "body", "--dataset_streaming", streaming]
    line = words(place, tmp_path / "out", *SHORT, *flags, plugin=None, protect=None)
    line[line.index("--dataset_name") + 1] = str(tmp_path / "two.jsonl")
    assert main(line) == 0
    assert main(["data", "preview", *line[1:]]) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora_r", "4"], "--lora_r: nothing without --use_peft"),
        (["--model_revision", "v2"], "a folder, which has none"),
        (["--memory", "memory"], "--memory: no strategy of this run reads one"),
    ],
)
def test_what_does_nothing_is_said(place, tmp_path, caplog, flags, said):
    assert main(words(place, tmp_path / "first", *SHORT)) == 0
    flags = [str(tmp_path / "first" / "ftplus" / "memory") if word == "memory" else word for word in flags]
    assert main(words(place, tmp_path / "out", *SHORT, *flags, plugin=None)) == 0
    assert said in caplog.text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"datasets": [{"path": "json"}]}, "datasets and dataset_name both say what to learn"),
        ({"streaming": True}, "streaming is of `datasets:`"),
        ({"test_split_size": 0.5}, "test_split_size is of `datasets:`"),
    ],
)
def test_what_belongs_to_a_mixture_is_refused_without_one(place, tmp_path, capsys, given, said):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    assert main(words(place, tmp_path / "out", "--config", str(tmp_path / "run.yaml"))) == 2
    assert said in capsys.readouterr().err


# ---- which split of a file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "numbers"),
    [("train", range(24)), ("train[:3]", range(3)), ("train[2:4]+train[20:]", [2, 3, 20, 21, 22, 23])],
)
def test_the_split_of_a_file_that_was_named_is_learnt(place, split, numbers):
    script = ScriptArguments(dataset_name=str(place / "learn.jsonl"), dataset_train_split=split)
    rows, _ = learn_rows(RunConfig(arguments(place), ModelConfig(), script, DatasetMixtureConfig()))
    assert rows["prompt"] == [LEARN[number]["prompt"] for number in numbers]


def test_the_split_of_a_file_that_was_named_is_evaluated(place, tmp_path):
    splits = ["--dataset_train_split", "train[:20]", "--dataset_test_split", "train[20:]", "--eval_strategy", "epoch"]
    assert main(words(place, tmp_path / "out", *SHORT, *splits, plugin=None, protect=None)) == 0
    assert report(tmp_path)["tasks"][0]["rows"] == 4


def test_a_slice_may_be_of_several_splits(tmp_path):
    for name in ("train", "more"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(4)))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: train.jsonl}\n"
        "  - {split: more, path: more.jsonl}\n---\n"
    )
    script = ScriptArguments(dataset_name=str(tmp_path), dataset_train_split="train[:1]+more[3:]")
    rows, _ = learn_rows(RunConfig(arguments(tmp_path / "out"), ModelConfig(), script, DatasetMixtureConfig()))
    assert rows["text"] == ["train 0", "more 3"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--dataset_train_split", "validation"],
            "has no split 'validation'; it has train. Type --dataset_train_split",
        ),
        (["--dataset_test_split", "held"], "has no split 'held'; it has train. Type --dataset_test_split"),
        (["--dataset_train_split", "train[30:]"], r"train[30:]: 0 rows"),
        (["--dataset_train_split", "train[3:"], "Unrecognized instruction format: train[3:"),
        (["--dataset_config", "en"], "is of datasets on the Hub"),
        (["--dataset_name", "a/b.jsonl:train[:3]"], "Type --dataset_name a/b.jsonl --dataset_train_split 'train[:3]'"),
        (["--dataset_name", __file__], "is a .py; expected one of"),
        (["--dataset_train_split", "train[:3]", "--dataset_streaming", "true"], "it has train. A stream has no slices"),
    ],
)
def test_a_split_that_is_not_there_is_refused(place, tmp_path, capsys, flags, said):
    assert main(words(place, tmp_path / "out", *SHORT, *flags, plugin=None, protect=None)) in (2, 3)
    assert said in capsys.readouterr().err


# ---- what the model writes itself ------------------------------------------------------------------------------------


def test_every_use_of_what_the_model_writes_has_rows_of_its_own(place, tmp_path, monkeypatch):
    from hf_ftplus import rows

    seeds = {}

    def generate(model, tokenizer, *, count, seed, **how):
        seeds[count] = seed
        return Dataset.from_list([{"text": f"{i} of {count}"} for i in range(count)])

    monkeypatch.setattr(rows, "self_generate", generate)
    uses = [
        "--protect",
        "one=self:10",
        "--protect",
        "two=self:20",
        "--measure",
        "one=self:12",
        "--measure",
        "x=self:22",
    ]
    line = words(place, tmp_path / "out", *uses, *SHORT, "--dry-run", "--seed", "7", protect=None)
    assert main(line) == 0
    assert seeds[10] == 7
    assert len(set(seeds.values())) == 4


def test_rows_that_protect_are_not_measured(caplog):
    written = Dataset.from_list([{"text": f"Row {i}"} for i in range(6)])
    protect = {"old": written.select([1, 4])}
    with caplog.at_level("WARNING", logger="hf_ftplus"):
        assert without(written, protect, "chat")["text"] == ["Row 0", "Row 2", "Row 3", "Row 5"]
    assert "chat: 2 of 6 rows protect, too" in caplog.text
    assert without(written, {}, "chat") is written
    with pytest.raises(DataError, match="nothing is left to measure"):
        without(protect["old"], {"old": written}, "chat")


# ---- what the Trainer evaluates --------------------------------------------------------------------------------------

BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "measure_rows": 0, "learning_rate": 0.001
}  # fmt: skip


@pytest.mark.parametrize(
    ("tasks", "more", "figures"),
    [
        (1, {}, {"eval_loss"}),
        (1, {"metric_for_best_model": "a_loss"}, {"eval_a_loss"}),
        (1, {"metric_for_best_model": "mean_token_accuracy"}, {"eval_loss"}),
        (2, {"save_strategy": "best", "metric_for_best_model": "loss"}, {"eval_loss"}),
        (2, {"metric_for_best_model": "eval_mean_token_accuracy"}, {"eval_loss"}),
        (2, {"metric_for_best_model": "eval_a_loss"}, {"eval_a_loss", "eval_b_loss"}),
        (2, {"load_best_model_at_end": False}, {"eval_a_loss", "eval_b_loss"}),
    ],
)
def test_the_best_model_is_told_by_the_loss_of_all_tasks_or_of_one(place, tmp_path, tasks, more, figures, capsys):
    assert main(of_tasks(place, tmp_path, **{**BEST, **more, "tasks": several(place)[:tasks]})) == 0
    shown = capsys.readouterr().out
    assert set(re.findall(r"eval_(?:[ab]_)?loss", shown)) == figures


def several(place) -> list[dict]:
    return [
        {"name": name, "dataset": f"{place}/learn.jsonl", "measure": f"{place}/{rows}.jsonl"}
        for name, rows in (("a", "learn"), ("b", "protect"))
    ]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"tasks": 2, "metric_for_best_model": "c_loss"},
            "eval_c_loss is no figure of an evaluation. Did you mean 'eval_",
        ),
        (
            {"tasks": 1, "metric_for_best_model": "eval_losss"},
            "Did you mean 'eval_loss'? Expected one of eval_loss, eval_m",
        ),
    ],
)
def test_a_best_model_by_a_figure_that_there_is_not_is_refused(place, tmp_path, capsys, monkeypatch, more, says):
    monkeypatch.setattr("hf_ftplus.run.sft_trainer", None)  # no model may load
    assert main(of_tasks(place, tmp_path, **{**BEST, **more, "tasks": several(place)[: more["tasks"]]})) == 2
    assert says in capsys.readouterr().err
    line = words(place, tmp_path / "out", "--metric_for_best_model", "accurcy", plugin=None, protect=None)
    assert main(line) == 2
    assert "metric_for_best_model eval_accurcy is no figure" in capsys.readouterr().err


def test_evaluation_without_held_out_rows_is_refused_before_the_model_loads(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_ftplus.run.sft_trainer", None)  # no model may load
    bare = [{"name": "a", "dataset": f"{place}/learn.jsonl"}]
    assert main(of_tasks(place, tmp_path, eval_strategy="epoch", tasks=bare)) == 3
    assert "eval_strategy epoch needs learn rows" in capsys.readouterr().err
    assert main(words(place, tmp_path / "out", "--eval_strategy", "steps", plugin=None, protect=None)) == 3
    assert "Give data with a test split" in capsys.readouterr().err


# ---- small ones ------------------------------------------------------------------------------------------------------


def test_two_blocks_of_tasks_are_refused(place, tmp_path, capsys):
    of_tasks(place, tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(file.read_text() + "\n" + file.read_text())
    assert main(["data", "check", "--config", str(file)]) == 2
    assert "'tasks' stands twice in one mapping" in capsys.readouterr().err


def test_the_preview_counts_what_is_left_to_protect(place, tmp_path, capsys):
    line = of_tasks(place, tmp_path, "--protect", f"old={place}/protect.jsonl")
    assert main(["data", "preview", *line[1:]]) == 0
    kept, measured = hold_out(Dataset.from_list([{"text": ""}] * 16), 64)
    shown = capsys.readouterr().out
    assert f"old (protect): {len(kept)} rows" in shown
    assert f"; {len(measured)} more are held out to be measured" in shown


def test_fields_that_no_comma_separates_are_said(tmp_path):
    for separator, shown in ((";", "';'"), ("\t", r"'\\t'")):
        (tmp_path / "rows.csv").write_text(f"prompt{separator}completion\nWho?{separator}Odile\n")
        with pytest.raises(DataError, match=f"separated by {shown}; expected commas"):
            load(str(tmp_path / "rows.csv"))
    (tmp_path / "rows.csv").write_text("text; as written\nOdile bakes bread.\n")
    with pytest.raises(DataError, match="has the columns 'text; as written'"):
        load(str(tmp_path / "rows.csv"))
