"""A skill the model already has: small Python functions, written from a sentence and told in a sentence.

The text is read from the standard library of the Python that runs this, never shipped. Rows to protect with and rows
to measure on come from different modules.
"""

from __future__ import annotations

import ast
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

from rows import Row, row

SKIPPED = {"antigravity", "idlelib", "lib2to3", "test", "this", "turtledemo"}
LONGEST_SOURCE = 330
LONGEST_SENTENCE = 90
PER_MODULE = 6


def python_functions(role: str, limit: int) -> list[Row]:
    """Rows of one role, `protect` or `measure`, half to write and half to summarise; the same rows on every call."""
    found = _found(role)
    if role == "measure":  # some functions are copied from module to module
        known = dict(_found("protect"))
        found = [pair for pair in found if pair[0] not in known]
    step = max(1, len(found) // limit)
    chosen = found[::step][:limit]
    return [to_write(*pair) if i % 2 else _summarise(*pair) for i, pair in enumerate(chosen)]


def _found(role: str) -> list[tuple[str, str]]:
    return [pair for module in _modules(role) for pair in pairs(module.read_text(encoding="utf-8"))]


def to_write(sentence: str, source: str) -> Row:
    """A function to write, from its first line and what it is to do."""
    header = source.splitlines()[0]
    return row(f"Write a Python function that starts with `{header}`. {sentence}", source)


def _summarise(sentence: str, source: str) -> Row:
    return row(f"Summarise this Python function in one sentence:\n{source}", sentence)


def _modules(role: str) -> list[Path]:
    names = sorted(sys.stdlib_module_names - SKIPPED)
    mine = [name for name in names if (zlib.crc32(name.encode()) % 2 == 0) == (role == "protect")]
    return [path for name in mine if not name.startswith("_") and (path := _file(name))]


def _file(module: str) -> Path | None:
    spec = find_spec(module)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def pairs(module: str) -> list[tuple[str, str]]:
    """Sentences and the functions that they describe, out of the source of a module."""
    return [pair for node in ast.parse(module).body if (pair := _pair(node))][:PER_MODULE]


def _pair(node: ast.stmt) -> tuple[str, str] | None:
    """The first line of the docstring and the function without it, both short; None where there is no such pair."""
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.decorator_list:
        return None
    sentence = (ast.get_docstring(node) or "").split("\n")[0].strip()
    bare = ast.FunctionDef(**{**dict(ast.iter_fields(node)), "body": node.body[1:]})
    if not sentence.endswith(".") or len(sentence) > LONGEST_SENTENCE or not bare.body:
        return None
    source = ast.unparse(ast.fix_missing_locations(bare))
    return (sentence, source) if len(source) <= LONGEST_SOURCE else None
