"""The choice of a plan in words and numbers: a table, why others lose, what would change it. Torch-free."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from parafuse.engine.planning.cost import OVERHEAD, Cost
from parafuse.engine.planning.facts import ATTENTION, CONVOLUTION, DECODE, DENOISE, ENCODE, GEMM, Facts
from parafuse.engine.planning.search import AXES, SAME, Found, Objective, value_of
from parafuse.engine.planning.search import best as cheapest
from parafuse.engine.planning.turns import turns
from parafuse.errors import ConfigError

SHOWN = 6
PHASES = (ENCODE, DENOISE, DECODE)
PARTS = ("gemm", "attention", "convolution", "pointwise", "host", "ulysses", "ring", "gather", "batch", "offload")
NAMES = {
    "gemm": "matrix products",
    "convolution": "convolutions",
    "pointwise": "operators between products",
    "host": "launches on the host",
    "ulysses": "Ulysses' exchanges",
    "ring": "what of the ring's sending is not hidden behind attention",
    "gather": "gathering the result",
    "batch": "exchanging branches and replicas",
    "offload": "weights on their way",
    "encode": "encoding the prompt",
    "decode": "decoding pictures",
    "compile": "its share of compiling",
}


def one_line(found: Found) -> str:
    """Why this plan, in a few words: for the plan's own line."""
    best = found.best
    if len(found.costs) == 1:
        return "chosen by cost: no other layout is legal"
    second = found.costs[1]
    ratio = found.value(second) / found.value(best)
    what = "bytes" if found.demand.objective == Objective.MEMORY else "time"
    predicted = f"{_ms(best.mean_step_s)} a step" + (" on average" if best.hits else "")
    if found.demand.objective == Objective.THROUGHPUT:
        predicted = f"{best.pictures / best.seconds:.3g} pictures a second"
    return (
        f"chosen by cost of {len(found.costs)} plans for {request_of(found)}: {predicted} predicted, next best "
        f"{second.candidate} ({ratio:.2f} times the {what})"
    )


def lines(found: Found, *, shown: int = SHOWN) -> list[str]:
    """For people."""
    facts, machine, best = found.facts, found.machine, found.best
    request = f"{facts.model}, {request_of(found)}, {facts.dtype} on {machine.name}"
    per_step = {family: _flops(found, family) / 1e12 for family in (GEMM, ATTENTION, CONVOLUTION)}
    work = ", ".join(f"{number:.4g} TFLOP {family}" for family, number in per_step.items() if number)
    out = [request, f"a step: {work}; {len(found.costs)} legal plans of {found.tried} for {found.demand.objective}", ""]
    out += _table(found, found.costs[:shown])
    out += _and_more(len(found.costs) - shown, "plans")
    out += [f"  {text}" for text in _of_table(found, found.costs[:shown])]
    out += ["", f"best: {best.candidate}", f"  {_share(best)}"]
    out += [f"  {text}" for text in (*_against(found, shown), *_remarks(found))]
    changes = turns(found)
    if changes:
        out += ["", "what would change the choice:"]
        out += [f"  with {one.what}: {one.plan} ({one.gain:.2f} times as fast then)" for one in changes]
    if found.refused:
        out += ["", "ruled out:"]
        out += [f"  {plan}: {why}" for plan, why in list(found.refused.items())[:shown]]
        out += _and_more(len(found.refused) - shown, "kinds of plans")
    return out


def _and_more(number: int, what: str) -> list[str]:
    return [f"  and {number} more {what}: --json has all"] if number > 0 else []


def _remarks(found: Found) -> list[str]:
    return [*_slow_dtype(found), *_fewer(found)]


def _slow_dtype(found: Found) -> list[str]:
    """Of a 16-bit dtype that the device has no units for, such as bfloat16 before capability 8.0."""
    device, dtype = found.machine.device, found.facts.dtype
    rates = {name: device.flops.get(name) or 0.0 for name in SHORT}
    fast = max(rates, key=lambda name: rates[name])
    own = rates.get(dtype)
    if not own or rates[fast] < 2 * own:
        return []
    slow, there = f"{own / 1e12:.3g} TFLOP/s of matrix products", f"{rates[fast] / 1e12:.3g}"
    return [f"{device.name} has no units for {dtype}: {slow}, where {fast} has {there}; --dtype {fast}"]


SHORT = ("bfloat16", "float16")


def _fewer(found: Found) -> list[str]:
    """The number of ranks that would be faster, where fewer are: links may cost more than ranks save."""
    demand, best = found.demand, found.best
    fewer = [2**i for i in range(demand.ranks.bit_length()) if 2**i < demand.ranks]
    if demand.objective != Objective.LATENCY or any(name in demand.fixed for name in AXES):
        return []
    times: list[tuple[float, int]] = []
    for ranks in fewer:
        try:
            less = dataclasses.replace(demand, ranks=ranks)
            one = cheapest(found.facts, found.machine, less, found.corrections, refusal=found.refusal)
        except ConfigError:
            continue
        times.append((value_of(one, less), ranks))
    least, ranks = min(times, default=(math.inf, 1))
    if least >= found.value(best) * (1 - SAME):
        return []
    word = "rank takes" if ranks == 1 else "ranks take"
    return [f"fewer are faster: {ranks} {word} {least / found.value(best):.2f} of the time; --ranks {ranks}"]


