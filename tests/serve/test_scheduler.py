"""What comes of jobs, whatever the ranks do with a call: each ends once, or waits again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from parafuse.launch.serve.group import GroupLostError
from parafuse.launch.serve.jobs import Job, JobRequest, JobStore, StaleError, State, StoreError
from parafuse.launch.serve.messages import Failed, JobEvent, Paint, Painted, Stepped
from parafuse.launch.serve.scheduler import Charge, Choose, Scheduler
from parafuse.launch.serve.sqlite_store import SqliteStore

STEPS = 4
Play = Callable[["FakeRanks", Paint], AsyncGenerator[Stepped | Painted | Failed]]


class FakeRanks:
    """Does with each call what the test says; `plays` are used up one by one, the last one for ever."""

    num_ranks = 2

    def __init__(self, *plays: Play):
        self._plays = list(plays)
        self.calls: list[Paint] = []
        self.stopped: dict[str, str] = {}

    async def wait_ready(self) -> None:
        pass

    def stop_call(self, call: str, reason: str) -> None:
        self.stopped[call] = reason

    def paint(self, call: Paint) -> AsyncGenerator[Stepped | Painted | Failed]:
        self.calls.append(call)
        play = self._plays.pop(0) if len(self._plays) > 1 else self._plays[0]
        return play(self, call)


async def well(ranks: FakeRanks, call: Paint) -> AsyncGenerator[Stepped | Painted | Failed]:
    """Steps, and a file for each item; ends early where it is told to stop."""
    for step in range(1, STEPS + 1):
        await asyncio.sleep(0.05)
        if call.call in ranks.stopped:
            yield Failed(call=call.call, kind="stopped", message=ranks.stopped[call.call])
            return
        yield Stepped(call=call.call, step=step, num_steps=STEPS, seconds=0.05)
    files = tuple((f"{number}.png",) for number in range(len(call.items)))
    for item, (name,) in zip(call.items, files, strict=True):
        (Path(call.folder) / name).write_bytes(item.prompt.encode())
    yield Painted(call=call.call, files=files, receipt="{}", seconds=0.2)


async def slowly(ranks: FakeRanks, call: Paint) -> AsyncGenerator[Stepped | Painted | Failed]:
    """Well, after a second: longer than a cancel takes to be seen."""
    await asyncio.sleep(1.0)
    async for event in well(ranks, call):
        yield event


async def slow(ranks: FakeRanks, call: Paint) -> AsyncGenerator[Stepped | Painted | Failed]:
    """Goes on until it is told to stop."""
    for step in range(1, 2000):
        await asyncio.sleep(0.02)
        if call.call in ranks.stopped:
            yield Failed(call=call.call, kind="stopped", message=ranks.stopped[call.call])
            return
        yield Stepped(call=call.call, step=step, num_steps=2000, seconds=0.02)


async def lost(_: FakeRanks, call: Paint) -> AsyncGenerator[Stepped | Painted | Failed]:
    yield Stepped(call=call.call, step=1, num_steps=STEPS, seconds=0.05)
    raise GroupLostError("rank 1 was killed by SIGKILL.", cause="died")


def fails(kind: str) -> Play:
    async def play(_: FakeRanks, call: Paint) -> AsyncGenerator[Stepped | Painted | Failed]:
        yield Failed(call=call.call, kind=kind, message=f"it is {kind}")

    return play


async def one_by_one(queued: Sequence[Job], alone: frozenset[str], now: float) -> Sequence[Job]:
    return queued[:1]


async def all_together(queued: Sequence[Job], alone: frozenset[str], now: float) -> Sequence[Job]:
    first = queued[0]
    return [first] if first.id in alone else [job for job in queued if job.id not in alone]


class Server:
    """A scheduler over a store of the test's own."""

    def __init__(self, folder: Path, ranks: FakeRanks, choose: Choose = one_by_one):
        self.store: JobStore = SqliteStore(folder / "jobs.sqlite", results=folder / "results", inputs=folder / "inputs")
        self.results, self.ranks = folder / "results", ranks
        self.events: list[JobEvent] = []
        charge = Charge(store=self.store, epoch=self.store.begin_epoch(), results=self.results, keep_s=3600.0)
        self.scheduler = Scheduler(charge, ranks, choose, tell=self.events.append)

    def ask(self, prompt: str, **fields: Any) -> str:
        job = Job(
            id=f"img_{prompt}",
            owner="somebody",
            request=JobRequest(kind="image", prompt=prompt, seed=1),
            created_s=time.time(),
            **fields,
        )
        self.scheduler.wake()
        return self.store.accept(job).id

    def of(self, job: str) -> Job:
        found = self.store.get(job)
        assert found is not None
        return found

    async def until(self, check: Callable[[], object]) -> None:
        running = asyncio.create_task(self.scheduler.run())
        try:
            async with asyncio.timeout(30):
                while not check():
                    if running.done():
                        running.result()
                    await asyncio.sleep(0.02)
        finally:
            running.cancel()

    def over(self, *jobs: str) -> bool:
        return all(self.of(job).state.is_over for job in jobs)


