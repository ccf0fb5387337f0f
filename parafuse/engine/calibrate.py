"""Measures a model for the caches that need it: paints with everything computed, keeps what changes between steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from parafuse.cache import TeaCache
from parafuse.calibration import Calibration, Curves
from parafuse.engine.caches.choose import architecture_of
from parafuse.engine.caches.skipping import StackSkipping, Witnessed
from parafuse.engine.engine import Engine
from parafuse.engine.receipt import versions
from parafuse.errors import ConfigError

WATCHING = TeaCache(threshold=0.0, warmup_steps=0, final_steps=0)
"""The cache that an engine has while it is measured: it skips nothing, and measures all that is asked for."""
DEGREE = 4
"""Of the polynomial, as in TeaCache."""


@dataclass(frozen=True)
class Point:
    """How one sample of a branch changed from one step to the next."""

    step: int
    place: int
    """Of the branch among the calls of a step."""
    input: float
    residual: float
    size: float


@dataclass(frozen=True)
class Measured:
    """What a model was found to be."""

    calibration: Calibration
    curves: dict[str, dict[str, Any]]
    """By component, branch and step: the means over prompts, for people."""

    def write(self, file: str) -> None:
        self.calibration.write(file, self.curves)


def calibrate(engine: Engine, calls: Iterable[dict[str, Any]]) -> Measured:
    """Makes these calls of an engine whose cache is `WATCHING`, and fits what they tell. Collective, on every rank of
    the engine; gives the same on all of them. Raises ConfigError for calls that tell too little."""
    points: dict[str, dict[str, Point]] = {name: {} for name in engine.handle.skipping}
    watchers = {name: one for name, one in engine.handle.skipping.items() if isinstance(one, StackSkipping)}
    steps = prompts = 0
    for number, call in enumerate(calls):
        with watched(watchers) as seen:
            engine(**call)
        for said in map(json.loads, engine.world.everyone("measurements", json.dumps(_plain(seen)))):
            for name, found in said.items():
                for key, (total, *values) in found.items():
                    points[name][f"{number}.{key}"] = Point(*values)  # ranks that share a sample say the same
                    steps = max(steps, total)
        prompts += 1
    return fitted(engine, {name: list(found.values()) for name, found in points.items()}, steps, prompts)


@contextmanager
def watched(caches: Mapping[str, StackSkipping]) -> Iterator[dict[str, list[Witnessed]]]:
    """Keeps what this rank's computed calls tell, by component."""
    seen: dict[str, list[Witnessed]] = {name: [] for name in caches}
    before = {name: cache.witness for name, cache in caches.items()}
    try:
        for name, cache in caches.items():
            cache.witness = seen[name].append
        yield seen
    finally:
        for name, cache in caches.items():
            cache.witness = before[name]


def fitted(engine: Engine, points: Mapping[str, list[Point]], steps: int, prompts: int) -> Measured:
    """The curves of each component. Raises ConfigError for too few points."""
    denoisers: dict[str, Curves] = {}
    shown: dict[str, dict[str, Any]] = {}
    for name, found in points.items():
        known = [p for p in found if np.isfinite([p.input, p.residual, p.size]).all() and p.size > 0]
        if not known:
            raise ConfigError(
                f"calibrate: {name} told nothing: the first steps have nothing to be held against; ask for more."
            )
        inputs = [p.input for p in known]
        denoisers[name] = Curves(
            architecture=architecture_of(getattr(engine.pipeline, name)),
            polynomial=polynomial(inputs, [p.residual for p in known]),
            between=(min(inputs), max(inputs)),
            ratios=tuple(tuple(_filled(row)) for row in by_step(known, steps, lambda p: p.size)),
        )
        shown[name] = {
            "input_changes": by_step(known, steps, lambda p: p.input),
            "residual_changes": by_step(known, steps, lambda p: p.residual),
        }
    found = Calibration(
        model=engine.plan.model,
        model_id=engine.plan.model_id,
        steps=steps,
        prompts=prompts,
        versions=versions(),
        denoisers=denoisers,
    )
    return Measured(found, shown)


def polynomial(inputs: list[float], residuals: list[float]) -> tuple[float, ...]:
    """Least squares of degree 4, or of less for fewer different inputs; the constant first."""
    degree = min(DEGREE, len(set(inputs)) - 1)
    if degree < 1:
        return (0.0, residuals[0] / inputs[0]) if inputs[0] else (residuals[0],)
    fit = np.polynomial.Polynomial.fit(inputs, residuals, degree)
    return tuple(float(x) for x in fit.convert().coef)


def by_step(points: list[Point], steps: int, value: Callable[[Point], float]) -> list[list[float | None]]:
    """Place of the branch -> by step the mean over samples; None where nothing was measured."""
    rows: list[list[float | None]] = []
    for place in range(max(p.place for p in points) + 1):
        mine = [p for p in points if p.place == place] or points
        at = [[value(p) for p in mine if p.step == step] for step in range(steps)]
        rows.append([sum(values) / len(values) if values else None for values in at])
    return rows


def _filled(row: list[float | None]) -> list[float]:
    """Steps that were not measured have the value of the nearest one that was."""
    known = [step for step, value in enumerate(row) if value is not None]
    return [row[min(known, key=lambda other: abs(other - step))] or 1.0 for step in range(len(row))]


def _plain(seen: Mapping[str, list[Witnessed]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, calls in seen.items():
        found[name] = {}
        for one in calls:
            total = one.moment.total or one.moment.step + 1
            each = zip(one.rows, one.inputs, one.residuals, one.sizes, strict=True)
            for row, *values in each:
                found[name][f"{one.number}.{row}"] = [total, one.moment.step, one.moment.place, *values]
    return found
