"""Runs a function on several ranks: gloo processes on the CPU, started once per world size and used again.

They are forked from one process that has imported torch and diffusers and does nothing else: so starts are quick, and
what was imported is in memory once. After any failure the processes are killed and the next call starts new ones: the
ranks that did not fail may wait in a collective for ever.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_S = 180.0  # to spawn, import torch and meet, on a busy machine
GRACE_S = 2.0  # for the other ranks to report, once one has failed
COLLECTIVE_S = 3600.0  # gloo's own limit: above any test's, so that the deadline here decides


class RankFailure(Exception):
    """A rank raised, died or missed the deadline. The text shows every rank's traceback or stack."""

    def __init__(self, headline: str, reports: dict[int, str]):
        self.reports = reports
        parts = [f"---- rank {rank}: {report.rstrip()}" for rank, report in sorted(reports.items())]
        super().__init__("\n".join([headline, *parts]))


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What one rank made of one call: a value, or the traceback that ended it."""

    ok: bool
    value: Any = None
    trace: str = ""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 180.0, fresh: bool = False
) -> list[Any]:
    """`function(*args)` on `world_size` ranks with torch.distributed initialised; the results by rank.

    `function` is module-level; arguments and results are pickled. Random generators are seeded before every call, and
    what is kept is where this process keeps it (`PARAFUSE_CACHE`). `fresh`: in processes that have run nothing before,
    only imported, and end with the call: what a second start finds, for a tenth of what an interpreter's start takes.
    Raises RankFailure, within `timeout_s` and a few seconds, when a rank raises, dies or does not finish.
    """
    if function.__qualname__ != function.__name__:
        raise TypeError(f"run_ranks: {function.__qualname__} must be a module-level function; ranks import it by name.")
    call = pickle.dumps((function, args, os.environ.get("PARAFUSE_CACHE", "")))
    if fresh:
        pool = RankPool(world_size)
        try:
            return pool.call(call, timeout_s)
        finally:
            pool.close()
    try:
        if world_size not in _POOLS:
            _POOLS[world_size] = RankPool(world_size)
        return _POOLS[world_size].call(call, timeout_s)
    except BaseException:  # Ctrl-C too: what the ranks do then is not known
        if world_size in _POOLS:
            _POOLS.pop(world_size).kill()
        raise


def close_pools() -> None:
    """Ends the ranks of all pools."""
    while _POOLS:
        _POOLS.popitem()[1].close()


class RankPool:
    """`world_size` processes that wait for calls."""

    def __init__(self, world_size: int):
        context = get_context("forkserver")
        context.set_forkserver_preload(["tests.dist.imported"])
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, self.folder.name, theirs), name=f"rank{rank}", daemon=True
            )
            process.start()
            theirs.close()  # so that the death of the rank is the end of the pipe
            self.pipes.append(ours)
            self.processes.append(process)
        try:
            self._collect("start", START_S)
        except BaseException:
            self.kill()
            raise

    def call(self, call: bytes, timeout_s: float) -> list[Any]:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # the rank died since its last call: _collect says so
                pipe.send_bytes(call)
        return self._collect("finish", timeout_s)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()  # an idle rank reads the end of its pipe and leaves
        for process in self.processes:
            process.join(timeout=5)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            pipe.close()
        self.folder.cleanup()

    def _collect(self, what: str, timeout_s: float) -> list[Any]:
        replies: dict[int, Reply] = {}
        end = time.monotonic() + timeout_s
        while len(replies) < len(self.pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in replies}
            ready = connection.wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                replies[rank] = self._receive(rank)
            if not all(reply.ok for reply in replies.values()):
                end = min(end, time.monotonic() + GRACE_S)
        late = [rank for rank in range(len(self.pipes)) if rank not in replies]
        failed = [rank for rank, reply in sorted(replies.items()) if not reply.ok]
        if not late and not failed:
            return [replies[rank].value for rank in range(len(self.pipes))]
        if failed:
            causes = ", ".join(f"rank {rank}: {replies[rank].trace.strip().splitlines()[-1]}" for rank in failed)
            headline = f"{len(failed)} of {len(self.pipes)} ranks failed: {causes}"
        else:
            headline = f"ranks {late} did not {what} within {timeout_s:g} s"
        reports = {rank: reply.trace or "finished" for rank, reply in replies.items()}
        raise RankFailure(headline, reports | {rank: f"still running\n{self._stack(rank)}" for rank in late})

    def _receive(self, rank: int) -> Reply:
        try:
            return pickle.loads(self.pipes[rank].recv_bytes())
        except (EOFError, OSError):
            self.processes[rank].join(timeout=5)
            return Reply(ok=False, trace=f"{_dump(self._dump_path(rank))}\ndied: exit {self.processes[rank].exitcode}")
        except Exception:
            return Reply(ok=False, trace=f"its result cannot be read here\n{traceback.format_exc()}")

    def _stack(self, rank: int) -> str:
        """The stacks of all threads of a running rank, written by its faulthandler when it gets SIGUSR1."""
        path = self._dump_path(rank)
        before = len(_dump(path))
        pid = self.processes[rank].pid
        if pid is None or not path.exists():  # no file: no handler yet, and the signal would kill the rank
            return "(no stack: it has not come as far as its start)"
        os.kill(pid, signal.SIGUSR1)  # not reaped yet, so the pid is still its own
        for _ in range(20):
            time.sleep(0.1)
            text = _dump(path)
            if len(text) > before and text.endswith("\n"):
                return text[before:]
        return _dump(path)[before:] or "(no stack: it did not answer the signal)"

    def _dump_path(self, rank: int) -> Path:
        return _dump_path(self.folder.name, rank)


_POOLS: dict[int, RankPool] = {}


def _dump_path(folder: str, rank: int) -> Path:
    return Path(folder) / f"stacks{rank}"


def _dump(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _serve(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    """The life of one rank: meet the others, then answer calls until the pipe ends."""
    with Path(folder, f"starting{rank}").open("w") as dumps:
        faulthandler.enable(dumps)  # a crash writes its stack here
        faulthandler.register(signal.SIGUSR1, dumps, all_threads=True)
        Path(folder, f"starting{rank}").rename(_dump_path(folder, rank))  # appears once the handler stands
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
        threading.Thread(target=_leave_with_parent, daemon=True).start()
        pipe.send_bytes(_reply(lambda: _meet(rank, world_size, folder)))
        while True:
            try:
                call = pipe.recv_bytes()
            except (EOFError, OSError):
                os._exit(0)  # not sys.exit: threads of gloo may wait for a peer that has left
            pipe.send_bytes(_reply(lambda call=call: _run(call)))


def _meet(rank: int, world_size: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    import torch
    import torch.distributed as dist

    from tests.dist.facts_once import keep_facts

    keep_facts()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(folder) / "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    dist.barrier()


def _run(call: bytes) -> Any:
    import torch

    function, args, os.environ["PARAFUSE_CACHE"] = pickle.loads(call)
    torch.manual_seed(0)  # a test's numbers do not depend on the tests before it
    torch.set_num_threads(1)
    return function(*args)


def _reply(function: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps(Reply(ok=True, value=function()))
    except BaseException:  # SystemExit too: a rank that leaves in the middle of a test has failed
        return pickle.dumps(Reply(ok=False, trace=traceback.format_exc()))


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
