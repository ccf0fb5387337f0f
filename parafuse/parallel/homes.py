"""Where the images of units are at home: in the host's memory, or in a file that the ranks of a node share."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import re
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from parafuse.errors import ConfigError, MemoryLimitError
from parafuse.log import note
from parafuse.offload import CHANGED, ENDING, PAGE
from parafuse.parallel.image import Image

LOCK = ".lock"
DIGITS = 32
"""Of the names of files."""
PIECE = 1 << 24
"""Bytes of a file that are read at once, to see what is in it."""


class Home(Protocol):
    """Keeps the images of one component, by number."""

    grain: int
    """Bytes that the size of an image must be a multiple of."""
    keeps_all: bool
    """Whether all of an image is here, so that it can be given back without other ranks."""
    is_direct: bool
    """Whether `read` writes into a GPU's memory by itself, and does not hold the host up."""

    def keep(self, images: Sequence[Image]) -> None:
        """Takes the bytes of all of them, in the place of what it had, and puts the weights away. All or nothing: what
        fails leaves every weight with its values where it was, and what is kept then is not told."""
        ...

    def read(self, number: int, out: Tensor) -> None:
        """Writes an image into `out` (nbytes,) of bytes."""
        ...

    def runs(self, number: int) -> list[Tensor]:
        """The runs of an image as tensors in the host's memory, each with a storage of its own. What is written into
        them may be kept or not: `keep` tells."""
        ...

    def close(self) -> None: ...


