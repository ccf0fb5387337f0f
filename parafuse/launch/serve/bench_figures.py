"""Figures of a load test from what became of each request. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

QUANTILES = (50, 90, 95, 99)
DONE, FAILED, CANCELLED, REFUSED, BROKEN, UNANSWERED = "done failed cancelled refused broken unanswered".split()
ENDS = (DONE, FAILED, CANCELLED, REFUSED, BROKEN, UNANSWERED)
"""Of a request: broken is an answer that a server should not give, or none because the connection failed; unanswered is
one that was still open when the test gave up."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one request. Times are seconds since the test began."""

    kind: str
    key: str
    end: str
    due_s: float
    """When it was to be sent. Latencies count from here: a generator or a server that is late is not excused."""
    sent_s: float
    ended_s: float
    deadline_s: float | None = None
    """That it asked for, from when it was sent."""
    queued_s: float | None = None
    """Until its last try began, as the server's job says."""
    service_s: float | None = None
    """From there to its end."""
    rank_seconds: float = 0.0
    status: int = 0
    code: str = ""
    """Of the error, where there was one."""
    is_cancel: bool = False
    """Whether the test asked to cancel it."""

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.due_s

    @property
    def is_good(self) -> bool:
        """Done, and in time."""
        return self.end == DONE and (self.deadline_s is None or self.latency_s <= self.deadline_s)


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Percentiles by linear interpolation between the nearest samples, the mean and the most; empty for none."""
    if not samples:
        return {}
    found = np.percentile(np.asarray(samples, dtype=np.float64), QUANTILES, method="linear")
    return {f"p{q}": float(x) for q, x in zip(QUANTILES, found, strict=True)} | {
        "mean": float(np.mean(samples)), "max": float(max(samples)), "number": len(samples)
    }  # fmt: skip


def jain(shares: Sequence[float]) -> float | None:
    """Jain's index of fairness: 1 where all have the same, 1/n where one has all (Jain, Chiu, Hawe 1984). None for no
    shares, and where nobody has anything."""
    total = sum(shares)
    return total**2 / (len(shares) * sum(one * one for one in shares)) if total else None


def figures(outcomes: Sequence[Outcome], duration_s: float, health_s: Sequence[float]) -> dict[str, Any]:
    """Of a whole test, as JSON has it. `duration_s`: during which requests came; `health_s`: latencies of health."""
    done = [one for one in outcomes if one.end == DONE]
    wanted = [one for one in outcomes if not one.is_cancel]
    good = sum(one.is_good for one in wanted)
    return {
        "requests": len(outcomes),
        "ends": {end: sum(one.end == end for one in outcomes) for end in ENDS},
        "codes": _counts([f"{one.status} {one.code}".strip() for one in outcomes if one.end != DONE]),
        "offered_per_s": len(outcomes) / duration_s,
        "done_per_s": len(done) / duration_s,
        "good": good,
        "goodput_per_s": good / duration_s,
        "good_of_wanted": good / len(wanted) if wanted else None,
        "latency_s": spread([one.latency_s for one in done]),
        "queued_s": spread([one.queued_s for one in done if one.queued_s is not None]),
        "service_s": spread([one.service_s for one in done if one.service_s is not None]),
        "refusal_s": spread([one.latency_s for one in outcomes if one.end == REFUSED]),
        "sent_late_s": spread([one.sent_s - one.due_s for one in outcomes]),
        "health_s": spread(health_s),
        "keys": (keys := _by_key(outcomes)),
        "fairness": {
            "of_rank_seconds": jain([one["rank_seconds"] for one in keys.values()]),
            "of_share_done": jain([one["share_done"] for one in keys.values()]),
        },
        "kinds": {kind: spread([one.latency_s for one in done if one.kind == kind]) for kind in _names(outcomes)},
    }


def _by_key(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys(one.key for one in outcomes):
        own = [one for one in outcomes if one.key == key and not one.is_cancel]
        done = [one for one in own if one.end == DONE]
        found[key] = {
            "requests": len(own),
            "done": len(done),
            "share_done": len(done) / len(own) if own else 0.0,
            "rank_seconds": sum(one.rank_seconds for one in done),
            "latency_s": spread([one.latency_s for one in done]),
        }
    return dict(sorted(found.items()))


def _counts(words: Sequence[str]) -> dict[str, int]:
    return {word: words.count(word) for word in sorted(set(words))}


def _names(outcomes: Sequence[Outcome]) -> list[str]:
    return sorted({one.kind for one in outcomes})
