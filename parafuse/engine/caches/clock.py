"""Which step of how many a denoiser's call belongs to, as the pipeline's scheduler counts them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor

from parafuse.engine.host_times import host_times
from parafuse.parallel.hooks import override


class Clock:
    """Steps of the pipelines that share a denoiser, of which one runs at a time: evaluations of the denoiser at one
    point, so that a scheduler of second order has two in what it calls a step. Local. Of a bare model `step` is told by
    whoever sees its calls."""

    def __init__(self) -> None:
        self._targets: list[Any] = []
        """One for each handle; the same pipeline may be there twice."""
        self._running: Any = None
        """The pipeline whose loop began last, where that is known."""
        self.step = 0
        self.total: int | None = None
        self.loops = 0
        """That have begun."""
        self.samples: int | None = None
        """Samples that the scheduler steps at once: a batch of the denoiser has so many for each branch."""
        self.on_start: list[Callable[[], None]] = []
        """Called when a loop over steps begins, and when one has ended."""
        self._watched: list[_Watch] = []
        self.has_stepped = False
        """Whether the scheduler has, since the loop began."""
        self._is_open = False
        """Whether a denoiser was called since the scheduler last stepped: some pipelines step twice with one result."""

    def add(self, target: Any) -> None:
        """One more pipeline."""
        self._targets.append(target)
        self._see_to_schedulers()

    def drop(self, target: Any) -> None:
        """One pipeline less; schedulers that no other one has are let go."""
        place = next((i for i, one in enumerate(self._targets) if one is target), None)
        if place is not None:
            del self._targets[place]
        if not any(one is self._running for one in self._targets):
            self._running = None
        there = self._schedulers()
        for watch in [one for one in self._watched if not any(one.scheduler is other for other in there)]:
            watch.leave(self)
            self._watched.remove(watch)

    @property
    def counts(self) -> bool:
        """Whether there is a scheduler to count by."""
        return bool(self._schedulers())

    def look(self) -> None:
        """At the start of a call: sees to a scheduler that is new, and how many steps there are."""
        new = self._see_to_schedulers()
        if new:  # its loop has begun already
            self.started(new[0])
        self._is_open = True
        if self.step == 0:
            self.total = self._count()

    def start(self, target: Any = None) -> None:
        """A loop over steps begins, of that pipeline where it is known."""
        self.step, self.total, self.samples, self._running, self._is_open = 0, None, None, target, False
        self.has_stepped = False
        self.loops += 1
        self._tell()

    @contextmanager
    def anew(self, target: Any) -> Iterator[None]:
        """A loop over steps inside of another, which then goes on where it was."""
        before = (self.step, self.total, self.samples, self._running, self._is_open, self.has_stepped)
        self._see_to_schedulers()
        self.start(target)
        try:
            yield
        finally:
            self.step, self.total, self.samples, self._running, self._is_open, self.has_stepped = before

    def _tell(self) -> None:
        with ExitStack() as stack:  # all are told, also where one of them raises
            for told in reversed(self.on_start):
                stack.callback(told)

    def schedulers(self) -> list[Any]:
        """Of the pipeline whose loop began last, where that is known; else of all."""
        return self._schedulers() if self._running is None else schedulers_of(self._running)

    def _schedulers(self) -> list[Any]:
        found = [one for target in self._targets for one in schedulers_of(target)]
        return [one for i, one in enumerate(found) if not any(one is other for other in found[:i])]

    def _see_to_schedulers(self) -> list[Any]:
        """Watches those that are there; gives those that are new. One that was replaced may come back."""
        new = [one for one in self._schedulers() if not any(one is watch.scheduler for watch in self._watched)]
        for scheduler in new:
            watch: _Watch = getattr(vars(scheduler).get("step"), "watch", None) or _Watch(scheduler)
            watch.clocks.append(self)
            self._watched.append(watch)
        return new

    def ended(self, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        if not self._is_open or not self._owners(scheduler):
            return
        self._is_open = False
        self.step, self.has_stepped = self.step + 1, True
        sample = _named(type(scheduler).step, args, kwargs).get("sample")
        self.samples = len(sample) if isinstance(sample, Tensor) and sample.ndim else None
        if self.total is not None and self.step >= self.total:
            self._tell()  # nothing is kept beyond the last step

    def started(self, scheduler: Any, *_: Any, **__: Any) -> None:
        owners = self._owners(scheduler)
        if not owners:
            return  # it was replaced
        is_known = any(one is self._running for one in owners)
        self.start(self._running if is_known else owners[0] if len(owners) == 1 else None)

    def _owners(self, scheduler: Any) -> list[Any]:
        found = [target for target in self._targets if any(one is scheduler for one in schedulers_of(target))]
        return [one for i, one in enumerate(found) if not any(one is other for other in found[:i])]

    def _count(self) -> int | None:
        """Steps of the pipeline at hand, as it says itself; where several share a scheduler, as that says."""
        own: Any = getattr(self._running, "_num_timesteps", None)
        if isinstance(own, int) and own > 0:
            return own
        for scheduler in self.schedulers():
            times = getattr(scheduler, "timesteps", None)
            if times is not None and len(times):
                return len(times) - (getattr(scheduler, "begin_index", None) or 0)
        return None


def _named(method: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """By name, what a method of a class is called with."""
    return dict(zip(list(inspect.signature(method).parameters)[1:], args, strict=False)) | kwargs


def schedulers_of(target: Any) -> list[Any]:
    """Those of a pipeline: its `scheduler`, else all components that are one."""
    own = getattr(target, "scheduler", None)
    parts: dict[str, Any] = {} if own is not None else getattr(target, "components", None) or {}
    found = [own] if own is not None else list(parts.values())
    return [one for one in found if hasattr(one, "set_timesteps") and hasattr(one, "step")]


class _Watch:
    """What stands on one scheduler for all clocks that go by it."""

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self.clocks: list[Clock] = []
        self._undo = ExitStack()
        self._undo.enter_context(host_times(scheduler))  # it stands on the class's own methods only
        for name in ("step", "set_timesteps"):
            self._undo.callback(override(scheduler, name, self._telling(name)))

    def leave(self, clock: Clock) -> None:
        """Puts the scheduler back as it was, with the last clock."""
        self.clocks[:] = [one for one in self.clocks if one is not clock]
        if not self.clocks:
            self._undo.close()

    def _telling(self, name: str) -> Any:
        """The method as it stands, which tells the clocks first; a deep copy of the scheduler has it without that."""
        scheduler = self.scheduler
        before = vars(scheduler).get(name)

        @wraps(getattr(scheduler, name))  # pipelines look at its arguments
        def method(own: Any, *args: Any, **kwargs: Any) -> Any:
            if own is scheduler:
                for clock in list(self.clocks):
                    told = clock.ended if name == "step" else clock.started
                    told(scheduler, *args, **kwargs)
            run = getattr(type(own), name) if before is None else before.__func__
            return run(own, *args, **kwargs)

        vars(method)["watch"] = self
        return MethodType(method, scheduler)
