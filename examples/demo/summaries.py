"""Notes of everyday events to sum up in one line: who did what, where, and how it ended; the rest is decoration."""

from __future__ import annotations

import random
from itertools import product

from rows import Row, row

FRAGMENTS = {
    "train": {
        "who": ("The choir", "Our neighbour", "The football team", "A young baker", "The school", "The fire brigade"),
        "did": (
            "opened a garden", "held a concert", "started a library",
            "repaired the bridge", "organised a race", "painted a wall",
        ),
        "where": ("in the old harbour", "behind the station", "on the market square", "beside the river"),
        "decoration": (
            "The weather was mild and a light wind came from the west.", "Preparations had taken eleven weeks.",
            "A reporter took notes and drank three cups of coffee.", "Parking was difficult for most of the day.",
            "Somebody had brought a large umbrella, just in case.",
        ),
        "end": (
            ("More than two hundred people came.", "it drew a crowd"), ("Hardly anybody came.", "few people came"),
            ("It had to stop early because of a power cut.", "a power cut ended it early"),
            ("The mayor thanked everyone who had helped.", "the mayor gave thanks"),
        ),
    },
    "test": {
        "who": ("The chess club", "A retired nurse", "The students", "The orchestra"),
        "did": (
            "built a playground", "showed a film",
            "planted an orchard", "ran a repair workshop",
        ),
        "where": ("near the lighthouse", "under the viaduct", "in the town hall"),
        "decoration": (
            "Two dogs slept through all of it.", "The posters had been printed in green.",
            "Sandwiches were handed round at noon.", "It was the first Saturday of the month.",
        ),
        "end": (
            ("Visitors stayed until midnight.", "visitors stayed late"), ("Rain sent everybody home.", "rain ended it"),
            ("The local paper gave it a full page.", "the local paper praised it"),
        ),
    },
}  # fmt: skip


def summaries(split: str, count: int, seed: int = 0) -> list[Row]:
    """`count` different notes of one split, `train` or `test`, each with its one-line summary."""
    draw = random.Random(f"{split}-{seed}")
    said = FRAGMENTS[split]
    events = list(product(said["who"], said["did"], said["where"], said["end"]))
    if count > len(events):
        raise ValueError(f"Found {len(events)} different {split} notes; expected at least {count}. Ask for fewer.")
    return [_row(*event, draw.sample(said["decoration"], 2)) for event in draw.sample(events, count)]


def _row(who: str, did: str, where: str, end: tuple[str, str], decoration: list[str]) -> Row:
    first, second = decoration
    note = f"{who} {did} {where}. {first} {second} {end[0]}"
    return row(f"Sum up this note in one line:\n{note}", f"{who} {did} {where}; {end[1]}.")
