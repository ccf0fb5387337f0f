"""Files of jobs: inputs that requests brought, and a folder of outputs for each attempt of a call.

A file is on the disk before the database names it, and goes after the database has forgotten it: what a crash leaves in
between belongs to no job, and `sweep` takes it away.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from parafuse.launch.serve.jobs import FileError, StoreError

ORPHAN_S = 3600.0
"""What belongs to no job is left alone for so long: a request may be about to name it."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """OSError -> StoreError that says what could not be done."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{doing}: {error.strerror or error}. Free space on that disk, or give another folder."
        ) from error


def make_durable(folder: Path) -> None:
    """Returns when this folder and all that is in it would survive a power cut: each file, each folder, and its name in
    the folder above. Raises OSError."""
    for path, _, names in os.walk(folder, topdown=False):
        for file in (Path(path) / name for name in names):
            if not file.is_symlink():
                sync(file)
        sync(Path(path))
    sync(folder.parent)


def sync(path: Path) -> None:
    """fsync of a file or a folder. Links are not followed."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def private_folder(path: Path) -> None:
    """Makes a folder that only this user can enter (and those above it), where there is none: prompts and pictures lie
    there. Raises StoreError."""
    if not path.parent.is_dir():
        private_folder(path.parent)
    with explained(f"{path} cannot be made"):
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            if not path.is_dir():
                raise
        else:
            sync(path.parent)


class Folders:
    """The two folders. Names in them are plain ones: letters, digits, and . _ - after the first."""

    def __init__(self, results: Path, inputs: Path):
        self.results = results
        self.inputs = inputs
        private_folder(results)
        private_folder(inputs)

    def add_input(self, data: bytes, suffix: str = "") -> str:
        """Stores what a request brought, durably, and names it (`suffix`: .png). The HTTP process calls this before
        `accept`; a job that is not accepted loses its inputs. Raises StoreError, and leaves nothing then."""
        name = _plain(secrets.token_hex(16) + suffix, "an input")
        path = self.inputs / name
        with explained(f"{path} cannot be written"):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                sync(self.inputs)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return name

    def input(self, name: str) -> Path:
        """Where an input lies."""
        return self.inputs / _plain(name, "an input")

    def output(self, folder: str, file: str = "") -> Path:
        """Where an attempt's outputs lie, or one of them."""
        path = self.results / _plain(folder, "a folder of results")
        return path / _plain(file, "an output") if file else path

    def check_inputs(self, names: Iterable[str]) -> None:
        """Raises FileError for one that is not there."""
        for name in names:
            if not self.input(name).is_file():
                raise FileError(f"input {name}: there is no such file in {self.inputs}. Store it (add_input) first.")

    def settle_outputs(self, folder: str, files: Sequence[str]) -> int:
        """Makes an attempt's folder durable; bytes of these files of it. Raises FileError where one is missing,
        StoreError where the disk fails."""
        num_bytes = 0
        where = self.output(folder)
        with explained(f"outputs in {where} cannot be kept"):
            for file in files:
                try:
                    entry = self.output(folder, file).lstat()
                except FileNotFoundError as error:
                    raise FileError(
                        f"{where / file}: there is no such file; write outputs before they are committed."
                    ) from error
                if not stat.S_ISREG(entry.st_mode):
                    raise FileError(f"{where / file}: is no file; outputs are files.")
                num_bytes += entry.st_size
            if files:
                make_durable(where)
        return num_bytes

    def discard_inputs(self, names: Iterable[str]) -> None:
        """Takes inputs away. What cannot be removed now is tried again by `sweep`."""
        for name in names:
            with contextlib.suppress(OSError, FileError):
                self.input(name).unlink()

    def discard_outputs(self, folder: str, files: Iterable[str]) -> None:
        """Takes one job's outputs away, and the folder with the last: jobs of one call share it, and those beside this
        one may be about to be committed. What cannot be removed now is tried again by `sweep`."""
        with contextlib.suppress(OSError):
            for file in files:
                self.output(folder, file).unlink(missing_ok=True)
            self.output(folder).rmdir()

    def discard_orphans(
        self, now_s: float, *, folders: Collection[str], inputs: Collection[str], running_since_s: float | None
    ) -> int:
        """Takes away what no job names, is older than ORPHAN_S, and no running attempt can have made (an attempt makes
        its folder after its job was claimed); returns how many went."""
        before_s = now_s - ORPHAN_S
        outputs_before_s = before_s if running_since_s is None else min(before_s, running_since_s - 60.0)
        gone = 0
        for root, named, limit_s in ((self.results, folders, outputs_before_s), (self.inputs, inputs, before_s)):
            with os.scandir(root) as entries:
                orphans = [entry for entry in entries if entry.name not in named and _changed_s(entry) < limit_s]
            for entry in orphans:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        Path(entry.path).unlink()
                gone += not os.path.lexists(entry.path)
        return gone


def _changed_s(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:  # somebody else has just removed it
        return float("inf")


def _plain(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise FileError(f"{name[:80]!r} names {what}: give a plain name, without folders (letters, digits, . _ -).")
    return name
