"""Where HTTP processes meet the supervisor: they wake it and ask for estimates; it tells what goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from parafuse.launch.serve.messages import (
    Estimate,
    Estimated,
    FrameError,
    FromSupervisor,
    Wake,
    encode,
    read,
)

MAX_WAITING_BYTES = 64 << 20
"""Of one connection that does not read: it is closed then, and may come again. What it missed stands in the store."""


class Clients:
    """A server on a Unix socket."""

    def __init__(self, path: str, *, wake: Callable[[], None], estimate: Callable[[Estimate], Awaitable[Estimated]]):
        self._path, self._wake, self._estimate = path, wake, estimate
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._log = structlog.get_logger("parafuse.supervisor")

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    def tell(self, message: FromSupervisor) -> None:
        """To all that are there; nobody is waited for."""
        if not self._writers:
            return
        frame = encode(message)
        for writer in list(self._writers):
            if writer.transport.get_write_buffer_size() > MAX_WAITING_BYTES:
                self._log.warning("a client does not read", dropped=True)
                self._drop(writer)
            else:
                writer.write(frame)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            self._drop(writer)
        for task in self._tasks:
            task.cancel()

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while (message := await read(reader)) is not None:
                if isinstance(message, Wake):
                    self._wake()
                elif isinstance(message, Estimate):
                    self._later(self._answer(message, writer))
                else:
                    raise FrameError(f"{type(message).__name__} is not for the supervisor.")
        except FrameError as error:
            self._log.error("a client was dropped", why=str(error))
        finally:
            self._drop(writer)

    async def _answer(self, asked: Estimate, writer: asyncio.StreamWriter) -> None:
        answer = await self._estimate(asked)
        if writer in self._writers:
            writer.write(encode(answer))

    def _later(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(_quietly(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _quietly(work: Awaitable[None]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await work