def test_a_job_is_painted_once_and_its_files_are_its_own(tmp_path: Path) -> None:
    server = Server(tmp_path, FakeRanks(well), all_together)
    jobs = [server.ask("a"), server.ask("b")]
    asyncio.run(server.until(lambda: server.over(*jobs) and not list(server.results.glob("try-*"))))
    assert [len(call.items) for call in server.ranks.calls] == [2]
    for job, prompt in zip(jobs, "ab", strict=True):
        done = server.of(job)
        assert done.state == State.DONE
        assert done.tries == 1
        assert (server.results / done.folder / done.files[0]).read_bytes() == prompt.encode()
        assert done.rank_seconds > 0.1
    assert len({server.of(job).folder for job in jobs}) == 2
    states = [event.state for event in server.events if event.job == jobs[0]]
    assert states == ["running"] * (STEPS + 1) + ["done"]


def test_lost_ranks_cost_one_try_and_a_second_loss_the_job(tmp_path: Path) -> None:
    server = Server(tmp_path, FakeRanks(lost, well, lost, lost, well))
    first = server.ask("first")
    asyncio.run(server.until(lambda: server.over(first)))
    assert (server.of(first).state, server.of(first).tries) == (State.DONE, 2)
    second = server.ask("second")
    asyncio.run(server.until(lambda: server.over(second)))
    job = server.of(second)
    assert job.state == State.FAILED
    assert job.error is not None
    assert job.error.kind == "lost"
    assert "SIGKILL" in job.error.message


def test_a_job_that_is_cancelled_while_it_runs_stops_the_call(tmp_path: Path) -> None:
    server = Server(tmp_path, FakeRanks(slow, well))
    job, after = server.ask("a"), server.ask("b")

    def check() -> bool:
        if server.of(job).state == State.RUNNING:
            server.store.ask_cancel(job)
        return server.over(job, after)

    asyncio.run(server.until(check))
    assert server.of(job).state == State.CANCELLED
    assert server.of(after).state == State.DONE
    assert list(server.ranks.stopped.values()) == ["cancelled"]


def test_of_a_call_for_two_one_may_be_cancelled_and_the_other_is_painted(tmp_path: Path) -> None:
    server = Server(tmp_path, FakeRanks(slowly), all_together)
    jobs = [server.ask("a"), server.ask("b")]

    def check() -> bool:
        if server.of(jobs[0]).state == State.RUNNING:
            server.store.ask_cancel(jobs[0])
        return server.over(*jobs)

    asyncio.run(server.until(check))
    assert [server.of(job).state for job in jobs] == [State.CANCELLED, State.DONE]
    assert not server.ranks.stopped
    ends = [event.job for event in server.events if State(event.state).is_over]
    assert ends == jobs, "the one that nobody waits for ends at once, and each is told of once"


def test_a_deadline_that_passes_in_a_call_for_two_does_not_wait_for_it(tmp_path: Path) -> None:
    server = Server(tmp_path, FakeRanks(slowly), all_together)
    late, well_done = server.ask("a", deadline_s=time.time() + 0.4), server.ask("b")
    seen: list[State] = []

    def check() -> bool:
        if server.of(late).state.is_over:
            seen.append(server.of(well_done).state)
        return server.over(late, well_done)

    asyncio.run(server.until(check))
    assert [server.of(job).state for job in (late, well_done)] == [State.FAILED, State.DONE]
    assert seen[0] == State.RUNNING
    assert 0 < server.of(late).rank_seconds < server.of(well_done).rank_seconds


def test_one_that_loses_its_ranks_takes_others_with_it_once(tmp_path: Path) -> None:
    async def poisoned(ranks: FakeRanks, call: Paint) -> AsyncGenerator[Stepped | Painted | Failed]:
        async for event in (lost if any(item.prompt == "poison" for item in call.items) else well)(ranks, call):
            yield event

    server = Server(tmp_path, FakeRanks(poisoned), all_together)
    jobs = [server.ask(prompt) for prompt in ("poison", "b", "c")]
    asyncio.run(server.until(lambda: server.over(*jobs)))
    assert [server.of(job).state for job in jobs] == [State.FAILED, State.DONE, State.DONE]
    assert [len(call.items) for call in server.ranks.calls] == [3, 1, 1, 1]


def test_deadlines_end_a_job_that_waits_and_one_that_runs(tmp_path: Path) -> None:
    server = Server(tmp_path, FakeRanks(slow))
    late = server.ask("late", deadline_s=time.time() - 1)
    running = server.ask("running", deadline_s=time.time() + 0.5)
    asyncio.run(server.until(lambda: server.over(late, running)))
    for job in (late, running):
        error = server.of(job).error
        assert server.of(job).state == State.FAILED
        assert error is not None
        assert error.kind == "deadline"


