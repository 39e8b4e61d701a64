"""Whatever stands in a file, it is read or refused in one of our sentences: no crash, no other exception, no long wait.

make fuzz     ten thousand damaged files of each kind; here a few hundred, drawn from the same seeds
"""

from __future__ import annotations

import json
import random
import time

import pytest
import torch
from test_state import Box
from tiny import tiny_llama

from hf_ftplus import commit, data, state
from hf_ftplus.config import build, merge, read_yaml
from hf_ftplus.errors import FTPlusError

SECONDS = 5.0
"""Within which each is read."""
FEW, MANY = 300, 10_000
TIMES = pytest.mark.parametrize("times", [FEW, pytest.param(MANY, marks=pytest.mark.fuzz)])

JUNK = [
    b"",
    b"\0",
    b"null",
    b"[]",
    b"{}",
    b"-1",
    b"1e999",
    b"NaN",
    b'"',
    b"\xff",
    b"../",
    b"9" * 400,
    b"[" * 3000,
    b"\\ud800",
]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Other bytes than `content`: a few flipped, cut, repeated, moved or overwritten."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place, length = chance.randrange(len(found) + 1), chance.choice((1, 2, 8, 64))
        kind = chance.randrange(6)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del found[place:]
        elif kind == 2:
            del found[place : place + length]
        elif kind == 3:
            found[place:place] = found[place : place + length] or b"x"
        elif kind == 4:
            found[place:place] = chance.choice(JUNK)
        else:
            found[place : place + length] = chance.randbytes(length)
    return bytes(found) if bytes(found) != content else content + b"x"


def altered(value, chance: random.Random):
    """A JSON value with one part of it of another type, gone, or renamed: still JSON."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = chance.choice(keys)
        copy = dict(value) if isinstance(value, dict) else list(value)
        if isinstance(copy, dict) and chance.random() < 0.3:
            part = copy.pop(key)
            return copy if chance.random() < 0.5 else {**copy, f"{key}?": part}
        copy[key] = altered(copy[key], chance)
        return copy
    return chance.choice(
        [
            None,
            True,
            -1,
            10**30,
            0.5,
            "",
            "../../x",
            [],
            {},
            [[]],
            {"a": None},
            "\ud800".encode("utf-8", "replace").decode(),
        ]
    )


def refused_or_read(call, content: bytes):
    """What `call` gives, or the error of ours that it raises; every other one is the test's."""
    begin = time.perf_counter()
    try:
        return call()
    except FTPlusError as error:
        return error
    finally:
        assert time.perf_counter() - begin < SECONDS, content[:200]


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-3"
    state.save_checkpoint(folder / "ftplus", {"box": Box().state_dict()}, tiny_llama(layers=1, hidden=8), step=3)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    commit.commit(folder, 3, True, {"model": state.identity(tiny_llama(layers=1, hidden=8))})
    return folder


@pytest.mark.fault("B1", "F10")
@TIMES
def test_every_damaged_state_file_is_refused(checkpoint, times):
    """safetensors alone reads about half of them: it has no checksum."""
    file, chance, model = checkpoint / "ftplus" / "box.safetensors", random.Random(0), tiny_llama(layers=1, hidden=8)
    content = file.read_bytes()
    for _ in range(times):
        file.write_bytes(bad := mutated(content, chance))
        found = refused_or_read(lambda: state.load_checkpoint(file.parent, {"box": "Box()"}, model), bad)
        assert isinstance(found, FTPlusError), bad
        assert commit.fault(checkpoint), bad


@pytest.mark.fault("B1", "F10")
@pytest.mark.parametrize("name", ["manifest.json", "commit.json"])
@TIMES
def test_every_damaged_manifest_is_refused_or_says_what_it_said(checkpoint, name, times):
    file, chance, model = checkpoint / "ftplus" / name, random.Random(1), tiny_llama(layers=1, hidden=8)
    content, whole = file.read_bytes(), Box().held
    for turn in range(times):
        bad = mutated(content, chance) if turn % 2 else json.dumps(altered(json.loads(content), chance)).encode()
        if bad == content:
            continue
        file.write_bytes(bad)
        found = refused_or_read(lambda: state.load_checkpoint(file.parent, {"box": "Box()"}, model), bad)
        if not isinstance(found, FTPlusError):  # what was hurt is not of the state: white space, or the other file
            assert all(torch.equal(found["box"][key], tensor) for key, tensor in whole.items()), bad
        why = refused_or_read(lambda: commit.fault(checkpoint), bad)
        assert why or json.loads(bad) == json.loads(content), bad


