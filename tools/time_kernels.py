"""Times the Triton kernels on a GPU against their twins, compiled and eager, and against what runs today: variants in
turns, medians, beside the bytes that must move. A minute on an H100 or H200.

    PYTHONPATH=. python tools/time_kernels.py [merge] [pack] [fp8] [--rounds 30]

Each kernel is held against its twin on the device first; one that differs ends the run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parafuse.kernels import merge, norm_rope
from parafuse.kernels.fp8 import FP8
from parafuse.kernels.fused import missing
from parafuse.kernels.norm_rope import NormRope
from parafuse.parallel.pack import Streams, pack_heads

CALLS = 10
"""In one sample, so that launches overlap as they do in a model."""
SIZES: dict[str, dict[str, Any]] = {
    "FLUX image, 1 of 8": dict(rows=512, heads=24, norm="head", degree=8),
    "FLUX image, 1 of 2": dict(rows=2048, heads=24, norm="head", degree=2),
    "Wan 720p, 1 of 8": dict(rows=9450, heads=40, norm="width", degree=8),
}
MERGES = {"FLUX, ring of 8": (1, 24, 576, 128), "Wan 720p, ring of 8": (1, 40, 9450, 128)}


@dataclass(frozen=True)
class Comparison:
    """Ways to the same result."""

    name: str
    num_bytes: int
    """That must be read and written, once each."""
    ways: dict[str, Callable[[], Any]]
    results: Callable[[Any], list[Tensor]]
    """What is compared of what a way gives."""


def merges(device: torch.device, sizes: dict[str, tuple[int, int, int, int]]) -> Iterator[Comparison]:
    from parafuse.kernels.fused.merge import merge_ as kernel

    compiled = torch.compile(merge.merge_, fullgraph=True, dynamic=False)
    for name, (b, h, s, d) in sizes.items():
        given = [torch.randn(b, s, h, d, device=device).transpose(1, 2), torch.randn(b, h, s, device=device)]
        block = torch.randn(b, s, h, d, device=device).transpose(1, 2).bfloat16(), torch.randn(b, h, s, device=device)

        def way(function: Any, given: Any = given, block: Any = block) -> Callable[[], Any]:
            own = [x.clone() for x in given]  # changed in place: each way has its own
            return lambda: function(*own, *block)

        ways = {"eager twin": way(merge.merge_), "compiled twin": way(compiled), "kernel": way(kernel)}
        yield Comparison(f"merge, {name}", b * h * s * (d * 10 + 12), ways, list)


def inputs(device: torch.device, size: dict[str, Any]) -> tuple[tuple[Tensor, Tensor, Tensor], NormRope]:
    rows, heads, d = size["rows"], size["heads"], 128
    qkv = [torch.randn(1, rows, heads, d, device=device).bfloat16() for _ in range(3)]
    width = d if size["norm"] == "head" else heads * d
    weights = [torch.randn(width, device=device).bfloat16() for _ in range(2)]
    angles = torch.rand(rows, d // 2, device=device).repeat_interleave(2, -1)
    how = NormRope(
        norm=size["norm"], weights=(weights[0], weights[1]), rotary="pairs", tables=(angles.cos(), angles.sin())
    )
    return (qkv[0], qkv[1], qkv[2]), how


def packs(device: torch.device, sizes: dict[str, dict[str, Any]]) -> Iterator[Comparison]:
    from parafuse.kernels.fused import norm_rope as kernels

    compiled = torch.compile(norm_rope.pack_qkv, fullgraph=True, dynamic=False)
    ready = torch.compile(norm_rope.ready, fullgraph=True, dynamic=False)
    for name, size in sizes.items():
        qkv, how = inputs(device, size)
        degree, share = size["degree"], size["heads"] // size["degree"]
        heads = (tuple((r * share, (r + 1) * share) for r in range(degree)),) * 3

        def way(function: Any, qkv: Any = qkv, how: Any = how, degree: int = degree) -> Callable[[], Tensor]:
            out = torch.empty(degree, 1, qkv[0].shape[1], 3, qkv[0].shape[2] // degree, 128, device=device).to(qkv[0])
            return lambda: (function(qkv, how, out), out)[1]

        def today(qkv: Any = qkv, how: Any = how, heads: Any = heads) -> Tensor:
            """A graph that ends in q and k, then three copies: attention is an operator to the compiler."""
            q, k = (ready(x, weight, how).to(x.dtype) for x, weight in zip(qkv, how.weights, strict=False))
            return pack_heads([Streams(tuple(x.transpose(1, 2) for x in (q, k, qkv[2])), heads)])[0]

        def copies(qkv: Any = qkv, heads: Any = heads) -> Tensor:
            return pack_heads([Streams(tuple(x.transpose(1, 2) for x in qkv), heads)])[0]

        def words(qkv: Any = qkv, heads: Any = heads) -> Tensor:
            wide = tuple(x.view(torch.int64).transpose(1, 2) for x in qkv)
            return pack_heads([Streams(wide, heads)])[0].view(qkv[0].dtype)

        def by_cat(qkv: Any = qkv, degree: int = degree) -> Tensor:
            parts = [x.unflatten(2, (degree, -1)).permute(2, 0, 1, 3, 4).flatten(1, 2) for x in qkv]
            return torch.cat(parts, dim=2)

        num_bytes = 2 * 3 * qkv[0].nbytes
        ways = {
            "eager twin": way(norm_rope.pack_qkv), "compiled twin": way(compiled), "today": today,
            "kernel": way(kernels.pack_qkv),
        }  # fmt: skip
        yield Comparison(f"norm, rope, pack, {name}", num_bytes, ways, lambda out: [out])
        plain = {"copies": copies, "copies of 8-byte words": words, "one cat": by_cat}
        plain["kernel"] = way(kernels.pack_qkv, how=NormRope())
        yield Comparison(f"pack alone, {name}", num_bytes, plain, lambda out: [out])


def casts(device: torch.device, sizes: dict[str, dict[str, Any]]) -> Iterator[Comparison]:
    from parafuse.kernels.fused import norm_rope as kernels

    compiled = torch.compile(norm_rope.cast_qkv_fp8, fullgraph=True, dynamic=False)
    compiled_pack = torch.compile(norm_rope.pack_qkv_fp8, fullgraph=True, dynamic=False)
    for name, size in sizes.items():
        qkv, how = inputs(device, size)
        degree = size["degree"]
        shape = (degree, 1, size["rows"], 3, size["heads"] // degree, 128)

        def cast(function: Any, qkv: Any = qkv, how: Any = how) -> Callable[[], Any]:
            return lambda: function(qkv, how)

        def send(function: Any, qkv: Any = qkv, how: Any = how, shape: Any = shape) -> Callable[[], Any]:
            # Not in one buffer, as they travel: torch.compile cannot write to views of one tensor in two dtypes.
            values = torch.empty(shape, dtype=FP8, device=device)
            scales = torch.empty(shape[:-1], dtype=torch.float32, device=device)
            return lambda: (function(qkv, how, values, scales), (values, scales))[1]

        number = qkv[0].numel()
        ways = {"eager twin": cast(norm_rope.cast_qkv_fp8), "compiled twin": cast(compiled)}
        ways["kernel"] = cast(kernels.cast_qkv_fp8)
        yield Comparison(f"norm, rope, fp8 by head, {name}", 3 * number * 5, ways, dequantized)
        ways = {"eager twin": send(norm_rope.pack_qkv_fp8), "compiled twin": send(compiled_pack)}
        ways["kernel"] = send(kernels.pack_qkv_fp8)
        yield Comparison(f"norm, rope, pack in fp8, {name}", 3 * number * 3, ways, dequantized)


def dequantized(out: tuple[Tensor, Tensor]) -> list[Tensor]:
    values, scales = out
    if values.dim() == 5:  # (B, S, 3, H, D) with (3, B, H)
        return [values.float() * scales.movedim(0, 1)[:, None, :, :, None]]
    return [values.float() * scales.unsqueeze(-1)]


def is_same(one: Tensor, other: Tensor) -> bool:
    """Within the rounding of 16 bits, or of 8 where that is what was written."""
    one, other = one.flatten().float(), other.flatten().float()
    return bool((one - other).norm() <= 0.01 * other.norm())


def sample(function: Callable[[], Any]) -> float:
    """Milliseconds a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / CALLS


