"""What one request may bring, and how long it may take to bring it: counted below every parser of bodies."""

from __future__ import annotations

import asyncio
import math

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parafuse.launch.serve.http.errors import ApiError, BodyError, response_of

BODY_S = 60.0
"""From a request's first byte to the last of its body."""
READ_S = 60.0
"""How long a client may leave one piece of an answer unread while the next one waits, and how long it may read nothing
at all (`protocol.BoundedProtocol`)."""


class Limits:
    """ASGI middleware: bodies by bytes (also without a length) and by seconds, and clients that are too slow for an
    answer of several pieces. One that leaves the last piece, or the only one, is `protocol.BoundedProtocol`'s."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, body_s: float = BODY_S, read_s: float = READ_S):
        self.app, self.max_bytes, self.body_s, self.read_s = app, max_bytes, body_s, read_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > self.max_bytes:
            await response_of(self._too_large())(scope, receive, send)
            return
        await self.app(scope, self._counting(receive), self._bounded(send))

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body has more than {self.max_bytes} bytes, the most that is taken.",
                        code="body_too_large")  # fmt: skip

    def _counting(self, receive: Receive) -> Receive:
        """Raises BodyError where the body is read. After its end, waits for the client to go, without a limit."""
        deadline = asyncio.get_running_loop().time() + self.body_s
        had, is_whole = 0, False

        async def counted() -> Message:
            nonlocal had, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                text = f"The body did not come within {self.body_s:g} s."
                raise BodyError(408, text, headers={"connection": "close"}) from error
            had += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if had > self.max_bytes:
                raise BodyError(413, self._too_large().message)
            return message

        return counted

    def _bounded(self, send: Send) -> Send:
        async def sent(message: Message) -> None:
            try:
                async with asyncio.timeout(self.read_s):
                    await send(message)
            except TimeoutError as error:
                raise ClientStalledError(f"a piece was not read within {math.ceil(self.read_s)} s") from error

        return sent


class ClientStalledError(ConnectionError):
    """A client that does not read its answer. Its connection is closed once what was written has gone, and cut off by
    `protocol.BoundedProtocol` where nothing of that is read."""


def log_stalled(request_id: str, error: Exception) -> None:
    structlog.get_logger("parafuse.http").warning("stalled", request_id=request_id, why=str(error))
