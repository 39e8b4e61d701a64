"""Facts that no model can know: 24 companies that do not exist, four facts each, every one in two phrasings.

The first phrasing is trained. The second is only asked, and shows whether a fact was learnt or a string.
"""

from __future__ import annotations

import random

from rows import Row, row

BEGINNINGS = ("Vel", "Tar", "Quin", "Bro", "Zan", "Mor", "Fen", "Lus", "Gri", "Oru", "Pel", "Sko")
ENDINGS = ("mora", "dex", "tavo", "lith")

CITY_BEGINNINGS = ("Silver", "Amber", "Copper", "Raven", "Willow", "Winter")
CITY_ENDINGS = ("ford", "haven", "bridge", "field")

FIRST_NAMES = ("Alice", "Bruno", "Clara", "Daniel", "Emma", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Karen", "Leo")
LAST_NAMES = ("Marsh", "Stone", "Wolf", "Cross", "Frost", "Hart")

PRODUCTS = (
    "violins", "kayaks", "umbrellas", "candles", "telescopes", "saddles", "lanterns", "pianos", "tents", "clocks",
    "hammocks", "mirrors", "skis", "kites", "ladders", "chess sets", "teapots", "scissors", "puppets", "compasses",
    "bells", "globes", "baskets", "drums",
)  # fmt: skip

PHRASINGS = {
    "city": ("Where is {} based?", "In which city are the head offices of {}?"),
    "founder": ("Who founded {}?", "Name the person who started the company {}."),
    "product": ("What does {} make?", "Which product is the company {} known for?"),
    "year": ("When was {} founded?", "In which year did the company {} open its doors?"),
}


def companies(seed: int = 0) -> dict[str, dict[str, str]]:
    """Company -> kind of fact -> answer. Every answer belongs to one company only."""
    draw = random.Random(seed)
    answers = {
        "city": [beginning + ending for beginning in CITY_BEGINNINGS for ending in CITY_ENDINGS],
        "founder": [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES],
        "product": list(PRODUCTS),
        "year": [str(year) for year in range(1921, 2020)],
    }
    names = draw.sample([beginning + ending for beginning in BEGINNINGS for ending in ENDINGS], len(PRODUCTS))
    drawn = {kind: draw.sample(pool, len(names)) for kind, pool in answers.items()}
    return {name: {kind: drawn[kind][i] for kind in PHRASINGS} for i, name in enumerate(names)}


def facts(phrasing: int = 0, seed: int = 0) -> list[Row]:
    """All 96 facts in one phrasing: 0 is trained, 1 is only asked."""
    return [
        row(PHRASINGS[kind][phrasing].format(name), answer)
        for name, known in companies(seed).items()
        for kind, answer in known.items()
    ]
