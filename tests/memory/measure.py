"""What a real request takes, from the events of torch's own CPU allocator: every allocation and every release, those
inside of kernels too. Nothing of the prediction is used but where phases begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from parafuse.engine.memory.fake_pipeline import components, nbytes
from parafuse.engine.memory.phases import PHASES, met

MARK = "phase:"


def peaks(pipeline: Any, run: Callable[[], Any]) -> dict[str, int]:
    """Phase -> the most bytes at a time while `run` calls the pipeline, above what was there before."""

    def enter(name: str, phase: str) -> Callable[[Any], Any]:
        with record_function(MARK + phase):
            pass
        return lambda result: result

    with met(pipeline, enter), torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()  # pyright: ignore
    found: list[tuple[int, str | int]] = []
    for event in events:
        if event.name() == "[memory]":
            found.append((event.start_ns(), event.nbytes()))
        elif event.name().startswith(MARK):
            found.append((event.start_ns(), event.name().removeprefix(MARK)))
    return _by_phase(sorted(found, key=lambda pair: pair[0]))


def _by_phase(events: list[tuple[int, str | int]]) -> dict[str, int]:
    phase, now, most = "", 0, dict[str, int]()
    for _, what in events:
        if isinstance(what, str):
            phase = what
        else:
            now += what
        if phase:
            most[phase] = max(most.get(phase, 0), now)
    return {name: most[name] for name in PHASES if name in most}


def weights(pipeline: Any) -> dict[str, int]:
    """Component -> bytes of its parameters and buffers."""
    return {name: nbytes(part) for name, part in components(pipeline).items() if isinstance(part, nn.Module)}
