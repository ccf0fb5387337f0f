"""The store that replicas share, without Ray: who is in charge, what is passed on, how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from parafuse.errors import ConfigError, ParafuseError
from parafuse.launch.ray_serve import store_host
from parafuse.launch.ray_serve.store_host import StoreHost
from parafuse.launch.serve.jobs import Job, QueueFullError, StaleError, State
from parafuse.launch.serve.messages import End, JobEvent, Wake, decode_frame, encode
from parafuse.launch.serve.settings import Serving
from tests.serve.stores import a_job

LEASE_S = 1.5
EVENT = encode(JobEvent(job="j", state="running", step=1, num_steps=4, preview=b"p" * 100))


def hosted(folder: Path, act: Callable[[StoreHost], Awaitable[Any]], **settings: Any) -> Any:
    """What comes of it on a host that is closed afterwards."""

    async def go() -> Any:
        host = StoreHost(Serving(state=str(folder)), **{"lease_s": LEASE_S, "hold_s": 0.0} | settings)
        try:
            return await act(host)
        finally:
            await host.close()

    return asyncio.run(go())


async def ask(host: StoreHost, method: str, *args: Any, **kwargs: Any) -> Any:
    value, error = await host.ask(method, args, kwargs)
    if error is not None:
        raise error
    return value


async def running(host: StoreHost, epoch: int) -> Job:
    job = await ask(host, "accept", a_job())
    (claimed,) = await ask(host, "claim", [job.id], epoch)
    return claimed


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await check():
            await asyncio.sleep(0.05)


def test_who_says_nothing_loses_its_jobs_and_who_does_keeps_them(tmp_path: Path) -> None:
    async def act(host: StoreHost) -> None:
        quiet, alive = [await ask(host, "begin_epoch", alone=False) for _ in range(2)]
        lost, kept = await running(host, quiet), await running(host, alive)
        cursor, _ = await host.news("b", None)

        async def is_queued() -> bool:
            assert await host.tell("b", alive, []) is None
            return [job.id for job in await ask(host, "queued")] == [lost.id]

        await until(is_queued)
        assert [job.id for job in await ask(host, "running")] == [kept.id]
        assert await ask(host, "epochs") == [alive]
        _, frames = await host.news("b", cursor)
        told = [decode_frame(frame) for frame in frames]
        assert told == [JobEvent(job=lost.id, state="queued"), Wake()]
        assert isinstance(await host.tell("a", quiet, [EVENT]), StaleError)
        with pytest.raises(StaleError, match="no longer in charge"):
            await ask(host, "claim", [lost.id], quiet)

    hosted(tmp_path, act)


def test_who_was_there_before_a_host_began_is_given_time(tmp_path: Path) -> None:
    async def before(host: StoreHost) -> tuple[int, int, str]:
        first, second = [await ask(host, "begin_epoch", alone=False) for _ in range(2)]
        return first, second, (await running(host, first)).id

    first, second, job = hosted(tmp_path, before)

    async def after(host: StoreHost) -> None:
        assert await host.tell("a", first, []) is None
        assert [one.id for one in await ask(host, "running")] == [job]

        async def has_ended() -> bool:
            assert await host.tell("a", first, []) is None
            return await ask(host, "epochs") == [first]

        await until(has_ended)  # the other never came back
        assert second not in await ask(host, "epochs")
        assert [one.id for one in await ask(host, "running")] == [job]

    hosted(tmp_path, after)


def test_news_go_to_the_others_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_host, "NEWS_S", 0.2)

    async def act(host: StoreHost) -> None:
        epoch = await ask(host, "begin_epoch", alone=False)
        of_a, of_b = (await host.news("a", None))[0], (await host.news("b", None))[0]
        frames = [encode(JobEvent(job="j", state="running", step=step, num_steps=9)) for step in range(5)]
        waiting = asyncio.create_task(host.news("b", of_b))
        await asyncio.sleep(0.05)
        await host.tell("a", epoch, frames[:3])
        of_b, heard = await waiting
        assert heard == frames[:3]
        await host.tell("b", epoch, frames[3:4])
        await host.tell("a", epoch, frames[4:])
        assert (await host.news("b", of_b))[1] == frames[4:]
        assert (await host.news("a", of_a))[1] == frames[3:4]
        assert (await host.news("c", ("another host", 10_000)))[1] == []  # begins with what comes now

    hosted(tmp_path, act)


def test_who_is_slow_misses_the_oldest_and_nothing_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_host, "NEWS_S", 0.1)
    monkeypatch.setattr(store_host, "MAX_NEWS", 4)

    async def act(host: StoreHost) -> None:
        epoch = await ask(host, "begin_epoch", alone=False)
        cursor, _ = await host.news("b", None)
        frames = [encode(JobEvent(job="j", state="running", step=step, num_steps=9)) for step in range(6)]
        await host.tell("a", epoch, frames)
        cursor, heard = await host.news("b", cursor)
        assert heard == frames[2:]
        monkeypatch.setattr(store_host, "MAX_NEWS_BYTES", 2 * len(EVENT))
        await host.tell("a", epoch, [EVENT] * 4)
        assert (await host.news("b", cursor))[1] == [EVENT] * 2

    hosted(tmp_path, act)


def test_errors_come_back_as_what_they_are(tmp_path: Path) -> None:
    import pickle

    async def act(host: StoreHost) -> list[ParafuseError | None]:
        return [
            (await host.ask("accept", (a_job(),), {"max_queued_of_key": 0}))[1],
            (await host.ask("claim", ([], 7), {}))[1],
            (await host.ask("close", (), {}))[1],
            (await host.ask("__class__", (), {}))[1],
        ]

    full, stale, *wrong = pickle.loads(pickle.dumps(hosted(tmp_path, act)))
    assert isinstance(full, QueueFullError)
    assert full.of_key
    assert isinstance(stale, StaleError)
    assert [type(one) for one in wrong] == [ConfigError, ConfigError]


def test_all_end_when_it_drains_and_nobody_begins(tmp_path: Path) -> None:
    async def act(host: StoreHost) -> None:
        epoch = await ask(host, "begin_epoch", alone=False)
        job = await running(host, epoch)
        cursor, _ = await host.news("a", None)
        draining = asyncio.create_task(host.drain(20.0))
        _, (frame,) = await host.news("a", cursor)
        assert isinstance(decode_frame(frame), End)
        assert not draining.done()
        assert (await ask(host, "unclaim", job.id, epoch)).state is State.QUEUED
        await ask(host, "end_epoch", epoch)
        assert await draining
        with pytest.raises(StaleError, match="this server is ending"):
            await ask(host, "begin_epoch", alone=False)

    hosted(tmp_path, act)


def test_a_state_has_one_host(tmp_path: Path) -> None:
    async def act(_: StoreHost) -> None:
        with pytest.raises(ConfigError, match="another server uses it"):
            StoreHost(Serving(state=str(tmp_path)), hold_s=0.0)

    hosted(tmp_path, act)
    hosted(tmp_path, lambda host: ask(host, "epochs"))
