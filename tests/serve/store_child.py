"""What test_store_crash.py kills: `python -m tests.serve.store_child ROLE FOLDER`. Each line that it prints is a change
that the store has said is made."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from parafuse.launch.serve.jobs import JobError, QueueFullError, StaleError
from parafuse.launch.serve.sqlite_store import SqliteStore
from tests.serve.stores import a_job, open_store

KEEP_S = 1e6


def say(*words: str) -> None:
    os.write(1, (" ".join(words) + "\n").encode())  # one write: a kill leaves a line whole, or none


def clients(store: SqliteStore) -> None:
    """The HTTP process: accepts, cancels, deletes."""
    say("ready")
    mine: list[str] = []
    while True:
        draw = random.random()
        if draw < 0.7:
            image = (store.folders.add_input(os.urandom(2000), ".png"),) if draw < 0.3 else ()
            try:
                mine.append(store.accept(a_job(images=image, created_s=time.time()), max_queued=30).id)
            except QueueFullError:
                time.sleep(0.002)
                continue
            say("accepted", mine[-1])
        elif mine and draw < 0.85:
            job = store.ask_cancel(random.choice(mine))
            if job is not None:
                say(job.state, job.id)
        elif mine:
            job = mine.pop(random.randrange(len(mine)))
            say("deleting", job)
            if store.delete(job):
                say("deleted", job)


def supervisor(store: SqliteStore) -> None:
    """Claims, paints, and ends jobs in every way there is."""
    epoch = store.begin_epoch()
    say("ready")
    while True:
        for job in store.claim([job.id for job in store.queued(3)], epoch):
            draw = random.random()
            if draw < 0.1:
                store.give_back(job.id, epoch, "a test", rank_seconds=1.0)
            elif draw < 0.2:
                store.fail(job.id, epoch, JobError(kind="internal", message="a test"), keep_s=KEEP_S)
            elif draw < 0.25:
                store.unclaim(job.id, epoch)
            else:
                folder = f"try-{os.getpid()}-{job.id}-{job.tries}"
                store.folders.output(folder).mkdir(exist_ok=True)
                store.folders.output(folder, "0.png").write_bytes(job.id.encode() * 50)
                store.note_progress(job.id, epoch, 0.5)
                end = store.commit(
                    job.id, epoch, folder=folder, files=["0.png"], receipt="{}", rank_seconds=2.0, keep_s=KEEP_S
                )
                say(end.state, job.id, folder)


def stopped(store: SqliteStore) -> None:
    """Is stopped with a job in hand, and wants to commit it when it goes on."""
    epoch = store.begin_epoch()
    (job,) = store.claim([store.queued(1)[0].id], epoch)
    store.folders.output("late").mkdir()
    store.folders.output("late", "0.png").write_bytes(b"late")
    say("ready", job.id)
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        store.commit(job.id, epoch, folder="late", files=["0.png"], receipt="", rank_seconds=1.0, keep_s=KEEP_S)
    except StaleError as error:
        say("stale", str(error))


if __name__ == "__main__":
    {"clients": clients, "supervisor": supervisor, "stopped": stopped}[sys.argv[1]](open_store(Path(sys.argv[2])))
