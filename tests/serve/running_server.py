"""`parafuse serve` as an operator runs it, in processes of its own, and eyes on each of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx2
import psutil

PATIENT_S = 180.0
"""For a start, on a machine that is busy."""
MODULES = {
    "supervisor": "parafuse.launch.serve.supervisor",
    "http": "parafuse.launch.serve.http.process",
    "rank": "parafuse.launch.serve.rank",
}


class RunningServer:
    """Start it, ask it, break it, end it. Its state outlives it."""

    def __init__(self, folder: Path, *options: str, ranks: int = 2, model: str = "emoji", port: int = 0):
        self.folder, self._options, self._ranks, self._model, self._port = folder, options, ranks, model, port
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "server.log"
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until its address is known; `until_ready` waits for its ranks."""
        command = [
            sys.executable, "-m", "parafuse", "serve", "--model", self._model, "--ranks", str(self._ranks),
            "--port", str(self._port), "--state", str(self.folder / "state"), *self._options,
        ]  # fmt: skip
        env = os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": tempfile.gettempdir()}
        with self.log.open("ab") as log:
            begins = log.tell()
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)

        def address() -> str:
            written = self.log.read_bytes()[begins:].decode(errors="replace")
            return next((word for word in written.split() if word.startswith("http://")), "")

        self.until(lambda: address() or (self._process and self._process.poll() is not None))
        self.url = address()
        assert self.url, self.tail()
        self._port = int(self.url.rpartition(":")[2])

    def until_ready(self) -> None:
        self.until(lambda: self.health()[0] == 200)

    def until(self, check: Callable[[], object], patience_s: float = PATIENT_S) -> None:
        deadline = time.monotonic() + patience_s
        while not check():
            assert time.monotonic() < deadline, f"it did not come about.\n{self.tail()}"
            time.sleep(0.05)

    def health(self) -> tuple[int, Mapping[str, Any]]:
        """(status, what it says) of /health/ready; 0 where nobody answers."""
        try:
            answer = httpx2.get(f"{self.url}/health/ready", timeout=5)
            return answer.status_code, answer.json()
        except (httpx2.HTTPError, ValueError):
            return 0, {}

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])

    def processes(self, kind: str) -> list[psutil.Process]:
        """Those of a kind that run now: keeper, supervisor, http, rank."""
        if self._process is None or self._process.poll() is not None:
            return []
        keeper = psutil.Process(self._process.pid)
        if kind == "keeper":
            return [keeper]
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in keeper.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if MODULES[kind] in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                        found.append(child)
        return found

    def pids(self) -> set[int]:
        """Of all of its processes."""
        return {one.pid for kind in ("keeper", *MODULES) for one in self.processes(kind)}

    def signal(self, kind: str, number: int, index: int = 0) -> int:
        """Sends a signal to one of its processes; which one."""
        pid = self.processes(kind)[index].pid
        os.kill(pid, number)
        return pid

    def stop(self, patience_s: float = PATIENT_S) -> int:
        """SIGTERM, as systemd does; the exit code."""
        if self._process is None:
            return 0
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=patience_s)

    def kill(self) -> None:
        """Everything, at once."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
