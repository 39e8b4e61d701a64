"""Templates read a row and nothing else, say what is wrong with it, and draw the same for a row wherever it stands."""

from __future__ import annotations

from collections import Counter

import pytest

from hf_ftplus.templates import Expression, Rendering, Template, draw, renaming

ROW = {"text": "Boats.", "label": 1, "gone": None, "options": {"text": ["a", "b"], "key": "b"}, "tags": ["x", "y"]}


def rendering(*templates: str, completion: str = "{{ text }}", **more) -> Rendering:
    made = tuple(Template(text, f"templates[{i}]") for i, text in enumerate(templates))
    return Rendering(made, Template(completion, "completion"), **more)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Sum up: {{ text }}", "Sum up: Boats."),
        ("{{ label }}", "1"),
        ("{{ options.text[0] }}{{ tags | join(', ') }}", "ax, y"),
        ("{% if other is defined %}{{ other }}{% else %}none{% endif %}", "none"),
        ("{{ gone or 'nothing' }}", "nothing"),
        ("{{ text.lower() }}", "boats."),
        ("{{ '<b>' }}", "<b>"),
    ],
)
def test_a_template_reads_the_columns_of_a_row(template, text):
    assert Template(template, "template").render(ROW) == text


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ txt }}", r"template names 'txt', which is no column of this row; it has 'text', .*Did you mean 'text'\?$"),
        ("{{ text.__class__ }}", r"the sandbox refuses it: access to attribute '__class__' of 'str'"),
        ("{{ cycler.__init__.__globals__ }}", r"the sandbox refuses it: access to attribute '__init__'"),
        ("{{ text | attr('__class__') }}", r"the sandbox refuses it"),
        ("{{ tags.append(1) }}", r"the sandbox refuses it|is not safely callable"),
        ("{{ text.nothing }}", r"template: 'str object' has no attribute 'nothing'"),
        ("{{ gone }}", r"template: prints a value that is null; expected text"),
        ("{{ text.title }}", r"template: prints a function; expected text"),
        ("{{ text + 1 }}", r"template: TypeError"),
        ("{% include 'secret' %}", r"template: TypeError: no loader"),
        ("{{ lipsum() }}", r"template names 'lipsum'"),
    ],
)
def test_what_a_template_may_not_do_is_one_sentence(template, says):
    with pytest.raises(ValueError, match=says) as found:
        Template(template, "template").render(ROW)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ text }", r"^template, line 1: unexpected '}'"),
        ("one\ntwo {% for %}", r"^template, line 2: Expected an expression"),
        ("{{ text | random }}", r"^template, line 1: No filter named 'random'"),
        ("{{ text | nonsuch }}", r"^template, line 1: No filter named 'nonsuch'"),
    ],
)
def test_a_template_that_is_none_is_refused_with_its_line(template, says):
    with pytest.raises(ValueError, match=says):
        Template(template, "template")


def test_text_of_a_row_is_shown_escaped():
    with pytest.raises(ValueError, match=r"it has '\\\\x1b\[31m'"):
        Template("{{ text }}", "template").render({"\x1b[31m": "x"})


def test_a_text_that_is_far_too_long_is_a_slip(monkeypatch):
    monkeypatch.setattr("hf_ftplus.templates.LONGEST", 100)
    assert len(Template("{{ 'x' * 100 }}", "template").render({})) == 100
    with pytest.raises(ValueError, match="completion gives 101 characters; expected at most 100"):
        Template("{{ 'x' * 101 }}", "completion").render({})


def test_an_expression_gives_its_value():
    assert Expression("{{ options.text }}", "choices").render(ROW) == ["a", "b"]
    for wrong, says in (
        ("options", "expected a list, or one"),
        ("{{ option }}", r"choices names 'option'.*Did you mean 'options'"),
        ("{{ options.text.__class__ }}", "the sandbox refuses it"),
        ("{{ options. }}", "choices, line 1"),
    ):
        with pytest.raises(ValueError, match=says):
            Expression(wrong, "choices").render(ROW)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_becomes_a_chat_or_two_strings():
    assert rendering("Sum up: {{ text }}", completion="{{ label }}").of(0)(ROW) == {
        "prompt": [{"role": "user", "content": "Sum up: Boats."}],
        "completion": [{"role": "assistant", "content": "1"}],
    }
    assert rendering("{{ text }} ", completion="{{ label }}", chat=False).of(0)(ROW) == {
        "prompt": "Boats. ",
        "completion": "1",
    }


