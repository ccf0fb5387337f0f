"""Jobs become calls of the pipeline, and what came of a call becomes the jobs' end. Runs in the supervisor alone."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import structlog

from parafuse.launch.serve.group import GroupLostError
from parafuse.launch.serve.jobs import FileError, Job, JobError, JobGoneError, JobStore, StaleError, State
from parafuse.launch.serve.messages import Failed, Item, JobEvent, Paint, Painted, Stepped

LATE_S = 1.0
"""How often jobs that wait are looked at for deadlines that have passed."""
LOOK_S = 0.25
"""How often cancels and deadlines of running jobs are looked for, where nobody tells of them."""
IDLE_LOOK_S = 1.0
NOTE_S = 1.0
"""How often a running job's progress is written down."""
PATIENCE_S = 2.0
"""Before the store is tried again that could not be used."""


class Painter(Protocol):
    """What the scheduler needs of the ranks: a `GroupSupervisor`."""

    @property
    def num_ranks(self) -> int: ...

    async def wait_ready(self) -> None:
        """Until a real step has run on every rank."""
        ...

    def paint(self, call: Paint) -> AsyncGenerator[Stepped | Painted | Failed]:
        """Raises GroupLostError."""
        ...

    def stop_call(self, call: str, reason: str) -> None: ...


Choose = Callable[[Sequence[Job], frozenset[str], float], Awaitable[Sequence[Job]]]
"""(queued jobs, those that must go alone, Unix time) -> those of the next call. `choosing.Chooser`. Raises OSError
where the store cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What a supervisor is in charge of."""

    store: JobStore
    epoch: int
    """As `begin_epoch` gave it."""
    results: Path
    keep_s: float
    """How long results are kept."""


@dataclass
class Running:
    """The call that is under way."""

    call: Paint
    jobs: list[Job]
    begun_s: float
    """time.monotonic()."""
    step: int = 0
    num_steps: int = 0
    step_seconds: float = 0.0
    stopping: dict[str, str] = field(default_factory=dict)
    """Job -> why it is to end: cancelled, deadline, draining."""
    ended: set[str] = field(default_factory=set)
    """Jobs that have ended before the call, which goes on for the others."""
    told_s: float = 0.0

    @property
    def left_s(self) -> float:
        """What it takes from now on, as its steps so far tell; 0 before the first."""
        return max(0.0, (self.num_steps - self.step) * self.step_seconds)

    @property
    def owed(self) -> list[Job]:
        """The jobs that end with the call."""
        return [job for job in self.jobs if job.id not in self.ended]


