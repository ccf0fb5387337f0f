"""What a supervisor does beside feeding its ranks: it keeps the store, or keeps in touch with others that share it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import structlog

from parafuse.launch.serve.jobs import JobStore, State
from parafuse.launch.serve.keys import Keys
from parafuse.launch.serve.messages import JobEvent, Wake
from parafuse.launch.serve.settings import Serving
from parafuse.launch.serve.webhooks import WebhookSender

SWEEP_S = 60.0


class Beside(Protocol):
    """Used by a `Supervisor`, on its event loop."""

    @property
    def alone(self) -> bool:
        """Whether the supervisor is in charge of all jobs of the store."""
        ...

    def tell(self, message: JobEvent | Wake) -> None:
        """What this supervisor's clients are told of a job; or that they have said that there is work. Returns at
        once."""
        ...

    async def run(self, epoch: int, heard: Callable[[JobEvent | Wake], None]) -> None:
        """Until it is cancelled. `heard`: takes what other supervisors have told. Raises StaleError where the
        supervisor is not in charge any more."""
        ...


async def both(*works: Coroutine[Any, Any, None]) -> None:
    """Runs them until one ends, and raises what that one raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


class Housekeeping:
    """Of a store, for whoever alone is in charge of it: takes away what is not kept any longer, sends webhooks."""

    alone = True

    def __init__(self, settings: Serving, store: JobStore, keys: Keys):
        self._store, self._keys = store, keys
        self._most = int(settings.keep_gigabytes * 1e9)
        self._webhooks = WebhookSender(store, settings.webhook_hosts, self._secret_of)
        self._log = structlog.get_logger("parafuse.supervisor")

    def tell(self, message: JobEvent | Wake) -> None:
        """A job that has ended may have a webhook."""
        if isinstance(message, JobEvent) and State(message.state).is_over:
            self._webhooks.wake()

    async def run(self, epoch: int = 0, heard: Callable[[JobEvent | Wake], None] = lambda _: None) -> None:
        """Hears of nobody."""
        await both(self._webhooks.run(), self._sweep())

    def _secret_of(self, owner: str) -> str | None:
        key = self._keys.get(owner)
        return None if key is None else key.webhook_secret

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                gone = await asyncio.to_thread(self._store.sweep, time.time(), max_bytes=self._most)
            except OSError as error:
                self._log.error("sweep", error=str(error))
                continue
            if gone:
                self._log.info("swept", jobs=gone)
