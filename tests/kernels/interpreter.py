"""Runs Triton kernels without a GPU, in a process of its own, whose environment tells Triton to interpret them.

Triton's interpreter truncates where a GPU rounds (fp32 to bf16, fp32 to fp8), so conversions are torch's here. Products
and sums of bf16 are wrong in it too: kernels cast what they load to fp32 first.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

NAMES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2,
}  # fmt: skip
BITS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}
HAS_TRITON = importlib.util.find_spec("triton") is not None


def convert(x: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """Bits of one float format as those of another, rounded to nearest; fp8 saturates, as it does on a GPU."""
    bits = np.ascontiguousarray(x).view(getattr(np, f"uint{source.primitive_bitwidth}"))
    values = torch.from_numpy(bits.copy()).view(NAMES[source.name])
    if "fp8" in target.name:
        largest = torch.finfo(NAMES[target.name]).max
        values = values.float().clamp(-largest, largest)
    return values.to(NAMES[target.name]).view(BITS[target.primitive_bitwidth]).numpy().reshape(x.shape)


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    interpreter._convert_float = convert


class Interpreter:
    """One such process, started at the first call."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start)

    def __call__(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> Any:
        """`function(*args)`; a module-level one, which imports the kernels itself."""
        return self._pool.submit(function, *args).result(timeout_s)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
