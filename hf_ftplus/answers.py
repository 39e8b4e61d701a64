"""Keep what a teacher answered, on disk and found again by the words it answered to.

An example is known by a hash of its tokens and labels, never by the step or the place where it was met, so that order,
padding, packing and the number of processes do not matter. Per supervised token: the k likeliest tokens, their
log-probabilities, and that of all others together; 6k + 2 bytes. Files are memory-mapped safetensors, never changed
once written, and shared by all runs with the same teacher.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .disk import replace
from .errors import IncompatibleError, StorageError
from .examples import Example, sent, supervised_in
from .formats import IGNORED

FORMAT = 2
"""Part of the folder's name: raise it when the same teacher and example come to give another answer."""
PART_TOKENS = 2**18
"""Supervised tokens in a file: 100 MB at k = 64."""

logger = logging.getLogger("hf_ftplus")


class Answers:
    """The answers of one teacher in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[dict[str, Tensor]] = []
        self._where: dict[bytes, tuple[int, int, int]] = {}
        self._names: set[str] = set()
        self._new: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._new_tokens = 0
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes wrote since."""
        for path in sorted(self.folder.glob("part-*.safetensors")):
            if path.name in self._names:
                continue
            try:
                part = load_file(path)
            except (SafetensorError, OSError) as error:
                logger.warning("%s is damaged (%s); what it held is asked again", path, error)
                continue
            self._names.add(path.name)
            start = 0
            for key, length in zip(part["keys"], part["lengths"].tolist(), strict=True):
                self._where[bytes(key.tolist())] = (len(self._parts), start, length)
                start += length
            self._parts.append(part)

    def lacks(self, batch: dict[str, Tensor]) -> bool:
        """Whether any example of a micro-batch was never answered to."""
        keys = map(key_of, examples_in(batch))
        return any(key not in self._where and key not in self._new for key in keys)

    def add(self, batch: dict[str, Tensor], tokens: Tensor, log_probs: Tensor) -> None:
        """Keep the answers [N, k], [N, k + 1] to a micro-batch with N supervised tokens."""
        examples = examples_in(batch)
        sizes = [supervised_in(example) for example in examples]
        _same_count(sum(sizes), len(tokens))
        for example, *answer in zip(examples, tokens.cpu().split(sizes), log_probs.cpu().split(sizes), strict=True):
            if key_of(example) not in self._where:
                self._new[key_of(example)] = (answer[0], answer[1])
        self._new_tokens += len(tokens)
        if self._new_tokens >= PART_TOKENS:
            self.write()

    def write(self) -> None:
        """Put what was added into a file of its own, beside and then into place."""
        if not self._new:
            return
        answers = list(self._new.values())
        part = {
            "keys": torch.tensor([list(key) for key in self._new], dtype=torch.uint8),
            "lengths": torch.tensor([len(tokens) for tokens, _ in answers]),
            "tokens": torch.cat([tokens for tokens, _ in answers]),
            "log_probs": torch.cat([log_probs for _, log_probs in answers]),
        }
        name = hashlib.sha256(b"".join(self._new)).hexdigest()[:24]
        try:
            replace(self.folder / f"part-{name}.safetensors", lambda file: save_file(part, file))
        except OSError as error:
            raise StorageError(
                f"Cannot keep the teacher's answers in {self.folder}: {error.strerror or error}. Point FTPLUS_CACHE at "
                "a folder with room, lower --set distill.top_k, or set cache=false."
            ) from error
        self._new, self._new_tokens = {}, 0
        self.refresh()

    def to(self, examples: list[Example], device: torch.device) -> tuple[Tensor, Tensor]:
        """The answers to some examples: tokens [N, k] and log-probabilities [N, k + 1], in the order of their labels.

        Raises:
            IncompatibleError: one of them was never answered to.
        """
        found = []
        for example in examples:
            place = self._where.get(key_of(example))
            if place is None:
                raise IncompatibleError(
                    f"An example of {len(example['input_ids'])} tokens was not there when distill asked the teacher: "
                    "rows are streamed, cut to other pieces (packing_strategy wrapped), or changed between epochs. Set "
                    "cache=false."
                )
            part, start, length = place
            found.append(tuple(self._parts[part][name][start : start + length] for name in ("tokens", "log_probs")))
        tokens, log_probs = (sent(torch.cat(column), device) for column in zip(*found, strict=True))
        return tokens, log_probs


def examples_in(batch: dict[str, Tensor]) -> list[Example]:
    """The examples of a micro-batch without padding; padding-free rows are taken apart where positions start again.

    An example's first label is never predicted from within it, and is left out.

    Raises:
        IncompatibleError: there is more to them than tokens, such as an image.
    """
    more = [key for key, value in batch.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if more:
        raise IncompatibleError(
            f"distill tells rows apart by their tokens, and these also have {', '.join(more)}. Set distill.cache=false "
            "and distill.on=learn, or leave that column out."
        )
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    mask = (
        batch["attention_mask"].cpu().bool() if batch.get("attention_mask") is not None else torch.ones_like(ids).bool()
    )
    places = batch["position_ids"].cpu().expand_as(ids) if batch.get("position_ids") is not None else None
    return [
        example
        for row in range(len(ids))
        for example in _pieces(
            ids[row][mask[row]], labels[row][mask[row]], None if places is None else places[row][mask[row]]
        )
    ]


def _pieces(ids: Tensor, labels: Tensor, places: Tensor | None) -> Iterator[Example]:
    starts = [0] if places is None else [0, *((places[1:] == 0).nonzero()[:, 0] + 1).tolist()]
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        if end > start:
            yield {"input_ids": ids[start:end].tolist(), "labels": [IGNORED, *labels[start + 1 : end].tolist()]}


def key_of(example: Example) -> bytes:
    """16 bytes that stand for the tokens and labels of an example."""
    numbers = torch.tensor([example["input_ids"], example["labels"]], dtype=torch.int64)
    return hashlib.blake2b(numbers.numpy().tobytes(), digest_size=16).digest()


def bytes_per_token(count: int) -> int:
    """On disk, for each supervised token of which `count` likeliest tokens are kept."""
    return 4 * count + 2 * (count + 1)


def _same_count(examples: int, answers: int) -> None:
    if examples != answers:
        raise IncompatibleError(
            f"A micro-batch has {answers} supervised tokens, its examples {examples}: the first token of a packed "
            "example carries a label. Set cache=false, or packing=false."
        )
