"""The other ranks of an engine that lives in a plain process: started by it, fed through its store, ended with it."""

from __future__ import annotations

import atexit
import base64
import hashlib
import hmac
import io
import math
import os
import pickle
import secrets
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from parafuse.errors import ConfigError, RankError
from parafuse.hardware import cores
from parafuse.parallel.ranks import RankFailure, RankProcesses, start
from parafuse.parallel.world import wait_for

KEY_ENV = "PARAFUSE_WORKER_KEY"
PIECE_BYTES = 4 << 20
"""torch's store takes values of up to 8 MiB."""
MAX_SENT_BYTES = 256 << 20
"""Of one argument: the store is no way for weights."""
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
        self._kept: list[int] = []
        """Numbers of requests that some worker may not have read yet."""

    @classmethod
    def start(cls, model: str, settings: dict[str, Any], size: int) -> Workers:
        """Starts them; they load the model at the same time as this process."""
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("engine: make it in the main thread: its ranks end with the thread that started them.")
        key = secrets.token_hex(32)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("parafuse/world_size", str(size))
        put(store, "parafuse/setup", signed({"model": model, **settings}, key))
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

    def send(self, request: dict[str, Any] | None, values: dict[str, Any] | None = None) -> None:
        """Gives the next request to every worker; None: end. `values`: those of the user in it, by name. Raises
        ConfigError for what cannot be sent."""
        for name, value in (values or {}).items():
            try:
                data = pickle.dumps(value)
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{name}: cannot be sent to the ranks that this engine started ({error}). Give something that can "
                    "be pickled (a function of a module, not a lambda), or start all ranks with torchrun."
                ) from error
            _refuse_of_script(name, data)
            if len(data) > MAX_SENT_BYTES:
                raise ConfigError(
                    f"{name}: has {len(data) >> 20} MiB; at most {MAX_SENT_BYTES >> 20} can be sent to the ranks that "
                    "this engine started. Give a file or folder that they can load, or start all ranks with torchrun."
                )
        text = signed(request, self._secret)
        self._sent += 1
        put(self.store, f"parafuse/request/{self._sent}", text)
        self._kept.append(self._sent)
        read = min((_count(self.store, f"parafuse/read/{rank}") for rank in range(1, self._size)), default=0)
        while self._kept and self._kept[0] <= read:
            take_away(self.store, f"parafuse/request/{self._kept.pop(0)}")

    def forget_setup(self) -> None:
        """Frees what the workers were started with, once all have read it."""
        take_away(self.store, "parafuse/setup")

    def explain(self, error: BaseException) -> None:
        """Ends all workers; raises RankError with the traceback of the one that failed, where one did."""
        is_own = isinstance(error, ConfigError)  # found here: the others find the same, and are no cause of it
        deadline = time.monotonic() + (FAILURE_SHOWS_S if isinstance(error, Exception) else 0.0)
        failure = None if is_own else self._processes.poll()
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


def next_request(store: dist.Store, number: int, key: str, watch: Callable[[], None]) -> dict[str, Any] | None:
    """Waits, for as long as it takes, for request `number`; the parent's death ends this process meanwhile. `watch` may
    raise."""
    name = f"parafuse/request/{number}"
    wait_for(store, name, math.inf, watch)
    text = get(store, name)
    store.set(f"parafuse/read/{os.environ['RANK']}", str(number))
    return read_signed(text, key)


def _count(store: dist.Store, name: str) -> int:
    return int(store.get(name)) if store.check([name]) else 0


def _refuse_of_script(name: str, data: bytes) -> None:
    """Raises ConfigError for a function or class of the user's script: it pickles as a name, which other processes do
    not have."""
    if b"__main__" not in data:
        return

    class Finder(pickle.Unpickler):
        def find_class(self, module: str, qualified: str) -> Any:
            if module == "__main__":
                raise ConfigError(
                    f"{name}: {qualified} is of the script that runs, which the ranks that this engine started do not "
                    "have. Put it into a module that they can import, or start all ranks with torchrun."
                )
            return super().find_class(module, qualified)

    Finder(io.BytesIO(data)).load()


def put(store: dist.Store, name: str, text: str) -> None:
    """Text of any length in pieces that the store takes; the name itself comes last."""
    pieces = [text[i : i + PIECE_BYTES] for i in range(0, len(text), PIECE_BYTES)]
    for number, piece in enumerate(pieces):
        store.set(f"{name}/{number}", piece)
    store.set(name, str(len(pieces)))


def get(store: dist.Store, name: str) -> str:
    """What was put under a name that is there."""
    return "".join(store.get(f"{name}/{number}").decode() for number in range(int(store.get(name))))


def take_away(store: dist.Store, name: str) -> None:
    if store.check([name]):
        for number in range(int(store.get(name))):
            store.delete_key(f"{name}/{number}")
        store.delete_key(name)
