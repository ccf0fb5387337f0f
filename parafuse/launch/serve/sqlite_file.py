"""One SQLite file for several threads and processes: connections, transactions, versions, and errors in plain words."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from parafuse.errors import ConfigError
from parafuse.launch.serve.folders import explained, private_folder, sync
from parafuse.launch.serve.jobs import StoreBusyError, StoreError

APPLICATION = 0x70666A31
"""`pfj1` in the file's header: it is ours."""
Steps = Sequence[Sequence[str]]
"""Statements that lead from each version to the next, from an empty file on."""


class Database:
    """Each transaction has a connection to itself; a process has as many as it has had transactions at once."""

    def __init__(self, path: Path, steps: Steps, *, busy_s: float = 15.0):
        """Makes the file, or brings an older one to the newest version. Raises ConfigError for a file of a newer
        version or of something else, StoreError for a damaged one. `busy_s`: how long to wait for other writers."""
        self.path = path.absolute()
        self._busy_s = busy_s
        self._process = os.getpid()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        self._guard = threading.Lock()
        # SQLite's own waiting polls, and is not fair. Between threads of one process this lock is both.
        self._writer = threading.Lock()
        private_folder(self.path.parent)
        # Only a file that is not there: closing one that this process has open would drop SQLite's locks on it.
        # Its side files get the same permissions from SQLite.
        with explained(f"{self.path} cannot be made"), contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            sync(self.path.parent)
        self._identity = self._identified()
        self._prepare(steps)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One state of the database for all that is read in it. Raises StoreError."""
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """All that is changed in it is on the disk when it ends, or nothing is changed. Raises StoreError.
        `durable=False`: a power cut may undo it (never half of it)."""
        if not self._writer.acquire(timeout=self._busy_s):
            raise StoreBusyError(_busy(self.path, self._busy_s))
        try:
            with self._transaction("BEGIN IMMEDIATE", durable=durable) as connection:
                yield connection
        finally:
            self._writer.release()

    def close(self) -> None:
        """Idempotent. Transactions that run in other threads end as they would have."""
        with self._guard:
            self._closed, idle, self._idle = True, self._idle, []
        if os.getpid() == self._process:
            for connection in idle:
                connection.close()

    @contextlib.contextmanager
    def _transaction(self, begin: str, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        connection = self._take()
        sound = True
        try:
            with self._in_words():
                if not durable:
                    connection.execute("PRAGMA synchronous=NORMAL")
                connection.execute(begin)
                yield connection
                connection.execute("COMMIT")
        except StoreError:
            sound = False
            raise
        finally:
            self._put(connection, sound=sound, durable=durable)

    def _put(self, connection: sqlite3.Connection, *, sound: bool, durable: bool) -> None:
        """Whatever was not committed is undone; a connection that saw an error is not used again."""
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if not durable:
                connection.execute("PRAGMA synchronous=FULL")
        except sqlite3.Error:
            sound = False
        with self._guard:
            if sound and not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _take(self) -> sqlite3.Connection:
        if os.getpid() != self._process:
            raise StoreError(f"{self.path}: was opened in another process; open the store anew after a fork.")
        if self._identified() != self._identity:
            raise StoreError(f"{self.path}: was removed or replaced while in use. Start the server again.")
        with self._guard:
            if self._closed:
                raise StoreError(f"{self.path}: the store is closed.")
            if self._idle:
                return self._idle.pop()
        with self._in_words():
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=self._busy_s, isolation_level=None, check_same_thread=False)
        try:
            connection.row_factory = sqlite3.Row
            mode = self._with_log(connection)
            if mode != "wal":
                raise StoreError(f"{self.path}: its disk cannot hold a write-ahead log ({mode}). Give a local folder.")
            for pragma in ("synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF", "cell_size_check=ON",
                           "journal_size_limit=67108864"):  # fmt: skip
                connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _with_log(self, connection: sqlite3.Connection) -> str:
        """Turns the write-ahead log on. While several do so at once, SQLite says busy without waiting: two that both
        read and want to write would wait for each other."""
        deadline = time.monotonic() + self._busy_s
        while True:
            try:
                return connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def _prepare(self, steps: Steps) -> None:
        with self.reading() as connection:
            version = self._version(connection, len(steps))
            damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise StoreError(_damaged(self.path, damage))
        if version == len(steps):
            return
        with self.writing() as connection:
            for step in steps[self._version(connection, len(steps)) :]:
                for statement in step:
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id={APPLICATION}")
            connection.execute(f"PRAGMA user_version={len(steps)}")

    def _version(self, connection: sqlite3.Connection, newest: int) -> int:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if application != APPLICATION and (application or version or tables):
            raise ConfigError(f"{self.path}: is a database of something else. Give --state another folder.")
        if version > newest:
            raise ConfigError(
                f"{self.path}: was written by a newer parafuse (version {version}; this one knows {newest}). "
                "Upgrade parafuse, or give --state another folder."
            )
        return version

    def _identified(self) -> tuple[int, int]:
        with explained(f"{self.path}: is gone"):
            found = self.path.stat()
        return found.st_dev, found.st_ino

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._as_store_error(error) from error

    def _as_store_error(self, error: sqlite3.Error) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without what is more exact than the kind
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreBusyError(_busy(self.path, self._busy_s))
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return StoreError(_damaged(self.path, str(error)))
        if code == sqlite3.SQLITE_FULL:
            return StoreError(f"{self.path}: the disk is full. Free space, or lower --keep-gigabytes.")
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            return StoreError(f"{self.path}: {error}. See that its disk has space and may be written to.")
        return StoreError(f"{self.path}: {error}.")


def _busy(path: Path, busy_s: float) -> str:
    return f"{path}: another process has held it for {busy_s:g} s. Is one of the server's processes stopped?"


def _damaged(path: Path, how: str) -> str:
    how = " ".join(how.split())
    return f"{path}: the database is damaged ({how}). Move it away with its -wal file, or restore a copy."