class HostHome:
    """The host's memory, pinned where a GPU reads it."""

    grain, keeps_all, is_direct = 1, True, True

    def __init__(self, *, pinned: bool):
        self._pinned = pinned
        self._kept: list[tuple[Image, Tensor]] = []

    def keep(self, images: Sequence[Image]) -> None:
        before = {whole.data_ptr(): whole for _, whole in self._kept}
        self._kept = []
        try:
            for image in images:
                whole = self._whole(image, before)
                self._kept.append((image, whole))
                image.put_away()  # what was there is let go one by one
        except BaseException:
            put_back(self, [image for image, _ in self._kept])
            raise

    def _whole(self, image: Image, before: Mapping[int, Tensor]) -> Tensor:
        """The bytes of an image. `before`: what was kept so far, by address."""
        sources = image.sources()
        whole = before.get(sources[0].data_ptr()) if sources else None
        if whole is None or not _lies_in(whole, image, sources):
            whole = torch.empty(image.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
            for part, source in zip(image.split(whole), sources, strict=True):
                part.copy_(source)
        return whole

    def read(self, number: int, out: Tensor) -> None:
        out.copy_(self._kept[number][1], non_blocking=True)

    def runs(self, number: int) -> list[Tensor]:
        image, whole = self._kept[number]
        return [torch.frombuffer(part.numpy(), dtype=torch.uint8) for part in image.split(whole)]

    def close(self) -> None:
        self._kept = []


class DiskHome:
    """A file, named by what is in it: processes with the same weights share it. It goes with the last one that uses it.
    In a folder that the user has named the first one stays, which the next start finds; others, of weights that were
    changed since, go."""

    grain, keeps_all, is_direct = 1, True, False

    def __init__(self, folder: str | None):
        self._stays = folder is not None
        self.folder = Path(folder) if folder is not None else temporary_folder()
        try:
            self.folder.mkdir(mode=0o700 if folder is None else 0o777, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"offload: folder={str(self.folder)!r}: cannot be made ({error.strerror}).") from error
        if folder is None:
            _check_own(self.folder)
        self._images: list[Image] = []
        self._starts: list[int] = []
        self._file: _SharedFile | None = None
        self._first: _SharedFile | None = None
        """In a folder of the user's."""
        with _locked(self.folder):
            _sweep(self.folder, all_files=not self._stays)

    def keep(self, images: Sequence[Image]) -> None:
        starts, total = list[int](), 0
        for image in images:
            starts.append(total)
            total += -(-image.nbytes // PAGE) * PAGE
        sources = [image.sources() for image in images]
        name = _digest(images, sources)
        before = self._file
        if self._first is not None and self._first.name == name:
            self._file = self._first
        elif before is None or before.name != name:
            self._file = self._take(name, _Layout(images, starts, total), sources)
        if self._stays and self._first is None:
            self._first = self._file
        for image in images:
            image.put_away()
        self._images, self._starts = list(images), starts
        if before is not None and before is not self._file and before is not self._first:
            before.close()

    def _take(self, name: str, layout: _Layout, sources: list[list[Tensor]]) -> _SharedFile:
        """The file of this name, written where there is none. One that is there was written by somebody else, or long
        ago: all of it is read once, and it is written anew where it is not what its name says."""
        lasting, wrong = self.folder / f"{name}{ENDING}", (0, 0)
        while True:
            with _locked(self.folder):
                is_change = self._first is not None and not lasting.exists()
                path = self.folder / f"{name}{CHANGED}" if is_change else lasting
                if not path.exists() or path.stat().st_size != layout.total or _identity(path.stat()) == wrong:
                    self._write(path, layout, sources)
                    return _SharedFile(path, name, stays=self._stays and not is_change)
                found = _SharedFile(path, name, stays=self._stays and not is_change)
            if found.digest(layout) == name:
                return found
            wrong = _identity(os.fstat(found.descriptor))
            found.close()
            note(f"offload: {str(path)!r} is not what was written to it once; it is written anew")

    def _write(self, path: Path, layout: _Layout, sources: list[list[Tensor]]) -> None:
        """Whole or not at all, and where it stays also if the machine stops. Raises ConfigError where the disk has too
        little room."""
        total, status = layout.total, os.statvfs(self.folder)
        free = status.f_bavail * status.f_frsize
        full = f"offload: folder={str(self.folder)!r}: needs {total / 1e9:.3f} GB, and the disk has "
        if free < total:
            raise ConfigError(f"{full}{free / 1e9:.3f} GB free; give folder=... on another disk, or use to=cpu.")
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                file.truncate(total)
                for image, parts, start in zip(layout.images, sources, layout.starts, strict=True):
                    for run, source in zip(image.runs, parts, strict=True):
                        file.seek(start + run.start)
                        file.write(_bytes(source))
                if self._stays:
                    file.flush()
                    os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise MemoryLimitError(
                    f"offload: folder={str(self.folder)!r}: cannot be written ({error.strerror}); give another folder."
                ) from error
            raise MemoryLimitError(f"{full}no more; give folder=... on another disk, or use to=cpu.") from error
        finally:
            part.unlink(missing_ok=True)

    def read(self, number: int, out: Tensor) -> None:
        if self._file is None:
            raise RuntimeError("nothing is kept")
        self._file.read(self._starts[number], _bytes(out))

    def runs(self, number: int) -> list[Tensor]:
        """Pages of the file as they are needed; what is written into them is this process's alone."""
        image = self._images[number]
        if self._file is None or not image.nbytes:
            return []
        pages = mmap.mmap(
            self._file.descriptor, image.nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=self._starts[number],
        )  # fmt: skip
        return [torch.frombuffer(pages, dtype=torch.uint8, offset=run.start, count=run.nbytes) for run in image.runs]

    def close(self) -> None:
        for file in (self._file, self._first):
            if file is not None:
                file.close()
        self._file, self._first, self._images, self._starts = None, None, [], []


class MixedHome:
    """Several homes, of which each image has one."""

    grain, keeps_all, is_direct = 1, True, False

    def __init__(self, homes: Mapping[str, Home], which: Callable[[], Sequence[str]]):
        """`which`: of each image that is to be kept, the name of its home."""
        self._homes, self._which = homes, which
        self._places: list[tuple[Home, int]] = []

    def keep(self, images: Sequence[Image]) -> None:
        names = list(self._which())
        kept: list[tuple[Home, list[Image]]] = []
        try:
            for name, home in self._homes.items():
                own = [image for image, its in zip(images, names, strict=True) if its == name]
                home.keep(own)
                kept.append((home, own))
        except BaseException:
            for home, own in kept:
                put_back(home, own)
            raise
        self._places = [(self._homes[own], names[:number].count(own)) for number, own in enumerate(names)]

    def read(self, number: int, out: Tensor) -> None:
        home, place = self._places[number]
        home.read(place, out)

    def runs(self, number: int) -> list[Tensor]:
        home, place = self._places[number]
        return home.runs(place)

    def close(self) -> None:
        for home in self._homes.values():
            home.close()
        self._places = []


def put_back(home: Home, images: Sequence[Image]) -> None:
    """What a home keeps goes back into the weights, where they were; without a copy where that is the host's memory."""
    for number, image in enumerate(images):
        image.put_back(home.runs(number))


@dataclass(frozen=True)
class _Layout:
    """How images lie in a file."""

    images: Sequence[Image]
    starts: list[int]
    total: int
    """Bytes of the file."""


class _SharedFile:
    """An open file that others see is used, by a lock that ends with the process. `name`: the digest of its bytes."""

    def __init__(self, path: Path, name: str, *, stays: bool):
        import fcntl

        self.path, self.name = path, name
        self.descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(self.descriptor, fcntl.LOCK_SH)
        self._end = weakref.finalize(self, _let_go, self.descriptor, path, stays)  # also when the process ends

    def read(self, start: int, out: memoryview) -> None:
        """Raises MemoryLimitError where the file is shorter than it was."""
        done = 0
        while done < len(out):
            got = os.preadv(self.descriptor, [out[done:]], start + done)
            if not got:
                raise MemoryLimitError(
                    f"offload: {str(self.path)!r} is shorter than it was; did somebody change it? Load the model again."
                )
            done += got

    def digest(self, layout: _Layout) -> str:
        """Of what is in it, as `_digest` has it of weights."""
        found, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
        for image, start in zip(layout.images, layout.starts, strict=True):
            found.update(_described(image))
            for run in image.runs:
                for done in range(0, run.nbytes, PIECE):
                    piece = buffer[: min(PIECE, run.nbytes - done)]
                    self.read(start + run.start + done, piece)
                    found.update(piece)
        return found.hexdigest()[:DIGITS]

    def close(self) -> None:
        self._end()


def _let_go(descriptor: int, path: Path, stays: bool) -> None:
    """Closes a file, and removes it where nobody else uses it."""
    import fcntl

    with contextlib.suppress(OSError):
        if not stays:
            with _locked(path.parent), contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
    os.close(descriptor)


def _sweep(folder: Path, *, all_files: bool) -> None:
    """Removes what processes have left that were killed; other files than these stay. `all_files`: also of weights as
    they were loaded."""
    import fcntl

    endings = (CHANGED, ENDING) if all_files else (CHANGED,)
    ours = re.compile(rf"[0-9a-f]{{{DIGITS}}}(" + "|".join([*map(re.escape, endings), r".*\.\d+\.part"]) + ")")
    for path in [path for path in folder.iterdir() if ours.fullmatch(path.name)]:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def _check_own(folder: Path) -> None:
    """Raises ConfigError for a temporary folder that somebody else can write to: others may have made it before."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"offload: folder={str(folder)!r}: it is not a folder that this user alone can write to, so what is in it "
            "cannot be trusted; remove it, or give folder=... of your own."
        )


def _identity(found: os.stat_result) -> tuple[int, int]:
    """Another one for a file that was written anew."""
    return found.st_ino, found.st_mtime_ns


def temporary_folder() -> Path:
    """Of this user; the same for all processes, so that ranks share files."""
    return Path(tempfile.gettempdir()) / f"parafuse-offload-{os.getuid()}"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; a process that dies lets go."""
    import fcntl

    try:
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise ConfigError(
            f"offload: folder={str(folder)!r}: cannot be written ({error.strerror}); give another folder."
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lies_in(whole: Tensor, image: Image, sources: list[Tensor]) -> bool:
    """Whether the bytes of an image are in a home already."""
    at = whole.data_ptr()
    return len(whole) == image.nbytes and all(
        source.data_ptr() == at + run.start for run, source in zip(image.runs, sources, strict=True)
    )


def _bytes(x: Tensor) -> memoryview:
    """Of a tensor of bytes; those of a device are copied."""
    array: Any = x.cpu().numpy()
    return memoryview(array)


def _digest(images: Sequence[Image], sources: list[list[Tensor]]) -> str:
    """Of all bytes and how they lie."""
    found = hashlib.sha256()
    for image, parts in zip(images, sources, strict=True):
        found.update(_described(image))
        for source in parts:
            found.update(_bytes(source))
    return found.hexdigest()[:DIGITS]


def _described(image: Image) -> bytes:
    return repr((image.nbytes, image.runs)).encode()
