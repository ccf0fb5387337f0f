"""`JobStore` on SQLite: one file and two folders of one machine, on a local disk.

Accepted means stored: what `accept` or `commit` has returned survives a crash of any process at any moment, and a power
cut. HTTP processes and supervisors use it side by side; a supervisor that has been replaced changes nothing more.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from parafuse.errors import ConfigError
from parafuse.launch.serve.folders import Folders
from parafuse.launch.serve.jobs import (
    MAX_TRIES,
    FileError,
    IdempotencyError,
    Job,
    JobError,
    JobGoneError,
    JobRequest,
    QueueFullError,
    StaleError,
    State,
    StoreError,
)
from parafuse.launch.serve.sqlite_file import Database
from parafuse.launch.serve.sqlite_schema import STEPS

SPENDING_KEPT_S = 35 * 24 * 3600.0
"""How far back `spent` knows."""
MOST_OVER = 100_000
"""Jobs that are over and kept at most, however small their results."""
_OVER = "('done', 'failed', 'cancelled')"


class SqliteStore:
    """See `JobStore` for what each method does. All raise StoreError where the disk or the database fails, and then
    have changed nothing; StoreBusyError where another process holds the database."""

    def __init__(
        self,
        database: Path,
        results: Path,
        inputs: Path,
        *,
        keep_s: float = 24 * 3600.0,
        busy_s: float = 15.0,
        clock: Callable[[], float] = time.time,
    ):
        """`keep_s`: how long jobs that end here stay (cancelled in the queue, lost); `clock` gives Unix seconds. Raises
        ConfigError for a database that is none of ours or a newer parafuse's."""
        self.folders = Folders(results, inputs)
        self._database = Database(database, STEPS, busy_s=busy_s)
        self._keep_s = keep_s
        self._clock = clock

    def close(self) -> None:
        """Idempotent."""
        self._database.close()

    # What clients do.

    def accept(
        self, job: Job, *, request_hash: str = "", max_queued: int | None = None, max_queued_of_key: int | None = None
    ) -> Job:
        """A job that is not taken loses its inputs; so does one that stands for an earlier one."""
        if job.state is not State.QUEUED:
            raise ConfigError(f"job {job.id}: is {job.state}; a new job is queued.")
        inputs = [name for names in job.request.images.values() for name in names]
        taken = False
        try:
            with self._database.writing() as at:
                stands = _standing(at, job, request_hash)
                if stands is None:
                    _check_room(at, job.owner, max_queued=max_queued, max_queued_of_key=max_queued_of_key)
                    self.folders.check_inputs(inputs)
                    _insert(at, job, request_hash, inputs)
                found = stands or _must(_find(at, job.id), job.id)
            taken = stands is None
            return found
        finally:
            if not taken:
                with contextlib.suppress(StoreError):  # what is in the way is told already; `sweep` takes them
                    self._discard_unnamed(inputs)

    def get(self, job: str, owner: str | None = None) -> Job | None:
        """One row."""
        with self._database.reading() as at:
            return _find(at, job, owner)

    def of_owner(self, owner: str, *, kind: str | None = None, limit: int = 20, after: str | None = None) -> list[Job]:
        """Empty also where `after` is none of this owner's (any more)."""
        with self._database.reading() as at:
            return _jobs(at.execute(
                """SELECT * FROM jobs WHERE owner = :owner AND (:kind IS NULL OR kind = :kind)
                AND (:after IS NULL OR number < (SELECT number FROM jobs WHERE id = :after AND owner = :owner))
                ORDER BY number DESC LIMIT :limit""",
                {"owner": owner, "kind": kind, "after": after, "limit": limit},
            ))  # fmt: skip

    def ask_cancel(self, job: str, owner: str | None = None) -> Job | None:
        """None where there is no such job."""
        with self._database.writing() as at:
            found = _find(at, job, owner)
            if found is None or found.state.is_over:
                return found
            if found.state is State.RUNNING:
                at.execute("UPDATE jobs SET cancel_asked = 1 WHERE id = ?", (job,))
                return _find(at, job)
            return self._end(at, job, State.CANCELLED)

    def delete(self, job: str, owner: str | None = None) -> bool:
        """False also for a job that is not over: cancel it first."""
        with self._database.writing() as at:
            found = _find(at, job, owner)
            if found is None or not found.state.is_over:
                return False
            at.execute("DELETE FROM jobs WHERE id = ?", (job,))
        self._discard([found])
        return True

    def discard_inputs(self, names: Sequence[str]) -> None:
        """Takes away those that no job names: of a request that was given up, maybe while a thread still accepts it
        (which then either has it, with its inputs, or finds them missing)."""
        with self._database.writing() as at:
            self.folders.discard_inputs(_unnamed(at, names))

    # What the supervisor does.

    def begin_epoch(self, *, alone: bool = True) -> int:
        """From 1."""
        with self._database.writing() as at:
            at.execute("UPDATE charge SET epoch = epoch + 1")
            if alone:
                at.execute("DELETE FROM charges")
            at.execute("INSERT INTO charges SELECT epoch FROM charge")
            self._lose_orphans(at)
            return at.execute("SELECT epoch FROM charge").fetchone()[0]

    def end_epoch(self, epoch: int) -> list[Job]:
        """Idempotent."""
        with self._database.writing() as at:
            at.execute("DELETE FROM charges WHERE epoch = ?", (epoch,))
            return self._lose_orphans(at)

    def epochs(self) -> list[int]:
        """Every one that has begun and not ended."""
        with self._database.reading() as at:
            return _epochs(at)

    def queued(self, limit: int = 1000) -> list[Job]:
        """Oldest: accepted first."""
        with self._database.reading() as at:
            return _jobs(at.execute(
                "SELECT * FROM jobs WHERE state = 'queued' ORDER BY priority DESC, number LIMIT ?", (limit,)
            ))  # fmt: skip

    def claim(self, jobs: Sequence[str], epoch: int) -> list[Job]:
        """In the order of `jobs`. All or nothing is on the disk when it returns."""
        claimed: list[Job] = []
        with self._database.writing() as at:
            _check_epoch(at, epoch)
            for job in jobs:
                changed = at.execute(
                    "UPDATE jobs SET state = 'running', epoch = ?, tries = tries + 1, started_s = ?, progress = 0 "
                    "WHERE id = ? AND state = 'queued'",
                    (epoch, self._clock(), job),
                ).rowcount
                if changed:
                    claimed.append(_must(_find(at, job), job))
        return claimed

    def give_back(self, job: str, epoch: int, why: str, *, rank_seconds: float = 0.0) -> Job:
        """A job that is over stays as it is, here and in the methods below, and is returned."""
        with self._database.writing() as at:
            found = _running(at, job, epoch)
            if found.state.is_over:
                return found
            at.execute("UPDATE jobs SET rank_seconds = rank_seconds + ? WHERE id = ?", (rank_seconds, job))
            return self._lose(at, found, why)

    def unclaim(self, job: str, epoch: int) -> Job:
        """Cancelled where that was asked meanwhile."""
        with self._database.writing() as at:
            found = _running(at, job, epoch)
            if found.state.is_over:
                return found
            at.execute("UPDATE jobs SET tries = tries - 1 WHERE id = ?", (job,))
            return self._end(at, job, State.CANCELLED) if found.cancel_asked else _requeue(at, job)

    def commit(
        self, job: str, epoch: int, *, folder: str, files: Sequence[str], receipt: str, rank_seconds: float,
        keep_s: float,
    ) -> Job:  # fmt: skip
        """`folder`: a name in the folder of results, which jobs of one call may share; `files`: names in it, this job's
        own. Files and folder are on the disk before the job is done. Raises FileError where a file is missing."""
        with self._database.reading() as at:  # a stale one is told before it waits for the disk
            found = _running(at, job, epoch)
        if found.state.is_over:
            return found
        num_bytes = self.folders.settle_outputs(folder, files)
        with self._database.writing() as at:
            found = _running(at, job, epoch)
            if found.state.is_over:
                return found
            at.execute(
                "UPDATE jobs SET folder = ?, files = ?, num_bytes = ?, receipt = ?, progress = 1 WHERE id = ?",
                (folder, _json(tuple(files)), num_bytes, receipt, job),
            )
            return self._end(at, job, State.DONE, rank_seconds=rank_seconds, keep_s=keep_s)

    def fail(self, job: str, epoch: int, error: JobError, *, rank_seconds: float = 0.0, keep_s: float) -> Job:
        """A queued one too: its deadline has passed."""
        with self._database.writing() as at:
            found = _in_charge_of(at, job, epoch)
            if found.state.is_over:
                return found
            return self._end(at, job, State.FAILED, error=error, rank_seconds=rank_seconds, keep_s=keep_s)

    def fail_late(self, epoch: int, *, keep_s: float) -> list[Job]:
        """In the order of their acceptance."""
        error = JobError(kind="deadline", message="its deadline passed while it waited.")
        late = "SELECT id FROM jobs WHERE state = 'queued' AND deadline_s <= ? ORDER BY number"
        with self._database.reading() as at:  # mostly there is none, and nothing to wait for
            if at.execute(late, (self._clock(),)).fetchone() is None:
                return []
        with self._database.writing() as at:
            _check_epoch(at, epoch)
            found = [row[0] for row in at.execute(late, (self._clock(),))]
            return [self._end(at, job, State.FAILED, error=error, keep_s=keep_s) for job in found]

    def cancelled(self, job: str, epoch: int, *, rank_seconds: float = 0.0, keep_s: float) -> Job:
        """Its ranks have left the call."""
        with self._database.writing() as at:
            found = _running(at, job, epoch)
            if found.state.is_over:
                return found
            return self._end(at, job, State.CANCELLED, rank_seconds=rank_seconds, keep_s=keep_s)

    def note_progress(self, job: str, epoch: int, progress: float) -> None:
        """Does not wait for the disk. Nothing happens where the job no longer runs."""
        with self._database.writing(durable=False) as at:
            _check_epoch(at, epoch)
            at.execute(
                "UPDATE jobs SET progress = ? WHERE id = ? AND state = 'running' AND epoch = ?",
                (min(max(progress, 0.0), 1.0), job, epoch),
            )

    def running(self) -> list[Job]:
        """Oldest first."""
        with self._database.reading() as at:
            return _jobs(at.execute("SELECT * FROM jobs WHERE state = 'running' ORDER BY number"))

    # What both do.

    def counts(self) -> dict[State, int]:
        """Of every state, 0 too."""
        with self._database.reading() as at:
            rows = at.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall()
        return dict.fromkeys(State, 0) | {State(state): number for state, number in rows}

    def num_queued(self, owner: str | None = None) -> int:
        """By an index."""
        with self._database.reading() as at:
            return _num_queued(at, owner)

    def spent(self, owner: str, since_s: float) -> float:
        """Of deleted jobs too. Not further back than SPENDING_KEPT_S."""
        with self._database.reading() as at:
            return at.execute(
                "SELECT coalesce(sum(rank_seconds), 0.0) FROM spending WHERE owner = ? AND ended_s >= ?",
                (owner, since_s),
            ).fetchone()[0]

    def sweep(self, now_s: float, *, max_bytes: int) -> int:
        """One process at a time needs to call it. A webhook that is still due does not keep its job."""
        with self._database.writing() as at:
            gone = _jobs(at.execute("SELECT * FROM jobs WHERE expires_s <= ? ORDER BY number", (now_s,)))
            gone += _beyond(at, now_s, max_bytes)
            at.executemany("DELETE FROM jobs WHERE id = ?", [(job.id,) for job in gone])
            at.execute("DELETE FROM spending WHERE ended_s < ?", (now_s - SPENDING_KEPT_S,))
            read = f"SELECT name FROM inputs JOIN jobs ON jobs.id = inputs.job WHERE state IN {_OVER}"
            inputs = [row[0] for row in at.execute(read)]  # nobody reads them any more
            at.executemany("DELETE FROM inputs WHERE name = ?", [(name,) for name in inputs])
        self._discard(gone)
        self.folders.discard_inputs(inputs)
        with self._database.reading() as at:
            folders = {row[0] for row in at.execute("SELECT DISTINCT folder FROM jobs WHERE folder <> ''")}
            named = {row[0] for row in at.execute("SELECT name FROM inputs")}
            (since_s,) = at.execute("SELECT min(started_s) FROM jobs WHERE state = 'running'").fetchone()
        self.folders.discard_orphans(now_s, folders=folders, inputs=named, running_since_s=since_s)
        return len(gone)

    def due_webhooks(self, now_s: float, limit: int = 20) -> list[Job]:
        """The longest due first."""
        with self._database.reading() as at:
            return _jobs(at.execute(
                "SELECT * FROM jobs WHERE webhook_due_s <= ? ORDER BY webhook_due_s, number LIMIT ?", (now_s, limit)
            ))  # fmt: skip

    def webhook_tried(self, job: str, *, delivered: bool, next_s: float | None) -> None:
        """Nothing happens where the job has been deleted meanwhile."""
        with self._database.writing() as at:
            at.execute(
                f"UPDATE jobs SET webhook_due_s = ? WHERE id = ? AND webhook IS NOT NULL AND state IN {_OVER}",
                (None if delivered else next_s, job),
            )

    def _lose_orphans(self, at: sqlite3.Connection) -> list[Job]:
        """Running jobs that nobody is in charge of."""
        orphans = "SELECT * FROM jobs WHERE state = 'running' AND epoch NOT IN (SELECT epoch FROM charges)"
        found = _jobs(at.execute(f"{orphans} ORDER BY number"))
        return [self._lose(at, job, "the server ended while it ran") for job in found]

    def _lose(self, at: sqlite3.Connection, job: Job, why: str) -> Job:
        if job.cancel_asked:
            return self._end(at, job.id, State.CANCELLED)
        if job.tries >= MAX_TRIES:
            error = JobError(kind="lost", message=f"given up after {job.tries} tries: {why}")
            return self._end(at, job.id, State.FAILED, error=error)
        return _requeue(at, job.id)

    def _end(
        self, at: sqlite3.Connection, job: str, state: State, *, error: JobError | None = None,
        rank_seconds: float = 0.0, keep_s: float | None = None,
    ) -> Job:  # fmt: skip
        now_s = self._clock()
        at.execute(
            """UPDATE jobs SET state = :state, error = :error, finished_s = :now, expires_s = :expires,
            rank_seconds = rank_seconds + :seconds, webhook_due_s = iif(webhook IS NULL, NULL, :now)
            WHERE id = :job""",
            {
                "state": state, "error": _json(error) if error else None, "now": now_s, "job": job,
                "expires": now_s + (self._keep_s if keep_s is None else keep_s), "seconds": rank_seconds,
            },
        )  # fmt: skip
        at.execute(
            "INSERT INTO spending SELECT owner, finished_s, rank_seconds FROM jobs WHERE id = ? AND rank_seconds > 0",
            (job,),
        )
        return _must(_find(at, job), job)

    def _discard(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            if job.folder:
                self.folders.discard_outputs(job.folder, job.files)
            self.folders.discard_inputs(name for names in job.request.images.values() for name in names)

    def _discard_unnamed(self, inputs: Sequence[str]) -> None:
        if inputs:
            with self._database.reading() as at:
                unnamed = _unnamed(at, inputs)
            self.folders.discard_inputs(unnamed)


def _unnamed(at: sqlite3.Connection, inputs: Sequence[str]) -> list[str]:
    return [name for name in inputs if at.execute("SELECT 1 FROM inputs WHERE name = ?", (name,)).fetchone() is None]


def _standing(at: sqlite3.Connection, job: Job, request_hash: str) -> Job | None:
    """The job that this owner's idempotency key has made before."""
    if job.idempotency_key is None:
        return None
    row = at.execute(
        "SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?", (job.owner, job.idempotency_key)
    ).fetchone()
    if row is None:
        return None
    if row["request_hash"] != request_hash:
        raise IdempotencyError(
            f"idempotency key {job.idempotency_key!r} was used for another request ({row['id']}). Give a new one."
        )
    return _job(row)


def _check_room(
    at: sqlite3.Connection, owner: str, *, max_queued: int | None, max_queued_of_key: int | None
) -> None:  # fmt: skip
    if max_queued_of_key is not None:
        own = _num_queued(at, owner)
        if own >= max_queued_of_key:
            raise QueueFullError(
                f"{own} jobs of this key wait; at most {max_queued_of_key} may. Wait for some, or cancel some.",
                of_key=True,
            )
    if max_queued is not None:
        all_of_them = _num_queued(at)
        if all_of_them >= max_queued:
            raise QueueFullError(f"{all_of_them} jobs wait; at most {max_queued} may. Try again later.", of_key=False)


def _num_queued(at: sqlite3.Connection, owner: str | None = None) -> int:
    if owner is None:
        return at.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()[0]
    return at.execute("SELECT count(*) FROM jobs WHERE owner = ? AND state = 'queued'", (owner,)).fetchone()[0]


def _insert(at: sqlite3.Connection, job: Job, request_hash: str, inputs: Sequence[str]) -> None:
    if at.execute("SELECT 1 FROM jobs WHERE id = ?", (job.id,)).fetchone():
        raise ConfigError(f"job {job.id}: there is one with this id. Take a new id for each job.")
    values = {
        "id": job.id, "owner": job.owner, "kind": job.request.kind, "request": _json(job.request),
        "request_hash": request_hash, "state": State.QUEUED, "priority": job.priority, "created_s": job.created_s,
        "deadline_s": job.deadline_s, "idempotency_key": job.idempotency_key, "webhook": job.webhook,
    }  # fmt: skip
    at.execute(f"INSERT INTO jobs ({', '.join(values)}) VALUES ({', '.join(f':{name}' for name in values)})", values)
    for name in dict.fromkeys(inputs):
        if at.execute("SELECT 1 FROM inputs WHERE name = ?", (name,)).fetchone():
            raise FileError(f"input {name}: belongs to another job. Store each request's inputs anew.")
        at.execute("INSERT INTO inputs (name, job) VALUES (?, ?)", (name, job.id))


def _beyond(at: sqlite3.Connection, now_s: float, max_bytes: int) -> list[Job]:
    """The jobs whose outputs are too many, oldest first, and those that are too many themselves."""
    (number,) = at.execute(f"SELECT count(*) FROM jobs WHERE state IN {_OVER}").fetchone()
    oldest = f"SELECT * FROM jobs WHERE state IN {_OVER} ORDER BY finished_s LIMIT ?"
    too_many = _jobs(at.execute(oldest, (max(0, number - MOST_OVER),)))
    (kept,) = at.execute("SELECT coalesce(sum(num_bytes), 0) FROM jobs WHERE expires_s > ?", (now_s,)).fetchone()
    gone: list[Job] = []
    for row in at.execute("SELECT * FROM jobs WHERE num_bytes > 0 AND expires_s > ? ORDER BY finished_s", (now_s,)):
        if kept <= max_bytes:
            break
        kept -= row["num_bytes"]
        gone.append(_job(row))
    return list({job.id: job for job in (*too_many, *gone)}.values())


def _requeue(at: sqlite3.Connection, job: str) -> Job:
    at.execute("UPDATE jobs SET state = 'queued', started_s = NULL, progress = 0 WHERE id = ?", (job,))
    return _must(_find(at, job), job)


def _epochs(at: sqlite3.Connection) -> list[int]:
    return [row[0] for row in at.execute("SELECT epoch FROM charges ORDER BY epoch")]


def _check_epoch(at: sqlite3.Connection, epoch: int) -> None:
    there = _epochs(at)
    if epoch not in there:
        others = ", ".join(map(str, there)) or "nobody"
        raise StaleError(f"supervisor {epoch} is no longer in charge: {others} is. It has to end.")


def _in_charge_of(at: sqlite3.Connection, job: str, epoch: int) -> Job:
    """The job, unless another supervisor runs it."""
    _check_epoch(at, epoch)
    row = at.execute("SELECT * FROM jobs WHERE id = ?", (job,)).fetchone()
    if row is not None and row["state"] == State.RUNNING and row["epoch"] != epoch:
        raise StaleError(f"job {job}: supervisor {row['epoch']} runs it; {epoch} has lost it.")
    return _must(None if row is None else _job(row), job)


def _running(at: sqlite3.Connection, job: str, epoch: int) -> Job:
    """The job, which runs or is over."""
    found = _in_charge_of(at, job, epoch)
    if found.state is State.QUEUED:
        raise StaleError(f"job {job}: waits in the queue; claim it first.")
    return found


def _must(job: Job | None, name: str) -> Job:
    if job is None:
        raise JobGoneError(f"job {name}: there is none (any more).")
    return job


def _find(at: sqlite3.Connection, job: str, owner: str | None = None) -> Job | None:
    row = at.execute("SELECT * FROM jobs WHERE id = ? AND (? IS NULL OR owner = ?)", (job, owner, owner)).fetchone()
    return None if row is None else _job(row)


def _jobs(rows: Iterable[sqlite3.Row]) -> list[Job]:
    return [_job(row) for row in rows]


def _job(row: sqlite3.Row) -> Job:
    try:
        values: dict[str, Any] = {name: row[name] for name in Job.__struct_fields__}
        values |= {
            "request": msgspec.json.decode(row["request"], type=JobRequest),
            "state": State(row["state"]),
            "cancel_asked": bool(row["cancel_asked"]),
            "error": None if row["error"] is None else msgspec.json.decode(row["error"], type=JobError),
            "files": msgspec.json.decode(row["files"], type=tuple[str, ...]),
        }
        return Job(**values)
    except (msgspec.DecodeError, IndexError, ValueError) as error:
        raise StoreError(f"job {row['id']}: what is stored of it cannot be read ({error}).") from error


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
