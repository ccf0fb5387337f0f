"""One call of the pipeline for the jobs of a server: every rank runs the same, the feeding one writes and tells."""

from __future__ import annotations

import gc
import inspect
import io
import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from parafuse.engine.previews import Previews, clean
from parafuse.engine.request import NUM_PICTURES
from parafuse.engine.safe_points import CALLBACK, Boundary, SafePoints, StoppedError
from parafuse.errors import ConfigError, MemoryLimitError, ParafuseError, RankError, UnsupportedError, is_out_of_memory
from parafuse.launch.serve import outputs
from parafuse.launch.serve.adapters_kept import AdaptersKept
from parafuse.launch.serve.beats import ENCODING, LOADING, WRITING, Line, Progress
from parafuse.launch.serve.coding import Coder, result_of
from parafuse.launch.serve.feed import Handed
from parafuse.launch.serve.messages import Coding, Failed, Item, Paint, Painted, Stepped

if TYPE_CHECKING:
    from parafuse.engine.engine import Engine

OWN = ("prompt", "negative_prompt", "seed", "generator", "output_type", CALLBACK, f"{CALLBACK}_tensor_inputs")
"""Keywords that no setting may give."""
LAST_SEED = 2**63
"""Seeds go on from 0 there."""
MASK = "mask"
"""In the names of pictures that say where to paint."""
LONGEST_LINE = 500
KINDS: tuple[tuple[type[Exception], str], ...] = (
    (StoppedError, "stopped"), (MemoryLimitError, "memory"), (UnsupportedError, "unsupported"),
    (ConfigError, "invalid"),
)  # fmt: skip


