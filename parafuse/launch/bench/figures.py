"""What follows from a record: medians, ratios with their spread, rates, fractions of the possible. No torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from parafuse.launch.bench.case import CACHES, REPLICATED
from parafuse.launch.bench.record import CALLS, RAN, SKIPPED, Record, Row

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
    """What a step would take if the ranks shared it evenly and only products and attention took time; of a share,
    with its modelled wire."""
    fraction: float | None
    """Of `least_s`, that is reached."""
    flops: float | None
    """A second, of each rank."""
    bytes: float | None
    """A second, of each rank."""
    whole_s: Spread | None = None
    """A request of as many steps as the record extrapolates to."""

    @property
    def ratio(self) -> Spread:
        """By step; by request where steps are not known, or not alike."""
        return self.step_ratio or self.total_ratio


def figures_of(record: Record, row: Row) -> Figures | None:
    """None for a variant that failed."""
    base = record.row(record.baseline)
    if row.error or base is None or not row.total_s:
        return None
    step_s, total_s = _with_wire(record, row)
    step = Spread.of(step_s) if step_s else None
    work, rates = record.work, record.rates
    compute = sum(work[kind] / rates[kind] for kind in OVERLAP)
    sharing = row.share_of * (1 if row.way in REPLICATED else row.ranks)
    moved = _bytes_of_a_rank(record, row, sharing)
    least = max(compute / sharing, moved / rates["bytes"]) + _wire_of_a_step(record, row)
    alike = not is_cached(row)  # a median of steps that skip and of steps that do not says nothing
    median = step.median if step and alike else None
    return Figures(
        step_s=step,
        total_s=Spread.of(total_s),
        step_ratio=_ratio(base.step_s, step_s) if alike else None,
        total_ratio=Spread.of([b / mine for b, mine in zip(base.total_s, total_s, strict=True)]),
        least_s=least,
        fraction=least / median if median else None,
        flops=sum(work[kind] for kind in OVERLAP) / sharing / median if median else None,
        bytes=moved / median if median else None,
        whole_s=_whole(record, step_s, total_s) if alike else None,
    )


def is_cached(row: Row) -> bool:
    """Whether it skips in some steps what it does in others."""
    return bool(row.cache) or row.way in CACHES


def skipped(row: Row) -> float | None:
    """Share of the denoiser's calls that a cache skipped; None where they were not counted."""
    calls = row.counts.get(CALLS)
    if not calls:
        return None
    return row.counts.get(SKIPPED, 0.0) / calls if row.cache else 1 - row.counts.get(RAN, 0.0) / calls


def _bytes_of_a_rank(record: Record, row: Row, sharing: int) -> float:
    """Activations are shared by all; weights are read by every rank of a sequence, in fewer calls by one of several
    branches or replicas."""
    weights = record.work.get("weights", 0.0)
    replicas = row.degrees.get("cfg", 1) * row.degrees.get("data", 1)
    return weights / replicas + (record.work["bytes"] - weights) / sharing


def _with_wire(record: Record, row: Row) -> tuple[list[float], list[float]]:
    """(steps, requests) by round; those of a share with its modelled wire, the same in each step."""
    wire_s = _wire_of_a_step(record, row)
    return [s + wire_s for s in row.step_s], [s + row.wire_s for s in row.total_s]


def _wire_of_a_step(record: Record, row: Row) -> float:
    return row.wire_s / record.steps if record.steps else 0.0


def _whole(record: Record, step_s: list[float], total_s: list[float]) -> Spread | None:
    """What was run, and as many more steps as are lacking."""
    if not record.whole_steps or not step_s:
        return None
    more = record.whole_steps - record.steps
    return Spread.of([total + more * step for total, step in zip(total_s, step_s, strict=True)])


def _ratio(base: list[float], mine: list[float]) -> Spread | None:
    if not base or len(base) != len(mine):
        return None
    return Spread.of([a / b for a, b in zip(base, mine, strict=True)])
