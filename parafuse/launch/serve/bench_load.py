"""The load of a test: what is sent when, whatever the server does, and what became of it."""

from __future__ import annotations

import asyncio
import json
import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from parafuse.errors import ConfigError, reject_unknown
from parafuse.launch.serve.bench_figures import (
    BROKEN,
    CANCELLED,
    DONE,
    FAILED,
    REFUSED,
    UNANSWERED,
    Outcome,
)

HEALTH_EVERY_S = 0.1
HEALTH_TIMEOUT_S = 10.0
LOOK_S = 0.1
"""How often a job that was cancelled is looked at until it has ended."""
BODY = ("prompt", "size", "steps", "guidance", "n", "seed", "priority", "deadline_s", "cache", "lora", "output_format")
OWN = ("name", "weight", "key", "cancel", "cancel_after_s")
ENDED = {"done": DONE, "failed": FAILED, "cancelled": CANCELLED}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Requests that are alike."""

    name: str = "request"
    weight: float = 1.0
    """How often it comes, beside the others."""
    key: int | None = None
    """Line in the file of keys, from 0; None: any, in turn."""
    cancel: float = 0.0
    """The share that is cancelled."""
    cancel_after_s: float = 0.5
    body: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Due:
    """One request, before it is sent."""

    at_s: float
    kind: Kind
    key: int
    seed: int
    is_cancel: bool


def read_mix(path: str, num_keys: int) -> list[Kind]:
    """Kinds of requests from a TOML file of `[[request]]` tables: fields of the API's body, and `name`, `weight`,
    `key`, `cancel`, `cancel_after_s`. Raises ConfigError."""
    try:
        found = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--mix {path!r}: cannot be read ({error}).") from error
    reject_unknown(f"--mix {path}", found, ["request"])
    tables = found.get("request")
    if not isinstance(tables, list) or not tables:
        raise ConfigError(f"--mix {path!r}: must hold [[request]] tables, one for each kind of request.")
    kinds: list[Kind] = []
    for number, table in enumerate(tables):
        where = f"--mix {path}: request {number}"
        reject_unknown(where, table, [*BODY, *OWN])
        own = {name: table[name] for name in OWN if name in table}
        kind = Kind(**{"name": f"request {number}", **own}, body={n: v for n, v in table.items() if n in BODY})
        _check(kind, where, num_keys)
        kinds.append(kind)
    return kinds


def _check(kind: Kind, where: str, num_keys: int) -> None:
    for name, low, high in (("weight", 1e-9, 1e9), ("cancel", 0, 1), ("cancel_after_s", 0, 1e6)):
        value = getattr(kind, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ConfigError(f"{where}: {name}={value!r}: must be a number from {low:g} to {high:g}.")
    if kind.key is not None and kind.key not in range(max(1, num_keys)):
        raise ConfigError(f"{where}: key={kind.key!r}: must be a line of --secrets, from 0 to {max(1, num_keys) - 1}.")


def arrivals(kind: str, rate: float, duration_s: float, *, burst: int, chance: random.Random) -> Iterator[float]:
    """Seconds at which requests come, `rate` a second on average: one by one at random (poisson), or so many at once
    at even distances (bursts)."""
    now = 0.0
    while True:
        now += chance.expovariate(rate) if kind == "poisson" else burst / rate
        if now >= duration_s:
            return
        yield from [now] * (1 if kind == "poisson" else burst)


def planned(times: Iterator[float], kinds: Sequence[Kind], num_keys: int, chance: random.Random) -> list[Due]:
    """The whole load, before it begins: the same for the same seed."""
    found: list[Due] = []
    weights = [kind.weight for kind in kinds]
    for number, at_s in enumerate(times):
        (kind,) = chance.choices(kinds, weights)
        key = number % max(1, num_keys) if kind.key is None else kind.key
        found.append(
            Due(at_s=at_s, kind=kind, key=key, seed=chance.randrange(2**31), is_cancel=chance.random() < kind.cancel)
        )
    return found


class Load:
    """Sends a plan to a server, each request at its time, and asks for its health beside that."""

    def __init__(self, url: str, secrets: Sequence[str], *, patience_s: float):
        """`patience_s`: how long after the last request answers are waited for."""
        self._url, self._secrets, self._patience_s = url.rstrip("/"), list(secrets), patience_s
        self._began = 0.0
        self.outcomes: list[Outcome] = []
        self.health_s: list[float] = []
        """Latencies, from when each was due, of those that were answered well."""
        self.health_failed = 0

    async def run(self, plan: Sequence[Due], duration_s: float) -> None:
        """Until everything has ended, or been given up."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
        timeout = httpx2.Timeout(None, connect=30.0)
        async with (
            httpx2.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as client,
            httpx2.AsyncClient(timeout=HEALTH_TIMEOUT_S, trust_env=False) as other,
        ):
            self._began = asyncio.get_running_loop().time()
            health = asyncio.create_task(self._ask_health(other))
            open_now: list[asyncio.Task[None]] = []
            for due in plan:
                await self._until(due.at_s)
                open_now.append(asyncio.create_task(self._one(client, due)))
            await self._until(duration_s)
            if open_now:
                _, left = await asyncio.wait(open_now, timeout=self._patience_s)
                for task in left:
                    task.cancel()
            health.cancel()
            await asyncio.gather(health, *open_now, return_exceptions=True)
        self.outcomes.sort(key=lambda one: one.due_s)

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self._now()))

    async def _one(self, client: httpx2.AsyncClient, due: Due) -> None:
        sent_s, end = self._now(), UNANSWERED
        told: dict[str, Any] = {}
        try:
            end, told = await (self._cancelled(client, due) if due.is_cancel else self._asked(client, due))
        except httpx2.HTTPError as error:
            end, told = BROKEN, {"code": type(error).__name__}
        except (ValueError, KeyError, TypeError) as error:
            end, told = BROKEN, {"code": f"unreadable: {error}"[:80]}
        finally:
            self.outcomes.append(
                Outcome(
                    kind=due.kind.name, key=f"key {due.key}", end=end, due_s=due.at_s, sent_s=sent_s,
                    ended_s=told.pop("ended_s", self._now()), deadline_s=due.kind.body.get("deadline_s"),
                    is_cancel=due.is_cancel, **told,
                )
            )  # fmt: skip

    async def _asked(self, client: httpx2.AsyncClient, due: Due) -> tuple[str, dict[str, Any]]:
        answer = await self._send(client, due, {"response_format": "url"})
        ended_s = self._now()
        if answer.status_code != 200:
            return _not_done(answer, ended_s)
        job = await client.get(f"{self._url}/v1/jobs/{answer.json()['id']}", headers=self._headers(due))
        times = _times(job.json()) if job.status_code == 200 else {}
        return DONE, {"status": 200, "ended_s": ended_s, **times}

    async def _cancelled(self, client: httpx2.AsyncClient, due: Due) -> tuple[str, dict[str, Any]]:
        """Asks for it in the background, and cancels it a little later."""
        answer = await self._send(client, due, {"background": True})
        if answer.status_code != 202:
            return _not_done(answer, self._now())
        place = f"{self._url}/v1/jobs/{answer.json()['id']}"
        await asyncio.sleep(due.kind.cancel_after_s)
        job = await client.delete(place, headers=self._headers(due))
        while job.status_code == 200 and job.json()["status"] not in ENDED:
            await asyncio.sleep(LOOK_S)
            job = await client.get(place, headers=self._headers(due))
        if job.status_code != 200:
            return _not_done(job, self._now())
        return ENDED[job.json()["status"]], {"status": 200, **_times(job.json())}

    async def _send(self, client: httpx2.AsyncClient, due: Due, more: dict[str, Any]) -> httpx2.Response:
        body = {"prompt": "a red apple", "seed": due.seed, **due.kind.body, **more}
        return await client.post(f"{self._url}/v1/images/generations", json=body, headers=self._headers(due))

    def _headers(self, due: Due) -> dict[str, str]:
        return {"authorization": f"Bearer {self._secrets[due.key]}"} if self._secrets else {}

    async def _ask_health(self, client: httpx2.AsyncClient) -> None:
        """At even times, each from when it was due: one that is slow makes the next ones late too, and they count."""
        number = 0
        while True:
            due_s = number * HEALTH_EVERY_S
            await self._until(due_s)
            try:
                answer = await client.get(f"{self._url}/health/live")
                is_well = answer.status_code == 200
            except httpx2.HTTPError:
                is_well = False
            if is_well:
                self.health_s.append(self._now() - due_s)
            else:
                self.health_failed += 1
            number += 1


def _not_done(answer: httpx2.Response, ended_s: float) -> tuple[str, dict[str, Any]]:
    """What an error's code says: a job that ended otherwise, or one that was never taken."""
    try:
        code = str(answer.json()["error"]["code"])
    except (json.JSONDecodeError, KeyError, TypeError):
        code = ""
    told = {"status": answer.status_code, "code": code, "ended_s": ended_s}
    if code.startswith("job_"):
        return CANCELLED if code == "job_cancelled" else FAILED, told
    return REFUSED if answer.status_code in (413, 429, 503) else BROKEN, told


def _times(job: dict[str, Any]) -> dict[str, float]:
    """Of a job that is over; where it never began, it has waited all the time."""
    created, began, ended = job["created_at"], job.get("started_at"), job["finished_at"]
    found = {"rank_seconds": float(job.get("rank_seconds") or 0.0), "queued_s": (began or ended) - created}
    return found if began is None else found | {"service_s": ended - began}
