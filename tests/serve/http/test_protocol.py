"""Clients that do not read their answer: what is written for them does not stay, whatever else the connection does."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
import uvloop
from structlog.testing import capture_logs

from parafuse.launch.serve.http.limits import ClientStalledError, Limits
from parafuse.launch.serve.http.process import config_of
from parafuse.launch.serve.http.protocol import BoundedProtocol
from tests.serve.http.serving import PATIENCE_S

LARGE = 32 << 20
SMALL_BUFFER = 4096
KEEP, CLOSE = b"", b"connection: close\r\n"
LOOPS = pytest.mark.parametrize("run", [uvloop.run, asyncio.run], ids=["uvloop", "asyncio"])


class Strict(BoundedProtocol):
    """The same with a short patience."""

    read_s = 0.5


@dataclass
class Told:
    server: uvicorn.Server
    port: int

    def ask(self, more: bytes = KEEP) -> socket.socket:
        """A client that has asked, and reads nothing yet; the kernel holds as little as can be for it."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        client.settimeout(PATIENCE_S)
        client.connect(("127.0.0.1", self.port))
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n" + more + b"\r\n")
        return client

    async def asked(self, count: int) -> None:
        """Once so many requests have been taken in."""
        async with asyncio.timeout(PATIENCE_S):
            while self.server.server_state.total_requests < count:
                await asyncio.sleep(0.01)

    async def left_alone(self) -> None:
        """Once no connection is left."""
        async with asyncio.timeout(PATIENCE_S):
            while self.server.server_state.connections:
                await asyncio.sleep(0.02)


@asynccontextmanager
async def telling(app: Any, protocol: type[BoundedProtocol] = Strict) -> AsyncIterator[Told]:
    """A server whose kernel buffers are as small as can be."""
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)  # connections have it from here
    door.bind(("127.0.0.1", 0))
    door.listen()
    config = config_of(app)
    config.http, config.lifespan, config.timeout_keep_alive, config.timeout_graceful_shutdown = protocol, "off", 1, 1
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[door]))
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not server.started:
                await asyncio.sleep(0.01)
        yield Told(server, door.getsockname()[1])
    finally:
        server.should_exit = True
        await asyncio.wait([task], timeout=PATIENCE_S)


def in_one_piece(size: int) -> Any:
    async def app(scope: dict[str, Any], receive: object, send: Callable[[Any], Awaitable[None]]) -> None:
        scope["parafuse.id"] = "mine"
        headers = [(b"content-length", str(size).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(size)})

    return app


@LOOPS
@pytest.mark.parametrize("size", [LARGE, 60_000], ids=["large", "below the usual mark"])
@pytest.mark.parametrize("more", [KEEP, CLOSE], ids=["kept alive", "closed"])
def test_an_answer_that_nobody_reads_does_not_stay(run: Any, size: int, more: bytes) -> None:
    async def main() -> None:
        async with telling(in_one_piece(size)) as told:
            with told.ask(more):
                await told.asked(1)
                assert told.server.server_state.connections
                await told.left_alone()

    with capture_logs() as logs:
        run(main())
    assert [(one["event"], one["request_id"]) for one in logs] == [("stalled", "mine")]


@LOOPS
def test_a_rest_that_nobody_reads_does_not_stay(run: Any) -> None:
    async def main() -> None:
        async with telling(in_one_piece(LARGE)) as told:
            with told.ask() as client:
                await told.asked(1)
                assert await asyncio.to_thread(read, client, LARGE - 40_000) == LARGE - 40_000
                await told.left_alone()

    run(main())


@LOOPS
def test_who_reads_slowly_has_it_all(run: Any) -> None:
    class Patient(BoundedProtocol):
        read_s = 1.0

    size, begun_s = 400_000, time.monotonic()

    def slowly(client: socket.socket) -> int:
        had = 0
        while piece := client.recv(size // 20):
            had += len(piece)
            time.sleep(3 * len(piece) / size)
        return had

    async def main() -> int:
        async with telling(in_one_piece(size), Patient) as told:
            with told.ask(CLOSE) as client:
                had = await asyncio.to_thread(slowly, client)
            await told.left_alone()
            return had

    with capture_logs() as logs:
        assert run(main()) >= size
    assert not logs
    assert time.monotonic() - begun_s > 2 * Patient.read_s


@LOOPS
@pytest.mark.parametrize("piece_s", [0.1, 60.0], ids=["ended by Limits", "ended by the protocol"])
def test_a_stream_that_nobody_reads_does_not_stay(run: Any, piece_s: float) -> None:
    """Once Limits has given it up, the connection is closed: that alone would wait for the client for ever."""
    ended: list[str] = []

    async def app(scope: object, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        await receive()
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while not gone.done():
                await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
                await asyncio.sleep(0)
            ended.append("gone")
        except ClientStalledError:
            ended.append("stalled")
            raise
        finally:
            gone.cancel()

    async def main() -> None:
        async with telling(Limits(app, max_bytes=100, read_s=piece_s)) as told:
            with told.ask():
                async with asyncio.timeout(PATIENCE_S):
                    while not ended:
                        await asyncio.sleep(0.02)
                await told.left_alone()

    run(main())
    assert ended == ["stalled" if piece_s < Strict.read_s else "gone"]


def read(client: socket.socket, size: int) -> int:
    had = 0
    while had < size and (piece := client.recv(min(1 << 16, size - had))):
        had += len(piece)
    return had
