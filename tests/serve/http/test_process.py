"""The HTTP process as `parafuse serve` starts it: no torch in it, a heart that beats, an end in time."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from parafuse.config import Config
from parafuse.launch.serve.http.process import MAX_FILES, allow_files
from parafuse.launch.serve.settings import Serving
from parafuse.launch.serve.wiring import Wiring
from parafuse.parallel.rank_entry import PARENT_ENV
from tests.serve.http.serving import until

MODULE = "parafuse.launch.serve.http.process"


@dataclass
class Started:
    process: subprocess.Popen[str]
    base: str
    beats: int
    folder: Path


@contextlib.contextmanager
def started(parent: int | None = None) -> Iterator[Started]:
    """The process on a socket that this one listens at."""
    with tempfile.TemporaryDirectory(prefix="pf-") as folder, socket.create_server(("127.0.0.1", 0)) as door:
        serving = Serving(state=f"{folder}/state")
        wiring = Wiring.make(Path(folder), "emoji", ranks=1, config=Config(), serving=serving, verbose=False)
        Path(serving.state).mkdir(mode=0o700)
        beats, theirs = os.pipe()
        env = {name: value for name, value in os.environ.items() if name != "PARAFUSE_API_KEYS"}
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(wiring.file), str(theirs), str(door.fileno())],
            pass_fds=(theirs, door.fileno()), stderr=subprocess.PIPE, text=True,
            env=env | {PARENT_ENV: str(parent or os.getpid())},
        )  # fmt: skip
        os.close(theirs)
        try:
            yield Started(process, f"http://127.0.0.1:{door.getsockname()[1]}", beats, Path(folder))
        finally:
            process.kill()
            process.communicate()
            os.close(beats)


def beat(one: Started, timeout_s: float = 60.0) -> bool:
    readable, _, _ = select.select([one.beats], [], [], timeout_s)
    return bool(readable) and os.read(one.beats, 4096) != b""


def test_it_answers_beats_and_ends() -> None:
    with started() as one:
        assert beat(one)
        assert httpx2.get(f"{one.base}/health/live", timeout=60).status_code == 200
        ready = httpx2.get(f"{one.base}/health/ready", timeout=60)
        assert (ready.status_code, ready.json()["status"]) == (503, "starting")
        made = httpx2.post(f"{one.base}/v1/images/generations", json={"prompt": "x", "background": True}, timeout=60)
        assert made.status_code == 202, made.text
        assert beat(one)
        assert beat(one)
        one.process.send_signal(signal.SIGTERM)
        _, errors = one.process.communicate(timeout=60)
        assert one.process.returncode == 0, errors
        lines = [json.loads(line) for line in errors.splitlines()]
        assert {"started", "request"} <= {line["event"] for line in lines}


def test_a_stopped_process_does_not_beat() -> None:
    with started() as one:
        assert beat(one)
        one.process.send_signal(signal.SIGSTOP)
        until(lambda: not beat(one, 2.0))
        one.process.send_signal(signal.SIGCONT)
        assert beat(one)


def test_an_open_stream_does_not_hold_up_its_end() -> None:
    with started() as one:
        assert beat(one)
        with httpx2.Client(base_url=one.base, timeout=60) as http:
            job = http.post("/v1/images/generations", json={"prompt": "x", "background": True}).json()["id"]
            with http.stream("GET", f"/v1/jobs/{job}/events") as events:
                pieces = events.iter_raw()
                next(pieces)
                one.process.send_signal(signal.SIGTERM)
                text = b"".join(pieces).decode()
        assert "draining" in text
        one.process.communicate(timeout=60)
        assert one.process.returncode == 0


def test_it_allows_itself_files_for_all_its_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    few = min(512, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))  # what it is started with
    try:
        with started() as one:
            assert beat(one)
            assert resource.prlimit(one.process.pid, resource.RLIMIT_NOFILE) == (most, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1024, 4096), (4096, 4096)),
        ((1024, 1 << 20), (MAX_FILES, 1 << 20)),
        ((1024, resource.RLIM_INFINITY), (MAX_FILES, resource.RLIM_INFINITY)),
        ((1 << 17, 1 << 20), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
        ((4096, 4096), None),
    ],
)
def test_a_limit_of_files_is_raised_as_far_as_it_goes_and_never_lowered(
    monkeypatch: pytest.MonkeyPatch, before: tuple[int, int], after: tuple[int, int] | None
) -> None:
    asked = list[tuple[int, int]]()
    monkeypatch.setattr(resource, "getrlimit", lambda _: before)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    allow_files()
    assert asked == ([] if after is None else [after])


def test_it_does_not_live_without_its_parent() -> None:
    with started(parent=1_999_999) as one:  # as if its parent had gone before
        one.process.communicate(timeout=60)
        assert one.process.returncode == 1


def test_no_torch_after_requests() -> None:
    code = textwrap.dedent("""
        import sys
        from tests.serve.http.serving import serving, png
        with serving("tiny:qwen-image-edit") as server:
            with server.http() as http:
                files = {"image": ("a.png", png())}
                answer = http.post("/v1/images/edits", data={"prompt": "x", "size": "64x64"}, files=files)
                assert answer.status_code == 200, answer.text
                assert http.get("/metrics").status_code == 200
        import parafuse.launch.serve.http.process
        found = {"torch", "diffusers", "transformers", "accelerate", "numpy"} & set(sys.modules)
        assert not found, found
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args", [[], ["a"]])
def test_wrong_arguments(args: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", MODULE, *args], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "usage" in done.stderr
