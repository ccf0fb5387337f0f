"""The process that `parafuse serve` is: keeps an HTTP process and a supervisor of the ranks running.

It imports no model code and does next to nothing, so that little can go wrong with it. Both children end with it, and
the ranks with their supervisor. The listening socket is its own: while an HTTP process starts again, connections wait.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import structlog

from parafuse.launch.serve.systemd import Systemd
from parafuse.parallel.rank_entry import PARENT_ENV

POLL_S = 0.1
WAITS_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Before the n-th start of a child within `WINDOW_S`: a rate, so that years of single faults never add up."""
WINDOW_S = 120.0
END_S = 25.0
"""How long a child may take to end once it has been told to, beyond what it drains: a supervisor waits for the end of a
step, gives its job back, and ends its ranks."""


@dataclass
class Child:
    """One kept process. It writes a byte into `beat_fd` about every second, and is replaced when it does not."""

    name: str
    argv: Callable[[int], Sequence[str]]
    """From the number of its beat's file descriptor."""
    patience_s: float
    """Without a beat."""
    start_s: float
    """Without the first beat: it imports a great deal."""
    keeps: tuple[int, ...] = ()
    """File descriptors that it is given."""
    process: subprocess.Popen[bytes] | None = None
    starts: list[float] = field(default_factory=list)
    _beats: int = -1
    _beaten_s: float = 0.0
    has_beaten: bool = False

    def start(self) -> None:
        self.forget()
        self._beats, theirs = os.pipe()
        os.set_blocking(self._beats, False)
        env = os.environ | {PARENT_ENV: str(os.getpid())}
        try:
            self.process = subprocess.Popen(
                self.argv(theirs),
                env=env,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs, *self.keeps),
                start_new_session=True,  # Ctrl-C in a terminal reaches the keeper alone
            )
        finally:
            os.close(theirs)
        self.starts.append(time.monotonic())
        self._beaten_s, self.has_beaten = time.monotonic(), False

    def fault(self) -> str:
        """Why it has to be replaced; '' if it need not."""
        if self.process is None:
            return "never started"
        code = self.process.poll()
        if code is not None:
            return f"ended with {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        with contextlib.suppress(BlockingIOError):
            while os.read(self._beats, 4096):
                self._beaten_s, self.has_beaten = time.monotonic(), True
        silent_s = time.monotonic() - self._beaten_s
        if silent_s > (self.patience_s if self.has_beaten else self.start_s):
            return f"said nothing for {silent_s:.0f} s"
        return ""

    def wait_s(self) -> float:
        """Before the next start."""
        now = time.monotonic()
        self.starts = [one for one in self.starts if now - one < WINDOW_S]
        return WAITS_S[min(len(self.starts), len(WAITS_S) - 1)] if self.starts else 0.0

    def tell(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """Now, also where it is stopped."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()

    def forget(self) -> None:
        if self._beats >= 0:
            os.close(self._beats)
            self._beats = -1


class Keeper:
    """Runs until it is told to end by SIGTERM or SIGINT; a second one ends everything at once."""

    def __init__(self, children: Sequence[Child], *, drain_s: float):
        """`children`: in the order in which they are started; ended in the opposite one but for the last, which goes on
        until the others have drained."""
        self._children, self._drain_s = list(children), drain_s
        self._asked: list[int] = []
        self._due: dict[str, float] = {}
        self._systemd = Systemd()
        self._log = structlog.get_logger("parafuse.keeper")

    def run(self) -> int:
        """The exit code."""
        before: dict[int, Any] = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            for child in self._children:
                child.start()
            while not self._asked:
                self._look()
                if all(child.has_beaten for child in self._children):
                    self._systemd.tell("READY=1")
                self._systemd.alive()
                time.sleep(POLL_S)
            self._systemd.tell("STOPPING=1")
            self._drain()
            return 0 if self._asked[0] == signal.SIGTERM else 130
        finally:
            for child in self._children:
                child.kill()
                child.forget()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self._asked.append(number)

    def _look(self) -> None:
        for child in self._children:
            if child.name in self._due:
                if time.monotonic() >= self._due[child.name]:
                    del self._due[child.name]
                    child.start()
                continue
            fault = child.fault()
            if fault:
                child.kill()
                wait_s = child.wait_s()
                self._log.error("replaced", process=child.name, why=fault, wait_s=wait_s)
                self._due[child.name] = time.monotonic() + wait_s

    def _drain(self) -> None:
        """The last child answers while the others drain, and is told last."""
        *first, last = self._children
        for children, patience_s in ((first, self._drain_s), ([last], 0.0)):
            for child in children:
                child.tell(signal.SIGTERM)
            deadline, asked = time.monotonic() + patience_s + END_S, len(self._asked)
            while any(child.process and child.process.poll() is None for child in children):
                if time.monotonic() > deadline or len(self._asked) > asked:
                    break
                self._systemd.alive()
                time.sleep(POLL_S)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket of this process. Raises OSError where the address is taken or is none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError:
        listening.close()
        raise
    return listening


def python(module: str, *args: str) -> list[str]:
    return [sys.executable, "-m", module, *args]
