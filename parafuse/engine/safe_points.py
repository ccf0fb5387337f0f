"""Step boundaries at which a request may be left, by all ranks together: the same step everywhere, or none.

One rank decides for boundary k + 1 when it passes boundary k, and says so in the store, under one key of the request.
The others read it there when they come to k + 1: on the host alone, one step after it was said, so nobody waits and no
device is synchronised. A request that is to stop stops at the next boundary but one at the latest.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor

from parafuse.engine.caches.clock import schedulers_of
from parafuse.errors import ConfigError, ParafuseError, RankError
from parafuse.log import note
from parafuse.parallel.hooks import override
from parafuse.parallel.placeholder import settled
from parafuse.parallel.world import LONGEST_PAUSE_S, World, wait_for

CALLBACK = "callback_on_step_end"


class StoppedError(ParafuseError):
    """The request was left at a step boundary, as it was asked to; on all ranks, which can go on with the next one."""

    def __init__(self, reason: str, boundary: int):
        super().__init__(f"stopped after step {boundary}: {reason}")
        self.boundary = boundary
        """From 1: the last step that was made."""
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """A step that has ended."""

    step: int
    """From 1."""
    num_steps: int | None
    """Of the loop at hand, as the pipeline or its scheduler counts them; None where neither does."""
    seconds: float
    """Since the boundary before; since the request began for the first one."""
    latents: Tensor | None
    """What the step has made, with its value on every rank; None where the pipeline does not show it."""
    scheduler: Any
    """That has made the step; None where the pipeline has none."""


OnStep = Callable[[Boundary], None]


class SafePoints:
    """Of one engine, on this rank. Every rank makes one, with the same `leader`, and enters the same requests."""

    def __init__(self, world: World, leader: int, asked: Callable[[], str]):
        """`leader`: the rank that decides. `asked`: there, why the request at hand is to stop; '' while it is not."""
        self._world, self._leader, self._asked = world, leader, asked
        self._number = 0
        """Of the request."""
        self._has_said = False
        self._leave: tuple[int, str] = (0, "")
        """What was decided last: a boundary, and why to leave there; '': go on."""

    @contextmanager
    def request(self, pipeline: Any, keywords: dict[str, Any], on_step: OnStep) -> Iterator[dict[str, Any]]:
        """Around one call of an engine; gives the keywords to call it with. `on_step` is told of each boundary on every
        rank, before it may be left.

        Steps are those that the pipeline's own callback tells, else those of its scheduler, whose `step` is replaced on
        the instance meanwhile; a line says where there is neither, so that none is told. Raises, out of the pipeline's
        call, StoppedError on all ranks, and RankError where the leader says nothing within the job's timeout."""
        self._number += 1
        passed = _Passed(self, pipeline, on_step)
        self._begin()
        if CALLBACK in inspect.signature(type(pipeline).__call__).parameters:
            if keywords.get(CALLBACK) is not None:
                raise ConfigError(f"{CALLBACK}: is given, and safe points are told by it; leave it out.")
            yield {**keywords, CALLBACK: passed.callback}
            return
        schedulers = schedulers_of(pipeline)
        if not schedulers and not self._has_said:
            self._has_said = True
            note(f"{type(pipeline).__name__} has neither {CALLBACK} nor a scheduler: its requests cannot be left")
        with ExitStack() as undo:
            for scheduler in schedulers:
                undo.callback(override(scheduler, "step", _telling(scheduler, passed.stepped)))
            yield keywords

    @property
    def _key(self) -> str:
        return f"{self._world.name}/leave/{self._number}"

    def _begin(self) -> None:
        self._leave = (0, "")
        if self._world.rank != self._leader:
            return
        if self._world.size > 1 and self._number > 2:  # all ranks are through with the one before the last
            self._world.store.delete_key(f"{self._world.name}/leave/{self._number - 2}")
        self._decide(1)

    def _decide(self, boundary: int) -> None:
        """On the leader: what is said of a boundary is never taken back."""
        self._leave = (boundary, " ".join(self._asked().split()))
        if self._world.size > 1:
            self._world.store.set(self._key, f"{boundary} {self._leave[1]}")

    def passes(self, boundary: int) -> None:
        """Raises StoppedError where this boundary is the one to leave at."""
        if self._world.rank != self._leader:
            self._hear(boundary)
        decided, reason = self._leave
        if reason and decided == boundary:
            raise StoppedError(reason, boundary)
        if self._world.rank == self._leader:
            self._decide(boundary + 1)

    def _hear(self, boundary: int) -> None:
        """Waits for word of a boundary. The leader may be further: then it has gone on here."""
        world, deadline = self._world, time.monotonic() + self._world.timeout_s
        known, pause_s = wait_for(world.store, self._key, deadline, world.watch), 0.0005
        while known:
            decided, _, reason = world.store.get(self._key).decode().partition(" ")
            self._leave = (int(decided), reason)
            if self._leave[0] >= boundary:
                return
            known = time.monotonic() < deadline
            if world.watch is not None:
                world.watch()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise RankError(
            f"rank {self._leader} did not say whether to go on after step {boundary} within {world.timeout_s:.0f} s."
        )


class _Passed:
    """The boundaries of one request."""

    def __init__(self, points: SafePoints, pipeline: Any, on_step: OnStep):
        self._points, self._pipeline, self._on_step = points, pipeline, on_step
        self._step, self._last = 0, time.perf_counter()

    def callback(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's own, after each step."""
        self._passes(tensors.get("latents"), getattr(pipeline, "scheduler", None))
        return tensors

    def stepped(self, scheduler: Any, result: Any) -> None:
        """A scheduler has made a step."""
        first = result[0] if isinstance(result, tuple) and result else getattr(result, "prev_sample", None)
        self._passes(first, scheduler)

    def _passes(self, latents: Any, scheduler: Any) -> None:
        latents = settled(latents)  # on all ranks: it may be an exchange
        now = time.perf_counter()
        self._step, seconds, self._last = self._step + 1, now - self._last, now
        self._on_step(
            Boundary(
                step=self._step,
                num_steps=_num_steps(self._pipeline, scheduler),
                seconds=seconds,
                latents=latents if isinstance(latents, Tensor) else None,
                scheduler=scheduler,
            )
        )
        self._points.passes(self._step)


def _num_steps(pipeline: Any, scheduler: Any) -> int | None:
    own: Any = getattr(pipeline, "_num_timesteps", None)
    if isinstance(own, int) and own > 0:
        return own
    times = getattr(scheduler, "timesteps", None)
    return None if times is None or not len(times) else len(times) - (getattr(scheduler, "begin_index", None) or 0)


def _telling(scheduler: Any, tell: Callable[[Any, Any], None]) -> Any:
    """The scheduler's step as it stands, which tells of its result; a deep copy of the scheduler does not."""
    before = vars(scheduler).get("step")

    @wraps(scheduler.step)  # pipelines look at its arguments
    def step(own: Any, *args: Any, **kwargs: Any) -> Any:
        run = type(own).step if before is None else before.__func__
        result = run(own, *args, **kwargs)
        if own is scheduler:
            tell(scheduler, result)
        return result

    return MethodType(step, scheduler)
