"""Objects with tensors in memory that the processes of one machine share: each maps what one of them has.

A pickle holds no values of tensors but places: in a file that the tensor is mapped from already (a checkpoint), or else
in a memory file (`memfd_create(2)`), to which the tensor is moved. Mappings are private: who writes gets pages of its
own, and nobody else sees it. So weights are in memory once, as long as nobody changes them.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import io
import mmap
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

SMALLEST = 4096
"""Bytes; what is smaller is pickled by value."""
REGION = 256 << 20
"""Bytes that are mapped at a time: each mapping keeps a file open."""
ALIGNED = 64
_GIVEN, _MAPPED = "given", "mapped"


class CannotShareError(Exception):
    """Something in an object cannot be had by another process."""


@dataclass(frozen=True)
class FilePart:
    """A mapping of this process: addresses from `start` to `end` are what the file has from `offset` on."""

    start: int
    end: int
    offset: int
    path: str


@dataclass(frozen=True)
class Place:
    """Where the bytes of a storage are."""

    file: int
    """Number of the file."""
    offset: int
    nbytes: int


@dataclass
class Packed:
    """An object whose storages are elsewhere."""

    pickled: bytes
    files: list[tuple[str, tuple[int, ...]]]
    """(path, identity) of what is mapped from the disk; the memory file is number 0 and has none."""
    regions: list[tuple[int, int]]
    """(offset, length) of the parts of the memory file that are mapped as one."""
    memory: int
    """Descriptor of the memory file."""
    in_memory_bytes: int = 0
    in_files_bytes: int = 0


def can_share() -> bool:
    """Whether this system has files that are in memory alone, and tells what a process has mapped: Linux does."""
    return hasattr(os, "memfd_create") and Path("/proc/self/smaps").exists()


def pack(value: Any, given: Mapping[str, Any] | None = None) -> Packed:
    """Pickles `value` so that `unpack` in another process of this machine shares the memory of its tensors. These are
    moved on the way, one by one, so that at no time all are there twice; objects stay the same ones. Local.

    `given`: what the other process has itself, by name; it is not looked into. Raises CannotShareError where something
    cannot be pickled, or is on a device."""
    memory = _MemoryFile()
    try:
        text = io.BytesIO()
        pickler = _Pickler(text, memory, {id(one): name for name, one in (given or {}).items() if _is_object(one)})
        pickler.dump(value)
    except CannotShareError:
        os.close(memory.descriptor)
        raise
    except Exception as error:  # objects of any library are pickled here: each fails in its own way
        os.close(memory.descriptor)
        raise CannotShareError(f"{type(error).__name__}: {error}") from error
    give_back_freed()
    files = [("", ()), *((path, _identity(path)) for path in pickler.files)]
    return Packed(
        text.getvalue(), files, memory.regions, memory.descriptor, pickler.in_memory_bytes, pickler.in_files_bytes
    )


def give_back_freed() -> None:
    """Returns to the system what the C library keeps of freed memory: of many tensors that were moved, all of it."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def unpack(packed: Packed, given: Mapping[str, Any] | None = None) -> Any:
    """The object, over the same memory. Local. Raises CannotShareError where it cannot be made here."""
    try:
        return _Unpickler(packed, given or {}).load()
    except Exception as error:  # whatever a library's objects raise when they are made anew
        raise CannotShareError(f"{type(error).__name__}: {error}") from error


def _is_object(value: Any) -> bool:
    return not (value is None or isinstance(value, (str, int, float, bool, torch.dtype, torch.device)))


