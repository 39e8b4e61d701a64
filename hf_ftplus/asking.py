"""Ask a teacher everything before training, and keep its answers (`answers.py`)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from .answers import FORMAT, Answers
from .divergence import likeliest
from .errors import IncompatibleError
from .fingerprint import architecture, fingerprint_of
from .strategy import Run
from .teacher import Teacher, content
from .weights import ranks, sharded

Batches = Sequence[dict[str, Tensor]]


def ask_all(
    answers: Answers, teacher: Teacher | None, sources: list[Batches], run: Run, top_k: int, temperature: float
) -> None:
    """Have an answer to every example of every batch of `sources`; ranks share the work.

    Raises:
        IncompatibleError: answers are missing, and the teacher is gone or other ranks keep theirs elsewhere.
    """
    places = [(source, index) for source in sources for index in range(len(source))]
    looked, (rank, world) = range(len(places)), ranks()
    if teacher is not None:
        found = [_lacking(answers, places, looked) if rank == 0 else None]
        if world > 1:
            dist.broadcast_object_list(found)  # one look for all: a later one sees what another rank has written
        wanted = found[0]
        if wanted:
            for number in tqdm(_mine(wanted, run), desc="asking the teacher", disable=None, leave=False):
                source, index = places[number]
                batch = source[index]
                answers.add(batch, *ask(teacher, batch, run, top_k, temperature))
            answers.write()
            if world > 1:
                dist.barrier()
            answers.refresh()
        looked = wanted if rank == 0 else looked  # others may keep theirs elsewhere
    missing = len(_lacking(answers, places, looked))
    if missing:
        raise IncompatibleError(
            f"{answers.folder} lacks the teacher's answers to {missing} of {len(places)} micro-batches, and the "
            "teacher is not here to be asked again. All processes must see the same folder, and a resumed run the one "
            "it began with: set FTPLUS_CACHE, or start a new run."
        )


def _lacking(answers: Answers, places: list[tuple[Batches, int]], numbers: Iterable[int]) -> list[int]:
    """Those of the micro-batches at `places` that have no answers yet."""
    return [number for number in numbers if answers.lacks(places[number][0][places[number][1]])]


def _mine(wanted: list[int], run: Run) -> list[int]:
    """This rank's batches, by number; of a sharded model every rank takes part in every pass."""
    rank, world = ranks()
    mine = wanted[rank::world]
    return [*mine, wanted[0]] if sharded(run.model.parameters()) and len(mine) < -(-len(wanted) // world) else mine


def ask(teacher: Teacher, batch: dict[str, Tensor], run: Run, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The answers to one micro-batch, as `likeliest` gives them."""
    with run.autocast():
        return likeliest(*teacher(batch), top_k, temperature=temperature)


def seconds_to_ask(teacher: Teacher, batches: Batches, run: Run, top_k: int, temperature: float) -> float:
    """Extrapolated from the first micro-batch, over all ranks."""
    if not batches:
        return 0.0
    begin = time.perf_counter()
    ask(teacher, batches[0], run, top_k, temperature)[0].cpu()  # waits for the device
    return (time.perf_counter() - begin) * -(-len(batches) // ranks()[1])


def key_of_answers(teacher: Teacher, run: Run, top_k: int, temperature: float) -> str:
    """Name of a folder of answers: the teacher's content, its precision, and what is kept."""
    kind = run.device.type
    with run.autocast():
        precision = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "as loaded"
    with teacher.taking_the_chair():
        built = architecture(teacher.model)
    known = [fingerprint_of(content(teacher)), built]
    parts = [FORMAT, *known, precision, top_k, temperature, teacher.vocabulary]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
