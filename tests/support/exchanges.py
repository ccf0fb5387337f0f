"""What attention may send, by formula, held against what the counters say it sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor

from parafuse.parallel.attention import RankAttention
from parafuse.parallel.comm import Count


@dataclass
class Expected:
    """What the attention calls of one forward send, added up."""

    attentions: int = 0
    ulysses_bytes: int = 0
    ring_calls: int = 0
    ring_bytes: int = 0


@contextmanager
def watched(ring: int, ulysses: int) -> Iterator[Expected]:
    """Adds up the formulas for every split attention in this context, on this rank."""
    expected, original = Expected(), RankAttention.__call__

    def attend(self: RankAttention, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        expected.attentions += 1
        if ulysses > 1:
            expected.ulysses_bytes += ulysses_bytes(q, k, v, ulysses, self.ulysses_rank)
        if ring > 1:
            heads = share(k.shape[1], q.shape[1], ulysses)[self.ulysses_rank]
            if heads:  # a rank without heads has nothing to send round
                expected.ring_calls += ring - 1
                expected.ring_bytes += (ring - 1) * q.shape[0] * heads * k.shape[2] * ulysses * width(k, v)
        return original(self, q, k, v, *rest)

    with patch.object(RankAttention, "__call__", attend):
        yield expected


def width(k: Tensor, v: Tensor) -> int:
    """Bytes of one key and its value."""
    return (k.shape[-1] + v.shape[-1]) * k.element_size()


def share_of(count: int, degree: int) -> list[int]:
    """Heads per rank, the first ranks one more."""
    return [count // degree + (rank < count % degree) for rank in range(degree)]


def share(key_heads: int, heads: int, degree: int) -> list[int]:
    """Key heads that serve each rank's query heads; a key head that serves two ranks goes to both."""
    group, first, found = heads // key_heads, 0, []
    for count in share_of(heads, degree):
        found.append(len({head // group for head in range(first, first + count)}))
        first += count
    return found


def ulysses_bytes(q: Tensor, k: Tensor, v: Tensor, degree: int, rank: int) -> int:
    """Sent by one rank for one attention: other ranks' heads of its rows there, and its heads of their rows back."""
    batch, heads, rows, size = q.shape
    queries, keys = share_of(heads, degree), share(k.shape[1], heads, degree)
    out = 0
    for other in range(degree):
        if other != rank:
            out += batch * queries[other] * rows * size * q.element_size()
            out += batch * keys[other] * k.shape[2] * width(k, v)
            out += batch * queries[rank] * rows * v.shape[-1] * q.element_size()
    return out


def faults(expected: Expected, counted: dict[str, Count]) -> list[str]:
    """Where the counters differ from the formulas."""
    none = Count()
    there = counted.get("ulysses.all_to_all", none)
    around = counted.get("ring.ring", none)
    calls = 2 * expected.attentions if expected.ulysses_bytes or there.calls else 0
    pairs = {
        "all-to-all calls": (there.calls, calls),
        "all-to-all bytes": (there.bytes, expected.ulysses_bytes),
        "ring calls": (around.calls, expected.ring_calls),
        "ring bytes": (around.bytes, expected.ring_bytes),
    }
    return [f"{got} {name}, {want} by formula" for name, (got, want) in pairs.items() if got != want]


def gathers(counted: dict[str, Count]) -> int:
    """Exchanges beside those of attention."""
    return sum(count.calls for name, count in counted.items() if name.endswith(("all_gather", "all_reduce")))
