"""Tells clients by webhook how their jobs ended: signed (Standard Webhooks), at least once, and to allowed hosts only.

Runs in the supervisor. What is due stands in the store, so that nothing is forgotten when a process ends. An event says
which job ended and how, and nothing of what was asked for: its receiver asks the server, with its key."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx2
import structlog
from standardwebhooks import Webhook

from parafuse.launch.serve.jobs import Job, JobStore, State
from parafuse.launch.serve.outbound import RefusedUrlError, Resolver, UnreachableError, check_url, client_to

TIMEOUT_S = 10.0
"""Of a whole try: from the name to the answer's status."""
WAITS_S = (0.0, 5.0, 30.0, 120.0, 600.0, 3600.0, 4 * 3600.0, 12 * 3600.0)
"""After a job's end: when it is tried. So many tries, and they go on where they were after a restart."""
LOOK_S = 1.0
"""How often the store is asked what is due, where nobody says that a job has ended."""
AT_ONCE = 8
PATIENCE_S = 2.0
"""Before a store is asked again that could not be read."""
GONE = 410
"""A host's word that it wants no more."""
WORDS = {State.DONE: "completed", State.FAILED: "failed", State.CANCELLED: "cancelled"}


def event_id(job: Job) -> str:
    """The same for each try, so that a receiver can tell that it has it already."""
    return f"evt_{job.id}_{job.state.value}"


def event_of(job: Job) -> dict[str, Any]:
    """What is told, as OpenAI's events are. The same for each try."""
    kind = "video" if job.request.kind == "video" else f"image.{'edit' if job.request.kind == 'edit' else 'generation'}"
    return {
        "id": event_id(job),
        "object": "event",
        "created_at": int(job.finished_s or job.created_s),
        "type": f"{kind}.{WORDS[job.state]}",
        "data": {"id": job.id},
    }


def signed(job: Job, secret: str, now_s: float) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a try."""
    body = json.dumps(event_of(job), separators=(",", ":"))
    now = datetime.fromtimestamp(int(now_s), UTC)
    return body.encode(), {
        "content-type": "application/json",
        "user-agent": "parafuse",
        "webhook-id": event_id(job),
        "webhook-timestamp": str(int(now_s)),
        "webhook-signature": Webhook(secret).sign(event_id(job), now, body),
    }


def next_try_s(job: Job, now_s: float) -> float | None:
    """When to try again, Unix seconds; None: no more."""
    ended_s = job.finished_s or job.created_s
    return next((ended_s + wait for wait in WAITS_S if ended_s + wait > now_s), None)


class WebhookSender:
    """Delivers what is due until it is cancelled. One task of the supervisor."""

    def __init__(
        self,
        store: JobStore,
        allowed_hosts: Sequence[str],
        secret_of: Callable[[str], str | None],
        *,
        resolve: Resolver | None = None,
        verify: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """`secret_of`: key's id -> what its webhooks are signed with, `whsec_...`; None: it has none, or is gone."""
        self._store, self._allowed, self._secret_of = store, tuple(allowed_hosts), secret_of
        self._resolve, self._verify, self._clock = resolve, verify, clock
        self._news = asyncio.Event()
        self._log = structlog.get_logger("parafuse.webhooks")
        self.sent = {"delivered": 0, "failed": 0, "given_up": 0}
        """Tries by how they ended, for metrics."""

    def wake(self) -> None:
        """A job has ended."""
        self._news.set()

    async def run(self) -> None:
        """Never returns. A store that cannot be read now is asked again."""
        while True:
            self._news.clear()
            try:
                found = await self.deliver_due()
            except OSError as error:
                self._log.error("store", error=str(error))
                await asyncio.sleep(PATIENCE_S)
                continue
            if not found:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), LOOK_S)

    async def deliver_due(self) -> int:
        """One round: tries what is due now, each once, and writes down what came of it; how many these were."""
        due = await asyncio.to_thread(self._store.due_webhooks, self._clock())
        places = asyncio.Semaphore(AT_ONCE)

        async def one(job: Job) -> None:
            async with places:
                delivered, next_s = await self._try(job)
            await asyncio.to_thread(self._store.webhook_tried, job.id, delivered=delivered, next_s=next_s)

        ended = await asyncio.gather(*(one(job) for job in due), return_exceptions=True)
        for error in ended:  # each of the others has been written down
            if error is not None:
                raise error
        return len(due)

    async def _try(self, job: Job) -> tuple[bool, float | None]:
        """(whether it is delivered, when to try again)."""
        try:
            secret = await asyncio.to_thread(self._secret_of, job.owner)
            if secret is None:
                raise RefusedUrlError("webhook: its key has nothing to sign it with.")
            status = await self._post(job, secret)
            if 200 <= status < 300:
                self.sent["delivered"] += 1
                self._log.info("webhook delivered", job=job.id, status=status)
                return True, None
            why, is_over = f"the host answered {status}", status == GONE
        except RefusedUrlError as error:
            why, is_over = str(error), True
        except TimeoutError:
            why, is_over = f"no answer within {TIMEOUT_S:g} s", False
        except (UnreachableError, httpx2.HTTPError, ssl.SSLError) as error:
            why, is_over = f"{type(error).__name__}: {error}", False
        next_s = None if is_over else next_try_s(job, self._clock())
        self.sent["failed"] += 1
        self.sent["given_up"] += next_s is None
        self._log.warning("webhook failed", job=job.id, error=why, again=next_s is not None)
        return False, next_s

    async def _post(self, job: Job, secret: str) -> int:
        async with asyncio.timeout(TIMEOUT_S):
            target = await check_url(job.webhook or "", self._allowed, "webhook", resolve=self._resolve)
            if self._verify is None:  # reading the certificates takes as long as many tries
                self._verify = await asyncio.to_thread(httpx2.create_ssl_context, trust_env=False)
            body, headers = signed(job, secret, self._clock())
            async with (
                client_to(target, TIMEOUT_S, self._verify) as client,
                client.stream("POST", target.url, content=body, headers=headers) as answer,
            ):
                return answer.status_code  # what else a host answers is not read
