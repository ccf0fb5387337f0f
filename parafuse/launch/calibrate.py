"""`parafuse calibrate`: measures a model once, for the caches that decide by what was measured beforehand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parafuse.calibration import FEWEST_STEPS
from parafuse.config import Config
from parafuse.errors import ConfigError
from parafuse.launch import quiet
from parafuse.launch.asked import Asked, number_of_ranks
from parafuse.launch.generate import check_writable
from parafuse.launch.keywords import accepted_keywords, call_for_prompts
from parafuse.launch.options import Option, build, given
from parafuse.launch.prompts import prompts_of

PROMPTS = 8
"""That are painted where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Calibrate(Asked):
    """What to measure."""

    seed: int | None = None
    """Of the first prompt's noise; the others have the numbers after it. (Default: 0)"""
    prompts: str | None = None
    """A file with a prompt in each line. Not given: the model's own set, or a general one."""
    first: int | None = None
    """Only so many of the prompts. (Default: 8)"""
    out: str = "calibration.json"
    """JSON file to write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first is not None and self.first < 1:
            raise ConfigError(f"--first {self.first}: must be at least 1.")
        if self.steps is not None and self.steps < FEWEST_STEPS:
            raise ConfigError(f"--steps {self.steps}: must be at least {FEWEST_STEPS}; the first ones tell nothing.")


@dataclass(frozen=True, kw_only=True)
class CalibrateJob:
    """A checked measurement."""

    asked: Calibrate
    config: Config
    world_size: int
    prompts: tuple[str, ...]
    call: dict[str, Any]
    """Keywords for the pipeline's call, the same for every prompt."""


def prepare(prompt: str | None, asked: Calibrate, options: list[Option], typed: dict[str, Any]) -> CalibrateJob:
    """Checks the request, torch-free and without loading weights. Raises ConfigError at the first fault."""
    from parafuse.engine.planner import resolve
    from parafuse.engine.source import locate

    config = build(Config.from_file(asked.config) if asked.config else Config(), given(options, typed))
    if config.cache is not None:
        raise ConfigError(
            f"cache={str(config.cache)!r}: everything is computed while a model is measured; leave it out."
        )
    world_size = number_of_ranks(asked)
    source = locate(asked.model, allow_pickle=config.allow_pickle)
    if asked.prompts is not None and prompt is not None:
        raise ConfigError(f"--prompts {asked.prompts!r}: a prompt is given too; leave one out.")
    prompts = prompts_of(source, prompt, asked.prompts, asked.first or PROMPTS)
    call = call_for_prompts(asked, source, prompts)
    if source.pipeline_class and "output_type" in (accepted_keywords(source.pipeline_class) or ()):
        call["output_type"] = "latent"
    check_writable("--out", Path(asked.out), (".json",))
    resolve(config, source, world_size)
    return CalibrateJob(asked=asked, config=config, world_size=world_size, prompts=prompts, call=call)


def run(job: CalibrateJob) -> None:
    """Measures on the ranks of this world. Collective; rank 0 writes and tells."""
    from parafuse.engine.calibrate import WATCHING, calibrate
    from parafuse.engine.engine import Engine

    asked = job.asked
    if not asked.verbose:
        quiet.hide_loading_bars()
    first = asked.seed or 0
    calls = [job.call | {"prompt": prompt, "seed": first + i} for i, prompt in enumerate(job.prompts)]
    with Engine.from_pretrained(
        asked.model,
        replace(job.config, cache=WATCHING),
        progress=not asked.quiet,
        agree_on={"prompts": list(job.prompts), "seed": first, **job.call},
    ) as engine:
        found = calibrate(engine, calls)
        rank = engine.rank
    if rank == 0:
        found.write(asked.out)
        if not asked.quiet:
            measured = found.calibration
            print(f"{asked.out}  ({', '.join(measured.denoisers)}: {measured.prompts} prompts, {measured.steps} steps)")
