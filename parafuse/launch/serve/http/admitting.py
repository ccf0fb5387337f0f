"""Asks `admission.admit` with what this process knows: the store's numbers, the supervisor's state, its estimates."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from parafuse.launch.serve.admission import Limits, Load, Refusal, admit, day_began
from parafuse.launch.serve.jobs import Job, JobRequest, JobStore
from parafuse.launch.serve.keys import Key
from parafuse.launch.serve.messages import Estimated, Status
from parafuse.launch.serve.schedule import wait_s
from parafuse.launch.serve.settings import Serving

MAX_KNOWN = 1000
"""Kinds of calls whose seconds are remembered."""


class Admission:
    """`service.Admit` for a server. Called from several threads; reads the queue only for what needs it: a deadline, or
    a key with a quota."""

    def __init__(self, settings: Serving, store: JobStore, not_ready_s: Callable[[], float]):
        """`not_ready_s`: for how long the supervisor has not been ready."""
        self._settings, self._store, self._not_ready_s = settings, store, not_ready_s
        self._known: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, job: Job, key: Key, status: Status | None, estimated: Estimated | None) -> Refusal | None:
        """None where the job is taken."""
        if estimated is not None and estimated.seconds is not None:
            self._remember(job.request, estimated.seconds)
        now_s = time.time()
        limits = Limits(
            max_queued=self._settings.max_queued,
            max_queued_of_key=self._settings.max_queued_of_key if key.max_queued is None else key.max_queued,
            rank_seconds_a_day=key.rank_seconds_per_day,
        )
        return admit(
            self._load(job, key, status, now_s),
            limits,
            estimated=estimated,
            num_ranks=max(1, len(status.ranks)) if status else 1,
            deadline_s=job.deadline_s,
        )

    def _load(self, job: Job, key: Key, status: Status | None, now_s: float) -> Load:
        not_ready_s = self._not_ready_s()
        state = "starting" if status is None else status.state
        left_s = 0.0 if status is None else status.call_left_s
        has_quota = key.rank_seconds_per_day is not None
        queued = self._store.queued() if has_quota or job.deadline_s is not None else []
        own = [one for one in queued if one.owner == key.id]
        if has_quota:  # what runs is not spent yet
            own += [one for one in self._store.running() if one.owner == key.id]
        pledged_s = sum(self._seconds_of(one.request, 1) or 0.0 for one in own)
        return Load(
            now_s=now_s,
            state="restarting" if state == "ready" and not_ready_s > 0 else state,
            not_ready_s=not_ready_s,
            why="" if status is None else status.why,
            queued=self._store.num_queued(),
            queued_of_key=self._store.num_queued(key.id),
            spent_of_key=self._store.spent(key.id, day_began(now_s)) if has_quota else 0.0,
            pledged_of_key=pledged_s * (max(1, len(status.ranks)) if status else 1),
            wait_s=wait_s(job, queued, self._seconds_of, running_left_s=left_s),
            next_s=max(1.0, left_s),
        )

    def _remember(self, request: JobRequest, seconds: float) -> None:
        with self._lock:
            self._known[_key(request)] = seconds
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)

    def _seconds_of(self, request: JobRequest, number: int) -> float | None:
        """Of `number` such jobs, one after another."""
        with self._lock:
            seconds = self._known.get(_key(request))
        return None if seconds is None else seconds * number


def _key(request: JobRequest) -> bytes:
    asked = [request.settings, request.num_outputs, request.cache, request.coding]
    return msgspec.json.encode(asked, order="deterministic")
