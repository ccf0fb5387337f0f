"""When a stack is skipped: one small class for each rule. Pure: what was measured comes in, a decision goes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, Protocol

from parafuse.cache import StackCache


class Measures(Enum):
    """What a rule has measured in a call before it decides."""

    NOTHING = "nothing"
    RESIDUAL = "residual"
    """Of the first blocks, against that of the last computed step."""
    INPUT = "input"
    """Of the first block, as it is modulated, against that of the step before."""


@dataclass(frozen=True)
class Moment:
    """Where in a request a call is."""

    step: int
    total: int | None
    """Steps in all, where it is known."""
    place: int = 0
    """Of the call's branch among the calls of a step."""


@dataclass(frozen=True)
class Sample:
    """What a rule remembers of one sample of a branch since its last computed step."""

    skips: int = 0
    """In a row, until now."""
    level: float = 0.0
    """What is held against the threshold."""
    magnitude: float = 1.0
    """Of the residual, over that of the last computed step, as it was measured beforehand."""


class Rule(Protocol):
    """Of one cache; holds no state."""

    measures: ClassVar[Measures]

    @property
    def threshold(self) -> float | None:
        """What a sample's level is held against; None: nothing is."""
        ...

    def weigh(self, moment: Moment, change: float, sample: Sample) -> Sample:
        """The sample with this step taken in, as if it were skipped. `change`: what was measured, or 0."""
        ...

    def may_skip(self, moment: Moment, sample: Sample) -> bool:
        """Whether the step may be skipped, of a sample that has it taken in."""
        ...


@dataclass(frozen=True)
class Below:
    """What rules with a threshold have in common."""

    threshold: float | None

    def may_skip(self, moment: Moment, sample: Sample) -> bool:
        return self.threshold is not None and sample.level < self.threshold


@dataclass(frozen=True)
class Threshold(Below):
    """Skips where the first blocks' residual changed by less."""

    measures: ClassVar[Measures] = Measures.RESIDUAL

    def weigh(self, moment: Moment, change: float, sample: Sample) -> Sample:
        return replace(sample, level=change)


@dataclass(frozen=True)
class Fixed:
    """What schedules have in common."""

    measures: ClassVar[Measures] = Measures.NOTHING

    @property
    def threshold(self) -> None:
        return None

    def weigh(self, moment: Moment, change: float, sample: Sample) -> Sample:
        return sample


@dataclass(frozen=True)
class Interval(Fixed):
    """Computes one step in so many, counted from the last step of the warm-up."""

    every: int
    warmup_steps: int

    def may_skip(self, moment: Moment, sample: Sample) -> bool:
        return (moment.step - max(self.warmup_steps - 1, 0)) % self.every != 0


@dataclass(frozen=True)
class Mask(Fixed):
    """Computes the steps that are marked, and those beyond the mask."""

    steps: str

    def may_skip(self, moment: Moment, sample: Sample) -> bool:
        return moment.step < len(self.steps) and self.steps[moment.step] == "0"


def is_bound(cache: StackCache, moment: Moment, sample: Sample) -> bool:
    """Whether a step must be computed whatever was measured."""
    return (
        moment.step < cache.warmup_steps
        or (moment.total is not None and moment.step >= moment.total - cache.final_steps)
        or (cache.max_consecutive_skips is not None and sample.skips >= cache.max_consecutive_skips)
    )
