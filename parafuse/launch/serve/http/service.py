"""What the routes of the HTTP process share: jobs are taken, waited for and cancelled here. Nothing blocks the loop."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
import msgspec
import structlog
from fastapi import Request
from pydantic import BaseModel

from parafuse.launch.serve.admission import Refusal
from parafuse.launch.serve.card import ModelCard
from parafuse.launch.serve.folders import Folders
from parafuse.launch.serve.http import errors
from parafuse.launch.serve.http.access import Keys
from parafuse.launch.serve.http.errors import ApiError
from parafuse.launch.serve.http.metrics import Metrics
from parafuse.launch.serve.http.painting import Painting
from parafuse.launch.serve.http.wire import Common
from parafuse.launch.serve.jobs import Job, JobRequest, JobStore, QueueFullError, State, new_id
from parafuse.launch.serve.keys import Key
from parafuse.launch.serve.messages import CallTimes, Estimated, JobEvent, Status
from parafuse.launch.serve.outbound import check_place
from parafuse.launch.serve.settings import Serving
from parafuse.launch.serve.supervisor_client import SupervisorClient

LOOK_S = 1.0
"""How often the store is looked at for a job that is waited for, in case an event was lost."""
STORE_THREADS = 8
FILE_THREADS = 4
IDEMPOTENCY_CHARACTERS = 200
Result = TypeVar("Result")


class Admit(Protocol):
    """Whether a job is taken now. Called in a thread: it may ask the store."""

    def __call__(self, job: Job, key: Key, status: Status | None, estimated: Estimated | None) -> Refusal | None: ...


class Wishes(Protocol):
    """What of a request is about its job."""

    @property
    def priority(self) -> int | None: ...

    @property
    def deadline_s(self) -> float | None: ...

    @property
    def webhook_url(self) -> str | None: ...


class Service:
    """Everything of one server that routes need."""

    def __init__(
        self,
        settings: Serving,
        card: ModelCard,
        store: JobStore,
        *,
        keys: Keys,
        supervisor: SupervisorClient,
        admit: Admit,
    ):
        self.settings, self.card, self.store, self.keys = settings, card, store, keys
        self.supervisor, self.admit = supervisor, admit
        self.painting = Painting(settings, card)
        self.folders = Folders(settings.results, settings.inputs)
        self.metrics = Metrics(lambda: (supervisor.status, supervisor.status_age_s))
        self.draining = False
        """The process is ending: what waits in the queue is left to the next one."""
        self._store_threads = anyio.CapacityLimiter(STORE_THREADS)
        self._file_threads = anyio.CapacityLimiter(FILE_THREADS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("parafuse.http")
        supervisor.listen(self._heard)

    async def stored(self, act: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """A call of the store, in a thread."""
        return await anyio.to_thread.run_sync(lambda: act(*args, **kwargs), limiter=self._store_threads)

    async def worked(self, act: Callable[..., Result], *args: Any) -> Result:
        """Work with files and pictures, in a thread of others, so that the store is never waited for because of it."""
        return await anyio.to_thread.run_sync(act, *args, limiter=self._file_threads)

    async def loras(self, body: Common) -> list[str] | None:
        """Names that there are, where a request has one."""
        return await self.worked(self.card.lora_names) if body.lora else None

    async def submit(self, request: Request, body: Wishes, wanted: JobRequest, *, digest: str) -> Job:
        """Stores a new job, or finds the one that this idempotency key has made. `digest`: of all that was asked.
        Raises ApiError (400, 409, 413, 429, 503)."""
        owner: Key = request.scope["parafuse.owner"]
        inputs = [name for names in wanted.images.values() for name in names]
        try:
            job = self._job(request, owner, body, wanted)
            in_time = job.deadline_s is not None or owner.rank_seconds_per_day is not None
            estimated = await self.supervisor.estimate(wanted, needs_seconds=in_time)
            refusal = await self.stored(self.admit, job, owner, self.supervisor.status, estimated)
            accepted = await self._accept(job, owner, refusal, digest)
        except BaseException:
            await self.forget(inputs)
            raise
        request.scope["parafuse.job"] = accepted.id
        if accepted.id != job.id:
            await self.forget(inputs)
        self.supervisor.wake()
        return accepted

    def _job(self, request: Request, owner: Key, body: Wishes, wanted: JobRequest) -> Job:
        idempotency = request.headers.get("idempotency-key")
        if idempotency is not None and not 0 < len(idempotency) <= IDEMPOTENCY_CHARACTERS:
            raise errors.invalid("Idempotency-Key", f"must have 1 to {IDEMPOTENCY_CHARACTERS} characters.")
        if body.priority is not None and body.priority > owner.priority_max:
            raise errors.invalid("priority", f"must be at most {owner.priority_max} with this key.")
        if body.webhook_url is not None:
            if not owner.webhooks:
                raise errors.invalid("webhook_url", "this key may not name webhooks.")
            check_place(body.webhook_url, self.settings.webhook_hosts, "webhook_url")
        now_s = time.time()
        after_s = body.deadline_s if body.deadline_s is not None else self.settings.deadline_s
        return Job(
            id=new_id(wanted.kind),
            owner=owner.id,
            request=wanted,
            priority=min(body.priority or 0, owner.priority_max),
            created_s=now_s,
            deadline_s=None if after_s is None else now_s + after_s,
            idempotency_key=idempotency,
            webhook=body.webhook_url,
        )

    async def _accept(self, job: Job, owner: Key, refusal: Refusal | None, digest: str) -> Job:
        refused = None if refusal is None else self._refused(refusal)
        if self.draining:
            refused = errors.unavailable("This server is ending; ask again.", code="draining")
        if refused is not None and job.idempotency_key is None:
            raise refused
        # with no room at all, what an idempotency key has made is still found
        most = self.settings.max_queued if refused is None else 0
        of_key = self.settings.max_queued_of_key if owner.max_queued is None else owner.max_queued
        try:
            return await self.stored(
                self.store.accept, job, request_hash=digest, max_queued=most, max_queued_of_key=of_key
            )
        except QueueFullError as error:
            self.metrics.refused("queue_full")
            raise refused or error from error

    def _refused(self, refusal: Refusal) -> ApiError:
        code = refusal.code or {413: "too_large", 429: "rate_limited"}.get(refusal.status, "unavailable")
        self.metrics.refused(code)
        headers = errors.NO_RETRY if refusal.retry_after_s is None else errors.retry_after(refusal.retry_after_s)
        extra = {} if refusal.estimate_s is None else {"estimate_s": round(refusal.estimate_s, 3)}
        return ApiError(refusal.status, refusal.message, code=code, headers=headers, extra=extra)

    async def forget(self, inputs: list[str]) -> None:
        """Pictures of a request that makes no job."""
        if inputs:
            with anyio.CancelScope(shield=True):  # a thread may still be storing the job, and then it has them
                await self.stored(self.store.discard_inputs, inputs)

    async def find(self, request: Request, name: str, what: str = "job", kind: str | None = None) -> Job:
        """A job of the key that asks. Raises ApiError (404)."""
        request.scope["parafuse.job"] = name[:80]
        owner: Key = request.scope["parafuse.owner"]
        job = await self.stored(self.store.get, name, owner.id) if len(name) <= 80 else None
        if job is None or (kind is not None and job.request.kind != kind):
            raise errors.missing(what, name)
        return job

    async def follow(self, job: Job) -> AsyncIterator[JobEvent | Job | None]:
        """Its events, None every second without one, and last the job that is over. To be closed by whoever asks.
        Raises ApiError where it was deleted, or waits while this process ends."""
        with self.supervisor.watch(job.id) as watch:
            while True:
                now = await self.stored(self.store.get, job.id, job.owner)
                if now is None:
                    raise errors.missing("job", job.id)
                if now.state.is_over:
                    yield now
                    return
                if self.draining and now.state is State.QUEUED:
                    raise ApiError(503, f"This server is ending; job {job.id} is stored, and done by the next one.",
                                   code="draining", extra={"job": job.id})  # fmt: skip
                until_s = time.monotonic() + LOOK_S
                while (event := await watch.next(until_s - time.monotonic())) is not None:
                    if State(event.state).is_over:
                        break
                    yield event
                else:
                    yield None

    async def ended(self, job: Job) -> Job:
        """The job, once it is over."""
        async with aclosing(self.follow(job)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Job):
                    return event
        raise errors.missing("job", job.id)

    async def over_within(self, job: Job, seconds: float) -> None:
        """Waits for its end, and no longer than that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.ended(job)

    async def cancel(self, job: Job) -> Job | None:
        """Asks for its end. Done also where the caller is being cancelled itself."""
        with anyio.CancelScope(shield=True):
            after = await self.stored(self.store.ask_cancel, job.id, job.owner)
            self.supervisor.wake()
            if after is not None and after.state is State.CANCELLED and not job.state.is_over:
                self.metrics.ended(after)  # in the queue: the supervisor has nothing to say of it
            return after

    async def left_by(self, job: Job) -> None:
        """The client that waited for it is gone. A job with an idempotency key goes on: it will be asked for again."""
        if job.idempotency_key is None and not self.draining:
            await self.cancel(job)

    def output(self, job: Job, index: int) -> Path:
        """Where one of its outputs lies. Raises ApiError (404)."""
        if not 0 <= index < len(job.files):
            raise errors.missing("file", f"{job.id}/{index}")
        return self.folders.output(job.folder, job.files[index])

    def _heard(self, event: JobEvent | CallTimes) -> None:
        if isinstance(event, CallTimes):
            self.metrics.called(event)
        elif State(event.state).is_over:
            task = asyncio.ensure_future(self._count(event.job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _count(self, job: str) -> None:
        try:
            found = await self.stored(self.store.get, job)
        except Exception as error:
            self._log.warning("not counted", job=job, error=type(error).__name__)
            return
        if found is not None and found.state.is_over:
            self.metrics.ended(found)


def digest_of(kind: str, body: BaseModel, pictures: dict[str, list[str]] | None = None) -> str:
    """Of all that a request asked for, whatever the order of its fields. `pictures`: hashes of what it brought."""
    said = {name: value for name, value in body.model_dump().items() if value is not None}
    return hashlib.sha256(msgspec.json.encode([kind, said, pictures or {}], order="deterministic")).hexdigest()
