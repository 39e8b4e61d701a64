"""Short reviews that praise or complain, with negation and mixed aspects; held-out rows are made of other fragments.

A review speaks of one or two aspects. Where it speaks of two that disagree, the closing verdict decides.
"""

from __future__ import annotations

import random
from itertools import product

from rows import Row, row

CHOICES = ["positive", "negative"]

FRAGMENTS = {
    "train": {
        "things": ("film", "restaurant", "hotel", "novel", "phone", "concert", "museum", "headset", "play", "bakery"),
        "aspects": ("the beginning", "the price", "the atmosphere", "the design", "the staff", "the finish"),
        "good": ("was a delight", "won me over", "felt generous", "was better than promised", "made me smile"),
        "bad": ("was a letdown", "tried my patience", "felt cheap", "was worse than promised", "made me sigh"),
        "not_good": ("was not worth the wait", "did not win me over", "never felt right"),
        "not_bad": ("was not bad at all", "did not let me down", "never felt too long"),
        "verdicts": (
            ("I would come back tomorrow.", "I will not come back."),
            ("All in all, time well spent.", "All in all, time wasted."),
            ("My friends will hear me recommend it.", "My friends will hear me warn them."),
        ),
        "openings": ("About this {}:", "We tried the {}.", "A word on the {}:", "The {}, then."),
    },
    "test": {
        "things": ("series", "café", "camera", "theatre", "podcast", "campsite", "keyboard", "exhibition"),
        "aspects": ("the sound", "the service", "the ending", "the view", "the quality"),
        "good": ("was superb", "exceeded every hope", "charmed the whole family", "deserves applause"),
        "bad": ("was dreadful", "fell short of every hope", "annoyed the whole family", "deserves a refund"),
        "not_good": ("was nothing to be proud of", "did not please anybody", "hardly works"),
        "not_bad": ("was nothing to complain about", "did not disappoint anybody", "hardly has a flaw"),
        "verdicts": (
            ("Five stars from me.", "One star from me."),
            ("Go, you will thank yourself.", "Stay away, you will thank yourself."),
        ),
        "openings": ("Regarding the {}:", "My visit to this {} in short:", "Honest opinion of the {}:"),
    },
}


def reviews(split: str, count: int, seed: int = 0) -> list[Row]:
    """`count` different reviews of one split, `train` or `test`, half of them positive."""
    draw = random.Random(f"{split}-{seed}")
    half = [_shuffled(_texts(split, good), draw)[: (count + 1 - good) // 2] for good in (False, True)]
    rows = [_row(text, good) for good, texts in enumerate(half) for text in texts]
    if len(rows) < count:
        raise ValueError(f"Found {len(rows)} different {split} reviews; expected at least {count}. Ask for fewer.")
    return _shuffled(rows, draw)


def _row(text: str, good: int) -> Row:
    question = f"Is this review positive or negative?\n{text}"
    return row(question, CHOICES[0] if good else CHOICES[1], choices=CHOICES)


def _texts(split: str, good: bool) -> list[str]:
    said = FRAGMENTS[split]
    ours, theirs = ("good", "bad") if good else ("bad", "good")
    says, denies = said[ours], said["not_" + theirs]
    plain = product(said["openings"], said["things"], said["aspects"], says + denies)
    texts = [f"{opening.format(thing)} {_capital(aspect)} {verb}." for opening, thing, aspect, verb in plain]
    mixed = product(said["things"], said["aspects"], said[theirs] + said["not_" + ours], said["aspects"], says + denies)
    pairs = [(thing, a, verb, b, other) for thing, a, verb, b, other in mixed if a != b]
    verdicts = [verdict[0] if good else verdict[1] for verdict in said["verdicts"]]
    return texts + [
        f"In this {thing} {a} {verb}, but {b} {other}. {verdicts[i % len(verdicts)]}"
        for i, (thing, a, verb, b, other) in enumerate(pairs)
        if i % 7 == 0  # as many mixed reviews as plain ones, not seven times as many
    ]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _shuffled(items: list, draw: random.Random) -> list:
    return draw.sample(items, len(items))
