"""The keys of a task under `tasks:` in YAML, and everything that can be wrong with one task as it is written there.

`KEYS` declares them once: help, validation and error messages read it there. Nothing is loaded here, no row is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import metric
from .errors import UsageError, escape, nearest
from .formats import ALSO_KEPT, SHAPES

Fault = tuple[str, str]
"""A key of a task, and what is wrong with it."""

ROLES = ("learn", "protect")
SINGLE = re.compile(r"(?<!\w)\{ ?([A-Za-z_]\w*) ?\}")
"""A name in single braces, as Python's format would fill it; not the argument of something, as in LaTeX."""


@dataclass(frozen=True)
class Key:
    """One key: what it does, which values it takes, and those in words."""

    help: str
    takes: Callable[[Any], bool]
    expected: str


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _name(value: Any) -> bool:
    return _text(value) and not re.search(r"[=/\\:\x00-\x1f]", value)


def _share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_text, value))


def _choices(value: Any) -> bool:
    return _text(value) or (_texts(value) and len(value) > 1)


def _columns(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_text, [*value, *value.values()]))


def _truth(value: Any) -> bool:
    return isinstance(value, bool)


TEXT = "text, in quotes"
KEYS = {
    "name": Key("what errors and reports call it", _name, "text without = / \\ : and control characters"),
    "dataset": Key("a file, a Hub name, NAME:split, or (to protect) self:64: the model writes it", _text, TEXT),
    "split": Key("of the dataset; left out, train", _text, TEXT),
    "config": Key("of several that a dataset on the Hub has", _text, TEXT),
    "columns": Key("names for templates and formats, as OUR_NAME: THEIR_COLUMN", _columns, "OUR_NAME: THEIR_COLUMN"),
    "template": Key("of the prompt, in sandboxed Jinja; without one, rows are in one of the formats", _text, TEXT),
    "templates": Key("several; a row draws one by its own content and the seed", _texts, "a list of texts, in quotes"),
    "completion": Key("template of the answer", _text, TEXT),
    "choices": Key(
        "answers to choose from: templates, or one {{ expression }} that is a list",
        _choices,
        "two texts or more, each in quotes, or one {{ expression }}",
    ),
    "chat": Key("true: prompt and answer are turns of a chat (default); false: plain strings", _truth, "true or false"),
    "streaming": Key(
        "true: rows to learn are read as they are needed and never held; takes max_steps", _truth, "true or false"
    ),
    "metric": Key("how it is scored beside loss, as by --metric", _text, TEXT),
    "role": Key("learn (default) or protect", lambda value: value in ROLES, "learn or protect"),
    "share": Key(
        "of all training rows; learn tasks without one divide the rest by their rows", _share, "a number from 0 to 1"
    ),
    "measure": Key(
        "rows measured before and after, through the same template; false: none",
        lambda value: _truth(value) or _text(value),
        "a file, a Hub name, or false",
    ),
}
MEANT = {
    "weight": "share", "ratio": "share", "prompt": "template", "answer": "completion", "response": "completion",
    "file": "dataset", "path": "dataset", "data": "dataset",
}  # fmt: skip
"""What others call our keys."""
NEED_TEMPLATE = ("completion", "choices", "chat")
FOR_SELF = ("name", "dataset", "role", "share", "metric", "measure")
OF_FORMATS = [
    *dict.fromkeys(name for shape in SHAPES for name in (*shape.columns, *shape.optional)), *ALSO_KEPT
]  # fmt: skip


def faults(entry: dict[str, Any]) -> Iterator[Fault]:
    """What is wrong with a task as written, but for the syntax of its templates."""
    sound = dict(entry)
    for key, said in _values(entry):
        sound.pop(key, None)
        yield key, said
    yield from _together(sound, rendered="template" in entry or "templates" in entry)
    yield from _source(sound)


def _values(entry: dict[str, Any]) -> Iterator[Fault]:
    """Each key by itself."""
    for key in ("name", "dataset"):
        if key not in entry:
            yield key, f"has no {key}: {KEYS[key].help}"
    for key, value in entry.items():
        if key not in KEYS:
            hint = f" Did you mean {MEANT[key]!r}?" if key in MEANT else nearest(str(key), list(KEYS))
            yield key, f"unknown key {shown(key)}.{hint} Keys of a task: {', '.join(KEYS)}"
        elif not KEYS[key].takes(value):
            hint = nearest(value, ROLES) if key == "role" and isinstance(value, str) else ""
            yield key, f"{key} is {shown(value)}; expected {KEYS[key].expected}.{hint}"
        elif key == "metric":
            try:
                metric.parse(value, f"metric is {shown(value)}")
            except UsageError as error:
                yield key, str(error)
        elif key in ("template", "templates", "completion"):
            for text in value if isinstance(value, list) else [value]:
                if "{{" not in text and "{%" not in text and (single := SINGLE.search(text)):
                    yield key, f"{key} has {single[0]}, which is text to Jinja; expected {{{{ {single[1]} }}}}"


def _together(entry: dict[str, Any], rendered: bool) -> Iterator[Fault]:
    """Keys that contradict each other, or do nothing beside each other."""
    if "template" in entry and "templates" in entry:
        yield "templates", "template and templates are both given; expected one of the two"
    if rendered and "completion" not in entry:
        yield "completion", 'has a template and no completion; expected one, such as "{{ answer }}"'
    for key in NEED_TEMPLATE:
        if key in entry and not rendered:
            yield key, f"{key} does nothing without a template; add one, or leave it out"
    for name in entry.get("columns", ()) if not rendered else ():
        if name not in OF_FORMATS:
            hint = nearest(name, OF_FORMATS)
            yield "columns", f"columns: {shown(name)} is no column of a format.{hint} They are {', '.join(OF_FORMATS)}"
    if entry.get("streaming") and entry.get("role") == "protect":
        yield "streaming", "streaming is for what is learnt, and this protects; leave it out"
    if entry.get("measure") is False and "metric" in entry:
        yield "metric", "has a metric, but measure: false measures nothing; leave one of the two out"


def _source(entry: dict[str, Any]) -> Iterator[Fault]:
    """What the dataset is, and what that forbids."""
    from .files import is_local
    from .specs import TaskSpec

    found = {}
    for key in ("dataset", "measure"):
        try:
            found[key] = TaskSpec.of("", entry[key]) if isinstance(entry.get(key), str) else None
        except UsageError as error:
            yield key, str(error)
    if found.get("measure") and found["measure"].generate:
        yield "measure", f"measure is {shown(entry['measure'])}; expected {KEYS['measure'].expected}"
    spec = found.get("dataset")
    if not spec:
        return
    if spec.split and "split" in entry:
        yield "split", f"dataset and split each name one: {spec.split}, {entry['split']}; leave one of the two out"
    if "config" in entry and is_local(spec.source):
        yield "config", f"config is of datasets on the Hub, and {escape(spec.source)} is a local file; leave it out"
    if spec.generate:
        for key in entry.keys() - {*FOR_SELF}:
            yield key, f"{key} does nothing for {entry['dataset']}, which the model writes itself; leave it out"
        if entry.get("role") != "protect":
            yield "role", f"{entry['dataset']} is what the model knows already, nothing to learn; add role: protect"


def shown(value: Any) -> str:
    """A value from YAML, fit for an error."""
    return escape(repr(value), 60)
