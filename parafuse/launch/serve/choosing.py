"""Choosing with a memory: `schedule.choose` beside what the store says that jobs have cost. For the supervisor."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from parafuse.launch.serve.admission import day_began
from parafuse.launch.serve.jobs import Job, JobStore, State
from parafuse.launch.serve.keys import Keys
from parafuse.launch.serve.schedule import Policy, SecondsOf, Shares, choose


def most_of_key(keys: Keys, store: JobStore, now_s: float) -> dict[str, int]:
    """Key -> further jobs that may run now, where that is limited: none while its quota of the day is used up, so that
    its jobs wait for the next day. Raises OSError where the store cannot be read."""
    running = Counter(job.owner for job in store.running())  # by others: this supervisor has none when it chooses
    most: dict[str, int] = {}
    for key in keys.all():
        if key.max_running is not None:
            most[key.id] = max(0, key.max_running - running[key.id])
        quota = key.rank_seconds_per_day
        if quota is not None and store.spent(key.id, day_began(now_s)) >= quota:
            most[key.id] = 0
    return most


@dataclass
class _Begun:
    """A job that was put into a call, and is not charged yet."""

    job: Job
    at_s: float


class Chooser:
    """The scheduler's `choose`. It remembers what each key has had; one call of it at a time, on the event loop."""

    def __init__(
        self,
        store: JobStore,
        policy: Policy,
        *,
        num_ranks: int,
        seconds_of: SecondsOf | None = None,
        most_of_key: Callable[[], Mapping[str, int]] = dict,
    ):
        """`seconds_of`: must answer at once. `most_of_key`: how many jobs of a key may run at once, where that is
        limited; called in a thread. Raises OSError where the store cannot be read."""
        self._store, self._policy, self._num_ranks = store, policy, num_ranks
        self._seconds_of, self._most_of_key = seconds_of, most_of_key
        self._begun: dict[str, _Begun] = {}
        self.shares = Shares()

    async def __call__(self, queued: Sequence[Job], alone: frozenset[str], now_s: float) -> Sequence[Job]:
        """What goes next. Raises OSError where the store cannot be read."""
        now = {name: await asyncio.to_thread(self._store.get, name) for name in self._begun}
        most_of_key = await asyncio.to_thread(self._most_of_key)
        self._charge(now, now_s)
        choice = choose(
            queued,
            self.shares,
            now_s,
            policy=self._policy,
            seconds_of=self._seconds_of,
            alone=alone,
            most_of_key=most_of_key,
        )
        self.shares = choice.shares
        self._begun = {job.id: _Begun(job, now_s) for job in choice.jobs}
        return choice.jobs

    def _charge(self, found: Mapping[str, Job | None], now_s: float) -> None:
        """The jobs of the call before have cost what the store says; what was deleted since, the time."""
        for name, begun in self._begun.items():
            now = found[name]
            if now is not None and now.state is State.RUNNING:
                continue  # another try, by somebody else
            cost = (now_s - begun.at_s) * self._num_ranks if now is None else now.rank_seconds - begun.job.rank_seconds
            self.shares = self.shares.charged([begun.job], max(0.0, cost), begun.at_s)
        self._begun = {}
