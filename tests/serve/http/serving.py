"""A real server on a loopback port in a thread, with a supervisor that paints small pictures without a model."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import uvicorn
from PIL import Image

from parafuse.launch.serve.card import ModelCard, card_of
from parafuse.launch.serve.clients import Clients
from parafuse.launch.serve.http.admitting import Admission
from parafuse.launch.serve.http.app import make_app
from parafuse.launch.serve.http.limits import BODY_S
from parafuse.launch.serve.http.process import config_of
from parafuse.launch.serve.http.protocol import BoundedProtocol
from parafuse.launch.serve.jobs import Job, JobError, State
from parafuse.launch.serve.keys import Keys, make_key
from parafuse.launch.serve.messages import (
    CallTimes,
    Estimate,
    Estimated,
    Failed,
    JobEvent,
    Painted,
    RankStatus,
    Status,
)
from parafuse.launch.serve.settings import Serving
from parafuse.launch.serve.sqlite_store import SqliteStore
from parafuse.launch.serve.supervisor_client import SupervisorClient

KEEP_S = 3600.0
PATIENCE_S = 30.0


def png(size: tuple[int, int] = (16, 16), colour: Any = (200, 30, 30), mode: str = "RGB", form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, form)
    return out.getvalue()


def output(form: str, size: tuple[int, int], colour: Any) -> bytes:
    """What a rank writes: of a tensor, zeros."""
    if form == "mp4":
        return b"\0\0\0\x18ftypmp42"
    if form != "safetensors":
        return png(size, colour, form=form)
    header = json.dumps({"tensor": {"dtype": "U8", "shape": [1, 2, 2, 3], "data_offsets": [0, 12]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(12)


HEARD_S = 3.0
"""How long a job with previews waits for somebody who hears of them."""


@dataclass
class Behaviour:
    """What the supervisor does with jobs; tests change it while it runs."""

    steps: int = 4
    hold: bool = False
    """Jobs run, and do not end."""
    claim: bool = True
    """False: jobs stay queued (see `Running.pause`)."""
    paused: bool = False
    gate: int | None = None
    """Steps are made as far as this one, for as long as it stays so."""
    call: tuple[int, int, float] | None = None
    """What Status says of a running call: step, steps, seconds left."""
    tell: bool = True
    """False: no events, as if all were lost."""
    fail: JobError | None = None
    state: str = "ready"
    step_age_s: float = 1.0
    silent: bool = False
    """No Status."""
    seconds: float | None = 0.05
    peak_bytes: int | None = None
    painted: list[Job] = field(default_factory=list)
    ranks: Callable[[Job, Path], Painted | Failed] | None = None
    """What paints in place of pictures of one colour, in a thread: into a folder."""


class FakeSupervisor:
    """Takes jobs from the store in the order of the queue, and writes pictures of one colour."""

    def __init__(
        self, path: str, store: SqliteStore, results: Path, behaviour: Behaviour, watched: Callable[[str], bool]
    ):
        """`watched`: whether anybody hears of a job's events."""
        self.watched = watched
        self.store, self.results, self.behaviour = store, results, behaviour
        self.news = asyncio.Event()
        self.clients = Clients(path, wake=self.news.set, estimate=self.estimate)

    async def estimate(self, asked: Estimate) -> Estimated:
        now = self.behaviour
        return Estimated(
            number=asked.number, seconds=now.seconds, peak_bytes=now.peak_bytes, capacity_bytes=10**9, source="measured"
        )

    async def run(self) -> None:
        await self.clients.start()
        epoch = await asyncio.to_thread(self.store.begin_epoch)
        beats = asyncio.create_task(self.beat())
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), 0.2)
                self.news.clear()
                self.behaviour.paused = not self.behaviour.claim
                if self.behaviour.paused:
                    continue
                queued = await asyncio.to_thread(self.store.queued)
                for job in await asyncio.to_thread(self.store.claim, [job.id for job in queued], epoch):
                    await self.paint(job, epoch)
        finally:
            beats.cancel()
            await self.clients.close()

    async def beat(self) -> None:
        while True:
            rank = RankStatus(
                rank=0, pid=1, phase="idle", beat_age_s=0.1, last_step_age_s=self.behaviour.step_age_s,
                memory_bytes=5, peak_bytes=7,
            )  # fmt: skip
            if not self.behaviour.silent:
                step, steps, left_s = self.behaviour.call or (0, 0, 0.0)
                status = Status(
                    call="c" if steps else "", step=step, num_steps=steps, call_left_s=left_s,
                    state=self.behaviour.state, why="" if self.behaviour.state == "ready" else "being tested",
                    ranks=(rank,), restarts={"died": 2}, totals={"steps": 12.0, "cache_hits": 3.0},
                )  # fmt: skip
                self.clients.tell(status)
            await asyncio.sleep(0.1)

    async def is_to_end(self, job: Job) -> bool:
        found = await asyncio.to_thread(self.store.get, job.id)
        return found is None or found.cancel_asked

    def say(self, event: JobEvent | CallTimes) -> None:
        if self.behaviour.tell:
            self.clients.tell(event)

    async def paint(self, job: Job, epoch: int) -> None:
        now, request = self.behaviour, job.request
        now.painted.append(job)
        heard_s = time.monotonic() + HEARD_S
        while request.previews and not self.watched(job.id) and time.monotonic() < heard_s:
            await asyncio.sleep(0.01)  # what comes before is lost, as a server's is
        shown = {round(now.steps * (i + 1) / (request.previews + 1)) for i in range(request.previews)}
        for step in range(1, now.steps + 1):
            while now.gate is not None and step > now.gate and not await self.is_to_end(job):
                await asyncio.sleep(0.02)
            preview = png((8, 8)) if step in shown else b""
            self.say(JobEvent(job=job.id, state="running", step=step, num_steps=now.steps, preview=preview))
        while now.hold or (found := await asyncio.to_thread(self.store.get, job.id)) is None or found.cancel_asked:
            found = await asyncio.to_thread(self.store.get, job.id)
            if found is None or found.cancel_asked:
                await asyncio.to_thread(self.store.cancelled, job.id, epoch, rank_seconds=0.5, keep_s=KEEP_S)
                self.say(JobEvent(job=job.id, state="cancelled"))
                return
            await asyncio.sleep(0.02)
        if now.fail is not None:
            await asyncio.to_thread(self.store.fail, job.id, epoch, now.fail, rank_seconds=0.5, keep_s=KEEP_S)
            self.say(JobEvent(job=job.id, state="failed"))
            return
        folder = self.results / f"try-{secrets.token_hex(8)}"
        folder.mkdir()
        if now.ranks is not None:
            await self.end(job, epoch, folder.name, await asyncio.to_thread(now.ranks, job, folder))
            return
        size = (request.settings.get("width", 16), request.settings.get("height", 16))
        files = [f"{index}.{request.format}" for index in range(request.num_outputs)]
        for index, name in enumerate(files):
            (folder / name).write_bytes(output(request.format, size, (index, 0, 0)))
        await asyncio.to_thread(
            self.store.commit, job.id, epoch, folder=folder.name, files=files,
            receipt=f'{{"prompt": "{request.prompt}"}}', rank_seconds=0.5, keep_s=KEEP_S,
        )  # fmt: skip
        self.say(CallTimes(kind=job.request.kind, phases_s={"denoising": 2.0, "total": 3.0}))
        self.say(JobEvent(job=job.id, state="done"))

    async def end(self, job: Job, epoch: int, folder: str, said: Painted | Failed) -> None:
        if isinstance(said, Failed):
            error = JobError(kind=said.kind, message=said.message)
            await asyncio.to_thread(self.store.fail, job.id, epoch, error, rank_seconds=0.5, keep_s=KEEP_S)
        else:
            await asyncio.to_thread(
                self.store.commit, job.id, epoch, folder=folder, files=said.files[0], receipt=said.receipt,
                rank_seconds=0.5, keep_s=KEEP_S,
            )  # fmt: skip
        self.say(JobEvent(job=job.id, state="failed" if isinstance(said, Failed) else "done"))


