"""The job store: what it promises to clients and to the supervisor."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from parafuse.errors import ConfigError
from parafuse.launch.serve.jobs import (
    MAX_TRIES,
    IdempotencyError,
    Job,
    JobError,
    JobGoneError,
    JobStore,
    QueueFullError,
    StaleError,
    State,
    StoreError,
    new_id,
)
from parafuse.launch.serve.messages import Adapter
from parafuse.launch.serve.sqlite_store import SqliteStore
from tests.serve.stores import NOW, Clock, a_job, open_store, paint

LATE = JobError(kind="deadline", message="too late")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> SqliteStore:
    return open_store(tmp_path, clock=clock, keep_s=100.0)


def claimed(store: SqliteStore, **fields: Any) -> tuple[str, int]:
    """A running job, and the epoch it runs in."""
    job, epoch = store.accept(a_job(**fields)), store.begin_epoch()
    assert [one.id for one in store.claim([job.id], epoch)] == [job.id]
    return job.id, epoch


def done(store: SqliteStore, epoch: int, job: str, *files: str, keep_s: float = 50.0, data: bytes = b"picture") -> Job:
    paint(store, f"try-{job}", *files, data=data)
    return store.commit(
        job, epoch, folder=f"try-{job}", files=files, receipt='{"a": 1}', rank_seconds=2.0, keep_s=keep_s
    )


def test_a_job_comes_back_as_it_was_given_also_from_another_store(store: SqliteStore, tmp_path: Path) -> None:
    interface: JobStore = store
    job = a_job(priority=3, deadline_s=NOW + 9.5, idempotency_key="k", webhook="https://a.example/b")
    assert interface.accept(job, request_hash="h") == job
    assert open_store(tmp_path).get(job.id) == job
    assert store.get(job.id, "anna") == job
    assert store.get(job.id, "ben") is None
    assert store.get("img_none") is None


def test_everything_of_a_request_is_kept(store: SqliteStore) -> None:
    images = tuple(store.folders.add_input(b"png", ".png") for _ in range(2))
    job = a_job(kind="edit", images=images)
    request = {"negative_prompt": "no", "num_outputs": 3, "lora": (Adapter(name="l", scale=0.5),), "cache": False,
               "previews": 2, "format": "webp", "frames_per_second": 8}  # fmt: skip
    rest = {name: getattr(job.request, name) for name in job.request.__struct_fields__}
    job = a_job(request=type(job.request)(**{**rest, **request}), id=job.id)
    store.accept(job)
    assert store.get(job.id) == job
    assert [store.folders.input(name).read_bytes() for name in images] == [b"png"] * 2


def test_ids_tell_the_kind_sort_by_time_and_cannot_be_guessed() -> None:
    ids = [new_id("video") for _ in range(200)]
    assert all(one.startswith("video_") and len(one) == len("video_") + 44 for one in ids)
    assert [one[:18] for one in ids] == sorted(one[:18] for one in ids)
    assert len({one[18:] for one in ids}) == 200
    assert new_id("image").startswith("img_")
    assert new_id("edit").startswith("edit_")


def test_the_same_id_twice_is_refused_and_the_first_stays(store: SqliteStore) -> None:
    job = store.accept(a_job())
    with pytest.raises(ConfigError, match="there is one with this id"):
        store.accept(a_job("ben", id=job.id))
    assert store.get(job.id) == job


def test_an_idempotency_key_makes_one_job_for_each_owner(store: SqliteStore) -> None:
    first = store.accept(a_job(idempotency_key="k"), request_hash="1")
    assert store.accept(a_job(idempotency_key="k"), request_hash="1", max_queued=0) == first
    assert store.accept(a_job("ben", idempotency_key="k"), request_hash="2").id != first.id
    with pytest.raises(IdempotencyError, match=f"'k' was used for another request .{first.id}"):
        store.accept(a_job(idempotency_key="k"), request_hash="2")
    assert store.counts()[State.QUEUED] == 2
    store.ask_cancel(first.id)
    assert store.accept(a_job(idempotency_key="k"), request_hash="1").id == first.id
    assert store.delete(first.id)
    assert store.accept(a_job(idempotency_key="k"), request_hash="2").id != first.id


def test_quotas_of_one_key_and_of_all(store: SqliteStore) -> None:
    limits: dict[str, Any] = {"max_queued": 3, "max_queued_of_key": 2}
    jobs = [store.accept(a_job(), **limits) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 jobs of this key wait; at most 2") as own:
        store.accept(a_job(), **limits)
    assert own.value.of_key
    store.accept(a_job("ben"), **limits)
    with pytest.raises(QueueFullError, match="3 jobs wait; at most 3") as everybody:
        store.accept(a_job("ben"), **limits)
    assert not everybody.value.of_key
    store.claim([jobs[0].id], store.begin_epoch())  # running ones do not wait
    store.accept(a_job(), **limits)


def test_the_queue_goes_by_priority_then_by_age(store: SqliteStore) -> None:
    jobs = [store.accept(a_job(priority=priority)).id for priority in (0, 5, 0, -10, 5)]
    assert [job.id for job in store.queued()] == [jobs[index] for index in (1, 4, 0, 2, 3)]
    assert [job.id for job in store.queued(2)] == [jobs[1], jobs[4]]


def test_a_list_of_an_owners_jobs_comes_in_pages(store: SqliteStore) -> None:
    mine = [store.accept(a_job(kind=kind)).id for kind in ("image", "video", "image", "video", "video")]
    other = store.accept(a_job("ben")).id
    newest = mine[::-1]
    assert [job.id for job in store.of_owner("anna")] == newest
    assert [job.id for job in store.of_owner("anna", limit=2)] == newest[:2]
    assert [job.id for job in store.of_owner("anna", limit=2, after=newest[1])] == newest[2:4]
    assert [job.id for job in store.of_owner("anna", kind="image", after=mine[2])] == [mine[0]]
    assert store.of_owner("anna", after=other) == []
    assert store.of_owner("anna", after="img_none") == []


def test_a_claim_takes_what_still_waits(store: SqliteStore, clock: Clock) -> None:
    jobs = [store.accept(a_job()).id for _ in range(3)]
    epoch = store.begin_epoch()
    clock.now += 5
    store.ask_cancel(jobs[1])
    first = store.claim([jobs[2], jobs[1], jobs[0], "img_none"], epoch)
    assert [(job.id, job.state, job.tries, job.started_s) for job in first] == [
        (jobs[2], State.RUNNING, 1, NOW + 5), (jobs[0], State.RUNNING, 1, NOW + 5)
    ]  # fmt: skip
    assert store.claim(jobs, epoch) == []
    assert [job.id for job in store.running()] == [jobs[0], jobs[2]]


def test_a_commit_keeps_the_result_and_happens_once(store: SqliteStore, clock: Clock, tmp_path: Path) -> None:
    job, epoch = claimed(store, webhook="https://a.example")
    clock.now += 10
    end = done(store, epoch, job, "0.png", "1.png")
    assert (end.state, end.files, end.receipt, end.progress) == (State.DONE, ("0.png", "1.png"), '{"a": 1}', 1.0)
    assert (end.finished_s, end.expires_s, end.rank_seconds) == (NOW + 10, NOW + 60, 2.0)
    assert store.folders.output(end.folder, "1.png").read_bytes() == b"picture"
    clock.now += 10
    again = store.commit(job, epoch, folder="other", files=[], receipt="", rank_seconds=9.0, keep_s=9.0)
    assert again == end == store.fail(job, epoch, LATE, keep_s=1.0) == store.cancelled(job, epoch, keep_s=1.0)
    assert end == store.give_back(job, epoch, "why") == store.unclaim(job, epoch) == store.ask_cancel(job)
    with sqlite3.connect(tmp_path / "jobs.sqlite") as at, pytest.raises(sqlite3.IntegrityError, match="is over"):
        at.execute("UPDATE jobs SET state = 'queued'")  # the database itself holds it


def test_a_stale_supervisor_changes_nothing(store: SqliteStore) -> None:
    job, old = claimed(store)
    waiting = store.accept(a_job()).id
    new = store.begin_epoch()
    assert new == old + 1
    paint(store, "f", "0.png")
    before = store.queued()
    for change in (
        lambda: store.claim([job, waiting], old),
        lambda: store.give_back(job, old, "why"),
        lambda: store.unclaim(job, old),
        lambda: store.commit(job, old, folder="f", files=["0.png"], receipt="", rank_seconds=1.0, keep_s=1.0),
        lambda: store.fail(waiting, old, LATE, keep_s=1.0),
        lambda: store.cancelled(job, old, keep_s=1.0),
        lambda: store.note_progress(job, old, 0.5),
        lambda: store.claim([job], new + 1),
    ):
        with pytest.raises(StaleError, match="no longer in charge"):
            change()
    assert store.queued() == before
    store.claim([job], new)  # the old one still paints: its outputs must not count
    with pytest.raises(StaleError, match=f"supervisor {old}"):
        store.commit(job, old, folder="f", files=["0.png"], receipt="", rank_seconds=1.0, keep_s=1.0)
    assert store.running()[0].id == job


def test_what_was_not_claimed_cannot_end_as_done(store: SqliteStore) -> None:
    job, epoch = store.accept(a_job()).id, store.begin_epoch()
    paint(store, "f", "0.png")
    with pytest.raises(StaleError, match="claim it first"):
        store.commit(job, epoch, folder="f", files=["0.png"], receipt="", rank_seconds=1.0, keep_s=1.0)
    with pytest.raises(JobGoneError, match="there is none"):
        store.fail("img_none", epoch, LATE, keep_s=1.0)
    assert store.fail(job, epoch, LATE, keep_s=1.0).error == LATE  # a deadline passes in the queue


def test_deadlines_that_pass_in_the_queue(store: SqliteStore, clock: Clock) -> None:
    epoch = store.begin_epoch()
    none, soon, later, runs = (store.accept(a_job(deadline_s=s)).id for s in (None, NOW + 1, NOW + 10, NOW + 1))
    store.claim([runs], epoch)
    assert store.fail_late(epoch, keep_s=9.0) == []
    clock.now = NOW + 2
    with pytest.raises(StaleError):
        store.fail_late(epoch - 1, keep_s=9.0)
    (late,) = store.fail_late(epoch, keep_s=9.0)
    assert (late.id, late.state, late.expires_s, late.error and late.error.kind) == (
        soon, State.FAILED, NOW + 11, "deadline",
    )  # fmt: skip
    assert [job.id for job in store.queued()] == [none, later]
    assert store.num_queued() == store.num_queued("anna") == 2
    assert store.num_queued("bob") == 0
    assert [job.id for job in store.running()] == [runs]


def test_lost_ranks_give_one_more_try_then_the_job_has_failed(store: SqliteStore) -> None:
    job, epoch = claimed(store)
    again = store.give_back(job, epoch, "rank 1 died", rank_seconds=3.0)
    assert (again.state, again.tries, again.started_s, again.rank_seconds) == (State.QUEUED, 1, None, 3.0)
    store.claim([job], epoch)
    end = store.give_back(job, epoch, "rank 0 died", rank_seconds=4.0)
    assert (end.state, end.tries, end.rank_seconds) == (State.FAILED, MAX_TRIES, 7.0)
    assert end.error == JobError(kind="lost", message="given up after 2 tries: rank 0 died")
    assert store.spent("anna", NOW) == 7.0


def test_a_new_supervisor_finds_the_running_jobs_waiting_failed_or_cancelled(store: SqliteStore) -> None:
    fresh, tried, unwanted = (store.accept(a_job()).id for _ in range(3))
    epoch = store.begin_epoch()
    store.claim([tried], epoch)
    store.give_back(tried, epoch, "died")
    store.claim([fresh, tried, unwanted], epoch)
    marked = store.ask_cancel(unwanted)
    assert marked is not None
    assert (marked.state, marked.cancel_asked) == (State.RUNNING, True)
    store.begin_epoch()
    states = {name: store.get(name) for name in (fresh, tried, unwanted)}
    assert [job.state for job in states.values() if job] == [State.QUEUED, State.FAILED, State.CANCELLED]
    assert store.running() == []


def test_a_draining_server_counts_no_try(store: SqliteStore) -> None:
    job, epoch = claimed(store)
    store.note_progress(job, epoch, 0.5)
    assert store.running()[0].progress == 0.5
    back = store.unclaim(job, epoch)
    assert (back.state, back.tries, back.started_s, back.progress) == (State.QUEUED, 0, None, 0.0)
    store.note_progress(job, epoch, 0.7)
    assert store.queued()[0].progress == 0.0
    store.claim([job], epoch)
    store.ask_cancel(job)
    assert store.unclaim(job, epoch).state is State.CANCELLED


def test_cancels_in_the_queue_and_while_it_runs(store: SqliteStore, clock: Clock) -> None:
    job, epoch = claimed(store)
    waiting = store.accept(a_job()).id
    assert store.ask_cancel(waiting, "ben") is None
    cancelled = store.ask_cancel(waiting, "anna")
    assert cancelled is not None
    assert (cancelled.state, cancelled.finished_s, cancelled.expires_s) == (State.CANCELLED, NOW, NOW + 100)
    store.ask_cancel(job)
    assert store.running()[0].cancel_asked
    assert store.give_back(job, epoch, "died").state is State.CANCELLED
    assert store.counts() == {**dict.fromkeys(State, 0), State.CANCELLED: 2}


def test_deleting_takes_a_job_that_is_over_its_files_and_its_inputs(store: SqliteStore) -> None:
    name = store.folders.add_input(b"png", ".png")
    job, epoch = claimed(store, images=(name,))
    assert not store.delete(job)
    end = done(store, epoch, job, "0.png")
    assert not store.delete(job, "ben")
    assert store.folders.output(end.folder, "0.png").exists()
    assert store.delete(job, "anna")
    assert store.get(job) is None
    assert not store.delete(job)
    assert list(store.folders.results.iterdir()) == list(store.folders.inputs.iterdir()) == []
    assert store.spent("anna", NOW) == 2.0, "deleting a job gives no quota back"
    assert store.spent("anna", NOW + 1) == store.spent("ben", NOW) == 0.0


def test_jobs_of_one_call_share_a_folder_and_leave_each_others_files(store: SqliteStore) -> None:
    jobs, epoch = [store.accept(a_job()).id for _ in range(2)], store.begin_epoch()
    store.claim(jobs, epoch)
    paint(store, "both", "0.png", "1.png")
    one, two = (f"{index}.png" for index in range(2))
    store.commit(jobs[0], epoch, folder="both", files=[one], receipt="", rank_seconds=1.0, keep_s=9.0)
    store.delete(jobs[0])  # before the other one is committed
    store.commit(jobs[1], epoch, folder="both", files=[two], receipt="", rank_seconds=1.0, keep_s=9.0)
    assert [path.name for path in store.folders.output("both").iterdir()] == [two]
    store.delete(jobs[1])
    assert not store.folders.output("both").exists()


def test_webhooks_are_due_when_a_job_is_over_until_delivered(store: SqliteStore) -> None:
    job, epoch = claimed(store, webhook="https://a.example")
    silent = store.accept(a_job()).id
    assert store.due_webhooks(NOW + 1e6) == []
    store.ask_cancel(silent)
    end = done(store, epoch, job, "0.png")
    assert store.due_webhooks(NOW - 1) == []
    assert store.due_webhooks(NOW) == [end]
    store.webhook_tried(job, delivered=False, next_s=NOW + 10)
    assert store.due_webhooks(NOW + 9) == []
    assert store.due_webhooks(NOW + 10) == [end]
    store.webhook_tried(job, delivered=True, next_s=None)
    store.webhook_tried(silent, delivered=False, next_s=NOW)
    store.webhook_tried("img_none", delivered=False, next_s=NOW)
    assert store.due_webhooks(NOW + 1e6) == []


def test_a_closed_store_says_so(store: SqliteStore) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.counts()
