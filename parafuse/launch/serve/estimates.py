"""What calls take: measured where such a call has been made, else predicted by the planner.

Measured are medians of calls with the same settings. Between settings nothing is guessed, but for the number of steps:
each takes as long as the other. Kept in a file of the server's state, so that they last."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import statistics
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog

from parafuse.config import Config
from parafuse.hardware import processor, visible_gpus
from parafuse.launch.serve.jobs import JobRequest
from parafuse.launch.serve.messages import Estimate, Estimated, Paint, Painted
from parafuse.launch.serve.predictor import Predicted, Predictor

STEPS = "num_inference_steps"
SCHEMA = 1
MOST_KINDS = 256
"""Kinds of calls that are remembered; those that came longest ago go first."""
MOST_SAMPLES = 9
MOST_ASKED = 16
"""Predictions that wait to be made."""
WRITE_S = 5.0
GROWS = ("height", "width", "num_frames", "images", "loras")
"""Settings with which memory grows."""
LONG_SETTING = 100
MEASURED, PREDICTED = "measured", "predicted"


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One call that was finished."""

    steps: int | None
    """None: as many as the model takes by itself."""
    seconds: float
    beside_s: float | None = None
    """Without the steps; None where they were not told apart."""
    is_first: bool = False
    """Of its kind since the ranks began, about: much is got ready in it."""


class _File(msgspec.Struct, frozen=True):
    schema: int
    of: str
    """What these are of: another model or another machine takes other times."""
    samples: dict[str, list[Sample]]


@dataclass(frozen=True)
class Kind:
    """Calls that take as long, but for their number of steps."""

    call: str
    """Settings as JSON, without steps."""
    pictures: int

    @property
    def key(self) -> str:
        return f"{self.pictures} x {self.call}"

    def covers(self, other: Kind) -> bool:
        """Whether a call of the other kind takes no more memory than one of this."""
        mine, theirs = ({"images": 0, "loras": 0} | json.loads(one.call) for one in (self, other))
        return (
            self.pictures >= other.pictures
            and mine.keys() == theirs.keys()
            and all(mine[name] >= value if name in GROWS else mine[name] == value for name, value in theirs.items())
        )


def kind_of(settings: Mapping[str, Any], pictures: int, *, images: int = 0, loras: int = 0, cache: bool = True) -> Kind:
    """Of a call's settings. Of guidance it counts whether there is any; of a long text, that it is the same."""
    found: dict[str, Any] = {"images": images, "loras": loras, "cache": cache}
    found = {name: value for name, value in found.items() if value != (name == "cache")}
    for name, value in settings.items():
        if name == STEPS:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        shown = value > 1 if is_number and ("guidance" in name or "cfg" in name) else value
        text = json.dumps(shown, sort_keys=True, default=str)
        found[name] = hashlib.sha256(text.encode()).hexdigest()[:16] if len(text) > LONG_SETTING else shown
    return Kind(json.dumps(found, sort_keys=True, default=str), pictures)


