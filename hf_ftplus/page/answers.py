"""Answers before and after as words that stayed, came or went, safe to show."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from ..report.text import shown

Pieces = list[tuple[str, str]]
"""Runs of text under `""` (in both), `"del"` (only before) or `"ins"` (only after)."""
LINES = 60


def cut(text: str | None, characters: int) -> str:
    """As it may be shown, and no longer than that."""
    return shown(text, characters, LINES).plain


def plain(text: str | None, characters: int) -> Pieces:
    """Unmarked; control and invisible characters spelt out, cut to size."""
    return [("", cut(text, characters))]


def differences(before: str | None, after: str | None, characters: int) -> tuple[Pieces, Pieces]:
    """Both sides, marked by words; a side that was not measured marks nothing."""
    sides = plain(before, characters), plain(after, characters)
    if not (before and before.strip() and after and after.strip()):
        return sides
    old, new = (re.findall(r"\s+|\w+|[^\w\s]", side[0][1]) for side in sides)
    was: Pieces = []
    now: Pieces = []
    for _, a, b, c, d in SequenceMatcher(None, old, new).get_opcodes():
        gone, come = "".join(old[a:b]), "".join(new[c:d])
        same = gone == come
        was += [("" if same else "del", gone)] if gone else []
        now += [("" if same else "ins", come)] if come else []
    return was, now
