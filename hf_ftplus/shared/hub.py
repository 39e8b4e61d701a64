"""A memory to the Hub and from it: safetensors, JSON and a card, every byte verified."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import jinja2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from .. import disk
from ..errors import StorageError, UsageError
from ..model import DEMO
from . import base as bases
from .base import Base

MANIFEST, CARD = "manifest.json", "README.md"
FILES = (MANIFEST, bases.FILE, CARD, "*.safetensors")
"""All that travels: nothing else is uploaded, and nothing else downloaded."""
OF_RUN = "ftplus/memory"
"""Where a run leaves its memory in its output, and so in what it pushes."""


def push(folder: Path, repo: str, *, base: str | None = None, private: bool = False) -> str:
    """Upload a memory with a card; the address of the repository.

    Args:
        folder: what `make` wrote, or OUTPUT/ftplus/memory of a run.
        base: the name under which others get the model that it is of; what a run left, or is of a folder, needs it.

    Raises:
        UsageError: no folder there; or a model that others know by no name.
        StorageError: a damaged memory, or the Hub refused it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} does not exist; expected what `ftplus memory make`, or a run, left.")
    sizes = verify(folder)
    known = bases.read(folder)
    if base or known:
        refuse_local(base or known.name, folder, typed=bool(base))
    if known is None:
        known = _of_output(folder, base)
    elif base and base != known.name:
        known = replace(known, name=base)
        bases.write(folder, known)
    with disk.attempt(folder / CARD, "another folder"):
        (folder / CARD).write_text(card(known, repo, sizes), encoding="utf-8")
    with said_of(repo):
        api = HfApi(library_name="hf_ftplus")
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(FILES), commit_message="Memory for EWC")
    return f"https://huggingface.co/{name}"


def refuse_local(name: str, folder: Path, typed: bool) -> None:
    """Refuse to publish a memory of a model that nobody else can get by its name. One that is `typed` may be that of a
    folder, too.

    Raises:
        UsageError: says what to type.
    """
    try:
        validate_repo_id(name.partition("@")[0])
        local = name == DEMO or (not typed and Path(name).expanduser().exists())
    except HFValidationError:
        local = True
    if local:
        raise UsageError(
            f"{name!r} is no name by which others get the model of {folder}. Type --base OWNER/NAME: the name on the "
            "Hub of the same weights."
        )


def _of_output(folder: Path, name: str | None) -> Base:
    """The base of what a run left: the model that it saved two folders above."""
    if name is None:
        raise UsageError(
            f"{folder} does not say which model it is of, as a run left it. Type --base OWNER/NAME: the name on the "
            "Hub of the model that the run saved."
        )
    whole = folder.resolve()
    out = whole.parents[1] if whole.as_posix().endswith(OF_RUN) else None
    known = bases.of_run(name, out) if out else bases.look(name)
    bases.write(folder, known)
    return known


def pull(repo: str, folder: Path, *, revision: str | None = None) -> Base:
    """Download a memory and verify every byte; the model that it is of.

    A model that was pushed with its memory under ftplus/memory is its base; of that only the memory is downloaded.

    Raises:
        StorageError: no such repository, no memory in it, or a damaged one; or `folder` holds something, or cannot be
            made. Nothing is left behind.
    """
    disk.refuse_full(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with said_of(repo):
            inside = "" if HfApi().file_exists(repo, MANIFEST, revision=revision) else f"{OF_RUN}/"
            wanted = [f"{inside}{name}" for name in FILES]
            snapshot_download(repo, revision=revision, local_dir=scratch, allow_patterns=wanted)
        found = scratch / inside
        if not (found / MANIFEST).is_file():
            raise StorageError(f"{repo} holds no memory: neither {MANIFEST} nor {OF_RUN}/{MANIFEST}.")
        verify(found)
        shutil.rmtree(found / ".cache", ignore_errors=True)
        base = bases.read(found)
        if base is None:
            base = Base(repo, None, version=metadata.version("hf-ftplus"))
            bases.write(found, base)
        found.chmod(0o755)
        found.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return base


def verify(folder: Path) -> dict[str, int]:
    """The bytes of each strategy's memory in `folder`, all of them read and compared with the manifest.

    Raises:
        StorageError: no memory there, or a damaged one.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise StorageError(f"{folder} holds no {MANIFEST}; expected what `ftplus memory make`, or a run, left there.")
    try:
        entries = disk.read_json(file)["files"]
        named = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(f"{file} is damaged; expected what `ftplus memory` writes. Get it again.") from None
    for name, (_, digest) in named.items():
        path = folder / f"{name}.safetensors"
        if not re.fullmatch(r"[\w-]+", name) or not path.is_file() or disk.sha256(path) != digest:
            raise StorageError(f"{path} is missing or not what was written there (sha256 differs). Get it again.")
    return {name: size for name, (size, _) in named.items()}


@contextmanager
def said_of(repo: str, then: str = "") -> Iterator[None]:
    """What the Hub answers, in one sentence and the code of the error; `then` says what is left to do.

    Raises:
        UsageError: no such name can be.
        StorageError: everything else.
    """
    try:
        yield
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no name on the Hub; expected OWNER/NAME.{then}") from error
    except OfflineModeIsEnabled as error:
        raise StorageError(f"HF_HUB_OFFLINE is set, so the Hub cannot be asked. Unset it.{then}") from error
    except HfHubHTTPError as error:
        raise StorageError(refusal(repo, error) + then) from error
    except OSError as error:  # no network, no space
        raise StorageError(f"{repo}: {' '.join(str(error).split())} Look after network and disk.{then}") from error
    except ValueError as error:  # of a card whose head the Hub does not take
        raise StorageError(f"The Hub refused {repo}: {' '.join(str(error).split())}{then}") from error


def refusal(repo: str, error: HfHubHTTPError) -> str:
    """What a refusal of the Hub means, and what to try."""
    code = getattr(error.response, "status_code", "no code")
    if code == 400:
        return f"The Hub refused {repo} ({type(error).__name__}, 400): {' '.join(str(error.server_message).split())}"
    unknown = code in (401, 403, 404)
    hint = "Look whether the name is right, and type `hf auth login`." if unknown else "Try again in a while."
    return f"The Hub refused {repo} ({type(error).__name__}, {code}). {hint}"


def of_push(error: Exception) -> bool:
    """Whether an error is the Hub's answer to a new repository."""
    return isinstance(error, HfHubHTTPError) and "/api/repos/" in str(getattr(error.response, "url", ""))


def card(base: Base, repo: str, sizes: dict[str, int]) -> str:
    """The card of a memory, in Markdown."""
    file = Path(__file__).with_name("card.md.jinja")
    place = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    template = place.from_string(file.read_text(encoding="utf-8"))
    return template.render(base=base, repo=repo, sizes=sizes, megabytes=sum(sizes.values()) / 1e6)
