"""`parafuse generate`: checks everything that can be checked, then paints here or starts ranks that do.

Nothing in here imports torch before the checks are through."""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parafuse import hardware, log
from parafuse.config import Axis, Config
from parafuse.engine.plan import Plan
from parafuse.engine.request import fresh_seed
from parafuse.errors import ConfigError, ParafuseError
from parafuse.launch import learning, quiet
from parafuse.launch.asked import Asked, number_of_ranks
from parafuse.launch.keywords import NUM_PICTURES, as_typed, call_keywords, refuse_unknown
from parafuse.launch.options import Option, build, given

if TYPE_CHECKING:
    from PIL.Image import Image

    from parafuse.engine.engine import Engine
    from parafuse.engine.source import ModelSource

FORMATS = (".png",)
VIDEO_FORMATS = (".mp4", ".gif", ".webm", ".webp", ".mov", ".avi", ".mkv")


@dataclass(frozen=True, kw_only=True)
class Picture(Asked):
    """What to paint and where to: the options of `generate` beside the configuration."""

    out: str = "out.png"
    """PNG file to write, with a receipt (JSON) beside it. Several pictures are numbered: out-0.png, out-1.png, ..."""
    num_images: int | None = None
    """Pictures for each prompt."""
    plan: str | None = None
    """JSON file with a plan (from --save-plan, or a receipt): run exactly this layout again."""
    overlap: bool = False
    """Of several prompts: decode one picture while the next one is denoised. The same pictures; both take memory."""
    save_plan: str | None = None
    """JSON file to write the plan to."""
    learn: bool = False
    """Compare each request with what the planner predicts for it, and keep that for later plans on this machine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_images is not None and self.num_images < 1:
            raise ConfigError(f"--num-images {self.num_images}: must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked request: everything that painting needs."""

    prompts: tuple[str, ...]
    picture: Picture
    config: Config
    plan: Plan | None
    world_size: int
    call: dict[str, Any]
    """Keywords for the pipeline's call, the same for every prompt."""
    num_pictures: int
    """Pictures, or videos, for each prompt."""


def prepare(prompts: Sequence[str], picture: Picture, options: list[Option], typed: dict[str, Any]) -> Job:
    """Checks the request, torch-free and without loading weights. Raises ConfigError at the first fault.

    options, typed: those of Config, and what the user typed for them."""
    from parafuse.engine.planner import resolve
    from parafuse.engine.request import check_call
    from parafuse.engine.source import locate

    chosen = given(options, typed)
    config = build(Config.from_file(picture.config) if picture.config else Config(), chosen)
    plan = Plan.load(picture.plan) if picture.plan else None
    world_size = number_of_ranks(picture, plan)
    if plan is not None:
        refuse_beside_plan(plan, picture, chosen)
    else:
        config.parallel.degrees(world_size)
    source = locate(picture.model, allow_pickle=config.allow_pickle)
    call, typed_as = call_keywords(picture, source)
    refuse_unknown(source, {"prompt": "", **call})
    checked: dict[str, Any] = {}
    for prompt in prompts:
        try:
            checked = check_call(source, {"prompt": prompt, **call})
        except ConfigError as error:
            raise as_typed(error, typed_as) from error
    num_pictures = next((checked[name] for name in NUM_PICTURES if checked.get(name)), 1)
    if log.rank() == 0:
        check_outputs(picture, output_paths(picture.out, len(prompts) * num_pictures))
    if plan is not None:
        plan.check(model_id=source.model_id, world_size=world_size)
    else:
        resolve(config, source, world_size)
    return Job(
        prompts=tuple(prompts),
        picture=picture,
        config=config,
        plan=plan,
        world_size=world_size,
        call=call,
        num_pictures=num_pictures,
    )


def refuse_beside_plan(plan: Plan, picture: Picture, chosen: list[tuple[Option, Any]]) -> None:
    """A plan is explicit: an option that it already decides would be ignored, so it is refused."""
    decided = {*plan.degrees, *plan.to_dict()}
    for option, _ in chosen:
        if option.path[-1] in decided:
            raise ConfigError(f"{option.flag} and --plan {picture.plan!r}: the plan decides it; leave one out.")
    if picture.config:
        raise ConfigError(f"--config and --plan {picture.plan!r}: the plan decides it; leave one out.")


def output_paths(out: str, number: int) -> list[Path]:
    """`out` itself for one picture; for several, numbered before the extension."""
    path = Path(out)
    return [path] if number == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(number)]


def check_outputs(picture: Picture, paths: list[Path]) -> None:
    """Raises ConfigError unless every picture, and the plan, can be written."""
    for path in paths:
        check_writable("--out", path, FORMATS)
    if picture.save_plan:
        check_writable("--save-plan", Path(picture.save_plan), (".json",))
        if Path(picture.save_plan).resolve() in [p.resolve().with_suffix(".json") for p in paths]:
            raise ConfigError(f"--save-plan {picture.save_plan!r}: the receipt of --out goes there; rename one.")


