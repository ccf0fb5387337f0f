"""`python -m parafuse.launch.serve.supervisor WIRING BEAT_FD`: keeps the ranks of this machine, and feeds them from the
store.

`parafuse serve` starts it, watches the bytes that its event loop writes into BEAT_FD, and starts it again where it ends
or falls silent; its ranks end with it. All that must last is in the store."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

from parafuse.config import Config
from parafuse.engine.planner import resolve
from parafuse.launch.serve import logs
from parafuse.launch.serve.beside import Beside, Housekeeping
from parafuse.launch.serve.card import card_of
from parafuse.launch.serve.choosing import Chooser, most_of_key
from parafuse.launch.serve.clients import Clients
from parafuse.launch.serve.elastic import ElasticGroup, Rendezvous
from parafuse.launch.serve.estimates import Estimates
from parafuse.launch.serve.group import RankGroup
from parafuse.launch.serve.group_supervisor import GroupSupervisor
from parafuse.launch.serve.http.process import beating
from parafuse.launch.serve.jobs import JobStore, StaleError
from parafuse.launch.serve.keeper import python
from parafuse.launch.serve.keys import Keys
from parafuse.launch.serve.messages import CallTimes, Estimate, Estimated, JobEvent, Paint, Painted, Status, Wake
from parafuse.launch.serve.probing import probe_of
from parafuse.launch.serve.rank_link import RankLink
from parafuse.launch.serve.restarts import Devices
from parafuse.launch.serve.schedule import Policy
from parafuse.launch.serve.scheduler import Charge, Scheduler
from parafuse.launch.serve.settings import Serving
from parafuse.launch.serve.spawned import SpawnedGroup, visible_devices
from parafuse.launch.serve.sqlite_store import SqliteStore
from parafuse.launch.serve.wiring import Wiring
from parafuse.parallel.rank_entry import enter

STATUS_S = 0.5
RDZV_KEY_ENV = "PARAFUSE_RDZV_KEY"
"""A secret that the machines of one server share."""
RANK = python("parafuse.launch.serve.rank")
REPLACED = 3
"""Exit code where another supervisor has taken charge."""


def main() -> int:
    """Runs until SIGTERM; the exit code."""
    enter()
    logs.configure()
    if len(sys.argv) != 3:
        print("usage: python -m parafuse.launch.serve.supervisor WIRING BEAT_FD", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return asyncio.run(_run(Wiring.read(sys.argv[1]), int(sys.argv[2])))


async def _run(wiring: Wiring, beat: int) -> int:
    async with beating(beat):
        told = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
        group = group_of(wiring)
        try:
            if wiring.serving.lend:
                await group.start()
                await told.wait()
                return 0
            keys, store = keys_of(wiring.serving), store_of(wiring.serving)
            beside = Housekeeping(wiring.serving, store, keys)
            return await Supervisor(wiring, group, store=store, keys=keys, beside=beside).run(told)
        finally:
            await group.close()


def keys_of(settings: Serving) -> Keys:
    """Raises ConfigError."""
    return Keys.load(Path(settings.keys) if settings.keys else None, os.environ)


def store_of(settings: Serving) -> SqliteStore:
    """Raises ConfigError, StoreError."""
    return SqliteStore(settings.database, settings.results, settings.inputs, keep_s=settings.keep_hours * 3600)


def group_of(wiring: Wiring, *, elastic: bool = True) -> GroupSupervisor:
    """The ranks of this machine, not started yet; `elastic`: by torch's agent, which also joins several machines.
    Raises ConfigError."""
    settings = wiring.serving
    config = Config.from_dict(dict(wiring.config))
    link = RankLink(wiring.folder)
    file = Path(wiring.folder) / "ranks.json"
    file.write_bytes(msgspec.json.encode(job_of(wiring)))
    env = link.env(str(file), feeds=not settings.lend)
    group = _elastic(wiring, env) if elastic else SpawnedGroup(RANK, wiring.ranks, env=env, show=range(wiring.ranks))
    card = card_of(wiring.model, allow_pickle=config.allow_pickle)
    plan = resolve(config, card.source, wiring.ranks * settings.nnodes)
    per_rank = plan.devices_per_rank
    return GroupSupervisor(
        group,
        link,
        ranks=wiring.ranks,
        num_ranks=wiring.ranks * settings.nnodes,
        probe=None if settings.lend else probe_of(card, every_s=settings.probe_s),
        devices=Devices(visible_devices(plan.device), wiring.ranks * per_rank, per_rank=per_rank),
    )


def _elastic(wiring: Wiring, env: Mapping[str, str]) -> RankGroup:
    settings = wiring.serving
    rendezvous = None
    if settings.nnodes > 1:
        key = os.environ.get(RDZV_KEY_ENV, "")
        endpoint = settings.rdzv_endpoint or ""
        rendezvous = Rendezvous(nnodes=settings.nnodes, endpoint=endpoint, hosts=not settings.lend, key=key)
    return ElasticGroup(RANK, wiring.ranks, env=env, rendezvous=rendezvous, show=range(wiring.ranks))


def job_of(wiring: Wiring) -> dict[str, Any]:
    """What ranks are told, as JSON."""
    settings = wiring.serving
    return {
        "model": wiring.model,
        "config": wiring.config,
        "max_loras": settings.max_loras,
        "loras": settings.loras and str(Path(settings.loras).resolve()),
        "verbose": wiring.verbose,
        "inputs": str(settings.inputs.resolve()),
        "results": str(settings.results.resolve()),
        "expect": None,
    }


class Supervisor:
    """Everything that takes jobs to the ranks, on one event loop."""

    def __init__(
        self, wiring: Wiring, group: GroupSupervisor, *, store: JobStore, keys: Keys, beside: Beside
    ):  # fmt: skip
        settings = self._settings = wiring.serving
        self._group = group
        self._card = card_of(wiring.model, allow_pickle=bool(wiring.config.get("allow_pickle")))
        self._store, self._keys, self._beside = store, keys, beside
        self._estimates = Estimates(
            Path(settings.state) / "timings.json",
            model=wiring.model,
            config=Config.from_dict(dict(wiring.config)),
            num_ranks=wiring.ranks * settings.nnodes,
        )
        self._clients = Clients(wiring.supervisor_socket, wake=self._woken, estimate=self._estimate)
        self._chooser = Chooser(
            self._store,
            Policy(batch=settings.batch),
            num_ranks=wiring.ranks * settings.nnodes,
            seconds_of=self._estimates.seconds_of,
            most_of_key=lambda: most_of_key(self._keys, self._store, time.time()),
        )
        self._scheduler: Scheduler | None = None
        self._draining = False
        self._log = structlog.get_logger("parafuse.supervisor")

    async def run(self, told: asyncio.Event) -> int:
        """Until `told` is set, or something ends that must not. The exit code."""
        epoch = await asyncio.to_thread(self._store.begin_epoch, alone=self._beside.alone)
        settings = self._settings
        charge = Charge(store=self._store, epoch=epoch, results=settings.results, keep_s=settings.keep_hours * 3600)
        self._scheduler = scheduler = Scheduler(
            charge,
            self._group,
            self._chooser,
            tell=self._tell,
            painted=self._painted,
        )
        await self._clients.start()
        await self._group.start()
        self._log.info("started", pid=os.getpid(), epoch=epoch, ranks=self._group.num_ranks)
        feeding = asyncio.create_task(scheduler.run(), name="feed")
        others = [
            asyncio.create_task(work, name=name)
            for name, work in {
                "status": self._tell_status(),
                "beside": self._beside.run(epoch, self._heard),
            }.items()
        ]
        warming = asyncio.create_task(self._warm(), name="warm")
        waiting = asyncio.create_task(told.wait(), name="told")
        try:
            done, _ = await asyncio.wait([waiting, feeding, *others], return_when=asyncio.FIRST_COMPLETED)
            if waiting not in done:
                return self._why_ended(next(iter(done)))
            await self._drain(scheduler, feeding)
            return 0
        finally:
            for task in (waiting, warming, feeding, *others):
                task.cancel()
            await self._clients.close()
            await self._estimates.close()
            if not self._beside.alone:  # the others go on at once with what it leaves
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(self._store.end_epoch, epoch)

    async def _warm(self) -> None:
        await self._group.wait_ready()  # the ranks come first
        await self._estimates.warm(self._card.settings)

    def _why_ended(self, task: asyncio.Task[Any]) -> int:
        error = task.exception()
        if isinstance(error, StaleError):
            self._log.error("another supervisor has taken charge")
            return REPLACED
        self._log.error("ended", what=task.get_name(), error=repr(error), exc_info=error)
        return 1

    async def _drain(self, scheduler: Scheduler, feeding: asyncio.Task[None]) -> None:
        """The running job may end; those that wait stay for the next server."""
        self._draining = True
        self._clients.tell(self._status())
        await scheduler.drain(self._settings.drain_s)
        with contextlib.suppress(TimeoutError, StaleError):
            await asyncio.wait_for(feeding, 10.0)

    def _tell(self, event: JobEvent) -> None:
        self._clients.tell(event)
        self._beside.tell(event)

    def _woken(self) -> None:
        self._wake()
        self._beside.tell(Wake())

    def _heard(self, message: JobEvent | Wake) -> None:
        if isinstance(message, Wake):
            self._wake()
        else:
            self._clients.tell(message)

    def _wake(self) -> None:
        if self._scheduler is not None:
            self._scheduler.wake()

    def _painted(self, kind: str, call: Paint, painted: Painted) -> None:
        self._estimates.learn(call, painted)
        self._clients.tell(CallTimes(kind=kind, phases_s=painted.phases_s | {"total": painted.seconds}))

    async def _estimate(self, asked: Estimate) -> Estimated:
        return await self._estimates.estimate(asked)

    def _status(self) -> Status:
        status = self._group.status()
        scheduler = self._scheduler
        if scheduler is not None and scheduler.fault:
            status = msgspec.structs.replace(status, state="broken", why=f"the store cannot be used: {scheduler.fault}")
        if self._draining:
            status = msgspec.structs.replace(status, state="draining", why="the server is ending.")
        return status

    async def _tell_status(self) -> None:
        state, since_s = "", time.monotonic()
        while True:
            status = self._status()
            if status.state != state:
                now_s = time.monotonic()
                self._log.info(
                    "state", state=status.state, why=status.why, after=state, seconds=round(now_s - since_s, 1)
                )
                state, since_s = status.state, now_s
            self._clients.tell(status)
            await asyncio.sleep(STATUS_S)


if __name__ == "__main__":
    sys.exit(main())