class FaultElsewhere(ParafuseError):
    """What another rank could not do, before all began: nobody has."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def kind_of(error: BaseException) -> str:
    """As `Failed` names it."""
    if isinstance(error, FaultElsewhere):
        return error.kind
    return "memory" if is_out_of_memory(error) else next((k for c, k in KINDS if isinstance(error, c)), "internal")


def message_of(error: BaseException) -> str:
    """One line for a client: of errors that are not for users their class alone, since they may say anything."""
    if isinstance(error, ParafuseError):
        return " ".join(str(error).split())[:LONGEST_LINE]
    return "out of memory" if is_out_of_memory(error) else f"painting failed ({type(error).__name__})"


def seeds_of(items: Sequence[Item]) -> list[int]:
    """One for each picture: picture i of a job with seed s is what seed s + i alone gives, in whatever batch."""
    return [(item.seed + i) % LAST_SEED for item in items for i in range(item.num_outputs)]


def read_pictures(call: Paint, inputs: Path) -> dict[str, tuple[bytes, ...]]:
    """Contents of the files of a call, by keyword. Raises ConfigError for one that is not in the folder of inputs."""
    return {name: tuple(_read(name, file, inputs) for file in files) for name, files in call.images.items()}


def _read(keyword: str, file: str, inputs: Path) -> bytes:
    path = (inputs / file).resolve()
    if not path.is_relative_to(inputs.resolve()) or not path.is_file():
        raise ConfigError(f"{keyword}: the picture {Path(file).name!r} is not there.")
    return path.read_bytes()


class Painter:
    """Of one engine, on this rank."""

    def __init__(
        self, engine: Engine, leader: int, line: Line, progress: Progress, *, defaults: dict[str, Any],
        loras: Path | None, max_loras: int,
    ):  # fmt: skip
        """`leader`: the rank that is given the calls. `defaults`: the model's own, of keywords."""
        self._engine, self._line, self._progress, self._defaults = engine, line, progress, defaults
        self._leads, self._call = engine.rank == leader, Paint(call="", items=())
        self._points = SafePoints(engine.world, leader, lambda: line.stop_of(self._call.call))
        self._adapters = AdaptersKept(engine, loras, max_loras, self._agreed, loading=self._loads)
        self._previews = Previews(_latent_channels(engine.pipeline))
        self._coder = Coder(engine)
        self._uses_cache = True
        self._size: tuple[int, int] | None = None
        """Width and height that the model paints where none is asked for."""
        self._latents: Tensor | None = None
        """Of the last boundary."""

    def paint(self, handed: Handed) -> None:
        """Collective. Returns once the outputs are written, or the call has failed on all ranks, which is told. Raises
        what has lost a rank: then none of them can go on."""
        call = handed.paint
        if call is None:
            return
        self._call, begun = call, time.monotonic()
        self._progress.begin(call.call)
        output, fault = None, None
        try:
            output = self._paint(call, handed.pictures)
        except Exception as error:
            fault = error
        self._settle(fault)
        if self._leads:
            try:
                self._line.send(self._answer(call, output, fault, begun))
            except Exception as error:  # on this rank alone, and the others have ended the call
                self._line.send(failed(call, error))
        self._latents = None
        if fault is not None and kind_of(fault) == "memory":
            _free()
        self._progress.end()

    def _loads(self) -> None:
        self._progress.enter(LOADING)
        self._progress.renewed += 1

    def _settle(self, fault: Exception | None) -> None:
        """All ranks have ended the call alike, and have read it. Raises what lost one."""
        world = self._engine.world
        if fault is not None and world.broken:
            raise fault
        said = world.everyone("served", "" if fault is None else kind_of(fault))
        if len(set(said)) > 1:
            world.broken = True
            raise RankError(f"ranks have ended call {self._call.call} in different ways: {said}.") from fault

    def _agreed(self, topic: str, do: Callable[[], str]) -> list[str]:
        """What every rank gives, by rank, of what it does by itself: what one cannot, none has done. Collective."""
        mine, error = "", None
        try:
            mine = do()
        except Exception as caught:
            error = caught
        fault = None if error is None else [kind_of(error), message_of(error)]
        said = [json.loads(word) for word in self._engine.world.everyone(topic, json.dumps([fault, mine]))]
        if error is not None:
            raise error
        first = next((fault for fault, _ in said if fault is not None), None)
        if first is not None:
            raise FaultElsewhere(*first)
        return [value for _, value in said]

    def _paint(self, call: Paint, pictures: dict[str, tuple[bytes, ...]]) -> Any:
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        if call.coding is not None:
            return self._coded(call, call.coding, pictures)
        prepared: dict[str, Any] = {}

        def prepare() -> str:
            outputs.check_format(call.format)
            prepared.update(self._keywords(call, pictures))
            return ""

        self._agreed("a call", prepare)
        self._adapters.use(call.lora)
        self._progress.enter(ENCODING)
        if call.cache != self._uses_cache:
            self._engine.use_cache(call.cache)
            self._uses_cache = call.cache
        seeds = seeds_of(call.items)
        self._latents = None
        with self._points.request(self._engine.pipeline, prepared, self._on_step) as keywords:
            return self._engine(**keywords, seed=seeds[0] if len(seeds) == 1 else tuple(seeds))

    def _coded(self, call: Paint, coding: Coding, files: dict[str, tuple[bytes, ...]]) -> Any:
        """A call of the autoencoder alone. It has no steps: it can be left before it begins, and not later."""
        taken: list[Tensor] = []

        def prepare() -> str:
            if self._leads and (why := self._line.stop_of(call.call)):
                raise StoppedError(why, 0)
            if len(call.items) != 1:
                raise ConfigError(f"items: {len(call.items)} are given; the autoencoder is called for one job.")
            taken.append(self._coder.take(coding, call.format, files))
            return ""

        self._agreed("a call", prepare)
        return self._coder.run(coding, taken[0])

    def _keywords(self, call: Paint, pictures: dict[str, tuple[bytes, ...]]) -> dict[str, Any]:
        """Of the pipeline's call."""
        accepted = inspect.signature(type(self._engine.pipeline).__call__).parameters
        for name in call.settings:
            if name in OWN or name in NUM_PICTURES or name in pictures:
                raise ConfigError(f"settings: {name!r} is none that a request sets.")
        if not call.items:
            raise ConfigError("items: none are given; a call paints for one job at least.")
        if pictures and len(call.items) > 1:
            raise ConfigError("items: a call with pictures is for one job; give the others calls of their own.")
        keywords = dict(call.settings)
        keywords |= {name: _opened(name, files) for name, files in pictures.items()}
        if "output_type" in accepted:
            keywords["output_type"] = "pil"
        return keywords | self._prompts(call.items, next((name for name in NUM_PICTURES if name in accepted), None))

    def _prompts(self, items: tuple[Item, ...], number: str | None) -> dict[str, Any]:
        """A text for one picture or a list; where items want several, the pipeline makes these if it can (`number`:
        its keyword for that), else each prompt is given as often."""
        each = {item.num_outputs for item in items}
        repeats = number is None or len(each) > 1
        texts = [item for item in items for _ in range(item.num_outputs if repeats else 1)]
        found: dict[str, Any] = {"prompt": [one.prompt for one in texts]}
        if any(one.negative_prompt is not None for one in texts):
            default = self._defaults.get("negative_prompt") or ""
            negative = [default if one.negative_prompt is None else one.negative_prompt for one in texts]
            found["negative_prompt"] = negative
        if len(texts) == 1:
            found = {name: values[0] for name, values in found.items()}
        return found if repeats or number is None or each == {1} else found | {number: items[0].num_outputs}

    def _on_step(self, boundary: Boundary) -> None:
        """On every rank; the feeding one tells, and shows what it looks like."""
        self._progress.stepped(boundary.step)
        if not self._leads:
            return
        steps = boundary.num_steps or 0
        shown = shown_at(self._call.previews, steps)
        previews = self._shown(boundary) if boundary.step in shown else ()
        keeps = boundary.step + 1 in shown or boundary.step >= steps
        self._latents = boundary.latents.clone() if keeps and boundary.latents is not None else None
        self._line.send(
            Stepped(
                call=self._call.call,
                step=boundary.step,
                num_steps=max(steps, boundary.step),
                seconds=boundary.seconds,
                previews=previews,
            )
        )

    def _shown(self, boundary: Boundary) -> tuple[bytes, ...]:
        """A preview for each item: of its first picture."""
        items, now, before = self._call.items, boundary.latents, self._latents
        if now is None or len(now) != len(seeds_of(items)):
            return ()
        firsts = [sum(one.num_outputs for one in items[:place]) for place in range(len(items))]
        if before is not None and before.shape == now.shape:
            return tuple(self._previews.show(clean(before[firsts], now[firsts], boundary.scheduler), self._asked_size))
        return tuple(self._previews.show(now[firsts], self._asked_size))

    @property
    def _asked_size(self) -> tuple[int, int] | None:
        """Width and height of the call at hand, as far as they are known."""
        asked = self._call.settings
        width, height = (asked.get(name, self._defaults.get(name)) for name in ("width", "height"))
        return (width, height) if isinstance(width, int) and isinstance(height, int) else self._size

    def _answer(self, call: Paint, output: Any, fault: Exception | None, begun: float) -> Painted | Failed:
        """On the feeding rank. Raises OSError where an output cannot be written."""
        if fault is not None:
            return failed(call, fault)
        self._progress.enter(WRITING)
        if call.coding is not None:
            return self._answer_coded(call, call.coding, output, begun)
        paintings = outputs.paintings(output)
        if len(paintings) != len(seeds_of(call.items)):
            raise UnsupportedError(f"the pipeline gave {len(paintings)} pictures for {len(seeds_of(call.items))}.")
        self._learn(paintings)
        files = self._written(call, paintings)
        receipt = {name: value for name, value in self._engine.receipt.items() if name != "call"}
        receipt["lora"] = self._adapters.digests(call.lora)
        self._progress.enter(WRITING)
        seconds = {name: round(value, 4) for name, value in self._progress.seconds.items()}
        hits, calls = _cache_hits(self._engine.receipt)
        receipts = tuple(json.dumps(receipt | self._own_part(item)) for item in call.items)
        common = json.dumps({name: value for name, value in receipt.items() if name != "seed"})
        return Painted(
            call=call.call,
            files=files,
            receipt=receipts[0] if len(receipts) == 1 else common,
            receipts=receipts,
            seconds=time.monotonic() - begun,
            phases_s=seconds,
            cache_hits=hits,
            cache_calls=calls,
        )

    def _answer_coded(
        self, call: Paint, coding: Coding, output: tuple[Tensor, dict[str, Any]], begun: float
    ) -> Painted:
        found, receipt = output
        (item,), names = call.items, tuple[str, ...]()
        result = result_of(coding, found)
        if call.folder:
            folder, name = Path(call.folder), "0-0"
            if isinstance(result, Tensor):
                names = (outputs.write_tensor(result, folder, name, receipt_id=item.job),)
            else:
                more = {"format": call.format, "receipt_id": item.job, "fps": call.frames_per_second}
                names = (outputs.write(result, folder, name, **more),)
        self._progress.enter(WRITING)
        text = json.dumps(receipt | {"job": item.job})
        seconds = {phase: round(value, 4) for phase, value in self._progress.seconds.items()}
        took_s = time.monotonic() - begun
        return Painted(call=call.call, files=(names,), receipt=text, receipts=(text,), seconds=took_s, phases_s=seconds)

    def _own_part(self, item: Item) -> dict[str, Any]:
        """What of a receipt is one job's: of the others in the call it says nothing."""
        theirs = ("prompt", "negative_prompt", *NUM_PICTURES)
        asked = {k: v for k, v in self._engine.receipt.get("call", {}).items() if k not in (*OWN, *theirs)}
        seeds = seeds_of([item])
        given = {"prompt": item.prompt, "negative_prompt": item.negative_prompt}
        seed = seeds[0] if len(seeds) == 1 else seeds
        return {"seed": seed, "call": asked | given, "job": item.job, "batched_with": len(self._call.items) - 1}

    def _learn(self, paintings: list[outputs.Painting]) -> None:
        first = outputs.first_frame(paintings[0])
        if not {"width", "height"} & self._call.settings.keys():
            self._size = first.size
        if self._latents is not None:
            self._previews.learn(self._latents, paintings)

    def _written(self, call: Paint, paintings: list[outputs.Painting]) -> tuple[tuple[str, ...], ...]:
        """Names in the call's folder, for each item."""
        if not call.folder:
            return tuple(() for _ in call.items)
        left, found = iter(paintings), list[tuple[str, ...]]()
        for place, item in enumerate(call.items):
            names = list[str]()
            for number in range(item.num_outputs):
                self._progress.move()
                name = outputs.write(
                    next(left), Path(call.folder), f"{place}-{number}",
                    format=call.format, receipt_id=item.job, fps=call.frames_per_second,
                )  # fmt: skip
                names.append(name)
            found.append(tuple(names))
        return tuple(found)


