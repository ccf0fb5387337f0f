"""One of the engines that a batch is spread over: an actor of Ray's, with ranks of its own."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from parafuse.config import Config
from parafuse.errors import ConfigError, ParafuseError
from parafuse.launch.batch.lines import Place, read, text_at
from parafuse.launch.batch.results import OF, RECEIPT, Results
from parafuse.launch.serve.async_engine import AsyncEngine, Result
from parafuse.launch.serve.card import card_of
from parafuse.launch.serve.jobs import JobRequest

if TYPE_CHECKING:
    from PIL.Image import Image

DONE, WRONG, FAILED, LOST = "done", "wrong", "failed", "lost"
"""What became of a line: painted; refused, since what it asks for is wrong; failed on the ranks; or nothing, since this
replica has no ranks."""
START_S = 1800.0
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """What all replicas are told."""

    file: str
    out: str
    model: str
    config: dict[str, Any]
    ranks: int
    loras: str | None = None


@dataclass(frozen=True)
class Outcome:
    """Of one line."""

    number: int
    status: str
    message: str = ""


class Replica:
    """Paints chunks of lines, one line after the other. Ray makes one in each actor."""

    def __init__(self, job: dict[str, Any]):
        """`job`: a BatchJob. Starts the ranks; where that fails, every chunk says why."""
        os.environ["OMP_NUM_THREADS"] = "1"  # of each rank, as torchrun's; Ray's own number is for all of them together
        self._job = BatchJob(**job)
        self._results = Results(Path(self._job.out))
        self._card = card_of(self._job.model, loras=self._job.loras)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="engine", daemon=True).start()
        config = Config.from_dict(self._job.config)
        self.fault = "" if (self._results.folder / OF).is_file() else f"--out {self._job.out}: is not seen from here."
        try:
            self._engine = AsyncEngine(self._job.model, ranks=self._job.ranks, config=config, loras=self._job.loras)
            if not self.fault:
                self._run(self._engine.start()).result(START_S)
        except (ParafuseError, TimeoutError) as error:
            self.fault = _line(error)

    def __call__(self, chunk: dict[str, Any]) -> dict[str, list[Any]]:
        """A chunk has one row: its lines' `numbers`, `offsets` and `digests`. A row for each line."""
        columns = zip(*(list(chunk[name][0]) for name in ("numbers", "offsets", "digests")), strict=True)
        found = [self._paint(Place(int(number), int(offset), str(digest))) for number, offset, digest in columns]
        rows = [asdict(one) for one in found]
        return {name: [row[name] for row in rows] for name in ("number", "status", "message")}

    def close(self) -> None:
        """Ends the ranks. (Where Ray kills the actor, they end with it.)"""
        self._run(self._engine.close()).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, work: Coroutine[Any, Any, Answer]) -> Future[Answer]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _paint(self, place: Place) -> Outcome:
        if self.fault:
            return Outcome(place.number, LOST, self.fault)
        if self._results.is_done(place):  # by a replica that died before it could say so
            return Outcome(place.number, DONE)
        try:
            request, own = read(text_at(Path(self._job.file), place), place, self._card)
        except ConfigError as error:
            return Outcome(place.number, WRONG, _line(error))
        try:
            result = self._run(self._painted(request)).result()
            about = {"id": own, "seed": result.seed, "seconds": round(result.seconds, 4), RECEIPT: result.receipt}
            self._results.write(place, _outputs(result, request.format), about)
        except ConfigError as error:  # seen on the ranks alone
            return Outcome(place.number, WRONG, _line(error))
        except (ParafuseError, OSError) as error:
            return Outcome(place.number, FAILED, _line(error))
        return Outcome(place.number, DONE)

    async def _painted(self, request: JobRequest) -> Result:
        keywords = dict(request.settings)
        if request.negative_prompt is not None:
            keywords["negative_prompt"] = request.negative_prompt
        async for event in self._engine.generate(
            request.prompt,
            seed=request.seed,
            num_outputs=request.num_outputs,
            lora={one.name: one.scale for one in request.lora},
            cache=request.cache,
            frames_per_second=request.frames_per_second,
            **keywords,
        ):
            if isinstance(event, Result):
                return event
        raise ParafuseError("the engine ended without a result.")


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]


def _outputs(result: Result, form: str) -> list[tuple[str, bytes]]:
    return [(".mp4", video) for video in result.videos] + [(f".{form}", _encoded(one, form)) for one in result.images]


def _encoded(picture: Image, form: str) -> bytes:
    out = io.BytesIO()
    more = {} if form == "png" else {"quality": 95}
    (picture.convert("RGB") if form == "jpeg" else picture).save(out, form.upper(), **more)
    return out.getvalue()
