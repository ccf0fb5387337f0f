"""The other ranks of an engine that lives in a plain process: started by it, fed through its store, ended with it."""

from __future__ import annotations

import atexit
import base64
import hashlib
import hmac
import math
import os
import pickle
import secrets
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from parafuse.errors import ConfigError, RankError
from parafuse.hardware import cores
from parafuse.parallel.ranks import RankFailure, RankProcesses, start
from parafuse.parallel.world import wait_for

KEY_ENV = "PARAFUSE_WORKER_KEY"
FAILURE_SHOWS_S = 8.0
"""How long to look for the rank that caused a failed exchange, before the exchange's own error is all there is."""


class Workers:
    """Ranks 1 to N-1 of an engine whose process is rank 0.

    Requests are pickled and go through the store, whose port others can reach: each is signed with a key that only this
    process and its workers know, and nothing is unpickled before its signature is checked."""

    def __init__(self, processes: RankProcesses, store: dist.Store, size: int, key: str):
        self._processes, self.store, self._size, self._secret = processes, store, size, key
        self.threads = max(1, cores() // size)
        self._sent = 0

    @classmethod
    def start(cls, model: str, settings: dict[str, Any], size: int) -> Workers:
        """Starts them; they load the model at the same time as this process."""
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("engine: make it in the main thread: its ranks end with the thread that started them.")
        key = secrets.token_hex(32)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("parafuse/world_size", str(size))
        store.set("parafuse/setup", signed({"model": model, **settings}, key))
        env = {KEY_ENV: key}
        if "OMP_NUM_THREADS" not in os.environ:
            env["OMP_NUM_THREADS"] = str(max(1, cores() // size))
        processes = start(
            [sys.executable, "-m", "parafuse.engine.worker"],
            ranks=range(1, size),
            world_size=size,
            master_port=store.port,
            env=env,
            show=(),
            handle_signals=False,
        )
        workers = cls(processes, store, size, key)
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
        """Gives the next request to every worker; None: end. Raises ConfigError for what cannot be sent."""
        for name, value in (request or {}).get("keywords", {}).items():
            try:
                pickle.dumps(value)
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{name}: cannot be sent to the ranks that this engine started ({error}). Give something that can "
                    "be pickled (a function of a module, not a lambda), or start all ranks with torchrun."
                ) from error
        text = signed(request, self._secret)
        self._sent += 1
        self.store.set(f"parafuse/request/{self._sent}", text)
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
    return RankError(f"{failure.summary}{details}")


def signed(value: Any, key: str) -> str:
    """A pickled value with its signature, as text."""
    body = base64.b64encode(pickle.dumps(value)).decode()
    return f"{hmac.new(key.encode(), body.encode(), hashlib.sha256).hexdigest()} {body}"


def read_signed(text: str, key: str) -> Any:
    """The value, unpickled only if the signature is right. Raises RankError when it is not."""
    signature, _, body = text.partition(" ")
    if not hmac.compare_digest(signature, hmac.new(key.encode(), body.encode(), hashlib.sha256).hexdigest()):
        raise RankError("a request that this rank's engine has not signed; it was not read.")
    return pickle.loads(base64.b64decode(body))


def next_request(store: dist.Store, number: int, key: str) -> dict[str, Any] | None:
    """Waits, for as long as it takes, for request `number`; the parent's death ends this process meanwhile."""
    name = f"parafuse/request/{number}"
    wait_for(store, name, math.inf)
    return read_signed(store.get(name).decode(), key)
