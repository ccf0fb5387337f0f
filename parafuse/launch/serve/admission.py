"""What is refused at the moment of asking, before anything is stored. Pure: the numbers are given.

What is not known refuses nothing: an estimate that is missing lets a request in, and its deadline decides later."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parafuse.launch.serve.messages import Estimated

DAY_S = 86400.0
GONE = ("broken", "draining")
"""States of a server in which nothing is taken at all."""
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a request is not taken."""

    status: int
    """Of HTTP: 413, 429 or 503."""
    message: str
    """One line for the client, with the way out."""
    retry_after_s: int | None = None
    """When the same may be asked again; None: never with these numbers."""
    estimate_s: float | None = None
    """What was predicted: until it is done if it were taken, or what it would take."""
    code: str | None = None
    """For programs, where the status does not say it all."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this server, and this key, may have."""

    max_queued: int
    max_queued_of_key: int
    rank_seconds_a_day: float | None = None
    """Of this key, from midnight UTC; None: no limit."""
    patience_s: float = 120.0
    """How long a server may be starting or restarting, and still take requests to be done later."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """How things stand."""

    now_s: float
    """Unix seconds."""
    state: str = "ready"
    """Of `messages.Status`."""
    not_ready_s: float = 0.0
    """For how long it has been something else than ready."""
    why: str = ""
    """In one line."""
    queued: int = 0
    queued_of_key: int = 0
    spent_of_key: float = 0.0
    """Rank-seconds of this key since `day_began`."""
    pledged_of_key: float = 0.0
    """Rank-seconds that its jobs in the queue will take, as far as that is known."""
    wait_s: float = 0.0
    """Until a new job of this key would begin (`schedule.wait_s`)."""
    next_s: float = 1.0
    """Until the running call ends and a place becomes free, about."""


def day_began(now_s: float) -> float:
    """The last midnight UTC, Unix seconds."""
    return now_s - now_s % DAY_S


def admit(
    load: Load, limits: Limits, *, estimated: Estimated | None, num_ranks: int, deadline_s: float | None = None
) -> Refusal | None:
    """None where the request is taken. `deadline_s`: Unix seconds; `estimated`: None where nothing is known.

    The store decides about its places again when the job is stored, in one transaction: here it is said early, and with
    an estimate."""
    takes_s = None if estimated is None else estimated.seconds
    return (
        _not_ready(load, limits)
        or _too_large(estimated)
        or _full(load, limits, takes_s)
        or _spent(load, limits, takes_s, num_ranks)
        or _too_late(load, takes_s, deadline_s)
    )


def _not_ready(load: Load, limits: Limits) -> Refusal | None:
    if load.state == "ready" or (load.state not in GONE and load.not_ready_s <= limits.patience_s):
        return None
    why = f" ({load.why})" if load.why else ""
    if load.state == "draining":
        return Refusal(status=503, message="This server is ending; ask another one.", retry_after_s=30)
    if load.state == "broken":
        message = f"This server cannot paint now{why}; its operator must look after it. Ask another one, or later."
        return Refusal(status=503, message=message, retry_after_s=60)
    message = f"This server has been {load.state} for {_told(load.not_ready_s)}{why}; ask again later."
    return Refusal(status=503, message=message, retry_after_s=30)


def _too_large(estimated: Estimated | None) -> Refusal | None:
    if estimated is None or estimated.peak_bytes is None or not estimated.capacity_bytes:
        return None
    if estimated.peak_bytes <= estimated.capacity_bytes:
        return None
    needs, there = estimated.peak_bytes / GB, estimated.capacity_bytes / GB
    message = (
        f"This takes {needs:.1f} GB of a device's memory ({estimated.source}), and {there:.1f} GB are there: "
        "ask for a smaller size, fewer frames, or fewer outputs."
    )
    return Refusal(status=413, message=message, estimate_s=estimated.seconds)


def _full(load: Load, limits: Limits, takes_s: float | None) -> Refusal | None:
    for number, most, whose, code in (
        (load.queued, limits.max_queued, "of this server", "queue_full"),
        (load.queued_of_key, limits.max_queued_of_key, "of this key", "key_queue_full"),
    ):
        if number >= most:
            message = f"The queue {whose} is full: {number} jobs wait, at most {most} may; ask again later."
            done_s = None if takes_s is None else load.wait_s + takes_s
            after_s = _seconds(load.next_s)
            return Refusal(status=429, message=message, retry_after_s=after_s, estimate_s=done_s, code=code)
    return None


def _spent(load: Load, limits: Limits, takes_s: float | None, num_ranks: int) -> Refusal | None:
    most = limits.rank_seconds_a_day
    if most is None:
        return None
    takes = (takes_s or 0.0) * num_ranks
    if takes > most:
        message = f"This takes {takes:.0f} GPU-seconds, and this key has {most:.0f} a day: ask for less of it."
        return Refusal(status=429, message=message, estimate_s=takes_s)
    had = load.spent_of_key + load.pledged_of_key
    if had >= most or had + takes > most:
        message = (
            f"This key has had {load.spent_of_key:.0f} GPU-seconds of {most:.0f} a day, {load.pledged_of_key:.0f} more "
            f"wait in the queue, and this takes {takes:.0f}: ask again after midnight UTC, or for a larger quota."
        )
        left_s = day_began(load.now_s) + DAY_S - load.now_s
        return Refusal(status=429, message=message, retry_after_s=_seconds(left_s), estimate_s=takes_s)
    return None


def _too_late(load: Load, takes_s: float | None, deadline_s: float | None) -> Refusal | None:
    if deadline_s is None:
        return None
    left_s = deadline_s - load.now_s
    done_s = load.wait_s + (takes_s or 0.0)
    if left_s > 0 and done_s <= left_s:
        return None
    if left_s <= 0 or (takes_s is not None and takes_s > left_s):
        message = (
            f"The deadline in {_told(max(0.0, left_s))} cannot be made: this takes about {_told(takes_s or 0.0)} by "
            "itself; give it more time, or ask for less."
        )
        return Refusal(status=429, message=message, estimate_s=takes_s)
    message = (
        f"The deadline in {_told(left_s)} cannot be made: it would be done in about {_told(done_s)}, since others wait "
        "before it; give it more time, or ask again later."
    )
    return Refusal(status=429, message=message, retry_after_s=_seconds(done_s - left_s), estimate_s=done_s)


def _seconds(number: float) -> int:
    return max(1, math.ceil(number))


def _told(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
