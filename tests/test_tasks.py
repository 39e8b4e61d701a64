"""Tasks declared in YAML: every fault of every task at once, rows through their templates, training in their shares."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import pytest
import trl
from commands import make_place
from datasets import Dataset
from tiny import tiny_llama, tiny_tokenizer
from training import LEARN, PROTECT, arguments, same, trainer, weights_of
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

from hf_ftplus import SFTTrainer, rows
from hf_ftplus.config import build, merge, read_yaml
from hf_ftplus.errors import DataError, UsageError
from hf_ftplus.tasks import TaskConfig, read

NOTES = [{"article": f"Boat {i} is home.", "headline": f"Home {i}"} for i in range(20)]
QUIZ = [{"question": f"Is {i} even?", "answer": "no" if i % 2 else "yes"} for i in range(12)]
BY_TEMPLATE = {"template": "Sum up: {{ article }}", "completion": "{{ headline }}"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_place(tmp_path_factory.mktemp("place"))
    for name, content in (("notes", NOTES), ("quiz", QUIZ)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def faults(*tasks: dict, **by_name) -> list[str]:
    return read(list(tasks) or by_name)[1]


def one(**keys) -> TaskConfig:
    (task,), wrong = read([{"name": "notes", **keys}])
    assert not wrong
    return task


def config(place, *tasks, training=None, **more):
    """A run that has tasks, as far as rows are concerned."""
    found = build(merge({}, {"tasks": list(tasks), **more})[0])
    found.training = training or arguments(place / "out")
    found.script, found.model = trl.ScriptArguments(), trl.ModelConfig(model_name_or_path=str(place / "model"))
    return found


# ---- what is written -------------------------------------------------------------------------------------------------


def test_a_task_is_what_its_keys_say(place):
    task = one(dataset=f"{place}/notes.jsonl:train[:5]", **BY_TEMPLATE, share=1, measure=f"{place}/notes.jsonl")
    assert (task.name, task.role, task.share, task.spec.split) == ("notes", "learn", 1, "train[:5]")
    found = task.load()
    assert len(found) == 5
    assert found[0] == {
        "prompt": [{"role": "user", "content": "Sum up: Boat 0 is home."}],
        "completion": [{"role": "assistant", "content": "Home 0"}],
    }
    assert task.measure.load()[0] == found[0]
    assert task.given["dataset"].endswith("train[:5]")


def test_tasks_are_a_list_or_a_mapping_by_name():
    entry = {"dataset": "a.jsonl"}
    by_name, listed = read({"sums": entry}), read([{"name": "sums", **entry}])
    assert by_name == listed
    assert not by_name[1]


FAULTS = [
    ({"templte": "x"}, "unknown key 'templte'. Did you mean 'template'?"),
    ({"weight": 2}, "unknown key 'weight'. Did you mean 'share'?"),
    ({"name": None}, "has no name"),
    ({"dataset": None}, "has no dataset: a file, a Hub name, NAME:split"),
    ({"dataset": 3}, "dataset is 3; expected text, in quotes"),
    ({"name": "a=b"}, "name is 'a=b'; expected text without ="),
    ({"name": "\x1b[31m"}, "name is '\\x1b[31m'; expected text without"),
    ({"role": "protct"}, "role is 'protct'; expected learn or protect. Did you mean 'protect'?"),
    ({"share": "30 %"}, "share is '30 %'; expected a number from 0 to 1"),
    ({"share": -0.1}, "share is -0.1; expected a number from 0 to 1"),
    ({"share": float("nan")}, "share is nan; expected a number from 0 to 1"),
    ({"share": True}, "share is True; expected a number from 0 to 1"),
    ({"metric": "exact_mtch"}, "Did you mean 'exact_match'?"),
    ({"metric": "exact_match", "measure": False}, "has a metric, but measure: false measures nothing"),
    ({"streaming": "yes"}, "streaming is 'yes'; expected true or false"),
    ({"streaming": True, "role": "protect"}, "streaming is for what is learnt, and this protects"),
    ({"measure": 3}, "measure is 3; expected a file, a Hub name, or false"),
    ({"measure": "self:3"}, "measure is 'self:3'; expected a file, a Hub name, or false"),
    ({"template": "x"}, "has a template and no completion"),
    ({"completion": "x"}, "completion does nothing without a template"),
    ({"chat": False}, "chat does nothing without a template"),
    ({"template": "x", "templates": ["y"], "completion": "z"}, "template and templates are both given"),
    ({"templates": "x", "completion": "z"}, "templates is 'x'; expected a list of texts"),
    ({"template": "{{ x }", "completion": "z"}, "template, line 1: unexpected '}'"),
    ({"template": "Sum up: {x}", "completion": "z"}, "template has {x}, which is text to Jinja; expected {{ x }}"),
    ({"templates": ["x", "\n{{ x }"], "completion": "z"}, "templates[1], line 2: unexpected '}'"),
    ({"template": "x", "completion": "z", "choices": [True, False]}, "choices is [True, False]; expected two texts"),
    ({"template": "x", "completion": "z", "choices": "options"}, "choices: 'options'; expected a list, or one"),
    ({"columns": {"txt": "body"}}, "columns: 'txt' is no column of a format. Did you mean 'text'?"),
    ({"columns": ["text"]}, "columns is ['text']; expected OUR_NAME: THEIR_COLUMN"),
    ({"config": "en"}, "config is of datasets on the Hub, and a.jsonl is a local file"),
    ({"dataset": "a.jsonl:train", "split": "train[:9]"}, "dataset and split each name one: train, train[:9]"),
    ({"dataset": "self:9"}, "self:9 is what the model knows already, nothing to learn; add role: protect"),
    ({"dataset": "self:9", "role": "protect", "split": "x"}, "split does nothing for self:9"),
    ({"dataset": "self:many"}, "'self:many' does not say how many rows"),
]


@pytest.mark.parametrize(("keys", "says"), FAULTS, ids=[says[:40] for _, says in FAULTS])
def test_every_fault_says_what_was_found_and_expected(keys, says):
    sound = {"name": "b", "dataset": "b.jsonl"}
    found = faults({"name": "a", "dataset": "a.jsonl", **keys}, sound)
    assert len(found) == 1, found
    assert found[0].startswith("tasks")
    assert says in found[0]
    assert "\x1b" not in found[0]


def test_braces_of_other_languages_are_no_fault():
    assert not faults({"name": "a", "dataset": "a.jsonl", "template": "Why?", "completion": r"\boxed{x} or f{x}"})


@pytest.mark.parametrize("given", [[], {}, "summaries", 3])
def test_tasks_that_are_no_tasks_are_refused(given):
    assert "expected a list such as" in read(given)[1][0]


def test_all_faults_of_all_tasks_come_together():
    found = faults(
        {"name": "a", "dataset": "a.jsonl", "shre": 1, "role": "x"}, "nonsense", {"name": "A", "dataset": "b"}
    )
    assert len(found) == 4
    assert "tasks, entry 2 is 'nonsense'" in found[2]
    assert "Two tasks have the name 'A' (the other is 'a')" in found[3]


def test_the_file_of_a_task_is_read_whatever_is_wrong_with_its_template(place, tmp_path):
    for keys in ({"template": "{{ article }", "completion": "x"}, {"completion": "x"}, {"columns": {"txt": "article"}}):
        (task,), wrong = read([{"name": "notes", "dataset": f"{place}/notes.jsonl", **keys}])
        assert len(wrong) == 1
        assert len(task.load()) == 20  # and nothing is said of its columns, which no format has
        (tmp_path / "torn.jsonl").write_text("nonsense\n")
        (task,), _ = read([{"name": "notes", "dataset": f"{tmp_path}/torn.jsonl", **keys}])
        with pytest.raises(DataError, match="not JSON"):
            task.load()


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({"a": 0.8, "b": 0.5}, "their shares (a 0.8, b 0.5) sum to 1.3; expected 1 or less"),
        ({"a": 0, "b": 0}, "sum to 0; expected 1"),
        ({"a": 0.2, "b": 0.5}, "sum to 0.7; expected 1, or a learn task without a share"),
        ({"a": 1, "b": None}, "sum to 1 and leave nothing for b"),
        ({"a": 0.6, "b": None, "p": 0.4}, "sum to 1 and leave nothing for b"),
        ({"p": 0.4}, "tasks: none has the role learn"),
        ({"a": 0.1, "b": 0.7, "p": 0.2}, ""),
        ({"a": 0.3, "b": None, "p": 0.2}, ""),
        ({"a": 0, "b": None}, ""),
        ({"a": None, "p": 0.2}, ""),
    ],
)
def test_shares_are_of_all_training_rows(shares, says):
    found = faults(
        *({"name": name, "dataset": "x", "role": "protect" if name == "p" else "learn", "share": share}
          for name, share in shares.items())
    )  # fmt: skip
    assert len(found) == bool(says)
    assert not says or says in found[0]


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path):
    for text, line in (
        ("tasks:\n  a: {dataset: x}\n  b: {dataset: y}\n  a: {dataset: z}\n", 4),
        ("tasks:\n- name: a\n  dataset: x\n  dataset: y\n", 4),
        ("a: 1\nb: {c: [1, {dataset: 2,\n dataset: 2}]}\n", 3),
        ("a: 1\nb: 2\na: 1\n", 3),
    ):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(UsageError, match=rf"run\.yaml:{line}: '(a|dataset)' stands twice"):
            read_yaml(str(tmp_path / "run.yaml"))
    (tmp_path / "run.yaml").write_text("tasks: [{name: a, template: {{ x }}}]")
    with pytest.raises(UsageError, match="Put templates in quotes"):
        read_yaml(str(tmp_path / "run.yaml"))


# ---- beside the command line -----------------------------------------------------------------------------------------

LEARNT = {"name": "notes", "dataset": "notes.jsonl"}


@pytest.mark.parametrize(
    ("tasks", "more", "says"),
    [
        ([LEARNT], {"protect": "Notes=x.jsonl"}, "Two tasks have the name 'Notes'"),
        ([LEARNT], {"measure": "notes=x.jsonl"}, "Write measure: DATA there"),
        ([LEARNT], {"measure": "learn=x.jsonl"}, "Write measure: DATA there"),
        ([LEARNT], {"metric": "note=choice"}, "no task 'note'. Did you mean 'notes'"),
        ([{**LEARNT, "share": 1}], {"plugins": "multitask"}, "Remove --plugin multitask, or share from these tasks"),
        (
            [LEARNT, {"name": "old", "dataset": "x", "role": "protect", "share": 0.1}],
            {"plugins": "replay"},
            "replay shares out training between protect tasks itself, and a share is given to old. Remove --plugin",
        ),
        ([LEARNT, {"name": "learn", "dataset": "x", "role": "protect"}], {}, "'learn' is what new data is called"),
        (
            [LEARNT, {"name": "old", "dataset": "x", "role": "protect", "measure": False}],
            {"fail_if_retention_below": 0.9},
            "no protect task to judge",
        ),
    ],
)
def test_what_clashes_is_refused_by_name(tasks, more, says):
    with pytest.raises(UsageError) as found:
        build(merge({}, {"tasks": tasks, **more})[0])
    assert says in str(found.value)


def test_flags_join_the_tasks_and_win():
    old = {"name": "old", "dataset": "x.jsonl", "role": "protect", "measure": "y.jsonl"}
    found = build(
        merge({"metric": ["notes=f1"]}, {"tasks": [{**LEARNT, "metric": "choice"}, old], "protect": "more=z.jsonl"})[0]
    )
    assert [str(spec) for spec in found.protect] == ["more=z.jsonl", "old=x.jsonl"]
    assert [str(spec) for spec in found.measure] == ["old=y.jsonl"]
    assert found.metrics == {"notes": "f1"}
    assert found.learns == ["notes"]


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_of_a_task_draw_one_of_its_templates_whatever_else_is_in_the_file(place, tmp_path):
    keys = {"templates": ["Sum up: {{ article }}", "In short: {{ article }}"], "completion": "{{ headline }}"}
    whole = list(one(dataset=f"{place}/notes.jsonl", **keys).load(seed=7))
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in NOTES[::-3]))
    some = list(one(dataset=f"{tmp_path}/some.jsonl", **keys).load(seed=7))
    assert some == whole[::-3]
    assert {row["prompt"][0]["content"][:2] for row in whole} == {"Su", "In"}
    assert whole != list(one(dataset=f"{place}/notes.jsonl", **keys).load(seed=8))


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_a_row_draws_the_same_template_from_whatever_file(place, tmp_path, kind):
    keys = {"templates": ["Sum up: {{ article }}", "In short: {{ article }}"], "completion": "{{ headline }}"}
    path = str(tmp_path / f"notes.{kind}")
    written = Dataset.from_list(NOTES)
    {"json": partial(written.to_json, lines=False), "csv": written.to_csv, "parquet": written.to_parquet}[kind](path)
    assert list(one(dataset=path, **keys).load()) == list(one(dataset=f"{place}/notes.jsonl", **keys).load())
    (tmp_path / "torn.csv").write_text("article,headline\nx,\n")
    with pytest.raises(DataError, match=r"torn\.csv:2: completion is empty once rendered"):
        one(dataset=f"{tmp_path}/torn.csv", **keys).load()


def test_a_local_learn_file_keeps_the_names_of_its_tasks(place, tmp_path):
    content = [{**row, "task": ["sums", "chat"][i % 3 == 0], "id": i} for i, row in enumerate(LEARN)]
    (tmp_path / "learn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    found = build(merge({"plugin": ["multitask"]}, {})[0])
    found.training, found.mixture = arguments(tmp_path), DatasetMixtureConfig()
    found.script = trl.ScriptArguments(dataset_name=f"{tmp_path}/learn.jsonl")
    learn, _ = rows.learn_rows(found)
    assert sorted(learn.column_names) == ["completion", "prompt", "task"]
    assert Counter(learn["task"]) == {"sums": 16, "chat": 8}
    found.mixture.datasets.append(DatasetConfig("json", data_files=f"{tmp_path}/learn.jsonl"))
    assert Counter(rows.learn_rows(found)[0]["task"]) == {"sums": 16, "chat": 8}
    found.mixture.datasets[0].columns = ["prompt", "completion"]
    with pytest.raises(DataError, match=r"multitask .* finds one\. Declare several under tasks:"):
        rows.learn_rows(found)


@pytest.mark.fault("E9")
def test_what_is_wrong_with_rows_is_found_in_all_tasks(place, tmp_path):
    (tmp_path / "torn.jsonl").write_text('{"article": "x", "headline": ""}\nnonsense\n')
    protect = {"name": "old", "dataset": f"{place}/quiz.jsonl", "role": "protect"}
    wrong = config(
        place,
        {"name": "torn", "dataset": f"{tmp_path}/torn.jsonl", **BY_TEMPLATE},
        {"name": "gone", "dataset": f"{place}/note.jsonl"},
        {"name": "notes", "dataset": f"{place}/notes.jsonl", **BY_TEMPLATE, "metric": "choice"},
        {**protect, "columns": {"prompt": "question"}},
        {"name": "quiz", "dataset": f"{place}/quiz.jsonl", "columns": {"prompt": "question", "completion": "anser"}},
    )
    found, faults = rows.gather(wrong)
    assert list(found.learn) == ["notes"]
    said = "\n".join(map(str, faults)).splitlines()
    for start, says in (
        (f"tasks.torn: {tmp_path}/torn.jsonl:1: ", "completion is empty once rendered"),
        (f"tasks.torn: {tmp_path}/torn.jsonl:2:1: ", "not JSON"),
        (f"tasks.gone: {place}/note.jsonl ", "Did you mean 'notes.jsonl'?"),
        (f"tasks.quiz: {place}/quiz.jsonl:1: ", "Did you mean 'answer'? (the same in 11 more)"),
        ("tasks.old: --protect old: ", "questions without completions"),
        ("tasks.notes: Task 'notes', row 1 ", "has no 'choices'"),
    ):
        assert any(line.startswith(start) and says in line for line in said), (start, said)
    assert len(said) == 6
    with pytest.raises(DataError) as raised:
        rows.find(wrong)
    assert str(raised.value).splitlines() == said


def test_protect_rows_that_are_learnt_or_measured_are_counted_whatever_their_format(place, tmp_path, caplog):
    messages = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in LEARN[:5]
    ]
    content = [*messages, *({"messages": [*row["messages"], *row["messages"]]} for row in messages)]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    rows.find(
        config(
            place,
            {"name": "notes", "dataset": f"{place}/learn.jsonl", "measure": f"{place}/protect.jsonl"},
            {"name": "old", "dataset": f"{tmp_path}/old.jsonl", "role": "protect"},
            {"name": "other", "dataset": f"{place}/protect.jsonl", "role": "protect"},
        )
    )
    assert [record.getMessage() for record in caplog.records if "word for word" in record.getMessage()] == [
        "old: 5 of its 10 protect rows are learnt, too, word for word. Take them out of one of the two.",
        f"notes: {len(PROTECT)} of its {len(PROTECT)} measured rows protect, too, word for word, and will look better kept "
        "than others. Measure other rows.",
    ]


def test_settings_that_would_do_nothing_beside_tasks_are_refused(place):
    for keys in ({"dataset_streaming": True}, {"dataset_test_split": "validation"}, {"dataset_config": "en"}):
        found = config(place, {"name": "notes", "dataset": f"{place}/learn.jsonl"})
        found.script = trl.ScriptArguments(**keys)
        with pytest.raises(UsageError, match=rf"{next(iter(keys))} does nothing beside tasks"):
            rows.find(found)


# ---- shares ----------------------------------------------------------------------------------------------------------


def mixed(folder, shares, *strategies, protect=None, **kwargs):
    it = trainer(folder, cls=SFTTrainer, protect=None, learn=labelled(), max_steps=-1, num_train_epochs=1, **kwargs)
    it.install(strategies, protect, None, shares)
    return it


def labelled() -> list[dict]:
    return [{**row, "task": "sums" if i % 4 else "chat"} for i, row in enumerate(LEARN)]  # 18 and 6


@pytest.mark.parametrize(
    ("shares", "strategies", "counts"),
    [
        ({"chat": 0.5}, (), {"sums": 12, "chat": 12, "old": 0}),
        ({"old": 0.25}, (), {"sums": 18, "chat": 6, "old": 8}),
        ({"chat": 0.15, "sums": 0.6, "old": 0.25}, (), {"sums": 19, "chat": 5, "old": 8}),
        ({"chat": 0.5}, ("replay",), {"sums": 12, "chat": 12, "old": 3}),
        ({"old": 0.25}, (("multitask", {"mode": "equal"}),), {"sums": 12, "chat": 12, "old": 8}),
        ({"chat": 0.5}, ("ewc",), {"sums": 12, "chat": 12, "old": 0}),
    ],
)
def test_an_epoch_holds_the_shares_given_and_what_strategies_make_of_them(tmp_path, shares, strategies, counts):
    it = mixed(tmp_path, shares, *strategies, protect={"old": PROTECT})
    assert it._mixture.counts == counts
    drawn = Counter(it._mixture)
    assert sum(drawn.values()) == sum(counts.values())
    it.train()


def test_shares_that_are_as_it_is_and_no_shares_train_plainly(tmp_path):
    plain = trainer(tmp_path, cls=trl.SFTTrainer, learn=labelled(), max_steps=-1, num_train_epochs=1)
    ours = mixed(tmp_path, {"chat": 0.25})
    none = mixed(tmp_path, {})
    assert none.ftplus is None
    for it in (plain, ours, none):
        it.train()
    assert same(weights_of(plain), weights_of(ours))
    assert same(weights_of(plain), weights_of(none))


def test_shares_are_kept_over_epochs_and_resumed(tmp_path):
    kinds = {"save_strategy": "steps", "save_steps": 7, "per_device_train_batch_size": 4}

    def run():
        it = trainer(tmp_path, cls=SFTTrainer, protect=None, learn=labelled(), max_steps=10, **kinds)
        it.install((), {"old": PROTECT}, None, {"old": 0.25})
        return it

    whole, resumed = run(), run()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert same(weights_of(whole), weights_of(resumed))


def test_one_task_trains_as_the_same_rows_without_a_name(place, tmp_path):
    task = {"name": "lanterns", "dataset": f"{place}/learn.jsonl"}
    learn = rows.find(config(place, task)).learn
    ours = SFTTrainer(tiny_llama(), args=arguments(tmp_path), train_dataset=learn, processing_class=tiny_tokenizer())
    plain = trainer(tmp_path, cls=trl.SFTTrainer)
    ours.train(), plain.train()
    assert same(weights_of(ours), weights_of(plain))


HUB_CARD = """---
configs:
- config_name: en
  data_files: [{split: train, path: en.jsonl}]
- config_name: de
  data_files: [{split: train, path: de.jsonl}, {split: held, path: de_held.jsonl}]
---
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_one_of_several_configurations_and_a_split_of_it_are_read_as_from_the_hub(tmp_path, streaming):
    folder = tmp_path / "words"  # `datasets` reads a folder as it reads a repository
    folder.mkdir()
    (folder / "README.md").write_text(HUB_CARD)
    for name in ("en", "de", "de_held"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(3)))
    german = {"name": "german", "dataset": str(folder), "config": "de", "streaming": streaming}
    (task,), faults = read([german | {"measure": f"{folder}:held"}])
    assert not faults
    assert [row["text"] for row in task.load()] == ["de 0", "de 1", "de 2"]
    assert [row["text"] for row in task.measure.load()] == ["de_held 0", "de_held 1", "de_held 2"]
    (task,), _ = read([german | {"split": "held"}])
    assert next(iter(task.load()))["text"] == "de_held 0"
    for change, names in (({"split": "test"}, "held"), ({"config": "fr"}, "'?de'?"), ({"config": None}, "'?de'?")):
        (task,), _ = read([german | change])
        with pytest.raises(DataError, match=names):
            task.load()
