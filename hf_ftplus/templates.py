"""Prompts and answers from templates: Jinja in its sandbox, which reads the columns of a row and nothing else.

    Template("Summarise: {{ text }}", "template").render(row)     text, or a ValueError that says what is wrong with it
    Rendering(templates, completion).of(seed)                     a function from a row to one in a canonical format

What comes out depends on the row and the seed alone, so that a preview, several processes and a resumed run agree: of
several templates a row's own content draws one, whatever rows surround it, and nothing random can be called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined, UndefinedError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import escape, nearest
from .formats import Row

LONGEST = 10**8
"""Characters of a text; more is a slip in the template."""


def _printable(value: Any) -> Any:
    if value is None:  # Jinja would teach the model to say "None"
        raise UndefinedError("prints a value that is null; expected text, such as {{ text or '' }}")
    if callable(value) and not isinstance(value, Undefined):
        raise UndefinedError("prints a function; expected text, such as {{ text.title() }}, or {{ text['title'] }}")
    return value


_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_printable)
del _ENVIRONMENT.filters["random"], _ENVIRONMENT.globals["lipsum"]


class Template:
    """One template of a task.

    Args:
        text: Jinja.
        name: what errors call it: "template", "completion", "choices[1]".

    Raises:
        ValueError: it is no Jinja; names the line.
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        try:
            self._render: Callable[[Row], Any] = self._compiled(text)
        except TemplateSyntaxError as error:
            raise ValueError(f"{name}, line {error.lineno}: {escape(error.message or '', 200)}") from None

    def _compiled(self, text: str) -> Callable[[Row], Any]:
        return _ENVIRONMENT.from_string(text).render

    def render(self, row: Row) -> Any:
        """The text for one row.

        Raises:
            ValueError: a column that the row lacks, something the sandbox refuses, or whatever an expression raised.
        """
        try:
            found = self._render(row)
        except SecurityError as error:
            refused = escape(str(error), 200).rstrip(".")
            raise ValueError(f"{self.name}: the sandbox refuses it: {refused}; expected columns and filters") from None
        except UndefinedError as error:
            raise ValueError(self._undefined(str(error), row)) from None
        except Exception as error:  # an operation on values of the row: text + 1, a[7], ...
            raise ValueError(f"{self.name}: {type(error).__name__}: {escape(str(error), 200)}") from None
        if isinstance(found, str) and len(found) > LONGEST:
            raise ValueError(f"{self.name} gives {len(found)} characters; expected at most {LONGEST}")
        return found

    def _undefined(self, says: str, row: Row) -> str:
        found = re.fullmatch(r"'(.+)' is undefined", says)
        if not found:
            return f"{self.name}: {escape(says, 200)}"
        return f"{self.name} names {found[1]!r}, which is no column of this row; {columns_of(row, found[1])}"


class Expression(Template):
    """A template that is one `{{ expression }}` and gives its value instead of text: a list of choices."""

    def _compiled(self, text: str) -> Callable[[Row], Any]:
        inside = re.fullmatch(r"\s*\{\{(.*)\}\}\s*", text, re.DOTALL)
        if not inside:
            raise ValueError(f"{self.name}: {escape(text)!r}; expected a list, or one {{{{ expression }}}} that is one")
        evaluate = _ENVIRONMENT.compile_expression(inside[1], undefined_to_none=False)

        def value(row: Row) -> Any:
            found = evaluate(row)
            return str(found) if isinstance(found, Undefined) else found  # which raises, as it would when printed

        return value


def columns_of(row: Row, wanted: str) -> str:
    """`it has 'a', 'b'. Did you mean 'a'?`: what to say of a column that a row has not."""
    known = ", ".join(repr(escape(name)) for name in row) or "none"
    hint = nearest(wanted, list(row))
    return f"it has {known}" + (f".{hint}" if hint else "")


@dataclass(frozen=True)
class Rendering:
    """How rows of a task become a prompt and a completion.

    Args:
        templates: of the prompt; each row draws one.
        completion: of the answer.
        choices: of the answers to choose from, of which the completion must be one.
        chat: whether prompt and completion are turns of a user and an assistant, or strings.
        columns: more names for columns: `{"text": "article"}` lets templates say `text` for the column `article`.
    """

    templates: tuple[Template, ...]
    completion: Template
    choices: tuple[Template, ...] | Expression | None = None
    chat: bool = True
    columns: tuple[tuple[str, str], ...] = ()

    def of(self, seed: int) -> Callable[[Row], Row]:
        """The rendering of rows under this seed; the first row tries all templates, that none waits to fail."""
        first = True

        def render(row: Row) -> Row:
            nonlocal first
            drawn = draw(row, seed, len(self.templates))
            row = named(row, self.columns)
            for template in self.templates if first else ():
                template.render(row)
            first = False
            return self._canonical(row, self.templates[drawn])

        return render

    def _canonical(self, row: Row, template: Template) -> Row:
        """One row as prompt + completion.

        Raises:
            ValueError: a text is empty, or the completion is none of the choices.
        """
        prompt, completion = (_text(part, row) for part in (template, self.completion))
        choices = {} if self.choices is None else {"choices": self._choices(row)}
        if choices and completion not in choices["choices"]:
            known = ", ".join(repr(escape(str(choice), 40)) for choice in choices["choices"])
            raise ValueError(f"the completion {escape(completion, 40)!r} is not among the choices {known}")
        if self.chat:
            prompt, completion = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
        return {"prompt": prompt, "completion": completion, **choices}

    def _choices(self, row: Row) -> list[Any]:
        if isinstance(self.choices, tuple):
            return [_text(choice, row) for choice in self.choices]
        found = self.choices.render(row)
        if not isinstance(found, (list, tuple)):
            raise ValueError(f"choices is {escape(repr(found))}; expected a list of texts")
        choices = [str(choice) if isinstance(choice, (int, float)) else choice for choice in found]  # as Jinja prints
        for i, choice in enumerate(choices):
            if not isinstance(choice, str):
                raise ValueError(f"choices[{i}] is {escape(repr(choice), 40)}; expected a text")
        return choices


def _text(template: Template, row: Row) -> str:
    text = template.render(row)
    if not text.strip():
        raise ValueError(f"{template.name} is empty once rendered; expected some text")
    return text


def named(row: Row, columns: tuple[tuple[str, str], ...]) -> Row:
    """The row with more names for some columns.

    Raises:
        ValueError: it has no such column.
    """
    for ours, theirs in columns:
        if theirs not in row:
            raise ValueError(f"columns: no {escape(theirs)!r} for {ours!r}; {columns_of(row, theirs)}")
    return row | {ours: row[theirs] for ours, theirs in columns}


def renaming(columns: tuple[tuple[str, str], ...]) -> Callable[[int], Callable[[Row], Row]]:
    """For rows in a format: other names for columns, in place of their own; the seed has no part in it."""
    theirs = {name for _, name in columns}
    own = {ours for ours, _ in columns}
    return lambda seed: (
        lambda row: {name: value for name, value in named(row, columns).items() if name in own or name not in theirs}
    )


def draw(row: Row, seed: int, count: int) -> int:
    """A number below `count`, from the row's content and the seed."""
    if count == 1:
        return 0
    content = json.dumps([seed, row], sort_keys=True, default=str).encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big") % count
