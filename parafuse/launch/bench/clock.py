"""Times of one request: each step by the device's own events where it has them, else by the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

Instant = Any
"""A CUDA event, or seconds of the host's clock."""


@dataclass
class Times:
    """Seconds."""

    total: float
    steps: list[float] = field(default_factory=list[float])
    """From the end of one step to the end of the next; of a single step, from the denoiser's first call to its end."""
    number: int = 0
    """Of steps that the pipeline told of; 0: it does not."""


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> Instant:
    """This moment in the device's own order of work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(a: Instant, b: Instant) -> float:
    """The device must have come to both."""
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3


def timed(
    paint: Callable[[dict[str, Any]], Any],
    call: dict[str, Any],
    device: torch.device,
    *,
    steps: bool,
    first_step: Callable[[], Instant | None] = lambda: None,
) -> tuple[Any, Times]:
    """(output, times) of one request. `steps`: whether the pipeline calls back at each step's end; `first_step`: when
    the denoiser was first called, for requests of one step."""
    marks: list[Instant] = []

    def mark(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        marks.append(now(device))
        return values

    wait(device)
    begun = time.perf_counter()
    output = paint(call | {"callback_on_step_end": mark} if steps else call)
    wait(device)
    total = time.perf_counter() - begun
    number = len(marks)
    if number == 1:
        marks[:0] = [first for first in [first_step()] if first is not None]
    return output, Times(total, [seconds_between(a, b) for a, b in pairwise(marks)], number)
