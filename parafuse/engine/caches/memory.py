"""What a cache keeps while a request runs: what each branch of guidance left, and what was decided."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from parafuse.engine.caches.forecast import Residual, chosen
from parafuse.engine.caches.guided import Guided
from parafuse.engine.caches.rules import Sample
from parafuse.engine.caches.streams import Seen
from parafuse.engine.caches.units import Span
from parafuse.parallel.branches import Branches


@dataclass(frozen=True)
class Decision:
    """Of one sample in one call."""

    skipped: bool
    change: float | None = None
    """What was measured and held against the threshold; None: nothing was."""


@dataclass
class Kept:
    """Of one branch."""

    rows: tuple[int, ...] = ()
    """The samples it has, as places in the whole batch."""
    sizes: Any = None
    """Shapes of the arguments of the first unit, but for their samples."""
    seen: list[Seen] = field(default_factory=list[Seen])
    """The units of the last computed call, in order; empty before the first."""
    span: Span | None = None
    entered: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """Where the stack may start -> the stream that came there in the first call; until the second one has told which
    of these the sample has reached."""
    residuals: dict[int, Residual] = field(default_factory=dict[int, Residual])
    """Leaf of the last unit's result -> what the skipped part adds to it."""
    reference: Tensor | None = None
    """What changes are measured against: this rank's share of each sample's numbers, a row for each."""
    samples: list[Sample] = field(default_factory=list[Sample])
    as_one: bool = False
    """Streams do not tell samples apart (frames of a video, which mix), so that all are decided about together."""

    @property
    def nbytes(self) -> int:
        reference = self.reference.nbytes if self.reference is not None else 0
        return reference + sum(one.nbytes for one in self.residuals.values())

    def narrow(self, rows: tuple[int, ...]) -> bool:
        """Keeps these samples alone; False where it has not all of them."""
        if rows == self.rows:
            return True
        if not set(rows) <= set(self.rows) or self.as_one:
            return False
        places, of = [self.rows.index(row) for row in rows], len(self.rows)
        for residual in self.residuals.values():
            residual.narrow(places, of)
        for place, x in self.entered.items():
            self.entered[place] = chosen(x, places, of)
        self.seen = [one.narrow(len(places), of) for one in self.seen]
        if self.reference is not None:
            self.reference = self.reference[places]
        self.samples = [self.samples[place] for place in places]
        self.rows = rows
        return True


@dataclass
class Memory:
    """Of one request on one denoiser. Nothing of it outlives the request."""

    told: Branches
    """Which branch a call is."""
    calls: list[int] = field(default_factory=list[int])
    """Branch by call of this request so far, made here or on other ranks."""
    branches: dict[int, Any] = field(default_factory=dict[int, Any])
    """Branch -> what is kept of it; each method keeps something else, which has `nbytes`."""
    decisions: dict[int, dict[int, Decision]] = field(default_factory=dict[int, dict[int, Decision]])
    """Number of the call -> place of the sample in the whole batch -> what was decided; of calls made here."""
    steps: dict[int, int] = field(default_factory=dict[int, int])
    """Number of the call -> its step."""
    guided: Guided = field(default_factory=Guided)
    point: tuple[int, int] = (-1, -1)
    """The loop and step of the last call."""
    numbers: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    """(branch, how often it was called in a step before) -> its number here: a pipeline that paints several views with
    one prompt calls one branch for each of them, always in the same order."""
    _often: Counter[int] = field(default_factory=Counter[int])
    most_bytes: int = 0
    waits: int = 0
    """How often the host waited for the device for a decision."""

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self.branches.values()) + self.guided.nbytes

    def drop(self) -> None:
        """Lets go of all that is kept."""
        self.branches.clear()
        self.guided = Guided()

    def at(self, point: tuple[int, int]) -> bool:
        """A call is made at that loop and step; whether it is the first one there."""
        is_first, self.point = point != self.point, point
        if is_first:
            self._often.clear()
        return is_first

    def branch(self, number: int) -> int:
        """What a call's branch is known by here. What was kept under numbers that no branch has any more is dropped."""
        key = (number, self._often[number])
        self._often[number] += 1
        alive = self.told.alive
        for dead in [known for known, own in self.numbers.items() if known[0] not in alive and own in self.branches]:
            del self.branches[self.numbers[dead]]
        return self.numbers.setdefault(key, len(self.numbers))
