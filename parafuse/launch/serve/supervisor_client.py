"""The HTTP process's end of its line to the supervisor: says that there is work, hears what becomes of it.

It connects again by itself for as long as it runs. Nothing here waits for a supervisor that does not answer: what is
sent lies in a small queue, estimates have a time limit, and what was lost meanwhile is looked up in the store."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import structlog

from parafuse.launch.serve.jobs import JobRequest
from parafuse.launch.serve.messages import (
    CallTimes,
    Estimate,
    Estimated,
    FrameError,
    JobEvent,
    Message,
    Status,
    Wake,
    encode,
    read,
)

WAITS_S = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Before the n-th try to connect."""
FRESH_S = 2.0
"""A supervisor that has said nothing for longer is not known to be well."""
MAX_ESTIMATES = 256
"""That wait for an answer; a further one is not asked."""
PATIENCE_S = 10.0
"""How long a request waits for what the planner says of it, where that decides whether it is taken."""
ANSWER_S = 1.0
"""For the supervisor to answer, beside that."""
MAX_EVENTS = 64
"""That wait for one watcher; the oldest go first, since the store says how a job ends."""


class Watch:
    """What one watcher of a job has not seen yet."""

    def __init__(self, job: str):
        self.job = job
        self._events: deque[JobEvent] = deque(maxlen=MAX_EVENTS)
        self._news = asyncio.Event()

    def tell(self, event: JobEvent) -> None:
        self._events.append(event)
        self._news.set()

    async def next(self, timeout_s: float) -> JobEvent | None:
        """The next event; None where none came in that time."""
        if not self._events:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
        return self._events.popleft() if self._events else None


class SupervisorClient:
    """Used from one event loop, between `async with`."""

    def __init__(self, socket: str | Path):
        self._socket = str(socket)
        self._watches: dict[str, set[Watch]] = {}
        self._listeners: list[Callable[[JobEvent | CallTimes], None]] = []
        self._waiting: dict[int, asyncio.Future[Estimated]] = {}
        self._number = 0
        self._wakes, self._to_send = False, deque[Estimate]()
        self._work = asyncio.Event()
        self._status: Status | None = None
        self._status_at_s, self._ready_at_s = 0.0, time.monotonic()
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger("parafuse.http")

    async def __aenter__(self) -> SupervisorClient:
        self._task = asyncio.create_task(self._run(), name="supervisor client")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    @property
    def status(self) -> Status | None:
        """The last one that came; None before the first."""
        return self._status

    @property
    def status_age_s(self) -> float:
        """Since it came; infinite before the first."""
        return time.monotonic() - self._status_at_s if self._status is not None else float("inf")

    @property
    def not_ready_s(self) -> float:
        """How long it has not said that it is ready; 0.0 where it is."""
        if self._status is not None and self._status.state == "ready" and self.status_age_s <= FRESH_S:
            return 0.0
        return time.monotonic() - self._ready_at_s

    def listen(self, listener: Callable[[JobEvent | CallTimes], None]) -> None:
        """`listener` is called for every event of every job, and every call's times; it must return at once."""
        self._listeners.append(listener)

    @contextlib.contextmanager
    def watch(self, job: str) -> Iterator[Watch]:
        """Events of one job, from now on."""
        watch = Watch(job)
        self._watches.setdefault(job, set()).add(watch)
        try:
            yield watch
        finally:
            watches = self._watches[job]
            watches.discard(watch)
            if not watches:
                del self._watches[job]

    def wake(self) -> None:
        """Says that the store has something new. Does not wait; said later where the line is down."""
        self._wakes = True
        self._work.set()

    async def estimate(
        self, request: JobRequest, *, needs_seconds: bool = False, patience_s: float = PATIENCE_S
    ) -> Estimated | None:
        """What a call for this alone would take; None where the supervisor does not say in that time, and for calls of
        the autoencoder alone, which nobody predicts. `needs_seconds`: something depends on them, so that they are worth
        waiting for; memory that may not be there always is."""
        if request.coding is not None or len(self._waiting) >= MAX_ESTIMATES or self.status_age_s > 2 * FRESH_S:
            return None
        self._number += 1
        number, answer = self._number, asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        asked = Estimate(
            number=number,
            settings=request.settings,
            num_outputs=request.num_outputs,
            images=sum(len(files) for files in request.images.values()),
            loras=len(request.lora),
            cache=request.cache,
            needs_seconds=needs_seconds,
            patience_s=patience_s,
        )
        self._to_send.append(asked)
        self._work.set()
        try:
            async with asyncio.timeout(patience_s + ANSWER_S):
                return await answer
        except TimeoutError:
            return None
        finally:
            del self._waiting[number]

    async def _run(self) -> None:
        tries = 0
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._socket)
            except OSError:
                await asyncio.sleep(WAITS_S[min(tries, len(WAITS_S) - 1)])
                tries += 1
                continue
            tries = 0
            self.wake()  # what was accepted while the line was down
            sender = asyncio.create_task(self._send(writer))
            try:
                while (message := await read(reader)) is not None:
                    self._take(message)
            except FrameError as error:
                self._log.error("supervisor", error=str(error))
            finally:
                sender.cancel()
                writer.close()
                self._status_at_s = float("-inf")  # it is gone, or will say that it is not
            await asyncio.sleep(WAITS_S[0])

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await self._work.wait()
                self._work.clear()
                if self._wakes:
                    self._wakes = False
                    writer.write(encode(Wake()))
                while self._to_send:
                    estimate = self._to_send.popleft()
                    if estimate.number in self._waiting:
                        writer.write(encode(estimate))
                await writer.drain()

    def _take(self, message: Message) -> None:
        if isinstance(message, Status):
            self._status, self._status_at_s = message, time.monotonic()
            if message.state == "ready":
                self._ready_at_s = self._status_at_s
        elif isinstance(message, Estimated):
            answer = self._waiting.get(message.number)
            if answer is not None and not answer.done():
                answer.set_result(message)
        elif isinstance(message, JobEvent):
            for watch in self._watches.get(message.job, ()):
                watch.tell(message)
            for listener in self._listeners:
                listener(message)
        elif isinstance(message, CallTimes):
            for listener in self._listeners:
                listener(message)
        else:
            raise FrameError(f"the supervisor sent a {type(message).__name__}, which is none of its messages.")
