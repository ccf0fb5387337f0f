"""`parafuse serve --ray` as its user runs it: two replicas of one rank; one is killed, then the store; then it ends."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
from PIL import Image

import parafuse
from tests.serve.stores import open_store

PATIENCE_S = 240.0
STEPS = 60


class OnRay:
    """The command, and eyes on what it has started."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / "log"
        self.state = folder / "state"
        command = [
            sys.executable, "-m", "parafuse", "serve", "--ray", "--model", "emoji", "--replicas", "2", "--batch", "1",
            "--port", str(self.port), "--state", str(self.state),
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.until(lambda: self.url in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()[-3000:]

    def until(self, check: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := check()):
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)
        return found

    def processes(self, name: str) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for one in psutil.Process(self.process.pid).children(recursive=True):
            try:
                found += [one] if any(name in word for word in one.cmdline()) else []
            except psutil.Error:
                continue
        return found

    @property
    def replicas(self) -> list[psutil.Process]:
        return self.processes("ServeReplica:parafuse:replica")

    def ask(self, method: str, path: str, **more: Any) -> httpx2.Response:
        return httpx2.request(method, self.url + path, timeout=PATIENCE_S, trust_env=False, **more)

    def begin(self, seeds: Iterable[int], steps: int = STEPS) -> list[str]:
        """Ids of jobs that go on whoever waits for them: their requests have idempotency keys."""
        before = self.jobs()

        def ask(seed: int) -> None:
            body = {"prompt": "a red apple", "seed": seed, "steps": steps, "size": "64x64"}
            with contextlib.suppress(httpx2.HTTPError):  # it may be a replica that is killed
                self.ask("POST", "/v1/images/generations", json=body, headers={"Idempotency-Key": f"k{seed}"})

        asked = list(seeds)
        for seed in asked:
            threading.Thread(target=ask, args=(seed,), daemon=True).start()
        self.until(lambda: len(self.jobs()) == len(before) + len(asked))
        return sorted(self.jobs().keys() - before.keys())

    def jobs(self) -> dict[str, str]:
        """Id -> status, of all."""

        def answered() -> list[dict[str, Any]] | None:
            answer = self.ask("GET", "/v1/jobs?limit=100")
            return answer.json()["data"] if answer.status_code == 200 else None

        while (found := answered()) is None:
            time.sleep(0.2)
        return {one["id"]: one["status"] for one in found}

    def ended(self, jobs: list[str]) -> list[str]:
        """Their states, once none waits or runs."""

        def over() -> list[str] | None:
            now = self.jobs()
            states = [now[name] for name in jobs]
            return None if {"queued", "running"} & set(states) else states

        return self.until(over)

    def kill(self) -> None:
        for one in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
            try:
                one.kill()
            except psutil.Error:
                continue


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRay]:
    started = OnRay(tmp_path_factory.mktemp("ray"))
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.kill()


def picture(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_pictures_are_those_of_an_engine_whichever_replica_paints(server: OnRay) -> None:
    seeds = range(6)

    def ask(seed: int) -> httpx2.Response:
        body = {"prompt": "a red apple", "seed": seed, "steps": 8, "size": "64x64", "response_format": "b64_json"}
        return server.ask("POST", "/v1/images/generations", json=body)

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(ask, seeds))
    assert [one.status_code for one in answers] == [200] * 6
    with parafuse.Engine.from_pretrained("emoji", alone=True) as engine:
        for seed, answer in zip(seeds, answers, strict=True):
            found = picture(base64.b64decode(answer.json()["data"][0]["b64_json"]))
            alone = engine("a red apple", seed=seed, num_inference_steps=8, width=64, height=64)
            assert np.array_equal(found, np.asarray(alone.images[0]))


def test_a_client_that_leaves_cancels_its_job(server: OnRay) -> None:
    before = server.jobs()
    body = {"prompt": "a red apple", "seed": 50, "steps": 200, "size": "128x128"}
    with httpx2.Client(trust_env=False, timeout=1.0) as client, pytest.raises(httpx2.ReadTimeout):
        client.post(f"{server.url}/v1/images/generations", json=body)
    (job,) = server.jobs().keys() - before.keys()
    assert server.ended([job]) == ["cancelled"]


def test_a_replica_that_is_killed_loses_no_job(server: OnRay) -> None:
    before = {one.pid for one in server.replicas}
    assert len(before) == 2
    jobs = server.begin(range(100, 108))
    server.until(lambda: list(server.jobs().values()).count("running") == 2)
    killed = server.replicas[0]
    ranks = [one.pid for one in killed.children(recursive=True)]
    assert ranks
    killed.send_signal(signal.SIGKILL)
    server.until(lambda: not any(map(psutil.pid_exists, ranks)))  # they end with it
    assert server.ended(jobs) == ["done"] * len(jobs)
    assert len(list((server.state / "results").glob("*"))) >= len(jobs)
    server.until(lambda: len({one.pid for one in server.replicas} - before) == 1)  # Ray has started another


def test_a_store_that_is_killed_comes_back_with_its_jobs(server: OnRay) -> None:
    jobs = server.begin(range(200, 204))
    (store,) = server.processes("ServeReplica:parafuse:store")
    store.send_signal(signal.SIGKILL)
    assert server.ended(jobs) == ["done"] * len(jobs)
    assert server.processes("ServeReplica:parafuse:store")[0].pid != store.pid


def test_at_its_end_what_waits_stays(server: OnRay) -> None:
    """The last: the server is gone then, and so is all that it started."""
    jobs = server.begin(range(300, 310))
    below = [one.pid for one in psutil.Process(server.process.pid).children(recursive=True)]
    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(PATIENCE_S) == 0
    server.until(lambda: not any(map(psutil.pid_exists, below)))
    store = open_store(server.state)
    found = [store.get(name) for name in jobs]
    assert {job.state.value for job in found if job} <= {"done", "queued"}
    assert [job.state.value for job in found if job].count("queued") >= 1
    assert all(job is not None and job.tries <= 1 for job in found)
    assert store.epochs() == []
    assert store.running() == []


@pytest.mark.whole
def test_why_replicas_cannot_start_is_said_in_one_line(tmp_path: Path) -> None:
    """What only a rank can find."""
    with parafuse.Engine.from_pretrained("emoji", alone=True) as engine:
        engine.pipeline.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"in_channels": 2 * config["in_channels"]}))
    command = [
        sys.executable, "-m", "parafuse", "serve", "--ray", "--model", str(tmp_path / "model"), "--port", "8799",
        "--state", str(tmp_path / "state"),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert "no replica can start: the ranks cannot be started: rank 0" in last
    assert "proj_out.bias of shape" in last
    assert "Traceback" not in ended.stderr
