"""Two records of one case: what moved beyond the spread of both. Imports no torch."""

from __future__ import annotations

from parafuse.errors import ConfigError
from parafuse.launch.bench.figures import Spread, figures_of
from parafuse.launch.bench.record import Record

SAME = ("call", "device", "dtype", "hardware", "ranks", "threads", "whole_steps", "link", "prompts")
"""What two records must have in common, beside their case."""


def compared(a: Record, b: Record) -> list[tuple[str, Spread | None, Spread | None, str]]:
    """(variant, ratio in a, ratio in b, verdict) for every variant of either. Raises ConfigError for other cases."""
    if (a.case, a.model, a.baseline) != (b.case, b.model, b.baseline):
        raise ConfigError(
            f"records of {a.case!r} ({a.model}) and of {b.case!r} ({b.model}) cannot be compared; give two of one case."
        )
    for name in SAME:
        mine, other = getattr(a, name), getattr(b, name)
        if mine != other:
            raise ConfigError(
                f"records of {a.case!r}: {name} is {mine!r} in one and {other!r} in the other; measure alike."
            )
    names = dict.fromkeys(row.name for record in (a, b) for row in record.rows)
    lines: list[tuple[str, Spread | None, Spread | None, str]] = []
    for name in names:
        if name == a.baseline:
            continue
        one, two = (_ratio(record, name) for record in (a, b))
        lines.append((name, one, two, _verdict(one, two)))
    return lines


def _ratio(record: Record, name: str) -> Spread | None:
    row = record.row(name)
    found = figures_of(record, row) if row else None
    return found.ratio if found else None


def _verdict(one: Spread | None, two: Spread | None) -> str:
    if one is None or two is None:
        return "in one of them only" if one or two else "in neither"
    if one.overlaps(two):
        return "within the spread"
    change = two.median / one.median - 1
    return f"{abs(change) * 100:.0f}% {'faster' if change > 0 else 'slower'}"
