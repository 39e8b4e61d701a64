"""Which checkpoints are whole: each gets a commit, written last, and is compared with it before it is believed.

    checkpoint-N/                        weights, optimizer, scheduler, generators, trainer_state.json   by the Trainer
    checkpoint-N/ftplus/                 strategies and their manifest                                    by state.py
    checkpoint-N/ftplus/commit.json      size and sha256 of every file above, and which run they are of   last of all
    checkpoint-N/ftplus/writing          there until then: without either, another program wrote the folder

Older checkpoints are deleted only when the commit of the new one is on the disk, so whatever kills a run leaves one
that can be resumed. `save_total_limit` is taken at its word and counts whole ones alone: two would outlive a disk that
spoils one, but who asks for 1 has room for 1, and what transformers keeps is what is expected. Resuming with `true`
takes the newest that is whole; what is not is set aside under a name that no Trainer reads
or pushes (`_incomplete-checkpoint-N`), and said. What another program wrote is never deleted: written again, it stands
as `_replaced-checkpoint-N`, and once more as `_foreign-TIME-checkpoint-N`. Whoever names a checkpoint gets that
one or an error. Links are never followed. What a power failure leaves was never tried: everything is flushed, in this
order.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from .disk import flush, read_format, read_manifest, replace, sha256
from .errors import FTPlusError, IncompatibleError, StorageError
from .weights import ranks

logger = logging.getLogger("hf_ftplus")

FORMAT = 1
MIGRATIONS: dict[int, Callable[[dict], dict]] = {}
"""Format -> what makes a commit of the next one of it. There is one so far."""
COMMIT = "ftplus/commit.json"
WRITING = "ftplus/writing"
INCOMPLETE, DAMAGED, REPLACED, DELETED, FOREIGN = "_incomplete-", "_damaged-", "_replaced-", "_deleted-", "_foreign-"
"""Begin the names of what no Trainer reads, nor pushes to the Hub."""
UNFINISHED = "it was being written when the run ended"
SAFE_TORCH = "2.10"
"""First whose torch.load(weights_only=True), by which the Trainer reads optimizer and generators, has no known hole."""
_seen_whole: dict[Path, tuple] = {}
"""Checkpoints that this process found whole, with sizes and times of their files: none is read twice for nothing."""


# ---- writing ---------------------------------------------------------------------------------------------------------


def commit(checkpoint: Path, step: int, resumable: bool, facts: dict[str, Any]) -> None:
    """Put every file of a checkpoint on the disk, then the list of them with their sums.

    Args:
        checkpoint: the folder; nothing is written to it afterwards.
        step: of the trainer.
        resumable: whether it has more than weights.
        facts: which run it is of (see `origin.py`).

    Raises:
        OSError: the disk failed.
    """
    if (checkpoint / COMMIT).is_file():
        return  # `writing` takes an old one away
    files = sorted(_files(checkpoint))
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        sums = list(pool.map(_flushed_sum, files))
    for folder in {file.parent for file in files}:
        flush(folder)
    found = {
        file.relative_to(checkpoint).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, sums, strict=True)
    }
    said = json.loads(json.dumps({"step": step, "resumable": resumable, "run": facts, "files": found}))
    text = json.dumps({"format": FORMAT, **said, "sha256": _sum(said)}, indent=1)
    replace(checkpoint / COMMIT, lambda file: (file.write_text(text, encoding="utf-8"), flush(file)))
    flush((checkpoint / COMMIT).parent)
    flush(checkpoint.parent)
    (checkpoint / WRITING).unlink(missing_ok=True)


def rotate(checkpoint: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest whole checkpoints but `limit`; neither the one just committed nor the best one, if any."""
    kept = {checkpoint.resolve(), Path(best or checkpoint).resolve()}
    whole = sorted(filter(_looks_whole, filter(_numbered, checkpoint.parent.glob("checkpoint-*"))), key=_step)
    spare = len(whole) - max(limit, len(kept)) if limit and limit > 0 else 0
    for old in [path for path in whole if path.resolve() not in kept][: max(spare, 0)]:
        with suppress(OSError):
            _delete(old)
    _clear(checkpoint.parent)


