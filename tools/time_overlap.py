"""Times Ulysses' exchanges posted in chunks of heads beside attention, against one exchange each way: two CPU ranks of
one thread each, gloo over loopback, variants in turns, medians of the slower rank.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tools/time_overlap.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.two_ranks import on_two_ranks

CHUNKS = (1, 2, 3, 4)
RANKS = 2


@dataclass(frozen=True)
class Case:
    """Attention of one block over two ranks."""

    tokens: int
    heads: int
    size: int
    dtype: torch.dtype


CASES = {
    "image: 1152 tokens, 24 x 64, fp32": Case(1152, 24, 64, torch.float32),
    "image: 1152 tokens, 24 x 64, bf16": Case(1152, 24, 64, torch.bfloat16),
    "image: 1152 tokens, 24 x 128, bf16": Case(1152, 24, 128, torch.bfloat16),
    "video: 4096 tokens, 24 x 64, bf16": Case(4096, 24, 64, torch.bfloat16),
    "few tokens: 256, 24 x 64, bf16": Case(256, 24, 64, torch.bfloat16),
}


def pack(qkv: Tensor, first: int, count: int) -> Tensor:
    """(3, H, S, D) -> (P, S, 3, h, D) of some of each rank's heads."""
    return qkv.unflatten(1, (RANKS, -1))[:, :, first : first + count].permute(1, 3, 0, 2, 4).contiguous()


def post(send: Tensor) -> tuple[Tensor, Any]:
    received = torch.empty_like(send)
    return received, dist.all_to_all_single(received, send, async_op=True)


def attend(received_PS3hD: Tensor) -> Tensor:
    """(P, S, 3, h, D) -> (P, S, h, D)."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in received_PS3hD.flatten(0, 1).unbind(1))
    out = F.scaled_dot_product_attention(q, k, v)
    return out[0].transpose(0, 1).contiguous().unflatten(0, (RANKS, -1))


def attention(qkv: Tensor, chunks: int) -> Tensor:
    """(3, H, S, D) of the local rows -> (S, P, h, D). The next chunk is on its way while one is attended, and so is the
    last one's result."""
    number = qkv.shape[1] // RANKS
    bounds = [number * i // chunks for i in range(chunks + 1)]
    parts = [(first, last - first) for first, last in pairwise(bounds)]
    result = qkv.new_empty((qkv.shape[2], RANKS, number, qkv.shape[3]))
    on_the_way, back = post(pack(qkv, *parts[0])), []
    for i in range(chunks):
        received, work = on_the_way
        if i + 1 < chunks:
            on_the_way = post(pack(qkv, *parts[i + 1]))
        work.wait()
        back.append(post(attend(received)))
    for (first, count), (received, work) in zip(parts, back, strict=True):
        work.wait()
        result[:, :, first : first + count].copy_(received.transpose(0, 1))
    return result


def timed(function: Callable[[], object]) -> float:
    dist.barrier()
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def measure(name: str, rank: int) -> dict[str, Any]:
    case = CASES[name.split(" @ ", maxsplit=1)[0]]
    torch.manual_seed(rank)
    qkv = torch.randn(3, case.heads, case.tokens // RANKS, case.size).to(case.dtype)
    ways: dict[str, Callable[[], object]] = {str(n): lambda n=n: attention(qkv, n) for n in CHUNKS}
    received = post(pack(qkv, 0, case.heads // RANKS))
    received[1].wait()
    ways["attention alone"] = lambda: attend(received[0])
    ways["exchanges alone"] = lambda: [post(pack(qkv, 0, case.heads // RANKS))[1].wait(), post(qkv[0])[1].wait()]
    whole = attention(qkv, 1)
    same = all(torch.equal(attention(qkv, n), whole) for n in CHUNKS)
    samples: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(int(name.split(" @ ")[1])):
        for way in list(ways) if turn % 2 else list(ways)[::-1]:
            samples[way].append(timed(ways[way]))
    return {"samples": samples, "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    results = on_two_ranks(measure, [f"{name} @ {rounds}" for name in CASES])
    for name, both in results.items():
        slower = {
            way: statistics.median(map(max, *(one["samples"][way] for one in both))) for way in both[0]["samples"]
        }
        one = slower["1"]
        chunked = ", ".join(
            f"{n} chunks {slower[str(n)] * 1e3:.1f} ms ({one / slower[str(n)]:.2f}x)" for n in CHUNKS[1:]
        )
        print(
            f"{name.split(' @ ')[0]}: one exchange {one * 1e3:.1f} ms, {chunked}; attention alone "
            f"{slower['attention alone'] * 1e3:.1f}, exchanges alone {slower['exchanges alone'] * 1e3:.1f}; "
            f"bitwise the same: {all(one['same'] for one in both)}"
        )


if __name__ == "__main__":
    main()
