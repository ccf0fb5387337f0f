"""Several supervisors in charge of one store's jobs, each of those that it has claimed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from parafuse.launch.serve.jobs import MAX_TRIES, JobError, StaleError, State
from parafuse.launch.serve.sqlite_file import Database
from parafuse.launch.serve.sqlite_schema import STEPS
from parafuse.launch.serve.sqlite_store import SqliteStore
from tests.serve.stores import a_job, open_store, paint

ERROR = JobError(kind="internal", message="a test")


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return open_store(tmp_path)


def two(store: SqliteStore) -> tuple[str, int, str, int]:
    """Two running jobs, and the supervisors that have claimed them."""
    one, other = (store.begin_epoch(alone=False) for _ in range(2))
    jobs = [store.accept(a_job()).id for _ in range(2)]
    store.claim(jobs[:1], one)
    store.claim(jobs, other)  # takes what is left
    return jobs[0], one, jobs[1], other


def test_each_changes_its_own_jobs_and_no_others(store: SqliteStore) -> None:
    first, one, second, other = two(store)
    assert [job.id for job in store.running()] == [first, second]
    paint(store, "f", "0.png")
    for change in (
        lambda: store.give_back(first, other, "why"),
        lambda: store.unclaim(first, other),
        lambda: store.commit(first, other, folder="f", files=["0.png"], receipt="", rank_seconds=1.0, keep_s=1.0),
        lambda: store.fail(first, other, ERROR, keep_s=1.0),
        lambda: store.cancelled(first, other, keep_s=1.0),
    ):
        with pytest.raises(StaleError, match=f"supervisor {one} runs it; {other} has lost it"):
            change()
    store.note_progress(first, other, 0.5)
    store.note_progress(second, other, 0.25)
    assert [job.progress for job in store.running()] == [0.0, 0.25]
    done = store.commit(second, other, folder="f", files=["0.png"], receipt="", rank_seconds=1.0, keep_s=9.0)
    assert done.state is State.DONE
    assert store.fail(first, one, ERROR, keep_s=9.0).state is State.FAILED


def test_one_that_ends_loses_its_jobs_and_the_others_go_on(store: SqliteStore) -> None:
    first, one, second, other = two(store)
    assert [job.id for job in store.end_epoch(one)] == [first]
    assert store.end_epoch(one) == []
    assert [job.id for job in store.queued()] == [first]
    assert [job.id for job in store.running()] == [second]
    with pytest.raises(StaleError, match=f"supervisor {one} is no longer in charge: {other} is"):
        store.claim([first], one)
    (again,) = store.claim([first], other)
    assert again.tries == MAX_TRIES
    with pytest.raises(StaleError, match="no longer in charge"):
        store.commit(first, one, folder="f", files=[], receipt="", rank_seconds=1.0, keep_s=1.0)
    store.ask_cancel(second)
    lost = store.end_epoch(other)
    assert [(job.id, job.state, job.error and job.error.kind) for job in lost] == [
        (first, State.FAILED, "lost"), (second, State.CANCELLED, None)
    ]  # fmt: skip
    assert store.epochs() == []
    with pytest.raises(StaleError, match="nobody is"):
        store.claim([], other)


def test_one_that_is_alone_ends_all_others(store: SqliteStore) -> None:
    first, one, second, other = two(store)
    alone = store.begin_epoch()
    assert store.epochs() == [alone]
    assert [job.id for job in store.queued()] == [first, second]
    beside = store.begin_epoch(alone=False)
    assert store.epochs() == [alone, beside]
    assert len({one, other, alone, beside}) == 4


def test_numbers_are_not_used_twice_also_after_all_have_ended(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first = store.begin_epoch(alone=False)
    store.end_epoch(first)
    store.close()
    assert open_store(tmp_path).begin_epoch(alone=False) == first + 1


@pytest.mark.parametrize("begun", [False, True])
def test_a_store_of_before_is_taken_over_with_its_running_job(tmp_path: Path, begun: bool) -> None:
    """Of the time when one supervisor was in charge of all jobs."""
    old = Database(tmp_path / "jobs.sqlite", STEPS[:1], busy_s=1.0)
    job = a_job()
    row = {"id": job.id, "owner": "anna", "kind": "image", "request_hash": "", "priority": 0, "created_s": 1.0,
           "request": '{"kind": "image", "prompt": "a", "seed": 1}', "state": "running", "tries": 1}  # fmt: skip
    with old.writing() as at:
        if begun:
            at.execute(f"INSERT INTO jobs ({', '.join(row)}) VALUES ({', '.join(f':{one}' for one in row)})", row)
            at.execute("UPDATE charge SET epoch = 7")
    old.close()
    store = open_store(tmp_path)
    with sqlite3.connect(tmp_path / "jobs.sqlite") as at:
        assert at.execute("PRAGMA user_version").fetchone()[0] == len(STEPS)
    if begun:
        assert store.epochs() == [7]
        store.note_progress(job.id, 7, 0.5)
        assert [(one.id, one.progress) for one in store.running()] == [(job.id, 0.5)]
    assert store.begin_epoch() == (8 if begun else 1)
    assert [one.id for one in store.queued()] == ([job.id] if begun else [])
