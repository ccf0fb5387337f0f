"""What a real request takes, from the events of torch's own CPU allocator: every allocation and every release, those
inside of kernels too, on all threads. Nothing of the prediction is used but where phases begin."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from parafuse.engine.memory.fake_pipeline import components, nbytes
from parafuse.engine.memory.phases import PHASES, met

MARK = "phase:"


class Meter:
    """Bytes of torch's allocator, above what there was when this was made."""

    def __init__(self) -> None:
        # else the allocator counts on threads alone that are profiled, and gloo lets go of buffers on its own
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True
        gc.collect()  # what is let go of later counts as less than nothing
        with _watched() as seen:
            torch.empty(1)
        self._base = next(total - size for _, size, total in _events(seen) if isinstance(size, int))

    def peaks(self, pipeline: Any, run: Callable[[], Any]) -> dict[str, int]:
        """Phase -> the most bytes at a time while `run` calls the pipeline."""

        def enter(name: str, phase: str) -> Any:
            with record_function(MARK + phase):
                pass
            return list.pop

        with met(pipeline, enter), torch.no_grad(), _watched() as seen:
            run()
        phase, most, now = "", dict[str, int](), 0
        for _, what, total in _events(seen):
            if isinstance(what, str):
                phase = what
            else:
                now = total - self._base
            if phase:
                most[phase] = max(most.get(phase, 0), now)
        return {name: most[name] for name in PHASES if name in most}


def _watched() -> Any:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _events(seen: Any) -> list[tuple[int, str | int, int]]:
    """(time, the phase that begins or the bytes that are taken or given back, bytes in all), in order."""
    found: list[tuple[int, str | int, int]] = []
    for event in _walk(seen.profiler.kineto_results.experimental_event_tree()):
        facts = event.extra_fields
        if hasattr(facts, "alloc_size"):
            found.append((event.start_time_ns, facts.alloc_size, facts.total_allocated))
        elif event.name.startswith(MARK):
            found.append((event.start_time_ns, event.name.removeprefix(MARK), 0))
    return sorted(found, key=lambda event: event[0])


def _walk(events: Any) -> Iterator[Any]:
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        yield event
        waiting += event.children


def weights(pipeline: Any) -> dict[str, int]:
    """Component -> bytes of its parameters and buffers."""
    return {name: nbytes(part) for name, part in components(pipeline).items() if isinstance(part, nn.Module)}
