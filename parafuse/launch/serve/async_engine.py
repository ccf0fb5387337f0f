"""`parafuse.AsyncEngine`: ranks behind an async iterator, for a program that serves its own way. No torch in here."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from parafuse.config import Config
from parafuse.engine.planner import resolve
from parafuse.engine.request import NUM_PICTURES, fresh_seed
from parafuse.errors import ConfigError, MemoryLimitError, ParafuseError, RankError, UnsupportedError
from parafuse.launch.keywords import refuse_unknown
from parafuse.launch.serve.card import card_of
from parafuse.launch.serve.group import GroupLostError
from parafuse.launch.serve.group_supervisor import GroupSupervisor
from parafuse.launch.serve.messages import Adapter, Failed, Item, Paint, Painted, Stepped
from parafuse.launch.serve.probing import probe_of
from parafuse.launch.serve.rank_link import RankLink
from parafuse.launch.serve.restarts import Devices
from parafuse.launch.serve.spawned import SpawnedGroup, visible_devices

if TYPE_CHECKING:
    from PIL.Image import Image

RANK = (sys.executable, "-m", "parafuse.launch.serve.rank")
MAX_TRIES = 2
"""Of a call whose ranks are lost."""
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
ERRORS: dict[str, type[ParafuseError]] = {
    "invalid": ConfigError,
    "memory": MemoryLimitError,
    "unsupported": UnsupportedError,
    "stopped": RankError,
    "internal": ParafuseError,
}
"""What a call that failed on all ranks raises."""
ELSEWHERE = dict.fromkeys(NUM_PICTURES, "use num_outputs") | {
    "prompt": "it is the first argument",
    "generator": "use seed",
    "output_type": "pictures are PIL images, videos MP4 files",
    "return_dict": "results are of AsyncEngine",
    "callback_on_step_end": "each step is an event",
}
"""Keywords of pipelines that a call does not take, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A step was made."""

    step: int
    """From 1."""
    of: int
    seconds: float
    """This step's."""
    preview: Image | None = None
    """What the picture will look like, where one was asked for at this step."""
    attempt: int = 1
    """2: the ranks were lost, and the call began again."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was painted; the last event."""

    images: tuple[Image, ...]
    """Of a model that paints pictures. Picture i is what seed + i alone gives."""
    videos: tuple[bytes, ...]
    """MP4 files, of a model that paints videos."""
    receipt: dict[str, Any]
    seed: int
    seconds: float


