"""What caches give and take: speed against quality, of every engine alike, and the best of them. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from parafuse.cache import cache_of
from parafuse.launch.bench.figures import Spread, figures_of, is_cached, skipped
from parafuse.launch.bench.record import KEPT, Record
from parafuse.launch.bench.tables import Table, times_as_fast

LEVELS = (0.99, 0.95)
"""Medians of SSIM at which caches are held against each other."""


@dataclass(frozen=True)
class Trade:
    """One cache, as it was measured against the baseline of its record."""

    name: str
    text: str
    """What asks for it: parafuse's own as `--cache` takes it; empty for another engine's."""
    method: str
    """Of points that a line goes through: they differ in one number only."""
    number: float
    """That number: a threshold, or an interval."""
    speed: Spread
    """Requests, times as fast."""
    ssim: float
    """Median of the prompts."""
    worst_ssim: float
    psnr_db: float
    worst_psnr_db: float
    skipped: float | None
    kept_bytes: float | None
    alone: bool
    """On one rank, eager: what it gains is the cache's own."""


def trades(record: Record) -> list[Trade]:
    """Of the variants with a cache that have figures and pictures, in the record's order."""
    found: list[Trade] = []
    for row in record.rows:
        figures = figures_of(record, row)
        if figures is None or not is_cached(row) or "worst_ssim" not in row.quality:
            continue
        quality = row.quality
        method, number = _place(row.cache) if row.cache else (row.way, row.threshold or 0.0)
        found.append(
            Trade(
                name=row.name,
                text=row.cache,
                method=method,
                number=number,
                speed=figures.total_ratio,
                ssim=quality.get("median_ssim", quality["ssim"]),
                worst_ssim=quality["worst_ssim"],
                psnr_db=quality.get("median_psnr_db", quality["psnr_db"]),
                worst_psnr_db=quality["worst_psnr_db"],
                skipped=skipped(row),
                kept_bytes=row.counts.get(KEPT) if row.cache else None,
                alone=not row.compile and row.ranks == 1,
            )
        )
    return found


def _place(text: str) -> tuple[str, float]:
    """(method with all but its first field, that field) of a cache's text."""
    cache = cache_of(text)
    first = next((getattr(cache, f.name) for f in dataclasses.fields(cache) if not f.kw_only), None) if cache else None
    if not isinstance(first, (int, float)):
        return text, 0.0
    head, _, rest = text.partition(",")
    return ", ".join(part for part in (head.partition(":")[0], rest) if part), float(first)


def best(found: list[Trade], level: float, *, ours: bool) -> Trade | None:
    """The fastest cache whose median SSIM is at least `level`: of parafuse's own, or of other engines'."""
    good = [one for one in found if one.alone and bool(one.text) is ours and one.ssim >= level]
    return max(good, key=lambda one: one.speed.median, default=None)


def trade_table(record: Record) -> Table:
    """Every cache with what it gives and takes."""
    heads = ["cache", "times as fast", "SSIM (worst)", "PSNR, dB (worst)", "skipped calls", "kept"]
    table = Table(heads, [])
    for one in trades(record):
        table.rows.append(
            [
                one.name,
                times_as_fast(one.speed),
                f"{one.ssim:.4f} ({one.worst_ssim:.3f})",
                f"{one.psnr_db:.1f} ({one.worst_psnr_db:.1f})",
                "" if one.skipped is None else f"{one.skipped * 100:.0f}%",
                "" if one.kept_bytes is None else f"{one.kept_bytes / 2**20:.2f} MiB",
            ]
        )
    return table


def recommended(record: Record) -> list[str]:
    """The best cache at each level, of parafuse's and of the others', then all of them: lines of Markdown."""
    found = trades(record)
    heads = ["median SSIM of at least", "parafuse's fastest", "times as fast", "fastest of other engines", "as fast"]
    table = Table(heads, [], ("parafuse's fastest", "fastest of other engines"))
    for level in LEVELS:
        mine, other = (best(found, level, ours=ours) for ours in (True, False))
        table.rows.append(
            [
                f"{level:g}",
                f"`--cache {mine.text}`" if mine else "none of these",
                times_as_fast(mine.speed) if mine else "",
                other.name if other else "none of these",
                times_as_fast(other.speed) if other else "",
            ]
        )
    return [*table.markdown(), "", *trade_table(record).markdown()]
