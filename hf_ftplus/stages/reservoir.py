"""Keep some rows of a finished task for later ones to rehearse: every row with the same chance, in one pass.

    reservoir(rows, 64, seed)            64 of the rows, however many there are (Vitter 1985, algorithm R)
    pool(learn, config, 64, seed)        64 of what a stage trained on, in canonical rows
    write(rows, OUT/pools/NAME.jsonl)    whole or not at all, for nobody else's eyes

Which rows are kept depends on the seed and on the order of the rows alone, so a pool that is lost is drawn again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, concatenate_datasets

from .. import data
from ..config import RunConfig
from ..generate import store
from ..row_checks import said

T = TypeVar("T")


def reservoir(rows: Iterable[T], keep: int, seed: int | list[int]) -> list[T]:
    """`keep` of the rows (all, if there are fewer), in their order; each is kept with probability keep / rows."""
    random = np.random.default_rng(seed)
    kept: list[tuple[int, T]] = []
    for place, row in enumerate(rows):
        if place < keep:
            kept.append((place, row))
        elif (drawn := int(random.integers(place + 1))) < keep:
            kept[drawn] = place, row
    return [row for _, row in sorted(kept, key=lambda item: item[0])]


def pool(
    learn: Any,
    config: RunConfig,
    keep: int,
    seed: int | list[int],
    name: str,
    taken: int = 0,
    measured: Collection[int] = (),
) -> Dataset:
    """`keep` rows of a learn set in canonical columns, whatever it is: a dataset, a stream, or several by task.

    Args:
        learn: what the stage trained on; of several tasks as many rows of each.
        config: of the stage.
        keep: rows.
        seed: of the draw.
        name: of the stage, for errors.
        taken: rows of a stream that training took, which alone are drawn from.
        measured: what rows say (`row_checks.said`) that are left out, where enough others remain.

    Raises:
        DataError: rows in no known format, such as token ids; names the columns found.
    """
    if isinstance(learn, dict):
        sizes = {task: len(rows) - sum(said(row) in measured for row in rows) for task, rows in learn.items()}
        if sum(sizes.values()) < keep:  # then of those that are measured, too
            sizes = {task: len(rows) for task, rows in learn.items()}
        shares = divided(keep, sizes)
        parts = [
            pool(rows, config, shares[task], [*np.atleast_1d(seed), place], f"{name} ({task})", measured=measured)
            for place, (task, rows) in enumerate(learn.items())
            if shares[task]
        ]
        return concatenate_datasets(parts)
    text, whole = config.training.dataset_text_field, isinstance(learn, Dataset)

    def drawn(left_out: Collection[int]) -> list[Any]:
        rows = enumerate(learn if whole else islice(learn, taken))
        free = ((i, row) for i, row in rows if not left_out or said({"text": row.get(text), **row}) not in left_out)
        return reservoir((i if whole else row for i, row in free), keep, seed)

    found = drawn(measured)
    found = found if len(found) == keep or not measured else drawn(())
    kept = learn.select(found) if whole else Dataset.from_list(found)
    if text != "text" and text in kept.column_names:
        kept = kept.select_columns([text]).rename_column(text, "text")
    return data.normalise(kept, name)


def divided(keep: int, sizes: dict[str, int]) -> dict[str, int]:
    """`keep` rows over tasks, as many of each; where one has fewer, the others have its rest."""
    found: dict[str, int] = {}
    for place, task in enumerate(sorted(sizes, key=sizes.get)):
        found[task] = min(sizes[task], (keep - sum(found.values())) // (len(sizes) - place))
    return found


def rows_taken(config: RunConfig, facts: dict[str, Any]) -> int:
    """Rows, unpacked, that a run took in the steps and processes that its report says."""
    training = config.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return facts["steps"] * rows * facts["processes"]


def write(rows: Iterable[Any], path: Path) -> None:
    """JSON lines, without what Arrow filled in."""
    store(path, [there(row) for row in rows])


def there(value: Any) -> Any:
    """Without what is None: Arrow gives every message the fields of all of them."""
    if isinstance(value, dict):
        return {key: there(item) for key, item in value.items() if item is not None}
    return [there(item) for item in value] if isinstance(value, list) else value