def check_writable(flag: str, path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises ConfigError unless a file can be written at `path`. Tried: access rights say little to root."""
    shown, folder = f"{flag} {str(path)!r}", path.parent
    if path.suffix.lower() not in suffixes:
        frames = f"a video is written as one picture per frame, {path.stem}-0000.png and so on"
        hint = f" ({frames})" if path.suffix.lower() in VIDEO_FORMATS and suffixes == FORMATS else ""
        raise ConfigError(f"{shown}: the file name must end in {' or '.join(suffixes)}{hint}.")
    if path.is_dir():
        raise ConfigError(f"{shown}: is a folder; give a file name in it.")
    if not folder.is_dir():
        what = "is a file; choose another" if folder.exists() else "does not exist; create it first"
        raise ConfigError(f"{shown}: the folder {str(folder)!r} {what}.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.exists():
            with path.open("ab"):
                pass
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be written ({error.strerror}); choose another folder.") from error


def paint(job: Job) -> None:
    """Paints all prompts on the ranks of this world. Collective; rank 0 writes and tells."""
    picture = job.picture
    from parafuse.engine.engine import Engine
    from parafuse.engine.source import locate

    source = locate(picture.model, allow_pickle=job.config.allow_pickle)
    if not picture.verbose:
        quiet.hide_loading_bars()
    started = hardware.process_age_s()
    engine = Engine.from_pretrained(
        picture.model,
        job.config,
        plan=job.plan,
        progress=not picture.quiet,
        agree_on={"prompts": list(job.prompts), "seed": picture.seed, **job.call},
        expect=job.call if job.plan is None and job.config.parallel.is_chosen else None,
    )
    if engine.plan.world_size > 1 and not engine.plan.why:  # with a reason, the engine has told it
        log.note(engine.plan.one_line())
    if picture.save_plan and engine.rank == 0:
        engine.plan.save(picture.save_plan)
    paths = output_paths(picture.out, len(job.prompts) * job.num_pictures)
    takes_type = "output_type" in inspect.signature(type(engine.pipeline).__call__).parameters
    wanted = {**job.call, "output_type": "pil"} if takes_type else job.call  # videos are arrays by default
    each = len(paths) // len(job.prompts)
    at_once = engine.plan.degree(Axis.DATA) if each == 1 else 1
    groups = [job.prompts[first : first + at_once] for first in range(0, len(job.prompts), at_once)]
    requests = (_request(prompts, engine, picture.seed, wanted) for prompts in groups)
    outputs = engine.map(requests) if picture.overlap else (engine(**request) for request in requests)
    begun, left = time.perf_counter(), iter(paths)
    for prompts, output in zip(groups, outputs, strict=True):
        seconds = (time.perf_counter() - begun) / len(prompts)
        own = list(islice(left, len(prompts) * each))
        if engine.rank == 0:
            engine.receipt.setdefault("timings_s", {})["start"] = None if started is None else round(started, 3)
            tell(job, engine, source, output, own, seconds)
        if picture.learn:
            learning.tell(engine, source, job.config, job.call, len(own))
        begun = time.perf_counter()
    engine.close()


def _request(prompts: tuple[str, ...], engine: Engine, seed: int | None, call: dict[str, Any]) -> dict[str, Any]:
    """Keywords for one prompt; or for several, each with the noise that it would have had alone."""
    if len(prompts) == 1:
        return {**call, "prompt": prompts[0], "seed": seed}
    negative = call.get("negative_prompt")
    lists = {"negative_prompt": [negative] * len(prompts)} if isinstance(negative, str) else {}
    seed = engine.world.share("seed", fresh_seed) if seed is None else seed
    return {**call, **lists, "prompt": list(prompts), "seed": (seed,) * len(prompts)}


def tell(job: Job, engine: Engine, source: ModelSource, output: Any, paths: list[Path], seconds: float) -> None:
    """Writes what one request has painted, and prints a line for each prompt."""
    seed = engine.receipt.get("seed", job.picture.seed)
    if isinstance(seed, (list, tuple)):  # one for each, all the same
        seed = engine.receipt["seed"] = seed[0]
    shown = save(engine, output, paths)
    if not job.picture.quiet:
        ranks = "1 rank" if job.world_size == 1 else f"{job.world_size} ranks"
        lines = shown if job.num_pictures == 1 else [", ".join(shown)]
        step = learning.beside(engine, source, job.config, job.call, len(paths))
        more = f"; {step}" if step else ""
        for line in lines:
            print(f"{line}  ({seconds:.1f} s on {ranks}, seed {seed}{more})", flush=True)


def save(engine: Engine, output: Any, paths: list[Path]) -> list[str]:
    """Writes the pictures of one request; the frames of a video as numbered pictures. Returns what was written."""
    from parafuse.engine.receipt import save_image

    images: list[Image | list[Image]] | None = getattr(output, "images", None)
    if images is None:
        images = getattr(output, "frames", None)
    if images is None or len(images) != len(paths):
        raise ParafuseError(f"the pipeline's output ({type(output).__name__}) holds no pictures; use it from Python.")
    if getattr(output, "audio", None) is not None:
        log.note("the sound is not written; use parafuse.Engine from Python for it")
    written: list[str] = []
    for image, path in zip(images, paths, strict=True):
        frames = image if isinstance(image, list) else [image]
        files = [path]
        if len(frames) > 1:
            files = [path.with_name(f"{path.stem}-{number:04d}{path.suffix}") for number in range(len(frames))]
        for frame, file in zip(frames, files, strict=True):
            save_image(frame, file, engine.receipt)
        written.append(str(path) if len(files) == 1 else f"{files[0]} to {files[-1]}")
    return written
