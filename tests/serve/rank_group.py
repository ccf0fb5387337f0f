"""Ranks of a server with a supervisor that is a test: real processes, real sockets, real messages."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parafuse.launch.serve.messages import Beat, Failed, FromRank, Hello, Message, Painted, encode, receive

START_S = 240.0
"""For all ranks to have loaded, on a busy machine."""
CALL_S = 120.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Group:
    """The ranks, and what they have said. `feeder`: the rank that is given calls (as if its machine had the head)."""

    def __init__(self, folder: Path, size: int, job: dict[str, Any], feeder: int = 0):
        self.size, self.folder, self.feeder = size, folder, feeder
        self.results, self.inputs = folder / "results", folder / "inputs"
        for one in (self.results, self.inputs):
            one.mkdir(exist_ok=True)
        self.messages: queue.Queue[tuple[int, Message]] = queue.Queue()
        self.beats: dict[int, list[Beat]] = {rank: [] for rank in range(size)}
        self.hellos: dict[int, Hello] = {}
        self.connections: dict[int, socket.socket] = {}
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(folder / "s"))
        self._listening.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        job_file = folder / "job.json"
        job_file.write_text(json.dumps({"inputs": str(self.inputs), "results": str(self.results), **job}))
        env = os.environ | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size), "PARAFUSE_SERVE_SOCKET": str(folder / "s"),
            "PARAFUSE_SERVE_JOB": str(job_file), "PARAFUSE_SERVE_GENERATION": "g1", "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo", "PARAFUSE_PARENT_PID": str(os.getpid()),
        }  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(self.error_file(rank))}
            if rank == feeder:  # a machine of its own, as far as it knows
                own |= {"PARAFUSE_SERVE_FEEDS": "1", "LOCAL_RANK": "0"}
            with (folder / f"rank{rank}.log").open("wb") as log:
                command = [sys.executable, "-m", "parafuse.launch.serve.rank"]
                self.processes.append(subprocess.Popen(command, env=env | own, stdout=log, stderr=log))

    def error_file(self, rank: int) -> Path:
        return self.folder / f"error{rank}.json"

    def logs(self) -> str:
        return "\n".join((self.folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(self.size))

    def send(self, message: Message) -> None:
        self.connections[self.feeder].sendall(encode(message))

    def until(self, kinds: type[Any] | tuple[type[Any], ...], timeout_s: float = CALL_S) -> Any:
        """The next message of a kind; others before it are left out."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                _, message = self.messages.get(timeout=min(0.5, max(0.01, deadline - time.monotonic())))
            except queue.Empty:
                dead = [rank for rank, one in enumerate(self.processes) if one.poll() is not None]
                if dead or time.monotonic() > deadline:
                    raise AssertionError(f"no {kinds}; ended: {dead}\n{self.logs()}") from None
                continue
            if isinstance(message, kinds):
                return message

    def answer(self, message: FromRank | Any) -> Painted | Failed:
        """What a call comes to."""
        self.send(message)
        return self.until((Painted, Failed))

    def await_idle(self) -> None:
        """Until every rank has loaded."""
        deadline = time.monotonic() + START_S
        while not all(beats and beats[-1].phase == "idle" for beats in self.beats.values()):
            assert time.monotonic() < deadline, self.logs()
            assert all(one.poll() is None for one in self.processes), self.logs()
            time.sleep(0.1)

    def ended(self, timeout_s: float) -> list[int | None]:
        """Exit codes of all that have ended by then."""
        deadline = time.monotonic() + timeout_s
        while any(one.poll() is None for one in self.processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [one.poll() for one in self.processes]

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        self._listening.close()
        for connection in self.connections.values():
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        hello = receive(connection)
        assert isinstance(hello, Hello)
        self.hellos[hello.rank], self.connections[hello.rank] = hello, connection
        while True:
            try:
                message = receive(connection)
            except OSError:
                return
            if message is None:
                return
            if isinstance(message, Beat):
                self.beats[message.rank].append(message)
            else:
                self.messages.put((hello.rank, message))


@contextmanager
def group(folder: Path, size: int, feeder: int = 0, **job: Any) -> Iterator[Group]:
    """Started, and idle."""
    made = Group(folder, size, {"model": "emoji", **job}, feeder)
    try:
        made.await_idle()
        yield made
    finally:
        made.close()
