"""MagCache (Ma et al. 2025, arXiv:2506.09045): how the size of the stack's residual drifts, known beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

from parafuse.calibration import Curves
from parafuse.engine.caches.rules import Below, Measures, Moment, Sample


@dataclass(frozen=True)
class Magnitude(Below):
    """Skips while the drifts since the last computed step add up to less."""

    measures: ClassVar[Measures] = Measures.NOTHING

    curves: Curves

    def weigh(self, moment: Moment, change: float, sample: Sample) -> Sample:
        magnitude = sample.magnitude * ratio_at(self.curves, moment)
        return replace(sample, magnitude=magnitude, level=sample.level + abs(1 - magnitude))


def ratio_at(curves: Curves, moment: Moment) -> float:
    """The size of the residual over that of the step before; of the first branch where the file has not this one.

    For another number of steps the logarithm of the size is interpolated over the run, so that a step that spans two
    of the file's has the product of their ratios."""
    ratios = curves.ratios[moment.place if moment.place < len(curves.ratios) else 0]
    last = len(ratios) - 1
    total = moment.total or len(ratios)
    if total == len(ratios) or last == 0 or total == 1:
        return ratios[min(moment.step, last)]
    sizes = list(accumulate(map(math.log, ratios)))

    def size_at(step: int) -> float:
        at = min(max(step, 0) / (total - 1), 1.0) * last
        low = min(int(at), last - 1)
        return sizes[low] + (at - low) * (sizes[low + 1] - sizes[low])

    return math.exp(size_at(moment.step) - size_at(moment.step - 1))