def failed(call: Paint, error: BaseException) -> Failed:
    """What the supervisor is told of it."""
    details = "".join(traceback.format_exception(error))
    return Failed(call=call.call, kind=kind_of(error), message=message_of(error), details=details)


def shown_at(previews: int, num_steps: int) -> frozenset[int]:
    """The steps after which a preview is sent: spread over them, the last one left out, which has a picture."""
    if previews < 1 or num_steps < 2:
        return frozenset()
    previews = min(previews, num_steps - 1)
    places = (round(num_steps * (number + 1) / (previews + 1)) for number in range(previews))
    return frozenset(min(max(1, place), num_steps - 1) for place in places)


def _opened(keyword: str, files: tuple[bytes, ...]) -> Any:
    """A picture, or a list of several. Raises ConfigError for what is none."""
    opened = list[Image.Image]()
    for data in files:
        try:
            with Image.open(io.BytesIO(data)) as image:
                upright = ImageOps.exif_transpose(image)
                opened.append(upright.convert("L" if MASK in keyword else "RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ConfigError(f"{keyword}: is no picture that can be read.") from error
    return opened[0] if len(opened) == 1 else opened


def _latent_channels(pipeline: Any) -> int | None:
    config = getattr(getattr(pipeline, "vae", None), "config", {})
    found = next((config.get(name) for name in ("latent_channels", "z_dim") if config.get(name)), None)
    return found if isinstance(found, int) else None


def _cache_hits(receipt: dict[str, Any]) -> tuple[int, int]:
    """(skipped, all) decisions of a request's cache."""
    said = "".join(word for words in receipt.get("cache", {}).get("decisions", {}).values() for word in words)
    return said.count("s"), len(said)


def _free() -> None:
    """What a call that found no memory has left."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
