"""The server's reading of HTTP, with bounds that uvicorn has not: how long a request's head may take, how large it and
how many its headers may be, how long a connection may go on with a body that nobody reads, and how long a client may
leave its answer unread."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from parafuse.launch.serve.http.limits import READ_S, ClientStalledError, log_stalled

HEAD_S = 10.0
MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100
MAX_MESSAGE_BYTES = 1 << 30
"""Of one request with all that is around its body: marks of chunks, trailers."""


class FloodError(Exception):
    """More headers than are read."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. The bounds are class attributes, so that a subclass can have others.

    uvicorn waits for a client before the next piece of an answer alone: what is written already, the whole of it where
    the answer is one piece, stays in memory until it is read, also after `transport.close()`. Here a client that reads
    nothing for `read_s` is cut off, whatever the connection was about to do; one that reads slowly is not. What the
    kernel takes counts as read, so it can be twice `read_s` from the last byte that the client took."""

    head_s = HEAD_S
    max_head_bytes = MAX_HEAD_BYTES
    max_headers = MAX_HEADERS
    max_message_bytes = MAX_MESSAGE_BYTES
    read_s = READ_S

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        self._in_head = True
        self._head_bytes = self._message_bytes = self._headers_bytes = 0
        self._is_flood = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # paused while a byte is left: by default 64 KiB could stay for ever
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._disarm_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm_read()

    def resume_writing(self) -> None:
        self._disarm_read()
        super().resume_writing()

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

    def _arm_read(self) -> None:
        self._disarm_read()
        self._unread_bytes = self.transport.get_write_buffer_size()
        self._read_timer = self.loop.call_later(self.read_s, self._unread)

    def _disarm_read(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _unread(self) -> None:
        if self.transport.get_write_buffer_size() < self._unread_bytes:
            self._arm_read()
            return
        self._read_timer = None
        request_id = "" if self.cycle is None else self.cycle.scope.get("parafuse.id", "")
        log_stalled(request_id, ClientStalledError(f"nothing was read for {self.read_s:g} s"))
        self.transport.abort()  # close() would wait for the client once more
