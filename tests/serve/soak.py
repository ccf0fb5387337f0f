"""A server under load whose processes are killed and stopped: `python -m tests.serve.soak --minutes 30`.

Clients with four keys ask for pictures all the time, and cancel some. Every now and then one process of the server (a
rank, the supervisor, the HTTP process, the keeper) gets SIGKILL or SIGSTOP; a keeper that died is started again, as
systemd would. At the end: no accepted job is lost or was done twice, at least 90% of those that nobody cancelled are
done, every picture is that of a quiet run (bitwise; with batches, within 1 of 255), and memory stayed flat."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from PIL import Image

from parafuse.launch.serve.keys import make_key
from tests.serve.running_server import RunningServer

PROMPTS = ("a red apple", "a blue car", "a green tree", "a yellow sun", "a cat", "a white cloud")
STEPS = (4, 8)
KINDS = ("rank", "rank", "supervisor", "http", "keeper")
"""Whom a fault meets; ranks twice as often."""
CANCELLED = 0.15
"""Of the jobs."""
LIMIT = 0.9
"""Of the jobs that nobody cancelled: so many must be done."""
GROWTH = 1.25
"""Of the memory of processes that lived through the second half."""
PAUSE_S = 5.0
"""Between two requests of one client, on average."""
BACK_S = 240.0
"""For the server to be ready again, and to have done what it owes, once nothing is done to it any more."""


@dataclass
class Asked:
    """A job as its client knows it."""

    key: str
    case: tuple[str, int, int]
    """Prompt, seed, steps."""
    idempotency: str
    id: str = ""
    wants_cancel: bool = False
    status: str = ""
    digest: str = ""
    wrong: str = ""


@dataclass
class Soak:
    """One run."""

    folder: Path
    seconds: float
    every_s: float
    batch: int
    draw: random.Random
    """For the load."""
    chance: random.Random
    """For the faults: the same for a seed, however the load went."""
    keys: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    quiet: dict[tuple[str, int, int], np.ndarray[Any, Any]] = field(default_factory=dict)
    restart_s: dict[str, float] = field(default_factory=dict)
    """Of a rank that is killed while nothing else happens."""
    memory: list[tuple[float, str, int, int]] = field(default_factory=list)
    """(when, kind, pid, resident bytes)."""

    def server(self) -> RunningServer:
        lines: list[str] = []
        for number in range(4):
            secret, line = make_key(f"client{number}")
            self.keys.append(secret)
            lines.append(line)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "keys"
        file.write_text("\n".join(lines) + "\n")
        file.chmod(0o600)
        return RunningServer(self.folder, "--keys", str(file), "--batch", str(self.batch), "--probe", "10")

    async def run(self, server: RunningServer) -> None:
        """Quiet pictures first, then load and faults, then what is owed."""
        server.start()
        await asyncio.to_thread(server.until_ready)
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:
            await self._quiet_run(client)
            self.restart_s = await asyncio.to_thread(restart_s, server)
            told(f"a rank was killed while nothing ran: {self.restart_s}")
            end = time.monotonic() + self.seconds
            loads = [self._client(client, key, end) for key in self.keys]
            await asyncio.gather(self._break(server, end), self._look(server, end), *loads)
            told(f"load is over: {len(self.asked)} jobs, faults {dict(self.faults)}; waiting for what is owed")
            await asyncio.to_thread(restarted, server)
            await asyncio.to_thread(server.until, lambda: server.health()[0] == 200, BACK_S)
            await asyncio.gather(*(self._settle(client, job) for job in self.asked))

    async def _quiet_run(self, client: httpx2.AsyncClient) -> None:
        for number, prompt in enumerate(PROMPTS):
            for steps in STEPS:
                job = Asked(self.keys[0], (prompt, 100 + number, steps), f"quiet-{prompt}-{steps}")
                await self._ask(client, job)
                await self._settle(client, job)
                assert job.status == "done", job
                self.quiet[job.case] = await self._picture(client, job)

    async def _client(self, client: httpx2.AsyncClient, key: str, end: float) -> None:
        """Asks for one picture after the other, a few at a time, and waits for none of them for long."""
        number = 0
        while time.monotonic() < end:
            number += 1
            case = self.draw.choice(list(self.quiet))
            job = Asked(key, case, f"{key[-6:]}-{number}", wants_cancel=self.draw.random() < CANCELLED)
            if await self._ask(client, job, end):
                self.asked.append(job)
                if job.wants_cancel:
                    await asyncio.sleep(self.draw.random() * 2)
                    with contextlib.suppress(httpx2.HTTPError):
                        await client.delete(f"/v1/jobs/{job.id}", headers=bearer(key))
            await asyncio.sleep(self.draw.expovariate(1 / PAUSE_S))

    async def _ask(self, client: httpx2.AsyncClient, job: Asked, end: float = float("inf")) -> bool:
        """Until the server has said yes or no: with the same idempotency key, so that nothing is asked for twice."""
        prompt, seed, steps = job.case
        body = {"prompt": prompt, "seed": seed, "steps": steps, "background": True}
        while True:
            try:
                answer = await client.post(
                    "/v1/images/generations", json=body, headers=bearer(job.key) | {"Idempotency-Key": job.idempotency}
                )
            except httpx2.HTTPError:
                await asyncio.sleep(0.3)
                if time.monotonic() > end + BACK_S:
                    return False
                continue
            if answer.status_code == 202:
                job.id = answer.json()["id"]
                return True
            self.refused[answer.status_code] += 1
            assert answer.status_code in (429, 503), answer.text
            return False

    async def _settle(self, client: httpx2.AsyncClient, job: Asked) -> None:
        deadline = time.monotonic() + BACK_S + 2 * len(self.asked)
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx2.HTTPError):
                answer = await client.get(f"/v1/jobs/{job.id}", headers=bearer(job.key))
                if answer.status_code == 404:
                    job.wrong = "lost"
                    return
                if answer.status_code == 200:
                    job.status = answer.json()["status"]
                    if job.status in ("done", "failed", "cancelled"):
                        break
            await asyncio.sleep(0.5)
        else:
            job.wrong = f"never ended ({job.status})"
            return
        if job.status == "done" and self.quiet.get(job.case) is not None:
            found = await self._picture(client, job)
            apart = int(np.abs(found - self.quiet[job.case]).max())
            if apart > (1 if self.batch > 1 else 0):
                job.wrong = f"another picture, {apart} of 255 apart"

    async def _picture(self, client: httpx2.AsyncClient, job: Asked) -> np.ndarray[Any, Any]:
        answer = await client.get(f"/v1/files/{job.id}/0", headers=bearer(job.key))
        answer.raise_for_status()
        job.digest = hashlib.sha256(answer.content).hexdigest()
        return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"), dtype=np.int16)

    async def _break(self, server: RunningServer, end: float) -> None:
        while True:
            await asyncio.sleep(min(self.chance.expovariate(1 / self.every_s), 3 * self.every_s))
            if time.monotonic() > end:
                return
            kind, number = self.chance.choice(KINDS), self.chance.choice((signal.SIGKILL, signal.SIGSTOP))
            which = self.chance.random()  # as many draws for each fault, whatever there is
            there = server.processes(kind)
            if not there:
                continue
            one, pids = there[int(which * len(there))], server.pids()
            told(f"{number.name} to {kind} {one.pid}")
            self.faults[f"{kind} {number.name}"] += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, number)
            if kind == "keeper":  # what systemd's watchdog does
                await asyncio.sleep(2.0)
                await asyncio.to_thread(restarted, server, pids)

    async def _look(self, server: RunningServer, end: float) -> None:
        while time.monotonic() < end:
            for kind in ("keeper", "supervisor", "http", "rank"):
                for one in server.processes(kind):
                    with contextlib.suppress(psutil.Error):
                        self.memory.append((time.monotonic(), kind, one.pid, one.memory_info().rss))
            await asyncio.sleep(5.0)

    def judge(self) -> dict[str, Any]:
        """What came out, and `faults_found`: empty where all is well."""
        wrong = [f"{job.id}: {job.wrong}" for job in self.asked if job.wrong]
        kept = [job for job in self.asked if not job.wants_cancel]
        done = sum(job.status == "done" for job in kept)
        if len({job.id for job in self.asked}) != len(self.asked):
            wrong.append("two requests were given one job")
        if kept and done < LIMIT * len(kept):
            wrong.append(f"only {done} of {len(kept)} jobs that nobody cancelled are done")
        wrong += self._stored()
        grown = self._grown()
        wrong += [f"{name} grew to {ratio:.2f} of its size" for name, ratio in grown.items() if ratio > GROWTH]
        return {
            "minutes": self.seconds / 60,
            "fault_every_s": self.every_s,
            "batch": self.batch,
            "jobs": len(self.asked),
            "ended": dict(Counter(job.status for job in self.asked)),
            "not_cancelled_by_clients": len(kept),
            "of_these_done": done,
            "restart_s": self.restart_s,
            "refused": {str(status): number for status, number in self.refused.items()},
            "faults": dict(self.faults),
            "memory_growth": {name: round(ratio, 3) for name, ratio in grown.items()},
            "faults_found": wrong,
        }

    def _stored(self) -> list[str]:
        """What the database says: each job that was accepted is in it once, and over."""
        at = sqlite3.connect(f"file:{self.folder / 'state' / 'jobs.sqlite'}?mode=ro", uri=True)
        with contextlib.closing(at):
            stored = dict(at.execute("SELECT id, state FROM jobs").fetchall())
        missing = [job.id for job in self.asked if job.id not in stored]
        unknown = stored.keys() - {job.id for job in self.asked}
        found = [f"{name}: accepted, and not in the store" for name in missing]
        if len(unknown) > len(self.quiet):  # those of the quiet run
            found.append(f"{len(unknown) - len(self.quiet)} jobs that nobody asked for")
        return found

    def _grown(self) -> dict[str, float]:
        """Kind -> largest ratio of a process's memory at its end to that a minute after its first steps."""
        found: dict[str, float] = {}
        for pid in {pid for _, _, pid, _ in self.memory}:
            rows = [(when, kind, rss) for when, kind, one, rss in self.memory if one == pid]
            if rows[-1][0] - rows[0][0] < 120:
                continue
            settled = next(rss for when, _, rss in rows if when - rows[0][0] >= 60)
            kind = rows[0][1]
            found[kind] = max(found.get(kind, 0.0), rows[-1][2] / settled)
        return found


