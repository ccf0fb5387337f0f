"""TeaCache (Liu et al. 2024, arXiv:2411.19108): the changes of the first block's modulated input, added up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from parafuse.calibration import Curves
from parafuse.engine.caches.rules import Below, Measures, Moment, Sample


@dataclass(frozen=True)
class Accumulated(Below):
    """Skips while the changes since the last computed step, each rescaled, add up to less."""

    measures: ClassVar[Measures] = Measures.INPUT

    curves: Curves | None = None
    """None: changes count as they are."""

    def weigh(self, moment: Moment, change: float, sample: Sample) -> Sample:
        more = change if self.curves is None else rescaled(self.curves, change)
        return replace(sample, level=sample.level + more)


def rescaled(curves: Curves, change: float) -> float:
    """The change of the residual that goes with one of the modulated input.

    Outside of what was measured it is in proportion to the nearest change that was: a polynomial says nothing there.
    Never below zero: what has changed does not change back."""
    least, most = curves.between
    near = min(max(change, least), most)
    value = 0.0
    for coefficient in reversed(curves.polynomial):
        value = value * near + coefficient
    return max(value, 0.0) * (change / near if near else 1.0)
