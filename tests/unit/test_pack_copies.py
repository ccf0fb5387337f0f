"""Packing of heads for an exchange: every rank gets its heads bit by bit, in a number of copies that does not grow with
the ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parafuse.parallel.layout import Layout, head_range, key_head_range
from parafuse.parallel.pack import Streams, pack_heads, split_rows, unpack_heads, unpack_result
from parafuse.parallel.shard import SequenceGroup


@dataclass(frozen=True)
class Case:
    """One attention: lengths, heads and sizes."""

    lengths: tuple[int, ...] = (16, 48)
    key_lengths: tuple[int, ...] | None = None
    heads: int = 8
    key_heads: int | None = None
    size: int = 4
    value_size: int = 4
    batch: int = 1


CASES = {
    "two streams": Case(),
    "one stream": Case(lengths=(64,)),
    "batch 2": Case(batch=2),
    "one stream, batch 2": Case(lengths=(64,), batch=2),
    "lengths do not divide": Case(lengths=(13, 35), batch=2),
    "one stream does not divide": Case(lengths=(35,)),
    "fewer tokens than ranks": Case(lengths=(1, 2)),
    "heads do not divide": Case(heads=13),
    "fewer heads than ranks": Case(heads=1),
    "grouped": Case(heads=16, key_heads=8),
    "grouped, nothing divides": Case(heads=10, key_heads=5, batch=2),
    "one key head": Case(heads=7, key_heads=1),
    "other size of values": Case(value_size=6),
    "queries are a part of the keys": Case(lengths=(35,), key_lengths=(13, 35)),
}


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    keys = case.key_heads or case.heads
    rows, key_rows = sum(case.lengths), sum(case.key_lengths or case.lengths)
    shapes = ((case.heads, rows, case.size), (keys, key_rows, case.size), (keys, key_rows, case.value_size))
    q, k, v = (torch.randn(case.batch, n, h, d).transpose(1, 2) for h, n, d in shapes)
    return q, k, v


class Copies(TorchDispatchMode):
    """Counts what would be a launch on a device: everything but views and allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not func.is_view and "empty" not in name and name not in {"aten::_unsafe_view", "aten::_reshape_alias"}:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def deliver(sends: list[tuple[Tensor, list[int]]], rank: int) -> Tensor:
    """What an all-to-all brings to `rank`."""
    return torch.cat([flat.split(sizes)[rank] for flat, sizes in sends])


def run(case: Case, degree: int) -> tuple[Counter[str], Counter[str]]:
    """Sends q, k, v and a result round `degree` simulated ranks, holds each against the whole, and returns the copies
    of rank 0 on the way in and on the way back."""
    q, k, v = tensors(case)
    queries, keys = Layout(case.lengths, degree), Layout(case.key_lengths or case.lengths, degree)
    ranges = tuple(head_range(case.heads, degree, r) for r in range(degree))
    key_ranges = tuple(key_head_range(r, q.shape[1] // k.shape[1]) for r in ranges)
    chunks = [(layout.lengths, layout.parts) for layout in (queries, keys)]

    def streams(rank: int) -> list[Streams]:
        here = SequenceGroup(degree, rank, None)
        mine = here.take(q, 2, queries), here.take(k, 2, keys), here.take(v, 2, keys)
        if queries == keys:
            return [Streams(mine, (ranges, key_ranges, key_ranges))]
        return [Streams(mine[:1], (ranges,)), Streams(mine[1:], (key_ranges, key_ranges))]

    inward, back = Copies(), Copies()
    everyone = [streams(rank) for rank in range(degree)]
    with inward:
        first = pack_heads(everyone[0])
    sends = [first, *map(pack_heads, everyone[1:])]
    results = []
    for rank in range(degree):
        received = deliver(sends, rank)
        with inward if rank == 0 else Copies():
            mine = unpack_heads(received, everyone[rank], rank, chunks[: len(everyone[rank])])
        for x, whole, heads in zip(mine, (q, k, v), (ranges, key_ranges, key_ranges), strict=True):
            assert torch.equal(x, whole[:, slice(*heads[rank])])
        results.append(q[:, slice(*ranges[rank])].transpose(1, 2).contiguous())
    sends = []
    for rank, result in enumerate(results):
        with back if rank == 0 else Copies():
            send = split_rows(result, queries.lengths, queries.parts, degree)
        sends.append((send.flatten(), [send[0].numel()] * degree))
    for rank in range(degree):
        received = deliver(sends, rank)
        with back if rank == 0 else Copies():
            shape = (case.batch, queries.local, case.heads, case.size)
            whole = unpack_result(received, ranges, shape)
        assert torch.equal(whole, SequenceGroup(degree, rank, None).take(q, 2, queries))
        assert whole.transpose(1, 2).is_contiguous()
    return inward.seen, back.seen


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_every_rank_gets_its_own(name: str, degree: int) -> None:
    run(CASES[name], degree)


@pytest.mark.parametrize(
    ("name", "inward", "back"),
    [
        ("two streams", 3 + 2, 2 + 1),
        ("one stream", 3, 1),
        ("batch 2", 3 + 2, 2 + 1),
        ("one stream, batch 2", 3 + 1, 1 + 1),
        ("lengths do not divide", 3 + 2, 1 + 4 + 1),
        ("heads do not divide", 6 + 2, 2 + 2),
        ("grouped", 3 + 2, 2 + 1),
    ],
)
def test_copies_do_not_grow_with_the_ranks(name: str, inward: int, back: int) -> None:
    for degree in (2, 4, 8):
        found = run(CASES[name], degree)
        assert sum(found[0].values()) <= inward, (degree, found[0])
        assert sum(found[1].values()) <= back, (degree, found[1])
