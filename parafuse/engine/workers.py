"""The other ranks of an engine that lives in a plain process: started by it, fed through its store, ended with it."""

from __future__ import annotations

import atexit
import base64
import math
import os
import pickle
import sys
import time
from typing import Any

import torch.distributed as dist

from parafuse.errors import RankError
from parafuse.hardware import cores
from parafuse.parallel.ranks import RankFailure, RankProcesses, start
from parafuse.parallel.world import wait_for

FAILURE_SHOWS_S = 8.0
"""How long to look for the rank that caused a failed exchange, before the exchange's own error is all there is."""


class Workers:
    """Ranks 1 to N-1 of an engine whose process is rank 0. Requests are pickled: only this process can write them,
    over the loopback address."""

    def __init__(self, processes: RankProcesses, store: dist.Store, size: int):
        self._processes, self.store, self._size = processes, store, size
        self.threads = max(1, cores() // size)
        self._sent = 0

    @classmethod
    def start(cls, model: str, settings: dict[str, Any], size: int) -> Workers:
        """Starts them; they load the model at the same time as this process."""
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("parafuse/world_size", str(size))
        store.set("parafuse/setup", _text({"model": model, **settings}))
        env = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores() // size))}
        processes = start(
            [sys.executable, "-m", "parafuse.engine.worker"],
            ranks=range(1, size),
            world_size=size,
            master_port=store.port,
            env=env,
            show=(),
            handle_signals=False,
        )
        workers = cls(processes, store, size)
        atexit.register(workers.stop)
        return workers

    def await_start(self, timeout_s: float) -> None:
        """Waits until all workers are there to be joined. Raises RankError when one ends or does not come."""
        deadline = time.monotonic() + timeout_s
        for rank in range(1, self._size):
            if not wait_for(self.store, f"parafuse/here/{rank}", deadline, self.watch):
                raise RankError(f"rank {rank} did not start within {timeout_s:.0f} s.")

    def watch(self) -> None:
        """Raises RankError when a worker has ended."""
        failure = self._processes.poll()
        if failure is not None:
            raise _lost(failure)

    def send(self, request: dict[str, Any] | None) -> None:
        """Gives the next request to every worker; None: end."""
        self._sent += 1
        self.store.set(f"parafuse/request/{self._sent}", _text(request))
        self.store.delete_key(f"parafuse/request/{self._sent - 2}")

    def explain(self, error: BaseException) -> None:
        """Ends all workers; raises RankError with the traceback of the one that failed, where one did."""
        deadline = time.monotonic() + (FAILURE_SHOWS_S if isinstance(error, Exception) else 0.0)
        failure = self._processes.poll()
        while failure is None and time.monotonic() < deadline and not isinstance(error, ValueError):
            time.sleep(0.05)
            failure = self._processes.poll()
        self.stop(grace_s=1.0)
        if failure is not None:
            raise _lost(failure) from error

    def stop(self, grace_s: float = 5.0) -> None:
        """Asks the workers to end, then ends them."""
        atexit.unregister(self.stop)
        self.send(None)
        deadline = time.monotonic() + grace_s
        while self._processes.running and time.monotonic() < deadline:
            time.sleep(0.02)
        self._processes.stop(grace_s=1.0)


def _lost(failure: RankFailure) -> RankError:
    """The cause first, then what that rank wrote."""
    details = "".join(f"\n[rank {failure.rank}] {line}" for line in failure.details.splitlines())
    return RankError(f"rank {failure.rank}: {failure.summary}{details}")


def _text(value: Any) -> str:
    """The store's typed interface takes text."""
    return base64.b64encode(pickle.dumps(value)).decode()


def read_value(store: dist.Store, key: str) -> Any:
    """What the engine's process wrote at `key`."""
    return pickle.loads(base64.b64decode(store.get(key)))


def next_request(store: dist.Store, number: int) -> dict[str, Any] | None:
    """Waits, for as long as it takes, for request `number`; the parent's death ends this process meanwhile."""
    key = f"parafuse/request/{number}"
    wait_for(store, key, math.inf)
    return read_value(store, key)
