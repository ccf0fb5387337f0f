"""Sees ranks that live and get nowhere: how long each may stay where it is, by phase, from prediction and from what was
seen. Pure: it is told beats, and asked."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from parafuse.errors import ConfigError
from parafuse.launch.serve.messages import Beat

STARTING = "starting"
"""From the start of a process to its Hello, and from there to its first beat."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Of one phase, in seconds."""

    floor_s: float
    """A rank may always be so long without a move."""
    unseen_s: float
    """And so long where nothing is known of the phase yet."""


LIMITS: dict[str, Limit] = {
    STARTING: Limit(floor_s=120.0, unseen_s=120.0),
    "loading": Limit(floor_s=600.0, unseen_s=1800.0),
    "compiling": Limit(floor_s=600.0, unseen_s=1800.0),
    "encoding": Limit(floor_s=20.0, unseen_s=300.0),
    "denoising": Limit(floor_s=15.0, unseen_s=300.0),
    "decoding": Limit(floor_s=30.0, unseen_s=600.0),
    "writing": Limit(floor_s=30.0, unseen_s=300.0),
    "idle": Limit(floor_s=15.0, unseen_s=15.0),
}
"""Of denoising: one step."""
HEAVY = (STARTING, "loading", "compiling")
"""Phases of long calls that hold the interpreter, in which beats may stay away for a while, and which depend on no
call's sizes."""


@dataclass(frozen=True, kw_only=True)
class Stall:
    """A rank that gets nowhere."""

    rank: int
    phase: str
    seconds: float
    """Since it last got on; of one that does not beat: since its last beat."""
    limit_s: float
    beats: bool
    """False: it says nothing either, as a process that was stopped."""

    @property
    def summary(self) -> str:
        what = "made no progress" if self.beats else "given no sign of life"
        return (
            f"rank {self.rank} has {what} for {self.seconds:.1f} s ({self.phase}; the limit is {self.limit_s:.1f} s)."
        )


@dataclass
class _Rank:
    beat_at: float
    moved_at: float
    moves: int = -1
    phase: str = STARTING


@dataclass
class _Seen:
    """Of calls of one kind: by phase, the longest waits between moves lately."""

    lately_s: dict[str, deque[float]] = field(default_factory=dict)

    def note(self, phase: str, seconds: float, kept: int) -> None:
        self.lately_s.setdefault(phase, deque(maxlen=kept)).append(seconds)

    def slowest(self, phase: str) -> float | None:
        return max(self.lately_s[phase]) if self.lately_s.get(phase) else None


class Watchdog:
    """Of the ranks of this machine. One task uses it. `clock` gives seconds that only grow."""

    KEPT = 64
    """Waits that are remembered, of each phase of each kind of call."""
    KINDS = 256
    """Kinds of calls that are remembered."""

    def __init__(
        self,
        limits: Mapping[str, Limit] | None = None,
        *,
        factor: float = 4.0,
        silent_s: float = 8.0,
        heavy_silent_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`factor`: how many times the predicted or the slowest seen a rank may take. `silent_s`: how long it may give
        no sign of life; `heavy_silent_s`: in phases whose calls hold the interpreter."""
        self._limits = LIMITS | dict(limits or {})
        for phase, limit in self._limits.items():
            if not 0 < limit.floor_s <= limit.unseen_s:
                raise ConfigError(
                    f"limit of {phase!r}: {limit.floor_s} and {limit.unseen_s} s; both must be above 0, and the first "
                    "at most the second."
                )
        if factor < 1 or silent_s <= 0 or heavy_silent_s < silent_s:
            raise ConfigError(
                f"watchdog: {factor=}, {silent_s=}, {heavy_silent_s=}: must be at least 1, above 0, and no less."
            )
        self._factor, self._silent_s, self._heavy_silent_s = factor, silent_s, heavy_silent_s
        self._clock = clock
        self._ranks: dict[int, _Rank] = {}
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._kind = ""
        self._predicted: dict[str, float] = {}
        self._checked_at: float | None = None

    def begin(self) -> None:
        """A group was started; its ranks are not known yet."""
        self._ranks = {}
        self._checked_at = None
        self.call("")

    def hello(self, rank: int) -> None:
        """A rank is there; its first beat is to come."""
        now = self._clock()
        self._ranks[rank] = _Rank(now, now)

    def call(self, kind: str, predicted_s: Mapping[str, float] | None = None) -> None:
        """A call begins. `kind`: equal for calls that take as long (sizes, frames, batch). `predicted_s`: by phase, of
        denoising one step's."""
        self._kind, self._predicted = kind, dict(predicted_s or {})
        self._of(kind)
        while len(self._seen) > self.KINDS:
            self._seen.popitem(last=False)

    def beat(self, beat: Beat) -> None:
        """A rank says where it is."""
        now = self._clock()
        self._forgive(now)
        if beat.rank not in self._ranks:
            self.hello(beat.rank)
        rank = self._ranks[beat.rank]
        rank.beat_at = now
        if beat.moves == rank.moves and beat.phase == rank.phase:
            return
        if beat.phase == rank.phase and rank.moves >= 0:
            self._of(self._kind_of(beat.phase)).note(beat.phase, now - rank.moved_at, self.KEPT)
        rank.moves, rank.phase, rank.moved_at = beat.moves, beat.phase, now

    def limit_s(self, phase: str) -> float:
        """How long a rank may stay where it is in a phase of the present call."""
        limit = self._limits.get(phase, self._limits["encoding"])
        seen, predicted = self._of(self._kind_of(phase)).slowest(phase), self._predicted.get(phase)
        known = [seconds for seconds in (seen, predicted) if seconds is not None]
        return max([limit.floor_s, *(self._factor * s for s in known)]) if known else limit.unseen_s

    def stalled(self) -> Stall | None:
        """The rank that has been stuck longest beyond its limit: the others wait for it. To be asked often."""
        now = self._clock()
        self._forgive(now)
        found: list[Stall] = []
        for number, rank in self._ranks.items():
            limit_s = self.limit_s(rank.phase)
            silent_s = min(limit_s, self._heavy_silent_s if rank.phase in HEAVY else self._silent_s)
            is_silent = rank.phase != STARTING and now - rank.beat_at > silent_s
            if is_silent or now - rank.moved_at > limit_s:
                seconds, over_s = (now - rank.beat_at, silent_s) if is_silent else (now - rank.moved_at, limit_s)
                found.append(Stall(rank=number, phase=rank.phase, seconds=seconds, limit_s=over_s, beats=not is_silent))
        # One that says nothing first: those that still beat may only wait for it.
        return max(found, key=lambda one: (not one.beats, one.seconds), default=None)

    def _forgive(self, now: float) -> None:
        """Time in which this process itself did not run (stopped, or the machine asleep) counts for nobody: what the
        ranks said meanwhile has not been read yet."""
        gap = 0.0 if self._checked_at is None else now - self._checked_at
        self._checked_at = now
        if gap > self._silent_s / 4:
            for rank in self._ranks.values():
                rank.beat_at, rank.moved_at = min(now, rank.beat_at + gap), min(now, rank.moved_at + gap)

    def _kind_of(self, phase: str) -> str:
        return "" if phase in HEAVY or phase == "idle" else self._kind

    def _of(self, kind: str) -> _Seen:
        seen = self._seen.setdefault(kind, _Seen())
        self._seen.move_to_end(kind)
        return seen
