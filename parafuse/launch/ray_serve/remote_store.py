"""`JobStore` for a replica: asks the cluster's `StoreHost`, and bears that it ends and comes again."""

from __future__ import annotations

import functools
import time
from typing import Any, cast

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from parafuse.launch.ray_serve.store_host import METHODS
from parafuse.launch.serve.jobs import JobStore, StaleError, StoreBusyError

PATIENCE_S = 15.0
"""How long the same is asked again while nobody answers."""
ANSWER_S = 20.0
"""For one answer: longer than the store itself waits for a disk."""
AGAIN_S = 0.2


def store_behind(handle: Any, *, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S) -> JobStore:
    """The store of a `StoreHost` behind a handle of Ray Serve's. Its methods block, and raise StoreBusyError where
    nobody answers for `patience_s`; to be called from threads that have no event loop.

    What may have been done although its answer was lost is asked again: each method but two leaves things as they are
    the second time. A job that was accepted is found by its id; a claim whose answer is lost raises StaleError, as the
    supervisor would not know what it runs."""
    return cast("JobStore", _RemoteStore(handle, patience_s, answer_s))


class _RemoteStore:
    def __init__(self, handle: Any, patience_s: float, answer_s: float):
        self._handle, self._patience_s, self._answer_s = handle, patience_s, answer_s

    def __getattr__(self, name: str) -> Any:
        if name not in METHODS:
            raise AttributeError(name)
        return functools.partial(self._ask, name)

    def _ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + self._patience_s
        was_lost = False
        while True:
            try:
                if was_lost and name == "accept":
                    job = args[0]
                    stands, _ = self._once("get", (job.id, job.owner), {})
                    if stands is not None:
                        return stands
                value, error = self._once(name, args, kwargs)
            except RayTaskError:
                raise  # a fault of the host's code: another time it is there again
            except (RayError, RayServeException, TimeoutError) as lost:
                if name == "claim":
                    raise StaleError("claim: its answer was lost; what this supervisor runs is not known.") from lost
                was_lost = True
                if time.monotonic() > deadline:
                    why = f"store: nobody has answered for {self._patience_s:g} s; its process may be starting again."
                    raise StoreBusyError(why) from lost
                time.sleep(AGAIN_S)
                continue
            if error is not None:
                raise error
            return value

    def _once(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Exception | None]:
        return self._handle.ask.remote(name, args, kwargs).result(timeout_s=self._answer_s)
