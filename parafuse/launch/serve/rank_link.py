"""Where the ranks of a machine and their supervisor speak: a socket that hears ranks of the present start only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from parafuse.errors import ConfigError, RankError
from parafuse.launch.serve.messages import (
    Beat,
    End,
    Failed,
    FrameError,
    FromRank,
    Hello,
    Paint,
    Painted,
    Stepped,
    Stop,
    ToRank,
    decode,
    encode,
    read,
)
from parafuse.log import logger

SOCKET_ENV = "PARAFUSE_SERVE_SOCKET"
JOB_ENV = "PARAFUSE_SERVE_JOB"
GENERATION_ENV = "PARAFUSE_SERVE_GENERATION"
FEEDS_ENV = "PARAFUSE_SERVE_FEEDS"
LONGEST_PATH = 100
"""Bytes; the kernel takes 107."""
HEAD_BYTES = 4
"""Of a frame, before its body."""
HELLO_S = 10.0
"""For a connection to say who it is."""
MAX_WAITING_BYTES = 32 << 20
"""That the feeding rank has not read: it reads in a thread, so this many mean that it is stuck."""


@dataclass
class _Connection:
    hello: Hello
    writer: asyncio.StreamWriter


class RankLink:
    """Listens for ranks from `open` to `close`, in a folder of its own that only this user can enter."""

    def __init__(self, folder: str | None = None):
        """`folder`: where to make it, the system's for temporary files where not given. Raises ConfigError where its
        name is too long for a socket."""
        self._folder = Path(tempfile.mkdtemp(prefix="pf-", dir=folder))  # mode 0700
        self._connections: dict[int, _Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._generation: Callable[[], str] = str
        self._hear: Callable[[int, FromRank], None] = lambda _rank, _message: None
        self._gone: Callable[[int, str], None] = lambda _rank, _why: None
        if len(os.fsencode(self.path)) > LONGEST_PATH:
            self._folder.rmdir()
            raise ConfigError(
                f"TMPDIR={tempfile.gettempdir()!r}: is too long a name for a socket in it, which may have "
                f"{LONGEST_PATH} bytes; set TMPDIR to a shorter one, such as /tmp."
            )

    @property
    def path(self) -> str:
        """Of the socket."""
        return str(self._folder / "ranks")

    def env(self, job_file: str, *, feeds: bool = True) -> dict[str, str]:
        """What a group gives its ranks beside the launcher's variables and its generation. `feeds`: whether this
        machine takes requests."""
        found = {SOCKET_ENV: self.path, JOB_ENV: job_file}
        return found | {FEEDS_ENV: "1"} if feeds else found

    async def open(
        self,
        generation: Callable[[], str],
        hear: Callable[[int, FromRank], None],
        gone: Callable[[int, str], None],
    ) -> None:
        """Listens. `hear` gets what ranks of this generation say, by global rank; `gone` learns of one whose connection
        ended, and why. Both are called in the event loop."""
        self._generation, self._hear, self._gone = generation, hear, gone
        self._server = await asyncio.start_unix_server(self._accept, self.path)

    def send(self, message: ToRank) -> None:
        """To the feeding rank. Raises RankError where there is none, or where it does not read; FrameError for one
        that it could not read, which would be its end."""
        try:
            frame = encode(message)
        except TypeError as error:
            raise FrameError(f"{type(message).__name__}: {error}") from error
        if not isinstance(decode(frame[HEAD_BYTES:]), Paint | Stop | End):
            raise FrameError(f"{type(message).__name__}: is no message for a rank.")
        feeder = next((one for one in self._connections.values() if one.hello.feeds), None)
        if feeder is None or feeder.writer.is_closing():
            raise RankError("the rank that is given the calls is not connected.")
        if feeder.writer.transport.get_write_buffer_size() > MAX_WAITING_BYTES:
            raise RankError(f"rank {feeder.hello.rank} reads no messages.")
        feeder.writer.write(frame)

    def forget(self) -> None:
        """Ends all connections, without telling `gone`: their ranks were ended."""
        connections, self._connections = self._connections, {}
        for one in connections.values():
            one.writer.close()

    async def close(self) -> None:
        """Ends the connections, the socket and its folder."""
        self.forget()
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            hello = await self._greet(reader)
            if hello is not None:
                await self._listen(_Connection(hello, writer), reader)
        except asyncio.CancelledError:
            pass  # by `close` alone
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _greet(self, reader: asyncio.StreamReader) -> Hello | None:
        """Who it is; None where it is refused."""
        try:
            message = await asyncio.wait_for(read(reader), HELLO_S)
        except (TimeoutError, FrameError) as error:
            logger.warning("a connection to the ranks' socket was refused: %s", error or "it said nothing")
            return None
        why = self._refused(message) if message is not None else ""
        if why:
            logger.warning("a connection to the ranks' socket was refused: %s", why)
        return message if isinstance(message, Hello) and not why else None

    def _refused(self, message: object) -> str:
        """Why a first message is not taken; '' if it is."""
        if not isinstance(message, Hello):
            return f"its first message is {type(message).__name__}, no Hello"
        present = self._generation()
        if not present or message.generation != present:
            return f"rank {message.rank} is of another start ({message.generation!r}; now {present!r})"
        if message.rank in self._connections:
            return f"rank {message.rank} is connected already"
        if message.feeds and any(one.hello.feeds for one in self._connections.values()):
            return f"rank {message.rank} says that it is given the calls, and another one is"
        return ""

    async def _listen(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        hello = connection.hello
        self._connections[hello.rank] = connection
        self._hear(hello.rank, hello)
        why = "its connection ended"
        try:
            while (message := await read(reader)) is not None:
                if self._connections.get(hello.rank) is not connection:
                    return
                why = _wrong(hello, message)
                if why:
                    break
                self._hear(hello.rank, message)  # pyright: ignore[reportArgumentType]
                why = "its connection ended"
        except FrameError as error:
            why = f"it sent {error}"
        if self._connections.get(hello.rank) is connection:
            del self._connections[hello.rank]
            self._gone(hello.rank, why)


def _wrong(hello: Hello, message: object) -> str:
    """What is wrong with a rank's message; '' where nothing is."""
    if isinstance(message, Beat):
        return "" if message.rank == hello.rank else f"it sent a beat of rank {message.rank}"
    if not isinstance(message, Stepped | Painted | Failed):
        return f"it sent {type(message).__name__}"
    return "" if hello.feeds else f"it sent {type(message).__name__}, and is not the one that is given the calls"