def _identity(path: str) -> tuple[int, ...]:
    found = Path(path).stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class _MemoryFile:
    """A file in memory that grows by regions; what was written is mapped, privately."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("parafuse-weights", os.MFD_CLOEXEC)
        self.regions: list[tuple[int, int]] = []
        self._map: mmap.mmap | None = None
        self._used = 0

    def put(self, storage: torch.UntypedStorage) -> tuple[Place, Tensor]:
        """Its place, and the same bytes there."""
        nbytes = storage.nbytes()
        if not nbytes:
            return Place(0, 0, 0), torch.empty(0, dtype=torch.uint8)
        first = -(-self._used // ALIGNED) * ALIGNED
        begin, length = self.regions[-1] if self.regions else (0, 0)
        if self._map is None or first + nbytes > begin + length:
            begin = first = -(-(begin + length) // mmap.PAGESIZE) * mmap.PAGESIZE
            length = -(-max(nbytes, REGION) // mmap.PAGESIZE) * mmap.PAGESIZE
            os.ftruncate(self.descriptor, begin + length)  # without memory, until something is written
            self.regions.append((begin, length))
            self._map = _mapped(self.descriptor, begin, length)
        self._used = first + nbytes
        values: Any = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        source = memoryview(values)
        done = 0
        while done < nbytes:
            done += os.pwrite(self.descriptor, source[done : done + (1 << 30)], first + done)
        there = torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=first - begin)
        return Place(0, first, nbytes), there


def _mapped(descriptor: int, offset: int, length: int) -> mmap.mmap:
    return mmap.mmap(descriptor, length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)


class _Pickler(pickle.Pickler):
    def __init__(self, text: io.BytesIO, memory: _MemoryFile, given: dict[int, str]):
        super().__init__(text, protocol=pickle.HIGHEST_PROTOCOL)
        self.files: list[str] = []
        self.in_memory_bytes = self.in_files_bytes = 0
        self._memory, self._given = memory, given
        self._parts = clean_mappings()
        self._starts = [part.start for part in self._parts]
        self._places: dict[int, tuple[Place, Tensor | None]] = {}
        """Address of a storage -> its place, and the bytes there where it was moved. Moved ones are known by both."""
        self._alive: list[Any] = []
        """An address means something while what is there lives."""

    def persistent_id(self, obj: Any) -> Any:
        """What stands in the pickle for an object; None: the object is pickled."""
        if id(obj) in self._given:
            return (_GIVEN, self._given[id(obj)])
        if isinstance(obj, Tensor):
            self._move(obj)
        elif type(obj) is torch.UntypedStorage:
            return self._stands_for(obj, torch.uint8)  # of newer dtypes; torch rebuilds them from a typed one of bytes
        elif type(obj) is torch.storage.TypedStorage and obj._untyped_storage.nbytes() >= SMALLEST:
            return self._stands_for(obj._untyped_storage, obj.dtype)
        return None

    def _stands_for(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> Any:
        if storage.device.type == "meta":
            return None
        if storage.device.type != "cpu":
            raise CannotShareError(f"a tensor is on {storage.device}")
        return (_MAPPED, self._place(storage)[0], dtype)

    def reducer_override(self, obj: Any) -> Any:
        """Methods that are not their class's, as torchao puts on layers; Python's own way finds these by their name."""
        if isinstance(obj, MethodType) and not hasattr(obj.__func__, "__name__"):
            return (_method, (obj.__func__, obj.__self__))
        return NotImplemented

    def _move(self, x: Tensor) -> None:
        """To shared memory. Of a tensor that is made of others, these are moved when they are met."""
        with torch._C.DisableTorchFunctionSubclass():
            if is_traceable_wrapper_subclass(x) or x.device.type != "cpu" or x.layout != torch.strided:
                return
            storage = x.untyped_storage()
            if storage.nbytes() < SMALLEST:
                return
            _, there = self._place(storage)
            if there is not None and there.data_ptr() != storage.data_ptr():
                moved = torch.empty(0, dtype=x.dtype).set_(
                    there.untyped_storage(), x.storage_offset(), x.shape, x.stride()
                )
                x.data = moved

    def _place(self, storage: torch.UntypedStorage) -> tuple[Place, Tensor | None]:
        address, nbytes = storage.data_ptr(), storage.nbytes()
        known = self._places.get(address)
        if known is not None and known[0].nbytes == nbytes:
            return known
        part = self._part(address, nbytes)
        if part is not None:
            if part.path not in self.files:
                self.files.append(part.path)
            place = Place(1 + self.files.index(part.path), part.offset + address - part.start, nbytes)
            found = self._places[address] = (place, None)
            self.in_files_bytes += nbytes
        else:
            place, there = self._memory.put(storage)
            found = self._places[address] = self._places[there.data_ptr()] = (place, there)
            self.in_memory_bytes += nbytes
        self._alive.append(storage if part is not None else found[1])
        return found

    def _part(self, address: int, nbytes: int) -> FilePart | None:
        index = bisect.bisect_right(self._starts, address) - 1
        part = self._parts[index] if index >= 0 else None
        return part if part is not None and address + nbytes <= part.end else None


def _method(function: Any, owner: Any) -> MethodType:
    return MethodType(function, owner)


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: Packed, given: Mapping[str, Any]):
        super().__init__(io.BytesIO(packed.pickled))
        self._packed, self._given = packed, given
        self._maps: dict[tuple[int, int], mmap.mmap] = {}
        self._storages: dict[Place, torch.UntypedStorage] = {}

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == _GIVEN:
            return self._given[pid[1]]
        _, place, dtype = pid
        if place not in self._storages:
            self._storages[place] = self._bytes(place).untyped_storage()
        storage = self._storages[place]
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    def _bytes(self, place: Place) -> Tensor:
        if not place.nbytes:
            return torch.empty(0, dtype=torch.uint8)
        if place.file:
            mapped, begin = self._file(place.file), 0
        else:
            begin, length = next(r for r in reversed(self._packed.regions) if r[0] <= place.offset)
            if (0, begin) not in self._maps:
                self._maps[0, begin] = _mapped(self._packed.memory, begin, length)
            mapped = self._maps[0, begin]
        return torch.frombuffer(mapped, dtype=torch.uint8, count=place.nbytes, offset=place.offset - begin)

    def _file(self, number: int) -> mmap.mmap:
        if (number, 0) not in self._maps:
            path, identity = self._packed.files[number]
            with Path(path).open("rb") as file:
                if _identity(path) != tuple(identity):
                    raise CannotShareError(f"{path} is another file here, or was changed")
                self._maps[number, 0] = _mapped(file.fileno(), 0, 0)
        return self._maps[number, 0]


def clean_mappings() -> list[FilePart]:
    """What of this process's memory is, byte for byte, part of a file on the disk, by address: mapped privately, and
    not a page of it written."""
    found: list[FilePart] = []
    head: FilePart | None = None
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        fields = line.split(None, 5)
        if "-" in fields[0] and not fields[0].endswith(":"):
            head = None
            path = fields[5] if len(fields) > 5 else ""
            if path.startswith("/") and not path.startswith(("/memfd:", "/dev/")) and not path.endswith(" (deleted)"):
                start, _, end = fields[0].partition("-")
                head = FilePart(int(start, 16), int(end, 16), int(fields[2], 16), path) if fields[1][3] == "p" else None
        elif head is not None and fields[0] == "Anonymous:":
            if fields[1] == "0" and Path(head.path).is_file():
                found.append(head)
            head = None
    return found
