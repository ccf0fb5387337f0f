"""When a group of ranks that was lost is started again, and on which devices: by rates, never for good, never at once
for ever. Pure: it is told what happened, and asked."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parafuse.errors import ConfigError


class Budget:
    """At most `limit` losses in `window_s` are answered at once; after each further one the next start waits, twice as
    long each time up to `longest_wait_s`, with an alarm, until a group has lasted for `window_s`."""

    def __init__(
        self,
        *,
        limit: int = 5,
        window_s: float = 300.0,
        first_wait_s: float = 5.0,
        longest_wait_s: float = 240.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        if limit < 1 or window_s <= 0 or not 0 < first_wait_s <= longest_wait_s:
            raise ConfigError(
                f"budget: {limit=}, {window_s=}, {first_wait_s=}, {longest_wait_s=}: must be at least 1, above 0, "
                "above 0, and no less than that."
            )
        self._limit, self._window_s = limit, window_s
        self._first_wait_s, self._longest_wait_s = first_wait_s, longest_wait_s
        self._clock = clock
        self._losses: deque[float] = deque(maxlen=limit + 1)
        self._over = 0

    def lost(self, *, ready_s: float = 0.0) -> float:
        """A group was lost that had been ready for `ready_s`; how many seconds to wait before the next start."""
        now = self._clock()
        if ready_s >= self._window_s:
            self._over = 0
            self._losses.clear()
        self._losses.append(now)
        lately = sum(now - at <= self._window_s for at in self._losses)
        if self._over or lately > self._limit:
            self._over += 1
        if not self._over:
            return 0.0
        return min(self._longest_wait_s, self._first_wait_s * 2.0 ** min(self._over - 1, 32))

    def lasted(self, ready_s: float) -> None:
        """The present group has been ready for so long: the alarm ends when that is long enough."""
        if ready_s >= self._window_s:
            self._over = 0

    @property
    def alarm(self) -> bool:
        """Whether losses come faster than the budget allows."""
        return self._over > 0


@dataclass(frozen=True, kw_only=True)
class PutAside:
    """A device that is not used for a while."""

    device: str
    failures: int
    seconds: float
    """For how long, while enough others are left."""

    @property
    def summary(self) -> str:
        return f"device {self.device} is put aside for {self.seconds / 60:.0f} min: {self.failures} losses began there."


class Devices:
    """Which of a machine's devices a group uses. A loss is charged to those of the rank that failed first; `limit`
    within `window_s` put a device aside for `aside_s`, as long as enough others are left."""

    def __init__(
        self,
        names: Sequence[str],
        needed: int,
        *,
        per_rank: int = 1,
        limit: int = 3,
        window_s: float = 900.0,
        aside_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`names`: all that may be used; none on a CPU. `needed`: for a group, `per_rank` for each of its ranks. Raises
        ConfigError where there are too few."""
        if names and len(names) < needed:
            raise ConfigError(f"ranks: need {needed} devices; this machine has {len(names)} ({', '.join(names)}).")
        if len(set(names)) != len(names):
            raise ConfigError(f"devices={list(names)}: one is named twice.")
        self._names, self._needed, self._per_rank = list(names), needed, per_rank
        self._limit, self._window_s, self._aside_s = limit, window_s, aside_s
        self._clock = clock
        self._losses: dict[str, deque[float]] = {name: deque(maxlen=limit) for name in names}
        self._until: dict[str, float] = {}
        self._used: list[str] = []

    def choose(self) -> list[str]:
        """Those for the next start, in the order of the ranks."""
        now = self._clock()
        for name in [name for name, until in self._until.items() if until <= now]:
            self._take_back(name)
        self._used = [name for name in self._names if name not in self._until][: self._needed]
        return list(self._used)

    def charge(self, local_rank: int) -> list[PutAside]:
        """A loss began at this rank; the devices that are put aside for it now."""
        now = self._clock()
        out: list[PutAside] = []
        for name in self._used[local_rank * self._per_rank : (local_rank + 1) * self._per_rank]:
            losses = self._losses[name]
            losses.append(now)
            if len(losses) < self._limit or now - losses[0] > self._window_s or name in self._until:
                continue
            if len(self._names) - len(self._until) - 1 < self._needed:
                continue  # all that are left are needed: the budget slows the restarts down
            self._until[name] = now + self._aside_s
            out.append(PutAside(device=name, failures=len(losses), seconds=self._aside_s))
        return out

    @property
    def put_aside(self) -> tuple[str, ...]:
        return tuple(self._until)

    def _take_back(self, name: str) -> None:
        del self._until[name]
        self._losses[name].clear()
