"""Whatever ranks do, a call ends or its caller hears that the group is lost, and the next group works."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from parafuse.launch.serve.group import GroupLostError, RankGroup
from parafuse.launch.serve.group_supervisor import GroupSupervisor, Probe
from parafuse.launch.serve.messages import Failed, Hello, Item, Paint, Painted, Stepped, encode
from parafuse.launch.serve.rank_link import RankLink
from parafuse.launch.serve.restarts import Budget, Devices
from parafuse.launch.serve.watchdog import Limit, Watchdog
from tests.serve.groups import PATIENCE_S, eventually, is_alive, job_file, make_group

SHORT = {
    "starting": Limit(floor_s=30.0, unseen_s=30.0),
    "loading": Limit(floor_s=2.0, unseen_s=2.0),
    "denoising": Limit(floor_s=2.0, unseen_s=2.0),
    "idle": Limit(floor_s=2.0, unseen_s=2.0),
}
"""Far above what fake ranks take, on a machine that is busy, and far below anybody's patience."""


@dataclass
class Server:
    supervisor: GroupSupervisor
    group: RankGroup
    link: RankLink
    folder: Path


def paint(call: str, steps: int = 3, fault: dict[str, Any] | None = None, **settings: Any) -> Paint:
    settings |= {"num_inference_steps": steps} | ({"fault": fault} if fault else {})
    return Paint(call=call, items=(Item(job=call, prompt="p", seed=1),), settings=settings)


@asynccontextmanager
async def server(
    folder: Path,
    kind: str = "spawned",
    *,
    ranks: int = 2,
    probe: Probe | None = None,
    lends: bool = False,
    budget: Budget | None = None,
    devices: Devices | None = None,
    silent_s: float = 3.0,
    **job: Any,
) -> AsyncIterator[Server]:
    link = RankLink()
    group = make_group(kind, ranks, link.env(job_file(folder, **job), feeds=not lends))
    supervisor = GroupSupervisor(
        group,
        link,
        ranks=ranks,
        probe=None if lends else probe or Probe(call=paint("probe", 1)),
        watchdog=Watchdog(SHORT, silent_s=silent_s, heavy_silent_s=30.0),
        budget=budget,
        devices=devices,
    )
    await supervisor.start()
    try:
        yield Server(supervisor, group, link, folder)
    finally:
        await asyncio.wait_for(supervisor.close(), PATIENCE_S)
        assert not any(map(is_alive, group.pids)), "a rank is left"
        assert not Path(link.path).parent.exists(), "the socket's folder is left"


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(main(), 3 * PATIENCE_S)

    asyncio.run(bounded())


async def end_of(supervisor: GroupSupervisor, call: Paint) -> Painted | Failed:
    events = [event async for event in supervisor.paint(call)]
    assert all(isinstance(event, Stepped) for event in events[:-1])
    assert isinstance(events[-1], Painted | Failed)
    return events[-1]


async def ready(supervisor: GroupSupervisor) -> None:
    await asyncio.wait_for(supervisor.wait_ready(), PATIENCE_S)


@pytest.mark.parametrize("kind", ["spawned", "elastic"])
def test_calls_run_one_after_the_other_and_are_counted(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path, kind) as here:
            supervisor = here.supervisor
            assert supervisor.status().state == "starting"
            assert supervisor.why
            await ready(supervisor)
            assert supervisor.why == ""
            assert all(one.last_step_age_s is not None for one in supervisor.status().ranks)
            order: list[str] = []

            async def one(name: str) -> None:
                async for event in supervisor.paint(paint(name, 4, step_s=0.01)):
                    order.append(name)
                    if isinstance(event, Painted):
                        assert event.files == ((f"{name}.png",),)

            await asyncio.gather(*(one(name) for name in "abc"))
            assert order == ["a"] * 5 + ["b"] * 5 + ["c"] * 5
            status = supervisor.status()
            assert status.state == "ready"
            assert [one.rank for one in status.ranks] == [0, 1]
            assert [one.pid for one in status.ranks] == here.group.pids
            assert [one.memory_bytes for one in status.ranks] == [1000, 1001]
            assert (status.totals["calls"], status.totals["steps"]) == (3, 12)
            assert (status.totals["cache_hits"], status.totals["cache_calls"]) == (3, 6)
            assert status.totals["seconds_denoising"] > 0
            assert status.restarts == {}

    run(main)


