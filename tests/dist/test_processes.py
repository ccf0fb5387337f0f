"""Rank processes: every way in which they end leaves none behind, within seconds, with the right one blamed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parafuse.parallel import ranks as ranks_module
from parafuse.parallel.ranks import RankProcesses, free_port, start

ROOT = Path(__file__).resolve().parents[2]
ENTER = """
import os, sys, time, signal, json, subprocess
from pathlib import Path
from parafuse.parallel.rank_entry import enter, record
supervised = enter()
rank = int(os.environ["RANK"])
folder = Path(os.environ["TEST_FOLDER"])
def fail(error):
    try:
        raise error
    except Exception as caught:
        record(caught, one_line=False, exit_code=1)
    sys.exit(1)
(folder / f"pid{rank}").write_text(str(os.getpid()))
"""
PARENT = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and start() leaves that so
from parafuse.parallel.ranks import start
processes = start([sys.executable, sys.argv[1]], ranks=range(2), world_size=2, master_port=1)
sys.exit(processes.wait())
"""
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")

Begin = Callable[..., RankProcesses]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """begin(code, number=2) starts `code` (after ENTER) as ranks; what is left at the end is stopped."""
    started: list[RankProcesses] = []
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path))

    def run(code: str, number: int = 2, **kwargs: object) -> RankProcesses:
        script = tmp_path / "rank.py"
        script.write_text(ENTER + code)
        options = {"ranks": range(number), "world_size": number, "master_port": 29999} | kwargs
        started.append(start([sys.executable, str(script)], **options))  # pyright: ignore[reportArgumentType]
        return started[-1]

    yield run
    for processes in started:
        processes.stop(grace_s=0)


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie (a container's first process may not reap orphans)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


def until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def pids_in(folder: Path, number: int = 2) -> list[int]:
    def written() -> list[str]:
        return [text for path in folder.glob("pid*") if (text := path.read_text())]

    assert until(lambda: len(written()) == number, 20), "the ranks did not start"
    return [int(text) for text in written()]


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_environment_and_success(begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "198.51.100.7")
    before = handlers()
    processes = begin("(folder / f'env{rank}').write_text(json.dumps(dict(os.environ)))", number=3, env={"EXTRA": "1"})
    assert processes.wait() == 0
    assert processes.failure is None
    assert handlers() == before
    for rank in range(3):
        env = json.loads((tmp_path / f"env{rank}").read_text())
        assert [env[key] for key in NUMBERS] == [str(rank), str(rank), "3", "3"]
        assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["EXTRA"]) == ("127.0.0.1", "29999", "1")
        assert env["OMP_NUM_THREADS"] == str(max(1, ranks_module.cores() // 3))


def test_ranks_of_a_second_node(begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    processes = begin("(folder / f'env{rank}').write_text(json.dumps(dict(os.environ)))", ranks=(2, 3), world_size=4)
    assert processes.wait() == 0
    env = json.loads((tmp_path / "env3").read_text())
    assert [env[key] for key in NUMBERS] == ["3", "1", "4", "2"]
    assert env["OMP_NUM_THREADS"] == "7"


def test_a_rank_that_raises_ends_all(begin: Begin) -> None:
    before = handlers()
    processes = begin("time.sleep(60) if rank != 1 else fail(ValueError('broken\\nsecond line'))", number=3)
    begun = time.monotonic()
    assert processes.wait() == 1
    assert time.monotonic() - begun < 10
    assert processes.failure is not None
    assert processes.failure.rank == 1
    assert processes.failure.summary == "rank 1: ValueError: broken"
    shown = processes.failure.render()
    assert "[rank 1] Traceback (most recent call last):" in shown
    assert "[rank 1] second line" in shown
    assert shown.splitlines()[-1] == "parafuse: error: rank 1: ValueError: broken"
    assert not any(map(alive, processes.pids))
    assert handlers() == before


def test_an_error_of_one_line_keeps_its_exit_code(begin: Begin) -> None:
    processes = begin("record(ValueError('steps=0: no'), one_line=True, exit_code=2); time.sleep(60)")
    assert processes.wait() == 2  # although no rank has ended: a rank that hangs on its way out has failed
    assert processes.failure is not None
    assert processes.failure.render() == f"parafuse: error: rank {processes.failure.rank}: steps=0: no"


def test_a_silent_exit_shows_the_last_lines(begin: Begin) -> None:
    processes = begin("time.sleep(60) if rank == 0 else (print('last words', file=sys.stderr), sys.exit(3))")
    assert processes.wait() == 3
    assert processes.failure is not None
    assert "[rank 1] last words" in processes.failure.render()
    assert processes.failure.summary == "rank 1 ended with exit code 3."


def test_a_killed_rank_is_blamed_not_its_peers(begin: Begin) -> None:
    code = """
if rank == 1:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
while not (folder / "pid1").exists():
    time.sleep(0.002)
while True:  # as a peer sees it: the connection is lost at once
    time.sleep(0.002)
    if Path(f"/proc/{(folder / 'pid1').read_text()}/stat").read_text().split()[2] == "Z":
        fail(RuntimeError("connection lost"))
"""
    processes = begin(code)
    assert processes.wait() == 128 + signal.SIGKILL
    assert processes.failure is not None
    assert (processes.failure.rank, processes.failure.exit_code) == (1, -signal.SIGKILL)
    assert "SIGKILL" in processes.failure.summary


def test_the_first_recorded_error_is_blamed(begin: Begin) -> None:
    code = """
if rank == 1:
    record(ValueError("cause"), one_line=False, exit_code=1)
    time.sleep(60)
while not Path(os.environ["TORCHELASTIC_ERROR_FILE"].replace("rank0", "rank1")).exists():
    time.sleep(0.001)
time.sleep(0.1)
os.abort()
"""
    processes = begin(code)
    processes.wait()
    assert processes.failure is not None
    assert (processes.failure.rank, processes.failure.summary) == (1, "rank 1: ValueError: cause")


def test_a_lost_connection_waits_for_the_death_it_tells_of(begin: Begin) -> None:
    code = """
if rank == 0:
    fail(RuntimeError("[pair.cc] Connection closed by peer [127.0.0.1]"))
time.sleep(0.5)  # a crash is written out while the sockets are closed already
os.abort()
"""
    processes = begin(code)
    assert processes.wait() == 128 + signal.SIGABRT
    assert processes.failure is not None
    assert processes.failure.rank == 1
    assert "Fatal Python error: Aborted" in processes.failure.details


def test_a_lost_connection_alone_is_blamed_in_the_end(begin: Begin) -> None:
    processes = begin("fail(RuntimeError('Connection reset by peer')) if rank == 0 else time.sleep(60)")
    begun = time.monotonic()
    assert processes.wait() == 1
    assert 0.9 < time.monotonic() - begun < 8
    assert processes.failure is not None
    assert processes.failure.rank == 0


def test_a_rank_that_ignores_the_request_is_killed(begin: Begin, tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); (folder / f'pid{rank}x').write_text('1'); time.sleep(60)"
    processes = begin(code)
    assert until(lambda: len(list(tmp_path.glob("pid*x"))) == 2, 20)
    begun = time.monotonic()
    processes.stop(grace_s=0.2)
    assert time.monotonic() - begun < 3
    assert not any(map(alive, processes.pids))
    processes.stop()  # again: nothing


def test_helpers_of_a_rank_end_with_it(begin: Begin, tmp_path: Path) -> None:
    code = "child = subprocess.Popen(['sleep', '60']); (folder / 'pid0').write_text(str(child.pid)); time.sleep(60)"
    processes = begin(code, number=1)
    assert until(lambda: (tmp_path / "pid0").exists() and (tmp_path / "pid0").read_text() != str(processes.pids[0]), 20)
    [helper] = pids_in(tmp_path, 1)
    assert alive(helper)
    processes.stop()
    assert until(lambda: not alive(helper), 20)


def parent_of(code: str, tmp_path: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A parent process (in a group of its own) with two ranks that run `code`, and their pids."""
    (tmp_path / "rank.py").write_text(code)
    (tmp_path / "parent.py").write_text(PARENT)
    env = os.environ | {"PYTHONPATH": str(ROOT), "TEST_FOLDER": str(tmp_path), "TMPDIR": str(tmp_path)}
    argv = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "rank.py")]
    parent = subprocess.Popen(argv, env=env, start_new_session=True)
    return parent, pids_in(tmp_path)


@pytest.mark.parametrize("whole_group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_no_process(tmp_path: Path, number: signal.Signals, whole_group: bool) -> None:
    parent, pids = parent_of(ENTER + "time.sleep(60)", tmp_path)
    (os.killpg if whole_group else os.kill)(parent.pid, number)
    assert parent.wait(timeout=10) == 128 + number
    assert not any(map(alive, pids))


def test_a_second_signal_does_not_wait_for_the_grace(tmp_path: Path) -> None:
    code = ENTER.replace("supervised =", "signal.signal(signal.SIGTERM, signal.SIG_IGN); supervised =")
    parent, pids = parent_of(code + "time.sleep(60)", tmp_path)
    parent.send_signal(signal.SIGINT)
    time.sleep(0.4)
    assert all(map(alive, pids)), "within the grace the ranks still run"
    begun = time.monotonic()
    parent.send_signal(signal.SIGINT)
    assert parent.wait(timeout=10) == 130
    assert time.monotonic() - begun < 2
    assert not any(map(alive, pids))


def test_ranks_die_with_a_killed_parent(tmp_path: Path) -> None:
    parent, pids = parent_of(ENTER + "time.sleep(60)", tmp_path)
    parent.kill()
    parent.wait()
    assert until(lambda: not any(map(alive, pids)), 3)


def test_control_without_enter_they_survive(tmp_path: Path) -> None:
    parent, pids = parent_of(ENTER.replace("supervised = enter()", "") + "time.sleep(60)", tmp_path)
    parent.kill()
    parent.wait()
    time.sleep(0.5)
    survivors = [pid for pid in pids if alive(pid)]
    for pid in survivors:
        os.kill(pid, signal.SIGKILL)
    assert len(survivors) == 2


def test_enter_is_for_ranks_only() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env.pop("PARAFUSE_PARENT_PID", None)

    def enter(**more: str) -> subprocess.CompletedProcess[str]:
        code = "from parafuse.parallel.rank_entry import enter; print(enter())"
        return subprocess.run([sys.executable, "-c", code], env=env | more, capture_output=True, text=True, check=False)

    assert enter().stdout == "False\n"
    assert enter(PARAFUSE_PARENT_PID=str(os.getpid())).stdout == "True\n"
    assert enter(PARAFUSE_PARENT_PID=str(os.getpid() + 1)).returncode == 1


def test_a_command_that_cannot_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module.tempfile, "tempdir", str(tmp_path))
    before = handlers()
    with pytest.raises(FileNotFoundError):
        start([str(tmp_path / "nothing")], ranks=range(2), world_size=2, master_port=1)
    assert handlers() == before
    assert list(tmp_path.iterdir()) == []


def test_free_port_is_free_and_outside_the_range_of_outgoing_connections() -> None:
    ports = {free_port() for _ in range(8)}
    assert all(1024 < port < 32768 for port in ports)
    assert len(ports) > 1