class Scheduler:
    """Feeds the ranks from the store until it is told to end. One task; every call of the store is made in a thread."""

    def __init__(
        self,
        charge: Charge,
        painter: Painter,
        choose: Choose,
        *,
        tell: Callable[[JobEvent], None],
        painted: Callable[[str, Paint, Painted], None] = lambda *_: None,
    ):
        """`tell`: gives an event to whoever watches. `painted`: learns what a call took, and of what kind its jobs
        were."""
        self._store, self._epoch, self._painter = charge.store, charge.epoch, painter
        self._choose = choose
        self._results, self._keep_s, self._tell, self._painted = charge.results, charge.keep_s, tell, painted
        self._alone: set[str] = set()
        """Jobs that failed in a call with others."""
        self._news = asyncio.Event()
        self._draining = False
        self.running: Running | None = None
        self.fault = ""
        """Why the store cannot be used now."""
        self._log = structlog.get_logger("parafuse.scheduler")

    def wake(self) -> None:
        """There may be new jobs, or cancels."""
        self._news.set()

    async def run(self) -> None:
        """Until `drain`. Raises StaleError where another supervisor has taken charge."""
        late = asyncio.create_task(self._fail_late(), name="deadlines")
        try:
            await self._run()
        finally:
            late.cancel()

    async def _run(self) -> None:
        while not self._draining:
            self._news.clear()
            try:
                jobs = await self._next()
                if jobs:
                    await self._call(jobs)
                    continue
            except OSError as error:  # StoreError too: the disk may be full for a while
                await self._faulty(error)
                continue
            self.fault = ""
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), IDLE_LOOK_S)

    async def drain(self, patience_s: float) -> None:
        """No job is begun any more; the running one may take `patience_s`, then it is stopped and waits for the next
        server."""
        self._draining = True
        self._news.set()
        deadline = time.monotonic() + patience_s
        while self.running is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if self.running is not None:
            self._stop(dict.fromkeys((job.id for job in self.running.jobs), "draining"))

    async def _next(self) -> list[Job]:
        """Claimed jobs for one call; none where nothing waits."""
        queued = await asyncio.to_thread(self._store.queued)
        if not queued:
            return []
        await self._painter.wait_ready()
        queued = await asyncio.to_thread(self._store.queued)  # some may have been cancelled meanwhile
        self._alone &= {job.id for job in queued}
        # one whose ranks were lost may be why: another time it takes no others with it
        alone = self._alone | {job.id for job in queued if job.tries}
        chosen = await self._choose(queued, frozenset(alone), time.time())
        if not chosen or self._draining:
            return []
        return await asyncio.to_thread(self._store.claim, [job.id for job in chosen], self._epoch)

    async def _fail_late(self) -> None:
        """Whatever the ranks do: who waits for a job hears of its deadline in time."""
        while True:
            try:
                for job in await asyncio.to_thread(self._store.fail_late, self._epoch, keep_s=self._keep_s):
                    self._told(job)
            except OSError as error:
                self._log.error("store", error=str(error))
            except StaleError:
                return  # `run` will find it too
            await asyncio.sleep(LATE_S)

    async def _call(self, jobs: list[Job]) -> None:
        """One call of the pipeline for these jobs, which all end, or wait again, in here."""
        folder = self._results / f"try-{secrets.token_hex(8)}"
        await self._in_store(folder.mkdir, parents=True, exist_ok=True)
        call = paint_of(jobs, str(folder))
        self.running = running = Running(call, jobs, time.monotonic())
        for job in jobs:
            self._tell(JobEvent(job=job.id, state=State.RUNNING.value))
        look = asyncio.create_task(self._look_after(running))
        try:
            end = await self._end_of(running)
            if isinstance(end, Painted):
                await self._commit(running, end, folder)
            else:
                await self._failed(running, end)
        except GroupLostError as error:
            self._log.warning("group lost", call=call.call, cause=error.cause, error=str(error))
            seconds = self._seconds(running)
            for job in running.owed:
                why = f"its ranks were lost ({error})"
                after = await self._in_store(self._store.give_back, job.id, self._epoch, why, rank_seconds=seconds)
                self._told(after)
        except asyncio.CancelledError:
            if self._draining:  # it took longer to stop than the server may take to end
                await asyncio.shield(self._unclaim(running))
            raise
        finally:
            self.running = None
            look.cancel()
            await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _unclaim(self, running: Running) -> None:
        """Its jobs wait for the next server, which counts no try."""
        for job in running.owed:
            with contextlib.suppress(StaleError, JobGoneError, OSError):
                await asyncio.to_thread(self._store.unclaim, job.id, self._epoch)

    async def _end_of(self, running: Running) -> Painted | Failed:
        async with aclosing(self._painter.paint(running.call)) as events:
            async for event in events:
                if not isinstance(event, Stepped):
                    return event
                await self._stepped(running, event)
        raise GroupLostError("the ranks said nothing of a call's end.", cause="failed")

    async def _stepped(self, running: Running, event: Stepped) -> None:
        running.step, running.num_steps, running.step_seconds = event.step, event.num_steps, event.seconds
        previews = event.previews or (b"",) * len(running.jobs)
        for job, preview in zip(running.jobs, previews, strict=True):
            if job.id in running.ended:
                continue
            place = {"step": event.step, "num_steps": event.num_steps}
            self._tell(JobEvent(job=job.id, state=State.RUNNING.value, preview=preview, **place))
        now = time.monotonic()
        if now - running.told_s > NOTE_S and event.num_steps:
            running.told_s = now
            for job in running.owed:
                await self._in_store(self._store.note_progress, job.id, self._epoch, event.step / event.num_steps)

    async def _look_after(self, running: Running) -> None:
        """Ends jobs before their time: the call is stopped where all of its jobs are to end, else it goes on."""
        ids = {job.id for job in running.jobs}
        while True:
            found: dict[str, str] = {}
            try:
                now = {job.id: job for job in await asyncio.to_thread(self._store.running)}
            except OSError as error:
                self._log.error("store", error=str(error))
                now = {}
            for job in (now[name] for name in ids & now.keys()):
                if job.cancel_asked:
                    found[job.id] = "cancelled"
                elif job.deadline_s is not None and time.time() > job.deadline_s:
                    found[job.id] = "deadline"
            self._stop(found)
            await self._end_early(running)
            await asyncio.sleep(LOOK_S)

    async def _end_early(self, running: Running) -> None:
        """Those that are to end, and whose call goes on for others: nobody waits for that."""
        going = [job for job in running.owed if job.id in running.stopping]
        if len(running.stopping) == len(running.jobs):
            return
        for job in going:
            running.ended.add(job.id)
            try:
                await self._end_as(job, running.stopping[job.id], self._seconds(running))
            except StaleError:
                return  # `run` will find it too

    async def _end_as(self, job: Job, why: str, rank_seconds: float) -> None:
        """A running job, cancelled or too late."""
        if why == "cancelled":
            given = {"rank_seconds": rank_seconds, "keep_s": self._keep_s}
            self._told(await self._in_store(self._store.cancelled, job.id, self._epoch, **given))
        else:
            late = JobError(kind="deadline", message="its deadline passed while it was painted.")
            await self._fail(job, late, rank_seconds)

    def _stop(self, found: dict[str, str]) -> None:
        running = self.running
        if running is None or not found:
            return
        before = len(running.stopping)
        running.stopping = {**found, **running.stopping}
        if len(running.stopping) == len(running.jobs) > before:
            self._painter.stop_call(running.call.call, ", ".join(sorted(set(running.stopping.values()))))

    def _seconds(self, running: Running) -> float:
        """Rank-seconds of each of a call's jobs."""
        return (time.monotonic() - running.begun_s) * self._painter.num_ranks / len(running.jobs)

    async def _commit(self, running: Running, painted: Painted, folder: Path) -> None:
        self._painted(running.jobs[0].request.kind, running.call, painted)
        seconds = self._seconds(running)
        receipts = painted.receipts or (painted.receipt,) * len(running.jobs)
        for job, files, receipt in zip(running.jobs, painted.files, receipts, strict=True):
            if job.id in running.ended:
                continue
            if running.stopping.get(job.id) == "cancelled":
                await self._end_as(job, "cancelled", seconds)
            else:
                self._told(await self._kept(job, files, folder, receipt, seconds))

    async def _kept(self, job: Job, files: Sequence[str], folder: Path, receipt: str, seconds: float) -> Job | None:
        """The job with its outputs; failed where these are not what they should be."""
        try:
            own = await self._in_store(self._own_folder, job, files, folder)
            return await self._in_store(
                self._store.commit,
                job.id,
                self._epoch,
                folder=own,
                files=files,
                receipt=receipt,
                rank_seconds=seconds,
                keep_s=self._keep_s,
            )
        except FileError as error:
            self._log.error("outputs", job=job.id, error=str(error))
            wrong = JobError(kind="internal", message="its outputs could not be kept.")
            return await self._in_store(
                self._store.fail, job.id, self._epoch, wrong, rank_seconds=seconds, keep_s=self._keep_s
            )

    def _own_folder(self, job: Job, files: Sequence[str], folder: Path) -> str:
        """Moves a job's files out of the attempt's folder; the name of theirs, which no other attempt has."""
        own = self._results / f"{job.id}.{folder.name}"
        own.mkdir(exist_ok=True)
        for name in files:
            if (folder / name).exists():  # it may be tried again
                (folder / name).rename(own / name)
        return own.name

    async def _failed(self, running: Running, failed: Failed) -> None:
        if failed.details and failed.kind != "stopped":
            self._log.error("call failed", call=failed.call, kind=failed.kind, details=failed.details)
        seconds = self._seconds(running)
        for job in running.owed:
            why = running.stopping.get(job.id)
            if failed.kind != "stopped" and why is None and len(running.jobs) > 1:
                self._alone.add(job.id)  # it may have been another one's fault
                self._told(await self._in_store(self._store.unclaim, job.id, self._epoch))
            elif why in ("cancelled", "deadline"):
                await self._end_as(job, why, seconds)
            elif failed.kind == "stopped" and why in (None, "draining"):
                self._told(await self._in_store(self._store.unclaim, job.id, self._epoch))
            else:
                await self._fail(job, JobError(kind=failed.kind, message=failed.message), seconds)

    async def _fail(self, job: Job, error: JobError, rank_seconds: float = 0.0) -> None:
        after = await self._in_store(
            self._store.fail, job.id, self._epoch, error, rank_seconds=rank_seconds, keep_s=self._keep_s
        )
        self._told(after)

    async def _in_store(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One change of the store, until it is made: what the ranks have done must not be lost to a full disk. Raises
        StaleError. None where it was about a job that is gone: there is nobody to tell."""
        while True:
            try:
                result = await asyncio.to_thread(act, *args, **kwargs)
            except OSError as error:
                await self._faulty(error)
            except JobGoneError:
                return None
            else:
                self.fault = ""
                return result

    async def _faulty(self, error: OSError) -> None:
        self.fault = str(error)
        self._log.error("store", error=self.fault)
        await asyncio.sleep(PATIENCE_S)

    def _told(self, job: Job | None) -> None:
        if job is not None:
            if job.state is not State.RUNNING:
                self._log.info(
                    "job", job=job.id, state=job.state.value, tries=job.tries,
                    rank_seconds=round(job.rank_seconds, 2), error=job.error and job.error.kind,
                )  # fmt: skip
            self._tell(JobEvent(job=job.id, state=job.state.value))


def paint_of(jobs: Sequence[Job], folder: str) -> Paint:
    """The call that paints these jobs, which agree in all but prompts, seeds and numbers of outputs."""
    first = jobs[0].request
    return Paint(
        call=secrets.token_hex(8),
        items=tuple(
            Item(
                job=job.id,
                prompt=job.request.prompt,
                negative_prompt=job.request.negative_prompt,
                seed=job.request.seed,
                num_outputs=job.request.num_outputs,
            )
            for job in jobs
        ),
        settings=first.settings,
        images=first.images,
        coding=first.coding,
        lora=first.lora,
        cache=first.cache,
        previews=max(job.request.previews for job in jobs),
        folder=folder,
        format=first.format,
        frames_per_second=first.frames_per_second,
    )
