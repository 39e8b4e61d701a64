"""Claims about what a terminal shows: it fits, it says what is missing, and data cannot act on it."""

from __future__ import annotations

import io

import pytest
from report.test_record import result
from rich.console import Console

from hf_ftplus.evaluation import Completion, Estimate, Level, TaskResult
from hf_ftplus.report import Report, completions_view, joined_completions, joined_table, table
from hf_ftplus.report.text import number, shown

HOSTILE = "[bold red]big[/bold red] [/] [link=http://x]:smile:\x1b[31m\x1b]0;t\x07 \u202etfel\x00\r\nnext\ttab \u2066"


def drawn(renderable, width: int = 80, **options) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, **options)
    console.print(renderable)
    return console.file.getvalue()


def words(text: str) -> str:
    return " ".join(text.split())


RESULTS = [
    result("python_functions"),
    result("chat", metric=None, flips=None, retention=Estimate(0.732, 0.70, 0.76)),
    result("facts", "learn", retention=Estimate()),
    TaskResult("weather", "measure", rows=9, tokens=0),
]


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_and_breaks_no_figure(width):
    text = drawn(table(RESULTS, {"strategies": {"ewc": {"seconds": 12.06, "bytes": 1_070_000_000}}}), width)
    assert max(map(len, text.splitlines())) <= width
    figures = [
        "1.020 -> 1.880",
        "71.0 -> 52.0",
        "50.0 -> 25.0",
        "0.412",
        "0.732",
        "[0.70, 0.76]",
        "+1 -13 rows",
        "protect, n=48",
    ]
    assert [figure for figure in figures if figure not in text] == []
    assert "ewc: 12.1 s, 1.1 GB of state" in text
    assert text.index("facts") < text.index("python_") < text.index("weather")  # learn first


def test_what_was_not_measured_says_so_and_is_never_zero():
    text = words(drawn(table([TaskResult("weather", "measure", rows=9, tokens=0)])))
    assert "weather n/m n/m - n/m n/m" in text
    assert "0.000" not in text
    half = result(after=Level(), drift=Estimate(), retention=Estimate())
    assert "1.020 -> n/m" in drawn(table([half]))


def test_an_undefined_retention_is_told_from_a_missing_one():
    none = result(before=Level(metric=Estimate(0.0)), retention=Estimate())
    assert "undef." in drawn(table([none]))
    assert "inf" not in drawn(table([none])).replace("interval", "")


def test_notes_are_printed():
    assert "chat: The loss after training is not finite" in words(
        drawn(table([result(notes=["The loss after training is not finite on 3 of 48 rows."])]))
    )


@pytest.mark.fault("F5")
@pytest.mark.parametrize("view", ["table", "completions", "joined", "joined completions"])
@pytest.mark.parametrize("colour", [False, True])
def test_text_from_data_is_shown_and_not_obeyed(view, colour):
    item = Completion(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    bad = result(HOSTILE, completions=[item], notes=[HOSTILE])
    views = {
        "table": lambda: table([bad], {"strategies": {HOSTILE: {"seconds": 1.0}}}),
        "completions": lambda: completions_view([bad]),
        "joined": lambda: joined_table({HOSTILE: [bad]}, {HOSTILE: {HOSTILE: HOSTILE}}),
        "joined completions": lambda: joined_completions({HOSTILE: [bad]}),
    }
    text = drawn(views[view](), 300, force_terminal=colour)
    assert "[bold red]big" in text
    assert "\x1b[31mred" not in text
    assert "\x1b]" not in text
    assert not set("\u202e\u2066\x00\x07\r") & set(text)
    assert "\U0001f604" not in text  # :smile: is five letters and two colons


@pytest.mark.fault("E14")
def test_control_characters_are_spelt_out_and_lines_kept():
    assert shown("a\x1b[2Jb\u202ec").plain == "a\\x1b[2Jb\\u202ec"
    assert shown("def f():\n\treturn 1").plain == "def f():\n    return 1"


def test_long_answers_are_cut_and_say_so():
    assert len(shown("x" * 9999).plain) < 300
    assert shown("x" * 9999).plain.endswith(" ...")
    assert shown("\n".join("abcdefghij")).plain == "a\nb\nc\nd\ne\nf ..."
    assert not shown("x" * 50).plain.endswith("...")


def test_an_empty_answer_and_a_missing_one_differ():
    assert shown("").plain == "(nothing)"
    assert shown(None).plain == "n/m"


def test_numbers_have_no_negative_zero_and_few_digits_when_large():
    assert number(-0.00001) == "0.000"
    assert number(-0.25) == "-0.250"
    assert number(12345.678) == "12345.7"
    assert number(None) == "n/m"


def test_joined_runs_stand_beside_each_other_with_their_costs():
    kept = result("chat", after=Level(Estimate(1.28), metric=Estimate(0.45)), drift=Estimate(0.05))
    runs = {"plain": [result("chat")], "ewc": [kept, result("facts", "learn")]}
    text = drawn(joined_table(runs, {"plain": {"seconds": 61.2}, "ewc": {"seconds": 75.0, "bytes": 2e6}}))
    lines = [words(line) for line in text.splitlines()]
    assert lines[0] == "task start plain ewc"
    at = lines.index("chat protect, 48 rows")
    assert lines[at + 1 : at + 4] == ["exact match % 50.0 25.0 45.0", "loss 1.020 1.880 1.280", "drift 0.412 0.050"]
    at = lines.index("facts learn, 48 rows")
    assert lines[at + 2] == "loss 1.020 n/m 1.880"  # plain never measured it
    assert "seconds 61.2 75.0" in lines
    assert "bytes n/m 2.0 MB" in lines


def test_joined_answers_stand_beside_each_other():
    ewc = [result(completions=[Completion("Tell me a story.", "Once.", "Once there was a dog.", "A dog slept.")])]
    other = [result(completions=[Completion("Another?", "No.", "a", "b"), *ewc[0].completions])]
    text = words(drawn(joined_completions({"ewc": ewc, "other": other}), 120))
    assert text.index("A dog slept. A dog slept.") < text.index("Another?")  # whatever place it has in each
    text = words(drawn(joined_completions({"plain": [result()], "ewc": ewc}), 120))
    assert "Tell me a story. Once there was a dog. Maximize A dog slept." in text


def test_a_run_without_tasks_shows_an_empty_table():
    assert "retention" in drawn(table([]))
    assert drawn(joined_table({"plain": []}))
    assert drawn(completions_view([])) is not None


def test_show_prints_table_and_answers():
    console = Console(file=io.StringIO(), width=80, highlight=False)
    Report([result()], {}).show(console)
    text = console.file.getvalue()
    assert "0.412" in text
    assert "Maximize" in text
