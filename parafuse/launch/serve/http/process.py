"""`python -m parafuse.launch.serve.http.process WIRING BEAT_FD SOCKET_FD`: the server's HTTP process.

`parafuse serve` starts it, watches the bytes that its event loop writes into BEAT_FD, and starts it again where it ends
or falls silent. It holds nothing that is not in the store. It has no torch, and no model code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType

import structlog
import uvicorn
import uvloop

from parafuse.launch.serve import logs
from parafuse.launch.serve.card import card_of
from parafuse.launch.serve.http.admitting import Admission
from parafuse.launch.serve.http.app import make_app
from parafuse.launch.serve.http.protocol import BoundedProtocol
from parafuse.launch.serve.http.service import Service
from parafuse.launch.serve.keys import Keys, check_exposed
from parafuse.launch.serve.sqlite_store import SqliteStore
from parafuse.launch.serve.supervisor_client import SupervisorClient
from parafuse.launch.serve.wiring import Wiring
from parafuse.parallel.rank_entry import enter

BEAT_S = 0.5
GRACE_S = 4.0
"""For answers that are under way when it is told to end; the keeper waits longer."""
MAX_CONNECTIONS = 4000
MAX_FILES = 65536
"""Each connection is an open file, and many systems allow 1024 where nobody asks for more."""


class Server(uvicorn.Server):
    """Says at once that it ends, so that what waits for the queue is told."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        self.should_exit = True  # uvicorn's own would raise the signal once more at the end: an end by signal, not by 0


def main() -> int:
    """Runs until SIGTERM; the exit code."""
    enter()
    logs.configure()
    if len(sys.argv) != 4:
        print("usage: python -m parafuse.launch.serve.http.process WIRING BEAT_FD SOCKET_FD", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    allow_files()
    return serve(Wiring.read(sys.argv[1]), beat=int(sys.argv[2]), door=socket.socket(fileno=int(sys.argv[3])))


def allow_files(most: int = MAX_FILES) -> None:
    """Raises this process's own limit of open files to `most`, or as far as the system lets it; never lowers it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(wiring: Wiring, *, beat: int, door: socket.socket) -> int:
    """Builds everything and answers requests on a listening socket."""
    settings = wiring.serving
    keys = Keys.load(Path(settings.keys) if settings.keys else None, os.environ)
    check_exposed(settings, keys)
    card = card_of(
        wiring.model,
        allow_pickle=bool(wiring.config.get("allow_pickle")),
        loras=settings.loras,
        names=settings.served_model_name,
    )
    store = SqliteStore(settings.database, settings.results, settings.inputs, keep_s=settings.keep_hours * 3600)
    supervisor = SupervisorClient(wiring.supervisor_socket)
    admit = Admission(settings, store, lambda: supervisor.not_ready_s)
    app = make_app(settings, card, store=store, keys=keys, supervisor=supervisor, admit=admit)
    server = Server(config_of(app), app.state.service)
    structlog.get_logger("parafuse.http").info("started", model=card.name, pid=os.getpid())
    uvloop.run(_run(server, door, beat))
    store.close()
    return 0


def config_of(app: object) -> uvicorn.Config:
    """uvicorn's part. Its own access log is off: `access.Access` writes a line that has no query in it."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=BoundedProtocol,
        ws="none",
        loop="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(GRACE_S),
    )


async def _run(server: uvicorn.Server, door: socket.socket, beat: int) -> None:
    async with beating(beat):
        await server.serve(sockets=[door])


@contextlib.asynccontextmanager
async def beating(descriptor: int) -> AsyncIterator[None]:
    """A byte into a pipe twice a second for as long as the event loop turns. Never waits for whoever reads it."""
    os.set_blocking(descriptor, False)

    async def beat() -> None:
        while True:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # a keeper that has gone ends this process
                os.write(descriptor, b".")
            await asyncio.sleep(BEAT_S)

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()


if __name__ == "__main__":
    sys.exit(main())
