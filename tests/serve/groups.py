"""Groups of fake ranks for tests, and waiting for what must come."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parafuse.launch.serve.group import RankGroup
from parafuse.launch.serve.messages import FromRank, Hello
from parafuse.launch.serve.rank_link import RankLink

COMMAND = [sys.executable, "-m", "tests.serve.fake_rank"]
PATIENCE_S = 60.0
"""For what must come at all, on a machine that is busy."""
KINDS = ("spawned", "elastic")


def make_group(kind: str, ranks: int, env: dict[str, str]) -> RankGroup:
    if kind == "spawned":
        from parafuse.launch.serve.spawned import SpawnedGroup

        return SpawnedGroup(COMMAND, ranks, env=env, show=())
    from parafuse.launch.serve.elastic import ElasticGroup

    return ElasticGroup(COMMAND, ranks, env=env, show=())


def job_file(folder: Path, **job: Any) -> str:
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    return str(file)


async def eventually(is_so: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """What `is_so` returns once it is true."""
    deadline = time.monotonic() + patience_s
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"{what}: not within {patience_s} s"
        await asyncio.sleep(0.02)
    return found


def is_alive(pid: int) -> bool:
    """Whether the process runs or is stopped; one that has ended and was not waited for does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


class Ears:
    """What the ranks say at a link."""

    def __init__(self) -> None:
        self.said: list[FromRank] = []
        self.gone: list[int] = []

    async def open(self, link: RankLink, group: RankGroup) -> None:
        await link.open(lambda: group.generation, lambda _rank, message: self.said.append(message), self._gone)

    def _gone(self, rank: int, _why: str) -> None:
        self.gone.append(rank)

    def hellos(self, generation: str) -> list[Hello]:
        return [one for one in self.said if isinstance(one, Hello) and one.generation == generation]


def child_env() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])}
