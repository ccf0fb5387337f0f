"""Which job goes next, and which may go with it in one call. Pure: what it knows is given, and the same gives the same.

A priority goes next whose level is highest: itself, and one more for each `age_s` seconds that jobs of it have waited
since one was last taken. Of the keys that wait at it, the one that has had the least seconds (start-time fair queueing,
Goyal et al. 1996). Of that key's jobs, the one that is due first.

What holds, and is tested:
- Something goes whenever something waits.
- A priority waits at most `(span + 1) * age_s` seconds, `span` being the greatest difference of priorities, and after
  that one call of each other priority: one that is taken begins again, so it goes ahead at most once more.
- Two keys that both wait at one priority, and at no other, get seconds that differ by at most one call of each. A key
  that comes anew stands with those that have had least: it neither waits behind what others have queued, nor makes up
  for its absence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from parafuse.launch.serve.jobs import Job, JobRequest, State

SecondsOf = Callable[[JobRequest, int], float | None]
"""(what is asked, how many such jobs in one call) -> seconds of the call; None: not known."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What choosing goes by."""

    batch: int = 1
    """Jobs in one call at most."""
    min_gain: float = 1.05
    """How much sooner several jobs must be done together than one after another."""
    age_s: float = 60.0
    """Seconds of waiting that count as much as one step of priority."""
    patience_s: float = 600.0
    """A job without a deadline is due so many seconds after it came: among its key's jobs, those with deadlines do not
    go ahead of it for ever."""
    most_debt: float = 600.0
    """Rank-seconds by which one key can be ahead of others at most: what was longer ago is forgotten."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What keys have had, so far as it matters for who is next. Never changed: each method gives a new one."""

    had: Mapping[str, float] = field(default_factory=dict[str, float])
    """Key -> rank-seconds by its weight, counted from where it came in. Of keys that wait, and that waited lately."""
    waiting: frozenset[str] = frozenset()
    taken_s: Mapping[int, float] = field(default_factory=dict[int, float])
    """When a job of a priority was last taken, as the first of a call."""
    last_s: Mapping[str, float] = field(default_factory=dict[str, float])
    """When a job of a key was last taken: where two have had the same, they take turns."""

    def least(self) -> float:
        return min((self.had.get(owner, 0.0) for owner in self.waiting), default=max(self.had.values(), default=0.0))

    def seen(self, queued: Iterable[Job], most_debt: float) -> Shares:
        """With the keys that wait now: a new one stands where those stand that have had least."""
        owners = frozenset(job.owner for job in queued)
        floor = self.least()
        stand = {owner: max(self.had.get(owner, 0.0), floor) for owner in owners}
        for owner in owners & self.waiting:  # those that wait keep their place
            stand[owner] = self.had.get(owner, 0.0)
        low = min(stand.values(), default=floor)
        gone = {owner: had for owner, had in self.had.items() if owner not in owners and had > low}
        had = {owner: min(one - low, most_debt) for owner, one in {**gone, **stand}.items()}
        last = {owner: s for owner, s in self.last_s.items() if owner in had}
        return Shares(had=had, waiting=owners, taken_s=self.taken_s, last_s=last)

    def taken(self, jobs: Sequence[Job], now_s: float) -> Shares:
        """After these were put into a call. Its company says nothing of whether others of its priority were served."""
        return dataclasses.replace(
            self,
            taken_s={**self.taken_s, jobs[0].priority: now_s},
            last_s={**self.last_s, **{job.owner: now_s for job in jobs}},
        )

    def charged(
        self, jobs: Sequence[Job], rank_seconds: float, now_s: float, weights: Mapping[str, float] | None = None
    ) -> Shares:
        """After a call of these jobs has ended, however it ended: each bears its part of it."""
        had = dict(self.had)
        for job in jobs:
            weight = (weights or {}).get(job.owner, 1.0)
            had[job.owner] = had.get(job.owner, 0.0) + rank_seconds / len(jobs) / weight
        return dataclasses.replace(self.taken(jobs, now_s), had=had)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is to be done now."""

    jobs: tuple[Job, ...]
    """For the next call; the first decides, the others go with it. Empty where nothing waits."""
    shares: Shares
    """To choose with the next time; `charged` is told when the call has ended."""


def choose(
    queued: Sequence[Job],
    shares: Shares,
    now_s: float,
    *,
    policy: Policy,
    seconds_of: SecondsOf | None = None,
    alone: Collection[str] = (),
    most_of_key: Mapping[str, int] | None = None,
) -> Choice:
    """The next call. `queued`: all that wait, in any order; `seconds_of`: without it, one job goes at a time. `alone`:
    jobs that go with no other. `most_of_key`: how many of a key's jobs may run at once; none of one with 0. Jobs whose
    deadline has passed do not go at all (`JobStore.fail_late` ends them)."""
    most = most_of_key or {}
    there = [job for job in queued if job.state is State.QUEUED and not job.cancel_asked]
    left = [job for job in there if (job.deadline_s is None or job.deadline_s > now_s) and most.get(job.owner, 1) > 0]
    shares = shares.seen(left, policy.most_debt)
    if not left:
        return Choice(jobs=(), shares=shares)
    priority = _next_priority(left, shares, now_s, policy)
    first = min((job for job in left if job.priority == priority), key=lambda job: _order(job, shares, policy))
    company = [job for job in left if job.id != first.id and not {job.id, first.id} & set(alone)]
    company = _compatible(first, company, shares, policy, most)
    jobs = (first, *_riders(first, company, shares, now_s, policy=policy, seconds_of=seconds_of))
    return Choice(jobs=jobs, shares=shares.taken(jobs, now_s))


def together(request: JobRequest) -> tuple[Any, ...] | None:
    """Jobs for which this is the same can go in one call; None: never with another. Prompts and seeds may differ."""
    if request.images or request.coding is not None:
        return None
    return (
        request.kind,
        tuple(sorted((name, repr(value)) for name, value in request.settings.items())),
        request.num_outputs,
        request.negative_prompt is None,  # a call takes one for each prompt, or none
        request.lora,
        request.cache,
        request.previews,
        request.format,
        request.frames_per_second,
    )


def wait_s(
    job: Job,
    queued: Iterable[Job],
    seconds_of: SecondsOf,
    *,
    running_left_s: float = 0.0,
    patience_s: float = Policy().patience_s,
) -> float:
    """The seconds until a job begins that is certain to pass, by what is known of those that wait: what its own key
    asked for before it, as much of each other key, all of higher priority, and the call that runs.

    Calls whose seconds are not known count nothing, and a batch counts as one after another: it is for refusing what
    cannot be, and for telling a client."""
    mine = 0.0
    others: dict[str, float] = {}
    higher = 0.0
    for one in queued:
        seconds = seconds_of(one.request, 1) or 0.0
        if one.id == job.id or one.state is not State.QUEUED or one.priority < job.priority:
            continue
        if one.priority > job.priority:
            higher += seconds
        elif one.owner != job.owner:
            others[one.owner] = others.get(one.owner, 0.0) + seconds
        elif _due_s(one, patience_s) <= _due_s(job, patience_s):
            mine += seconds
    return running_left_s + higher + mine + sum(min(seconds, mine) for seconds in others.values())


def _next_priority(left: Sequence[Job], shares: Shares, now_s: float, policy: Policy) -> int:
    """The one with the highest level; of these, the one that waits longest."""
    since: dict[int, float] = {}
    for job in left:
        since[job.priority] = min(since.get(job.priority, job.created_s), job.created_s)
    since = {one: max(came, shares.taken_s.get(one, came)) for one, came in since.items()}

    def order(one: int) -> tuple[float, float, int]:
        level = one + int(max(0.0, now_s - since[one]) / policy.age_s)
        return -level, since[one], -one

    return min(since, key=order)


def _order(job: Job, shares: Shares, policy: Policy) -> tuple[Any, ...]:
    """Sorts jobs of one priority by who is next."""
    last = shares.last_s.get(job.owner, 0.0)
    return shares.had.get(job.owner, 0.0), last, job.owner, _due_s(job, policy.patience_s), job.created_s, job.id


def _due_s(job: Job, patience_s: float) -> float:
    due = job.created_s + patience_s
    return due if job.deadline_s is None else min(due, job.deadline_s)


def _compatible(
    first: Job, left: Sequence[Job], shares: Shares, policy: Policy, most_of_key: Mapping[str, int]
) -> list[Job]:
    """Those that may go with the first, by who is next, and no more of a key than may run at once."""
    key = together(first.request)
    running = {first.owner: 1}
    found: list[Job] = []
    if policy.batch == 1 or key is None:
        return found
    for job in sorted(left, key=lambda job: (-job.priority, *_order(job, shares, policy))):
        number = running.get(job.owner, 0)
        if number < most_of_key.get(job.owner, policy.batch) and together(job.request) == key:
            running[job.owner] = number + 1
            found.append(job)
    return found


def _riders(
    first: Job,
    same: list[Job],
    shares: Shares,
    now_s: float,
    *,
    policy: Policy,
    seconds_of: SecondsOf | None,
) -> list[Job]:
    """Of those that may, those that go with the first, keys in turn: as many as are done soonest for each."""
    alone_s = None if seconds_of is None or not same else seconds_of(first.request, 1)
    if seconds_of is None or not alone_s:
        return []
    same = _in_turn(first, same, shares, alone_s)
    best, size, latest = policy.min_gain, 1, _latest_s(first, now_s)
    for k in range(2, min(policy.batch, len(same) + 1) + 1):
        latest = min(latest, _latest_s(same[k - 2], now_s))
        seconds = seconds_of(first.request, k)
        # what would be done in time alone must not be late for its company
        if seconds is None or (alone_s <= latest < seconds):
            continue
        if k * alone_s / seconds > best:
            best, size = k * alone_s / seconds, k
    return same[: size - 1]


def _latest_s(job: Job, now_s: float) -> float:
    return float("inf") if job.deadline_s is None else job.deadline_s - now_s


def _in_turn(first: Job, same: list[Job], shares: Shares, alone_s: float) -> list[Job]:
    """Jobs in the order given within each priority and key; of keys, always the one that has had least so far."""
    had = {job.owner: shares.had.get(job.owner, 0.0) for job in (first, *same)}
    had[first.owner] += alone_s
    rows: dict[str, list[Job]] = {}
    for job in reversed(same):
        rows.setdefault(job.owner, []).append(job)
    found: list[Job] = []
    while rows:
        owner = min(rows, key=lambda one: (-rows[one][-1].priority, had[one], one))
        found.append(rows[owner].pop())
        had[owner] += alone_s
        if not rows[owner]:
            del rows[owner]
    return found
