"""Claims about the page: text cannot act, every figure can be looked up, what is missing is never 0."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from report.hostile import PAYLOADS, full
from report.test_record import result

from hf_ftplus.evaluation import Completion, Estimate, Level, TaskResult
from hf_ftplus.page import Found, Run
from hf_ftplus.page.answers import differences
from hf_ftplus.page.definitions import DEFINITIONS
from hf_ftplus.page.flat import to_csv, to_markdown
from hf_ftplus.page.read import Call, Flip, Scores
from hf_ftplus.page.write import MOST_BYTES, page
from hf_ftplus.report import Report
from hf_ftplus.report.text import label

COMMAND = "ftplus report out"
MARKS = {"ins", "del"}  # where words differ depends on the words


class Parsed(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def handle_comment(self, data):
        self.tags.append(("comment", {}))

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    def values(self, attribute):
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]

    @property
    def outline(self):
        """Which elements with which attributes, in their order."""
        return [(tag, sorted(attributes)) for tag, attributes in self.tags if tag not in MARKS]


def of(*tasks, facts=None, runs=1):
    return Found([Run(f"run {i}", Report(list(tasks), facts or {}), Path("x")) for i in range(runs)])


@pytest.fixture(scope="module")
def benign():
    return Parsed(page(full("word"), COMMAND))


@pytest.mark.fault("F5")
@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_from_data_cannot_become_markup(payload, benign):
    html = page(full(payload), COMMAND)
    parsed = Parsed(html)
    assert parsed.outline == benign.outline
    assert all(c.isprintable() or c == "\n" for c in html)  # nothing for a terminal, nothing that turns the text
    assert label(payload, characters=300).plain in "".join(parsed.text)
    names = {name for _, attributes in parsed.tags for name in attributes}
    assert not [
        name for name in names if name.startswith("on") or name in ("src", "srcset", "srcdoc", "action", "formaction")
    ]
    assert all(value.startswith("#") for value in parsed.values("href"))
    assert not {"script", "img", "iframe", "object", "embed", "base", "link", "form", "a"} & {
        tag for tag, _ in parsed.tags
    }


def test_the_page_asks_nothing_of_anybody(benign):
    (policy,) = [meta["content"] for meta in benign.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    html = page(full("word"), COMMAND)
    assert not re.findall(r"@import|url\((?!#)", html)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", html)


@pytest.mark.fault("F6")
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_cell_of_the_csv_is_a_number_or_plain_text(payload):
    rows = list(csv.reader(io.StringIO(to_csv(full(payload)))))
    assert {len(row) for row in rows} == {9}
    assert len(rows) == len(list(csv.reader(io.StringIO(to_csv(full("word"))))))
    for row in rows[1:]:
        for cell in row[3:4] + row[6:]:
            assert cell == "" or float(cell) is not None
        for cell in row[:3] + row[4:6]:
            assert all(part.lstrip()[:1] not in tuple("=+-@＝＋－＠") for part in cell.split(";"))
            assert cell.isprintable()


def test_numbers_of_the_csv_are_whole_and_what_was_not_measured_is_empty():
    rows = list(csv.DictReader(io.StringIO(to_csv(of(result(drift=Estimate(-1.25e-7, -2.0, None)))))))
    (drift,) = [row for row in rows if row["figure"] == "drift"]
    assert (float(drift["value"]), drift["low"], drift["high"]) == (-1.25e-7, "-2.0", "")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_markdown_tables_hold_whatever_stands_in_them(payload):
    def outline(text):
        reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
        tokens = [child for token in reader.parse(text) for child in (token, *(token.children or ()))]
        return [token.type for token in tokens if token.type not in ("text", "text_special", "entity")]

    text = to_markdown(full(payload), f"ftplus report '{payload}'")
    assert "www." not in re.sub(r"(?m)^`[^`]*`$", "", text)  # a command, as code, is never a link
    assert outline(text) == outline(to_markdown(full("word"), COMMAND))
    assert all(c.isprintable() or c == "\n" for c in text)


def test_every_figure_is_one_click_from_its_definition(benign):
    targets, ids = benign.values("popovertarget"), benign.values("id")
    assert len(ids) == len(set(ids))
    assert set(targets) <= set(ids)
    assert {f"def-{key}" for key in DEFINITIONS} <= set(ids)
    used = {target.removeprefix("def-") for target in targets}
    assert set(DEFINITIONS) <= used | {"speed"}  # which is of models that were scored


def test_every_table_has_terms_n_and_the_command_of_what_it_shows():
    sections = re.split(r"<section(?: class=\"task\")?>", page(full("word"), COMMAND))[1:]
    with_tables = [text for text in sections if "<table" in text]
    assert len(with_tables) > 6
    by_task = next(text for text in sections if "Task by task" in text)
    for text in with_tables:
        head = re.search(r"<h[23]>(.*?)</h[23]>", text, re.DOTALL)[1]
        for table in re.findall(r"<table.*?</table>", text, re.DOTALL):
            assert "popovertarget" in table or "popovertarget" in head, head
        assert re.search(r"\bn = |seeds|without interval", text), head
        assert "Command of" in text + (
            by_task if 'class="wide" tabindex="0" role="group" aria-label="Figures of' in text else ""
        ), head


def test_every_figure_carries_n_its_interval_and_the_command():
    found = Parsed(page(of(result(), facts={"command": ["ftplus", "sft", "a b"]}), COMMAND))
    words = " ".join(" ".join(found.text).split()).replace(" ;", ";")
    assert "n = 48 rows, 1200 tokens; 95 % intervals over rows" in words
    assert "exact match % 50.0 [30.0, 70.0] 25.0 [10.0, 40.0]" in words
    assert "0.412 [0.380, 0.450]" in words
    assert "ftplus sft 'a b'" in words
    assert COMMAND in words


def test_what_was_not_measured_says_so_and_is_never_zero():
    text = "".join(Parsed(page(of(TaskResult("weather", "protect", rows=9, tokens=0)), COMMAND)).text)
    tables = text[text.index("Learning against") : text.index("What it cost")]
    assert tables.count("n/m") > 8
    assert "0.0" not in tables
    none = result(before=Level(metric=Estimate(0.0)), retention=Estimate())
    assert "undef." in page(of(none), COMMAND)


def test_figures_of_other_rows_are_pointed_out():
    runs = [Run(str(n), Report([result(rows=n)]), Path("x")) for n in (48, 12)]
    html = page(Found(runs), COMMAND)
    assert "Not measured on the same rows (1: 48 rows, 1200 tokens; 2: 12 rows, 1200 tokens)" in html


def test_differences_are_marked_by_words_and_lose_nothing():
    before, after = differences("The cat sat <here>.", "The dog sat <there>.", 100)
    assert before == [("", "The "), ("del", "cat"), ("", " sat <"), ("del", "here"), ("", ">.")]
    assert after == [("", "The "), ("ins", "dog"), ("", " sat <"), ("ins", "there"), ("", ">.")]
    assert differences(None, "x", 9) == ([("", "n/m")], [("", "x")])
    assert differences("x", "", 9) == ([("", "x")], [("", "(nothing)")])


def test_answers_stand_beside_the_start_that_they_share():
    one, other = (
        result(completions=[Completion("Q?", "yes", "no idea", said), Completion("R?", "a", "b", "c")])
        for said in ("yes", "no")
    )
    runs = [Run("plain", Report([one]), Path("x")), Run("ewc", Report([other]), Path("y"))]
    terms = re.findall(r"<dt>(.*?)</dt>", page(Found(runs), COMMAND))
    assert terms == ["expected", "start", "1 plain", "2 ewc"] * 2
    other.completions[0].before = "another start"
    terms = re.findall(r"<dt>(.*?)</dt>", page(Found(runs), COMMAND))
    assert terms[:5] == ["expected", "1 plain: start", "1 plain", "2 ewc: start", "2 ewc"]


def test_runs_that_were_asked_other_questions_stand_under_their_own():
    """Which rows are asked follows from the seed of a run."""
    asked = {"one": ("A?", "B?"), "other": ("B?", "C?")}
    runs = [
        Run(
            name,
            Report([result(completions=[Completion(q, "", f"start {q}", f"{name} {q}") for q in each])]),
            Path(name),
        )
        for name, each in asked.items()
    ]
    html = page(Found(runs), COMMAND)
    said = [re.findall(r"<dt>\d (one|other)</dt>", part) for part in html.split('class="prompt"')[1:]]
    assert said == [["one"], ["one", "other"], ["other"]]


def test_200_rows_of_20_models_fit_into_3_mb():
    said = "A <b>long</b> & tedious answer in 海, " * 12
    runs = []
    for model in range(20):  # as text each sign is one character, in HTML five
        items = [Completion(f"{i} {said}", said, said[i:], '<&">' * 90 + str(i)) for i in range(200)]
        runs.append(Run(f"run {model}", Report([result(completions=items)]), Path(str(model))))
    html = page(Found(runs), COMMAND)
    assert 500_000 < len(html.encode()) < MOST_BYTES
    assert len(re.findall(r'class="prompt"', html)) == 200
    assert re.search(r"Answers are cut at \d+ characters", html)


def test_flips_of_20_models_on_10_tasks_of_200_rows_fit_into_3_mb():
    said = Completion('<"&>' * 200, "<b> & " * 100, '<"&>' * 300, '<"&> other ' * 99)
    flips = [Flip(row, said) for row in range(100)]
    tasks = [result(f"task {i}", "measure") for i in range(10)]
    models = [f"out/model {i}" for i in range(20)]
    calls = [[Call(name, task, "lost", flips, flips, "rows/x.jsonl") for task in tasks] for name in models[1:]]
    scores = Scores(models, 0.05, {task.name: 0.01 for task in tasks}, calls, [])
    runs = [Run(name, Report(tasks), Path("eval.json")) for name in models[1:]]
    html = page(Found(runs, scores={"eval": scores}), COMMAND)
    assert 500_000 < len(html.encode()) < MOST_BYTES
    assert html.count("<dt>out/model 0</dt>") == 19 * 10 * 2 * 5
    assert html.count("95 more, and every answer whole, in rows/x.jsonl") == 19 * 10 * 2


@pytest.mark.parametrize(
    "facts", [{}, {"seconds": 3, "strategies": [1], "history": {"a": 1}, "command": 7, "config": None}]
)
def test_whatever_the_facts_are_there_is_a_page(facts):
    assert "not kept in this report" in page(of(result(), facts=facts), COMMAND)
    assert page(Found(), COMMAND)