def test_where_a_call_is_and_what_is_left_of_it_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as here:
            await ready(here.supervisor)
            async for event in here.supervisor.paint(paint("c", 10, step_s=0.05)):
                status = here.supervisor.status()
                if isinstance(event, Stepped) and event.step == 4:
                    assert (status.call, status.num_steps) == ("c", 10)
                    assert status.step >= 4
                    assert status.call_left_s == pytest.approx(0.02 * (10 - status.step))
            assert here.supervisor.status().call == ""

    run(main)


@pytest.mark.parametrize(
    ("kind", "cause", "said"),
    [
        ("die", "died", "rank 1 was killed by SIGKILL"),
        ("raise", "failed", "rank 1: ValueError: the weights are made of cheese"),
        ("leave", "died", "rank 1 left: its connection ended"),
        ("freeze", "stalled", "rank 1 has given no sign of life"),
        ("mute", "stalled", "rank 1 has given no sign of life"),
    ],
)
def test_a_rank_that_is_lost_ends_the_call_by_name_and_the_next_group_works(
    kind: str, cause: str, said: str, tmp_path: Path
) -> None:
    async def main() -> None:
        async with server(tmp_path) as here:
            await ready(here.supervisor)
            before = here.group.pids
            fault = {"rank": 1, "step": 2, "kind": kind}
            with pytest.raises(GroupLostError, match=said) as lost:
                await end_of(here.supervisor, paint("c", 400, fault, step_s=0.05))
            assert lost.value.cause == cause
            assert not here.supervisor.is_ready
            assert here.supervisor.status().state == "restarting"
            assert said in here.supervisor.why
            await ready(here.supervisor)
            assert not any(map(is_alive, before))
            assert isinstance(await end_of(here.supervisor, paint("d")), Painted)
            assert here.supervisor.status().restarts == {cause: 1}

    run(main)


