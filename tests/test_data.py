"""Claims about data: every format is read, every fault named with its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from hf_ftplus.data import load, normalise, stream
from hf_ftplus.errors import DataError
from hf_ftplus.files import READERS


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


ROW = {"prompt": "Name a colour.", "completion": " Blue."}


# ---- formats -------------------------------------------------------------------------------------------------------

USER, BOT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Hm."}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW, ROW),
        ({"prompt": [USER], "completion": [BOT]}, {"prompt": [USER], "completion": [BOT]}),
        ({"messages": [USER, BOT]}, {"messages": [USER, BOT]}),
        ({"text": "home"}, {"text": "home"}),
        (
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            {
                "prompt": [{"role": "user", "content": "Add.\n\n1 and 2"}],
                "completion": [{"role": "assistant", "content": "3"}],
            },
        ),
        (
            {"instruction": "Why?", "output": "Hm."},
            {"prompt": [USER], "completion": [BOT]},
        ),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Hm."}]},
            {"messages": [USER, BOT]},
        ),
        (
            {
                "system": "Be dry.",
                "conversations": [{"from": "user", "value": "Why?"}, {"from": "assistant", "value": "Hm."}],
            },
            {"messages": [{"role": "system", "content": "Be dry."}, USER, BOT]},
        ),
        ({"conversations": [USER, BOT]}, {"messages": [USER, BOT]}),
        ({"prompt": "a", "prompt_id": "7", "messages": [USER, BOT]}, {"messages": [USER, BOT]}),
        (ROW | {"source": "web", "choices": ["a", "b"]}, ROW | {"choices": ["a", "b"]}),
        ({"input_ids": [5, 6], "attention_mask": [1, 1], "text": "a"}, {"input_ids": [5, 6], "labels": [5, 6]}),
        ({"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1]}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}),
    ],
)
def test_formats_become_canonical(row, expected, tmp_path):
    assert list(load(lines(tmp_path / "rows.jsonl", row))) == [expected]
    assert list(normalise([row], "rows")) == [expected]
    assert list(normalise(Dataset.from_list([row]), "rows")) == [expected]


def test_every_local_file_type_gives_the_same_rows(tmp_path):
    rows = [
        ROW,
        {"prompt": 'Quote, "and" comma:\u2028two', "completion": "2020-01-01"},
        {"prompt": "n", "completion": "007"},
    ]
    data = Dataset.from_list(rows)
    data.to_csv(str(tmp_path / "a.csv"))
    data.to_parquet(str(tmp_path / "a.parquet"))
    lines(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes() + b"\n\n")
    for name in ("a.csv", "a.parquet", "a.jsonl", "b.json", "bom.jsonl"):
        assert list(load(str(tmp_path / name))) == rows, name


def test_optional_message_fields_may_appear_late_in_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ftplus.data.CHUNK", 2)
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    rows = [{"messages": [USER, BOT]}] * 3 + [{"messages": [USER, call]}]
    data = load(lines(tmp_path / "calls.jsonl", *rows))
    assert len(data) == 4
    assert data[3]["messages"][1]["tool_calls"][0]["function"]["name"] == "f"
    assert data[0]["messages"][1]["content"] == "Hm."


def test_a_folder_of_the_home_is_read_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows").mkdir()
    lines(tmp_path / "rows" / "train.jsonl", ROW)
    assert list(load("~/rows")) == list(stream("~/rows")) == [ROW]


def test_local_splits_are_slices_of_train(tmp_path):
    path = lines(tmp_path / "a.jsonl", *[{"text": f"row {i}"} for i in range(10)])
    assert len(load(path, "train")) == 10
    assert [row["text"] for row in load(path, "train[2:4]")] == ["row 2", "row 3"]
    assert len(load(path, "train[:50%]")) == 5
    with pytest.raises(DataError, match=r"a.jsonl:test: .* Expected one of train, or a slice"):
        load(path, "test")
    with pytest.raises(DataError, match="0 rows; there are 10 in train"):
        load(path, "train[:0]")


# ---- faults, each with its place -----------------------------------------------------------------------------------


def failure(source: str) -> str:
    with pytest.raises(DataError) as caught:
        load(source)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_missing_file_names_its_neighbour(tmp_path):
    lines(tmp_path / "learn.jsonl", ROW)
    assert failure(str(tmp_path / "laern.jsonl")).endswith(
        "does not exist; expected a file. Did you mean 'learn.jsonl'?"
    )
    assert failure(str(tmp_path / "none" / "what.jsonl")).endswith(
        'A row looks like this: {"prompt": "What does Norvane make?", "completion": "Saddles."}'
    )
    assert "does not exist" in failure("learn-nowhere.csv")
    assert "does not exist" in failure("./nowhere")


def test_a_file_of_unknown_type_lists_the_known_ones(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    assert "is a .txt; expected one of .jsonl, .json, .csv, .parquet" in failure(str(tmp_path / "a.txt"))


@pytest.mark.fault("E1")
@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "prompt,completion\n"), ("b.jsonl", "\n\n")]
)
def test_empty_file_says_zero_rows(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert failure(str(tmp_path / name)) == f"{tmp_path / name}: 0 rows; expected at least one."


@pytest.mark.fault("E2")
def test_malformed_lines_are_listed_with_line_column_and_escaped_excerpt(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = json.dumps(ROW)
    path.write_text("\n".join([good, '{"prompt": "a", "completion": \x1b[31m}', good, '{"prompt": "a"', "nonsense"]))
    message = failure(str(path)).splitlines()
    assert [line.split(" ")[0] for line in message] == [f"{path}:2:31:", f"{path}:4:15:", f"{path}:5:1:"]
    assert "\\x1b[31m" in message[0]
    assert "\x1b" not in message[0]


@pytest.mark.fault("E2")
def test_only_the_first_malformed_lines_are_listed(tmp_path):
    path = lines(tmp_path / "bad.jsonl", *["nonsense"] * 50)
    (message,) = failure(path).splitlines()
    assert message.startswith(f"{path}:1:1: not JSON")
    assert message.endswith("nonsense (the same in 49 more)")
    path = lines(tmp_path / "worse.jsonl", *[f"nonsense {i}" for i in range(50)], "nonsense 3")
    message = failure(path).splitlines()
    assert len(message) == 21
    assert message[3].endswith("nonsense 3 (the same in 1 more)")
    assert message[20] == "... and 30 more rows with other faults."


@pytest.mark.fault("E2")
def test_malformed_array_has_line_and_column(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n  {"text": "a"},\n  {"text" "b"}\n]')
    assert failure(str(path)).startswith(f"{path}:3:11: not JSON")


def test_long_lines_are_cut_around_the_fault(tmp_path):
    path = lines(tmp_path / "long.jsonl", '{"text": "' + "x" * 5000 + '" oops}')
    message = failure(path)
    assert f"{path}:1:5013:" in message
    assert "oops" in message
    assert len(message) < 300 + len(path)


@pytest.mark.fault("E3")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_bytes_that_are_not_utf8_have_a_line(name, tmp_path):
    opening = {"a.jsonl": b'{"text": "fine"}\n{"text": "caf', "a.json": b'[{"text": "fine"},\n{"text": "caf'}
    path = tmp_path / name
    path.write_bytes(opening.get(name, b"text\ncaf") + b'\xe9"}')
    assert failure(str(path)).startswith(f"{path}:2:{4 if name == 'a.csv' else 14}: not UTF-8 (byte 0xe9)")


@pytest.mark.fault("E3", "E4", "E6", "E10")
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": None}, ":2: 'completion' is None; expected a string or a list of messages"),
        ({"prompt": "a", "completion": "  "}, ":2: 'completion' is empty; expected some text"),
        ({"prompt": "a", "completion": 5}, ":2: 'completion' is the number 5; expected a string"),
        ({"prompt": "a"}, ":2: has no 'completion'; it has 'prompt', expected prompt + completion"),
        ({"prompt": [], "completion": []}, ":2: 'prompt' is an empty list; expected a list of messages"),
        ({"prompt": "a", "completion": [BOT]}, "expected two strings or two lists of messages"),
        ({"prompt": [USER], "completion": [BOT]}, ":2: holds messages, the rows before it strings"),
        ([1, 2], ":2: is [1, 2]; expected an object"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', ":2: has 'prompt' twice"),
        ('{"prompt": "a", "completion": "\\ud83d"}', ":2: has a lone surrogate"),
        ('{"prompt": "a", "completion": ' + "[" * 100_000, ":2: is nested too deep"),
        (ROW | {"choices": ["yes", "no", "yes"]}, ":2: 'choices' has 'yes' twice; expected each answer once"),
        (ROW | {"choices": "yes"}, ":2: 'choices' is the string 'yes'; expected a list of two strings or more"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(row, reason, tmp_path):
    path = lines(tmp_path / "rows.jsonl", ROW, row)
    assert path + reason in failure(path) if reason.startswith(":") else reason in failure(path)


@pytest.mark.fault("E6")
@pytest.mark.parametrize(
    ("first", "row", "reason"),
    [
        ({"prompt": "a"}, ROW, ":2: has prompt + completion, the rows before it prompt; expected one format"),
        ({"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [-100, 2]}, ":2: has input_ids + labels, the rows"),
    ],
)
def test_a_row_that_has_more_than_the_first_loses_nothing_in_silence(first, row, reason, tmp_path):
    path = lines(tmp_path / "rows.jsonl", first, row)
    assert path + reason in failure(path)


@pytest.mark.parametrize("later", [{"messages": [USER, BOT]}, {"prompt": [USER], "completion": [BOT]}])
def test_a_stream_is_of_one_format_and_one_kind_to_its_end(later, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ftplus.data.STREAMED", 2)
    first = {"text": "a"} if "messages" in later else {"prompt": "a", "completion": "b"}
    rows = stream(lines(tmp_path / "rows.jsonl", first, first, later))
    with pytest.raises(DataError, match=r"rows.jsonl:3: (has no 'text'|holds messages, the rows before it strings)"):
        list(rows)


def calling(arguments: dict) -> dict:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [USER, BOT | {"tool_calls": [call]}]}


@pytest.mark.fault("E6")
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize(
    "rows",
    [
        [calling({"a": 1}), calling({"a": "x"})],
        [{"messages": [USER, BOT | {"weight": 1}]}, {"messages": [USER, BOT | {"weight": "x"}]}],
        [{"text": "a", "chat_template_kwargs": {"thinking": on}} for on in (True, "x")],
    ],
    ids=["arguments of a call", "message", "arguments of the template"],
)
def test_a_field_of_two_types_is_one_sentence(rows, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ftplus.data.CHUNK", chunk)
    path = lines(tmp_path / "rows.jsonl", *rows)
    assert failure(path).startswith(f"{path}: a field has different types in different rows: Could not convert 'x'")


@pytest.mark.fault("E6")
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": "Why?"}, "row 1: 'messages' is the string 'Why?'; expected a list of messages"),
        ({"messages": []}, "row 1: 'messages' is an empty list"),
        ({"messages": [USER]}, "row 1: 'messages' has no turn of the role 'assistant', only 'user'"),
        ({"messages": [USER, "Hm."]}, "row 1: messages[1] is the string 'Hm.'"),
        (
            {"messages": [USER, BOT | {"content": [{"type": "text"}]}]},
            "'messages[1].content' is a list; expected a string",
        ),
        ({"conversations": [{"from": "humann", "value": "x"}]}, "conversations[0] is from 'humann'; expected one of"),
        ({"instruction": "x", "input": 3, "output": "y"}, "row 1: 'input' is the number 3; expected a string"),
        ({"instruction": "x", "output": ""}, "row 1: 'output' is empty"),
        ({"text": None}, "row 1: 'text' is None; expected a string"),
        ({"input_ids": [1, 2], "labels": [1]}, "row 1: 'input_ids' has 2 tokens and 'labels' 1"),
        ({"input_ids": None}, "row 1: 'input_ids' is None"),
        ({"input_ids": None, "assistant_masks": [1]}, "row 1: 'input_ids' is None"),
        ({"input_ids": [1, 2], "assistant_masks": 1}, "row 1: 'assistant_masks' is the number 1; expected a list"),
        ({"conversations": [{"from": ["x"], "value": "y"}]}, "conversations[0] is from"),
    ],
)
def test_a_bad_row_in_python_is_refused_with_its_number(row, reason):
    with pytest.raises(DataError) as caught:
        normalise([row], "mine")
    assert str(caught.value).startswith("mine, row 1: ")
    assert reason in str(caught.value)


@pytest.mark.fault("E5")
def test_unknown_columns_list_found_expected_and_nearest(tmp_path):
    path = lines(tmp_path / "qa.jsonl", {"Promt": "a", "answer": "b"})
    message = failure(path)
    assert message.startswith(f"{path} has the columns 'Promt', 'answer'; expected one of these sets: ")
    for known in ("prompt + completion", "messages", "conversations", "instruction + output + [input]", "text"):
        assert known in message
    assert "Did you mean 'prompt' for 'Promt'?" in message
    with pytest.raises(DataError, match="'Promt', 'answer'"):
        normalise(Dataset.from_list([{"Promt": "a", "answer": "b"}]), "qa")


def test_csv_faults_have_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"two\nlines",b\nx,y,z\nonly\n')
    message = failure(str(path)).splitlines()
    assert message[0].startswith(f"{path}:4: has 1 fields more than the header; expected 2")
    assert message[1].startswith(f"{path}:5: 'completion' is None")
    path.write_text("prompt,prompt\na,b\n")
    assert "has 'prompt' twice" in failure(str(path))


def test_a_csv_is_read_as_it_is_needed(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,completion\r\n" + b'"Who,\r\nand why?",Me.\r\n' * 20_000 + b"\xff,x\r\n")
    _, first = next(READERS[".csv"](path))
    assert first() == {"prompt": "Who,\r\nand why?", "completion": "Me."}
    with pytest.raises(DataError, match=r"a\.csv:40002:1: .*UTF-8"):
        load(str(path))


@pytest.mark.fault("E1")
def test_zero_rows_in_python_are_refused():
    for nothing in ([], Dataset.from_dict({"text": []})):
        with pytest.raises(DataError, match="mine: 0 rows"):
            normalise(nothing, "mine")


def test_a_hub_name_out_of_reach_is_one_sentence():
    message = failure("nobody/nothing-like-this")
    assert message.startswith("nobody/nothing-like-this:train cannot be read: ")
    assert "\n" not in message


def test_a_misspelt_suffix_is_taken_for_the_hub_and_names_its_neighbour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "rows.jsonl", ROW)
    assert failure("rows.jsnol").endswith("Did you mean 'rows.jsonl'?")


def test_reading_shows_no_bars_and_leaves_the_bar_setting(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys.modules["datasets.utils.tqdm"], "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    datasets.enable_progress_bars()
    Dataset.from_list([ROW]).to_parquet(str(tmp_path / "a.parquet"))
    capfd.readouterr()
    load(str(tmp_path / "a.parquet"))
    assert not datasets.are_progress_bars_disabled()
    assert "Generating" not in capfd.readouterr().err
