"""A run beside its prediction: printed where that is known at once, and kept where `--learn` asks for it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parafuse.cache import cache_of
from parafuse.engine.planning import choose, known, learned
from parafuse.engine.planning.cost import Candidate, Costs
from parafuse.errors import ParafuseError
from parafuse.log import note
from parafuse.offload import offload_of

if TYPE_CHECKING:
    from parafuse.config import Config
    from parafuse.engine.engine import Engine
    from parafuse.engine.plan import Plan
    from parafuse.engine.source import ModelSource


@dataclass(frozen=True)
class Step:
    """Seconds of a step."""

    predicted_s: float
    measured_s: float | None

    def __str__(self) -> str:
        told = "" if self.measured_s is None else f"a step {_shown(self.measured_s)}, "
        return f"{told}predicted {_shown(self.predicted_s)}"


def measured_step(receipt: dict[str, Any]) -> float | None:
    """The median of a request's steps after the first; None where they were not told apart."""
    steps = receipt.get("timings_s", {}).get("steps") or []
    return statistics.median(steps[1:]) if len(steps) > 1 else None


def beside(engine: Engine, source: ModelSource, config: Config, call: dict[str, Any], pictures: int) -> Step | None:
    """What was predicted when the layout was chosen, or is by facts of such a request that an earlier plan or run has
    kept; and what was measured. None where neither is at hand: nothing is found out for it."""
    step = measured_step(engine.receipt)
    if engine.chosen is not None:
        return Step(engine.chosen.best.step_s, step)
    plan = engine.plan
    facts = choose.kept_facts(source, config, (plan.device, plan.dtype), call) if engine.rank == 0 else None
    if facts is None:
        return None
    try:
        machine = choose.machine_at_hand(plan.world_size, plan.device, plan.dtype)
    except ParafuseError:
        return None
    known_of = choose.corrections_of(machine, plan.device, plan.dtype)
    return Step(Costs(facts, machine, known_of).cost(candidate_of(plan), pictures=pictures).step_s, step)


def candidate_of(plan: Plan) -> Candidate:
    """What the planner knows of a plan."""
    return Candidate(
        **{axis: plan.degrees[axis] for axis in ("data", "cfg", "ring", "ulysses")},
        compile=plan.compile,
        quantize=plan.quantize.partition(":")[0],
        cache=cache.brief if (cache := cache_of(plan.cache or None)) is not None else "",
        offload=choose.offload_name(offload_of(plan.offload or None)),
    )


def learn(engine: Engine, source: ModelSource, config: Config, call: dict[str, Any], pictures: int) -> str:
    """Compares the last request with its prediction and keeps that. Returns a line. On one rank."""
    plan, step = engine.plan, measured_step(engine.receipt)
    device, one = known.this_machine(plan.device), candidate_of(plan)
    if one.cache:
        return _learn_hits(engine, device, source.name, one.cache.partition(":")[0])
    if step is None:
        return "not learned: the steps of this pipeline are not told apart"
    try:
        facts = choose.facts_of(source, config, (plan.device, plan.dtype), call)
        machine = choose.machine_at_hand(plan.world_size, plan.device, plan.dtype)
    except ParafuseError as error:
        return f"not learned: {str(error).partition(chr(10))[0]}"
    cost = Costs(facts, machine).cost(one, pictures=pictures)
    told = {"model": facts.model, "layout": str(one), "measured_s": step, **learned.of_step(cost, facts.steps)}
    what = "kept" if learned.record(device, told, machine, plan.dtype) else NOT_KEPT
    after = Costs(facts, machine, learned.corrections(device, machine, plan.dtype)).cost(one, pictures=pictures).step_s
    return f"learned: {Step(cost.step_s, step)} without corrections, {_shown(after)} with all that is known ({what})"


NOT_KEPT = "not kept: it is too far off to be anything but disturbed, or PARAFUSE_CACHE is empty"


def _learn_hits(engine: Engine, device: str, model: str, cache: str) -> str:
    """Of a request with a cache: its steps differ, so its hit rate alone is learned."""
    counts = [text.split("/") for text in engine.receipt.get("cache", {}).get("hits", [])]
    skipped, of = (sum(int(pair[i]) for pair in counts) for i in range(2))
    if not of:
        return f"not learned: {cache} decided nothing"
    kept = learned.record_hits(device, model, cache, skipped / of)
    return f"learned: {cache} left out {skipped / of:.0%} of the calls ({'kept' if kept else NOT_KEPT})"


def tell(engine: Engine, source: ModelSource, config: Config, call: dict[str, Any], pictures: int) -> None:
    """On rank 0, where it was asked for."""
    if engine.rank == 0:
        note(learn(engine, source, config, call, pictures))


def _shown(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
