"""What a rank says of itself: where its main thread is, twice a second, from a thread beside it."""

from __future__ import annotations

import os
import queue
import resource
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parafuse.launch.serve.messages import Beat, End, FrameError, FromRank, Message, Paint, Stop, encode, receive

EVERY_S = 0.5
IDLE, LOADING, COMPILING = "idle", "loading", "compiling"
ENCODING, DENOISING, DECODING, WRITING = "encoding", "denoising", "decoding", "writing"
KEPT_STOPS = 64


class Progress:
    """Of the main thread, which alone writes it; the thread that beats reads it."""

    def __init__(self, rank: int):
        self.rank, self.phase, self.call, self.step, self.moves = rank, LOADING, "", 0, 0
        self.last_step_s: float | None = None
        """On the monotonic clock."""
        self.device: Any = None
        """Of this rank, once it has one: the beats' thread would take the first."""
        self.seconds: dict[str, float] = {}
        """Of the phases of the call at hand."""
        self.renewed = 0
        """How often weights have come in since the model was loaded: what was compiled for the old may be so again."""
        self._since = time.monotonic()

    def move(self) -> None:
        """The main thread gets on, or waits for another rank, which then is the one that does not."""
        self.moves += 1

    def enter(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._since
        self.phase, self._since = phase, now
        self.moves += 1

    def begin(self, call: str) -> None:
        self.enter(ENCODING)
        self.call, self.step, self.seconds = call, 0, {}

    def stepped(self, step: int) -> None:
        self.step, self.last_step_s = step, time.monotonic()
        self.moves += 1

    def end(self) -> None:
        self.enter(IDLE)
        self.call, self.step = "", 0

    def beat(self) -> Beat:
        now, bytes_now, peak = self.last_step_s, *_memory(self.device)
        return Beat(
            rank=self.rank,
            phase=self.phase,
            call=self.call,
            step=self.step,
            moves=self.moves,
            last_step_age_s=None if now is None else time.monotonic() - now,
            memory_bytes=bytes_now,
            peak_bytes=peak,
        )


def _memory(device: Any) -> tuple[int, int]:
    """(now, most): of a GPU in this call so far, or of the host since the process began."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Line:
    """The socket to this machine's supervisor. What comes is taken in a thread; when it closes, `gone` is called."""

    def __init__(self, path: str, gone: Callable[[str], None]):
        """Raises OSError where nobody listens."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._sending, self._gone = threading.Lock(), gone
        self.calls: queue.Queue[Paint | End] = queue.Queue()
        self._stops: dict[str, str] = {}

    def listen(self) -> None:
        """From now on messages are taken."""
        threading.Thread(target=self._listen, name="from the supervisor", daemon=True).start()

    def beat(self, progress: Progress) -> None:
        """From now on this rank beats."""
        threading.Thread(target=self._beat, args=(progress,), name="beats", daemon=True).start()

    def send(self, message: FromRank) -> None:
        """Any thread may. Raises FrameError for what is too long; a supervisor that has gone ends this process."""
        data = encode(message)
        try:
            with self._sending:
                self._socket.sendall(data)
        except OSError as error:
            self._gone(f"the supervisor does not listen any more ({error.strerror}).")

    def stop_of(self, call: str) -> str:
        """Why a call is to stop; '' while it is not."""
        return self._stops.get(call, "")

    def _listen(self) -> None:
        while True:
            try:
                message: Message | None = receive(self._socket)
            except (FrameError, OSError) as error:
                self._gone(f"what the supervisor says cannot be read ({error}).")
                return
            if message is None:
                self._gone("the supervisor has gone.")
                return
            if isinstance(message, Stop):
                self._stops[message.call] = message.reason or "it was asked to stop"
                for old in list(self._stops)[:-KEPT_STOPS]:
                    del self._stops[old]
            elif isinstance(message, (Paint, End)):
                self.calls.put(message)
            else:
                self._gone(f"the supervisor has said {type(message).__name__}, which is for no rank.")

    def _beat(self, progress: Progress) -> None:
        while True:
            self.send(progress.beat())
            time.sleep(EVERY_S)
