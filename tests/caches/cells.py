"""What a cache does to one transformer in one layout, against the same cache on one rank."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import parafuse
from parafuse.cache import Cache, FirstBlockCache
from parafuse.engine.apply import Handle
from parafuse.engine.caches.memory import Memory
from parafuse.engine.stack import block_stack
from parafuse.engine.verify import relative_error
from parafuse.errors import ParafuseError
from tests.caches.painted import EVERY_STEP
from tests.caches.trajectory import calls, run
from tests.dist.ranks import RankFailure, run_ranks
from tests.support.cells import EXACT, ROUNDED
from tests.zoo.collect import cases, randomized

LAYOUTS: dict[str, dict[str, int]] = {
    "Ulysses 3": dict(ulysses=3),
    "ring 2": dict(ring=2, ulysses=1),
    "ring 2 x Ulysses 2": dict(ring=2, ulysses=2),
}
PATHS = re.compile(r"(?:/[\w.\-]+){3,}")
"""Files of the machine in what torch says."""
COMPILED = "compiled, Ulysses 2"


@dataclass
class Cell:
    """One case in one layout."""

    error: float = 0.0
    """Largest difference from one rank with the same cache over the largest value, fp32, of all steps."""
    again: float = 0.0
    """The same of a skipped step whose arguments are those of the computed one, from the plain model."""
    skipped: int = 0
    of: int = 0
    same: bool = True
    """Whether every decision is that of one rank."""
    later: int = 0
    """Graphs made from the first skipped step on."""
    refused: str = ""
    failed: str = ""
    rounding: str = ""
    decides: bool = True
    """Whether the method leaves anything out of some calls only; else it does the same in all."""

    @property
    def faults(self) -> list[str]:
        if self.refused or self.failed:
            return [self.failed] if self.failed else []
        limit = ROUNDED if self.rounding else EXACT
        wrong = [f"differs by {error:.1e}" for error in (self.error, self.again) if not error <= limit]
        wrong += [] if self.same else ["decides otherwise than one rank"]
        wrong += [] if 0 < self.skipped < self.of or not self.decides else [f"skips {self.skipped} of {self.of}"]
        return wrong + ([f"makes {self.later} graphs after the first skip"] if self.later else [])


def decisions(memory: Memory) -> list[list[bool]]:
    """By call and sample: whether it was skipped."""
    return [[one.skipped for one in samples.values()] for samples in memory.decisions.values()]


def parting_cache(name: str) -> FirstBlockCache:
    """One whose threshold parts the steps of a case: in the widest gap of the changes of the first block's residual."""
    model = randomized(cases()[name].build())
    with _applied(model, FirstBlockCache(0.0, **EVERY_STEP)) as handle, handle.request() as memories:
        run(model, calls(cases()[name]))
        (memory,) = memories.values()
    levels = [x.change for samples in memory.decisions.values() for x in samples.values()]
    changes = sorted(x for x in levels if x)
    if levels and all(x is None for x in levels):
        raise NeverSkippedError("writes into what it is given (keys for later calls), so no call of it is left out")
    low, high = max(pairwise(changes), key=lambda pair: pair[1] / pair[0])
    return FirstBlockCache(float(f"{(low * high) ** 0.5:.3g}"), **EVERY_STEP)


class NeverSkippedError(Exception):
    """A model whose calls all do more than give a result."""


def _applied(model: nn.Module, cache: Cache, **degrees: int) -> Handle:
    return parafuse.apply(model, parafuse.Config(cache=cache, parallel=parafuse.Parallel(**degrees)))


Alone = tuple[list[Tensor], list[list[bool]], float]
"""Results by step, decisions, and the worst error of steps that are skipped when all are given the same."""


def on_one_rank(name: str, cache: Cache) -> Alone:
    """What every layout is held against."""
    model = randomized(cases()[name].build())
    plain = run(model, calls(cases()[name])[:1])[0]
    with _applied(model, cache) as handle, handle.request() as memories:
        found = run(model, calls(cases()[name]))
        (memory,) = memories.values()
    always = replace(cache, threshold=1e9) if isinstance(cache, FirstBlockCache) else cache
    with _applied(model, always) as handle, handle.request() as memories:
        again = run(model, calls(cases()[name])[:1] * len(found))
        (other,) = memories.values()
    skips = [all(samples) for samples in decisions(other)]
    worst = max((relative_error([x], [plain]) for x, mine in zip(again, skips, strict=True) if mine), default=0.0)
    return found, decisions(memory), worst


def measure(name: str, degrees: dict[str, int], cache: Cache, alone: Alone, compiled: bool) -> Cell:
    """One cell, as one rank sees it."""
    case = cases()[name]
    want, decided, again = alone
    cell = Cell(again=again, rounding=case.rounding)
    model = randomized(case.build())
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    try:
        with _applied(model, cache, **degrees) as handle:
            if compiled:
                torch._dynamo.reset()
                for block in block_stack(model):
                    block.compile(fullgraph=True, backend=backend)
            with handle.request() as memories:
                (memory,) = memories.values()
                found, before = [], 0
                for values in calls(case):
                    before = before if any(map(any, decisions(memory))) else graphs
                    found += run(model, [values])
    except ParafuseError as refusal:
        return Cell(refused=PATHS.sub("...", str(refusal))[:300])
    mine = decisions(memory)
    cell.error = relative_error(found, want)
    cell.same = mine == decided
    cell.skipped, cell.of = sum(map(sum, mine)), sum(map(len, mine))
    cell.later = graphs - before if compiled else 0
    return cell


def cell_of(name: str, column: str, cache: Cache, alone: Alone) -> Cell:
    """The worst that the ranks of a layout see."""
    compiled = column == COMPILED
    degrees = dict(ulysses=2) if compiled else LAYOUTS[column]
    size = 1
    for degree in degrees.values():
        size *= degree
    try:
        first, *others = run_ranks(measure, size, name, degrees, cache, alone, compiled, timeout_s=300)
    except RankFailure as failure:
        return Cell(failed=" ".join(str(failure).splitlines()[-3:])[:300])
    for other in others:
        first.error, first.again = max(first.error, other.error), max(first.again, other.again)
        first.same, first.later = first.same and other.same, max(first.later, other.later)
        if first.refused != other.refused:
            first.failed = "one rank refuses, another does not"
    return first
