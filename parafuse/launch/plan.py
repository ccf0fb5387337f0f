"""`parafuse plan`: what would run, and with --memory what it takes, without weights and without the hardware."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from parafuse.config import Axis, Config, Parallel
from parafuse.engine.plan import Plan
from parafuse.engine.planning import explain
from parafuse.engine.planning.search import REQUESTS, Demand, Fidelity, Found, Objective
from parafuse.errors import ConfigError, ModelError, UnsupportedError, nearest
from parafuse.hardware import visible_gpus
from parafuse.launch.asked import Asked
from parafuse.launch.keywords import as_typed, call_keywords, refuse_unknown
from parafuse.launch.options import Option, build, given
from parafuse.log import note

if TYPE_CHECKING:
    from parafuse.engine.memory.predict import Phase, Prediction
    from parafuse.engine.planning.machine import Machine
    from parafuse.engine.source import ModelSource

GB = 1e9
COLUMNS = ("all", "weights", "activations", "exchange", "kept", "pipeline", "libraries")


@dataclass(frozen=True, kw_only=True)
class Planning(Asked):
    """What to plan for."""

    size: str | None = None
    """Width and height in pixels: 1024x1024."""
    num_images: int | None = None
    """Pictures for each prompt."""
    hardware: str | None = None
    """For which machine: 8xh200, 4xl40-pcie, 2x8xh100-ib400 (nodes, ranks of each, device, link). Not given: this
    one."""
    objective: str = "latency"
    """What is to be best: latency (seconds of a request), throughput (pictures a second) or memory (bytes of a
    rank)."""
    fidelity: str = "exact"
    """Options that may be chosen beside the layout: exact (lossless ones), high (8-bit integers too), fast (fp8 and
    caches
    too)."""
    requests: int = REQUESTS
    """Requests over which the time to compile is spread."""
    probe: bool = False
    """Measure this machine first (under 20 seconds), and keep what was found for later plans."""
    plot: str | None = None
    """SVG or PNG file to draw into: predicted times from 1 to 64 ranks of the hardware."""
    learned: bool = False
    """Show what runs with generate --learn have told about this machine, and nothing else."""
    forget: bool = False
    """Remove all that the planner keeps: measured machines, facts of models, what runs have told."""
    memory: bool = False
    """What it takes on each rank, by phase of a request and by what it is for. Nothing is loaded."""
    json: bool = False
    """As one JSON object."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kinds in (("objective", Objective), ("fidelity", Fidelity)):
            value, known = getattr(self, name), [str(kind) for kind in kinds]
            if value not in known:
                raise ConfigError(
                    f"--{name} {value!r}: must be one of {', '.join(known)}{nearest(value, known) or '.'}"
                )
        if self.requests < 1:
            raise ConfigError(f"--requests {self.requests}: must be at least 1.")
        if self.size is not None:
            self._split_size()
        alone = [name for name in ("forget", "learned", "json", "memory") if getattr(self, name)]
        if len(alone) > 1 and alone[0] in ("forget", "learned"):
            raise ConfigError(f"--{alone[0]}: shows nothing but itself, in words; leave out --{alone[1]}.")
        if self.plot is not None and not self.plot.lower().endswith((".svg", ".png")):
            raise ConfigError(f"--plot {self.plot!r}: the file name must end in .svg or .png.")

    def _split_size(self) -> None:
        found = re.fullmatch(r"(\d+)\s*[xX]\s*(\d+)", self.size or "")
        if found is None:
            raise ConfigError(f"--size {self.size!r}: must be WIDTHxHEIGHT in pixels, such as 1024x1024.")
        if self.width is not None or self.height is not None:
            raise ConfigError("--size: beside --width or --height says the same twice; leave one out.")
        object.__setattr__(self, "width", int(found[1]))
        object.__setattr__(self, "height", int(found[2]))


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """A checked request for a plan."""

    planning: Planning
    source: ModelSource
    config: Config
    ranks: int
    call: dict[str, Any]
    """Keywords for the pipeline's call."""
    machine: Machine | None
    """That was named."""


def prepare(model: str, planning: Planning, options: list[Option], typed: dict[str, Any]) -> PlanJob:
    """Checks the request, torch-free. Raises ConfigError at the first fault."""
    from parafuse.engine.planner import resolve
    from parafuse.engine.planning.machine import named
    from parafuse.engine.request import check_call
    from parafuse.engine.source import locate
    from parafuse.launch.scaling import check_packages

    if "RANK" in os.environ:
        raise ConfigError("plan: runs on one rank, whatever the plan is for; leave the launcher out and give --ranks.")
    config = build(Config.from_file(planning.config) if planning.config else Config(), given(options, typed))
    machine = named(planning.hardware) if planning.hardware is not None else None
    ranks = planning.ranks or (machine.num_ranks if machine else 1)
    if machine is not None:
        if ranks > machine.num_ranks:
            raise ConfigError(f"--ranks {ranks}: --hardware {planning.hardware} has {machine.num_ranks}; leave it out.")
        if config.device not in ("auto", machine.device.kind):
            raise ConfigError(
                f"--device {config.device}: --hardware {planning.hardware} computes on {machine.device.kind}."
            )
        if planning.probe:
            raise ConfigError("--probe: measures this machine, and --hardware names another; leave one out.")
        config = replace(config, device=machine.device.kind)
    if planning.plot is not None:
        check_packages()
    source = locate(model, allow_pickle=config.allow_pickle)
    call, typed_as = call_keywords(planning, source)
    refuse_unknown(source, call)
    try:
        check_call(source, call)
    except ConfigError as error:
        raise as_typed(error, typed_as) from error
    resolve(config, source, ranks, elsewhere=True)
    return PlanJob(planning=planning, source=source, config=config, ranks=ranks, call=call, machine=machine)


