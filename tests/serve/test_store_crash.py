"""The job store under SIGKILL: what it has said is so, at whatever moment its processes die."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from parafuse.launch.serve.folders import ORPHAN_S
from parafuse.launch.serve.jobs import MAX_TRIES, Job, State
from parafuse.launch.serve.sqlite_store import SqliteStore
from tests.serve.stores import a_job, open_store

ROOT = Path(__file__).parents[2]
KILLS = 36
OVER = {State.DONE, State.FAILED, State.CANCELLED}


class Child:
    """One process of a server, and all that it has said."""

    def __init__(self, role: str, folder: Path):
        self.said = folder / f"{role}-{time.monotonic_ns()}.txt"
        with self.said.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.serve.store_child", role, str(folder)], cwd=ROOT, stdout=out
            )

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.said.read_text().splitlines()]

    def wait_for(self, word: str) -> list[str]:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            ended = self.process.poll() is not None
            for line in self.lines():
                if line[0] == word:
                    return line
            assert not ended, "it ended by itself: see its traceback"
            time.sleep(0.005)
        raise AssertionError(f"nothing of {word!r} in 60 s")

    def kill(self) -> None:
        assert self.process.poll() is None, "it ended by itself: see its traceback"
        self.process.kill()
        self.process.wait()


class Told:
    """What the store has said, over all processes."""

    def __init__(self) -> None:
        self.accepted: set[str] = set()
        self.deleting: set[str] = set()
        self.deleted: set[str] = set()
        self.ends: dict[str, set[str]] = defaultdict(set)
        self.folders: dict[str, set[str]] = defaultdict(set)

    def learn(self, child: Child) -> None:
        for word, *rest in child.lines():
            if word == "ready":
                continue
            job, *folder = rest
            if word in OVER:
                self.ends[job].add(word)
                self.folders[job].update(folder)
            elif word != State.RUNNING:
                getattr(self, word).add(job)


def hold(store: SqliteStore, told: Told) -> None:
    """While nothing runs: all that was said is so."""
    assert told.deleting <= told.accepted
    for job in told.accepted:
        assert len(told.ends[job]) <= 1, "a job ends once"
        assert len(told.folders[job]) <= 1, "and is committed once"
        found = store.get(job)
        if found is None:
            assert job in told.deleting, "an accepted job is lost"
            continue
        assert job not in told.deleted
        assert found.tries <= MAX_TRIES
        assert not told.ends[job] or {found.state} == told.ends[job]
        assert not told.folders[job] or {found.folder} == told.folders[job]
        hold_files(store, found)


def hold_files(store: SqliteStore, job: Job) -> None:
    if job.state is State.DONE:
        assert [store.folders.output(job.folder, file).read_bytes() for file in job.files] == [job.id.encode() * 50]
    for names in job.request.images.values():
        assert all(store.folders.input(name).stat().st_size == 2000 for name in names)


def end_all(store: SqliteStore) -> None:
    """A supervisor that nobody kills."""
    epoch = store.begin_epoch()
    assert not store.running()
    for job in store.claim([job.id for job in store.queued()], epoch):
        store.folders.output(f"end-{job.id}").mkdir()
        store.folders.output(f"end-{job.id}", "0.png").write_bytes(job.id.encode() * 50)
        store.commit(job.id, epoch, folder=f"end-{job.id}", files=["0.png"], receipt="{}", rank_seconds=1.0, keep_s=1e6)


def test_what_a_store_has_said_holds_when_its_processes_are_killed_at_any_moment(tmp_path: Path) -> None:
    told, draw = Told(), random.Random(13)
    children = {role: Child(role, tmp_path) for role in ("clients", "supervisor")}
    try:
        for kill in range(1, KILLS + 1):
            for child in children.values():
                child.wait_for("ready")
            time.sleep(draw.uniform(0.0, 0.12))
            # Every sixth time both, so that nothing moves while it is looked at.
            for role in children if kill % 6 == 0 else [draw.choice(list(children))]:
                children[role].kill()
                told.learn(children[role])
                if kill % 6:
                    children[role] = Child(role, tmp_path)
            if kill % 6 == 0:
                hold(open_store(tmp_path), told)
                children = {role: Child(role, tmp_path) for role in children}
    finally:
        for child in children.values():
            child.process.kill()
            child.process.wait()
    for child in children.values():
        told.learn(child)
    store = open_store(tmp_path)
    hold(store, told)
    end_all(store)
    hold(store, told)
    jobs = store.of_owner("anna", limit=10**6)
    assert {job.state for job in jobs} <= OVER
    assert told.accepted - told.deleting <= {job.id for job in jobs}
    assert len(told.accepted) > KILLS, "enough was going on"
    assert any(told.folders.values())
    store.sweep(time.time() + 2 * ORPHAN_S, max_bytes=1 << 40)
    assert {path.name for path in store.folders.results.iterdir()} == {job.folder for job in jobs if job.folder}
    assert any(job.request.images for job in jobs)
    assert not list(store.folders.inputs.iterdir()), "nobody reads them any more"
    with sqlite3.connect(tmp_path / "jobs.sqlite") as at:
        assert at.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_a_supervisor_that_was_stopped_cannot_commit_what_another_one_has_taken_over(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job = store.accept(a_job()).id
    child = Child("stopped", tmp_path)
    try:
        assert child.wait_for("ready")[1] == job
        epoch = store.begin_epoch()
        assert [one.id for one in store.claim([job], epoch)] == [job]
        assert os.waitid(os.P_PID, child.process.pid, os.WSTOPPED | os.WNOWAIT)
        child.process.send_signal(signal.SIGCONT)
        assert child.process.wait(60) == 0
        assert "no longer in charge" in " ".join(child.wait_for("stale"))
    finally:
        child.process.kill()
        child.process.wait()
    assert store.running()[0].tries == 2
    store.folders.output("new").mkdir()
    store.folders.output("new", "0.png").write_bytes(b"new")
    end = store.commit(job, epoch, folder="new", files=["0.png"], receipt="", rank_seconds=1.0, keep_s=1.0)
    assert (end.state, end.folder) == (State.DONE, "new")
