"""The job store and the disk: what is durable when, sweeping, and disks that are full, damaged, foreign or gone."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import resource
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parafuse.errors import ConfigError
from parafuse.launch.serve import folders, sqlite_store
from parafuse.launch.serve.folders import ORPHAN_S, make_durable
from parafuse.launch.serve.jobs import FileError, Job, QueueFullError, State, StoreBusyError, StoreError
from parafuse.launch.serve.sqlite_schema import STEPS
from parafuse.launch.serve.sqlite_store import SPENDING_KEPT_S, SqliteStore
from tests.serve.stores import NOW, Clock, a_job, open_store, paint

MANY = 1 << 40


def done(store: SqliteStore, folder: str, *, num_bytes: int = 7, keep_s: float = 50.0, owner: str = "anna") -> Job:
    """A job that has come to its end, with a file of so many bytes."""
    job = store.accept(a_job(owner)).id
    epoch = store.begin_epoch()
    store.claim([job], epoch)
    paint(store, folder, "0.png", data=b"x" * num_bytes)
    return store.commit(job, epoch, folder=folder, files=["0.png"], receipt="", rank_seconds=1.0, keep_s=keep_s)


def aged(path: Path, seconds: float) -> None:
    os.utime(path, (NOW - seconds, NOW - seconds), follow_symlinks=False)


def test_outputs_are_on_the_disk_before_their_job_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    synced: list[str] = []
    fsync = os.fsync

    def spy(handle: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink().relative_to(tmp_path)))
        states = [job.state for job in store.of_owner("anna")]
        assert State.DONE not in states
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    done(store, "try")
    assert synced == ["results/try/0.png", "results/try", "results"]


def test_inputs_are_on_the_disk_when_they_have_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(str(Path(f"/proc/self/fd/{handle}").readlink())))
    path = store.folders.input(store.folders.add_input(b"abc", ".png"))
    assert synced == [str(path), str(path.parent)]
    assert path.stat().st_mode & 0o777 == 0o600


def test_folders_in_a_folder_are_made_durable_from_the_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    synced: list[str] = []
    monkeypatch.setattr(folders, "sync", lambda path: synced.append(path.name))
    make_durable(tmp_path / "a")
    assert synced == ["file", "b", "a", tmp_path.name]


def test_every_change_waits_for_the_disk_but_progress(tmp_path: Path) -> None:
    database = open_store(tmp_path)._database
    with database.writing() as at:
        assert at.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert at.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    with database.writing(durable=False) as at:
        assert at.execute("PRAGMA synchronous").fetchone()[0] == 1
    with database.writing() as at:
        assert at.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_nobody_else_may_read_prompts_and_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    store = open_store(folder)
    store.accept(a_job())
    modes = {path.name: path.stat().st_mode & 0o077 for path in (folder, *folder.iterdir())}
    assert len(modes) == 6, "with the write-ahead log and its index"
    assert not any(modes.values()), modes


def test_a_commit_of_files_that_are_not_there_is_refused_and_the_job_still_runs(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job, epoch = store.accept(a_job()).id, store.begin_epoch()
    store.claim([job], epoch)
    paint(store, "try", "0.png")
    (store.folders.output("try") / "link.png").symlink_to("/etc/passwd")
    for folder, file in (("try", "1.png"), ("none", "0.png"), ("..", "jobs.sqlite"), ("try", "../../jobs.sqlite"),
                         ("try", "link.png"), ("", "results"), ("/etc", "passwd"), ("try", ".hidden")):  # fmt: skip
        with pytest.raises(FileError):
            store.commit(job, epoch, folder=folder, files=[file], receipt="", rank_seconds=1.0, keep_s=1.0)
    assert [one.id for one in store.running()] == [job]
    end = store.commit(job, epoch, folder="try", files=["0.png"], receipt="", rank_seconds=1.0, keep_s=1.0)
    assert end.state is State.DONE


def test_inputs_go_with_a_job_that_is_not_taken(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first, second, third = (store.folders.add_input(b"png", ".png") for _ in range(3))
    stands = store.accept(a_job(images=(first,), idempotency_key="k"))
    assert store.accept(a_job(images=(second,), idempotency_key="k")).id == stands.id
    with pytest.raises(QueueFullError):
        store.accept(a_job(images=(third,)), max_queued=1)
    assert [path.name for path in store.folders.inputs.iterdir()] == [first]
    with pytest.raises(FileError, match="belongs to another job"):
        store.accept(a_job(images=(first,)))
    for name in (third, "../jobs.sqlite", "/etc/passwd", ""):
        with pytest.raises(FileError):
            store.accept(a_job(images=(name,)))
    assert store.folders.input(first).exists()
    assert (tmp_path / "jobs.sqlite").exists()
    assert [job.id for job in store.queued()] == [stands.id]


def test_inputs_of_a_request_that_was_given_up_go_unless_a_job_has_them(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    taken, left = (store.folders.add_input(b"png", ".png") for _ in range(2))
    store.accept(a_job(images=(taken,)))
    store.discard_inputs([taken, left, "none.png"])
    assert [path.name for path in store.folders.inputs.iterdir()] == [taken]
    with pytest.raises(FileError, match="there is no such file"):
        store.accept(a_job(images=(left,)))


def test_a_sweep_takes_what_expired_then_the_oldest_until_few_enough_bytes_stay(tmp_path: Path) -> None:
    clock = Clock()
    store = open_store(tmp_path, clock=clock, keep_s=1000.0)
    jobs: list[str] = []
    for index, keep_s in enumerate((1000.0, 10.0, 1000.0, 1000.0)):
        clock.now = NOW + index
        jobs.append(done(store, f"try{index}", num_bytes=100, keep_s=keep_s).id)
    waiting = store.accept(a_job()).id
    cancelled = store.accept(a_job()).id
    store.ask_cancel(cancelled)
    assert store.sweep(NOW + 5, max_bytes=MANY) == 0
    assert store.sweep(NOW + 20, max_bytes=300) == 1  # the expired one; then few enough are left
    assert store.get(jobs[1]) is None
    assert store.sweep(NOW + 20, max_bytes=299) == 1
    assert store.get(jobs[0]) is None
    assert sorted(path.name for path in store.folders.results.iterdir()) == ["try2", "try3"]
    assert store.sweep(NOW + 5000, max_bytes=0) == 3
    assert [job.id for job in store.of_owner("anna")] == [waiting], "what is not over never goes"
    assert store.spent("anna", NOW) == 4.0
    store.sweep(NOW + SPENDING_KEPT_S + 5000, max_bytes=0)
    assert store.spent("anna", 0) == 0.0


def test_a_sweep_takes_what_only_a_job_that_is_over_has_brought(tmp_path: Path) -> None:
    store = open_store(tmp_path, clock=Clock())
    brought = [store.folders.add_input(b"png") for _ in range(2)]
    over, waiting = (store.accept(a_job(images=(name,))).id for name in brought)
    store.ask_cancel(over)
    assert store.sweep(NOW, max_bytes=MANY) == 0
    assert [path.name for path in store.folders.inputs.iterdir()] == [brought[1]]
    assert {job.id for job in store.of_owner("anna")} == {over, waiting}


def test_a_sweep_keeps_no_more_jobs_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "MOST_OVER", 2)
    clock = Clock()
    store = open_store(tmp_path, clock=clock)
    jobs = [store.accept(a_job()).id for _ in range(4)]
    for job in jobs[:3]:
        clock.now += 1
        store.ask_cancel(job)
    assert store.sweep(clock.now, max_bytes=MANY) == 1
    assert {job.id for job in store.of_owner("anna")} == set(jobs[1:])


def test_a_sweep_takes_old_files_of_no_job_and_never_those_of_a_running_attempt(tmp_path: Path) -> None:
    clock = Clock()
    store = open_store(tmp_path, clock=clock)
    kept = done(store, "kept", keep_s=1e6)
    clock.now = NOW - 3 * ORPHAN_S  # a long video
    taken = store.folders.add_input(b"png")
    job, epoch = store.accept(a_job(images=(taken,))).id, store.begin_epoch()
    store.claim([job], epoch)
    stray = [store.folders.add_input(b"png") for _ in range(2)]
    for name, seconds in (("attempt", 2 * ORPHAN_S), ("young", 10), ("orphan", 4 * ORPHAN_S), ("kept", 9 * ORPHAN_S)):
        paint(store, name, "0.png")
        aged(store.folders.output(name), seconds)
    outside = tmp_path / "outside"
    outside.mkdir()
    (store.folders.results / "link").symlink_to(outside)
    aged(store.folders.results / "link", 4 * ORPHAN_S)
    for name, seconds in ((taken, 9 * ORPHAN_S), (stray[0], 2 * ORPHAN_S), (stray[1], 10)):
        aged(store.folders.input(name), seconds)
    clock.now = NOW
    assert store.sweep(NOW, max_bytes=MANY) == 0
    assert sorted(path.name for path in store.folders.results.iterdir()) == ["attempt", "kept", "young"]
    assert {path.name for path in store.folders.inputs.iterdir()} == {taken, stray[1]}
    assert outside.exists()
    store.fail(job, epoch, sqlite_store.JobError(kind="internal", message="no"), keep_s=1e6)
    store.sweep(NOW, max_bytes=MANY)
    assert sorted(path.name for path in store.folders.results.iterdir()) == ["kept", "young"]
    assert store.folders.output(kept.folder, "0.png").exists()


@contextlib.contextmanager
def no_bytes_left(path: Path) -> Iterator[None]:
    """The kernel refuses writes past the present size of this file (and of larger ones)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_no_half_job_and_the_store_goes_on(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first = store.accept(a_job())
    name = store.folders.add_input(b"png")
    with no_bytes_left(tmp_path / "jobs.sqlite-wal"), pytest.raises(StoreError, match=r"jobs.sqlite: .*disk"):
        store.accept(a_job(images=(name,)))
    assert store.queued() == [first]
    assert not store.folders.input(name).exists()
    second = store.accept(a_job())
    assert open_store(tmp_path).queued() == [first, second]


def test_a_full_disk_is_said_and_nothing_is_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    with store._database.writing() as at:
        pages = at.execute("PRAGMA page_count").fetchone()[0]
    with store._database.reading() as at:  # the one connection there is
        at.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StoreError, match=r"the disk is full\. Free space, or lower --keep-gigabytes"):
        _ = [store.accept(a_job()) for _ in range(1000)]
    accepted = store.counts()[State.QUEUED]
    assert len(store.queued()) == len(store.of_owner("anna", limit=MANY)) == accepted < 1000

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job, epoch = store.queued()[0].id, store.begin_epoch()
    store.claim([job], epoch)
    paint(store, "try", "0.png")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left on device\. Free space"):
        store.commit(job, epoch, folder="try", files=["0.png"], receipt="", rank_seconds=1.0, keep_s=1.0)
    with pytest.raises(StoreError, match="No space left"):
        store.folders.add_input(b"png")
    monkeypatch.undo()
    assert store.running()[0].id == job
    assert not list(store.folders.inputs.iterdir())