@dataclass
class Running:
    """A server that runs."""

    port: int
    secrets: list[str]
    behaviour: Behaviour
    store: SqliteStore
    settings: Serving
    app: Any

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, which: int = 0, **kwargs: Any) -> openai.OpenAI:
        kwargs = {"max_retries": 0, "timeout": PATIENCE_S} | kwargs
        return openai.OpenAI(base_url=f"{self.base}/v1", api_key=self.secrets[which], **kwargs)

    def http(self, which: int | None = 0) -> httpx2.Client:
        headers = {} if which is None else {"authorization": f"Bearer {self.secrets[which]}"}
        return httpx2.Client(base_url=self.base, headers=headers, timeout=PATIENCE_S, trust_env=False)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def pause(self) -> None:
        """From now on jobs stay queued."""
        self.behaviour.claim = False
        until(lambda: self.behaviour.paused)

    def wait(self, job: str, *states: State) -> Job:
        return until(lambda: (found := self.store.get(job)) is not None and found.state in states and found)


def until(look: Callable[[], Any]) -> Any:
    """What `look` gives once it gives something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def serving(
    card: ModelCard | str = "emoji",
    *,
    num_keys: int = 2,
    limits: dict[str, Any] | None = None,
    body_s: float = BODY_S,
    protocol: type[BoundedProtocol] = BoundedProtocol,
    **settings: Any,
) -> Iterator[Running]:
    """A server of a model. `num_keys` 0: without keys. `limits`: of the first key."""
    with tempfile.TemporaryDirectory(prefix="pf-") as folder:
        serve = Serving(state=folder, **settings)
        made = [make_key(f"key{index}", webhooks=True, metrics=index == 0) for index in range(num_keys)]
        lines = [line for _, line in made]
        environ = {"PARAFUSE_API_KEYS": "\n".join(with_limits(lines, limits or {}))} if lines else {}
        keys = Keys.load(None, environ)
        store = SqliteStore(serve.database, serve.results, serve.inputs)
        supervisor = SupervisorClient(f"{folder}/s")
        found = card_of(card, loras=serve.loras, names=serve.served_model_name) if isinstance(card, str) else card
        app = make_app(
            serve, found, store=store, keys=keys, supervisor=supervisor, body_s=body_s,
            admit=Admission(serve, store, lambda: supervisor.not_ready_s),
        )  # fmt: skip
        behaviour = Behaviour()
        door = socket.create_server(("127.0.0.1", 0), backlog=512)
        config = config_of(app)
        config.http = protocol
        server = uvicorn.Server(config)

        def heard(job: str) -> bool:
            return job in supervisor._watches

        async def run() -> None:
            fake = asyncio.create_task(FakeSupervisor(f"{folder}/s", store, serve.results, behaviour, heard).run())
            try:
                await server.serve(sockets=[door])
            finally:
                fake.cancel()
                await asyncio.wait([fake])

        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        try:
            until(lambda: server.started and supervisor.status is not None)
            yield Running(door.getsockname()[1], [secret for secret, _ in made], behaviour, store, serve, app)
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            door.close()
            store.close()
        assert not thread.is_alive()


def with_limits(lines: list[str], limits: dict[str, Any]) -> list[str]:
    return [json.dumps(json.loads(line) | (limits if index == 0 else {})) for index, line in enumerate(lines)]


def loop_runs_here() -> bool:
    """Whether this is the thread of an event loop, which nothing may block."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
