"""Quantizes a loaded pipeline by what was measured on its own calls: maxima, errors, and what is left as it is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from parafuse.engine.quantize.guard import Group, Paint, Seen, error_of, groups_of, is_calibrated, watch, without
from parafuse.engine.quantize.pack import nbytes
from parafuse.engine.quantize.put_on import Parts, Quantized, asked_of, chosen, quantize
from parafuse.engine.quantize.report import report
from parafuse.engine.quantize.roles import pattern_of
from parafuse.engine.quantize.saved import write_record
from parafuse.engine.quantized import compute_dtype
from parafuse.engine.source import write_defaults
from parafuse.errors import ConfigError
from parafuse.quantization import Quantize

CALIBRATION_REQUESTS = 4
"""Requests that calibrated scales are measured over, where nothing else is asked for."""


@dataclass
class Outcome:
    """What came of it."""

    method: Quantize
    """With what was left out in its `skip`."""
    groups: list[Group]
    """Measured one by one."""
    over: list[Group]
    """Those that were left as they are: their error is above the limit."""
    errors: dict[str, float] = field(default_factory=dict[str, float])
    """Component -> error of what it gives with all of its groups quantized, as `Group.error`."""
    bytes_before: int = 0
    bytes_after: int = 0
    done: list[Quantized] = field(default_factory=list[Quantized])

    def to_dict(self) -> dict[str, Any]:
        """For files and people."""
        return {
            "method": self.method.brief,
            "groups": [asdict(group) for group in self.groups],
            "over_the_limit": [f"{group.component}.{group.pattern}" for group in self.over],
            "errors": self.errors,
            "weight_bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "quantized": report(self.done),
        }


def quantize_measured(
    denoisers: Parts,
    encoders: Parts,
    method: Quantize,
    paint: Paint,
    *,
    limit: float | None = None,
    requests: int = 1,
) -> Outcome:
    """Paints with `paint`, so often, with everything as it is; then one forward for each group of layers; then
    quantizes all whose error is within `limit`, in place. On one rank. Raises ConfigError before anything is changed.

    A layer that was given nothing in any request stays as it is where its scale is calibrated."""
    asked = asked_of(denoisers, encoders, method)
    before = sum(nbytes(p) for one in asked for p in one.model.parameters())
    seen = watch(asked, chosen(asked, method), paint, requests)
    unfit = [(one.one.name, name) for one in seen for name in _unfit(one)]
    groups = [group for one in seen for group in groups_of(one)]
    over = [group for group in groups if limit is not None and group.error > limit]
    left = list(
        dict.fromkeys([(g.component, g.pattern) for g in over] + [(n, pattern_of(layer)) for n, layer in unfit])
    )
    final = without(method, left)
    asked = [replace(one, method=without(one.method, left)) for one in asked]
    largest = {one.one.name: one.largest for one in seen}
    done = quantize(asked, final, largest=largest)
    return Outcome(
        method=final,
        groups=groups,
        over=over,
        errors={one.one.name: error_of(one.calls) for one in seen},
        bytes_before=before,
        bytes_after=sum(nbytes(p) for one in asked for p in one.model.parameters()),
        done=done,
    )


def _unfit(seen: Seen) -> list[str]:
    """Layers that turned out not to be what they looked like."""
    found = seen.samples()
    return found + (seen.unmeasured() if is_calibrated(seen.one.method) else [])


def save(folder: Path, pipeline: Any, done: Sequence[Quantized], defaults: dict[str, Any]) -> None:
    """Writes a diffusers folder with the quantized weights, which plain diffusers loads too, and how they were made.

    All of it or nothing. Raises ConfigError for a folder that is there and not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"folder={str(folder)!r}: is there already; give a new one.")
    part = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    try:
        pipeline.save_pretrained(part)
        write_defaults(part, defaults)
        dtypes = {one.choice.component: compute_dtype(one.model) or "" for one in done}
        write_record(part, {one.choice.component: one.method for one in done}, dtypes)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
