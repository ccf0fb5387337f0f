"""What a step has to compute and to move, by counting, and how fast this device does each alone: the least time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from parafuse.launch.bench.clock import wait


@dataclass
class Work:
    """Of one denoising step, all branches."""

    gemm: float = 0.0
    """Floating-point operations of matrix products and convolutions."""
    attention: float = 0.0
    bytes: float = 0.0
    """Read and written by products and attention, weights included; what lies between is taken as fused."""
    weights: float = 0.0
    """Of these, weights: all of a module's in each of its calls."""


@dataclass
class Rates:
    """Of one rank's device alone, in the model's dtype."""

    gemm: float
    """Floating-point operations a second."""
    attention: float
    bytes: float
    """Copied, read and written, a second."""


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """torch counts the CUDA kernels alone."""
    return sdpa_flop_count(query, key, value)


_CPU: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}


class _Moved(TorchDispatchMode):
    """Adds up the bytes of what products and attention take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry or func._overloadpacket in _CPU:
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        return out


@contextmanager
def counted(modules: list[Any]) -> Iterator[Work]:
    """Adds up the work of these modules' calls, as plain torch does them."""
    work, modes = Work(), list[Any]()

    def begin(*_: Any) -> None:
        modes[:] = [FlopCounterMode(display=False, custom_mapping=_CPU), _Moved()]
        for mode in modes:
            mode.__enter__()

    def end(module: Any, *_: Any) -> None:
        for mode in reversed(modes):
            mode.__exit__(None, None, None)
        flops, moved = modes
        for operator, number in flops.get_flop_counts()["Global"].items():
            if "attention" in str(operator):
                work.attention += number
            else:
                work.gemm += number
        work.bytes += moved.bytes
        work.weights += min(moved.bytes, sum(p.nbytes for p in module.parameters()))

    hooks = [hook for m in modules for hook in (m.register_forward_pre_hook(begin), m.register_forward_hook(end))]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measured here: a large product, an attention, a copy. Under two seconds."""
    big = device.type == "cuda"
    n, tokens = (8192, 16384) if big else (1024, 1024)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    q, k, v = torch.randn(3, 1, 16, tokens, 128 if big else 64, device=device, dtype=dtype)
    source = torch.randn((2**28 if big else 2**24), device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    attention = 4 * q.shape[1] * tokens**2 * q.shape[3]
    return Rates(
        gemm=2 * n**3 / _seconds(lambda: a @ b, device),
        attention=attention / _seconds(lambda: F.scaled_dot_product_attention(q, k, v), device),
        bytes=2 * source.nbytes / _seconds(lambda: target.copy_(source), device),
    )


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    found: list[float] = []
    for _ in range(7):
        wait(device)
        begun = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - begun)
    return statistics.median(found[2:])
