"""`parafuse tune attention`: which attention backend is fastest on the user's shapes, kept for `attention="auto"`."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from parafuse.config import Config, Parallel
from parafuse.errors import ConfigError
from parafuse.launch import quiet
from parafuse.launch.asked import PLACING, Asked, refuse_extras
from parafuse.launch.keywords import one_step_call
from parafuse.launch.options import Option, build, given

OF_A_CALL = ("seed", "steps", "width", "height", "guidance", "negative_prompt", "set")
UNUSED = ("cache", "quantize", "compile", "cuda_graphs", "rewrites", "attention", "sparse", *PLACING)

if TYPE_CHECKING:
    from parafuse.engine.tune import Shape, Timed


@dataclass(frozen=True, kw_only=True)
class Tuning(Asked):
    """What to time."""

    seed: int | None = None
    """Of the noise. (Default: 0)"""
    shape: tuple[str, ...] = ()
    """Batch x heads x rows x head size, in the place of a model's own calls: 1x24x4608x128; with the number of keys
    before the head size where it is another one. May be repeated."""
    mask: str = "none"
    """With --shape: none, bool or bias."""
    causal: bool = False
    """With --shape: each row sees the keys up to its own."""
    rounds: int = 9
    """Each backend is timed so often, in turns."""
    json: bool = False
    """As one JSON object."""
    forget: bool = False
    """Only show the result; attention=auto goes on as before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ConfigError(f"--rounds {self.rounds}: must be at least 1.")
        if self.mask not in ("none", "bool", "bias"):
            raise ConfigError(f"--mask {self.mask!r}: must be none, bool or bias.")
        calls = [name for name in OF_A_CALL if getattr(self, name) not in (None, ())]
        if self.shape and calls:
            raise ConfigError(f"--{calls[0].replace('_', '-')}: is of a model's call; leave it out beside --shape.")
        if (self.mask != "none" or self.causal) and not self.shape:
            raise ConfigError("--mask and --causal: go with --shape; a model's own calls have their own.")


@dataclass(frozen=True, kw_only=True)
class TuningJob:
    """A checked request."""

    tuning: Tuning
    config: Config
    device: str
    dtype: str
    ulysses: int
    ring: int
    call: dict[str, Any]
    """Keywords of one step of the model; empty with --shape."""


def prepare(prompt: str | None, tuning: Tuning, options: list[Option], typed: dict[str, Any]) -> TuningJob:
    """Checks the request without loading weights. Raises ConfigError at the first fault."""
    from parafuse.engine.planner import resolve
    from parafuse.engine.source import locate
    from parafuse.engine.timings import file

    config = build(Config.from_file(tuning.config) if tuning.config else Config(), given(options, typed))
    refuse_extras("tune attention", config, UNUSED, "changes no time of attention; leave it out.")
    if "RANK" in os.environ:
        raise ConfigError(
            "tune attention: runs on one rank; leave the launcher out. --ulysses and --ring say for what."
        )
    parallel = config.parallel
    if parallel != Parallel(ring=parallel.ring, ulysses=parallel.ulysses):
        raise ConfigError("tune attention: only ulysses and ring change what one rank computes; leave other axes out.")
    if not tuning.forget and file() is None:
        raise ConfigError(
            "PARAFUSE_CACHE='': nothing is kept, so timings would be lost; name a folder, or give --forget."
        )
    source = locate(tuning.model, allow_pickle=config.allow_pickle)
    alone = dataclasses.replace(config, parallel=Parallel(), attention="torch")
    plan = resolve(alone, source, 1)
    if tuning.shape:
        from parafuse.engine.tune import Shape

        for text in tuning.shape:
            Shape.of(text)
    return TuningJob(
        tuning=tuning,
        config=alone,
        device=plan.device,
        dtype=plan.dtype,
        ulysses=1 if parallel.ulysses == "auto" else parallel.ulysses,
        ring=1 if parallel.ring == "auto" else parallel.ring,
        call={} if tuning.shape else one_step_call(tuning, source, prompt),
    )


def run(job: TuningJob) -> None:
    """Times, keeps and shows, on one rank."""
    import torch

    from parafuse.attention import Timings
    from parafuse.engine.timings import device_name, load, save
    from parafuse.engine.tune import time_backends

    tuning, dtype = job.tuning, getattr(torch, job.dtype)
    shapes = [one.on_rank(job.ulysses, job.ring) for one in _shapes(job)]
    with torch.no_grad():
        found = [time_backends(one, dtype=dtype, device=job.device, rounds=tuning.rounds) for one in shapes]
    where = None
    if not tuning.forget:
        timings = load(job.device) or Timings(device_name(job.device))
        for one in found:
            timings = timings.with_row(one.row)
        where = save(timings)
    if tuning.json:
        rows = [{**dataclasses.asdict(one.row), "refused": one.refused, "relative_error": one.errors} for one in found]
        print(json.dumps({"device": device_name(job.device), "rows": rows, "kept": where and str(where)}, indent=2))
    elif not tuning.quiet:
        _show(found)
        if where is not None:
            print(f"kept in {where}, for attention=auto", flush=True)


def _shapes(job: TuningJob) -> list[Shape]:
    from parafuse.engine.tune import Shape, shapes_in

    tuning = job.tuning
    if tuning.shape:
        mask = "" if tuning.mask == "none" else tuning.mask
        return [dataclasses.replace(Shape.of(one), mask=mask, is_causal=tuning.causal) for one in tuning.shape]
    from parafuse.engine.engine import Engine
    from parafuse.engine.targets import DENOISERS, denoisers

    if not tuning.verbose:
        quiet.hide_loading_bars()
    with Engine.from_pretrained(tuning.model, job.config, alone=True) as engine:
        modules = [module for _, module in denoisers(engine.pipeline, DENOISERS)]
        found = shapes_in(modules, lambda: engine(**job.call, seed=tuning.seed or 0))
    if not found:
        raise ConfigError(f"model={tuning.model!r}: its denoiser makes no call of torch's attention; give --shape.")
    return found


def _show(found: list[Timed]) -> None:
    """Prints the tables to stdout."""
    console = Console(soft_wrap=True)
    for one in found:
        more = [one.row.dtype, *([f"{one.row.mask} mask"] if one.row.mask else [])]
        more += ["causal"] if one.row.is_causal else []
        more += ["with log-sum-exp"] if one.row.with_lse else []
        table = Table(box=None, pad_edge=False, title=f"{one.row.shape} {', '.join(more)}", title_justify="left")
        table.add_column("backend")
        table.add_column("ms", justify="right")
        table.add_column("relative difference", justify="right")
        table.add_column("")
        for name, seconds in sorted(one.row.seconds.items(), key=lambda pair: pair[1]):
            table.add_row(name, f"{1e3 * seconds:.3g}", f"{one.errors[name]:.1e}", "")
        for name, why in one.refused.items():
            table.add_row(name, "", "", f"[dim]{why}[/dim]")
        console.print(table)
        console.print()
