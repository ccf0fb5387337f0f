"""A group of rank processes of one machine, by whatever supervises them."""

from __future__ import annotations

from typing import Protocol

from parafuse.errors import RankError
from parafuse.parallel.ranks import RankFailure


class GroupLostError(RankError):
    """The ranks that ran a call are gone; what it was for may be tried again on the next ones."""

    def __init__(self, message: str, *, cause: str):
        super().__init__(message)
        self.cause = cause
        """died, stalled, failed."""


class RankGroup(Protocol):
    """Starts ranks that run `python -m parafuse.launch.serve.rank`, sees them end, and ends them.

    `SpawnedGroup` (spawned.py) stands on `parallel/ranks.py`: one machine, no torch in this process. `ElasticGroup`
    (elastic.py) on torch's elastic agent and its rendezvous: several machines, each with a group of its own."""

    @property
    def generation(self) -> str:
        """Names the present start of the group; ranks say it in their Hello. Changes with each start."""
        ...

    @property
    def pids(self) -> list[int]:
        """Of this machine's ranks that were started last, by local rank."""
        ...

    def start(self, devices: list[str]) -> None:
        """Starts the ranks of this machine, on these devices (indices that CUDA_VISIBLE_DEVICES takes; none on a CPU).
        Does not wait for them."""
        ...

    def poll(self) -> RankFailure | None:
        """The rank that failed first since the last start, None while none has. Does not wait."""
        ...

    def kill(self) -> None:
        """Ends all ranks of this machine now (SIGKILL, also those that are stopped), and waits until they are gone."""
        ...

    def close(self) -> None:
        """The same, and nothing is started any more."""
        ...
