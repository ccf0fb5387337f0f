"""What would make another plan the best: other links, heads or memory. Pure, torch-free."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parafuse.engine.planning.cost import Candidate, Costs
from parafuse.engine.planning.facts import Facts
from parafuse.engine.planning.machine import Machine
from parafuse.engine.planning.search import SAME, Floors, Found, best, illegal, pictures_of
from parafuse.errors import ConfigError

Change = Callable[[Facts, Machine], tuple[Facts, Machine]]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Something that would make another plan the best."""

    what: str
    plan: Candidate
    gain: float
    """How many times as fast as the plan that is the best now, then."""


def turns(found: Found) -> list[Turn]:
    """What would change the choice: the least of each kind of change that does."""
    costs, now = Costs(found.facts, found.machine, found.corrections), found.best.candidate
    floors = Floors(costs, found.demand)
    refusal = functools.cache(found.refusal) if found.refusal is not None else None
    out: list[Turn] = []
    for changes in changes_of(found.facts).values():
        for what, change in changes:
            facts, machine = change(found.facts, found.machine)
            there = costs.beside(facts, machine)
            try:
                then = best(facts, machine, found.demand, costs=there, refusal=refusal, floors=floors)
            except ConfigError:
                continue
            if then.candidate == now or illegal(now, facts, found.demand):
                continue
            same = there.cost(now, pictures=pictures_of(facts, found.demand, now))
            gain = found.value(same) / found.value(then)
            if gain > 1 + SAME:
                out.append(Turn(what=what, plan=then.candidate, gain=gain))
                break
    return out


def changes_of(facts: Facts) -> dict[str, list[tuple[str, Change]]]:
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
