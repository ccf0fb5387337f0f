"""The store that replicas share: one process of the cluster has it, and the others ask that one.

It also passes on what replicas have to tell each other, keeps the store in order, and ends the charge of a replica that
it has not heard of: its jobs go to the others. Events are hints, as everywhere: what counts is in the store."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import structlog

from parafuse.errors import ConfigError, ParafuseError
from parafuse.launch.serve.beside import Housekeeping
from parafuse.launch.serve.command import state_of
from parafuse.launch.serve.jobs import Job, JobStore, StaleError, StoreError
from parafuse.launch.serve.messages import End, JobEvent, Wake, decode_frame, encode
from parafuse.launch.serve.settings import Serving
from parafuse.launch.serve.supervisor import keys_of, store_of

METHODS = frozenset(name for name, _ in inspect.getmembers(JobStore, inspect.isfunction) if not name.startswith("_"))
"""What may be asked of it."""
LEASE_S = 10.0
"""A replica that says nothing for longer is gone."""
LOOK_S = 0.5
HOLD_S = 60.0
"""How long the host of before may take to let go of the state."""
NEWS_S = 5.0
"""How long whoever asks for news waits for some."""
MAX_NEWS, MAX_NEWS_BYTES = 4096, 64 << 20
"""Kept for those that are slow to ask; the oldest go first."""

Cursor = tuple[str, int]
"""Of the news that somebody has seen: of which host, and how many."""


class StoreHost:
    """A `JobStore` for others, beside its news. Used on one event loop. `ask` and `tell` return errors as values, since
    their kinds decide what the asker does."""

    def __init__(self, serving: Serving, *, lease_s: float = LEASE_S, hold_s: float = HOLD_S):
        """Takes the folder of the state. Raises ConfigError where a server has it for longer than `hold_s`."""
        self._held, self._lease_s = ExitStack(), lease_s
        self._hold(serving, hold_s)
        self._store = store_of(serving)
        self._keeping = Housekeeping(serving, self._store, keys_of(serving))
        now_s = time.monotonic()
        self._leases = dict.fromkeys(self._store.epochs(), now_s + lease_s)  # they may still be there
        self._draining, self._complaint = False, ""
        self._name = secrets.token_hex(8)
        self._news: deque[tuple[str, bytes]] = deque()
        self._first, self._bytes = 0, 0
        self._more = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._log = structlog.get_logger("parafuse.store")

    async def ask(
        self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ParafuseError | None]:  # fmt: skip
        """What a method of the store returned, or raised."""
        self._begin()
        if method not in METHODS:
            return None, ConfigError(f"{method}: is no method of a store.")
        if method == "begin_epoch" and self._draining:
            return None, StaleError("begin_epoch: this server is ending; nobody takes charge any more.")
        try:
            value = await asyncio.to_thread(getattr(self._store, method), *args, **kwargs)
        except ParafuseError as error:
            return None, error
        if method == "begin_epoch":
            self._leases[value] = time.monotonic() + self._lease_s
        elif method == "end_epoch":
            self._leases.pop(args[0], None)
            self._lost(value)
        return value, None

    async def tell(self, source: str, epoch: int, frames: Sequence[bytes]) -> StaleError | None:
        """A replica is there, and has this to tell the others. The error says that it is not in charge any more."""
        self._begin()
        if epoch not in self._leases:
            return StaleError(f"supervisor {epoch} is no longer in charge: nothing was heard of it for too long.")
        self._leases[epoch] = time.monotonic() + self._lease_s
        self._publish(source, frames)
        return None

    async def news(self, source: str, seen: Cursor | None) -> tuple[Cursor, list[bytes]]:
        """What others than `source` have told since `seen`; waits a while where there is nothing. With None, or what
        another host has said: at once, where the news stand now."""
        self._begin()
        until_s = time.monotonic() + NEWS_S
        if seen is None or seen[0] != self._name:
            return (self._name, self._first + len(self._news)), []
        while True:
            begin = max(0, seen[1] - self._first)
            fresh = list(self._news)[begin:]
            mine = [frame for who, frame in fresh if who != source]
            seen = self._name, self._first + len(self._news)
            if mine or time.monotonic() >= until_s:
                return seen, mine
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, until_s - time.monotonic())):
                    await self._more.wait()

    async def complain(self, why: str) -> None:
        """A replica cannot start."""
        self._complaint = why
        self._log.error("replica failed", why=why)

    async def complaint(self) -> str:
        """The last one; '' where there was none."""
        return self._complaint

    async def drain(self, patience_s: float) -> bool:
        """Has all replicas end what they do and be in charge no more; new ones are refused. Whether all have ended in
        that time. What waits stays for the next server."""
        self._draining = True
        self._publish("", [encode(End())])
        until_s = time.monotonic() + patience_s
        while self._leases and time.monotonic() < until_s:
            await asyncio.sleep(0.05)
        return not self._leases

    async def close(self) -> None:
        """Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self._store.close)
        self._held.close()

    def _begin(self) -> None:
        if not self._tasks:  # there is an event loop only now
            self._tasks = [asyncio.create_task(work) for work in (self._keeping.run(), self._look())]

    def _hold(self, serving: Serving, hold_s: float) -> None:
        deadline = time.monotonic() + hold_s
        while True:
            try:
                self._held.enter_context(state_of(serving))
                return
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            now_s = time.monotonic()
            for epoch in [one for one, until_s in self._leases.items() if until_s < now_s]:
                try:
                    lost = await asyncio.to_thread(self._store.end_epoch, epoch)
                except StoreError as error:
                    self._log.error("store", error=str(error))
                    break
                self._leases.pop(epoch, None)
                self._log.error("replica gone", epoch=epoch, jobs=[job.id for job in lost])
                self._lost(lost)

    def _lost(self, jobs: Sequence[Job]) -> None:
        if jobs:
            events = [JobEvent(job=job.id, state=job.state.value) for job in jobs]
            self._publish("", [encode(event) for event in (*events, Wake())])

    def _publish(self, source: str, frames: Sequence[bytes]) -> None:
        if not frames:
            return
        for frame in frames:
            message = decode_frame(frame)
            if isinstance(message, JobEvent):
                self._keeping.tell(message)
            self._news.append((source, frame))
            self._bytes += len(frame)
        while len(self._news) > MAX_NEWS or self._bytes > MAX_NEWS_BYTES:
            self._bytes -= len(self._news.popleft()[1])
            self._first += 1
        before, self._more = self._more, asyncio.Event()
        before.set()
