"""The job store beside a model of it in plain Python, through random calls in random order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from parafuse.launch.serve.jobs import (
    MAX_TRIES,
    IdempotencyError,
    Job,
    JobError,
    JobGoneError,
    QueueFullError,
    StaleError,
    State,
    new_id,
)
from parafuse.launch.serve.sqlite_store import SqliteStore
from tests.serve.stores import NOW, Clock, a_job, open_store, paint

OWNERS = st.sampled_from(["anna", "ben"])
MAX_QUEUED, MAX_OF_KEY = 8, 5
KEEP_S, STORE_KEEP_S = 30.0, 45.0
WHO = st.integers(0, 3)
ERROR = JobError(kind="internal", message="a test")
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Thousands of transactions: none of them is to wait for a disk here."""


@dataclass
class Shadow:
    """A job, as the model has it."""

    id: str
    owner: str
    priority: int
    key: str | None
    hooked: bool
    state: State = State.QUEUED
    tries: int = 0
    cancel_asked: bool = False
    rank_seconds: float = 0.0
    finished_s: float | None = None
    expires_s: float | None = None
    due: bool = False
    num_bytes: int = 0
    error: str | None = None
    runner: int = 0
    """The supervisor that has claimed it."""


class Model(RuleBasedStateMachine):
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY)
        self.clock = Clock()
        self.store = self.opened()
        self.shadows: dict[str, Shadow] = {}
        self.spendings: list[tuple[str, float, float]] = []
        self.epoch = 0
        self.charges: list[int] = []
        self.attempts = 0

    def opened(self) -> SqliteStore:
        return open_store(Path(self.folder.name), clock=self.clock, keep_s=STORE_KEEP_S)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def of(self, state: State, owner: str | None = None) -> list[Shadow]:
        return [one for one in self.shadows.values() if one.state is state and owner in (None, one.owner)]

    def end(self, one: Shadow, state: State, *, keep_s: float = STORE_KEEP_S, error: str | None = None) -> None:
        one.state, one.finished_s, one.expires_s = state, self.clock.now, self.clock.now + keep_s
        one.due, one.error = one.hooked, error
        if one.rank_seconds:
            self.spendings.append((one.owner, self.clock.now, one.rank_seconds))

    def lose(self, one: Shadow) -> None:
        if one.cancel_asked:
            self.end(one, State.CANCELLED)
        elif one.tries >= MAX_TRIES:
            self.end(one, State.FAILED, error="lost")
        else:
            one.state = State.QUEUED

    def by_supervisor(
        self, job: str, who: int, act: Callable[[int], Any], then: Callable[[Shadow], None], *, queued: bool = False
    ) -> None:
        """A change of a job that runs; `queued`: or waits."""
        one, epoch = self.shadows.get(job), self.supervisor(who)
        if epoch not in self.charges:
            with pytest.raises(StaleError, match="no longer in charge"):
                act(epoch)
            return
        if one is None:
            with pytest.raises(JobGoneError):
                act(epoch)
            return
        not_claimed = one.state is State.QUEUED and not queued
        if not_claimed or (one.state is State.RUNNING and one.runner != epoch):
            with pytest.raises(StaleError, match="claim it first" if not_claimed else "has lost it"):
                act(epoch)
            return
        if not one.state.is_over:
            then(one)
        self.same(one, act(epoch))

    def supervisor(self, who: int) -> int:
        """0: one that is not in charge (any more, or yet); else one of those that are."""
        if not who or not self.charges:
            gone = [one for one in range(self.epoch + 2) if one not in self.charges]
            return gone[-1 - who % len(gone)]
        return self.charges[who % len(self.charges)]

    def lose_orphans(self) -> list[Shadow]:
        lost = [one for one in self.of(State.RUNNING) if one.runner not in self.charges]
        for one in lost:
            self.lose(one)
        return lost

    @rule(target=jobs, owner=OWNERS, priority=st.integers(-1, 1), key=st.sampled_from([None, None, "k"]),
          hooked=st.booleans(), twist=st.booleans())  # fmt: skip
    def accept(self, owner: str, priority: int, key: str | None, hooked: bool, twist: bool) -> Any:
        job = a_job(owner, id=new_id("image"), priority=priority, idempotency_key=key,
                    webhook="https://a.example" if hooked else None)  # fmt: skip
        stands = next((one for one in self.shadows.values() if key and (one.owner, one.key) == (owner, key)), None)
        call: dict[str, Any] = {"request_hash": str(twist), "max_queued": MAX_QUEUED, "max_queued_of_key": MAX_OF_KEY}
        if stands is not None:
            if twist:
                with pytest.raises(IdempotencyError):
                    self.store.accept(job, **call)
            else:
                self.same(stands, self.store.accept(job, **call))
            return multiple()
        call["request_hash"] = "False"
        own = len(self.of(State.QUEUED, owner)) >= MAX_OF_KEY
        if own or len(self.of(State.QUEUED)) >= MAX_QUEUED:
            with pytest.raises(QueueFullError) as full:
                self.store.accept(job, **call)
            assert full.value.of_key == own
            return multiple()
        self.shadows[job.id] = Shadow(job.id, owner, priority, key, hooked)
        self.same(self.shadows[job.id], self.store.accept(job, **call))
        return job.id

    @rule(job=jobs, owner=OWNERS)
    def ask_cancel(self, job: str, owner: str) -> None:
        one = self.shadows.get(job)
        found = self.store.ask_cancel(job, owner)
        if one is None or one.owner != owner:
            assert found is None
            return
        if one.state is State.QUEUED:
            self.end(one, State.CANCELLED)
        elif one.state is State.RUNNING:
            one.cancel_asked = True
        assert found is not None
        self.same(one, found)

    @rule(job=jobs, owner=OWNERS)
    def delete(self, job: str, owner: str) -> None:
        one = self.shadows.get(job)
        may = one is not None and one.owner == owner and one.state.is_over
        assert self.store.delete(job, owner) == may
        if may:
            del self.shadows[job]

    @rule(alone=st.booleans())
    def begin_epoch(self, alone: bool) -> None:
        self.epoch += 1
        self.charges = [*([] if alone else self.charges), self.epoch]
        assert self.store.begin_epoch(alone=alone) == self.epoch
        self.lose_orphans()

    @rule(who=WHO)
    def end_epoch(self, who: int) -> None:
        epoch = self.supervisor(who)
        self.charges = [one for one in self.charges if one != epoch]
        for one, found in zip(self.lose_orphans(), self.store.end_epoch(epoch), strict=True):
            self.same(one, found)

    @rule(jobs=st.lists(jobs, min_size=1, max_size=4), who=WHO)
    def claim(self, jobs: list[str], who: int) -> None:
        epoch = self.supervisor(who)
        if epoch not in self.charges:
            with pytest.raises(StaleError):
                self.store.claim(jobs, epoch)
            return
        mine = [name for name in dict.fromkeys(jobs) if name in self.shadows]
        taken = [self.shadows[name] for name in mine if self.shadows[name].state is State.QUEUED]
        for one in taken:
            one.state, one.tries, one.runner = State.RUNNING, one.tries + 1, epoch
        for one, found in zip(taken, self.store.claim(jobs, epoch), strict=True):
            self.same(one, found)

    @rule(job=jobs, who=WHO)
    def give_back(self, job: str, who: int) -> None:
        def then(one: Shadow) -> None:
            one.rank_seconds += 1.0
            self.lose(one)

        self.by_supervisor(job, who, lambda epoch: self.store.give_back(job, epoch, "died", rank_seconds=1.0), then)

    @rule(job=jobs, who=WHO)
    def unclaim(self, job: str, who: int) -> None:
        def then(one: Shadow) -> None:
            one.tries -= 1
            if one.cancel_asked:
                self.end(one, State.CANCELLED)
            else:
                one.state = State.QUEUED

        self.by_supervisor(job, who, lambda epoch: self.store.unclaim(job, epoch), then)

    @rule(job=jobs, who=WHO)
    def commit(self, job: str, who: int) -> None:
        self.attempts += 1
        paint(self.store, folder := f"try{self.attempts}", "0.png", data=b"x" * 100)

        def then(one: Shadow) -> None:
            one.rank_seconds += 2.0
            one.num_bytes = 100
            self.end(one, State.DONE, keep_s=KEEP_S)

        def act(epoch: int) -> Job:
            return self.store.commit(
                job, epoch, folder=folder, files=["0.png"], receipt="{}", rank_seconds=2.0, keep_s=KEEP_S
            )

        self.by_supervisor(job, who, act, then)

    @rule(job=jobs, who=WHO)
    def fail(self, job: str, who: int) -> None:
        self.by_supervisor(
            job, who, lambda epoch: self.store.fail(job, epoch, ERROR, keep_s=KEEP_S),
            lambda one: self.end(one, State.FAILED, keep_s=KEEP_S, error="internal"), queued=True,
        )  # fmt: skip

    @rule(job=jobs, who=WHO)
    def cancelled(self, job: str, who: int) -> None:
        self.by_supervisor(
            job, who, lambda epoch: self.store.cancelled(job, epoch, keep_s=KEEP_S),
            lambda one: self.end(one, State.CANCELLED, keep_s=KEEP_S),
        )  # fmt: skip

    @rule(job=jobs, delivered=st.booleans())
    def webhook_tried(self, job: str, delivered: bool) -> None:
        self.store.webhook_tried(job, delivered=delivered, next_s=self.clock.now)
        if (one := self.shadows.get(job)) is not None and one.hooked and one.state.is_over:
            one.due = not delivered

    @rule(seconds=st.sampled_from([1.0, 10.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(keep=st.integers(0, 4))
    def sweep(self, keep: int) -> None:
        now = self.clock.now
        gone = [one for one in self.shadows.values() if one.expires_s is not None and one.expires_s <= now]
        kept = sorted(
            (one for one in self.shadows.values() if one.num_bytes and one not in gone),
            key=lambda one: one.finished_s or 0.0,
        )
        ties = len({one.finished_s for one in kept}) < len(kept)
        keep = len(kept) if ties else keep  # which of two that ended at once goes is nobody's promise
        gone += kept[: max(0, len(kept) - keep)]
        assert self.store.sweep(now, max_bytes=keep * 100) == len(gone)
        for one in gone:
            del self.shadows[one.id]

    @rule()
    def open_anew(self) -> None:
        self.store.close()
        self.store = self.opened()

    def same(self, one: Shadow, job: Job) -> None:
        for name in (
            "id",
            "owner",
            "priority",
            "state",
            "tries",
            "cancel_asked",
            "rank_seconds",
            "finished_s",
            "expires_s",
        ):
            assert getattr(job, name) == getattr(one, name), name
        assert (job.error and job.error.kind) == one.error
        for file in job.files:
            assert self.store.folders.output(job.folder, file).stat().st_size == one.num_bytes

    @invariant()
    def agrees(self) -> None:
        for owner in ("anna", "ben"):
            mine = [one for one in self.shadows.values() if one.owner == owner]
            found = self.store.of_owner(owner, limit=1000)
            for one, job in zip(reversed(mine), found, strict=True):
                self.same(one, job)
            expected = sum(spent for who, when, spent in self.spendings if who == owner and when >= NOW + 20)
            assert self.store.spent(owner, NOW + 20) == expected
        queue = sorted(self.of(State.QUEUED), key=lambda one: -one.priority)  # stable: then by age
        assert [job.id for job in self.store.queued()] == [one.id for one in queue]
        assert [job.id for job in self.store.running()] == [one.id for one in self.of(State.RUNNING)]
        assert self.store.counts() == {state: len(self.of(state)) for state in State}
        assert self.store.epochs() == self.charges
        due = {job.id for job in self.store.due_webhooks(self.clock.now, limit=1000)}
        assert due == {one.id for one in self.shadows.values() if one.due}


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=70,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