def restart_s(server: RunningServer) -> dict[str, float]:
    """Seconds until /health/ready says that a rank is gone, and until a real step has run again on all of them."""
    begun = time.monotonic()
    os.kill(server.processes("rank")[0].pid, signal.SIGKILL)
    found: dict[str, float] = {}
    for name, is_so in (("noticed", lambda: server.health()[0] != 200), ("ready", lambda: server.health()[0] == 200)):
        while not is_so():
            time.sleep(0.02)
        found[name] = round(time.monotonic() - begun, 2)
    return found


def restarted(server: RunningServer, pids: Collection[int] = ()) -> None:
    """What systemd does for a keeper that is dead or stopped: all of its processes (`pids`) end before the next one."""
    keepers = server.processes("keeper")
    if keepers and keepers[0].status() != psutil.STATUS_STOPPED:
        return
    pids = pids or server.pids()
    server.kill()
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    server.start()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def told(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two faults, on average")
    parser.add_argument("--batch", type=int, default=1, help="jobs in one call at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", help="JSON file to write what came out to")
    asked = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="parafuse-soak-"))
    draw, chance = random.Random(asked.seed), random.Random(f"{asked.seed} faults")
    soak = Soak(folder, asked.minutes * 60, asked.every, asked.batch, draw, chance)
    server = soak.server()
    try:
        asyncio.run(soak.run(server))
        result = soak.judge()
    finally:
        server.kill()
    text = json.dumps(result, indent=2)
    print(text)
    if asked.record:
        Path(asked.record).write_text(text + "\n")
    if result["faults_found"]:
        print(f"the server's log and state are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
