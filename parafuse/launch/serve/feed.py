"""Hands each call on: from the supervisor to the feeding rank, and from there to all, through torch's store."""

from __future__ import annotations

import math
import os
import queue
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from parafuse.engine.workers import get, put, take_away
from parafuse.errors import RankError
from parafuse.launch.serve.beats import Line, Progress
from parafuse.launch.serve.messages import End, Paint
from parafuse.parallel.world import World, wait_for

LOOK_S = 0.25
"""How often a rank that waits for a call shows that it does."""
CAUSE_FIRST_S = 0.3
"""How long the end of another rank leaves this one to find the cause by itself, before it ends too."""


class Handed(Struct, frozen=True, kw_only=True):
    """A call as all ranks get it."""

    paint: Paint | None = None
    """None: the end."""
    pictures: dict[str, tuple[bytes, ...]] = {}
    """Keyword -> the contents of the files that the call names: other machines have them not."""


class Feed:
    """Of one rank. All ranks take the same calls in the same order, and are through with each together."""

    def __init__(self, world: World, feeds: bool, line: Line, progress: Progress):
        """Collective. Raises RankError unless one rank feeds."""
        said = world.everyone("who feeds", "1" if feeds else "")
        feeding = [rank for rank, word in enumerate(said) if word]
        if len(feeding) != 1:
            raise RankError(f"{len(feeding)} ranks say that they are given the calls ({feeding}); one must.")
        self.leader = feeding[0]
        """The rank that is given the calls."""
        self._world, self._line, self._progress, self._number = world, line, progress, 0

    @property
    def leads(self) -> bool:
        return self._world.rank == self.leader

    def next(self, read: Callable[[Paint], dict[str, tuple[bytes, ...]] | None]) -> Handed | None:
        """The next call, however long it takes to come; None at the end. `read`: gives, on the feeding rank, the
        contents of the files of a call; None where it was answered, and no other rank need hear of it."""
        return self._given(read) if self.leads else self._heard()

    def _given(self, read: Callable[[Paint], dict[str, tuple[bytes, ...]] | None]) -> Handed | None:
        while True:
            try:
                message = self._line.calls.get(timeout=LOOK_S)
            except queue.Empty:
                self._progress.move()
                continue
            if isinstance(message, End):
                self._tell(Handed())
                return None
            pictures = read(message)
            if pictures is not None:
                handed = Handed(paint=message, pictures=pictures)
                self._tell(handed)
                return handed

    def _tell(self, handed: Handed) -> None:
        if self._world.size == 1:
            return
        if self._number:
            take_away(self._world.store, self._key)  # all are through with it
        self._number += 1
        put(self._world.store, self._key, msgspec.json.encode(handed).decode())

    def _heard(self) -> Handed | None:
        self._number += 1
        wait_for(self._world.store, self._key, math.inf, self._progress.move)
        handed = msgspec.json.decode(get(self._world.store, self._key), type=Handed)
        return None if handed.paint is None else handed

    @property
    def _key(self) -> str:
        return f"{self._world.name}/call/{self._number}"


class Companions:
    """The other ranks on this machine: when one of them ends, this one does too. Of other machines the supervisors see
    to that."""

    def __init__(self, world: World, lost: Callable[[str], None]):
        """Collective. `lost` is called in a thread of its own."""
        said = world.everyone("where ranks are", f"{_machine()} {os.getpid()}")
        self._is_over, self._lost = False, lost
        self._watched: dict[int, int] = {}
        """File descriptor of a process -> its rank."""
        for rank, word in enumerate(said):
            machine, _, pid = word.rpartition(" ")
            if rank != world.rank and machine == _machine():
                try:
                    self._watched[os.pidfd_open(int(pid))] = rank
                except ProcessLookupError:
                    self._report(rank)
        if self._watched:
            threading.Thread(target=self._watch, name="other ranks", daemon=True).start()

    def let_go(self) -> None:
        """From now on others may end."""
        self._is_over = True

    def _watch(self) -> None:
        watching = select.poll()
        for process in self._watched:
            watching.register(process, select.POLLIN)
        self._report(self._watched[watching.poll()[0][0]])

    def _report(self, rank: int) -> None:
        if not self._is_over:
            time.sleep(CAUSE_FIRST_S)
            self._lost(f"rank {rank} has ended.")


def _machine() -> str:
    """Equal for processes that see each other by their ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
