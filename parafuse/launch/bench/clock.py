"""Times of one request: each step by the device's own events where it has them, else by the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch


@dataclass
class Times:
    """Seconds."""

    total: float
    steps: list[float] = field(default_factory=list[float])
    """From the end of one step to the end of the next: one fewer than there are steps."""


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    paint: Callable[[dict[str, Any]], Any], call: dict[str, Any], device: torch.device, steps: bool
) -> tuple[Any, Times]:
    """(output, times) of one request. `steps`: whether the pipeline calls back at each step's end."""
    marks: list[Any] = []

    def mark(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())
        return values

    wait(device)
    begun = time.perf_counter()
    output = paint(call | {"callback_on_step_end": mark} if steps else call)
    wait(device)
    total = time.perf_counter() - begun
    pairs = list(pairwise(marks))
    if device.type == "cuda":
        return output, Times(total, [a.elapsed_time(b) / 1e3 for a, b in pairs])
    return output, Times(total, [b - a for a, b in pairs])