def run(job: PlanJob) -> None:
    """Prints the plan, why it is the best, and what it takes where that is asked for. Raises ConfigError where no
    plan is
    legal, UnsupportedError for a pipeline whose memory cannot be told without values."""
    planning = job.planning
    if planning.forget or planning.learned:
        print(_kept(job))
        return
    found, why = chosen(job)
    plan = settled_plan(job, found, why)
    if other := other_dtype(job.config, job.source):
        note(other)
    memory = predicted(job, plan) if planning.memory else None
    if found is None and planning.plot:
        note(f"--plot {planning.plot}: not drawn, since there are {why}")
    if found is not None and planning.plot:
        from parafuse.launch.scaling import draw

        note(f"{draw(found, planning.plot)}: predicted times by ranks")
    if planning.json:
        values = memory.to_dict() if memory else {"plan": plan.to_dict()}
        print(json.dumps(values | ({"choice": explain.to_dict(found)} if found else {}), indent=2))
        return
    print(plan.one_line())
    if memory:
        print("\n".join(["", *table(memory)]))
    elif found:
        print("\n".join(["", *explain.lines(found)]))


def _kept(job: PlanJob) -> str:
    from parafuse.engine.planner import computes_in
    from parafuse.engine.planning import known, learned

    if job.planning.forget:
        return f"{known.forget()} files removed"
    device, dtype = computes_in(job.config, job.ranks, elsewhere=True)
    machine = job.machine or _here(job.ranks, device, dtype)
    return "\n".join(learned.table(known.this_machine(device), machine, dtype))


def chosen(job: PlanJob) -> tuple[Found | None, str]:
    """What the search has found, and why there is nothing where there is not."""
    from parafuse.engine.planner import computes_in
    from parafuse.engine.planning import choose, known

    planning = job.planning
    device, dtype = computes_in(job.config, job.ranks, elsewhere=True)
    if planning.probe:
        from parafuse.engine.planning.measure import measure

        found = measure(job.ranks, device, dtype)
        known.keep_machine(found, job.ranks, device, dtype)
    machine = job.machine or _here(job.ranks, device, dtype)
    demand = Demand(
        ranks=job.ranks,
        objective=Objective(planning.objective),
        fidelity=Fidelity(planning.fidelity),
        requests=planning.requests,
        fixed=choose.fixed_of(job.config, options=False),
    )
    learned = choose.corrections_of(machine, device, dtype) if job.machine is None else None
    try:
        return choose.plans_for(job.source, job.config, machine, demand, job.call, learned), ""
    except (ModelError, UnsupportedError) as error:
        return None, f"no costs: {str(error).partition(chr(10))[0]}"


def other_dtype(config: Config, source: ModelSource) -> str:
    """One line where a dtype that was asked for is not the one in which the model is saved."""
    from parafuse.engine.memory.check import saved_in

    own = saved_in(source) if config.dtype != "auto" else ""
    if not own or own == config.dtype:
        return ""
    return f"--dtype {config.dtype}: the model is saved in {own}; plans are as exact as one rank in {config.dtype}"


def _here(ranks: int, device: str, dtype: str) -> Machine:
    """This machine; one that is assumed for GPUs where there are none."""
    from parafuse.engine.planning.choose import machine_at_hand
    from parafuse.engine.planning.machine import named

    if device == "cuda" and not visible_gpus():
        name = f"{ranks}x{ASSUMED}"
        note(f"no GPU is here, and --hardware names none: {name} is taken")
        return named(name, one_node=True)
    return machine_at_hand(ranks, device, dtype)


ASSUMED = "h100"


def settled_plan(job: PlanJob, found: Found | None, why: str) -> Plan:
    """The best plan, as it would run."""
    from parafuse.engine.planner import resolve

    if found is None:
        return resolve(job.config, job.source, job.ranks, elsewhere=True, why=why)
    best = found.best.candidate
    options = {name: getattr(best, name) for name in ("compile", "quantize", "cache", "offload") if getattr(best, name)}
    free = {name: value for name, value in options.items() if not getattr(job.config, name)}
    config = replace(job.config, parallel=Parallel(**best.degrees), **free)
    is_free = job.config.parallel == Parallel()
    return resolve(config, job.source, job.ranks, elsewhere=True, why=explain.one_line(found), chosen=is_free)


def predicted(job: PlanJob, plan: Plan) -> Prediction:
    """What the plan takes on one rank; others of its world are not there."""
    from parafuse.engine.memory.predict import predict
    from parafuse.parallel import absent

    if plan.world_size == 1:
        return predict(job.source, plan, job.call)
    absent.enter(plan.world_size, plan.timeout_s)
    try:
        degrees = {axis: plan.degree(axis) for axis in Axis}
        return predict(job.source, plan, job.call, mesh=absent.mesh_of(degrees, "cpu", plan.timeout_s))
    finally:
        absent.leave()


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