def _delete(checkpoint: Path) -> None:
    """Take it away at once, under a name that `_clear` looks for: killed halfway, none is left in part, nor without the
    mark that tells it from another program's."""
    gone = checkpoint.with_name(f"{DELETED}checkpoint-{checkpoint.name.rpartition('-')[2]}")
    if gone.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
    os.replace(checkpoint, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _clear(output: Path) -> None:
    for gone in output.glob(f"{DELETED}checkpoint-*"):
        shutil.rmtree(gone, ignore_errors=True)


def _sum(said: dict[str, Any]) -> str:
    """Of what a commit says, itself apart: a disk spoils this file as easily as those that it lists."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _looks_whole(checkpoint: Path) -> bool:
    """Whether it has a commit, and all files in their sizes; sums are compared when one is resumed."""
    try:
        found = read_commit(checkpoint)
        return bool(found) and not _missing(checkpoint, found)
    except (FTPlusError, OSError):
        return False


@contextmanager
def writing(checkpoint: Path) -> Iterator[None]:
    """While a checkpoint is written. One that the disk has no room for is taken away again.

    Raises:
        StorageError: the disk failed; says which checkpoint is the last whole one.
    """
    begun = False
    try:
        on_first_rank(lambda: _begin(checkpoint))
        begun = True
        yield
    except (OSError, RuntimeError, SafetensorError, StorageError) as error:
        if not of_the_disk(error):
            raise
        left, whole = None, begun and (checkpoint / COMMIT).is_file()
        if ranks()[0] == 0:
            if begun and not whole:  # else what stands there is an earlier one
                shutil.rmtree(checkpoint, ignore_errors=True)
            left = newest(checkpoint.parent)
        if whole:
            raise StorageError(
                f"{checkpoint.name} is whole, but what followed failed: {error}. "
                "Go on with --resume_from_checkpoint true."
            ) from error
        raise StorageError(
            f"{checkpoint.name} could not be written: {error}. "
            + (f"{left} is the last whole one. " if left else "There is no earlier one. ")
            + "Free some space, then go on with --resume_from_checkpoint "
            + ("true." if left else "auto.")
        ) from error
    if ranks()[0] == 0 and (_replaced(checkpoint) / COMMIT).is_file():  # not what another program wrote
        shutil.rmtree(_replaced(checkpoint), ignore_errors=True)


def _replaced(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{REPLACED}{checkpoint.name}")


def _begin(checkpoint: Path) -> None:
    """Say that it is being written; what stands there already, unless it never was whole, is kept until it is."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    elif (checkpoint / WRITING).is_file() and not (checkpoint / COMMIT).is_file():
        _delete(checkpoint)
    elif checkpoint.is_dir():
        earlier = _replaced(checkpoint)
        if earlier.is_dir() and not (earlier / COMMIT).is_file():  # another program's stays
            os.replace(earlier, earlier.with_name(f"{FOREIGN}{time.time_ns()}-{checkpoint.name}"))
        shutil.rmtree(earlier, ignore_errors=True)
        if not (checkpoint / COMMIT).is_file():
            logger.warning("%s is of another program, and is written again: it is now %s.", checkpoint, earlier.name)
        os.replace(checkpoint, earlier)
    (checkpoint / WRITING).parent.mkdir(parents=True, exist_ok=True)
    (checkpoint / WRITING).touch()


def _put_back(output: Path) -> None:
    """What was to be written again, and never was to its end, stands where it stood."""
    for earlier in output.glob(f"{REPLACED}checkpoint-*"):
        checkpoint = earlier.with_name(earlier.name.removeprefix(REPLACED))
        if not (checkpoint / COMMIT).is_file():
            if checkpoint.is_dir():
                _set_aside(checkpoint, UNFINISHED)
            os.replace(earlier, checkpoint)
        elif (earlier / COMMIT).is_file():
            shutil.rmtree(earlier, ignore_errors=True)


def of_the_disk(error: Exception) -> bool:
    """Whether it is the disk that failed. torch and safetensors have errors of their own for it, without a number."""
    if isinstance(error, StorageError):
        return True
    if isinstance(error, OSError):
        return error.errno is not None
    said = str(error)
    return isinstance(error, SafetensorError) or "PytorchStreamWriter" in said or "unexpected pos" in said


def _files(checkpoint: Path) -> Iterator[Path]:
    for path in checkpoint.rglob("*"):
        ours = path in (checkpoint / COMMIT, checkpoint / WRITING) or path.name.startswith(".commit.json.")
        if path.is_file() and not ours:
            yield path


def _flushed_sum(path: Path) -> str:
    flush(path)
    return sha256(path)


# ---- reading ---------------------------------------------------------------------------------------------------------


def newest(output: Path, aside: bool = True) -> Path | None:
    """The newest whole checkpoint of a run; None where there is none.

    Args:
        output: the folder of the run.
        aside: whether to set aside the broken ones that are newer, or only to look.

    Raises:
        IncompatibleError: a newer version wrote one of them.
    """
    if aside:
        _clear(output)
        _put_back(output)
    found = {_step(path): path for path in output.glob("checkpoint-*") if _numbered(path)}
    for step in sorted(found, reverse=True):
        why = fault(found[step])
        if not why:
            return found[step]
        if aside:
            _set_aside(found[step], why)
    return None


def fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, as half a sentence; empty if nothing is."""
    file = checkpoint / COMMIT
    if not file.is_file():
        return UNFINISHED if (checkpoint / WRITING).is_file() else _fault_of_uncommitted(checkpoint)
    try:
        if _seen_whole.get(file) == (stamp := _stamp(checkpoint)):
            return ""
        why = _fault_of_committed(checkpoint, read_commit(checkpoint))
    except (OSError, StorageError) as error:
        return str(error)
    if not why:
        _seen_whole[file] = stamp
    return why


def _stamp(checkpoint: Path) -> tuple:
    found = ((path, path.stat()) for path in sorted(checkpoint.rglob("*")))
    return tuple((path.name, stat.st_size, stat.st_mtime_ns) for path, stat in found)


def read_commit(checkpoint: Path) -> dict[str, Any]:
    """The commit of a checkpoint; empty if it has none.

    Raises:
        StorageError: it is damaged.
        IncompatibleError: a newer version wrote it.
    """
    path = checkpoint / COMMIT
    if not path.is_file():
        return {}
    try:
        written = read_manifest(path)
        found = read_format(path, FORMAT, MIGRATIONS)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is damaged: {error}. Use an earlier checkpoint.") from None
    files, expected = found.get("files"), written.pop("sha256", None)
    sound = (
        expected == _sum({key: value for key, value in written.items() if key != "format"})
        and type(found.get("step")) is int
        and isinstance(found.get("run"), dict)
        and isinstance(files, dict)
        and all(isinstance(entry, dict) and _inside(name) for name, entry in files.items())
    )
    if not sound:
        raise StorageError(f"{path} is damaged: not what a commit holds. Use an earlier checkpoint.")
    return found


def _inside(name: str) -> bool:
    return not os.path.isabs(name) and ".." not in Path(name).parts and "\0" not in name


def _missing(checkpoint: Path, found: dict[str, Any]) -> str:
    for name, entry in found["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("bytes"):
            return f"{name} has {path.stat().st_size:,} bytes; {entry.get('bytes')} were written"
    return ""


def _fault_of_committed(checkpoint: Path, found: dict[str, Any]) -> str:
    if why := _missing(checkpoint, found):
        return why
    names = list(found["files"])
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(names, pool.map(lambda name: sha256(checkpoint / name), names), strict=True):
            if digest != found["files"][name].get("sha256"):
                return f"{name} is not what was written there (sha256 differs)"
    if _numbered(checkpoint) and found["step"] != _step(checkpoint):
        return f"it holds step {found['step']}"
    return ""


def _fault_of_uncommitted(checkpoint: Path) -> str:
    """Of a folder that `trl sft`, a callback or an older version wrote: a Trainer writes its state last."""
    try:
        state = read_manifest(checkpoint / TRAINER_STATE_NAME)
        int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{TRAINER_STATE_NAME}, which is written last, is missing or damaged"
    weights = list(checkpoint.glob("*.safetensors"))
    for file in weights:
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{file.name} is damaged: {error}"
    if not weights and not any(any(checkpoint.glob(name)) for name in ("*model*", "global_step*")):  # DeepSpeed's
        return "it holds no weights"
    return ""


def lacks(checkpoint: Path) -> str:
    """Which part of what a run goes on from is missing, without which a Trainer would begin it anew in silence."""
    parts = {
        "the optimizer": (f"{Path(OPTIMIZER_NAME).stem}*", "global_step*", "rank*optimizer*"),
        "the learning-rate schedule": (SCHEDULER_NAME, "global_step*"),
        "the random generators": ("rng_state*",),
    }
    missing = [part for part, names in parts.items() if not any(any(checkpoint.glob(name)) for name in names)]
    return " and ".join(missing)


def refuse_broken(checkpoint: Path) -> None:
    """Raise for a checkpoint that was asked for by name and is not whole, or cannot be gone on from.

    Raises:
        StorageError: says what is wrong with it.
        IncompatibleError: it holds weights alone.
    """
    if why := fault(checkpoint):
        raise StorageError(
            f"{checkpoint} cannot be resumed: {why}. Name an earlier checkpoint, or type --resume_from_checkpoint true "
            "for the newest whole one."
        )
    if Version(torch.__version__) < Version(SAFE_TORCH):
        logger.warning(
            "torch %s may run code that a checkpoint of somebody else's brings (CVE-2026-24747); go on with your own "
            "only, or type: pip install 'torch>=%s'",
            torch.__version__,
            SAFE_TORCH,
        )
    if why := lacks(checkpoint):
        raise IncompatibleError(
            f"{checkpoint} lacks {why} (save_only_model, or deleted), so the run would not go on where it stopped. "
            f"Name another checkpoint; or start a new run from its weights: --model_name_or_path {checkpoint}"
        )


def _numbered(path: Path) -> bool:
    return bool(re.fullmatch(r"checkpoint-\d+", path.name)) and path.is_dir() and not path.is_symlink()


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _set_aside(checkpoint: Path, why: str) -> None:
    """Rename a broken checkpoint; of those of ours that were never finished only the last is kept."""
    was_whole = (checkpoint / COMMIT).is_file()
    aside = checkpoint.with_name(f"{DAMAGED if was_whole else INCOMPLETE}{checkpoint.name}")
    for old in {aside, *checkpoint.parent.glob(f"{INCOMPLETE}checkpoint-*")}:
        ours = any((old / mark).is_file() for mark in (COMMIT, WRITING))
        if ours or not any(path.is_file() for path in old.rglob("*")):  # empty where it was killed before its mark
            with suppress(OSError):
                _delete(old)
    try:
        if aside.is_dir():
            os.replace(aside, aside.with_name(f"{FOREIGN}{time.time_ns()}-{checkpoint.name}"))
        os.replace(checkpoint, aside)
        now = f"It is now {aside.name}."
    except OSError as error:
        now = f"It stays, for it cannot be renamed ({error.strerror})."
    logger.warning("%s is not whole: %s. %s", checkpoint, why.rstrip("."), now)


# ---- several processes -----------------------------------------------------------------------------------------------


def on_first_rank(call: Callable[[], Any]) -> Any:
    """What `call` returns on the first process, on all of them; where it raises an error of ours, all raise it."""
    rank, world = ranks()
    if world == 1:
        return call()
    found: list[Any] = [None, None]
    if rank == 0:
        try:
            found[0] = call()
        except (FTPlusError, OSError) as error:
            found[1] = (type(error) if isinstance(error, FTPlusError) else StorageError, str(error))
    torch.distributed.broadcast_object_list(found)
    if found[1]:
        raise found[1][0](found[1][1])
    return found[0]
