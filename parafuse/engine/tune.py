"""Times attention backends on the calls of a model, or on shapes that are given, and says which is fastest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parafuse.attention import Row
from parafuse.engine.stack import attending_parts
from parafuse.errors import ConfigError, is_out_of_memory
from parafuse.kernels.attention import Call
from parafuse.kernels.backends import REGISTRY
from parafuse.kernels.registry import facts_of
from parafuse.parallel.attention_mode import AttentionMode
from parafuse.parallel.hooks import Forward, override_forward

WARM_UP = 2
"""Calls before the first that is timed: kernels are compiled and chosen in these."""
ERROR_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Relative root mean square error against torch's own choice, beyond which a backend is wrong and not timed."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One kind of attention call: q (B, H, S, D), k and v (B, H, N, D)."""

    batch: int
    heads: int
    rows: int
    keys: int
    head_size: int
    mask: str = ""
    """"" for none, "bool" or "bias": over keys."""
    is_causal: bool = False
    with_lse: bool = False

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads}x{self.rows}x{self.keys}x{self.head_size}"

    @classmethod
    def of(cls, text: str) -> Shape:
        """From BxHxSxD, or BxHxSxNxD. Raises ConfigError for what is none."""
        parts = text.lower().split("x")
        if len(parts) not in (4, 5) or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ConfigError(
                f"--shape {text!r}: must be batch x heads x rows x head size, as 1x24x4608x128, or with the number of "
                "keys before the head size, as 1x24x4608x512x128."
            )
        numbers = [int(part) for part in parts]
        batch, heads, rows, keys, size = numbers if len(numbers) == 5 else (*numbers[:3], *numbers[2:])
        return cls(batch=batch, heads=heads, rows=rows, keys=keys, head_size=size)

    def on_rank(self, ulysses: int, ring: int) -> Shape:
        """What one rank of several computes at a time: a part of the heads, or of rows and keys with a log-sum-exp."""
        return replace(
            self,
            heads=-(-self.heads // ulysses),
            rows=-(-self.rows // ring),
            keys=-(-self.keys // ring),
            with_lse=self.with_lse or ring > 1,
        )

    def row(self, dtype: str, seconds: dict[str, float]) -> Row:
        return Row(
            dtype=dtype,
            head_size=self.head_size,
            mask=self.mask,
            is_causal=self.is_causal,
            with_lse=self.with_lse,
            shape=str(self),
            pairs=self.rows * self.keys,
            seconds=seconds,
        )


def shapes_in(modules: Iterable[nn.Module], run: Callable[[], Any]) -> list[Shape]:
    """The kinds of attention call that denoisers make in `run`, the most work first."""
    found: dict[Shape, int] = {}

    def attend(site: int, q: Tensor, k: Tensor, v: Tensor, call: Call, given: dict[str, Any]) -> Tensor:
        if q.ndim == k.ndim == v.ndim == 4:
            mask = "" if call.mask is None else "bool" if call.mask.dtype == torch.bool else "bias"
            sizes = dict(zip(("batch", "heads", "rows", "head_size"), q.shape, strict=True))
            shape = Shape(**sizes, keys=k.shape[2], mask=mask, is_causal=call.is_causal)
            found[shape] = found.get(shape, 0) + 1
        return F.scaled_dot_product_attention(**given)

    def watched(original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with AttentionMode(attend):
                return original(*args, **kwargs)

        return forward

    undo = [override_forward(part, watched) for module in modules for part in attending_parts(module)]
    try:
        run()
    finally:
        for one in reversed(undo):
            one()
    return sorted(found, key=lambda one: -found[one] * one.batch * one.heads * one.rows * one.keys * one.head_size)


@dataclass(frozen=True)
class Timed:
    """What came out for one shape."""

    row: Row
    """With the medians of all backends that computed it rightly."""
    refused: dict[str, str]
    """Backend -> why it was not timed."""
    errors: dict[str, float]
    """Backend -> relative root mean square difference from torch's own choice."""


def time_backends(shape: Shape, *, dtype: torch.dtype, device: str, rounds: int) -> Timed:
    """Every backend that can, in turns; medians. Local."""
    generator = torch.Generator().manual_seed(0)
    size = shape.batch, shape.heads
    try:
        q, k, v = (
            torch.randn(*size, number, shape.head_size, generator=generator).to(device, dtype)
            for number in (shape.rows, shape.keys, shape.keys)
        )
    except RuntimeError as error:
        raise ConfigError(f"--shape {shape}: is too large for this machine ({_first_line(error)}).") from error
    mask = _mask(shape, dtype, device, generator)
    facts = facts_of(q, k, v, mask, is_causal=shape.is_causal, needs_lse=shape.with_lse)
    refused = {name: one.refusal(facts) for name, one in REGISTRY.backends.items()}
    able = {name: one for name, one in REGISTRY.backends.items() if not refused[name]}
    runs = {name: _ready(one.run, q, k, v, mask, shape) for name, one in able.items()}
    first = next(name for name in ("torch", *REGISTRY.own) if name in runs)
    wanted, errors = runs[first]().float(), dict[str, float]()
    for name in list(runs):
        try:
            for _ in range(WARM_UP - 1):
                runs[name]()
            found = runs[name]().float()
        except Exception as error:  # whatever a package's kernel may say
            refused[name] = "ran out of memory" if is_out_of_memory(error) else f"failed ({_first_line(error)})"
            del runs[name]
            continue
        errors[name] = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not able[name].lossy and errors[name] > ERROR_LIMIT.get(dtype, 1e-4):
            refused[name] = f"gives something else (relative error {errors[name]:.1e})"
            del runs[name]
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(_seconds(run, device))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    return Timed(shape.row(str(dtype).removeprefix("torch."), medians), {k: v for k, v in refused.items() if v}, errors)


def _ready(run: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shape: Shape) -> Callable[[], Tensor]:
    scale = shape.head_size**-0.5
    return lambda: run(q, k, v, mask, scale, shape.is_causal)[0]


def _mask(shape: Shape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor | None:
    if not shape.mask:
        return None
    keep = torch.rand(shape.batch, 1, 1, shape.keys, generator=generator) < 0.9
    keep[..., 0] = True
    if shape.mask == "bool":
        return keep.to(device)
    return torch.zeros(keep.shape).masked_fill(~keep, -torch.inf).to(device, dtype)


def _seconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