def report(comparison: Comparison, rounds: int) -> None:
    """One line for each way; ends the run where one of them gives something else."""
    first = next(iter(comparison.ways))
    results = {way: [x.clone() for x in comparison.results(run())] for way, run in comparison.ways.items()}
    for way, result in results.items():
        if not all(map(is_same, result, results[first])):
            raise SystemExit(f"{comparison.name}: {way} gives something else than {first}")
    samples: dict[str, list[float]] = {way: [] for way in comparison.ways}
    for turn in range(rounds + 3):
        for way in list(comparison.ways)[:: 1 if turn % 2 else -1]:
            milliseconds = sample(comparison.ways[way])
            if turn >= 3:
                samples[way].append(milliseconds)
    medians = {way: statistics.median(found) for way, found in samples.items()}
    print(f"{comparison.name} ({comparison.num_bytes / 1e6:.1f} MB)")
    for way, milliseconds in medians.items():
        speed = comparison.num_bytes / milliseconds / 1e6
        spread = f"{min(samples[way]) * 1e3:.1f} to {max(samples[way]) * 1e3:.1f}"
        times, ratio = f"{milliseconds * 1e3:8.1f} us ({spread})", medians[first] / milliseconds
        print(f"  {way:24s} {times}  {speed:7.0f} GB/s  {ratio:.2f}x")


KINDS: dict[str, Callable[[torch.device], Iterator[Comparison]]] = {
    "merge": lambda device: merges(device, MERGES),
    "pack": lambda device: packs(device, SIZES),
    "fp8": lambda device: casts(device, SIZES),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], default=[])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = missing(device)
    if device.type != "cuda" or reason:
        print(f"kernels are timed on a GPU alone: {reason or 'there is none here'}")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, fp8 as {FP8}, medians of {args.rounds} rounds")
    for kind in args.kinds or KINDS:
        for comparison in KINDS[kind](device):
            report(comparison, args.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
