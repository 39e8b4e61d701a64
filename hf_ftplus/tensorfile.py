"""A safetensors file written tensor by tensor: of sharded ones, no rank ever holds more than one whole.

The library's own `save_file` writes the same bytes, and wants all tensors at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .disk import replace

CODES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls the types of tensors, in the order in which a file has them: large ones first, so that each
begins where its type may."""


def write(path: Path, tensors: dict[str, Tensor], writes: bool = True) -> dict[str, Any]:
    """Write `tensors` to `path`, whole or not at all. All ranks call, for all take part in gathering; one `writes`.

    Returns:
        {"sha256": of the file, "bytes": its size}; the other ranks' mean nothing.

    Raises:
        OSError: it cannot be written. Everything is gathered all the same, so that no rank waits for this one.
        ValueError: a tensor of a type that the format does not know.
    """
    order = list(CODES)
    tensors = dict(sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])))
    parts, summed, size = _gathered(tensors, writes), hashlib.sha256(), 0

    def put(file: Path) -> None:
        nonlocal size
        with file.open("wb") as there:
            for part in chain([header(tensors)], parts):
                summed.update(part)
                size += there.write(part)
                del part  # before the next is gathered

    try:
        if writes:
            replace(path, put)
    finally:
        for _ in parts:
            pass
    return {"sha256": summed.hexdigest(), "bytes": size}


def header(tensors: dict[str, Tensor]) -> bytes:
    """Where each tensor stands in the file, in this order, and what it is."""
    ends = list(accumulate(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    entries = {
        name: {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        for (name, tensor), begin, end in zip(tensors.items(), [0, *ends], ends, strict=False)
    }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all ranks; contiguous and on the CPU."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().cpu().contiguous()


def _gathered(tensors: dict[str, Tensor], keep: bool) -> Iterator[memoryview]:
    """The bytes of each tensor, when it is asked for; ranks that write nothing only take part."""
    for tensor in tensors.values():
        if keep:
            yield memoryview(whole(tensor).view(-1).view(torch.uint8).numpy())
        elif hasattr(tensor, "full_tensor"):
            tensor.full_tensor()
            yield memoryview(b"")