def test_columns_have_more_names_in_templates_and_other_names_in_formats():
    both = rendering("{{ body }}", completion="{{ text }}", columns=(("body", "text"),), chat=False)
    assert both.of(0)({"text": "x"}) == {"prompt": "x", "completion": "x"}
    swapped = renaming((("prompt", "completion"), ("completion", "prompt")))(0)
    assert swapped({"prompt": "a", "completion": "b", "id": 3}) == {"prompt": "b", "completion": "a", "id": 3}
    assert renaming((("text", "body"),))(0)({"body": "a", "n": 1}) == {"text": "a", "n": 1}
    with pytest.raises(ValueError, match=r"columns: no 'bdy' for 'text'; it has 'body'\. Did you mean 'body'"):
        renaming((("text", "bdy"),))(0)({"body": "a"})


def test_a_completion_is_one_of_the_choices():
    quiz = rendering("{{ text }}", completion="{{ options.key }}", choices=Expression("{{ options.text }}", "choices"))
    assert quiz.of(0)(ROW)["choices"] == ["a", "b"]
    listed = (Template("yes", "choices[0]"), Template("{{ tags[0] }}", "choices[1]"))
    assert rendering("{{ text }}", completion="x", choices=listed).of(0)(ROW)["choices"] == ["yes", "x"]
    with pytest.raises(ValueError, match=r"the completion 'no' is not among the choices 'yes', 'x'"):
        rendering("{{ text }}", completion="no", choices=listed).of(0)(ROW)
    counted = rendering("{{ text }}", completion="{{ label }}", choices=Expression("{{ [label, 2.5] }}", "choices"))
    assert counted.of(0)(ROW)["choices"] == ["1", "2.5"]
    with pytest.raises(ValueError, match=r"choices\[1\] is None; expected a text"):
        rendering("{{ text }}", choices=Expression("{{ [text, none] }}", "choices")).of(0)(ROW)
    with pytest.raises(ValueError, match=r"choices is 1; expected a list of texts"):
        rendering("{{ text }}", choices=Expression("{{ label }}", "choices")).of(0)(ROW)


@pytest.mark.parametrize("empty", ["prompt", "completion"])
def test_a_row_that_renders_to_nothing_is_refused(empty):
    made = rendering(" " if empty == "prompt" else "x", completion=" " if empty == "completion" else "x")
    with pytest.raises(ValueError, match=r"is empty once rendered; expected some text"):
        made.of(0)(ROW)


def test_none_of_several_templates_waits_to_fail():
    row = {"text": "any"}
    made = rendering(*("{{ text }}" if i == draw(row, 0, 3) else "{{ missing }}" for i in range(3)))
    with pytest.raises(ValueError, match=r"templates\[\d\] names 'missing'"):
        made.of(0)(row)


def test_a_row_draws_by_its_content_and_the_seed_evenly():
    rows = [{"text": f"boat {i}", "more": {"b": 1, "a": 2}} for i in range(900)]
    drawn = [draw(row, 3, 3) for row in rows]
    counts = Counter(drawn)
    chi_square = sum((counts[i] - 300) ** 2 / 300 for i in range(3))
    assert chi_square < 13.8  # two degrees of freedom: beyond this in one of a thousand
    assert [draw(row, 3, 3) for row in reversed(rows)] == drawn[::-1]
    assert draw({"more": {"a": 2, "b": 1}, "text": "boat 7"}, 3, 3) == drawn[7]
    other = [draw(row, 4, 3) for row in rows]
    assert 200 < sum(a == b for a, b in zip(drawn, other, strict=True)) < 400  # a third: another seed, another draw
