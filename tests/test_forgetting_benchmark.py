"""examples/benchmarks/forgetting/: data out of archives as pip brings them, and a sequence for every row."""

from __future__ import annotations

import io
import json
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "examples" / "benchmarks" / "forgetting"
sys.path.append(str(BENCHMARK))  # behind tests/, which has a tiny.py, too

import real  # noqa: E402
import real_data  # noqa: E402
from real_data import MAKERS, split  # noqa: E402

from hf_ftplus.cli.sft import configured  # noqa: E402
from hf_ftplus.stages.plan import read  # noqa: E402


def question(row):
    return row["prompt"][0]["content"]


def answer(row):
    return row["completion"][0]["content"]


def catalogue(messages: dict[str, str]) -> bytes:
    """A .mo file (GNU gettext manual, 10.3)."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", **messages}
    pairs = [(key.encode(), text.encode()) for key, text in sorted(messages.items())]
    tables, strings, at = b"", b"", 28 + 16 * len(pairs)
    for side in (0, 1):
        for pair in pairs:
            tables += struct.pack("<II", len(pair[side]), at + len(strings))
            strings += pair[side] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return head + tables + strings


def tar(path_or_file, files: dict[str, bytes], **how):
    with tarfile.open(mode="w:gz", **({"name": path_or_file} if isinstance(path_or_file, Path) else how)) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    place = tmp_path_factory.mktemp("packages")
    films = [f"{i}\t{rating}\tThe film number {i} was quite something." for i, rating in enumerate([2.5, -3, 0.2] * 8)]
    inner = io.BytesIO()
    tar(
        None,
        {
            f"hutto_ICWSM_2014/{name}_GroundTruth.txt": "\n".join(lines).encode()
            for name, lines in {
                "movieReviewSnippets": films,
                "amazonReviewSnippets": ["1_1\t2.0\tIt works and works and works."],
                "nytEditorialSnippets": [
                    f"{i}\t0.1\t{'The editor wrote a line, and another. ' * 2}{i}" for i in range(9)
                ],
            }.items()
        },
        fileobj=inner,
    )
    tar(place / "vader.tar.gz", {real_data.SENTENCES: inner.getvalue()})
    function = 'def twice(x):\n    """Double a number."""\n    return 2 * x\n'
    german = {"Save all": "Alles sichern", "Yes": "Ja", "%s rows": "%s Zeilen", "day\x04Thu we go": "Do"}
    wheels = {
        "algorithms": {"algorithms/a.py": function.encode(), "algorithms/b.py": function.encode()},
        "django": {"django/conf/locale/de/LC_MESSAGES/django.mo": catalogue(german)},
        "sphinx": {"sphinx/locale/fr/LC_MESSAGES/sphinx.mo": catalogue({"Go on": "Continuez"})},
    }
    for name, files in wheels.items():
        with zipfile.ZipFile(place / f"{name}.whl", "w") as wheel:
            for path, content in files.items():
                wheel.writestr(path, content)
    return {"vaderSentiment": place / "vader.tar.gz", **{name: place / f"{name}.whl" for name in wheels}}


def test_sentences_are_clear_and_as_many_praise_as_blame(packages):
    rows = MAKERS["sentiment"](packages)
    answers = [answer(row) for row in rows]
    assert answers.count("positive") == answers.count("negative") == 8
    assert all(row["choices"] == ["positive", "negative"] for row in rows)
    unclear = {f"number {i} " for i in range(2, 24, 3)}
    assert not any(mark in question(row) for row in rows for mark in unclear)


def test_code_is_asked_for_by_its_first_line_and_docstring(packages):
    row = MAKERS["code"](packages)[0]
    assert question(row) == "Write a Python function that starts with `def twice(x):`. Double a number."
    assert answer(row) == "def twice(x):\n    return 2 * x"


def test_messages_have_neither_placeholders_nor_context_and_are_german(packages):
    (row,) = MAKERS["translation"](packages)
    assert (question(row), answer(row)) == ("Translate into German: Save all", "Alles sichern")


def test_sums_are_right(packages):
    rows = MAKERS["arithmetic"](packages)
    assert all(str(eval(question(row)[8:-1])) == answer(row) for row in rows)
    assert all(int(answer(row)) >= 0 for row in rows)


def test_no_text_is_both_learnt_and_measured(packages):
    for name, make in MAKERS.items():
        rows = make(packages)
        apart = split(rows)
        asked = [{json.dumps(row.get("prompt", row)) for row in apart[side]} for side in (False, True)]
        assert not asked[0] & asked[1], name
        assert apart == split(rows[::-1]), name
    assert len(split(MAKERS["code"](packages))[False]) + len(split(MAKERS["code"](packages))[True]) == 1


@pytest.mark.parametrize("name", ["plain 5e-5", "LoRA, MLP only", "L2-SP", "SI", "EWC, LoRA", "distill + EWC"])
def test_a_row_is_a_sequence_of_all_tasks(name, tmp_path):
    """Every kind of row but OSF, a plugin of its own, which its own tests install."""
    given = real.described(real.CANDIDATES[name], 0, tmp_path)
    plan = read(given)
    assert plan.names == list(real.TASKS)
    assert plan.others == list(real.KEEP)


def test_all_at_once_is_one_run_over_the_same_tasks(tmp_path):
    given = real.described(real.CANDIDATES["joint (multitask)"], 0, tmp_path)
    config, _, _ = configured({}, [], given)
    assert [task.name for task in config.tasks] == list(real.TASKS)
    assert config.training.max_steps == len(real.TASKS) * real.SHARED["max_steps"]
    cell = real.Cell([[0.1] * 4, [0.5, 0.5, 0.7, 0.7]], [[0.5] * 3, [0.4] * 3], [[1.0] * 3, [2.0] * 3], 60.0)
    assert real.table({"joint (multitask)": [cell]}).splitlines()[-1] == (
        "| joint (multitask) | 1 | 60 |  | 50 | 50 | 70 | 70 | +1.000 | +1.000 | +1.000 |"
    )
    assert real.apart([[1, 2, 3, 4, 5, 6, 7]]) == ([[1, 2, 3, 4]], [[5, 6, 7]])


def test_figures_are_those_of_the_definitions():
    before, after = [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]
    score = [before, [0.9, *before[1:]], [0.9, 0.9, *before[2:]], [0.9, 0.9, 0.9, 0.4], after]
    cell = real.Cell(score, [[0.5, 0.5, 0.5], *[[0.4, 0.4, 0.4]] * 4], [[1.0, 2.0, 3.0], *[[2.0, 2.0, 3.0]] * 4], 60.0)
    found = cell.figures()
    assert found["ACC"] == pytest.approx(0.65)
    assert found["BWT"] == pytest.approx(((0.5 - 0.9) + (0.6 - 0.9) + (0.7 - 0.9)) / 3)
    assert [found[name] for name in real.KEEP] == pytest.approx([1.0, 0.0, 0.0])
    other = real.Cell([*score[:-1], [0.7, 0.6, 0.7, 0.8]], cell.kept_score, cell.kept_loss, 60.0)
    assert real.table({"plain": [cell, other]}).splitlines()[-1] == (
        "| plain | 2 | 68 (65 - 70) | -27 | 90 -> 60 | 90 -> 60 | 90 -> 70 | 80 -> 80 | +1.000 | +0.000 | +0.000 |"
    )