class AsyncEngine:
    """A model on ranks that it starts on this machine, for one event loop. Use it as `async with`.

    Calls are painted one after the other, in the order in which they came. Ranks that are lost are started again; the
    call that they were at is tried once more."""

    def __init__(
        self,
        model: str,
        *,
        ranks: int = 1,
        config: Config | None = None,
        loras: str | None = None,
        max_loras: int = 4,
        probe_s: float = 60.0,
        command: Sequence[str] = RANK,
    ):
        """Checks what it is given, and starts nothing. `loras`: folder of the LoRA files that calls may name, of which
        `max_loras` stay loaded. `probe_s`: idle seconds after which a short call shows that the ranks still work.
        `command` runs a rank. Raises ConfigError."""
        config = config or Config()
        if ranks < 1:
            raise ConfigError(f"ranks={ranks}: must be at least 1.")
        if max_loras < 1 or probe_s <= 0:
            raise ConfigError(f"{max_loras=}, {probe_s=}: must be at least 1, and above 0.")
        if loras is not None and not Path(loras).is_dir():
            raise ConfigError(f"loras={loras!r}: is no folder.")
        config.parallel.degrees(ranks)
        self._card = card_of(model, allow_pickle=config.allow_pickle, loras=loras)
        plan = resolve(config, self._card.source, ranks)
        per_rank = plan.devices_per_rank
        devices = Devices(visible_devices(plan.device), ranks * per_rank, per_rank=per_rank)
        self._model, self._ranks, self._config = model, ranks, config
        self._loras, self._max_loras = loras, max_loras
        self._command, self._devices = list(command), devices
        self._probe = probe_of(self._card, every_s=probe_s)
        self._folder: Path | None = None
        self._supervisor: GroupSupervisor | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Starts the ranks, and waits until a real step has run on each. Raises RankError when they fail again and
        again, with the reason of the last one."""
        if self._supervisor is not None:
            raise ConfigError("AsyncEngine: is started already.")
        self._folder = folder = Path(tempfile.mkdtemp(prefix="parafuse-engine-"))
        try:
            for name in ("inputs", "results"):
                (folder / name).mkdir()
            job = folder / "job.json"
            job.write_bytes(msgspec.json.encode(self._job(folder)))
            link = RankLink()
            group = SpawnedGroup(self._command, self._ranks, env=link.env(str(job)), show=())
            self._supervisor = GroupSupervisor(group, link, ranks=self._ranks, probe=self._probe, devices=self._devices)
            await self._supervisor.start()
            await self._supervisor.until_ready()
        except BaseException:
            await self.close()
            raise

    def _job(self, folder: Path) -> dict[str, Any]:
        """What ranks are told."""
        return {
            "model": str(Path(self._model).resolve()) if Path(self._model).exists() else self._model,
            "config": self._config.to_dict(),
            "max_loras": self._max_loras,
            "loras": None if self._loras is None else str(Path(self._loras).resolve()),
            "inputs": str(folder / "inputs"),
            "results": str(folder / "results"),
            "expect": None,
        }

    async def close(self) -> None:
        """Ends the ranks; calls that are under way raise RankError."""
        supervisor, self._supervisor = self._supervisor, None
        folder, self._folder = self._folder, None
        try:
            if supervisor is not None:
                await supervisor.close()
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    async def generate(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        num_outputs: int = 1,
        previews: int = 0,
        lora: Mapping[str, float] | None = None,
        cache: bool = True,
        frames_per_second: int = 16,
        **keywords: Any,
    ) -> AsyncGenerator[Progress | Result]:
        """Paints: a Progress after each step, last a Result. Leaving the loop, or cancelling the task, stops the call
        on all ranks at a step boundary; put `contextlib.aclosing` around it to have it stopped at once.

        `keywords` are the pipeline's own (num_inference_steps, width, image as a PIL image, ...). `previews`: how many,
        spread over the steps. `lora`: name -> scale. `cache` False: without the cache of the configuration.
        `frames_per_second`: of videos. Raises ConfigError for what is wrong, before anything runs where that can be
        seen; MemoryLimitError and UnsupportedError as the ranks did; RankError where ranks were lost twice."""
        seed = fresh_seed() if seed is None else seed
        pictures = {name: _pictures(value) for name, value in keywords.items() if _pictures(value)}
        settings = {name: value for name, value in keywords.items() if name not in pictures}
        self._check(prompt, seed, keywords, settings)
        negative = settings.pop("negative_prompt", None)
        if not isinstance(negative, str | None):
            raise ConfigError(f"negative_prompt={negative!r}: must be a text.")
        for name, value in {"num_outputs": num_outputs, "frames_per_second": frames_per_second}.items():
            if value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1.")
        if previews < 0:
            raise ConfigError(f"previews={previews}: must be at least 0.")
        call = Paint(
            call="",
            items=(Item(job="", prompt=prompt, negative_prompt=negative, seed=seed, num_outputs=num_outputs),),
            settings=settings,
            lora=self._adapters(lora or {}),
            cache=cache,
            previews=previews,
            format="mp4" if self._card.kind == "video" else "png",
            frames_per_second=frames_per_second,
        )
        async with self._turn, aclosing(self._tries(call, pictures)) as events:
            async for event in events:
                yield event

    async def _tries(self, call: Paint, pictures: Mapping[str, Sequence[Image]]) -> AsyncGenerator[Progress | Result]:
        """The call, once more where its ranks are lost."""
        for attempt in range(1, MAX_TRIES + 1):
            try:
                async with aclosing(self._try(call, pictures, attempt)) as events:
                    async for event in events:
                        yield event
                return
            except GroupLostError as error:
                if attempt == MAX_TRIES or self._supervisor is None:
                    raise RankError(f"the ranks were lost while they painted: {error}") from error

    async def _try(
        self, call: Paint, pictures: Mapping[str, Sequence[Image]], attempt: int
    ) -> AsyncGenerator[Progress | Result]:
        supervisor, folder = self._supervisor, self._folder
        if supervisor is None or folder is None:
            raise RankError("AsyncEngine: is closed; use it as `async with`, or start it.")
        await supervisor.until_ready()
        name = f"call-{secrets.token_hex(8)}"
        results, inputs = folder / "results" / name, folder / "inputs" / name
        try:
            files = await asyncio.to_thread(_write, inputs, pictures, results)
            item = msgspec.structs.replace(call.items[0], job=name)
            mine = msgspec.structs.replace(call, call=name, items=(item,), images=files, folder=str(results))
            async with aclosing(supervisor.paint(mine, waits=False)) as events:
                async for event in events:
                    if isinstance(event, Stepped):
                        yield _progress(event, attempt)
                    elif isinstance(event, Failed):
                        raise _error(event)
                    else:
                        yield await asyncio.to_thread(_result, event, results, item.seed)
        finally:
            for used in (inputs, results):
                shutil.rmtree(used, ignore_errors=True)

    def _check(self, prompt: str, seed: int, keywords: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Raises ConfigError for the first argument of a call that is wrong."""
        if not isinstance(prompt, str):
            raise ConfigError(f"prompt={prompt!r}: must be a text; make a call for each.")
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise ConfigError(f"seed={seed!r}: must be a whole number from 0 to 2^63 - 1.")
        for name, value in settings.items():
            if name in ELSEWHERE:
                raise ConfigError(f"{name}: cannot be given here; {ELSEWHERE[name]}.")
            try:
                msgspec.json.encode(value)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{name}: a {type(value).__name__} cannot be sent to the ranks; give what JSON has, or PIL images."
                ) from error
        refuse_unknown(self._card.source, dict(keywords))
        self._card.check({"prompt": prompt, **settings})

    def _adapters(self, lora: Mapping[str, float]) -> tuple[Adapter, ...]:
        known = self._card.lora_names()
        for name in lora:
            if name not in known:
                there = ", ".join(known) or "none; give the engine a folder of them, loras="
                raise ConfigError(f"lora={name!r}: is not there; there are: {there}.")
        return tuple(Adapter(name=name, scale=scale) for name, scale in lora.items())


