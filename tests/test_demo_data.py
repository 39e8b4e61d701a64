"""The demo's data: the same on every call, varied enough, and never the same text to train and to measure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "demo"
sys.path.insert(0, str(DEMO))

from facts import companies, facts  # noqa: E402
from make_data import make_data  # noqa: E402
from python_functions import python_functions  # noqa: E402
from reviews import FRAGMENTS, reviews  # noqa: E402
from summaries import summaries  # noqa: E402


def question(row: dict) -> str:
    return row["prompt"][0]["content"]


def answer(row: dict) -> str:
    return row["completion"][0]["content"]


def test_two_calls_write_the_same_bytes(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    make_data(first)
    subprocess.run([sys.executable, DEMO / "make_data.py", second], check=True, stdout=subprocess.DEVNULL)
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def test_every_row_is_chat_with_one_question_and_one_answer(tmp_path: Path):
    counts = make_data(tmp_path)
    assert min(counts.values()) >= 48
    for path in tmp_path.iterdir():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert [message["role"] for message in row["prompt"]] == ["user"], path.name
            assert question(row).strip(), path.name
            if path.stem != "chat_questions":
                assert [message["role"] for message in row["completion"]] == ["assistant"], path.name
                assert answer(row).strip(), path.name


def test_no_two_of_the_96_facts_share_an_answer():
    answers = [answer(row) for row in facts()]
    assert len(answers) == 96
    assert len(set(answers)) == 96


def test_the_other_phrasing_asks_for_the_same_answers_in_other_words():
    trained, asked = facts(0), facts(1)
    assert [answer(row) for row in trained] == [answer(row) for row in asked]
    assert not {question(row) for row in trained} & {question(row) for row in asked}


def test_another_seed_makes_other_facts():
    assert companies(0) != companies(1)


def test_python_rows_to_measure_on_are_not_those_to_protect_with():
    protect, measure = python_functions("protect", 64), python_functions("measure", 64)
    assert len(protect) == len(measure) == 64
    assert not {answer(row) for row in protect} & {answer(row) for row in measure}
    assert not {question(row) for row in protect} & {question(row) for row in measure}


def test_half_of_the_python_rows_ask_for_code_that_compiles():
    code = [answer(row) for row in python_functions("protect", 64) if question(row).startswith("Write")]
    assert len(code) == 32
    for source in code:
        compile(source, "row", "exec")


def test_reviews_are_balanced_and_all_different():
    rows = reviews("train", 1600)
    assert len({question(row) for row in rows}) == 1600
    assert sum(answer(row) == "positive" for row in rows) == 800
    assert all(row["choices"] == ["positive", "negative"] for row in rows)


def test_held_out_reviews_are_made_of_other_fragments():
    for kind in FRAGMENTS["train"]:
        assert not set(FRAGMENTS["train"][kind]) & set(FRAGMENTS["test"][kind]), kind


def test_reviews_negate_and_mix_so_that_no_single_word_gives_the_answer():
    """Every verb of praise and of complaint occurs under both labels, so counting them decides nothing."""
    rows = reviews("train", 1600)
    for verb in FRAGMENTS["train"]["good"] + FRAGMENTS["train"]["bad"]:
        labels = {answer(row) for row in rows if verb in question(row)}
        assert labels == {"positive", "negative"}, verb


def test_asking_for_more_reviews_than_there_are_says_how_many_there_are():
    with pytest.raises(ValueError, match=r"Found \d+ different test reviews; expected at least 1000000"):
        reviews("test", 1_000_000)


def test_summaries_are_shorter_than_their_notes_and_held_out_notes_are_new():
    train, test = summaries("train", 480), summaries("test", 96)
    assert all(len(answer(row)) < len(question(row)) for row in train + test)
    assert not {question(row) for row in train} & {question(row) for row in test}
