"""Which model a memory is of: its name, and a hash of the content of its weights."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import disk
from ..errors import IncompatibleError, StorageError
from ..model import resolve
from ..trained import at

FILE = "base.json"
INDEX = "model.safetensors.index.json"
CHUNK = 2**24
"""Bytes read at a time."""


@dataclass(frozen=True)
class Base:
    """The model that a memory is of."""

    name: str
    """How others get it: a name on the Hub."""
    sha256: str | None
    """Of its weights by name, dtype, shape and bytes; None where it has no safetensors."""
    dtypes: tuple[str, ...] = ()
    """Of its weights as they are stored."""
    form: str = ""
    """`full` or `lora`; empty for what a run left."""
    protect: tuple[str, ...] = ()
    """What it protects, in words: `chat=self:64, 64 rows`."""
    version: str = ""
    """Of hf-ftplus."""

    def command(self, memory: str, strategies: Iterable[str]) -> str:
        """What to type to train with the memory that lies in `memory`."""
        words = ["ftplus", "sft", *(word for name in strategies for word in ("--plugin", name)), "--memory", memory]
        words += ["--model_name_or_path", "".join(c for c in self.name if c.isprintable())]
        words += [*(["--use_peft"] if self.form == "lora" else []), "--max_grad_norm", "0"]
        return shlex.join([*words, "--dataset_name", "YOUR_DATA"])


def look(name: str, where: str | None = None, **facts: Any) -> Base:
    """The base that others call `name`, hashed here, or `where` its files are."""
    digest, dtypes = content_hash(where or name) or (None, ())
    return Base(name, digest, dtypes, **facts, version=metadata.version("hf-ftplus"))


def of_run(name: str, out: Path) -> Base:
    """The base of what a run left in `out`, which others call `name`."""
    return look(name, str(out), form="lora" if (out / "adapter_config.json").is_file() else "")


def write(folder: Path, base: Base) -> None:
    """Put base.json into `folder`.

    Raises:
        StorageError: it cannot be written.
    """
    text = json.dumps(asdict(base), indent=1)
    with disk.attempt(folder / FILE, "another folder"):
        disk.write(folder / FILE, text)


def read(folder: Path) -> Base | None:
    """What a memory says about its model; None where it says nothing.

    Raises:
        StorageError: base.json is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        given = disk.read_json(file)
        given |= {key: tuple(map(str, given[key])) for key in ("dtypes", "protect")}
        base = Base(**given)
        if not all(isinstance(text, str) for text in (base.name, base.form, base.version, base.sha256 or "")):
            raise TypeError(given)
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{file} is damaged; expected what `ftplus memory` writes. Get it again.") from None
    return base


def check(folder: Path, model: str) -> None:
    """Refuse a model whose weights are not those that a memory was made on, before any of them is loaded.

    A model that is stored in another precision is left to the comparison of loaded weights (`sketch.py`), and so are
    memories that say nothing about their base: those that a run left.

    Raises:
        IncompatibleError: other weights; names both models.
    """
    base = read(folder)
    if base is None or base.sha256 is None:
        return
    digest, dtypes = content_hash(model) or (None, ())
    if digest is None or dtypes != base.dtypes or digest == base.sha256:
        return
    raise IncompatibleError(
        f"The memory in {folder} was made on {base.name} (sha256 {base.sha256[:12]}); {model} has other weights "
        f"(sha256 {digest[:12]}). Start from that model: --model_name_or_path {base.name}. Or make a memory of yours: "
        f"ftplus memory make --model {model} --protect DATA --out DIR"
    )


def check_form(folder: Path, adapter: bool) -> None:
    """Refuse a memory that was made for adapters alone where all weights are trained.

    Raises:
        IncompatibleError: says how to go on.
    """
    base = read(folder)
    if base is not None and base.form == "lora" and not adapter:
        raise IncompatibleError(
            f"The memory in {folder} was made for adapters alone (--for lora), and this run trains all weights. Type "
            "--use_peft as well. Or make one for all weights: ftplus memory make --for full"
        )


def content_hash(name: str) -> tuple[str, tuple[str, ...]] | None:
    """sha256 of a model's weights, and their dtypes; the same however many files they are spread over.

    None where the model has no safetensors, or is neither here nor to be had.

    Raises:
        StorageError: a file is damaged.
    """
    files = [(file, (found := file.stat()).st_size, found.st_mtime_ns) for file in _files(name)]
    return _content_hash(tuple(files))


@lru_cache(8)
def _content_hash(files: tuple[tuple[Path, int, int], ...]) -> tuple[str, tuple[str, ...]] | None:
    """Read once, as long as neither size nor time of a file changes."""
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for file, _, _ in files:
        with file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            try:
                header = json.loads(content.read(size))
                header.pop("__metadata__", None)
            except (ValueError, AttributeError, TypeError, OverflowError, MemoryError):
                raise StorageError(f"{file} is no safetensors file, or damaged. Get the model again.") from None
        tensors |= {key: (file, 8 + size, facts) for key, facts in header.items()}
    if not tensors:
        return None
    total = hashlib.sha256()
    for key, (file, start, facts) in sorted(tensors.items()):
        total.update(json.dumps([key, facts["dtype"], facts["shape"]]).encode())
        begin, end = facts["data_offsets"]
        _add(total, file, start + begin, end - begin)
    return total.hexdigest(), tuple(sorted({facts["dtype"] for _, _, facts in tensors.values()}))


def _add(total: Any, file: Path, start: int, size: int) -> None:
    with file.open("rb") as content:
        content.seek(start)
        while size:
            part = content.read(min(size, CHUNK))
            if not part:
                raise StorageError(f"{file} ends before its last tensor. Get the model again.")
            total.update(part)
            size -= len(part)


def _files(name: str) -> list[Path]:
    """The files that hold a model's weights, as transformers chooses among them; fetched from the Hub if need be."""
    folder = _folder(name)
    if folder is None:
        return []
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        try:
            return sorted({folder / file for file in disk.read_json(folder / INDEX)["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StorageError(f"{folder / INDEX} is damaged. Get the model again.") from None
    return []


def _folder(name: str) -> Path | None:
    there, revision = at(resolve(name))
    if Path(there).is_dir():
        return Path(there)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(there, revision=revision, allow_patterns=["model*.safetensors", INDEX]))
    except (OSError, HfHubHTTPError, ValueError):  # the run itself will say what is wrong with the model
        return None
