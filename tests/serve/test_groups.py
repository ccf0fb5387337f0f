"""Both kinds of groups start, show, lose and end their ranks alike; a group may span machines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

from parafuse.errors import ConfigError
from parafuse.launch.serve.elastic import ElasticGroup, Rendezvous
from parafuse.launch.serve.group import RankGroup
from parafuse.launch.serve.rank_link import RankLink
from parafuse.launch.serve.spawned import SpawnedGroup, device_env, visible_devices
from parafuse.parallel.ranks import free_port
from tests.serve.groups import COMMAND, KINDS, PATIENCE_S, Ears, child_env, eventually, is_alive, job_file, make_group


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


async def started(group: RankGroup, ears: Ears, ranks: int = 2) -> list[int]:
    """Process ids by rank, once all have said hello."""
    await eventually(lambda: len(ears.hellos(group.generation)) == ranks, "hello of all")
    hellos = sorted(ears.hellos(group.generation), key=lambda one: one.rank)
    assert [one.rank for one in hellos] == list(range(ranks))
    assert {one.world_size for one in hellos} == {ranks}
    assert [one.pid for one in hellos] == group.pids
    assert [one.feeds for one in hellos] == [True] + [False] * (ranks - 1)
    return group.pids


def test_ranks_start_fail_and_start_again(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        link, ears = RankLink(), Ears()
        group = make_group(kind, 2, link.env(job_file(tmp_path)))
        await ears.open(link, group)
        group.start([])
        first = await started(group, ears)
        generation = group.generation
        assert group.poll() is None
        os.kill(first[1], signal.SIGKILL)
        failure = await eventually(group.poll, "the loss", 10.0)
        assert failure.rank == 1
        assert "rank 1 was killed by SIGKILL" in failure.summary
        assert group.poll() == failure
        link.forget()
        group.kill()
        assert not any(map(is_alive, first))

        group.start([])
        assert group.poll() is None
        second = await started(group, ears)
        assert group.generation != generation
        assert not set(first) & set(second)
        # Stopped processes hear no SIGTERM: they are killed at once. torch's own agent would wait for 30 s here.
        for pid in second:
            os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        group.kill()
        assert time.monotonic() - begun < 15
        assert not any(map(is_alive, second))

        group.start([])
        third = await started(group, ears)
        group.close()
        group.close()
        assert not any(map(is_alive, third))
        with pytest.raises(ConfigError, match="closed"):
            group.start([])
        await link.close()

    asyncio.run(main())


def test_a_failure_tells_its_own_reason(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        link, ears = RankLink(), Ears()
        group = make_group(kind, 2, link.env(job_file(tmp_path, at_start={"rank": 1, "kind": "raise"})))
        await ears.open(link, group)
        group.start([])
        failure = await eventually(group.poll, "the loss")
        assert (failure.rank, failure.summary) == (1, "rank 1: ValueError: the weights are made of cheese")
        assert "fault_at_start" in failure.details
        group.close()
        await link.close()

    asyncio.run(main())


def test_ranks_get_their_devices(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        link, ears = RankLink(), Ears()
        group = make_group(kind, 1, link.env(job_file(tmp_path)))
        await ears.open(link, group)
        group.start(["3", "GPU-7"])
        (pid,) = await started(group, ears, ranks=1)
        env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert b"CUDA_VISIBLE_DEVICES=3,GPU-7" in env
        group.close()
        await link.close()

    asyncio.run(main())
    assert device_env([]) == {}
    assert visible_devices("cpu") == []


def test_a_group_is_killed_while_it_starts(kind: str, tmp_path: Path) -> None:
    """The ranks of a start that was given up never come."""

    async def main() -> None:
        link, ears = RankLink(), Ears()
        group = make_group(kind, 1, link.env(job_file(tmp_path)))
        await ears.open(link, group)
        group.start([])
        group.kill()
        group.start([])
        pids = await started(group, ears, ranks=1)
        assert len(ears.hellos(group.generation)) == 1
        group.close()
        assert not any(map(is_alive, pids))
        await link.close()

    asyncio.run(main())


class Machine:
    """A process with ranks of its own, and what it says."""

    def __init__(self, kind: str, folder: Path, ranks: int, endpoint: str = "", *, hosts: bool = True):
        folder.mkdir()
        argv = [sys.executable, "-m", "tests.serve.lone_machine", kind, str(folder), str(ranks), endpoint]
        self.process = subprocess.Popen(
            [*argv, "1" if hosts else "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_env(),
        )
        self.said: Queue[dict[str, Any]] = Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.pids: list[int] = []

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # closed
            for line in self.process.stdout:
                self.said.put(json.loads(line))

    def start_after(self, generation: str | None) -> dict[str, Any]:
        """What it says of its next start."""
        deadline = time.monotonic() + 2 * PATIENCE_S
        while time.monotonic() < deadline:
            try:
                said = self.said.get(timeout=1.0)
            except Empty:
                assert self.process.poll() is None, "the machine ended"
                continue
            if said.get("generation", generation) != generation:
                self.pids = said["pids"]
                return said
        raise AssertionError("no start")

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def machines(*found: Machine) -> Iterator[None]:
    try:
        yield
    finally:
        for one in found:
            with one.process:  # closes its pipes, and waits
                one.process.kill()


def test_ranks_end_with_a_supervisor_that_is_killed(kind: str, tmp_path: Path) -> None:
    machine = Machine(kind, tmp_path / "machine", 2)
    with machines(machine):
        pids = machine.start_after(None)["pids"]
        assert all(map(is_alive, pids))
        os.kill(pids[1], signal.SIGSTOP)  # the kernel ends also what is stopped
        machine.process.kill()
        machine.process.wait()
        asyncio.run(eventually(lambda: not any(map(is_alive, pids)), "no rank is left", 20.0))


def test_two_machines_make_one_group_and_survive_losses_on_either(tmp_path: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    first = Machine("elastic", tmp_path / "first", 1, endpoint)
    second = Machine("elastic", tmp_path / "second", 1, endpoint, hosts=False)
    with machines(first, second):
        generation = None
        for loser in (first, second, None):
            starts = [one.start_after(generation) for one in (first, second)]
            assert starts[0]["generation"] == starts[1]["generation"] != generation
            assert sorted(starts[0]["ranks"] + starts[1]["ranks"]) == [0, 1]
            assert {one["world_size"] for one in starts} == {2}
            generation = starts[0]["generation"]
            if loser is not None:
                os.kill(loser.pids[0], signal.SIGKILL)
        first.end()
        asyncio.run(eventually(lambda: not is_alive(first.pids[0]), "its rank is gone", 20.0))
        assert is_alive(second.process.pid)
        second.end()
        assert not is_alive(second.pids[0])


def test_what_a_rendezvous_needs_is_asked_for() -> None:
    for endpoint in ("", "host", "host:", "host:port", ":1", "host:99999"):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            Rendezvous(nnodes=2, endpoint=endpoint, key="k")
    with pytest.raises(ConfigError, match="secret"):
        Rendezvous(nnodes=2, endpoint="host:1")
    with pytest.raises(ConfigError, match="nnodes=0"):
        Rendezvous(nnodes=0)
    assert Rendezvous(nnodes=2, endpoint="[::1]:29500", key="k").address == ("::1", 29500)
    for make in (SpawnedGroup, ElasticGroup):
        with pytest.raises(ConfigError, match="ranks=0"):
            make(COMMAND, 0, env={})


def test_a_rendezvous_state_that_is_not_signed_is_not_read() -> None:
    """torch unpickles the state; what others wrote must not come so far."""
    import torch.distributed as dist
    from torch.distributed.elastic.rendezvous import RendezvousStateError

    from parafuse.launch.serve.elastic import _Backend

    store = dist.HashStore()

    def backend(key: str) -> _Backend:
        meeting = Rendezvous(nnodes=2, endpoint="127.0.0.1:1", key=key)
        return _Backend(store, "name", ElasticGroup(COMMAND, 1, env={}, rendezvous=meeting))

    ours, others = backend("one"), backend("another")
    done = ours.set_state(b"state")
    assert done is not None
    assert done[2]
    assert done[0] == b"state"
    found = backend("one").get_state()
    assert found is not None
    assert found[0] == b"state"
    with pytest.raises(RendezvousStateError, match="not signed"):
        others.get_state()
    changed = ours.set_state(b"next", done[1])
    assert changed is not None
    assert changed[2]
    stale = ours.set_state(b"stale", done[1])
    assert stale is not None
    assert (stale[0], stale[2]) == (b"next", False)
