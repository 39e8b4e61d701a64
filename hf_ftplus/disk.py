"""Write a file whole or not at all; read JSON as it was written; keep a folder for one run at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import IncompatibleError, StorageError

logger = logging.getLogger("hf_ftplus")

MOST = 64 * 2**20
"""Bytes of a manifest; that of a model with a million weights is smaller."""
BLOCK = 2**22
"""Bytes read at a time."""
LOCK = "_ftplus.lock"
_held: set[Path] = set()
"""Folders that this process has locked."""


def replace(path: Path, write: Callable[[Path], Any], private: bool = False) -> None:
    """`write(file)` beside `path`, then move it into place: whoever reads `path` never sees half of it.

    A `private` file, which holds text of a user's, is for that user alone to read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        if private:
            temporary.touch(mode=0o600)
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, text: str, private: bool = False) -> None:
    """Text, whole or not at all; see `replace`."""
    replace(path, lambda file: file.write_text(text, encoding="utf-8"), private)


@contextmanager
def attempt(what: object, instead: str = "another") -> Iterator[None]:
    """Where the disk refuses to write `what`, say so in a sentence, and to choose something else.

    Raises:
        StorageError: it was refused.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"{what} cannot be written: {error.strerror or error}. Choose {instead}.") from error


def writable(folder: Path, flag: str) -> Path:
    """The folder that was typed after `flag`, tried before anything is loaded; it is not made yet.

    Raises:
        StorageError: nothing can be written there.
    """
    with attempt(f"{flag} {folder}", "another folder"):
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        os.rmdir(tempfile.mkdtemp(dir=there, prefix=".ftplus-"))
    return folder


def refuse_full(folder: Path) -> None:
    """Raise StorageError for an --out that holds something, or cannot be made."""
    if folder.is_dir() and any(folder.iterdir()):
        raise StorageError(f"--out {folder} is not an empty folder. Choose another.")
    writable(folder, "--out")


def flush(path: Path) -> None:
    """What was written to a file, or the names in a folder, out of the system's memory and onto the disk.

    Some file systems (shared folders of virtual machines, old network ones) know no such thing for a folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Of all bytes of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def read_json(path: Path) -> Any:
    """What a file of strict JSON holds.

    Raises:
        OSError: it cannot be read.
        ValueError: not JSON, or with NaN or Infinity, which nothing here writes and no figure may be; or nested deeper
            than Python reads.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_manifest(path: Path) -> dict[str, Any]:
    """A mapping that this package wrote, of a size that it would write.

    Raises:
        OSError: it cannot be read.
        ValueError: anything else than such a mapping.
    """
    size = path.stat().st_size
    if size > MOST:
        raise ValueError(f"it has {size:,} bytes; expected at most {MOST:,}")
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}; expected a mapping")
    return found


def read_format(path: Path, now: int, steps: dict[int, Callable[[dict], dict]]) -> dict[str, Any]:
    """A manifest, one of an older format as it would be written `now`; the file stays as it is.

    Args:
        path: of the manifest.
        now: the format that is read today.
        steps: format -> what makes a manifest of the next one of it.

    Raises:
        OSError: it cannot be read.
        ValueError: no manifest, or of a format that no step leads on from.
        IncompatibleError: a newer version wrote it.
    """
    manifest = read_manifest(path)
    found = manifest.get("format")
    if type(found) is int and found > now:
        raise IncompatibleError(f"{path} has format {found}; this hf_ftplus reads format {now}. Upgrade hf-ftplus.")
    while type(found) is int and found in steps and found < now:
        found, manifest = found + 1, {**steps[found](manifest), "format": found + 1}
    if type(found) is not int or found != now:
        raise ValueError(f"it has format {found!r}; expected {now}")
    return manifest


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number that JSON knows")


@contextmanager
def locked(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Nobody else writes to `folder` meanwhile; it is made if need be. The system lets go of it when a process dies.

    Where this process has it already, it keeps it. Where the file system knows no locks (some network ones), a warning
    says so. `flag` is what the user calls it.

    Raises:
        StorageError: another run has it, which is named; or it cannot be made or written.
    """
    if (mine := folder.resolve()) in _held:
        yield
        return
    existed, path = os.path.exists(folder), folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _take(path)
    except BlockingIOError:
        raise StorageError(
            f"{folder} is in use by another run ({_holder(path)}). Wait for it, stop it, or choose another {flag}."
        ) from None
    except OSError as error:
        reason = "it is a file" if os.path.isfile(folder) else error.strerror
        raise StorageError(f"{flag} {folder} cannot be written: {reason}. Choose another.") from None
    _held.add(mine)
    try:
        yield
    finally:
        _held.remove(mine)
        with suppress(OSError):
            path.unlink()
        os.close(handle)
        if not existed:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _take(path: Path) -> int:
    """An open file that is locked and stands at `path`.

    Raises:
        BlockingIOError: another process holds it.
    """
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(handle), path.stat()):  # its holder took it away in between
                raise FileNotFoundError
        except FileNotFoundError:
            os.close(handle)
            continue
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(handle)
                raise
            logger.warning("%s: no locks on this file system; nothing keeps two runs apart.", path.parent)
        os.ftruncate(handle, 0)
        os.write(handle, f"pid {os.getpid()} on {platform.node()} since {time.ctime()}".encode())
        return handle


def _holder(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")[:200] or "not named"
    return "not named"