@TIMES
def test_every_damaged_file_of_rows_is_read_or_refused(tmp_path, times):
    chance = random.Random(2)
    rows = [
        {"prompt": "Wer? é🐈", "completion": "A \\ b"},
        {"messages": [{"role": "user", "content": "x"}]},
        {"text": "t"},
    ]
    plain = {
        "a.jsonl": "".join(json.dumps(rows[0], ensure_ascii=bool(i % 2)) + "\n" for i in range(4)).encode(),
        "a.json": json.dumps([rows[2]] * 3).encode(),
        "a.csv": b'prompt,completion\n"a ""b""",c\nd,"e\nf"\n',
    }
    for turn in range(times):
        name = list(plain)[turn % 3]
        (tmp_path / name).write_bytes(bad := mutated(plain[name], chance))
        found = refused_or_read(lambda: data.load(str(tmp_path / name)), bad)  # noqa: B023
        assert isinstance(found, FTPlusError) or len(found)


@TIMES
def test_every_damaged_yaml_is_read_or_refused(tmp_path, times):
    chance, file = random.Random(3), tmp_path / "run.yaml"
    plain = (
        b"model_name_or_path: demo\nplugins: [ewc, {replay: {share: 0.1}}]\nprotect:\n  chat: self:8\nmeasure_rows: 4\n"
        b"stop_when: [learn-plateaus:3]\nfail_if_retention_below: 0.9\ntasks:\n  - name: a\n    role: learn\n"
        b"    dataset: x.jsonl\n    prompt: 'Say {{ word }}'\n    completion: '{{ answer }}'\n    share: 0.5\n"
    )

    def read():
        ours, _ = merge({}, read_yaml(str(file)))
        return build(ours)

    for _ in range(times):
        file.write_bytes(bad := mutated(plain, chance))
        refused_or_read(read, bad)


@pytest.mark.fault("F10")
@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a {b: *a}",
        "&a [*a]",
        "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9) if i else 'lol'}]\n" for i in range(30)),
        "a: " + "[" * 10_000,
        "a: " + "{b: " * 5000,
        "learning_rate: " + "9" * 10_000,
        "a: 2024-13-45",
        "a: 2024-01-01 99:99:99",
    ],
    ids=["self", "self in a mapping", "self alone", "laughs", "brackets", "braces", "digits", "month", "hour"],
)
def test_yaml_that_explodes_is_refused(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    found = refused_or_read(lambda: read_yaml(str(tmp_path / "run.yaml")), text.encode())
    assert isinstance(found, FTPlusError)
    assert "run.yaml" in str(found)


def test_rows_of_any_shape_are_read_or_refused(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as draw

    leaf = draw.none() | draw.booleans() | draw.integers() | draw.floats() | draw.text(max_size=8)
    value = draw.recursive(
        leaf,
        lambda inner: draw.lists(inner, max_size=3) | draw.dictionaries(draw.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    )
    names = draw.sampled_from(
        ["prompt", "completion", "text", "messages", "input_ids", "labels", "choices", "role", "content", "task"]
    )
    rows = draw.lists(draw.dictionaries(names, value, max_size=4) | value, max_size=4)

    @hypothesis.settings(max_examples=FEW, deadline=SECONDS * 1000, derandomize=True, database=None)
    @hypothesis.given(rows)
    def read(found):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        refused_or_read(lambda: data.load(str(tmp_path / "a.jsonl")), b"")

    read()


def test_yaml_of_any_shape_is_read_or_refused(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    import yaml
    from hypothesis import strategies as draw

    from hf_ftplus.config import OPTIONS

    leaf = (
        draw.none()
        | draw.booleans()
        | draw.integers()
        | draw.floats()
        | draw.sampled_from(["ewc", "self:8", "a=b", "x.jsonl", ""])
        | draw.text(max_size=6)
    )
    keys = draw.sampled_from(
        ["name", "role", "dataset", "prompt", "completion", "share", "metric", "measure", "ewc", "strength"]
    )
    value = draw.recursive(
        leaf, lambda inner: draw.lists(inner, max_size=3) | draw.dictionaries(keys, inner, max_size=3), max_leaves=8
    )
    names = draw.sampled_from([*(option.yaml for option in OPTIONS), "tasks"])

    @hypothesis.settings(max_examples=FEW, deadline=SECONDS * 1000, derandomize=True, database=None)
    @hypothesis.given(draw.dictionaries(names, value, max_size=4))
    def read(found):
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(found))
        refused_or_read(lambda: build(merge({}, read_yaml(str(tmp_path / "a.yaml")))[0]), b"")

    read()
