"""What caches did in a request, for its receipt; and what a receipt says they are to do again."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from parafuse.cache import Cache
from parafuse.engine.caches.caching import Caching, Replay
from parafuse.engine.caches.memory import Decision, Memory
from parafuse.errors import ConfigError, RankError
from parafuse.parallel.world import World

TIE = 1e-4
"""A change that is nearer than this to its threshold may fall on the other side on other ranks."""
COMPUTED, SKIPPED = "c", "s"
SAME = "give it the receipt's own call (steps, guidance, prompts), or leave out the decisions."


def report(cache: Cache | None, memories: Mapping[str, Memory], world: World) -> dict[str, Any]:
    """All decisions of a request, the same on every rank and in every layout. Collective.

    `decisions`: by component and call a letter for each sample. `changes`: what was measured, null where nothing was.
    `branches`: which one each call is. `hits`: by step, how many of the decisions were skips. `bytes`: the most that
    was kept, by rank. `waits`: how often each rank's host waited for a decision."""
    if cache is None or not memories:
        return {}
    mine = {name: _plain(memory) for name, memory in memories.items()}
    everyone: list[dict[str, Any]] = list(map(json.loads, world.everyone("decisions", json.dumps(mine))))
    merged: dict[str, dict[int, dict[int, Decision]]] = {}
    hits: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])
    for name in memories:
        calls: defaultdict[int, dict[int, Decision]] = defaultdict(dict)
        steps: dict[int, int] = {}
        for said in everyone:
            for number, (step, samples) in said[name]["calls"].items():
                steps[int(number)] = step
                for row, decision in samples.items():
                    found = calls[int(number)].setdefault(int(row), Decision(*decision))
                    if found.skipped != decision[0]:
                        raise RankError(
                            f"{name}: ranks decided differently whether to skip call {int(number) + 1}, so they have "
                            "painted different pictures; run it without a cache, and report it."
                        )
        merged[name] = {number: dict(sorted(calls[number].items())) for number in sorted(calls)}
        for number, samples in merged[name].items():
            hits[steps[number]][0] += sum(one.skipped for one in samples.values())
            hits[steps[number]][1] += len(samples)
    threshold = getattr(cache, "threshold", None)
    measured = [one.change for calls in merged.values() for x in calls.values() for one in x.values()]
    return {
        "cache": str(cache),
        "decisions": {name: [_letters(samples) for samples in calls.values()] for name, calls in merged.items()},
        "changes": {
            name: [[_rounded(one.change) for one in samples.values()] for samples in calls.values()]
            for name, calls in merged.items()
        },
        "branches": {name: memory.calls for name, memory in memories.items()},
        "hits": [f"{skipped}/{of}" for _, (skipped, of) in sorted(hits.items())],
        "near_ties": sum(
            change is not None and threshold is not None and abs(change - threshold) < TIE for change in measured
        ),
        "bytes": [sum(said[name]["bytes"] for name in memories) for said in everyone],
        "waits": [sum(said[name]["waits"] for name in memories) for said in everyone],
    }


def skips(memories: Mapping[str, Memory]) -> tuple[int, int]:
    """(skipped, all) decisions so far, of this rank."""
    found = [one for memory in memories.values() for x in memory.decisions.values() for one in x.values()]
    return sum(one.skipped for one in found), len(found)


@contextmanager
def following(replay: Mapping[str, list[str]] | None, caches: Mapping[str, Caching]) -> Iterator[None]:
    """While it is open, caches decide as a receipt says, where there is one. Raises ConfigError where that is of other
    components."""
    missing = [name for name in caches if replay is not None and name not in replay]
    if missing:
        raise ConfigError(f"plan.replay: has decisions for {', '.join(replay or ())}, not for {missing[0]}.")
    try:
        for name, cache in caches.items():
            cache.replay = _decided(name, replay[name]) if replay is not None else None
        yield
    finally:
        for cache in caches.values():
            cache.replay = None


def check_followed(replay: Mapping[str, list[str]] | None, memories: Mapping[str, Memory]) -> None:
    """Raises ConfigError where a request has made fewer calls than the receipt has decisions for."""
    for name, decisions in (replay or {}).items():
        made = len(memories[name].calls)
        if made != len(decisions):
            raise ConfigError(
                f"plan.replay: has decisions for {len(decisions)} calls of {name}, and this request made {made}; {SAME}"
            )


def _decided(name: str, decisions: list[str]) -> Replay:
    def decided(number: int, row: int) -> bool:
        if number >= len(decisions) or row >= len(decisions[number]):
            raise ConfigError(f"plan.replay: has no decision for call {number + 1}, sample {row + 1} of {name}; {SAME}")
        return decisions[number][row] == SKIPPED

    return decided


def _plain(memory: Memory) -> dict[str, Any]:
    calls = {
        number: (memory.steps[number], {row: (one.skipped, one.change) for row, one in samples.items()})
        for number, samples in memory.decisions.items()
    }
    return {"calls": calls, "bytes": memory.most_bytes, "waits": memory.waits}


def _letters(samples: dict[int, Decision]) -> str:
    return "".join(SKIPPED if one.skipped else COMPUTED for one in samples.values())


def _rounded(change: float | None) -> float | None:
    return None if change is None or not math.isfinite(change) else float(f"{change:.6g}")