class Estimates:
    """Of one server's calls. Lives on the supervisor's event loop; `seconds_of` and `learn` answer at once."""

    def __init__(self, path: Path, *, model: str, config: Config, num_ranks: int, predictor: Predictor | None = None):
        """`path`: of the file; a folder that is not there is made. `predictor`: another one, for tests."""
        devices = [gpu.name for gpu in visible_gpus()] or [processor()]
        self._of = json.dumps([model, config.to_dict(), num_ranks, devices], sort_keys=True, default=str)
        self._path = path
        self._predictor = predictor or Predictor(model, config, num_ranks)
        self._log = structlog.get_logger("parafuse.estimates")
        self._samples = self._read()
        self._seen: set[str] = set()
        """Kinds of which a call has been made by this process."""
        self._predicted: OrderedDict[tuple[str, int], Predicted | None] = OrderedDict()
        """(call, pictures of one job) -> what the planner says; None: it cannot."""
        self._asked: dict[tuple[str, int], asyncio.Task[Predicted | None]] = {}
        self._written = 0.0

    async def estimate(self, asked: Estimate) -> Estimated:
        """What a call would take, alone. What was never measured is predicted. It is waited for where the answer
        decides something: whether there is time, or whether a call fits that is larger than any that was made. Where
        that takes longer than the asker's patience, seconds are None, and known when it is asked for again."""
        more = {"images": asked.images, "loras": asked.loras, "cache": asked.cache}
        kind = kind_of(asked.settings, asked.num_outputs, **more)
        steps = _steps(asked.settings)
        seconds = self.measured(kind, steps)
        if seconds is not None:
            return Estimated(number=asked.number, seconds=seconds, source=MEASURED)
        # the planner follows calls without pictures: with them it takes no less memory
        bare = kind_of(asked.settings, asked.num_outputs, loras=asked.loras, cache=asked.cache)
        found = self._ask(asked.settings, bare)
        if isinstance(found, asyncio.Task) and (asked.needs_seconds or not self._has_fitted(kind)):
            with contextlib.suppress(TimeoutError):
                found = await asyncio.wait_for(asyncio.shield(found), asked.patience_s)
        if found is None or isinstance(found, asyncio.Task):
            return Estimated(number=asked.number, seconds=None)
        return Estimated(
            number=asked.number,
            seconds=None if asked.images else found.of(kind.pictures, steps),
            peak_bytes=found.peak_bytes.get(kind.pictures),
            capacity_bytes=found.capacity_bytes,
            source=PREDICTED,
        )

    async def warm(self, settings: Mapping[str, Any]) -> None:
        """Follows a call with the model's own settings, so that the planner is there when it is asked about others."""
        found = self._ask(settings, kind_of(settings, 1))
        if isinstance(found, asyncio.Task):
            await asyncio.wait([found])

    def seconds_of(self, request: JobRequest, number: int) -> float | None:
        """Of one call for so many jobs like this, for `schedule.choose`. What is not known is None, and predicted
        meanwhile. None also for several that do not fit the device's memory, and for calls of the autoencoder alone.

        Where one number of jobs has been measured and another has not, the planner says how they compare."""
        if request.coding is not None:
            return None
        kind = _kind_of_request(request, number)
        steps = _steps(request.settings)
        known = self.measured(kind, steps)
        if known is not None:
            return known
        alone = _kind_of_request(request, 1)
        found = self._ask(request.settings, alone)
        if not isinstance(found, Predicted):
            return None
        peak, there = found.peak_bytes.get(kind.pictures), found.capacity_bytes
        if number > 1 and peak is not None and there and peak > there:
            return None
        seconds = found.of(kind.pictures, steps)
        measured, said = self.measured(alone, steps), found.of(alone.pictures, steps)
        return seconds * measured / said if seconds and measured and said else seconds

    def measured(self, kind: Kind, steps: int | None) -> float | None:
        """The median of calls like this; None where there were none. A first call counts where there is no other, and
        then no more than the planner says."""
        samples = self._samples.get(kind.key, [])
        later = [one for one in samples if not one.is_first]
        same = [one.seconds for one in later or samples if one.steps == steps]
        if same:
            found = statistics.median(same)
        else:
            apart = [(one.beside_s, one.seconds, one.steps) for one in later or samples]
            each = [(beside, (all_s - beside) / n) for beside, all_s, n in apart if beside is not None and n]
            if steps is None or not each:
                return None
            found = statistics.median(a for a, _ in each) + steps * statistics.median(b for _, b in each)
        predicted = self._predicted.get((kind.call, kind.pictures))
        said = None if predicted is None else predicted.of(kind.pictures, steps)
        return found if later or said is None else min(found, said)

    def _has_fitted(self, kind: Kind) -> bool:
        """Whether a call has been made that takes at least as much memory."""
        number, large = kind.pictures, (key.partition(" x ") for key in self._samples)
        return any(Kind(call, int(pictures)).covers(kind) for pictures, _, call in large if int(pictures) >= number)

    def learn(self, call: Paint, painted: Painted) -> None:
        """After a call has ended well. Those of the autoencoder alone, of any size, would push out the others."""
        if call.coding is not None:
            return
        pictures = sum(item.num_outputs for item in call.items)
        images = sum(len(files) for files in call.images.values())
        kind = kind_of(call.settings, pictures, images=images, loras=len(call.lora), cache=call.cache)
        denoising = painted.phases_s.get("denoising")
        beside_s = None if denoising is None else max(0.0, painted.seconds - denoising)
        is_first = kind.key not in self._seen
        self._seen.add(kind.key)
        sample = Sample(steps=_steps(call.settings), seconds=painted.seconds, beside_s=beside_s, is_first=is_first)
        kept = [one for one in self._samples.get(kind.key, []) if not one.is_first][-(MOST_SAMPLES - 1) :]
        if not (is_first and kept):  # it tells nothing where there are others
            self._samples[kind.key] = [*kept, sample]
        self._samples.move_to_end(kind.key)
        while len(self._samples) > MOST_KINDS:
            self._samples.popitem(last=False)
        if time.monotonic() - self._written > WRITE_S:
            self.save()

    def save(self) -> None:
        """Writes the file, whole or not at all. A disk that takes nothing costs what was learned, and no job."""
        self._written = time.monotonic()
        part = self._path.with_name(f"{self._path.name}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(msgspec.json.encode(_File(SCHEMA, self._of, dict(self._samples))))
            part.replace(self._path)
        except OSError as error:
            self._log.warning("timings are not kept", error=str(error))

    async def close(self) -> None:
        """Keeps what was learned; nothing is predicted any more."""
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        await self._predictor.close()
        self.save()

    def _ask(self, settings: Mapping[str, Any], kind: Kind) -> Predicted | asyncio.Task[Predicted | None] | None:
        """What the planner says; None where it cannot, or has too much to do; a task that will tell."""
        key = kind.call, kind.pictures
        if key in self._predicted:
            self._predicted.move_to_end(key)
            return self._predicted[key]
        if (other := self._of_another_number(kind)) is not None:
            return other
        if '"images"' in kind.call:  # the planner follows calls without pictures
            return None
        if key not in self._asked:
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:  # asked by a thread: an estimate will have asked before
                return None
            if len(self._asked) >= MOST_ASKED:
                return None
            self._asked[key] = loop.create_task(self._ask_for(dict(settings), kind))
        return self._asked[key]

    def _of_another_number(self, kind: Kind) -> Predicted | None:
        """Said of jobs with fewer pictures, where so many of them fit the device; None: it must be asked."""
        for (call, pictures), found in self._predicted.items():
            if call == kind.call and found is not None and kind.pictures in found.seconds and pictures < kind.pictures:
                peak, there = found.peak_bytes.get(kind.pictures), found.capacity_bytes
                if peak is not None and (not there or peak <= there):  # at the most; more is looked at closely
                    return found
        return None

    async def _ask_for(self, settings: dict[str, Any], kind: Kind) -> Predicted | None:
        key, one = (kind.call, kind.pictures), kind.pictures
        try:
            found = await self._predictor.ask(
                settings, tuple(one * k for k in range(1, MOST_TOGETHER + 1)), cache='"cache"' not in kind.call
            )
        finally:
            del self._asked[key]
        if found is None and self._predictor.rests:  # it says nothing of this call
            return None
        self._predicted[key] = found
        while len(self._predicted) > MOST_KINDS:
            self._predicted.popitem(last=False)
        return found

    def _read(self) -> OrderedDict[str, list[Sample]]:
        try:
            file = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except FileNotFoundError:
            return OrderedDict()
        except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
            self._log.warning("timings cannot be read; they are measured anew", error=str(error))
            return OrderedDict()
        if file.schema != SCHEMA or file.of != self._of:
            self._log.info("timings are of another model or machine; they are measured anew")
            return OrderedDict()
        return OrderedDict(file.samples)


MOST_TOGETHER = 8
"""Jobs in one call that are predicted."""


def _kind_of_request(request: JobRequest, number: int) -> Kind:
    images = sum(len(files) for files in request.images.values())
    pictures = request.num_outputs * number
    return kind_of(request.settings, pictures, images=images, loras=len(request.lora), cache=request.cache)


def _steps(settings: Mapping[str, Any]) -> int | None:
    steps = settings.get(STEPS)
    return steps if isinstance(steps, int) else None
