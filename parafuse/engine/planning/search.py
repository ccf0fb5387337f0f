"""All plans that are legal, the best first. Pure, torch-free: hundreds of plans in well under a second."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from parafuse.attention import LOSSY_BACKENDS
from parafuse.config import MAX_BRANCHES
from parafuse.engine.planning.cost import SHARDED, Candidate, Corrections, Cost, Costs, in_8_bits
from parafuse.engine.planning.facts import DECODE, DENOISE, Facts
from parafuse.engine.planning.machine import Link, Machine
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
"""What is tried."""
ALLOWED = (
    "exact allows lossless options alone, high also int8 and int8-weight, fast any: fp8, caches, sparse and 8-bit "
    "attention."
)
LOSSY_FIELDS = ("quantize", "cache", "sparse", "attention")
OFFLOADS = ("model", "group", SHARDED)
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
        if self.layouts_only:
            return
        for name in LOSSY_FIELDS:
            value = str(self.fixed.get(name) or "")
            if not allows(self.fidelity, name, value):
                loose = next(one for one in Fidelity if allows(one, name, value))
                default = ", the default" if self.fidelity == Fidelity.EXACT else ""
                raise ConfigError(
                    f"fidelity={str(self.fidelity)!r}{default}: not with {name}={value!r}, which is lossy; leave "
                    f"{name} out, or give fidelity={str(loose)!r} (--fidelity {loose}). {ALLOWED}"
                )


def allows(fidelity: Fidelity, name: str, value: str) -> bool:
    """Whether a user may set an option to this beside the fidelity: more than is tried, where it is fast."""
    kind = value.partition(":")[0]
    if fidelity == Fidelity.FAST:
        return True
    if name == "attention":
        return kind not in LOSSY_BACKENDS
    tried = LOSSY_BY_FIDELITY[fidelity].get(name, ("",))
    return kind in {one.partition(":")[0] for one in tried}


Refusal = Callable[[Candidate], str]
"""Why a layout cannot be; empty where it can."""


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
    corrections: Corrections | None = None
    """That the costs were found with."""
    refusal: Refusal | None = field(default=None, repr=False, compare=False)
    """What else rules layouts out."""

    def __str__(self) -> str:
        """The explanation, for people."""
        from parafuse.engine.planning.explain import lines

        return "\n".join(lines(self))

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
    refusal: Refusal | None = None,
) -> Found:
    """The legal plans of so many ranks, the best first. `refusal`: asked for each layout, by its degrees alone.

    Raises ConfigError where there is none, with each constraint that ruled plans out."""
    demand.check()
    _check_degrees(facts, demand)
    costs = costs or Costs(facts, machine, corrections)
    refused: dict[str, str] = {}
    good: list[Cost] = []
    over: list[Cost] = []
    tried = 0
    room = machine.device.memory_bytes
    for layout in layouts(facts, machine, demand, refused, refusal):
        for one in options(layout, facts, machine, demand, refused):
            tried += 1
            plain, cost = _fitting(one, costs, demand)
            if cost is not None:
                good.append(cost)
            if plain.memory_bytes > room:
                refused[str(one)] = (
                    f"needs {plain.memory_bytes / 1e9:.1f} GB in {plain.memory_at}, and a rank has {room / 1e9:.1f} GB"
                )
                over.append(plain)
    if not good and demand.layouts_only:  # the request is a guess: smaller ones may fit
        good = over
    if not good:
        raise _none_legal(costs, demand, over, refused, refusal)
    return Found(
        facts=facts,
        machine=machine,
        demand=demand,
        costs=ranked(good, demand),
        refused=refused,
        tried=tried,
        corrections=costs.corrections,
        refusal=refusal,
    )


def _check_degrees(facts: Facts, demand: Demand) -> None:
    """Raises ConfigError for degrees that a user has named and that the request has no work for."""
    if demand.layouts_only:
        return
    ways = {
        "data": "leave it out, ask for more pictures (--num-images), or give objective='throughput' (--objective "
        "throughput), which counts as many requests at a time",
        "cfg": "leave it out, or ask for guidance: its scale (--guidance), and a negative prompt where the model takes "
        "one",
    }
    for name, way_out in ways.items():
        one = Candidate(**{name: demand.fixed.get(name, 1)})
        if why := illegal(one, facts, demand):
            raise ConfigError(f"parallel.{name}={demand.fixed[name]} (--{name}): {why[1]}; {way_out}.")


def _none_legal(
    costs: Costs, demand: Demand, over: list[Cost], refused: dict[str, str], refusal: Refusal | None
) -> ConfigError:
    facts, machine = costs.facts, costs.machine
    tiles = any(cost.memory_at == DECODE for cost in over) and not facts.tiles
    hint = " Tiles take less memory to decode: vae='tiled' (--vae tiled)." if tiles else ""
    why = "; ".join(f"{plan}: {reason}" for plan, reason in list(refused.items())[:12])
    for ranks in range(demand.ranks - 1, 0, -1):
        less = dataclasses.replace(demand, ranks=ranks)
        there = (
            one
            for each in layouts(facts, machine, less, {}, refusal)
            for one in options(each, facts, machine, less, {})
        )
        fits = next((one for one in there if _fitting(one, costs, less)[1] is not None), None)
        if fits is not None:
            hint += f" With {ranks} rank{'s' if ranks > 1 else ''} there is one: {fits}."
            break
    ranks = "1 rank" if demand.ranks == 1 else f"{demand.ranks} ranks"
    return ConfigError(
        f"model={facts.model!r}: no plan of {ranks} is legal on {machine.name}. {why or 'none was found'}.{hint}"
    )


def _fitting(one: Candidate, costs: Costs, demand: Demand) -> tuple[Cost, Cost | None]:
    """(what the plan costs, what it costs in a way that has room: with offload where it needs that; None: none has)."""
    device = costs.machine.device
    pictures = pictures_of(costs.facts, demand, one)
    plain = costs.cost(one, pictures=pictures)
    least = demand.objective == Objective.MEMORY
    fits = [plain] if plain.memory_bytes <= device.memory_bytes else []
    if (least or not fits) and "offload" not in demand.fixed and device.kind == "cuda":
        ways = OFFLOADS if one.sequence > 1 else OFFLOADS[:-1]
        away = (costs.cost(dataclasses.replace(one, offload=way), pictures=pictures) for way in ways)
        fits += [cost for cost in away if cost.memory_bytes <= device.memory_bytes]
    if not fits:
        return plain, None
    return plain, min(fits, key=lambda cost: cost.memory_bytes) if least else min(
        fits, key=lambda cost: value_of(cost, demand)
    )


class Floors:
    """The least that plans of a layout can take whatever the links, heads and memory are: for searches that differ in
    nothing else. Exchanges take no time, and heads divide."""

    def __init__(self, costs: Costs, demand: Demand):
        free = Link(name="free", bytes_per_s=math.inf, latency_s=0.0)
        facts = dataclasses.replace(
            costs.facts, parts=tuple(dataclasses.replace(part, heads=()) for part in costs.facts.parts)
        )
        self._costs = costs.beside(facts, dataclasses.replace(costs.machine, inside=free, across=free))
        self._demand = demand
        self._known: dict[Candidate, list[tuple[float, int, Candidate]]] = {}

    def of(self, layout: Candidate) -> list[tuple[float, int, Candidate]]:
        """(the least value, place among the options, plan), the least first."""
        if layout not in self._known:
            tried = options(layout, self._costs.facts, self._costs.machine, self._demand, {})
            self._known[layout] = sorted(
                ((self._least(one), place, one) for place, one in enumerate(tried)), key=lambda found: found[:2]
            )
        return self._known[layout]

    def _least(self, one: Candidate) -> float:
        if self._demand.objective == Objective.MEMORY:
            return 0.0  # offload takes less
        cost = self._costs.cost(one, pictures=pictures_of(self._costs.facts, self._demand, one))
        return value_of(cost, self._demand)


def best(
    facts: Facts,
    machine: Machine,
    demand: Demand,
    corrections: Corrections | None = None,
    *,
    costs: Costs | None = None,
    refusal: Refusal | None = None,
    floors: Floors | None = None,
) -> Cost:
    """The first plan of `search` alone: those that `floors` tells to be slower are not looked at. Raises as `search`
    does."""
    demand.check()
    costs = costs or Costs(facts, machine, corrections)
    floors = floors or Floors(costs, demand)
    legal = enumerate(layouts(facts, machine, demand, {}, refusal))
    ways = sorted((least, number, place, one) for number, layout in legal for least, place, one in floors.of(layout))
    good: list[tuple[float, tuple[int, int], Cost]] = []
    limit = math.inf
    for least, number, place, one in ways:
        if least > limit:
            break
        cost = _fitting(one, costs, demand)[1]
        if cost is not None:
            value = value_of(cost, demand)
            good.append((value, (number, place), cost))
            limit = min(limit, value * (1 + 2 * SAME))
    if not good:  # all were looked at
        return search(facts, machine, demand, costs=costs, refusal=refusal).best
    most = min(value for value, *_ in good) * (1 + SAME)
    near = (found for found in good if found[0] <= most)
    return min(near, key=lambda found: (_tie(found[2], demand), *found[:2]))[2]


def ranked(costs: list[Cost], demand: Demand) -> tuple[Cost, ...]:
    """By value; of those that are as good as the best of the rest, the simplest first."""
    values = [value_of(cost, demand) for cost in costs]
    order = sorted(range(len(costs)), key=lambda i: values[i])
    near: list[tuple[tuple[float, ...], float, int]] = []  # a heap of those that are as good as the best of the rest
    out: dict[int, Cost] = {}
    first = last = 0
    while len(out) < len(costs):
        while order[first] in out:
            first += 1
        most = values[order[first]] * (1 + SAME)
        while last < len(order) and values[order[last]] <= most:
            i = order[last]
            heapq.heappush(near, (_tie(costs[i], demand), values[i], i))
            last += 1
        chosen = heapq.heappop(near)[2]
        out[chosen] = costs[chosen]
    return tuple(out.values())


def _tie(cost: Cost, demand: Demand) -> tuple[float, ...]:
    """What decides between plans that are as good: the time where bytes are compared, else how simple they are."""
    simple = _complexity(cost.candidate)
    return (cost.seconds, *simple) if demand.objective == Objective.MEMORY else simple


def _complexity(one: Candidate) -> tuple[int, int]:
    options = sum(bool(getattr(one, name)) for name in ("compile", "quantize", "cache", "offload"))
    return options, sum(degree > 1 for degree in one.degrees.values())


def pictures_of(facts: Facts, demand: Demand, one: Candidate) -> int:
    wanted = demand.pictures or facts.pictures
    return wanted * one.data if demand.objective == Objective.THROUGHPUT else wanted


def layouts(
    facts: Facts, machine: Machine, demand: Demand, refused: dict[str, str], refusal: Refusal | None = None
) -> Iterator[Candidate]:
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
                if not why and refusal is not None and (said := refusal(one)):
                    why = str(one), said
                if why:
                    refused.setdefault(why[0], why[1])
                else:
                    yield one


AXES = ("data", "cfg", "ring", "ulysses")


def illegal(one: Candidate, facts: Facts, demand: Demand) -> tuple[str, str] | None:
    """(kind of plan, why it cannot be)."""
    pictures = demand.pictures or facts.pictures
    given = demand.fixed if demand.layouts_only else ()  # what an engine is told for requests that are not known yet
    if one.data > pictures and demand.objective != Objective.THROUGHPUT and "data" not in given:
        return "data", f"the request has {pictures} picture{'s' if pictures > 1 else ''} to spread over replicas"
    if one.cfg > facts.branches and "cfg" not in given:
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

    if demand.fixed.get("offload") == SHARDED and layout.sequence == 1:
        refused.setdefault(str(layout), f"{SHARDED} cuts weights between ranks that share a sequence, and none do")
        return
    for compiled in values("compile", (False, True)):
        for quantize in values("quantize", allowed["quantize"]):
            method = str(quantize).partition(":")[0]
            why = "" if demand.layouts_only else _unquantizable(method, machine, facts)
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
    """Why not, empty where it can be: what weights alone are kept in needs nothing of a device."""
    if in_8_bits(method) and not machine.device.flops.get(method):
        return f"{machine.device.name} does not compute in {method}"
    if method == "fp8" and facts.dtype != "bfloat16" and machine.device.kind != "cpu":
        return "needs bfloat16"
    if method.startswith("int8") and facts.dtype == "float16":
        return "needs bfloat16 or float32"
    return ""


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
