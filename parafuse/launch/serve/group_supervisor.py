"""Keeps a group of ranks running, and lets one call after the other run on it.

Whatever happens to ranks ends in one of two ways, within a bounded time: the call ends, or the group is lost, its ranks
are killed, and the caller hears why. A group is ready when a real step has run on each of its ranks."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from parafuse.errors import RankError
from parafuse.launch.serve.calls import Call
from parafuse.launch.serve.group import GroupLostError, RankGroup
from parafuse.launch.serve.messages import (
    Beat,
    End,
    Failed,
    FrameError,
    FromRank,
    Hello,
    Paint,
    Painted,
    RankStatus,
    Status,
    Stepped,
    Stop,
)
from parafuse.launch.serve.rank_link import RankLink
from parafuse.launch.serve.restarts import Budget, Devices
from parafuse.launch.serve.watchdog import STARTING, Watchdog
from parafuse.log import logger
from parafuse.parallel.ranks import RankFailure

T = TypeVar("T")

LOOK_S = 0.05
MAX_STARTS = 2
"""Starts of the ranks in a row that may fail before whoever waits for them is told so."""
LEFT_S = 1.0
"""How long the end of a process whose connection ended may take to show."""
STEP_SHOWS_S = 15.0
"""How long a rank may take to say that it took part in a probe that has ended."""
END_S = 3.0
"""For ranks that are told to end to do so, and for a call that is stopped then."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The short call that shows that ranks work."""

    call: Paint
    """With an empty folder and few steps."""
    every_s: float = 60.0
    """After so long without a step on some rank."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Why a group has to be ended."""

    cause: str
    """died, stalled, failed."""
    summary: str
    details: str = ""
    rank: int | None = None
    """Global rank that is to blame, where one of this machine's is."""


@dataclass
class _Heard:
    """What a rank said last, and when."""

    hello: Hello
    at: float
    beat: Beat | None = None

    @property
    def stepped_at(self) -> float | None:
        age = None if self.beat is None else self.beat.last_step_age_s
        return None if age is None else self.at - age


