"""The line to the supervisor: it comes and goes, is silent, sends nonsense, and is never waited for."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from parafuse.launch.serve.clients import Clients
from parafuse.launch.serve.jobs import JobRequest
from parafuse.launch.serve.messages import Estimate, Estimated, JobEvent, Status, Wake, encode, read
from parafuse.launch.serve.supervisor_client import MAX_EVENTS, SupervisorClient

PATIENCE_S = 20.0


def run(test: Callable[[str], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with tempfile.TemporaryDirectory(prefix="pf-") as folder:
            async with asyncio.timeout(PATIENCE_S):
                await test(str(Path(folder) / "s"))

    asyncio.run(bounded())


async def until(look: Callable[[], object]) -> None:
    while not look():
        await asyncio.sleep(0.01)


def asked(settings: dict[str, Any], number: int = 1) -> JobRequest:
    return JobRequest(kind="image", prompt="a tree", seed=1, num_outputs=number, settings=settings)


async def seconds_of(wanted: Estimate) -> Estimated:
    if wanted.settings.get("slow"):
        await asyncio.sleep(60)
    return Estimated(number=wanted.number, seconds=float(wanted.num_outputs))


def test_it_finds_a_supervisor_that_comes_later_and_one_that_comes_again() -> None:
    async def test(path: str) -> None:
        woken: list[int] = []
        async with SupervisorClient(path) as client:
            client.wake()
            assert client.status is None
            assert client.status_age_s == float("inf")
            assert await client.estimate(asked({})) is None
            for start in range(2):
                clients = Clients(path, wake=lambda start=start: woken.append(start), estimate=seconds_of)
                await clients.start()
                await until(lambda start=start: start in woken)
                clients.tell(Status(state="ready", why=str(start)))
                await until(lambda start=start: client.status and client.status.why == str(start))
                assert client.not_ready_s == 0.0
                await clients.close()
                Path(path).unlink(missing_ok=True)

    run(test)


def test_estimates_have_a_limit_of_time() -> None:
    async def test(path: str) -> None:
        clients = Clients(path, wake=lambda: None, estimate=seconds_of)
        await clients.start()
        async with SupervisorClient(path) as client:
            while client.status is None:
                clients.tell(Status(state="ready"))
                await asyncio.sleep(0.01)
            slow = asyncio.create_task(client.estimate(asked({"slow": 1}), patience_s=0.3))
            answers = await asyncio.gather(*(client.estimate(asked({}, number)) for number in range(1, 9)))
            assert [one.seconds for one in answers if one] == [float(number) for number in range(1, 9)]
            assert await slow is None
        await clients.close()

    run(test)


def test_a_watcher_gets_its_own_events_and_bounded() -> None:
    async def test(path: str) -> None:
        heard: list[str] = []
        clients = Clients(path, wake=lambda: None, estimate=seconds_of)
        await clients.start()
        async with SupervisorClient(path) as client:
            client.listen(lambda event: heard.append(event.job if isinstance(event, JobEvent) else ""))
            while client.status is None:
                clients.tell(Status(state="ready"))
                await asyncio.sleep(0.01)
            with client.watch("a") as watch, client.watch("a") as second:
                assert await watch.next(0.01) is None
                for step in range(MAX_EVENTS + 10):
                    clients.tell(JobEvent(job="b", state="running", step=step))
                    clients.tell(JobEvent(job="a", state="running", step=step))
                await until(lambda: len(heard) == 2 * (MAX_EVENTS + 10))
                first = await watch.next(1)
                assert first is not None
                assert (first.job, first.step) == ("a", 10)
                assert await second.next(1) is not None
            clients.tell(JobEvent(job="a", state="done"))
            await until(lambda: heard[-1] == "a")
        await clients.close()

    run(test)


def test_nonsense_ends_the_line_and_it_comes_again() -> None:
    async def test(path: str) -> None:
        lines = 0

        async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal lines
            lines += 1
            if lines == 1:
                writer.write(b"\xff" * 64)
            elif lines == 2:
                writer.write(encode(Wake()))  # no message of a supervisor
            else:
                writer.write(encode(Status(state="ready")))
            await read(reader)
            await reader.read()
            writer.close()

        server = await asyncio.start_unix_server(nonsense, path)
        async with SupervisorClient(path) as client:
            await until(lambda: client.status)
            assert lines == 3
        server.close()

    run(test)


def test_a_supervisor_that_reads_nothing_holds_up_nobody() -> None:
    async def test(path: str) -> None:
        async def deaf(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer):
                while not over:
                    writer.write(encode(Status(state="ready")))
                    await asyncio.sleep(0.05)

        over = False
        server = await asyncio.start_unix_server(deaf, path, limit=1024)
        async with SupervisorClient(path) as client:
            await until(lambda: client.status)
            for _ in range(1000):
                client.wake()
            large = {"x": "y" * 100_000}
            answers = await asyncio.gather(*(client.estimate(asked(large), patience_s=0.3) for _ in range(400)))
            assert answers == [None] * 400
        over = True
        server.close()
        await asyncio.sleep(0.2)

    run(test)
