"""When parts of blocks are computed: by step and kind of part alone, so that every rank and every layout agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from parafuse.cache import Cache, FasterCache, ForaCache, PartCache, PyramidAttentionBroadcast, TGateCache

SELF, TEMPORAL, CROSS, FEED_FORWARD = "self-attention", "temporal attention", "cross-attention", "feed-forward"


class Schedule(Protocol):
    """Of one cache; holds no state."""

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of part that are ever reused."""
        ...

    @property
    def depth(self) -> int:
        """How many outputs of a part are kept."""
        ...

    def reuses(self, kind: str, step: int, total: int | None) -> bool:
        """Whether parts of a kind are reused in a step, where something is kept of them."""
        ...

    def slope(self, step: int, total: int | None) -> float:
        """What of the difference between the last two outputs is added to the last one."""
        ...

    @property
    def every_branch(self) -> int:
        """All branches of guidance are computed in one step of so many."""
        ...

    def leads_only(self, step: int, total: int | None) -> bool:
        """Whether a step computes one branch and makes the others from it."""
        ...


@dataclass(frozen=True)
class Intervals:
    """Computes one step in so many of each kind, counted from the last step of the warm-up; where branches are made
    from one of them, from the last step that computed all."""

    every: Mapping[str, int]
    warmup_steps: int
    final_steps: int
    weight: float = 0.0
    every_branch: int = 1

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(kind for kind, every in self.every.items() if every > 1)

    @property
    def depth(self) -> int:
        return 2 if self.weight else 1

    def reuses(self, kind: str, step: int, total: int | None) -> bool:
        if kind not in self.kinds or not self._is_on(step, total):
            return False
        if self.every_branch == 1:
            return self._since_warm_up(step) % self.every[kind] != 0
        return self.leads_only(step, total) and self._since_warm_up(step) % self.every_branch % self.every[kind] != 0

    def leads_only(self, step: int, total: int | None) -> bool:
        return self._is_on(step, total) and self._since_warm_up(step) % self.every_branch != 0

    def _is_on(self, step: int, total: int | None) -> bool:
        return step >= self.warmup_steps and (total is None or step < total - self.final_steps)

    def _since_warm_up(self, step: int) -> int:
        return step - max(self.warmup_steps - 1, 0)

    def slope(self, step: int, total: int | None) -> float:
        return self.weight * (step / total if total else 0.5)


@dataclass(frozen=True)
class Gate:
    """Computes one kind in the first steps only."""

    steps: int
    kinds: frozenset[str] = frozenset({CROSS})
    depth: int = 1
    every_branch: int = 1

    def leads_only(self, step: int, total: int | None) -> bool:
        return False

    def reuses(self, kind: str, step: int, total: int | None) -> bool:
        return kind in self.kinds and step >= self.steps

    def slope(self, step: int, total: int | None) -> float:
        return 0.0


def schedule_of(cache: Cache) -> Schedule:
    """The schedule of a cache that reuses parts."""
    if isinstance(cache, TGateCache):
        return Gate(cache.steps)
    every: dict[str, int] = {}
    weight, every_branch = 0.0, 1
    if isinstance(cache, PyramidAttentionBroadcast):
        every = {SELF: cache.spatial, TEMPORAL: cache.temporal, CROSS: cache.cross}
    elif isinstance(cache, ForaCache):
        every = dict.fromkeys((SELF, TEMPORAL, CROSS), cache.every)
        every[FEED_FORWARD] = cache.every if cache.feed_forward is None else cache.feed_forward
    elif isinstance(cache, FasterCache):
        every, weight = {SELF: cache.every, TEMPORAL: cache.every}, cache.weight
        every_branch = cache.unconditional
    if not isinstance(cache, PartCache) or not every:
        raise TypeError(f"{type(cache).__name__}: has no schedule; a new cache needs one here")
    return Intervals(every, cache.warmup_steps, cache.final_steps, weight, every_branch)


def is_kept(schedule: Schedule, kind: str, step: int, total: int | None) -> bool:
    """Whether what a part gives in a step is of any use soon: a branch that ends leaves nothing behind for long."""
    return any(schedule.reuses(kind, one, total) for one in range(step, step + schedule.depth + 1))
