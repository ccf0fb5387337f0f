"""All plans that are legal, the best first. Pure, torch-free: hundreds of plans in well under a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from parafuse.config import MAX_BRANCHES
from parafuse.engine.planning.cost import Candidate, Corrections, Cost, Costs
from parafuse.engine.planning.facts import DECODE, DENOISE, Facts
from parafuse.engine.planning.machine import Machine
from parafuse.errors import ConfigError


class Objective(StrEnum):
    """What is to be least, or most."""

    LATENCY = "latency"
    """Seconds of a request."""
    THROUGHPUT = "throughput"
    """Pictures a second, with as many requests at a time as there are replicas."""
    MEMORY = "memory"
    """Bytes of a rank."""


class Fidelity(StrEnum):
    """How near to the picture of one GPU."""

    EXACT = "exact"
    """Lossless options alone."""
    HIGH = "high"
    """Also 8-bit integers: 47 to 49 dB on average (docs/quantize.md)."""
    FAST = "fast"
    """Also fp8 and caches."""


LOSSY_BY_FIDELITY: Mapping[Fidelity, Mapping[str, tuple[str, ...]]] = {
    Fidelity.EXACT: {"quantize": ("",), "cache": ("",)},
    Fidelity.HIGH: {"quantize": ("", "int8", "int8-weight"), "cache": ("",)},
    Fidelity.FAST: {"quantize": ("", "int8", "int8-weight", "fp8", "fp8-weight"), "cache": ("", "first-block:0.1")},
}
OFFLOADS = ("model", "group")
"""What is tried where weights have no room, the faster one first."""
SAME = 0.005
"""Of the time: plans that are nearer are as good, and the simpler one is taken."""
REQUESTS = 100


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What is asked of a plan."""

    ranks: int
    objective: Objective = Objective.LATENCY
    fidelity: Fidelity = Fidelity.EXACT
    pictures: int | None = None
    """Of a request; not given: as many as the facts have."""
    requests: int = REQUESTS
    """Over which compiling is spread."""
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of a candidate that the user has set."""
    layouts_only: bool = False
    """Options stay as they are fixed, or off: degrees alone are chosen."""

    def check(self) -> None:
        """Raises ConfigError for demands that contradict each other."""
        allowed = LOSSY_BY_FIDELITY[self.fidelity]
        for name in ("quantize", "cache"):
            value = str(self.fixed.get(name) or "")
            if value and not self.layouts_only and value.partition(":")[0] not in _kinds(allowed[name]):
                loose = next(
                    (one for one in Fidelity if value.partition(":")[0] in _kinds(LOSSY_BY_FIDELITY[one][name])),
                    Fidelity.FAST,
                )
                raise ConfigError(
                    f"fidelity={str(self.fidelity)!r}: not with {name}={value!r}, which is lossy; leave {name} out, or "
                    f"give fidelity={str(loose)!r}."
                )


def _kinds(values: tuple[str, ...]) -> set[str]:
    return {value.partition(":")[0] for value in values}


@dataclass(frozen=True, kw_only=True)
class Found:
    """Plans, the best first, and what ruled others out."""

    facts: Facts
    machine: Machine
    demand: Demand
    costs: tuple[Cost, ...]
    refused: dict[str, str]
    """Plan, or kind of plan -> why it cannot be."""
    tried: int
    """Plans that were looked at."""

    @property
    def best(self) -> Cost:
        return self.costs[0]

    def value(self, cost: Cost) -> float:
        return value_of(cost, self.demand)


def value_of(cost: Cost, demand: Demand) -> float:
    """The less the better."""
    spread = cost.compile_s / max(1, demand.requests)
    if demand.objective == Objective.MEMORY:
        return cost.memory_bytes
    if demand.objective == Objective.THROUGHPUT:
        return (cost.seconds + spread) / cost.pictures
    return cost.seconds + spread


def search(
    facts: Facts,
    machine: Machine,
    demand: Demand,
    corrections: Corrections | None = None,
    *,
    costs: Costs | None = None,
) -> Found:
    """The legal plans of so many ranks, the best first. Raises ConfigError where there is none, with each constraint
    that
    ruled plans out."""
    demand.check()
    costs = costs or Costs(facts, machine, corrections)
    refused: dict[str, str] = {}
    good: list[Cost] = []
    over: list[Cost] = []
    tried = 0
    room = machine.device.memory_bytes
    for layout in layouts(facts, machine, demand, refused):
        for one in options(layout, facts, machine, demand, refused):
            tried += 1
            cost = costs.cost(one, pictures=_pictures(facts, demand, one))
            if cost.memory_bytes <= room:
                good.append(cost)
                continue
            refused[str(one)] = (
                f"needs {cost.memory_bytes / 1e9:.1f} GB in {cost.memory_at}, and a rank has {room / 1e9:.1f} GB"
            )
            over.append(cost)
            if "offload" not in demand.fixed and machine.device.kind == "cuda":
                for way in OFFLOADS:
                    away = dataclasses.replace(one, offload=way)
                    cost = costs.cost(away, pictures=_pictures(facts, demand, away))
                    if cost.memory_bytes <= room:
                        good.append(cost)
                        break
    if not good and demand.layouts_only:  # the request is a guess: smaller ones may fit
        good = over
    if not good:
        tiles = any(cost.memory_at == DECODE for cost in over) and not facts.tiles
        hint = " Tiles take less memory to decode: vae='tiled' (--vae tiled)." if tiles else ""
        why = "; ".join(f"{plan}: {reason}" for plan, reason in list(refused.items())[:12])
        raise ConfigError(
            f"model={facts.model!r}: no plan of {demand.ranks} ranks is legal on {machine.name}. "
            f"{why or 'none was found'}.{hint}"
        )
    return Found(facts=facts, machine=machine, demand=demand, costs=_ranked(good, demand), refused=refused, tried=tried)


def _ranked(costs: list[Cost], demand: Demand) -> tuple[Cost, ...]:
    """By value; of those that are as good as the best of the rest, the simplest first."""
    left = sorted(costs, key=lambda cost: value_of(cost, demand))
    ranked: list[Cost] = []
    while left:
        least = value_of(left[0], demand)
        same = [cost for cost in left if value_of(cost, demand) <= least * (1 + SAME)]
        chosen = min(same, key=lambda cost: (_complexity(cost.candidate), value_of(cost, demand)))
        ranked.append(chosen)
        left.remove(chosen)
    return tuple(ranked)


def _complexity(one: Candidate) -> tuple[int, int]:
    options = sum(bool(getattr(one, name)) for name in ("compile", "quantize", "cache", "offload"))
    return options, sum(degree > 1 for degree in one.degrees.values())


def _pictures(facts: Facts, demand: Demand, one: Candidate) -> int:
    wanted = demand.pictures or facts.pictures
    return wanted * one.data if demand.objective == Objective.THROUGHPUT else wanted


def layouts(facts: Facts, machine: Machine, demand: Demand, refused: dict[str, str]) -> Iterator[Candidate]:
    """Degrees whose product is the number of ranks. What is not legal goes into `refused`."""
    number = demand.ranks
    for data in divisors(number):
        for cfg in divisors(number // data):
            if cfg > MAX_BRANCHES:
                continue
            rest = number // data // cfg
            for ulysses in divisors(rest):
                one = Candidate(data=data, cfg=cfg, ring=rest // ulysses, ulysses=ulysses)
                if any(name in demand.fixed and getattr(one, name) != demand.fixed[name] for name in AXES):
                    continue
                why = illegal(one, facts, demand)
                if why:
                    refused.setdefault(why[0], why[1])
                else:
                    yield one


AXES = ("data", "cfg", "ring", "ulysses")


def illegal(one: Candidate, facts: Facts, demand: Demand) -> tuple[str, str] | None:
    """(kind of plan, why it cannot be)."""
    pictures = demand.pictures or facts.pictures
    if one.data > 1 and demand.objective != Objective.THROUGHPUT and one.data > pictures and "data" not in demand.fixed:
        return "data", f"the request has {pictures} picture{'s' if pictures > 1 else ''} to spread over replicas"
    if one.cfg > facts.branches and "cfg" not in demand.fixed:
        branches = f"{facts.branches} branches" if facts.branches > 1 else "no guidance: one branch"
        return f"cfg {one.cfg}", f"the request has {branches}"
    if one.sequence > 1 and facts.refused:
        return "ulysses, ring", facts.refused
    heads = facts.heads
    if heads and one.ulysses > heads:
        return f"ulysses {one.ulysses}", f"attention has {heads} heads, so ranks would have none"
    tokens = max((part.tokens for part in facts.of(DENOISE)), default=0)
    if tokens and one.sequence > tokens:
        return f"a sequence of {one.sequence}", f"it has {tokens} tokens, so ranks would have none"
    return None


def options(
    layout: Candidate, facts: Facts, machine: Machine, demand: Demand, refused: dict[str, str]
) -> Iterator[Candidate]:
    """The layout with each combination of options that the fidelity allows."""
    allowed = LOSSY_BY_FIDELITY[demand.fidelity]

    def values(name: str, tried: tuple[Any, ...]) -> tuple[Any, ...]:
        if name in demand.fixed:
            return (demand.fixed[name],)
        return tried[:1] if demand.layouts_only else tried

    for compiled in values("compile", (False, True)):
        for quantize in values("quantize", allowed["quantize"]):
            method = str(quantize).partition(":")[0]
            why = _unquantizable(method, machine, facts)
            if why:
                refused.setdefault(f"quantize {method}", why)
                continue
            for cache in values("cache", allowed["cache"]):
                yield dataclasses.replace(
                    layout,
                    compile=compiled,
                    quantize=method,
                    cache=str(cache),
                    offload=str(demand.fixed.get("offload", "")),
                )


def _unquantizable(method: str, machine: Machine, facts: Facts) -> str:
    if not method:
        return ""
    if not machine.device.flops.get(method.removesuffix("-weight")):
        return f"{machine.device.name} does not compute in {method.removesuffix('-weight')}"
    return "" if facts.dtype != "float32" or machine.device.kind == "cpu" else "needs bfloat16"


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


Change = Callable[[Facts, Machine], tuple[Facts, Machine]]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Something that would make another plan the best."""

    what: str
    plan: Candidate
    gain: float
    """How many times as fast as the plan that is the best now, then."""