def test_a_damaged_database_is_named_at_the_start_and_while_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = open_store(tmp_path)
    for _ in range(50):
        store.accept(a_job())
    with store._database.reading() as at:
        at.execute("COMMIT")
        at.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        at.execute("BEGIN")
    store.close()
    data = path.read_bytes()
    damaged = bytearray(data)
    damaged[8192:] = os.urandom(len(data) - 8192)
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"jobs.sqlite: the database is damaged .*Move it away"):
        open_store(tmp_path)
    path.write_bytes(b"not a database at all, " * 400)
    with pytest.raises(StoreError, match=r"is damaged .file is not a database"):
        open_store(tmp_path)
    path.write_bytes(data)
    store = open_store(tmp_path)
    path.write_bytes(damaged)  # same file, other bytes
    with store._database.reading() as at:
        at.execute("PRAGMA shrink_memory")
    with pytest.raises(StoreError, match="is damaged"):
        store.of_owner("anna", limit=100)


def test_a_row_that_cannot_be_read_names_its_job(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job = store.accept(a_job()).id
    with sqlite3.connect(tmp_path / "jobs.sqlite") as at:
        at.execute("UPDATE jobs SET request = '{}'")
    with pytest.raises(StoreError, match=f"job {job}: what is stored of it cannot be read"):
        store.get(job)


def test_newer_and_foreign_databases_are_refused_and_stay_as_they_are(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as at:
        at.execute(f"PRAGMA user_version={len(STEPS) + 1}")
    with pytest.raises(ConfigError, match=r"written by a newer parafuse .version 3; this one knows 2.*--state"):
        open_store(tmp_path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with sqlite3.connect(foreign / "jobs.sqlite") as at:
        at.execute("CREATE TABLE theirs (a)")
    with pytest.raises(ConfigError, match="a database of something else"):
        open_store(foreign)
    with sqlite3.connect(foreign / "jobs.sqlite") as at:
        assert [row[0] for row in at.execute("SELECT name FROM sqlite_schema")] == ["theirs"]


def test_an_older_database_is_brought_up_to_date_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = open_store(tmp_path).accept(a_job())
    broken = (*STEPS, ("ALTER TABLE jobs ADD COLUMN first TEXT", "ALTER TABLE none ADD COLUMN b"))
    monkeypatch.setattr(sqlite_store, "STEPS", broken)
    with pytest.raises(StoreError, match="no such table"):
        open_store(tmp_path)
    steps = (*STEPS, ("ALTER TABLE jobs ADD COLUMN first TEXT",), ("ALTER TABLE jobs ADD COLUMN second TEXT",))
    monkeypatch.setattr(sqlite_store, "STEPS", steps)  # nothing of the broken step has stayed
    store = open_store(tmp_path)
    assert store.get(job.id) == job
    with store._database.reading() as at:
        assert at.execute("PRAGMA user_version").fetchone()[0] == len(STEPS) + 2
        at.execute("SELECT first, second FROM jobs")


def test_a_database_that_was_taken_away_is_noticed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    (tmp_path / "jobs.sqlite").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is gone"):
        store.accept(a_job())
    (tmp_path / "jobs.sqlite").touch()
    with pytest.raises(StoreError, match="removed or replaced"):
        store.accept(a_job())


def test_who_is_held_up_by_another_process_is_told(tmp_path: Path) -> None:
    store = open_store(tmp_path, busy_s=0.2)
    job = store.accept(a_job())
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusyError, match=r"has held it for 0.2 s. Is one of the server's processes stopped"):
            store.accept(a_job())
        assert store.get(job.id) == job, "reading does not wait for writers"
    store.accept(a_job())


def test_who_makes_the_file_at_the_same_time_does_not_wait_for_the_others_for_ever(tmp_path: Path) -> None:
    gate = threading.Barrier(4)

    def make(folder: Path) -> None:
        gate.wait(60)
        open_store(folder, busy_s=5.0).close()

    with ThreadPoolExecutor(4) as pool:
        for index in range(12):
            list(pool.map(make, [tmp_path / str(index)] * 4))


def test_threads_share_a_store_and_quotas_hold_among_them(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    refused = threading.Semaphore(0)

    def ask(_: int) -> None:
        try:
            store.accept(a_job(), max_queued=25)
        except QueueFullError:
            refused.release()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(40)))
    assert store.counts()[State.QUEUED] == 25
    assert sum(refused.acquire(blocking=False) for _ in range(20)) == 15
    epoch, jobs = store.begin_epoch(), [job.id for job in store.queued()]
    with ThreadPoolExecutor(4) as pool:
        claims = list(pool.map(lambda _: store.claim(jobs, epoch), range(4)))
    assert sorted(len(claim) for claim in claims) == [0, 0, 0, 25]


def _open_and_ask(folder: str) -> None:
    store = open_store(Path(folder))
    for _ in range(5):
        store.accept(a_job(), max_queued=12)


def test_processes_may_make_the_store_at_once_and_quotas_hold_among_them(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_open_and_ask, args=(str(tmp_path),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(process.exitcode or 0 for process in processes) == [0, 0, 1], "15 were asked for, 12 may wait"
    assert open_store(tmp_path).counts()[State.QUEUED] == 12


def test_after_a_fork_the_store_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pid = os.fork()
    if not pid:
        try:
            store.counts()
        except StoreError as error:
            os._exit(7 if "after a fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert store.counts()[State.QUEUED] == 0
