"""Files of tensors are, byte for byte, those that safetensors itself writes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hf_ftplus import tensorfile
from hf_ftplus.disk import sha256


def some() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        f"{code} ü": torch.randint(2, (3, 5), generator=generator).to(kind) for kind, code in tensorfile.CODES.items()
    }
    return {**found, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "view": torch.arange(6.0).view(2, 3).T}


def test_every_type_is_written_as_the_library_writes_it(tmp_path):
    written = tensorfile.write(tmp_path / "ours.safetensors", some())
    save_file({name: tensor.contiguous() for name, tensor in some().items()}, tmp_path / "theirs.safetensors")
    ours = (tmp_path / "ours.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()
    assert written == {"sha256": sha256(tmp_path / "ours.safetensors"), "bytes": len(ours)}
    found = load_file(tmp_path / "ours.safetensors")
    assert all(
        torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8))
        for name, tensor in some().items()
        if tensor.ndim
    )


def test_nothing_is_a_file_too(tmp_path):
    tensorfile.write(tmp_path / "ours.safetensors", {})
    assert load_file(tmp_path / "ours.safetensors") == {}


@pytest.fixture
def shards():
    """Real DTensors, of a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield {str(n): distribute_tensor(torch.arange(float(n)), mesh, [Shard(0)]) for n in (3, 1, 2)}
    dist.destroy_process_group()


def test_shards_are_written_whole_one_at_a_time(tmp_path, monkeypatch, shards):
    held, full = [], DTensor.full_tensor

    def alone(shard):
        assert all(storage.expired() for storage in held)
        found = full(shard).clone()
        held.append(StorageWeakRef(found.untyped_storage()))
        return found

    monkeypatch.setattr(DTensor, "full_tensor", alone)
    tensorfile.write(tmp_path / "ours.safetensors", shards)
    found = load_file(tmp_path / "ours.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"1": [0], "2": [0, 1], "3": [0, 1, 2]}


@pytest.mark.parametrize("place", ["a rank that writes nothing", "a disk that takes nothing"])
def test_every_rank_gathers_everything_whatever_happens_to_the_file(tmp_path, monkeypatch, shards, place):
    gathered, full = [], DTensor.full_tensor
    monkeypatch.setattr(DTensor, "full_tensor", lambda self: gathered.append(len(self)) or full(self))
    (tmp_path / "file").write_text("")
    writes = place == "a disk that takes nothing"
    with pytest.raises(OSError, match="file") if writes else nullcontext():
        tensorfile.write(tmp_path / "file" / "no.safetensors", shards, writes)
    assert sorted(gathered) == [1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
