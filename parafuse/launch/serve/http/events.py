"""Server-sent events of jobs: progress, pictures of what is being painted, and how it ended."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import anyio
import msgspec
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from starlette.types import Receive, Scope, Send

from parafuse.launch.serve.http import answers
from parafuse.launch.serve.http.errors import ApiError, as_api_error, cancelled, of_job
from parafuse.launch.serve.http.service import Service
from parafuse.launch.serve.jobs import Job, State
from parafuse.launch.serve.messages import JobEvent

PING_S = 15.0
"""A comment goes out after so many silent seconds, so that nothing between here and the client closes the line."""
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""OpenAI's clients expect it; nothing here is counted in tokens."""


class EventStream(StreamingResponse):
    """An answer of events. `close` is awaited at its end, however it came, also where it never began."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], Awaitable[None]] | None = None):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await cast("AsyncGenerator[bytes]", self._events).aclose()
                if self._close is not None:
                    await self._close()


def event(name: str, data: dict[str, Any], number: int | None = None) -> bytes:
    text = json.dumps(data, separators=(",", ":"))
    return format_sse_event(event=name, data_str=text, id=None if number is None else str(number))


def picture_event(name: str, data: dict[str, Any]) -> bytes:
    """The same for data that hold a picture, without a number: of 12 MB in 20 ms, where `event` takes 170."""
    return b"".join((b"event: ", name.encode(), b"\ndata: ", msgspec.json.encode(data), b"\n\n"))


class PictureEvents:
    """Of a request for pictures with stream, as OpenAI's client reads them. A client that leaves cancels its job."""

    def __init__(self, service: Service, job: Job):
        self._service, self._job, self._is_over = service, job, False
        self._about = "image_edit" if job.request.kind == "edit" else "image_generation"

    def answer(self) -> EventStream:
        return EventStream(self._events(), self._close)

    async def _close(self) -> None:
        if not self._is_over:
            await self._service.left_by(self._job)

    async def _events(self) -> AsyncIterator[bytes]:
        job, about, shown = self._job, self._about, 0
        try:
            async with aclosing(_with_pings(self._service, job)) as found:  # type: ignore[type-var]
                async for one in found:
                    if isinstance(one, bytes):
                        yield one
                    elif isinstance(one, Job):
                        self._is_over = True
                        async for end in _ends(self._service, one, about):
                            yield end
                    else:
                        yield event(f"{about}.progress", progress_of(one) | {"type": f"{about}.progress"})
                        if one.preview and shown < job.request.previews:
                            yield picture_event(f"{about}.partial_image", _partial(job, one, about, shown))
                            shown += 1
        except Exception as error:  # the answer has begun: what is wrong can be told as an event alone
            yield event("error", as_api_error(error).body)


def _partial(job: Job, told: JobEvent, about: str, index: int) -> dict[str, Any]:
    return answers.image_event(
        job,
        about=f"{about}.partial_image",
        b64=base64.b64encode(told.preview).decode("ascii"),
        created_s=time.time(),
        form="png",
        partial_image_index=index,
    )


async def _ends(service: Service, job: Job, about: str) -> AsyncIterator[bytes]:
    if job.state is not State.DONE:
        error = cancelled(job.id) if job.state is State.CANCELLED else of_job(job.id, job.error)
        yield event("error", error.body)
        return
    for index in range(len(job.files)):
        yield await service.worked(_completed, job, service.output(job, index), about, index)


def _completed(job: Job, file: Path, about: str, index: int) -> bytes:
    """The whole event, encoded. Blocks: pictures of megabytes would hold up the loop."""
    told = answers.image_event(
        job,
        about=f"{about}.completed",
        b64=answers.as_base64(file),
        created_s=job.finished_s or time.time(),
        form=job.request.format,
        image_index=index,
        seed=job.request.seed + index,
        usage=USAGE,
    )
    return picture_event(f"{about}.completed", told)


async def job_events(service: Service, job: Job, base: str) -> AsyncIterator[bytes]:
    """Of any job, from where it is now to its end; its end alone where it is over. Leaving changes nothing."""
    number = 0
    try:
        async with aclosing(_with_pings(service, job)) as found:  # type: ignore[type-var]
            async for one in found:
                number += 1
                if isinstance(one, bytes):
                    yield one
                elif isinstance(one, Job):
                    yield event(one.state.value, answers.job_object(one, base), number)
                else:
                    yield event("progress", progress_of(one), number)
                    if one.preview and job.request.previews:
                        told = {"id": job.id, "b64_json": base64.b64encode(one.preview).decode("ascii")}
                        yield event("preview", told | {"output_format": "png", "step": one.step}, number)
    except ApiError as error:
        yield event("error", error.body)


def progress_of(told: JobEvent) -> dict[str, Any]:
    return {
        "id": told.job,
        "status": told.state,
        "step": told.step,
        "steps": told.num_steps,
        "created_at": int(time.time()),
    }


async def _with_pings(service: Service, job: Job) -> AsyncIterator[JobEvent | Job | bytes]:
    """Its events, and comments where there are none for a while; one at once, so that the client sees an answer."""
    yield format_sse_event(comment=f"job {job.id}")
    said_s = time.monotonic()
    async with aclosing(service.follow(job)) as found:  # type: ignore[type-var]
        async for one in found:
            if one is not None:
                yield one
            elif time.monotonic() - said_s > PING_S:
                yield format_sse_event(comment="waiting")
            else:
                continue
            said_s = time.monotonic()