def test_a_feeder_that_gets_nowhere_is_stalled(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as here:
            await ready(here.supervisor)
            with pytest.raises(GroupLostError, match=r"no progress .*denoising") as lost:
                await end_of(here.supervisor, paint("c", 9, {"rank": 0, "step": 3, "kind": "hang"}))
            assert lost.value.cause == "stalled"

    run(main)


def test_a_call_whose_end_is_never_told_is_found(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as here:
            await ready(here.supervisor)
            with pytest.raises(GroupLostError, match="did not end"):
                await end_of(here.supervisor, paint("c", 2, {"rank": 0, "step": 0, "kind": "no end"}))

    run(main)


def test_a_failed_call_leaves_the_group_as_it_was(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as here:
            await ready(here.supervisor)
            pids = here.group.pids
            ends = await asyncio.gather(
                *(end_of(here.supervisor, paint(n, 2, {"rank": 0, "step": 0, "kind": "invalid"})) for n in "ab")
            )
            assert [end.kind for end in ends if isinstance(end, Failed)] == ["invalid", "invalid"]
            assert isinstance(await end_of(here.supervisor, paint("c")), Painted)
            assert here.group.pids == pids

    run(main)


def test_a_call_that_ranks_could_not_read_is_not_sent(tmp_path: Path) -> None:
    """It would be their end: who speaks so to them is none they know."""

    async def main() -> None:
        async with server(tmp_path) as here:
            await ready(here.supervisor)
            for wrong in (
                paint("a", negative=object()),
                Paint(call="a", items=(Item(job="a", prompt=3, seed=1),)),  # pyright: ignore[reportArgumentType]
                paint("a", large="x" * (9 << 20)),
            ):
                ends = await asyncio.gather(end_of(here.supervisor, wrong), end_of(here.supervisor, paint("b")))
                assert isinstance(ends[0], Failed)
                assert ends[0].kind == "invalid"
                assert isinstance(ends[1], Painted)
            assert here.supervisor.losses == {}

    run(main)


def test_a_call_is_stopped_at_a_step(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as here:
            await ready(here.supervisor)
            steps = 0
            async for event in here.supervisor.paint(paint("c", 500, step_s=0.05)):
                steps += 1
                if steps == 2:
                    here.supervisor.stop_call("c", "cancelled")
                    here.supervisor.stop_call("c", "twice")
                    here.supervisor.stop_call("unknown", "no such")
                if isinstance(event, Failed):
                    assert (event.kind, event.message) == ("stopped", "cancelled")
            assert steps < 20
            assert isinstance(await end_of(here.supervisor, paint("d")), Painted)
            assert here.supervisor.losses == {}

    run(main)


def test_a_call_that_nobody_waits_for_is_stopped(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as here:
            await ready(here.supervisor)
            events = here.supervisor.paint(paint("c", 10_000, step_s=0.05))
            async for _ in events:
                break
            await events.aclose()
            waiting = asyncio.create_task(end_of(here.supervisor, paint("d", 10_000, step_s=0.05)))
            await eventually(lambda: here.supervisor.status().call == "d", "the next call begins")
            waiting.cancel()
            queued = [asyncio.create_task(end_of(here.supervisor, paint(name))) for name in "ef"]
            await asyncio.sleep(0)
            queued[0].cancel()  # one that has not begun
            assert isinstance(await queued[1], Painted)
            assert here.supervisor.losses == {}
            assert here.supervisor.status().totals["calls"] == 1

    run(main)


def test_a_call_that_waits_is_stopped_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path, at_start={"rank": 0, "step": 0, "kind": "hang"}) as here:
            waiting = asyncio.create_task(end_of(here.supervisor, paint("c")))
            await asyncio.sleep(0.1)
            here.supervisor.stop_call("c", "cancelled")
            end = await waiting
            assert isinstance(end, Failed)
            assert (end.kind, end.message) == ("stopped", "cancelled.")

    run(main)


def test_a_call_that_ignores_its_stop_is_a_stall(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as here:
            await ready(here.supervisor)
            events = here.supervisor.paint(paint("c", 10_000, {"rank": 0, "step": 0, "kind": "deaf"}, step_s=0.05))

            async def stop_it() -> None:
                async for _ in events:
                    here.supervisor.stop_call("c", "cancelled")

            with pytest.raises(GroupLostError, match="after it was told to end") as lost:
                await stop_it()
            assert lost.value.cause == "stalled"
            await ready(here.supervisor)

    run(main)


def test_calls_that_came_while_the_group_was_lost_wait_for_the_next_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as here:
            await ready(here.supervisor)
            first = asyncio.create_task(end_of(here.supervisor, paint("a", 9, {"rank": 1, "step": 2, "kind": "die"})))
            second = asyncio.create_task(end_of(here.supervisor, paint("b")))
            with pytest.raises(GroupLostError):
                await first
            assert isinstance(await second, Painted)

    run(main)


def test_it_is_ready_only_when_a_step_ran_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parafuse.launch.serve.group_supervisor.STEP_SHOWS_S", 1.0)

    async def main() -> None:
        probe = Probe(call=paint("probe", 2, {"rank": 9, "step": 0, "kind": "skips"}))
        async with server(tmp_path, probe=probe) as here:
            await eventually(lambda: here.supervisor.losses, "the probe is found wanting")
            assert here.supervisor.losses == {"stalled": 1}
            assert "rank 1 had no part in a probe" in here.supervisor.why

    run(main)


@pytest.mark.parametrize(("kind", "cause"), [("invalid", "failed"), ("hang", "stalled"), ("die", "died")])
def test_a_probe_that_goes_wrong_is_a_loss(kind: str, cause: str, tmp_path: Path) -> None:
    async def main() -> None:
        probe = Probe(call=paint("probe", 2, {"rank": 0, "step": 1, "kind": kind}))
        async with server(tmp_path, probe=probe) as here:
            await eventually(lambda: here.supervisor.losses, "the loss")
            assert set(here.supervisor.losses) == {cause}
            assert not here.supervisor.is_ready

    run(main)


def test_an_idle_group_is_probed_and_a_rank_that_was_stopped_meanwhile_found(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path, probe=Probe(call=paint("probe", 1), every_s=0.5)) as here:
            await ready(here.supervisor)
            before = here.supervisor.status().totals
            started = here.supervisor.status().ranks
            await eventually(
                lambda: here.supervisor._probe_begun or here.supervisor._probe_ended, "a probe while it is idle"
            )
            assert here.supervisor.is_ready, "it stays ready meanwhile"
            await asyncio.sleep(1.5)
            assert all((one.last_step_age_s or 0) < 1.4 for one in here.supervisor.status().ranks)
            assert here.supervisor.status().totals == before, "probes are no calls"
            os.kill(started[1].pid, signal.SIGSTOP)
            await eventually(lambda: here.supervisor.losses == {"stalled": 1}, "the stopped rank")
            await ready(here.supervisor)

    run(main)


def test_a_group_that_never_loads_or_never_speaks_is_a_stall(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path, at_start={"rank": 1, "step": 0, "kind": "hang", "starts": 1}) as here:
            await eventually(lambda: here.supervisor.losses, "the loss")
            assert "rank 1 has made no progress" in here.supervisor.why
            assert "loading" in here.supervisor.why
            await ready(here.supervisor)

    run(main)


def test_a_crash_loop_waits_with_an_alarm_and_ends_when_its_reason_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        budget = Budget(limit=2, window_s=600.0, first_wait_s=1.0)
        async with server(tmp_path, ranks=1, budget=budget, at_start={"rank": 0, "kind": "raise", "starts": 4}) as here:
            await eventually(lambda: here.supervisor.status().state == "broken", "the alarm")
            assert "made of cheese" in here.supervisor.why
            await ready(here.supervisor)
            assert here.supervisor.losses == {"failed": 4}

    with caplog.at_level(logging.CRITICAL, "parafuse"):
        run(main)
    assert "alarm: ranks are lost again and again" in caplog.text


def test_a_device_on_which_groups_die_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        devices = Devices(["0", "1", "2"], 2)
        fault = {"rank": 1, "kind": "die", "starts": 3}
        async with server(tmp_path, devices=devices, at_start=fault) as here:
            await ready(here.supervisor)
            assert here.supervisor.status().put_aside == ("1",)
            env = Path(f"/proc/{here.group.pids[1]}/environ").read_bytes().split(b"\0")
            assert b"CUDA_VISIBLE_DEVICES=0,2" in env

    with caplog.at_level(logging.CRITICAL, "parafuse"):
        run(main)
    assert "alarm: device 1 is put aside" in caplog.text


def test_a_machine_that_lends_its_ranks_makes_no_probe(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path, lends=True) as here:
            await ready(here.supervisor)
            assert all(one.last_step_age_s is None for one in here.supervisor.status().ranks)
            os.kill(here.group.pids[0], signal.SIGKILL)
            await eventually(lambda: here.supervisor.losses == {"died": 1}, "the loss")
            await ready(here.supervisor)

    run(main)


def test_close_lets_a_call_end_within_its_grace(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as here:
            await ready(here.supervisor)
            running = asyncio.create_task(end_of(here.supervisor, paint("a", 20, step_s=0.05)))
            waiting = asyncio.create_task(end_of(here.supervisor, paint("b")))
            await eventually(lambda: here.supervisor.status().step, "the first step")
            await here.supervisor.close(30.0)
            assert here.supervisor.status().state == "draining"
            assert isinstance(await running, Painted)
            with pytest.raises(GroupLostError, match="told to end"):
                await waiting

    run(main)


def test_close_stops_a_call_that_takes_too_long(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as here:
            await ready(here.supervisor)
            running = asyncio.create_task(end_of(here.supervisor, paint("a", 10_000, step_s=0.05)))
            await eventually(lambda: here.supervisor.status().step, "the first step")
            await here.supervisor.close(0.1)
            end = await running
            assert isinstance(end, Failed)
            assert end.kind == "stopped"

    run(main)


def test_strangers_at_the_socket_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as here:
            await ready(here.supervisor)
            assert Path(here.link.path).parent.stat().st_mode & 0o777 == 0o700

            def hello(**other: Any) -> bytes:
                known: dict[str, Any] = {"rank": 7, "local_rank": 7, "pid": 1, "world_size": 2, "feeds": False}
                known |= {"generation": here.group.generation} | other
                return encode(Hello(**known))

            for first in (
                hello(generation="of yesterday"),
                hello(rank=0),
                hello(feeds=True),
                encode(Painted(call="c", files=(), receipt="", seconds=0.0)),
                b"\xff\xff\xff\xff" + bytes(100),
                b"GET / HTTP/1.1\r\n\r\n",
            ):
                reader, writer = await asyncio.open_unix_connection(here.link.path)
                writer.write(first)
                assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
                writer.close()
            assert [one.rank for one in here.supervisor.status().ranks] == [0, 1]
            assert isinstance(await end_of(here.supervisor, paint("a")), Painted)
            assert here.supervisor.losses == {}

    run(main)
