"""How images come to the device: read by one thread beside the one that computes, on a GPU by a stream of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parafuse.parallel.homes import Home
from parafuse.parallel.ranks_home import RanksHome


@dataclass
class Ledger:
    """What was moved, of all components of a pipeline. A request counts anew."""

    moved_bytes: int = 0
    fetches: int = 0
    waits: int = 0
    """Times that something had to be waited for, since it had not been fetched ahead or was on its way still."""
    waited_s: float = 0.0
    resident_bytes: int = 0
    """Of weights that come and go: there now, or on their way."""
    most_bytes: int = 0
    """The most of that at any time."""
    wasted: int = 0
    """Images that were fetched ahead and not used."""
    watch: Callable[[int], None] = lambda nbytes: None
    """Told of bytes that come, and of those that go as less than nothing."""

    def begin(self) -> None:
        """Counts anew; what is there is there."""
        self.moved_bytes = self.fetches = self.waits = self.wasted = 0
        self.waited_s, self.most_bytes = 0.0, self.resident_bytes

    def came(self, nbytes: int) -> None:
        self.fetches += 1
        self.moved_bytes += nbytes
        self.resident_bytes += nbytes
        self.most_bytes = max(self.most_bytes, self.resident_bytes)
        self.watch(nbytes)

    def went(self, nbytes: int) -> None:
        self.resident_bytes -= nbytes
        self.watch(-nbytes)

    def report(self) -> dict[str, Any]:
        """For receipts."""
        return {
            "moved_bytes": self.moved_bytes,
            "fetches": self.fetches,
            "waits": self.waits,
            "waited_s": round(self.waited_s, 4),
            "most_resident_bytes": self.most_bytes,
            "wasted_fetches": self.wasted,
        }


class Flight(ABC):
    """An image on its way."""

    @abstractmethod
    def land(self) -> Tensor:
        """The image (nbytes,) of bytes, ready for what is computed next. Raises what reading it has raised."""

    @abstractmethod
    def is_late(self) -> bool:
        """Whether landing would hold the host up."""


class Carrier(ABC):
    """Brings images of one device."""

    @abstractmethod
    def start(self, home: Home, number: int, nbytes: int, *, ahead: bool) -> Flight:
        """`ahead`: something else is computed meanwhile."""

    @abstractmethod
    def give_back(self, image: Tensor) -> None:
        """What has landed is not used by anything that is computed later."""

    def settle(self) -> None:  # noqa: B027 - a CPU's copies are done when they have landed
        """Waits until no copy reads a home any more, so that it can be written to."""

    def clear(self) -> None:  # noqa: B027 - a CPU keeps no memory
        """Lets memory go that is kept to be used again."""

    def close(self) -> None:
        self.clear()


class _Read(Flight):
    """By a thread, or at once."""

    def __init__(self, future: Future[Tensor]):
        self._future = future

    def land(self) -> Tensor:
        return self._future.result()

    def is_late(self) -> bool:
        return not self._future.done()


class _Gathered(Flight):
    """From all ranks, by threads of the process group."""

    def __init__(self, work: Any, out: Tensor):
        self._work, self._out = work, out

    def land(self) -> Tensor:
        self._work.wait()
        return self._out

    def is_late(self) -> bool:
        return not self._work.is_completed()


class HostCarrier(Carrier):
    """To memory of the host, which is new each time and let go."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def start(self, home: Home, number: int, nbytes: int, *, ahead: bool) -> Flight:
        if isinstance(home, RanksHome):  # in this thread, so that all ranks have the same order
            gathered = self._memory(nbytes)
            return _Gathered(home.begin(number, gathered), gathered)

        def read() -> Tensor:
            out = self._memory(nbytes)
            home.read(number, out)
            return out

        if ahead:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="parafuse-offload")
            return _Read(self._thread.submit(read))
        future: Future[Tensor] = Future()
        future.set_result(read())
        return _Read(future)

    def _memory(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8)

    def give_back(self, image: Tensor) -> None: ...

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None


class _Copied(Flight):
    """By a stream: the stream that computes waits for it, the host does not, unless a file is read still."""

    def __init__(self, future: Future[tuple[Tensor, Any]]):
        self._future = future

    def land(self) -> Tensor:
        image, done = self._future.result()
        torch.cuda.current_stream(image.device).wait_event(done)
        return image

    def is_late(self) -> bool:
        return not self._future.done() or not self._future.result()[1].query()


class StreamCarrier(Carrier):
    """To a GPU, by a stream of its own. Memory is used again, since the host is far ahead of the device: what it let go
    would not be free yet, and every unit would take memory of its own. A copy waits for what was computed with the
    memory before."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)
        self._free: list[tuple[Tensor, Any]] = []
        self._staged: list[tuple[Tensor, Any]] = []
        """Pinned memory for what is read from a disk, and the end of its last copy."""
        self._thread: ThreadPoolExecutor | None = None

    def start(self, home: Home, number: int, nbytes: int, *, ahead: bool) -> Flight:
        whole, free = self._memory(nbytes)
        image = whole[:nbytes]

        def copy() -> tuple[Tensor, Any]:
            staged = None if home.is_direct else self._staging(nbytes)
            if staged is not None:
                home.read(number, staged[:nbytes])
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                self._stream.wait_event(free)
                if staged is None:
                    home.read(number, image)
                else:
                    image.copy_(staged[:nbytes], non_blocking=True)
                done = torch.cuda.Event()
                done.record(self._stream)
            if staged is not None:
                self._staged.append((staged, done))
            return image, done

        if ahead and not home.is_direct:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="parafuse-offload")
            return _Copied(self._thread.submit(copy))
        future: Future[tuple[Tensor, Any]] = Future()
        future.set_result(copy())
        return _Copied(future)

    def _memory(self, nbytes: int) -> tuple[Tensor, Any]:
        """The smallest that is large enough, of what is kept, or new; and since when it is free."""
        fit = [one for one in self._free if len(one[0]) >= nbytes]
        if fit:
            best = min(fit, key=lambda one: len(one[0]))
            self._free = [one for one in self._free if one is not best]
            return best
        self._free.clear()  # too small for what comes now: not kept beside it
        with torch.inference_mode(False):
            new = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return new, torch.cuda.current_stream(self._device).record_event()

    def _staging(self, nbytes: int) -> Tensor:
        while self._staged:
            staged, done = self._staged.pop(0)
            done.synchronize()
            if len(staged) >= nbytes:
                return staged
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def give_back(self, image: Tensor) -> None:
        whole = torch.empty(0, dtype=torch.uint8, device=image.device)
        whole.set_(image.untyped_storage(), 0, (image.untyped_storage().nbytes(),), (1,))
        self._free.append((whole, torch.cuda.current_stream(self._device).record_event()))

    def settle(self) -> None:
        self._stream.synchronize()

    def clear(self) -> None:
        self._free.clear()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self._staged.clear()
        self.clear()


def carrier_for(device: torch.device) -> Carrier:
    """What brings images to a device."""
    return StreamCarrier(device) if device.type == "cuda" else HostCarrier()