def turns(found: Found, corrections: Corrections | None = None) -> list[Turn]:
    """What would change the choice: the least of each kind of change that does."""
    out: list[Turn] = []
    for changes in _changes(found.facts).values():
        for what, change in changes:
            facts, machine = change(found.facts, found.machine)
            try:
                then = search(facts, machine, found.demand, corrections)
            except ConfigError:
                continue
            if then.best.candidate != found.best.candidate:
                now = next((one for one in then.costs if one.candidate == found.best.candidate), None)
                gain = then.value(now) / then.value(then.best) if now is not None else 1.0
                if gain > 1 + SAME:
                    out.append(Turn(what=what, plan=then.best.candidate, gain=gain))
                    break
    return out


def _changes(facts: Facts) -> dict[str, list[tuple[str, Change]]]:
    def links(factor: float) -> Change:
        def change(facts: Facts, machine: Machine) -> tuple[Facts, Machine]:
            def faster(link: Any) -> Any:
                shared = link.node_bytes_per_s
                return dataclasses.replace(
                    link,
                    bytes_per_s=link.bytes_per_s * factor,
                    node_bytes_per_s=shared * factor if shared else None,
                )

            return facts, dataclasses.replace(machine, inside=faster(machine.inside), across=faster(machine.across))

        return change

    def latency(factor: float) -> Change:
        def change(facts: Facts, machine: Machine) -> tuple[Facts, Machine]:
            def quicker(link: Any) -> Any:
                return dataclasses.replace(link, latency_s=link.latency_s * factor)

            return facts, dataclasses.replace(machine, inside=quicker(machine.inside), across=quicker(machine.across))

        return change

    def heads(factor: float) -> Change:
        def change(facts: Facts, machine: Machine) -> tuple[Facts, Machine]:
            parts = tuple(
                dataclasses.replace(part, heads=tuple(max(1, round(n * factor)) for n in part.heads))
                for part in facts.parts
            )
            return dataclasses.replace(facts, parts=parts), machine

        return change

    def memory(factor: float) -> Change:
        def change(facts: Facts, machine: Machine) -> tuple[Facts, Machine]:
            device = dataclasses.replace(machine.device, memory_bytes=int(machine.device.memory_bytes * factor))
            return facts, dataclasses.replace(machine, device=device)

        return change

    found: dict[str, list[tuple[str, Change]]] = {
        "faster": [(f"links {factor} times as fast", links(factor)) for factor in (1.5, 2, 4, 8)],
        "slower": [(f"links {factor:g} times slower", links(1 / factor)) for factor in (1.5, 2, 4, 8, 16)],
        "latency": [(f"exchanges that begin {factor} times sooner", latency(1 / factor)) for factor in (2, 4)],
        "memory": [(f"{factor} times the memory", memory(factor)) for factor in (2, 4)],
    }
    if facts.heads:
        found["heads"] = [(f"{round(facts.heads * factor)} heads", heads(factor)) for factor in (2, 4)]
        found["fewer"] = [(f"{round(facts.heads * factor)} heads", heads(factor)) for factor in (0.5, 0.25)]
    return found
