"""`python -m parafuse.launch.serve.rank`: one rank of a server's group, started by its supervisor.

It is told by its environment: the launcher's variables, and those below. It says Hello, loads the model together with
the other ranks, and paints what it is given until it is told to end. It ends with the process that started it, with its
supervisor's socket, and with any other rank of its machine.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from msgspec import Struct

from parafuse.errors import ConfigError, ParafuseError, RankError
from parafuse.launch.serve.beats import IDLE, Line, Progress
from parafuse.launch.serve.messages import Hello, Paint
from parafuse.parallel.rank_entry import enter, record

SOCKET_ENV = "PARAFUSE_SERVE_SOCKET"
"""Unix socket of this machine's supervisor."""
JOB_ENV = "PARAFUSE_SERVE_JOB"
"""JSON file with a RankJob."""
GENERATION_ENV = "PARAFUSE_SERVE_GENERATION"
FEEDS_ENV = "PARAFUSE_SERVE_FEEDS"
"""1 on the machine whose first rank is given the calls."""


class RankJob(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all ranks of a group are to do."""

    model: str
    config: dict[str, Any] = {}
    """As in a file of `Config.from_file`."""
    max_loras: int = 4
    loras: str | None = None
    """Folder of LoRA files."""
    verbose: bool = False
    """What libraries print is shown."""
    inputs: str = ""
    """Folder of the pictures that calls name."""
    results: str = ""
    """Folder that calls' own folders are in; empty: anywhere."""
    expect: dict[str, Any] | None = None
    """Keywords of the calls to come, by which a layout is chosen where the config names none."""


def main() -> int:
    """Exit code 0 after End; else what `record` has written says why."""
    enter()
    ending = Ending()
    try:
        _serve(ending)
    except Exception as error:
        traceback.print_exc()
        ending.end(error)
    ending.let_go()
    return 0


class Ending:
    """Ends this process with a recorded error, from any thread, once; other threads may be in an exchange for ever."""

    def __init__(self) -> None:
        self._lock, self._is_over = threading.Lock(), False

    def let_go(self) -> None:
        """From now on it ends by itself, and nothing that goes is an error."""
        self._is_over = True

    def lost(self, why: str) -> None:
        """Another process has gone. Once `let_go` was called nothing happens."""
        if not self._is_over:
            self.end(RankError(why))

    def end(self, error: Exception) -> NoReturn:
        self._lock.acquire()  # never given back: the first error is the one that is told
        is_plain = isinstance(error, ParafuseError)
        code = error.exit_code if isinstance(error, ParafuseError) else 1
        record(error, one_line=is_plain, exit_code=code)
        print(f"parafuse: rank {os.environ.get('RANK')}: {error}", file=sys.stderr, flush=True)
        os._exit(code)


def _serve(ending: Ending) -> None:
    job = msgspec.json.decode(Path(_told(JOB_ENV)).read_bytes(), type=RankJob)
    rank, local_rank = int(_told("RANK")), int(_told("LOCAL_RANK"))
    feeds = os.environ.get(FEEDS_ENV) == "1" and local_rank == 0
    line, progress = Line(_told(SOCKET_ENV), ending.lost), Progress(rank)
    line.send(
        Hello(
            rank=rank,
            local_rank=local_rank,
            pid=os.getpid(),
            world_size=int(_told("WORLD_SIZE")),
            feeds=feeds,
            generation=os.environ.get(GENERATION_ENV, ""),
        )
    )
    line.listen()
    line.beat(progress)
    _paint(job, feeds, line, progress, ending)


def _paint(job: RankJob, feeds: bool, line: Line, progress: Progress, ending: Ending) -> None:
    """Loads, and serves until the end."""
    from parafuse.launch import quiet

    if not job.verbose:
        quiet.silence_libraries()
    from parafuse.config import Config
    from parafuse.engine.engine import Engine
    from parafuse.engine.source import locate
    from parafuse.launch.serve.feed import Companions, Feed
    from parafuse.launch.serve.painting import Painter, failed, read_pictures
    from parafuse.launch.serve.phases import Phases

    quiet.hide_loading_bars()
    config = Config.from_dict(job.config, where=f"{JOB_ENV}: config")
    engine = Engine.from_pretrained(job.model, config, expect=job.expect if config.parallel.is_chosen else None)
    world = engine.world
    world.watch, progress.device = progress.move, world.device
    companions = Companions(world, ending.lost)
    feed = Feed(world, feeds, line, progress)
    phases = Phases(engine.pipeline, progress, prepares=bool(engine.handle.applied))
    loras = None if job.loras is None else Path(job.loras)
    defaults = locate(job.model, allow_pickle=config.allow_pickle).defaults
    painter = Painter(engine, feed.leader, line, progress, defaults=defaults, loras=loras, max_loras=job.max_loras)

    def read(call: Paint) -> dict[str, tuple[bytes, ...]] | None:
        """On the feeding rank: what other ranks need not hear of is answered here."""
        try:
            _check_folder(call, job.results)
            return read_pictures(call, Path(job.inputs))
        except (ParafuseError, OSError) as error:
            line.send(failed(call, error))
            return None

    progress.enter(IDLE)
    while (handed := feed.next(read)) is not None:
        painter.paint(handed)
    companions.let_go()
    ending.let_go()
    world.everyone("the end", "")
    phases.close()
    engine.close()


def _check_folder(call: Paint, results: str) -> None:
    folder = Path(call.folder).resolve()
    if call.folder and results and not folder.is_relative_to(Path(results).resolve()):
        raise ConfigError(f"folder={call.folder!r}: is not in the folder of results.")
    if call.folder and not folder.is_dir():
        raise ConfigError(f"folder={call.folder!r}: is not there.")


def _told(name: str) -> str:
    """Raises ConfigError for a variable that is missing."""
    if name not in os.environ:
        raise ConfigError(f"{name}: is not in the environment; the server's supervisor starts ranks, not a user.")
    return os.environ[name]


if __name__ == "__main__":
    sys.exit(main())
