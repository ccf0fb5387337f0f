"""A replica: the HTTP application and the supervisor of one group of ranks, in one process that Ray has started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct, convert
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from parafuse.config import Config
from parafuse.errors import ConfigError, ParafuseError, RankError
from parafuse.launch.ray_serve.peers import Peers
from parafuse.launch.ray_serve.remote_store import store_behind
from parafuse.launch.serve import logs
from parafuse.launch.serve.card import card_of
from parafuse.launch.serve.group_supervisor import GroupSupervisor
from parafuse.launch.serve.http.admitting import Admission
from parafuse.launch.serve.http.app import make_app
from parafuse.launch.serve.http.process import allow_files
from parafuse.launch.serve.http.service import Service
from parafuse.launch.serve.jobs import JobStore, StoreBusyError
from parafuse.launch.serve.keeper import END_S
from parafuse.launch.serve.keys import Keys
from parafuse.launch.serve.settings import Serving
from parafuse.launch.serve.supervisor import Supervisor, group_of, keys_of
from parafuse.launch.serve.supervisor_client import SupervisorClient
from parafuse.launch.serve.wiring import Wiring

START_S = 45.0
"""For the store's process to start."""


class Served(Struct, frozen=True, kw_only=True):
    """What all replicas are told."""

    model: str
    ranks: int
    config: dict[str, Any]
    settings: dict[str, Any]
    verbose: bool = False


class Replica:
    """Becomes a deployment with `serve.ingress()`. It is there once a real step has run on each of its ranks, and is
    replaced where its supervisor ends or its ranks cannot be started again."""

    def __init__(self, served: dict[str, Any], store: Any):
        """`served`: a `Served`; `store`: a handle of the `StoreHost`."""
        os.environ["OMP_NUM_THREADS"] = "1"  # Ray has set another number, for all of them together
        logs.configure()
        allow_files()
        told = convert(served, Served)
        settings = Serving.from_dict(told.settings)
        if not settings.database.is_file():
            raise ConfigError(
                f"--state {settings.state!r}: is not seen from here; give a folder that all machines see."
            )
        self._folder = tempfile.TemporaryDirectory(prefix="parafuse-")
        self._wiring = Wiring.make(
            Path(self._folder.name), told.model, ranks=told.ranks, config=Config.from_dict(told.config),
            serving=settings, verbose=told.verbose,
        )  # fmt: skip
        self._keys: Keys = keys_of(settings)
        self._handle = store
        self._store: JobStore = store_behind(store)
        self._group: GroupSupervisor | None = None
        self._work: asyncio.Task[int] | None = None
        self._told = asyncio.Event()
        self._service: Service | None = None

    def __serve_build_asgi_app__(self) -> Any:
        settings = self._wiring.serving
        card = card_of(
            self._wiring.model,
            allow_pickle=bool(self._wiring.config.get("allow_pickle")),
            loras=settings.loras,
            names=settings.served_model_name,
        )
        client = SupervisorClient(self._wiring.supervisor_socket)
        admit = Admission(settings, self._store, lambda: client.not_ready_s)
        app = make_app(
            settings, card, store=self._store, keys=self._keys, supervisor=client, admit=admit,
            beside=self._supervised(),
        )  # fmt: skip
        self._service = app.state.service
        return app

    async def check_health(self) -> None:
        """Raises RankError where this replica is to be replaced."""
        if self._work is not None and self._work.done() and not self._told.is_set():
            raise RankError("its supervisor has ended.")
        if self._group is not None and self._group.status().state == "broken":
            raise RankError(f"its ranks cannot be started: {self._group.why}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Jobs that wait or run, on all replicas."""
        waiting = await asyncio.to_thread(self._store.num_queued)
        return {"jobs": float(waiting + len(await asyncio.to_thread(self._store.running)))}

    @asynccontextmanager
    async def _supervised(self) -> AsyncIterator[None]:
        """From the first step of its ranks until they have ended; what ran then waits for the other replicas."""
        try:
            async with self._running():
                yield
        except (ParafuseError, OSError) as error:
            with contextlib.suppress(RayError, RayServeException):  # Ray itself tells nobody why a start has failed
                await self._handle.complain.remote(str(error))
            raise

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        await self._see_state()
        self._group = group = group_of(self._wiring, elastic=False)
        peers = Peers(self._handle, self._end)
        supervisor = Supervisor(self._wiring, group, store=self._store, keys=self._keys, beside=peers)
        self._work = work = asyncio.create_task(supervisor.run(self._told), name="supervisor")
        ready = asyncio.create_task(_started(group), name="ready")
        try:
            await asyncio.wait([work, ready], return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise RankError("its supervisor has ended.")
            ready.result()
            yield
        finally:
            ready.cancel()
            self._end()
            await asyncio.wait([work], timeout=self._wiring.serving.drain_s + END_S)
            work.cancel()
            await asyncio.wait([work])
            await group.close()
            self._folder.cleanup()

    async def _see_state(self) -> None:
        """Raises ConfigError where the folder of the state is none that the store's process sees too."""
        until_s = time.monotonic() + START_S
        while True:
            try:
                await asyncio.to_thread(self._store.num_queued)
                break
            except StoreBusyError:  # it starts when this one does
                if time.monotonic() > until_s:
                    raise
        settings = self._wiring.serving
        if not settings.database.is_file():
            raise ConfigError(
                f"--state {settings.state!r}: is not seen from here; give a folder that all machines see."
            )

    def _end(self) -> None:
        """The supervisor drains; who waits for the queue is told to come again."""
        if self._service is not None:
            self._service.draining = True
        self._told.set()


async def _started(group: GroupSupervisor) -> None:
    await group.until_ready()
