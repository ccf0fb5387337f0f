"""A supervisor beside others that share its store: says that it is there, tells and hears."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from typing import Any

import structlog
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from parafuse.launch.serve.beside import both
from parafuse.launch.serve.messages import End, JobEvent, Wake, decode_frame, encode

SAY_S = 1.0
"""How often it says that it is there; a tenth of the time after which it is given up."""
AGAIN_S = 0.5
MAX_WAITING = 4096


class Peers:
    """`beside.Beside` over a handle of the `StoreHost`."""

    alone = False

    def __init__(self, handle: Any, end: Callable[[], None]):
        """`end` is called where the whole server is to end."""
        self._handle, self._end, self._name = handle, end, secrets.token_hex(8)
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._news = asyncio.Event()
        self._log = structlog.get_logger("parafuse.peers")

    def tell(self, message: JobEvent | Wake) -> None:
        """Sent soon, in this order."""
        self._waiting.append(encode(message))
        self._news.set()

    async def run(self, epoch: int, heard: Callable[[JobEvent | Wake], None]) -> None:
        """A store that does not answer is asked again: events may be lost meanwhile, and it knows who is there."""
        await both(self._say(epoch), self._hear(heard))

    async def _say(self, epoch: int) -> None:
        while True:
            self._news.clear()
            frames = list(self._waiting)
            self._waiting.clear()
            try:
                stale = await self._handle.tell.remote(self._name, epoch, frames)
            except (RayError, RayServeException) as error:
                await self._again("tell", error)
                continue
            if stale is not None:
                raise stale
            try:
                await asyncio.wait_for(self._news.wait(), SAY_S)
            except TimeoutError:
                continue

    async def _hear(self, heard: Callable[[JobEvent | Wake], None]) -> None:
        seen = None
        while True:
            try:
                seen, frames = await self._handle.news.remote(self._name, seen)
            except (RayError, RayServeException) as error:
                await self._again("news", error)
                continue
            for frame in frames:
                message = decode_frame(frame)
                if isinstance(message, End):
                    self._end()
                elif isinstance(message, JobEvent | Wake):
                    heard(message)

    async def _again(self, what: str, error: Exception) -> None:
        self._log.warning("store", what=what, error=type(error).__name__)
        await asyncio.sleep(AGAIN_S)
