"""Objects in memory that processes share: values, identities and views stay; writes are one's own; faults are told."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from parafuse.parallel import node_memory
from parafuse.parallel.node_memory import SMALLEST, CannotShareError, Packed, clean_mappings, pack, unpack


class Parts(nn.Module):
    """Tied weights, a buffer that is a part of another tensor, something small, an odd dtype, and other strides."""

    row: torch.Tensor
    table: torch.Tensor
    turned: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        table = torch.randn(4, 2048)
        self.register_buffer("table", table)
        self.register_buffer("row", table[2])
        self.register_buffer("small", torch.arange(3))
        self.register_buffer("eighth", torch.randn(64, 64).to(torch.float8_e4m3fn))
        self.register_buffer("turned", torch.randn(64, 96).t())


@pytest.fixture
def packed() -> Iterator[tuple[Parts, Packed]]:
    model = Parts()
    found = pack(model)
    yield model, found
    os.close(found.memory)


def values(model: nn.Module) -> dict[str, bytes]:
    return {k: x.detach().contiguous().view(torch.uint8).numpy().tobytes() for k, x in model.state_dict().items()}


def test_values_and_structure_stay(packed: tuple[Parts, Packed]) -> None:
    model, found = packed
    other = unpack(found)
    assert values(other) == values(model)
    assert other.first.weight is other.second.weight
    assert other.row.data_ptr() == other.table[2].data_ptr()
    assert other.turned.stride() == model.turned.stride()
    assert isinstance(other.first.weight, nn.Parameter)


def test_the_memory_is_one(packed: tuple[Parts, Packed]) -> None:
    """What is packed holds no values but small ones, and what was packed has moved to where the others look."""
    model, found = packed
    distinct = 64 * 64 * 4 + 4 * 2048 * 4 + 64 * 64 + 64 * 96 * 4
    assert found.in_memory_bytes == distinct
    assert len(found.pickled) < distinct // 4
    at = os.pread(found.memory, 1 << 20, 0).find(model.first.weight.detach().numpy().tobytes())
    assert at >= 0
    os.pwrite(found.memory, torch.full((1,), 7.0).numpy().tobytes(), at)
    assert model.first.weight[0, 0] == unpack(found).first.weight[0, 0] == 7.0


def test_who_writes_has_his_own(packed: tuple[Parts, Packed]) -> None:
    model, found = packed
    one, two = unpack(found), unpack(found)
    before = values(model)
    with torch.no_grad():
        one.table.zero_()
    assert not one.row.any()
    assert values(two) == values(model) == before


def test_objects_stay_the_same_ones() -> None:
    model = Parts()
    weight, row = model.first.weight, model.row
    before = values(model)
    os.close(pack(model).memory)
    assert model.first.weight is weight
    assert model.row is row
    assert model.row.data_ptr() == model.table[2].data_ptr()
    assert values(model) == before


def test_what_the_other_has_itself_is_not_packed() -> None:
    given = nn.Linear(64, 64)
    found = pack({"own": Parts(), "given": given}, {"encoder": given, "name": "x"})
    theirs = nn.Linear(2, 2)
    assert unpack(found, {"encoder": theirs})["given"] is theirs
    assert b"given" in found.pickled
    os.close(found.memory)


def test_several_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_memory, "REGION", 1 << 16)
    tensors = [torch.randn(n) for n in (5000, 9000, 40000, 3000, 16384, 1)]
    tensors += [torch.empty(0).to(torch.float8_e4m3fn), torch.zeros(3).to(torch.float8_e4m3fn)]
    found = pack(tensors)
    assert len(found.regions) >= 4
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(unpack(found), tensors, strict=True))
    os.close(found.memory)


def test_packed_weights_of_torchao() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(128, 128))
    quantize_(model, Int8WeightOnlyConfig(version=2))
    found = pack(model)
    x = torch.randn(2, 128)
    assert found.in_memory_bytes >= 128 * 128
    assert torch.equal(unpack(found)(x), model(x))
    os.close(found.memory)


@pytest.fixture
def from_file(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.randn(100, 100), "b": torch.randn(50, 200)}, path)
    return path, load_file(path)


def test_what_is_mapped_from_a_file_is_not_copied(from_file: tuple[Path, dict[str, Any]]) -> None:
    path, tensors = from_file
    assert [part.path for part in clean_mappings() if part.path == str(path)] == [str(path)]
    found = pack(tensors)
    assert found.in_files_bytes == 80_000
    assert found.in_memory_bytes == 0
    other = unpack(found)
    assert all(torch.equal(other[name], x) for name, x in tensors.items())
    assert len(found.pickled) < SMALLEST
    os.close(found.memory)


def test_what_was_changed_since_it_was_mapped_is_copied(from_file: tuple[Path, dict[str, Any]]) -> None:
    """Its pages are no longer those of the file."""
    path, tensors = from_file
    tensors["a"].mul_(2)
    assert not [part for part in clean_mappings() if part.path == str(path)]
    found = pack(tensors)
    assert found.in_files_bytes == 0
    assert torch.equal(unpack(found)["a"], tensors["a"])
    os.close(found.memory)


def test_another_file_is_not_taken(from_file: tuple[Path, dict[str, Any]]) -> None:
    path, tensors = from_file
    found = pack(tensors)
    path.rename(path.with_name("old"))
    save_file({"a": torch.zeros(100, 100), "b": torch.zeros(50, 200)}, path)
    with pytest.raises(CannotShareError, match="another file"):
        unpack(found)
    os.close(found.memory)


class Unwilling:
    def __reduce__(self) -> Any:
        raise TypeError("not this one")


class Unwelcome:
    def __reduce__(self) -> Any:
        return (int, ("no number",))


def test_what_cannot_be_packed_or_made_anew_is_told() -> None:
    with pytest.raises(CannotShareError, match="TypeError: not this one"):
        pack([torch.randn(5000), Unwilling()])
    found = pack(Unwelcome())
    with pytest.raises(CannotShareError, match="ValueError"):
        unpack(found)
    os.close(found.memory)


def test_no_values_in_the_pickle_of_meta_tensors() -> None:
    found = pack(nn.Linear(500, 500, device="meta"))
    assert unpack(found).weight.is_meta
    assert pickle.dumps(found.regions)
    os.close(found.memory)