def test_deadlines_pass_while_the_ranks_are_away(tmp_path: Path) -> None:
    class Away(FakeRanks):
        async def wait_ready(self) -> None:
            await asyncio.sleep(60)

    server = Server(tmp_path, Away(well))
    late, other = server.ask("late", deadline_s=time.time() + 0.2), server.ask("other")
    asyncio.run(server.until(lambda: server.over(late)))
    assert (server.of(late).state, server.of(other).state) == (State.FAILED, State.QUEUED)
    assert [(event.job, event.state) for event in server.events] == [(late, "failed")]


def test_a_job_that_its_client_deletes_in_between_ends_nothing_else(tmp_path: Path) -> None:
    """It was over for the store before it was for the supervisor."""
    server = Server(tmp_path, FakeRanks(slowly), all_together)
    gone, other = server.ask("a"), server.ask("b")

    def check() -> bool:
        if server.of(other).state == State.RUNNING and server.store.get(gone) is not None:
            server.store.cancelled(gone, 1, keep_s=1.0)
            assert server.store.delete(gone)
        return server.over(other)

    asyncio.run(server.until(check))
    assert server.of(other).state == State.DONE


def test_what_fails_with_others_is_tried_alone_and_costs_no_try(tmp_path: Path) -> None:
    server = Server(tmp_path, FakeRanks(fails("memory"), well), all_together)
    jobs = [server.ask("a"), server.ask("b")]
    asyncio.run(server.until(lambda: server.over(*jobs)))
    assert [server.of(job).state for job in jobs] == [State.DONE, State.DONE]
    assert [server.of(job).tries for job in jobs] == [1, 1]
    assert [len(call.items) for call in server.ranks.calls] == [2, 1, 1]


@pytest.mark.parametrize("kind", ["invalid", "memory", "unsupported", "internal"])
def test_a_call_that_fails_on_all_ranks_fails_the_job_by_name(tmp_path: Path, kind: str) -> None:
    server = Server(tmp_path, FakeRanks(fails(kind), well))
    job, after = server.ask("a"), server.ask("b")
    asyncio.run(server.until(lambda: server.over(job, after)))
    error = server.of(job).error
    assert error is not None
    assert (error.kind, error.message) == (kind, f"it is {kind}")
    assert server.of(after).state == State.DONE


def test_a_server_that_drains_lets_the_job_wait_for_the_next_one(tmp_path: Path) -> None:
    server = Server(tmp_path, FakeRanks(slow))
    job = server.ask("a")

    async def play() -> None:
        running = asyncio.create_task(server.scheduler.run())
        while server.scheduler.running is None:
            await asyncio.sleep(0.02)
        await server.scheduler.drain(0.2)
        await asyncio.wait_for(running, 20)

    asyncio.run(play())
    assert (server.of(job).state, server.of(job).tries) == (State.QUEUED, 0)


def test_a_call_that_does_not_stop_in_time_costs_no_try(tmp_path: Path) -> None:
    """A step may take longer than a server may take to end."""

    async def deaf(ranks: FakeRanks, call: Paint) -> AsyncGenerator[Stepped | Painted | Failed]:
        await asyncio.sleep(60)
        yield Failed(call=call.call, kind="stopped", message="late")

    server = Server(tmp_path, FakeRanks(deaf))
    job = server.ask("a")

    async def play() -> None:
        running = asyncio.create_task(server.scheduler.run())
        while server.scheduler.running is None:
            await asyncio.sleep(0.02)
        await server.scheduler.drain(0.1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(play())
    assert (server.of(job).state, server.of(job).tries) == (State.QUEUED, 0)


def test_a_supervisor_that_was_replaced_changes_nothing_any_more(tmp_path: Path) -> None:
    server = Server(tmp_path, FakeRanks(slow))
    job = server.ask("a")

    async def play() -> None:
        running = asyncio.create_task(server.scheduler.run())
        while server.of(job).state != State.RUNNING:
            await asyncio.sleep(0.02)
        server.store.begin_epoch()
        server.store.ask_cancel(job)
        with pytest.raises(StaleError):
            await asyncio.wait_for(running, 20)

    asyncio.run(play())
    assert server.of(job).state != State.DONE


def test_a_store_that_fails_for_a_while_loses_no_painted_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parafuse.launch.serve.scheduler.PATIENCE_S", 0.05)
    server = Server(tmp_path, FakeRanks(well))
    job, commit, faults = server.ask("a"), server.store.commit, iter(range(3))

    def full(*args: Any, **kwargs: Any) -> Job:
        if next(faults, None) is not None:
            raise StoreError("the disk is full.")
        return commit(*args, **kwargs)

    monkeypatch.setattr(server.store, "commit", full)
    asyncio.run(server.until(lambda: server.over(job)))
    assert (server.of(job).state, len(server.ranks.calls)) == (State.DONE, 1)
