"""The machine at hand, measured: products, attention, copies and exchanges on all ranks at once. Under 20 seconds.

What comes out is kept for this machine (`known.py`); nothing is measured unless it is asked for."""

from __future__ import annotations

import dataclasses
import os
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from parafuse.engine.planning.facts import ATTENTION, CONVOLUTION, GEMM
from parafuse.engine.planning.machine import MEASURED, Curve, Device, Link, Machine, kind_of, named
from parafuse.errors import ParafuseError
from parafuse.hardware import cores, hardware, memory_bytes, visible_gpus

COLD_BYTES = 48 << 20
"""Of tensors that take turns: more than the caches next to a core hold."""
MOST_COPIES = 256
ENOUGH_S = 0.012
"""That a size is timed for."""
MOST_S = 60.0
"""After which a process that measures is given up."""
PRODUCTS = (
    (16, 64, 64), (64, 128, 128), (256, 192, 192), (256, 192, 768), (1024, 512, 512), (1024, 512, 2048),
    (4096, 1024, 1024),
)  # fmt: skip
LARGE_PRODUCTS = ((1024, 3072, 3072), (4096, 3072, 3072), (8192, 8192, 8192))
ATTENTIONS = ((4, 32, 64), (6, 128, 32), (8, 256, 64), (8, 512, 64), (8, 1024, 64), (8, 2048, 64))
LARGE_ATTENTIONS = ((24, 1024, 128), (24, 4608, 128), (24, 16384, 128))
CONVOLUTIONS = ((16, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256))
LARGE_CONVOLUTIONS = ((128, 512), (256, 512))
SIZES = (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
"""Bytes read and written."""
SENT = (1 << 12, 1 << 18, 1 << 21, 1 << 24)
Timed = dict[str, list[tuple[float, float]]]


def measure(ranks: int, device: str, dtype: str) -> Machine:
    """The machine at hand with so many ranks, in one dtype. It starts as many processes, and ends them. Raises
    ParafuseError where one of them fails."""
    alone = _run(1, device, dtype)
    busy = _run(ranks, device, dtype) if ranks > 1 else None
    there = hardware()
    gpus = visible_gpus()
    name = gpus[0].name if device == "cuda" and gpus else there.cpu
    memory = min(gpu.memory_bytes for gpu in gpus) if device == "cuda" and gpus else memory_bytes() // max(1, ranks)
    first = _device(name, device, dtype, memory, alone)
    link = Link(name="measured", **(busy["link"] if busy else {"bytes_per_s": 1e9, "latency_s": 1e-4}))
    return Machine(
        name=f"{ranks}x{name}",
        device=first,
        per_node=ranks,
        nodes=1,
        inside=link,
        across=link,
        busy=_device(name, device, dtype, memory, busy) if busy else None,
        sources=(MEASURED,),
    )


def _device(name: str, kind: str, dtype: str, memory: int, found: dict[str, Any]) -> Device:
    curves: dict[str, Curve] = {key: tuple(map(tuple, values)) for key, values in found["curves"].items()}
    best = {family: max(size / s for size, s in curves[f"{family}.{dtype}"]) for family in (GEMM, ATTENTION)}
    device = Device(
        name=name,
        kind=kind,
        memory_bytes=memory,
        bytes_per_s=max(size / s for size, s in curves[f"pointwise.{dtype}"][-3:]),
        flops={dtype: best[GEMM]},
        attention={dtype: best[ATTENTION]},
        units=found["units"],
        kernel_s=curves[f"pointwise.{dtype}"][0][1],
        host_s=found["host_s"],
        capability=found["capability"],
        curves=curves,
    )
    return with_other_dtypes(device)


def with_other_dtypes(device: Device) -> Device:
    """A device that was measured in one dtype, with estimates of its rates in others, which computing in two dtypes and
    8-bit products need. On CUDA each stands to the measured one as in the nearest named device, on a CPU all are
    equal. What was measured stays. The way to the host is that of the nearest named device, too."""
    like = named(f"1x{kind_of(device)}").device if device.kind == "cuda" else None
    return dataclasses.replace(
        device,
        flops=_filled_in(device.flops, EQUAL if like is None else like.flops),
        attention=_filled_in(device.attention, EQUAL_ATTENTION if like is None else like.attention),
        host_bytes_per_s=device.host_bytes_per_s if like is None else like.host_bytes_per_s,
    )


def _filled_in(measured: Mapping[str, float | None], like: Mapping[str, float | None]) -> dict[str, float | None]:
    """Rates that were measured, and of other dtypes as many times as much as another device's are of its own."""
    dtype, rate = next((name, rate) for name, rate in measured.items() if rate)
    own = like.get(dtype)
    if not own:
        like, own = USUAL, USUAL.get(dtype, 1.0)
    return {name: None if other is None else rate * other / own for name, other in like.items()} | dict(measured)


USUAL: dict[str, float] = {"float32": 1.0, "bfloat16": 2.0, "float16": 2.0, "float64": 0.5}
"""Of a GPU, where nothing else is known: proportions of its rates."""
EQUAL_ATTENTION: dict[str, float | None] = dict.fromkeys(("float32", "bfloat16", "float16"), 1.0)
EQUAL: dict[str, float | None] = {**EQUAL_ATTENTION, "int8": 1.0}


def _run(ranks: int, device: str, dtype: str) -> dict[str, Any]:
    """What rank 0 has found while all ranks did the same; of times the medians, of exchanges the slowest."""
    context = mp.get_context("spawn")
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or cores() // ranks))
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        processes = [
            context.Process(target=_rank, args=(rank, ranks, device, dtype, threads, folder, results), daemon=True)
            for rank in range(ranks)
        ]
        for one in processes:
            one.start()
        try:
            found = _awaited(processes, results)
            for one in processes:
                one.join(timeout=5)
        finally:
            for one in processes:
                if one.is_alive():  # of a group in which one failed the others wait without end
                    one.kill()
                one.join()
    merged = min(found, key=lambda one: one["rank"])
    for key, values in merged["curves"].items():
        times = [[s for _, s in one["curves"][key]] for one in found]
        merged["curves"][key] = [
            (size, statistics.mean(each)) for (size, _), each in zip(values, zip(*times, strict=True), strict=True)
        ]
    return merged


def _awaited(processes: Sequence[Any], results: Any) -> list[dict[str, Any]]:
    """What all ranks have found. Raises ParafuseError as soon as one fails, ends without a word, or takes too long."""
    found: list[dict[str, Any]] = []
    last = time.monotonic()
    while len(found) < len(processes):
        codes = [one.exitcode for one in processes]  # before what they said: they end after it
        try:
            one = results.get(timeout=LOOK_S)
        except queue.Empty:
            code = next((code for code in codes if code), None)
            if code is not None:
                raise ParafuseError(f"hardware: measuring failed: a rank ended with exit code {code}.") from None
            if time.monotonic() - last > MOST_S:
                raise ParafuseError(f"hardware: a rank that measured did not answer in {MOST_S:.0f} s.") from None
            continue
        if isinstance(one, str):
            raise ParafuseError(f"hardware: measuring failed: {one}")
        found.append(one)
        last = time.monotonic()
    return found


LOOK_S = 0.25
"""Between two looks at whether the processes that measure are there."""


def _rank(rank: int, ranks: int, kind: str, dtype: str, threads: int, folder: str, results: Any) -> None:
    try:
        results.put(_measured(rank, ranks, kind, getattr(torch, dtype), threads, folder))
    except BaseException as error:
        results.put(f"{type(error).__name__}: {error}")


def _measured(rank: int, ranks: int, kind: str, dtype: torch.dtype, threads: int, folder: str) -> dict[str, Any]:
    torch.set_num_threads(threads)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        store = dist.FileStore(str(Path(folder) / "store"), ranks)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=ranks)
    clock = Clock(device)
    name = str(dtype).removeprefix("torch.")
    curves: dict[str, list[tuple[float, float]]] = {}
    with torch.no_grad():
        for family, size, moved, make in _calls(device, dtype):
            copies = [make() for _ in range(int(min(MOST_COPIES, max(2, COLD_BYTES // moved))))]
            if ranks > 1:
                dist.barrier()
            curves.setdefault(f"{family}.{name}", []).append((size, clock.seconds(Cold(copies))))
        found: dict[str, Any] = {
            "rank": rank,
            "curves": {key: sorted(values) for key, values in curves.items()},
            "host_s": _host_seconds(device, dtype, clock),
            "units": 1,
            "capability": "",
        }
        if kind == "cuda":
            facts = torch.cuda.get_device_properties(device)
            found |= {"units": facts.multi_processor_count, "capability": f"{facts.major}.{facts.minor}"}
        if ranks > 1:
            found["link"] = _link(ranks, device, dtype, clock)
            dist.destroy_process_group()
    return found


class Clock:
    """Times a call until it is known well enough."""

    def __init__(self, device: torch.device):
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any], enough: float = ENOUGH_S) -> float:
        """The median of batches of calls that together take long enough."""
        call()
        self.wait()
        begun = time.perf_counter()
        call()
        self.wait()
        once = max(1e-7, time.perf_counter() - begun)
        times = max(1, min(1000, int(enough / 5 / once)))
        return statistics.median(self._batch(call, times) for _ in range(5 if once < enough else 3))

    def _batch(self, call: Callable[[], Any], times: int) -> float:
        begun = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return (time.perf_counter() - begun) / times


class Cold:
    """Calls on one set of tensors after the other, their results kept for a while: so nothing is in a cache that
    would not
    be there in a model, whose weights and activations are many."""

    def __init__(self, copies: list[Call]):
        self.copies, self.results, self.next = copies, list[Any](), 0

    def __call__(self) -> None:
        self.next = (self.next + 1) % len(self.copies)
        self.results.append(self.copies[self.next]())
        if len(self.results) >= len(self.copies):
            del self.results[0]


Call = Callable[[], Any]
Timing = tuple[str, float, float, Callable[[], Call]]
"""Family, size of the curve, bytes of its tensors, and what makes them."""


def _calls(device: torch.device, dtype: torch.dtype) -> Iterator[Timing]:
    """All that is timed."""
    big = device.type == "cuda"
    item = torch.empty((), dtype=dtype).itemsize

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for m, k, n in PRODUCTS + (LARGE_PRODUCTS if big else ()):

        def product(m: int = m, k: int = k, n: int = n) -> Call:
            return partial(F.linear, random(m, k), random(n, k), random(n))

        yield GEMM, 2.0 * m * k * n, (m * k + n * k + m * n) * item, product
    for heads, tokens, size in ATTENTIONS + (LARGE_ATTENTIONS if big else ()):

        def attention(heads: int = heads, tokens: int = tokens, size: int = size) -> Call:
            q, k, v = (random(1, tokens, heads, size).transpose(1, 2) for _ in range(3))
            return partial(F.scaled_dot_product_attention, q, k, v)

        yield ATTENTION, 4.0 * heads * tokens**2 * size, 4 * heads * tokens * size * item, attention
    for channels, side in CONVOLUTIONS + (LARGE_CONVOLUTIONS if big else ()):

        def convolution(channels: int = channels, side: int = side) -> Call:
            x, weight = random(1, channels, side, side), random(channels, channels, 3, 3)
            return partial(F.conv2d, x, weight, padding=1)

        moved = (2 * channels * side**2 + 9 * channels**2) * item
        yield CONVOLUTION, 18.0 * channels**2 * side**2, moved, convolution
    for size in SIZES:
        rows = max(1, size // (2 * item * WIDTH))
        for family, make in POINTWISE.items():

            def pointwise(make: Callable[[Tensor], Call] = make, rows: int = rows) -> Call:
                return make(random(rows, WIDTH))

            yield family, float(size), size, pointwise


WIDTH = 256


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x[: max(1, len(x) // 2)]
    return half, half.clone()


POINTWISE: dict[str, Callable[[Tensor], Call]] = {
    "pointwise": lambda x: partial(torch.mul, x, x[:1].clone()),
    "add": lambda x: partial(torch.add, x, x[:1].clone()),
    "gelu": lambda x: partial(F.gelu, x, approximate="tanh"),
    "silu": lambda x: partial(F.silu, x),
    "native_layer_norm": lambda x: partial(F.layer_norm, x, (WIDTH,)),
    "native_group_norm": lambda x: partial(F.group_norm, x.view(1, WIDTH, -1, 1), 32),
    "cat": lambda x: partial(torch.cat, _halves(x), 1),
    "stack": lambda x: partial(torch.stack, _halves(x), -1),
    "pow": lambda x: partial(torch.pow, x, 2),
    "mean": lambda x: partial(torch.mean, x, -1, keepdim=True),
    "copy_": lambda x: partial(torch.clone, x),
    "_softmax": lambda x: partial(torch.softmax, x, -1),
}
"""By the names of torch's operators: what reads x and, mostly, writes as much."""


class _Layers(nn.Module):
    """As layers of models are written: modules in modules, small tensors."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        super().__init__()
        settings: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(16, elementwise_affine=False)
        self.first, self.second = nn.Linear(16, 16, **settings), nn.Linear(16, 16, **settings)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = self.norm(x) * (1 + scale[:, None]) + scale[:, None]
        y = self.second(self.act(self.first(y)))
        y = y.view(1, -1, 2, 8).transpose(1, 2).transpose(1, 2).reshape(1, -1, 16)
        return x + scale.unsqueeze(1) * y


OPERATORS = 18
"""That `_Layers` runs, views included, as a dispatch mode counts them."""


def _host_seconds(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """For an operator, with the Python around it."""
    layers = nn.ModuleList(_Layers(device, dtype) for _ in range(8))
    x, scale = torch.randn(1, 4, 16, device=device, dtype=dtype), torch.randn(1, 16, device=device, dtype=dtype)

    def run() -> None:
        y = x
        for layer in layers:
            y = layer(y, scale)

    return clock.seconds(run, 0.1) / (8 * OPERATORS)


def _link(ranks: int, device: torch.device, dtype: torch.dtype, clock: Clock) -> dict[str, float]:
    """Latency and rate of an all-to-all among all ranks, by a line through times of several sizes; of the slowest.

    Between exchanges ranks compute, as in a model: so the time that they are apart, and that what sends takes from what
    computes, is in it."""
    x, weight = (torch.randn(BETWEEN, BETWEEN, device=device, dtype=dtype) for _ in range(2))
    points: list[tuple[float, float, float]] = []
    for size in SENT:
        number = size // 4 // ranks * ranks
        sent = torch.ones(number, device=device)
        received = torch.empty_like(sent)

        def work() -> None:
            for _ in range(PRODUCTS_BETWEEN):
                F.linear(x, weight)

        def both(sent: Tensor = sent, received: Tensor = received) -> None:
            work()
            dist.all_to_all_single(received, sent)

        dist.barrier()
        alone = statistics.median(_each(work, clock) for _ in range(3))
        dist.barrier()
        together = statistics.median(_each(both, clock) for _ in range(3))
        points.append((size * (ranks - 1) / ranks, together - alone, together))
    latency, rate = fitted(points)
    slowest = torch.tensor([latency, -rate], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return {"latency_s": float(slowest[0]), "bytes_per_s": -float(slowest[1])}


def fitted(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """(latency in seconds, bytes a second) of exchanges: points are bytes that were moved, the seconds of the exchange,
    and those of all that was timed, from which what was computed is taken away.

    A line by least squares; each point counts as the error of its time, which grows with all that was timed. Beyond a
    few times what the fastest of all moved in its whole time, a rate can only be noise."""
    weights = [1 / whole**2 for _, _, whole in points]
    least = 1 / (MOST_FASTER * max(moved / whole for moved, _, whole in points))

    def mean(values: Iterable[float]) -> float:
        return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)

    moved, taken = mean(one[0] for one in points), mean(one[1] for one in points)
    spread = mean((one[0] - moved) ** 2 for one in points)
    slope = mean((one[0] - moved) * (one[1] - taken) for one in points) / spread if spread else 0.0
    latency = taken - slope * moved
    if latency < LEAST_LATENCY_S:  # the line through that latency
        latency = LEAST_LATENCY_S
        slope = mean(one[0] * (one[1] - latency) for one in points) / mean(one[0] ** 2 for one in points)
    if slope < least:
        slope = least
        latency = max(LEAST_LATENCY_S, taken - slope * moved)
    return latency, 1 / slope


MOST_FASTER = 2.0
LEAST_LATENCY_S = 1e-6
BETWEEN, PRODUCTS_BETWEEN, EXCHANGES = 256, 4, 8


def _each(call: Callable[[], None], clock: Clock) -> float:
    """Seconds of one of several calls in a row."""
    clock.wait()
    begun = time.perf_counter()
    for _ in range(EXCHANGES):
        call()
    clock.wait()
    return (time.perf_counter() - begun) / EXCHANGES
