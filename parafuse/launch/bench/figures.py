"""What follows from a record: medians, ratios with their spread, rates, fractions of the possible. No torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from parafuse.launch.bench.record import Record, Row

OVERLAP = ("gemm", "attention")


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and the largest of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def overlaps(self, other: Spread) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Figures:
    """Of one variant, held against the baseline of the same record."""

    step_s: Spread | None
    total_s: Spread
    step_ratio: Spread | None
    """How many times as fast as the baseline, round by round."""
    total_ratio: Spread
    least_s: float
    """What a step would take if the ranks shared it evenly and only products and attention took time."""
    fraction: float | None
    """Of `least_s`, that is reached."""
    flops: float | None
    """A second, of each rank."""
    bytes: float | None
    """A second, of each rank."""

    @property
    def ratio(self) -> Spread:
        return self.step_ratio or self.total_ratio


def figures_of(record: Record, row: Row) -> Figures | None:
    """None for a variant that failed."""
    base = record.row(record.baseline)
    if row.error or base is None or not row.total_s:
        return None
    step = Spread.of(row.step_s) if row.step_s else None
    work, rates = record.work, record.rates
    compute = sum(work[kind] / rates[kind] for kind in OVERLAP)
    least = max(compute, work["bytes"] / rates["bytes"]) / row.ranks
    median = step.median if step else None
    return Figures(
        step_s=step,
        total_s=Spread.of(row.total_s),
        step_ratio=_ratio(base.step_s, row.step_s),
        total_ratio=Spread.of([b / mine for b, mine in zip(base.total_s, row.total_s, strict=True)]),
        least_s=least,
        fraction=least / median if median else None,
        flops=sum(work[kind] for kind in OVERLAP) / row.ranks / median if median else None,
        bytes=work["bytes"] / row.ranks / median if median else None,
    )


def _ratio(base: list[float], mine: list[float]) -> Spread | None:
    if not base or len(base) != len(mine):
        return None
    return Spread.of([a / b for a, b in zip(base, mine, strict=True)])