class GroupSupervisor:
    """Of one machine's ranks. One event loop uses it; `start` it, and `close` it."""

    def __init__(
        self,
        group: RankGroup,
        link: RankLink,
        *,
        ranks: int,
        num_ranks: int | None = None,
        probe: Probe | None,
        watchdog: Watchdog | None = None,
        budget: Budget | None = None,
        devices: Devices | None = None,
    ):
        """`ranks`: of this machine; `num_ranks`: of all, where there are more. `probe` None: this machine takes no
        calls, it lends its ranks."""
        self._group, self._link, self._probe = group, link, probe
        self._ranks, self.num_ranks = ranks, num_ranks or ranks
        self._watchdog, self._budget = watchdog or Watchdog(), budget or Budget()
        self._devices = devices or Devices((), ranks)
        self._clock: Callable[[], float] = time.monotonic
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._hands = ThreadPoolExecutor(1, thread_name_prefix="parafuse-group")
        self._heard: dict[int, _Heard] = {}
        self._local_ranks: dict[int, int] = {}
        """By global rank; kept when a rank has gone."""
        self._left: tuple[int, str, float] | None = None
        """The rank whose connection ended first, why, and when."""
        self._fault: Loss | None = None
        """What was found elsewhere than in `_look`."""
        self._current: Call | None = None
        self._waiting: deque[Call] = deque()
        self._ready = asyncio.Event()
        self._ready_at = self._started_at = 0.0
        self._probe_begun = self._probe_ended = 0.0
        """Of the last probe; the second is 0 while it runs, the first where none was made."""
        self._state, self._why = "starting", "the ranks are starting."
        self._losses: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()

    async def start(self) -> None:
        """Begins to keep the ranks running; does not wait for them."""
        await self._link.open(lambda: self._group.generation, self._hear, self._gone)
        self._task = asyncio.create_task(self._keep(), name="parafuse-group")

    async def wait_ready(self) -> None:
        """Until a real step has run on every rank: for as long as that takes."""
        await self._ready.wait()

    async def until_ready(self) -> None:
        """The same for whoever has to be told where it fails: raises RankError once MAX_STARTS starts have failed, with
        the reason of the last one, and where it is closed meanwhile."""
        before = sum(self._losses.values())
        while not self.is_ready:
            if sum(self._losses.values()) - before >= MAX_STARTS:
                raise RankError(f"the ranks cannot be started: {self.why}")
            if self._closed:
                raise RankError("the ranks were ended.")
            await asyncio.sleep(LOOK_S)

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    @property
    def losses(self) -> dict[str, int]:
        """Groups that were lost so far, by cause."""
        return dict(self._losses)

    @property
    def why(self) -> str:
        """Why it is not ready; '' where it is."""
        return "" if self.is_ready else self._why

    async def paint(
        self, call: Paint, predicted_s: Mapping[str, float] | None = None, *, waits: bool = True
    ) -> AsyncGenerator[Stepped | Painted | Failed]:
        """Runs a call, after those that came before it: its steps, last its end. Leaving it early stops the call.

        `predicted_s`: by phase, of denoising one step's. `waits`: for ranks to be ready, as long as it takes; else it
        fails where they are not. Raises GroupLostError when the ranks are lost meanwhile."""
        if self._closed or not (waits or self.is_ready):
            raise GroupLostError(self._why, cause="failed")
        mine = Call(call, dict(predicted_s or {}), waits=waits)
        self._waiting.append(mine)
        self._advance()
        try:
            while True:
                event = await mine.events.get()
                if isinstance(event, GroupLostError):
                    raise event
                yield event
                if not isinstance(event, Stepped):
                    return
        finally:
            self._stop(mine, "nobody waits for it")

    def stop_call(self, call: str, reason: str) -> None:
        """Ends a call at a step boundary, on all ranks together; one that waits ends at once. Does not wait. A call
        that is over, or was never made, stays as it is."""
        for one in [self._current, *self._waiting]:
            if one is not None and one.paint.call == call:
                self._stop(one, reason)
                return

    def status(self) -> Status:
        """As it is now."""
        now, current = self._clock(), self._current
        if current is not None and current.is_probe:
            current = None
        ranks = [
            RankStatus(
                rank=rank,
                pid=one.hello.pid,
                phase=one.beat.phase if one.beat else STARTING,
                beat_age_s=now - one.at,
                last_step_age_s=None if one.stepped_at is None else now - one.stepped_at,
                memory_bytes=one.beat.memory_bytes if one.beat else 0,
                peak_bytes=one.beat.peak_bytes if one.beat else 0,
            )
            for rank, one in sorted(self._heard.items())
        ]
        return Status(
            state=self._state,
            why=self.why,
            ranks=tuple(ranks),
            restarts=self.losses,
            put_aside=self._devices.put_aside,
            call=current.paint.call if current else "",
            step=current.step if current else 0,
            num_steps=current.num_steps if current else 0,
            call_left_s=current.left_s(now) if current else 0.0,
            totals=dict(self._totals),
        )

    async def close(self, grace_s: float = 0.0) -> None:
        """Ends the ranks. A running call may take `grace_s` until then; calls that wait are not begun."""
        if self._closed:
            return
        self._closed = True
        self._state, self._why = "draining", "the ranks were told to end."
        self._ready.clear()
        self._drop(list(self._waiting), GroupLostError(self._why, cause="failed"))
        try:
            await self._end_in_order(grace_s)
        finally:  # also where nobody waits for it any more
            self._hands.submit(self._group.close)
            self._hands.shutdown(wait=False)
        await asyncio.to_thread(self._hands.shutdown)
        await self._link.close()

    async def _end_in_order(self, grace_s: float) -> None:
        await self._until(lambda: self._current is None, grace_s)
        if self._current is not None and self._task is not None and not self._task.done():
            self._stop(self._current, "the ranks are told to end")
            await self._until(lambda: self._current is None, END_S)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(RankError):
            self._link.send(End())
            await self._until(lambda: not self._heard, END_S)
        self._end_call(GroupLostError(self._why, cause="failed"))

    async def _do(self, act: Callable[..., T], *args: Any) -> T:
        """One act of the group, after those before it: also after a start whose waiter was cancelled."""
        return await asyncio.get_running_loop().run_in_executor(self._hands, act, *args)

    async def _until(self, is_so: Callable[[], bool], patience_s: float) -> None:
        deadline = self._clock() + patience_s
        while not is_so() and self._clock() < deadline:
            await asyncio.sleep(LOOK_S)

    # Groups, one after the other.

    async def _keep(self) -> None:
        while True:
            try:
                loss = await self._one_group()
            except Exception as error:  # of this machine: no process can be made, no memory
                logger.exception("the ranks cannot be watched")
                loss = Loss(cause="failed", summary=f"the ranks cannot be kept: {type(error).__name__}: {error}")
            wait_s = await self._lose(loss)
            await asyncio.sleep(wait_s)

    async def _one_group(self) -> Loss:
        """Starts ranks, and watches them until they are lost."""
        self._heard, self._left, self._fault = {}, None, None
        # On one machine they are known before ranks say them, so that one that dies at once is charged too.
        self._local_ranks = {} if self.num_ranks > self._ranks else {rank: rank for rank in range(self._ranks)}
        self._started_at = self._probe_begun = self._probe_ended = 0.0
        self._watchdog.begin()
        await self._do(self._group.start, self._devices.choose())
        while True:
            failure = await self._do(self._group.poll)
            loss = self._fault or (_of_failure(failure) if failure else self._look(self._clock()))
            if loss is not None:
                return loss
            await asyncio.sleep(LOOK_S)

    async def _lose(self, loss: Loss) -> float:
        """Ends what is left of the ranks, tells the caller, and says how long to wait before the next start."""
        ready_s = self._clock() - self._ready_at if self.is_ready else 0.0
        self._ready.clear()
        self._losses[loss.cause] += 1
        self._state, self._why = "restarting", loss.summary
        self._link.forget()
        self._heard = {}
        await self._do(self._group.kill)
        self._drop([one for one in self._waiting if not one.waits], GroupLostError(loss.summary, cause=loss.cause))
        self._end_call(GroupLostError(loss.summary, cause=loss.cause))  # now that nothing writes its outputs any more
        wait_s = self._budget.lost(ready_s=ready_s)
        logger.error("ranks lost (%s): %s%s", loss.cause, loss.summary, f"\n{loss.details}" if loss.details else "")
        local_rank = self._local_ranks.get(-1 if loss.rank is None else loss.rank)
        for aside in () if local_rank is None else self._devices.charge(local_rank):
            logger.critical("alarm: %s", aside.summary)
        if self._budget.alarm:
            self._state = "broken"
            logger.critical("alarm: ranks are lost again and again; the next start is in %.0f s.", wait_s)
        return wait_s

    def _look(self, now: float) -> Loss | None:
        """What is wrong with ranks whose processes run; else what is due is done."""
        if not self._started_at:
            if not self._group.pids:
                return None  # other machines have not come yet
            self._started_at = now
        if self._left is not None and now - self._left[2] > LEFT_S:
            rank, why, _ = self._left
            return Loss(cause="died", summary=f"rank {rank} left: {why}.", rank=rank)
        stall = self._watchdog.stalled()
        if stall is not None:
            return Loss(cause="stalled", summary=stall.summary, rank=stall.rank)
        missing = self._ranks - len(self._heard)
        limit_s = self._watchdog.limit_s(STARTING)
        if missing and now - self._started_at > limit_s:
            return Loss(
                cause="stalled", summary=f"{missing} of {self._ranks} ranks did not report within {limit_s:.0f} s."
            )
        loss = self._look_at_call(now) or self._look_at_probe(now)
        if loss is None and self.is_ready:
            self._budget.lasted(now - self._ready_at)
        return loss

    def _look_at_call(self, now: float) -> Loss | None:
        """Whether the running call has been forgotten, or goes on though it was stopped."""
        current = self._current
        beats = [one.beat for one in self._heard.values() if one.beat is not None]
        feeder = next((one for one in self._heard.values() if one.hello.feeds), None)
        if current is None or feeder is None or feeder.beat is None:
            return None
        if current.ignores_stop(now, feeder.beat.phase, self._watchdog.limit_s("denoising")):
            return Loss(
                cause="stalled",
                summary=f"rank {feeder.hello.rank} goes on {now - current.stop_told:.1f} s after it was told to end a "
                "call.",
                rank=feeder.hello.rank,
            )
        if any(beat.phase != "idle" for beat in beats):
            current.idle_since = None
        elif current.idle_since is None:
            current.idle_since = now
        elif now - current.idle_since > self._watchdog.limit_s("idle"):
            return Loss(cause="stalled", summary="all ranks wait for a call, and the one that was given did not end.")
        return None

    def _look_at_probe(self, now: float) -> Loss | None:
        """Makes a probe where one is due; the group is ready once it has run on every rank."""
        if len(self._heard) < self._ranks or any(one.beat is None for one in self._heard.values()):
            return None
        if self._probe is None:
            is_loaded = all(one.beat and one.beat.phase not in (STARTING, "loading") for one in self._heard.values())
            if is_loaded and not self.is_ready:
                self._set_ready(now)
            return None
        if self._probe_ended:
            late = [r for r, one in self._heard.items() if (one.stepped_at or 0.0) < self._probe_begun]
            if not late:
                self._probe_begun = self._probe_ended = 0.0
                self._set_ready(now)
            elif now - self._probe_ended > STEP_SHOWS_S:
                named = ", ".join(map(str, sorted(late)))
                return Loss(cause="stalled", summary=f"rank {named} had no part in a probe.", rank=late[0])
        elif not self._probe_begun and self._current is None and self._is_probe_due(now):
            self._probe_begun = now
            self._begin(
                Call(msgspec.structs.replace(self._probe.call, call=f"probe-{secrets.token_hex(8)}"), is_probe=True)
            )
        return None

    def _is_probe_due(self, now: float) -> bool:
        every_s = self._probe.every_s if self._probe else 0.0
        if not self.is_ready:
            return all(one.beat and one.beat.phase == "idle" for one in self._heard.values())
        return any(now - (one.stepped_at or 0.0) > every_s for one in self._heard.values())

    def _set_ready(self, now: float) -> None:
        if not self.is_ready:
            self._ready_at = now
            self._state, self._why = "ready", ""
            self._ready.set()
        self._advance()

    # Calls, one after the other.

    def _advance(self) -> None:
        """Begins the next call, if one waits and can begin."""
        if self.is_ready and self._current is None and self._waiting:
            self._begin(self._waiting.popleft())

    def _begin(self, call: Call) -> None:
        self._current = call
        call.begun_at = self._clock()
        self._watchdog.call(call.kind, call.predicted_s)
        try:
            self._link.send(call.paint)
        except FrameError as error:
            self._end_call(Failed(call=call.paint.call, kind="invalid", message=f"the call cannot be sent: {error}"))
            self._advance()
        except RankError as error:
            self._fault = Loss(cause="died", summary=str(error))  # the call hears of it when the group is ended

    def _stop(self, call: Call, reason: str) -> None:
        if call in self._waiting:
            self._waiting.remove(call)
            call.events.put_nowait(Failed(call=call.paint.call, kind="stopped", message=f"{reason}."))
        elif call is self._current and not call.stop_reason:
            call.stop_reason, call.stop_since = reason, self._clock()
            call.stop_told = call.stop_since
            with contextlib.suppress(RankError):  # then the group is lost, which ends the call
                self._link.send(Stop(call=call.paint.call, reason=reason))

    def _end_call(self, end: Painted | Failed | GroupLostError) -> None:
        call, self._current = self._current, None
        if call is None:
            return
        self._watchdog.call("")
        if not call.is_probe:
            call.events.put_nowait(end)
        elif isinstance(end, Painted):
            self._probe_ended = self._clock()
        elif isinstance(end, Failed):
            self._fault = Loss(cause="failed", summary=f"the probe failed: {end.message}", details=end.details)

    def _drop(self, calls: list[Call], error: GroupLostError) -> None:
        """Ends calls that have not begun."""
        for call in calls:
            self._waiting.remove(call)
            call.events.put_nowait(error)

    # What ranks say.

    def _hear(self, rank: int, message: FromRank) -> None:
        if isinstance(message, Hello):
            self._heard[rank] = _Heard(message, self._clock())
            self._local_ranks[rank] = message.local_rank
            self._watchdog.hello(rank)
        elif isinstance(message, Beat):
            self._heard[rank].beat, self._heard[rank].at = message, self._clock()
            self._watchdog.beat(message)
        elif self._current is not None and message.call == self._current.paint.call:
            self._hear_of_call(self._current, message)

    def _hear_of_call(self, current: Call, message: Stepped | Painted | Failed) -> None:
        if isinstance(message, Stepped):
            current.stepped(message)
            if not current.is_probe:
                self._totals["steps"] += 1
                current.events.put_nowait(message)
            return
        if isinstance(message, Painted) and not current.is_probe:
            self._totals["calls"] += 1
            self._totals["cache_hits"] += message.cache_hits
            self._totals["cache_calls"] += message.cache_calls
            for phase, seconds in message.phases_s.items():
                self._totals[f"seconds_{phase}"] += seconds  # pyright: ignore[reportArgumentType]
        self._end_call(message)
        self._advance()

    def _gone(self, rank: int, why: str) -> None:
        self._heard.pop(rank, None)
        if self._left is None:
            self._left = (rank, why, self._clock())


def _of_failure(failure: RankFailure) -> Loss:
    """A rank that a signal ended has died; one that ended by itself has failed."""
    return Loss(
        cause="died" if failure.exit_code < 0 else "failed",
        summary=failure.summary,
        details=failure.details,
        rank=failure.rank if failure.rank >= 0 else None,
    )
