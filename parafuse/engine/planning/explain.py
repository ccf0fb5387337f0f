"""The choice of a plan in words and numbers: a table, why others lose, what would change it. Torch-free."""

from __future__ import annotations

from typing import Any

from parafuse.engine.planning.cost import Cost
from parafuse.engine.planning.facts import ATTENTION, CONVOLUTION, DENOISE, GEMM
from parafuse.engine.planning.search import Found, Objective, turns

SHOWN = 6
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
}


def one_line(found: Found) -> str:
    """Why this plan, in a few words: for the plan's own line."""
    best = found.best
    if len(found.costs) == 1:
        return "chosen by cost: no other layout is legal"
    second = found.costs[1]
    ratio = found.value(second) / found.value(best)
    what = "bytes" if found.demand.objective == Objective.MEMORY else "time"
    return (
        f"chosen by cost of {len(found.costs)} plans: {_ms(best.step_s)} a step predicted, next best "
        f"{second.candidate} ({ratio:.2f} times the {what})"
    )


def lines(found: Found, *, shown: int = SHOWN) -> list[str]:
    """For people."""
    facts, machine, best = found.facts, found.machine, found.best
    request = f"{facts.model}, {_request(found)}, {facts.dtype} on {machine.name}"
    per_step = {family: _flops(found, family) / 1e12 for family in (GEMM, ATTENTION, CONVOLUTION)}
    work = ", ".join(f"{number:.4g} TFLOP {family}" for family, number in per_step.items() if number)
    out = [request, f"a step: {work}; {len(found.costs)} legal plans of {found.tried} for {found.demand.objective}", ""]
    out += _table(found, found.costs[:shown])
    out += ["", f"best: {best.candidate}", f"  {_share(best)}"]
    out += [f"  {text}" for text in _against(found, shown)]
    changes = turns(found)
    if changes:
        out += ["", "what would change the choice:"]
        out += [f"  with {one.what}: {one.plan} ({one.gain:.2f} times as fast then)" for one in changes]
    if found.refused:
        out += ["", "ruled out:"]
        out += [f"  {plan}: {why}" for plan, why in list(found.refused.items())[:shown]]
    return out


def to_dict(found: Found) -> dict[str, Any]:
    """For machines."""
    return {
        "model": found.facts.model,
        "dtype": found.facts.dtype,
        "steps": found.facts.steps,
        "hardware": found.machine.name,
        "objective": str(found.demand.objective),
        "fidelity": str(found.demand.fidelity),
        "tried": found.tried,
        "plans": [cost.to_dict() for cost in found.costs],
        "changes": [{"what": one.what, "degrees": one.plan.degrees, "gain": one.gain} for one in turns(found)],
        "refused": found.refused,
    }


def _request(found: Found) -> str:
    call = found.facts.call
    size = f"{call['width']}x{call['height']}, " if {"width", "height"} <= call.keys() else ""
    frames = f"{call['num_frames']} frames, " if "num_frames" in call else ""
    branches = f", {found.facts.branches} branches" if found.facts.branches > 1 else ""
    return f"{size}{frames}{found.facts.steps} steps{branches}"


def _flops(found: Found, family: str) -> float:
    return sum(part.calls * part.total(family) for part in found.facts.of(DENOISE)) / found.facts.steps


def _table(found: Found, costs: tuple[Cost, ...]) -> list[str]:
    used = [name for name in PARTS if any(getattr(cost.denoise, name) > 0 for cost in costs)]
    steps = found.facts.steps
    head = ["plan", "request", "step", *used, "encode", "decode", "GB", "limit"]
    rows = [
        [
            str(cost.candidate),
            _s(cost.seconds),
            _ms(cost.step_s),
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


def _share(best: Cost) -> str:
    parts = best.denoise._asdict() | {"encode": best.encode_s, "decode": best.decode_s}
    total = best.seconds or 1.0
    most = sorted(parts.items(), key=lambda item: -item[1])[:3]
    said = ", ".join(
        f"{seconds / total:.0%} {NAMES.get(name, name)}" for name, seconds in most if seconds / total > 0.01
    )
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
    steps = found.facts.steps
    more = {
        name: (getattr(other.denoise, name) / other.pictures - getattr(best.denoise, name) / best.pictures) / steps
        for name in PARTS
    }
    more |= {
        "encode": (other.encode_s / other.pictures - best.encode_s / best.pictures) / steps,
        "decode": (other.decode_s / other.pictures - best.decode_s / best.pictures) / steps,
    }
    worse = sorted(((seconds, name) for name, seconds in more.items() if seconds > 0), reverse=True)[:2]
    ratio = found.value(other) / found.value(best)
    why = " and ".join(f"{_ms(seconds)} more a step for {NAMES.get(name, name)}" for seconds, name in worse)
    how = "much" if found.demand.objective == Objective.MEMORY else "long"
    return f"{other.candidate} takes {ratio:.2f} times as {how}: {why or 'no part alone tells'}"


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"
