"""`parafuse plan`: what would run, and with --memory what it takes, without weights and without the hardware."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parafuse.config import Axis, Config
from parafuse.engine.plan import Plan
from parafuse.errors import ConfigError
from parafuse.launch.asked import Asked
from parafuse.launch.keywords import as_typed, call_keywords, refuse_unknown
from parafuse.launch.options import Option, build, given

if TYPE_CHECKING:
    from parafuse.engine.memory.predict import Phase, Prediction
    from parafuse.engine.source import ModelSource

GB = 1e9
COLUMNS = ("all", "weights", "activations", "exchange", "kept", "pipeline", "libraries")


@dataclass(frozen=True, kw_only=True)
class Planning(Asked):
    """What to plan for."""

    num_images: int | None = None
    """Pictures for each prompt."""
    memory: bool = False
    """What it takes on each rank, by phase of a request and by what it is for. Nothing is loaded."""
    json: bool = False
    """As one JSON object."""


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """A checked request for a plan."""

    planning: Planning
    source: ModelSource
    plan: Plan
    call: dict[str, Any]
    """Keywords for the pipeline's call."""


def prepare(model: str, planning: Planning, options: list[Option], typed: dict[str, Any]) -> PlanJob:
    """Checks the request, torch-free. Raises ConfigError at the first fault."""
    from parafuse.engine.planner import resolve
    from parafuse.engine.request import check_call
    from parafuse.engine.source import locate

    if "RANK" in os.environ:
        raise ConfigError("plan: runs on one rank, whatever the plan is for; leave the launcher out and give --ranks.")
    config = build(Config.from_file(planning.config) if planning.config else Config(), given(options, typed))
    source = locate(model, allow_pickle=config.allow_pickle)
    call, typed_as = call_keywords(planning, source)
    refuse_unknown(source, call)
    try:
        check_call(source, call)
    except ConfigError as error:
        raise as_typed(error, typed_as) from error
    plan = resolve(config, source, planning.ranks or 1, elsewhere=True)
    return PlanJob(planning=planning, source=source, plan=plan, call=call)


def run(job: PlanJob) -> None:
    """Prints the plan, and what it takes where that is asked for. Raises UnsupportedError for a pipeline whose memory
    cannot be told without values."""
    found = predicted(job) if job.planning.memory else None
    if job.planning.json:
        print(json.dumps(found.to_dict() if found else {"plan": job.plan.to_dict()}, indent=2))
        return
    print(job.plan.one_line())
    if found:
        print("\n".join(["", *table(found)]))


def predicted(job: PlanJob) -> Prediction:
    """What the plan takes on one rank; others of its world are not there."""
    from parafuse.engine.memory.predict import predict
    from parafuse.launch.bench import share

    plan = job.plan
    if plan.world_size == 1:
        return predict(job.source, plan, job.call)
    share.enter(plan.world_size, plan.timeout_s)
    try:
        degrees = {axis: plan.degree(axis) for axis in Axis}
        return predict(job.source, plan, job.call, mesh=share.mesh_of(degrees, "cpu", plan.timeout_s))
    finally:
        share.leave()


def table(found: Prediction) -> list[str]:
    """The prediction for people, in GB."""
    unit = Unit("GB", 1e9) if found.nbytes >= GB else Unit("MB", 1e6)
    weights = ", ".join(f"{name} {unit.of(number)}" for name, number in found.weights.items())
    each = "" if found.plan.world_size == 1 else f", on each of {found.plan.world_size} ranks"
    lines = [f"{unit.name} on {found.plan.device}{each}", f"weights: {weights}"]
    if found.elsewhere:
        places = {place: f"device {place}" if place.isdigit() else place for place in found.elsewhere}
        lines.append(
            "of these at home on " + ", ".join(f"{places[k]} {unit.of(n)}" for k, n in found.elsewhere.items())
        )
    requests = [("first", found.first), ("later", found.later)]
    width = max(map(len, found.first)) + 2
    lines += ["", f"{'':<{width + 7}}" + "".join(f"{name:>12}" for name in COLUMNS)]
    for name, phases in requests[: 1 if found.first == found.later else 2]:
        lines += [f"{phase:<{width}}{name:<7}{_row(one, unit)}" for phase, one in phases.items()]
    lines += ["", f"most at a time: {unit.of(found.nbytes)} {unit.name} ({_most(found)})"]
    if found.host:
        lines.append(f"host memory, while it is loaded: {unit.of(found.host)} {unit.name}")
    return lines + [f"taken for granted: {note}" for note in found.notes]


@dataclass(frozen=True)
class Unit:
    """In which numbers of bytes are shown."""

    name: str
    nbytes: float

    def of(self, nbytes: int) -> str:
        return f"{nbytes / self.nbytes:.2f}"


def _row(one: Phase, unit: Unit) -> str:
    numbers = (one.nbytes, one.weights, one.activations, one.exchange, one.kept, one.pipeline, one.libraries)
    return "".join(f"{unit.of(number):>12}" for number in numbers)


def _most(found: Prediction) -> str:
    """Where it is, and whether this machine has it."""
    from parafuse.engine.memory.check import device_memory

    phases = [(phase, one) for request in (found.first, found.later) for phase, one in request.items()]
    phase, one = max(phases, key=lambda pair: pair[1].nbytes)
    where, there = device_memory(found.plan.device, found.plan.world_size)
    room = ""
    if there:
        fits = "fits" if there >= found.nbytes else "does not fit"
        room = f"; {fits}: {where} has {there / GB:.1f} GB"
    return f"{phase}, in {one.at}{room}"
