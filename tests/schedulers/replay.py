"""What a pipeline asks of its scheduler, recorded once and asked again on a device that is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.schedulers.hosts import HOSTS
from tests.schedulers.meter import DEVICE, HostMeter, OnDevice
from tests.schedulers.placed import Use

METHODS = ("set_timesteps", "set_begin_index", "scale_model_input", "step")
SEED = 5


class Place:
    """A timestep by its place in the schedule."""

    def __init__(self, index: int):
        self.index = index


@cache
def built(host: str) -> Any:
    return HOSTS[host].build()


def recorded(use: Use) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """(method, arguments, keywords) of every call that the use's pipeline makes; tensors are copies."""
    pipeline, calls = built(use.host), list[Any]()
    pipeline.scheduler = scheduler = use.made()

    def kept(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        times: Any = getattr(scheduler, "timesteps", None)
        is_time = isinstance(times, Tensor) and value.dim() == 0 and shares_storage(value, times)
        return Place(int(value.storage_offset())) if is_time else value.clone()

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)  # pipelines look at its arguments
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, *tree_map(kept, (args, kwargs))))
            return method(*args, **kwargs)

        return call

    for name in METHODS:
        if hasattr(scheduler, name):
            setattr(scheduler, name, watched(name, getattr(scheduler, name)))
    pipeline(**use.keywords(), generator=torch.Generator("cpu").manual_seed(SEED))
    return calls


def shares_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


@dataclass
class Replay:
    """One request's calls of a scheduler, on the device."""

    waits: list[Counter[str]] = field(default_factory=list[Counter[str]])
    """Of each step after the first of a schedule."""
    samples: list[Tensor] = field(default_factory=list[Tensor])
    """What the steps gave."""

    def most(self, kind: str) -> int:
        return max(step[kind] for step in self.waits)


def replayed(use: Use, change: Callable[[Any], AbstractContextManager[Any]] | None = None) -> Replay:
    """The calls of a use's pipeline with all that is given on the device; `change` is a context of the scheduler."""
    scheduler, found = use.made(), Replay()

    def placed(value: Any) -> Any:
        if isinstance(value, Place):
            return scheduler.timesteps[value.index]
        if isinstance(value, Tensor):
            return OnDevice(value.clone())
        if isinstance(value, torch.Generator):
            return torch.Generator("cpu").manual_seed(SEED)
        return DEVICE if isinstance(value, torch.device) else value

    calls = recorded(use)
    torch.manual_seed(SEED)
    is_first = True
    with HostMeter() as meter, change(scheduler) if change else nullcontext():
        for name, args, kwargs in calls:
            given_args, given_kwargs = tree_map(placed, (args, kwargs))
            given = getattr(scheduler, name)(*given_args, **given_kwargs)
            if name == "step":
                found.waits += [] if is_first else [Counter(meter.waits)]
                found.samples.append(given[0].held if isinstance(given, tuple) else given.prev_sample.held)
            is_first = name == "set_timesteps" or (is_first and name != "step")
            if name != "scale_model_input":  # it is a part of the step that comes
                meter.waits.clear()
    return found
