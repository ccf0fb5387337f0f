"""Where a step's time goes, from one step under torch's profiler, after timing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from parafuse.launch.bench.clock import wait

KINDS: dict[str, tuple[str, ...]] = {
    "communication": ("nccl", "gloo:", "c10d::", "all_to_all", "all_gather", "all_reduce", "allgather", "alltoall"),
    "attention": ("scaled_dot_product", "flash", "fmha", "attention"),
    "GEMM": ("mm", "gemm", "conv", "cutlass", "nvjet", "cublas"),
}
"""Words in the names of operators and kernels, looked for in this order; what has none is pointwise."""
OPERATORS = ("aten::", "c10d::", "gloo:", "mkldnn", "parafuse::", "graph", "cpp_")
"""How the names of what computes on a CPU begin; the rest is Python, and belongs to the host."""
Paint = Callable[[dict[str, Any]], Any]


def kind_of(name: str) -> str:
    """What an operator or kernel does, by its name."""
    lowered = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lowered for word in words)), "pointwise")


def shares(paint: Paint, call: dict[str, Any], device: torch.device, *, steps: bool) -> tuple[dict[str, float], int]:
    """(kind -> share of the second step's time, exchanges seen in it); of the request without `steps`."""
    on_gpu = device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
    span = torch.profiler.record_function("the step")

    def begin() -> None:
        wait(device)
        profiler.__enter__()
        span.__enter__()

    def end() -> None:
        wait(device)
        span.__exit__(None, None, None)
        profiler.__exit__(None, None, None)

    def mark(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step < 2:
            (begin, end)[step]()
        return values

    if steps:
        paint(call | {"callback_on_step_end": mark})
    else:
        begin()
        paint(call)
        end()
    return _sums(profiler.key_averages(), on_gpu)


def _sums(events: Any, on_gpu: bool) -> tuple[dict[str, float], int]:
    whole = max((event.cpu_time_total for event in events if event.key == "the step"), default=0.0)
    found: dict[str, float] = dict.fromkeys(("GEMM", "attention", "pointwise", "communication"), 0.0)
    exchanges = 0
    for event in events:
        computes = on_gpu or event.key.startswith(OPERATORS)
        if event.key == "the step" or not computes or not whole:
            continue
        kind = kind_of(event.key)
        found[kind] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / whole
        exchanges += event.count if kind == "communication" else 0
    return found | {"host": max(0.0, 1.0 - sum(found.values()))}, exchanges
