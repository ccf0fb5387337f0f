"""Starts the rank processes of one machine, and ends all of them when one fails or the parent is told to stop.

Imports no torch: the parent of the ranks needs none, and starts a second sooner for it. The elastic launcher's
`start_processes` is not used because a failing rank makes it wait up to 30 s for the others, it keeps the signal
handlers it installs, and its ranks outlive a killed parent. Its error file is kept as the format in which a rank
tells why it failed, so that `torchrun` shows the same traceback.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from parafuse.hardware import cores
from parafuse.parallel.rank_entry import ERROR_FILE_ENV, PARENT_ENV

POLL_S = 0.05
SETTLE_S = 1.0
"""How long the death that a lost connection tells of may take to show (a crashing process closes its sockets first)."""
TAIL_LINES = 40
PORTS = range(20_000, 32_000)
LOOPBACK = Path("/sys/class/net/lo")


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """The rank that failed first, and why."""

    rank: int
    """Global rank."""
    exit_code: int
    """Its exit code; negative: the signal that killed it."""
    summary: str
    """One line that names the rank."""
    details: str
    """Its traceback, else the last lines it wrote; empty where the summary says everything."""

    @property
    def parent_code(self) -> int:
        """Exit code for the parent, never 0: as a shell gives it, 128 + signal for a killed rank."""
        return self.exit_code if self.exit_code > 0 else 128 - self.exit_code if self.exit_code else 1

    def render(self) -> str:
        """Details, each line led by the rank, then the summary."""
        lines = [f"[rank {self.rank}] {line}" for line in self.details.rstrip().splitlines()]
        return "\n".join([*lines, f"parafuse: error: {self.summary}"])


def free_port() -> int:
    """A TCP port that nothing listens on now.

    It lies below the range from which the kernel serves outgoing connections (32768 on Linux), so that only another
    server can take it before rank 0 listens on it."""
    draw = random.SystemRandom()  # not the shared generator, which belongs to the user
    for _ in range(200):
        port = draw.choice(PORTS)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free TCP port between {PORTS.start} and {PORTS.stop}")


class _Signals:
    """Collects SIGINT, SIGTERM and SIGHUP from construction until `restore`. An ignored SIGHUP stays so (nohup)."""

    def __init__(self, *, collect: bool = True) -> None:
        self.received: list[int] = []
        self._old: dict[int, Any] = {}
        if not collect:
            return
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._collect)
        except ValueError:  # not the main thread: its owner handles signals
            pass

    def _collect(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)

    def restore(self) -> None:
        while self._old:
            number, handler = self._old.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@dataclass
class _Rank:
    rank: int
    process: subprocess.Popen[bytes]
    error_file: Path
    log: Path | None

    def tail(self) -> str:
        """The last lines it wrote, if they did not go to the terminal."""
        if self.log is None:
            return ""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])

    def error(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.error_file.read_text())["message"]
        except (OSError, ValueError, KeyError):
            return None


class RankProcesses:
    """Running ranks, made by `start`. Use as a context manager, or call `wait` or `stop`: each leaves no process."""

    def __init__(self, ranks: list[_Rank], folder: Path, signals: _Signals) -> None:
        self.failure: RankFailure | None = None
        """What made `wait` return non-zero; None after success or a signal."""
        self._ranks = ranks
        self._folder = folder
        self._signals = signals
        self._stopped = False
        self._all_well_at = time.time()
        """Time of the last look that found no failure."""

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks]

    @property
    def running(self) -> bool:
        return any(rank.process.poll() is None for rank in self._ranks)

    def poll(self) -> RankFailure | None:
        """The rank that failed first, None while none has. Does not wait.

        A rank that has recorded an error counts as failed, even if it hangs on its way out."""
        now = time.time()
        if self.failure is None:
            failed = [rank for rank in self._ranks if rank.process.poll() or rank.error_file.exists()]
            if failed:
                self.failure = self._first(failed, settled=now > self._all_well_at + SETTLE_S)
            else:
                self._all_well_at = now
        return self.failure

    def wait(self) -> int:
        """Waits for all ranks, and returns the exit code for the parent: 0 when all of them ended well.

        A rank that fails ends the others within `stop`'s grace; so does a signal to the parent (128 + its number)."""
        try:
            while True:
                if not self.running and self.poll() is None:
                    return 0  # even if a signal came meanwhile: all is done
                if self._signals.received:
                    return 128 + self._signals.received[0]
                failure = self.poll()
                if failure is not None:
                    return failure.parent_code
                time.sleep(POLL_S)
        finally:
            self.stop()

    def stop(self, *, grace_s: float = 3.0) -> None:
        """Ends all ranks and what they started: SIGTERM, after `grace_s` (or a second signal) SIGKILL. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        try:
            self._signal_all(signal.SIGTERM)
            asked = len(self._signals.received)
            deadline = time.monotonic() + grace_s
            while self.running and time.monotonic() < deadline and len(self._signals.received) == asked:
                time.sleep(POLL_S / 2)
            self._signal_all(signal.SIGKILL)
            for rank in self._ranks:
                try:
                    rank.process.wait(timeout=5)  # a process stuck in a driver cannot be reaped; do not hang with it
                except subprocess.TimeoutExpired:
                    continue
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._signals.restore()

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def _signal_all(self, number: int) -> None:
        for rank in self._ranks:
            try:
                os.killpg(rank.process.pid, number)  # each rank leads its own group, with its own helpers
            except (ProcessLookupError, PermissionError):
                continue

    def _first(self, failed: list[_Rank], *, settled: bool) -> RankFailure | None:
        """The cause among ranks that fail together, None while there are only errors that tell of another rank's end.

        Earliest first; a death without a record happened some time after the last look that found all well."""
        errors = {rank.rank: rank.error() for rank in failed}

        def order(rank: _Rank) -> tuple[bool, float]:
            error = errors[rank.rank]
            if error is None:
                return False, self._all_well_at
            return bool(error.get("secondary")), float(error.get("time", 0.0))

        rank = min(failed, key=order)
        error, code = errors[rank.rank], rank.process.returncode
        if error is None:
            code = code or 1
            return RankFailure(
                rank=rank.rank, exit_code=code, summary=f"rank {rank.rank} {_silent(code)}", details=rank.tail()
            )
        if error.get("secondary") and not settled and self.running:
            return None
        details = "" if error.get("one_line") else str(error["extraInfo"]["py_callstack"])
        code = code or int(error.get("errorCode", 1))
        summary = str(error["message"])
        if details:  # which holds the whole message
            summary = summary.split("\n", 1)[0]
        if not error.get("secondary"):  # such a message names the ranks it is about
            summary = f"rank {rank.rank}: {summary}"
        return RankFailure(rank=rank.rank, exit_code=code, summary=summary, details=details)


def _silent(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}."
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why = " (often: the machine ran out of memory)" if name == "SIGKILL" else ""
    return f"was killed by {name}{why}."


def start(
    argv: Sequence[str],
    *,
    ranks: Sequence[int],
    world_size: int,
    master_port: int,
    env: dict[str, str] | None = None,
    show: Sequence[int] = (0,),
    handle_signals: bool = True,
) -> RankProcesses:
    """Starts `argv` once for every global rank in `ranks`, with torchrun's environment, on 127.0.0.1:`master_port`.

    `env` is added to this process's environment. The output of the ranks in `show` reaches the terminal; that of the
    others is kept only for the report of a failure. OMP_NUM_THREADS is the cores divided among the ranks, unless set.
    `handle_signals=False` leaves this process's signal handlers alone (an engine in somebody's program).
    Call it from the main thread: the kernel ends the ranks when the thread that started them ends."""
    signals = _Signals(collect=handle_signals)
    folder = Path(tempfile.mkdtemp(prefix="parafuse-ranks-"))
    started: list[_Rank] = []
    processes = RankProcesses(started, folder, signals)
    base = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": str(max(1, cores() // len(ranks)))}
    base |= {key: value for key, value in os.environ.items() if key != "MASTER_ADDR"} | (env or {})
    base |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(len(ranks)), "MASTER_PORT": str(master_port)}
    base |= {PARENT_ENV: str(os.getpid())}
    if LOOPBACK.exists():  # one machine: independent of what its host name resolves to
        base.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        for local_rank, rank in enumerate(ranks):
            error_file = folder / f"rank{rank}.json"
            own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), ERROR_FILE_ENV: str(error_file)}
            log = None if rank in show else folder / f"rank{rank}.log"
            process = _spawn(argv, base | own, log)
            started.append(_Rank(rank, process, error_file, log))
    except BaseException:
        processes.stop(grace_s=0.0)
        raise
    return processes


def _spawn(argv: Sequence[str], env: dict[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    """One process in a session of its own: Ctrl-C in the terminal reaches only the parent, which ends it in order."""
    if log is None:
        return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    with log.open("wb") as file:
        return subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
