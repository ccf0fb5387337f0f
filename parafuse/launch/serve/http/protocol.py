"""The server's reading of HTTP, with bounds that uvicorn has not: how long a request's head may take, how large it and
how many its headers may be, and how long a connection may go on with a body that nobody reads."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 10.0
MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100
MAX_MESSAGE_BYTES = 1 << 30
"""Of one request with all that is around its body: marks of chunks, trailers."""


class FloodError(Exception):
    """More headers than are read."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. The bounds are class attributes, so that a subclass can have others."""

    head_s = HEAD_S
    max_head_bytes = MAX_HEAD_BYTES
    max_headers = MAX_HEADERS
    max_message_bytes = MAX_MESSAGE_BYTES

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._head_bytes = self._message_bytes = self._headers_bytes = 0
        self._is_flood = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        self._message_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        # also counts what the parser keeps to itself: half of a header, or empty lines before a request
        if self._in_head and self._head_bytes > self.max_head_bytes:
            self._refuse()
        elif self._message_bytes > self.max_message_bytes:
            self.transport.close()
        elif self.cycle is None or self.cycle.response_complete:
            self._arm()  # the rest of an unread body, or nothing that is a request yet

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True  # its first bytes are counted already
        self._message_bytes = self._headers_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.max_head_bytes:
            self._is_flood = True
            raise FloodError

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._headers_bytes += len(name) + len(value)
        if len(self.headers) > self.max_headers or self._headers_bytes > self.max_head_bytes:
            self._is_flood = True
            raise FloodError

    def on_headers_complete(self) -> None:
        self._disarm()
        self._in_head, self._head_bytes = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0

    def send_400_response(self, msg: str) -> None:
        if self._is_flood:
            self._refuse()
        elif not self.transport.is_closing():
            super().send_400_response(msg)

    def _refuse(self) -> None:
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()  # trailers of a body: an answer is on its way
            return
        text = b"The request's head is larger than is read.\n"
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain\r\nconnection: close\r\n"
            b"content-length: " + str(len(text)).encode() + b"\r\n\r\n" + text
        )
        self.transport.close()

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_s, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()
