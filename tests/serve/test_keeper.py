"""The process on top: what dies or falls silent is replaced, and nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parafuse.launch.serve.systemd import Systemd

PATIENT_S = 30.0
"""On a busy machine; nothing waits so long but a failing test."""

CHILD = """
import os, signal, sys, time
from parafuse.parallel.rank_entry import enter
name, beat, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
enter()
def told(*_):
    time.sleep(0.3 if name == "first" else 0.0)
    with open(f"{folder}/ended", "a") as file:
        file.write(name + "\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, told)
with open(f"{folder}/{name}", "a") as file:
    file.write(f"{os.getpid()}\\n")
while True:
    os.write(beat, b".")
    time.sleep(0.05)
"""

KEEPER = """
import sys
from parafuse.launch.serve import logs
from parafuse.launch.serve.keeper import Child, Keeper
folder = sys.argv[1]
def child(name):
    return Child(name=name, argv=lambda beat: [sys.executable, f"{folder}/child.py", name, str(beat), folder],
                 patience_s=1.5, start_s=20.0)
logs.configure()
sys.exit(Keeper([child("first"), child("last")], drain_s=5.0).run())
"""


class Kept:
    """A keeper of two children in a process of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "child.py").write_text(CHILD)
        (folder / "keeper.py").write_text(KEEPER)
        command = [sys.executable, str(folder / "keeper.py"), str(folder)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def pids(self, name: str) -> list[int]:
        file = self.folder / name
        return [int(line) for line in file.read_text().splitlines()] if file.exists() else []

    def up(self) -> None:
        until(lambda: self.pids("first") and self.pids("last"))


def until(check: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENT_S
    while not check():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    kept = Kept(tmp_path)
    try:
        kept.up()
        yield kept
    finally:
        kept.process.kill()
        kept.process.communicate()
        for pid in kept.pids("first") + kept.pids("last"):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["first", "last"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_child_that_is_killed_or_stopped_is_replaced(kept: Kept, name: str, number: signal.Signals) -> None:
    before = {one: kept.pids(one) for one in ("first", "last")}
    os.kill(before[name][-1], number)
    until(lambda: len(kept.pids(name)) == 2)
    other = "last" if name == "first" else "first"
    assert kept.pids(other) == before[other], "the other one goes on"
    until(lambda: not alive(before[name][-1]))
    kept.process.send_signal(signal.SIGTERM)
    _, told = kept.process.communicate(timeout=PATIENT_S)
    lines = [json.loads(line) for line in told.splitlines()]
    word = "said nothing" if number == signal.SIGSTOP else "was killed by SIGKILL"
    assert [line["process"] for line in lines if word in line["why"]] == [name], told


def test_a_keeper_that_is_killed_leaves_nothing(kept: Kept) -> None:
    kept.process.kill()
    kept.process.wait()
    until(lambda: not any(map(alive, kept.pids("first") + kept.pids("last"))))


def test_the_last_child_answers_while_the_first_one_drains(kept: Kept) -> None:
    kept.process.send_signal(signal.SIGTERM)
    assert kept.process.wait(timeout=PATIENT_S) == 0
    assert (kept.folder / "ended").read_text().split() == ["first", "last"]


def test_a_child_that_fails_at_once_is_started_ever_more_rarely(tmp_path: Path) -> None:
    from parafuse.launch.serve.keeper import WAITS_S, Child

    child = Child(name="one", argv=lambda _: [sys.executable, "-c", "raise SystemExit(3)"], patience_s=1.0, start_s=1.0)
    waits: list[float] = []
    for _ in range(4):
        child.start()
        assert child.process is not None
        child.process.wait()
        assert child.fault() == "ended with 3"
        waits.append(child.wait_s())
    child.forget()
    assert waits == list(WAITS_S[1:5])


def test_systemd_hears_that_it_is_ready_lives_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(PATIENT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        kept = Kept(tmp_path)
        try:
            heard = [systemd.recv(100).decode()]
            while "READY=1" not in heard or heard[-2:] != ["WATCHDOG=1", "WATCHDOG=1"]:
                heard.append(systemd.recv(100).decode())
            kept.up()
            kept.process.send_signal(signal.SIGTERM)
            while heard[-1] != "STOPPING=1":
                heard.append(systemd.recv(100).decode())
            assert kept.process.wait(timeout=PATIENT_S) == 0
        finally:
            kept.process.kill()
            kept.process.communicate()
    assert heard.count("READY=1") == heard.count("STOPPING=1") == 1


def test_where_no_systemd_listens_nothing_happens(tmp_path: Path) -> None:
    for environ in ({}, {"NOTIFY_SOCKET": str(tmp_path / "nobody")}):
        systemd = Systemd(environ)
        systemd.tell("READY=1")
        systemd.alive()
