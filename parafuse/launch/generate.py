"""`parafuse generate`: checks everything that can be checked, then paints here or starts ranks that do.

Nothing in here imports torch before the checks are through."""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parafuse import log
from parafuse.config import Config
from parafuse.engine.plan import Plan
from parafuse.errors import ConfigError, ParafuseError
from parafuse.launch import quiet
from parafuse.launch.keywords import NUM_PICTURES, as_typed, call_keywords, refuse_unknown
from parafuse.launch.options import Option, build, given

if TYPE_CHECKING:
    from PIL.Image import Image

    from parafuse.engine.engine import Engine

FORMATS = (".png",)
VIDEO_FORMATS = (".mp4", ".gif", ".webm", ".webp", ".mov", ".avi", ".mkv")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What to paint and where to: the options of `generate` beside the configuration."""

    out: str = "out.png"
    """PNG file to write, with a receipt (JSON) beside it. Several pictures are numbered: out-0.png, out-1.png, ..."""
    model: str = "emoji"
    """The built-in emoji, a diffusers folder, a single-file checkpoint, or a hub id."""
    ranks: int | None = None
    """Processes to start on this machine, one for each GPU. Not given: 1, the plan's, or torchrun's."""
    seed: int | None = None
    """The same seed gives the same picture on any number of ranks. Not given: a new one, told with the picture."""
    steps: int | None = None
    """Denoising steps."""
    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    guidance: float | None = None
    """Guidance scale: how closely the picture follows the prompt."""
    negative_prompt: str | None = None
    """What the picture should not show."""
    num_images: int | None = None
    """Pictures for each prompt."""
    set: tuple[str, ...] = ()
    """Any other keyword of the pipeline's call, its value as JSON: --set max_sequence_length=128. May be repeated."""
    config: str | None = None
    """JSON file with a configuration; options given beside it win."""
    plan: str | None = None
    """JSON file with a plan (from --save-plan, or a receipt): run exactly this layout again."""
    save_plan: str | None = None
    """JSON file to write the plan to."""
    quiet: bool = False
    """No progress bar and no notes; errors only."""
    verbose: bool = False
    """Show the warnings and logs of the libraries underneath."""

    def __post_init__(self) -> None:
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed {self.seed}: must be from 0 to 2^63 - 1.")
        for flag, value in (("--ranks", self.ranks), ("--num-images", self.num_images)):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} {value}: must be at least 1.")
        if self.quiet and self.verbose:
            raise ConfigError("--quiet and --verbose exclude each other; give one of them.")


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
    refuse_unknown(source, call)
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


def number_of_ranks(picture: Picture, plan: Plan | None) -> int:
    """Ranks of the launcher that started this process, else those asked for. Raises ConfigError when they differ."""
    if "RANK" in os.environ:
        try:
            running = int(os.environ["WORLD_SIZE"])
            rank = int(os.environ["RANK"])
        except (KeyError, ValueError) as error:
            raise ConfigError(
                "WORLD_SIZE: must be in the environment, a whole number, where RANK is; "
                "start with torchrun, or unset RANK."
            ) from error
        if not 0 <= rank < running:
            raise ConfigError(f"RANK={rank}: must be from 0 to WORLD_SIZE - 1 = {running - 1}.")
        if picture.ranks not in (None, running):
            raise ConfigError(
                f"--ranks {picture.ranks}: the launcher started {running}. Leave --ranks out, or start that many."
            )
        return running
    return picture.ranks or (plan.world_size if plan is not None else 1)


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
        what = "is not a folder" if folder.exists() else "does not exist; create it first"
        raise ConfigError(f"{shown}: the folder {str(folder)!r} {what}.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.exists():
            with path.open("ab"):
                pass
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be written ({error.strerror}); choose another folder.") from error


def start_ranks(job: Job, argv: Sequence[str]) -> int:
    """Runs this same command line on `job.world_size` ranks of this machine; returns the exit code."""
    from parafuse.parallel import ranks

    command = [sys.executable, "-m", "parafuse", *argv]
    numbers = range(job.world_size)
    with ranks.start(command, ranks=numbers, world_size=job.world_size, master_port=ranks.free_port()) as processes:
        code = processes.wait()
        failure = processes.failure
    if code and sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a progress bar that was killed leaves the cursor hidden
    if failure is not None:
        print(failure.render(), file=sys.stderr, flush=True)
    elif code:
        print("parafuse: stopped; no rank is left running.", file=sys.stderr, flush=True)
    return code


def paint(job: Job) -> None:
    """Paints all prompts on the ranks of this world. Collective; rank 0 writes and tells."""
    picture = job.picture
    from parafuse.engine.engine import Engine

    if not picture.verbose:
        quiet.hide_loading_bars()
    engine = Engine.from_pretrained(
        picture.model,
        job.config,
        plan=job.plan,
        progress=not picture.quiet,
        agree_on=[list(job.prompts), picture.seed, job.call],
    )
    if picture.save_plan and engine.rank == 0:
        engine.plan.save(picture.save_plan)
    paths = output_paths(picture.out, len(job.prompts) * job.num_pictures)
    takes_type = "output_type" in inspect.signature(type(engine.pipeline).__call__).parameters
    wanted = {**job.call, "output_type": "pil"} if takes_type else job.call  # videos are arrays by default
    each = len(paths) // len(job.prompts)
    for index, prompt in enumerate(job.prompts):
        begun = time.perf_counter()
        output = engine(prompt, seed=picture.seed, **wanted)
        seconds = time.perf_counter() - begun
        if engine.rank == 0:
            shown = ", ".join(save(engine, output, paths[index * each : (index + 1) * each]))
            if not picture.quiet:
                seed = engine.receipt.get("seed", picture.seed)
                ranks = "1 rank" if job.world_size == 1 else f"{job.world_size} ranks"
                print(f"{shown}  ({seconds:.1f} s on {ranks}, seed {seed})", flush=True)
    engine.close()


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
