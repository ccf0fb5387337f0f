"""What receipts of real runs have told about predictions: measured over predicted, by device and part. Torch-free.

A run corrects predictions that were made as its own was: by the same kind of machine, named or measured, in one dtype.

Kept in one file, at most so many runs of each kind; a plan goes by it only after `--learn` was asked for, since nothing
is written otherwise. `parafuse plan --learned` shows it, `--forget` removes it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from parafuse.engine.planning import known
from parafuse.engine.planning.cost import Corrections, Cost
from parafuse.engine.planning.machine import Machine

FILE = "learned.json"
MOST_RUNS = 20
"""Of each device, model, layout, kind of machine and dtype: the newest."""
MOST_KINDS = 200
WIDEST = 4.0
"""A factor beyond which a run is taken for disturbed."""


def record(device: str, what: Mapping[str, Any], machine: Machine | None = None, dtype: str = "") -> bool:
    """Keeps one run: `model`, `layout`, `measured_s` of a step, and of what was predicted without any correction
    `computed_s` and, by kind of exchange, `exchanged_s`. False where it is taken for disturbed, or nothing is kept.

    `machine`, `dtype`: by which it was predicted."""
    predicted = float(what["computed_s"]) + sum(what["exchanged_s"].values())
    factor = float(what["measured_s"]) / predicted if predicted else math.inf
    if not 1 / WIDEST <= factor <= WIDEST:
        return False
    times = {name: what[name] for name in ("measured_s", "computed_s", "exchanged_s")}
    by = {} if machine is None else {"by": _by(machine, dtype)}
    return _keep([device, what["model"], what["layout"]], times | by)


def _by(machine: Machine, dtype: str) -> list[Any]:
    """What predictions that err alike have in common: the kind of machine, whatever its number of ranks, whether it
    was measured, and the dtype."""
    return [machine.kind or machine.device.name, machine.is_measured, dtype]


def record_hits(device: str, model: str, cache: str, rate: float) -> bool:
    """Keeps the share of steps that a cache of this kind has left out. False where nothing is kept."""
    return _keep([device, model, f"cache {cache}"], {"hits": {cache: rate}})


def _keep(kind: list[str], values: dict[str, Any]) -> bool:
    runs = _runs()
    alike = [one["kind"] == kind and one.get("by") == values.get("by") for one in runs]
    same = [one for one, is_alike in zip(runs, alike, strict=True) if is_alike][-(MOST_RUNS - 1) :]
    others = [one for one, is_alike in zip(runs, alike, strict=True) if not is_alike][-MOST_RUNS * MOST_KINDS :]
    return known.write(FILE, [*others, *same, {"kind": kind, **values}]) is not None


def _runs() -> list[dict[str, Any]]:
    found = known.read(FILE)
    return [one for one in found if isinstance(one, dict) and "kind" in one] if isinstance(found, list) else []


def corrections(device: str, machine: Machine | None = None, dtype: str = "") -> Corrections:
    """What is known of a device: of runs that exchange nothing a factor for all that is computed; of others, what is
    left for their exchanges after that.

    `machine`, `dtype`: runs that were predicted by such a one, in such a dtype, and no others; without a machine all
    runs of the device. A cache leaves out what it does on any machine."""
    here = [one for one in _runs() if one["kind"][0] == device]
    by = None if machine is None else _by(machine, dtype)
    runs = [one for one in here if "measured_s" in one and (by is None or one.get("by") == by)]
    alone = [one["measured_s"] / one["computed_s"] for one in runs if not sum(one["exchanged_s"].values())]
    computed = statistics.median(alone) if alone else 1.0
    factors = dict.fromkeys(COMPUTED, computed) if alone else {}
    exchanged: dict[str, list[float]] = {}
    hits: dict[str, list[float]] = {}
    for one in runs:
        sent = one["exchanged_s"]
        if sum(sent.values()):
            most = max(sent, key=lambda name: sent[name])
            left = one["measured_s"] - computed * one["computed_s"] - sum(sent.values()) + sent[most]
            exchanged.setdefault(most, []).append(min(WIDEST, max(1 / WIDEST, left / sent[most])))
    for one in here:
        for kind, rate in one.get("hits", {}).items():
            hits.setdefault(kind, []).append(rate)
    factors |= {name: statistics.median(found) for name, found in exchanged.items()}
    return Corrections(factors=factors, hit_rates={kind: statistics.median(rates) for kind, rates in hits.items()})


COMPUTED = ("gemm", "attention", "convolution", "pointwise", "host", "encode", "decode")
EXCHANGED = ("ulysses", "ring", "gather", "batch")


def of_step(cost: Cost, steps: int) -> dict[str, Any]:
    """`computed_s` and `exchanged_s` of a step, for `record`: of a cost without corrections."""
    parts = {name: seconds / steps for name, seconds in cost.denoise._asdict().items()}
    exchanged = {name: parts.pop(name) for name in EXCHANGED}
    return {"computed_s": sum(parts.values()), "exchanged_s": exchanged}


def _told(run: Mapping[str, Any]) -> str:
    """By what a run was predicted, in words."""
    if "by" not in run:
        return ""
    name, is_measured, dtype = run["by"]
    return f"; {dtype} by {name}, {'measured' if is_measured else 'estimated'}"


def table() -> list[str]:
    """For people: each kind of run, and measured over predicted."""
    kinds: dict[tuple[str, ...], list[float]] = {}
    hits: dict[tuple[str, ...], list[float]] = {}
    for one in _runs():
        if "hits" in one:
            hits.setdefault(tuple(one["kind"]), []).extend(one["hits"].values())
            continue
        predicted = one["computed_s"] + sum(one["exchanged_s"].values())
        kinds.setdefault((*one["kind"], _told(one)), []).append(one["measured_s"] / predicted)
    lines = [
        f"{device}; {model}; {layout}{by}: a step took {statistics.median(found):.2f} times what is predicted, in "
        f"{len(found)} runs"
        for (device, model, layout, by), found in kinds.items()
    ]
    return lines or [
        "nothing was learned: parafuse generate --learn compares a run with its prediction, and keeps that"
    ]
