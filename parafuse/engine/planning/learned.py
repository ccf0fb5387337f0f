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
    left after that, for computing beside other ranks and for the exchange that they do most.

    `machine`, `dtype`: runs that were predicted by such a one, in such a dtype, and no others; without a machine all
    runs of the device. A cache leaves out what it does on any machine."""
    here = [one for one in _runs() if one["kind"][0] == device]
    by = None if machine is None else _by(machine, dtype)
    runs = [one for one in here if "measured_s" in one and (by is None or one.get("by") == by)]
    alone = [one["measured_s"] / one["computed_s"] for one in runs if not sum(one["exchanged_s"].values())]
    computed = statistics.median(alone) if alone else 1.0
    found = {name: [computed] for name in COMPUTED} if alone else dict[str, list[float]]()
    for one in runs:
        for name, factor in _beside(one, computed).items():
            found.setdefault(name, []).append(factor)
    hits: dict[str, list[float]] = {}
    for one in here:
        for kind, rate in one.get("hits", {}).items():
            hits.setdefault(kind, []).append(rate)
    return Corrections(
        factors={name: statistics.median(factors) for name, factors in found.items()},
        hit_rates={kind: statistics.median(rates) for kind, rates in hits.items()},
    )


def _beside(run: Mapping[str, Any], computed: float) -> dict[str, float]:
    """Factors that explain a run of several ranks with the least relative change of both: a part that is small cannot
    be what made the difference. `computed`: the factor of one rank. Empty for a run that exchanges nothing."""
    sent = run["exchanged_s"]
    if not sum(sent.values()):
        return {}
    most = max(sent, key=lambda name: sent[name])
    computing, sending = computed * run["computed_s"], sent[most]
    left = run["measured_s"] - computing - sum(sent.values())
    weight = left / (computing**2 + sending**2)
    factors = {"beside": 1 + weight * computing, most: 1 + weight * sending}
    return {name: min(WIDEST, max(1 / WIDEST, factor)) for name, factor in factors.items()}


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


def table(device: str = "", machine: Machine | None = None, dtype: str = "") -> list[str]:
    """For people: each kind of run, measured over predicted, and whether predictions for a machine and dtype go by it;
    then the factors that they go by."""
    kinds: dict[tuple[str, ...], list[float]] = {}
    used: set[tuple[str, ...]] = set()
    by = None if machine is None else _by(machine, dtype)
    for one in _runs():
        is_here = one["kind"][0] == device
        if "hits" in one:
            key, value = tuple(one["kind"]), max(one["hits"].values())
        else:
            key = (*one["kind"], _told(one))
            value = one["measured_s"] / (one["computed_s"] + sum(one["exchanged_s"].values()))
            is_here = is_here and one.get("by") == by
        kinds.setdefault(key, []).append(value)
        used |= {key} if is_here else set()
    if not kinds:
        return ["nothing was learned: parafuse generate --learn compares a run with its prediction, and keeps that"]
    lines = [f"{_said(key, found)}{_use(key in used, machine)}" for key, found in kinds.items()]
    if machine is not None:
        lines += ["", f"predictions for {machine.name} in {dtype} go by:", *_factors(device, machine, dtype)]
    return lines


def _said(key: tuple[str, ...], found: list[float]) -> str:
    middle, runs = statistics.median(found), f"in {len(found)} {'run' if len(found) == 1 else 'runs'}"
    if len(key) == 3:  # of a cache
        return f"{'; '.join(key)}: {middle:.0%} of the calls were left out, {runs}"
    return f"{'; '.join(key[:3])}{key[3]}: a step took {middle:.2f} times what is predicted, {runs}"


def _use(is_used: bool, machine: Machine | None) -> str:
    if machine is None:
        return ""
    return " (in use)" if is_used else " (not in use: of another device, machine or dtype)"


def _factors(device: str, machine: Machine, dtype: str) -> list[str]:
    found = corrections(device, machine, dtype)
    shown: dict[str, str] = {}
    if "gemm" in found.factors:
        shown["what is computed"] = f"{found.factors['gemm']:.2f}"
    if "beside" in found.factors:
        shown["the same beside other ranks, once more"] = f"{found.factors['beside']:.2f}"
    shown |= {name: f"{found.factors[name]:.2f}" for name in EXCHANGED if name in found.factors}
    shown |= {f"cache {kind}": f"{rate:.0%} left out" for kind, rate in found.hit_rates.items()}
    return [f"  {name}: {factor}" for name, factor in shown.items()] or ["  nothing that was learned"]