def _pictures(value: Any) -> tuple[Image, ...]:
    """The pictures that an argument is; none where it is something else."""
    from PIL.Image import Image

    several = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(several) if several and all(isinstance(one, Image) for one in several) else ()


def _write(inputs: Path, pictures: Mapping[str, Sequence[Image]], results: Path) -> dict[str, tuple[str, ...]]:
    """Makes a call's folders; its pictures as files, by keyword, as names in the folder of inputs."""
    results.mkdir()
    inputs.mkdir()
    files: dict[str, tuple[str, ...]] = {}
    for keyword, several in pictures.items():
        names = [f"{keyword}-{number}.png" for number in range(len(several))]
        for name, picture in zip(names, several, strict=True):
            as_png = picture if picture.mode in PNG_MODES else picture.convert("RGB")
            as_png.save(inputs / name, format="PNG")
        files[keyword] = tuple(f"{inputs.name}/{name}" for name in names)
    return files


def _progress(event: Stepped, attempt: int) -> Progress:
    return Progress(
        step=event.step,
        of=event.num_steps,
        seconds=event.seconds,
        preview=_read(event.previews[0]) if event.previews else None,
        attempt=attempt,
    )


def _result(end: Painted, folder: Path, seed: int) -> Result:
    """Reads what was written."""
    found = [folder / name for names in end.files for name in names]
    return Result(
        images=tuple(_read(file.read_bytes()) for file in found if file.suffix != ".mp4"),
        videos=tuple(file.read_bytes() for file in found if file.suffix == ".mp4"),
        receipt=msgspec.json.decode(end.receipt) if end.receipt else {},
        seed=seed,
        seconds=end.seconds,
    )


def _read(data: bytes) -> Image:
    """A picture, whole in memory, from the ranks' own PNG."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        picture.load()
        return picture


def _error(failed: Failed) -> ParafuseError:
    error = ERRORS.get(failed.kind, ParafuseError)(failed.message)
    if failed.details:
        error.add_note(failed.details)  # the rank's traceback
    return error