def to_dict(found: Found) -> dict[str, Any]:
    """For machines."""
    facts, best = found.facts, found.best
    families = (GEMM, ATTENTION, CONVOLUTION)
    return {
        "model": facts.model,
        "dtype": facts.dtype,
        "steps": facts.steps,
        "request": {"call": facts.call, "pictures": facts.pictures, "branches": facts.branches, "steps": facts.steps},
        "flops": {
            "step": {family: _flops(found, family) for family in families},
            "request": {phase: {family: _of_request(facts, phase, family) for family in families} for phase in PHASES},
        },
        "why": one_line(found),
        "hardware": found.machine.name,
        "objective": str(found.demand.objective),
        "fidelity": str(found.demand.fidelity),
        "tried": found.tried,
        "plans": [
            cost.to_dict() | {"why": _share(cost) if cost is best else _loses(best, cost, found)}
            for cost in found.costs
        ],
        "remarks": _remarks(found),
        "changes": [{"what": one.what, "degrees": one.plan.degrees, "gain": one.gain} for one in turns(found)],
        "refused": found.refused,
    }


def _of_request(facts: Facts, phase: str, family: str) -> float:
    return sum(part.calls * part.total(family) for part in facts.of(phase))


def request_of(found: Found) -> str:
    """In words: size, steps, branches."""
    call = found.facts.call
    size = f"{call['width']}x{call['height']}, " if {"width", "height"} <= call.keys() else ""
    frames = f"{call['num_frames']} frames, " if "num_frames" in call else ""
    branches = f", {found.facts.branches} branches" if found.facts.branches > 1 else ""
    return f"{size}{frames}{found.facts.steps} steps{branches}"


def _flops(found: Found, family: str) -> float:
    return _of_request(found.facts, DENOISE, family) / found.facts.steps


def _table(found: Found, costs: tuple[Cost, ...]) -> list[str]:
    used = [name for name in PARTS if any(getattr(cost.denoise, name) > 0 for cost in costs)]
    steps = found.facts.steps
    several = found.demand.objective == Objective.THROUGHPUT or found.best.pictures > 1
    head = ["plan", *(["pictures", "a second"] if several else []), "request", "step", *used, "encode", "decode", "GB"]
    head.append("limit")
    rows = [
        [
            str(cost.candidate),
            *([str(cost.pictures), f"{cost.pictures / cost.seconds:.3g}"] if several else []),
            _s(cost.seconds),
            _ms(cost.mean_step_s),
            *(_ms(getattr(cost.denoise, name) / steps) for name in used),
            _s(cost.encode_s),
            _s(cost.decode_s),
            f"{cost.memory_bytes / 1e9:.1f}",
            cost.limit,
        ]
        for cost in costs
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]


def _of_table(found: Found, costs: tuple[Cost, ...]) -> list[str]:
    """What its numbers mean."""
    out: list[str] = []
    learned = found.corrections.hit_rates if found.corrections is not None else {}
    for cache in dict.fromkeys(cost.candidate.cache for cost in costs if cost.hits):
        one = next(cost for cost in costs if cost.candidate.cache == cache)
        told = "as runs here have told" if cache.partition(":")[0] in learned else "assumed: generate --learn tells"
        out.append(
            f"cache {cache}: {one.hits:.0%} of the steps are left out ({told}); step is the mean of all, and one that "
            f"is computed takes {_ms(one.step_s)} ({one.candidate})"
        )
    if beside := OVERHEAD.get(found.machine.device.kind):
        out.append(f"GB is with {beside / 1e9:.1f} for the CUDA context and its libraries, which --memory names apart")
    return out


def _share(best: Cost) -> str:
    most = sorted(best.shares.items(), key=lambda item: -item[1])[:3]
    said = ", ".join(f"{share:.0%} {NAMES.get(name, name)}" for name, share in most if share > 0.01)
    same = f"; {best.replicated:.1%} of a rank's products are the same on every rank" if best.replicated > 0.001 else ""
    once = f"; compiling takes about {best.compile_s:.0f} s once" if best.compile_s else ""
    return f"its time is {said}{same}{once}"


def _against(found: Found, shown: int) -> list[str]:
    """Why each kind of other plan loses: by the parts that cost it the most."""
    best, out, seen = found.best, list[str](), set[tuple[bool, ...]]()
    for cost in found.costs[1:]:
        kind = tuple(degree > 1 for degree in cost.candidate.degrees.values())
        if kind in seen or len(out) == shown - 2:
            continue
        seen.add(kind)
        out.append(_loses(best, cost, found))
    return out


def _loses(best: Cost, other: Cost, found: Found) -> str:
    """By the parts that differ the most: of a request, of a picture where these are counted, or bytes."""
    demand = found.demand
    ratio = found.value(other) / found.value(best)
    if demand.objective == Objective.MEMORY:
        there, here = (f"{cost.memory_bytes / 1e9:.1f} GB" for cost in (other, best))
        return f"{other.candidate} takes {ratio:.2f} times as much: {there} against {here}"
    by_picture = demand.objective == Objective.THROUGHPUT

    def parts(cost: Cost) -> dict[str, float]:
        here = cost.denoise._asdict() | {"encode": cost.encode_s, "decode": cost.decode_s}
        here["compile"] = cost.compile_s / max(1, demand.requests)
        return {name: seconds / (cost.pictures if by_picture else 1) for name, seconds in here.items()}

    before = parts(best)
    change = {name: seconds - before[name] for name, seconds in parts(other).items()}
    most = sorted(change, key=lambda name: -abs(change[name]))[:2]
    most = [name for name in most if abs(change[name]) > 0.05 * max(map(abs, change.values()), default=0.0) > 0]
    of = "a picture" if by_picture else "a request"
    why = ", ".join(
        f"{_s(abs(change[name]))} {'more' if change[name] > 0 else 'less'} {of} for {NAMES.get(name, name)}"
        for name in sorted(most, key=lambda name: -change[name])
    )
    if ratio <= 1 + SAME:
        return f"{other.candidate} is as good ({ratio:.3f} times the time): {why or 'the same in all parts'}"
    return f"{other.candidate} takes {ratio:.2f} times as long: {why}"


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"
