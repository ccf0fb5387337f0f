"""`parafuse verify`: does this model give on several ranks what it gives on one? Answered layout by layout."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from parafuse import log
from parafuse.attention import attention_of
from parafuse.cache import cache_of
from parafuse.config import DTYPES, Config, Parallel
from parafuse.errors import ConfigError, MismatchError
from parafuse.launch import quiet
from parafuse.launch.asked import PLACING, Asked, number_of_ranks, refuse_extras
from parafuse.launch.keywords import call_for_prompts, one_step_call
from parafuse.launch.options import Option, build, given
from parafuse.launch.prompts import prompts_of
from parafuse.quantization import quantize_of
from parafuse.sparse import sparse_of

if TYPE_CHECKING:
    from parafuse.engine.verify import Verdict


@dataclass(frozen=True, kw_only=True)
class Trial(Asked):
    """What to verify."""

    seed: int | None = None
    """Of the noise. (Default: 0)"""
    json: bool = False
    """As one JSON object."""
    quality: bool = False
    """Compare pictures instead: those of one configuration (the options below) with those of one rank."""
    prompts: str | None = None
    """With --quality: a file with a prompt in each line. Not given: the model's own set, or a general one."""
    first: int | None = None
    """With --quality: only so many of the prompts."""
    against: str | None = None
    """With --quality: dtype of the run on one rank that it is held against. Not given: the configuration's."""
    out: str | None = None
    """With --quality: folder for the table, the plot and the worst pictures. (Default: out/quality)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("prompts", "first", "against", "out") if getattr(self, name) is not None]
        if given and not self.quality:
            raise ConfigError(f"--{given[0]}: is for --quality; give that too, or leave it out.")
        if self.quality and self.json:
            raise ConfigError("--json: --quality writes quality.json to --out; leave it out.")
        allowed = [name for name in DTYPES if name != "auto"]
        if self.against is not None and self.against not in allowed:
            raise ConfigError(f"--against {self.against!r}: must be one of {', '.join(allowed)}.")
        if self.first is not None and self.first < 1:
            raise ConfigError(f"--first {self.first}: must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """A checked trial."""

    trial: Trial
    config: Config
    world_size: int
    call: dict[str, Any]
    """Keywords for the pipeline's call."""
    prompts: tuple[str, ...] = ()
    """Of a comparison of pictures."""


def prepare(prompt: str | None, trial: Trial, options: list[Option], typed: dict[str, Any]) -> TrialJob:
    """Checks the request, torch-free and without loading weights. Raises ConfigError at the first fault."""
    from parafuse.engine.planner import resolve
    from parafuse.engine.source import locate

    config = build(Config.from_file(trial.config) if trial.config else Config(), given(options, typed))
    if config.parallel != Parallel() and not trial.quality:
        where = f"--config {trial.config!r}: has" if trial.config else "verify: got"
        raise ConfigError(
            f"{where} parallel degrees, but every layout is tried; leave them out, or give --quality for one layout."
        )
    asked = cache_of(config.cache), quantize_of(config.quantize), sparse_of(config.sparse)
    lossy = [one for one in asked if one is not None]
    if lossy and not trial.quality:
        raise ConfigError(
            f"--{lossy[0].what} {lossy[0].brief}: changes what verify holds to be the same; leave it out, or give "
            "--quality to compare pictures."
        )
    refuse_extras("verify", config, ("offload",), "what is compared has all weights in place; leave it out.")
    if not trial.quality:
        way_out = "layouts are held against each other without it; leave it out, or give --quality to compare pictures."
        refuse_extras("verify", config, ("compile", "cuda_graphs", "rewrites", "attention", *PLACING), way_out)
    world_size = number_of_ranks(trial)
    changed = bool(lossy or config.compile or config.rewrites or attention_of(config.attention).acts)
    if world_size == 1 and trial.against is None and not changed:
        way_out = ", or another dtype with --against, or --cache or --quantize" if trial.quality else ""
        raise ConfigError(f"--ranks 1: one rank has nothing to be compared with; give --ranks 2 or more{way_out}.")
    source = locate(trial.model, allow_pickle=config.allow_pickle)
    if trial.quality:
        plan = resolve(config, source, world_size)
        if world_size == 1 and plan.dtype == trial.against and not changed:
            raise ConfigError(f"--against {trial.against!r}: is what one rank would run too; give another --dtype.")
        prompts = prompts_of(source, prompt, trial.prompts, trial.first)
        call = call_for_prompts(trial, source, prompts)
        return TrialJob(trial=trial, config=config, world_size=world_size, call=call, prompts=prompts)
    call = one_step_call(trial, source, prompt)
    config = dataclasses.replace(config, parallel=Parallel(ulysses=world_size))
    resolve(config, source, world_size)
    return TrialJob(trial=trial, config=config, world_size=world_size, call=call)


def run_quality(job: TrialJob) -> None:
    """Compares pictures on the ranks of this world. Collective; rank 0 writes and tells."""
    from parafuse.launch.bench.model import load
    from parafuse.launch.bench.quality import judge, markdown, write

    if not job.trial.verbose:
        quiet.hide_loading_bars()
    loaded = load(job.trial.model, job.config)
    exact = loaded.pipeline
    if job.trial.against and log.rank() == 0:
        exact = load(job.trial.model, dataclasses.replace(job.config, dtype=job.trial.against)).pipeline
    config = dataclasses.replace(job.config, dtype="auto", device="auto")  # they are the pipeline's now
    verdict, pairs = judge(loaded, exact, config, list(job.prompts), job.call, seed=job.trial.seed or 0)
    if pairs:
        print(markdown(verdict), flush=True)
        for path in write(verdict, pairs, Path(job.trial.out or "out/quality")):
            print(path, flush=True)


def run(job: TrialJob) -> None:
    """Verifies on the ranks of this world. Collective; rank 0 tells. Raises MismatchError, on all ranks alike."""
    from parafuse.engine.engine import Engine
    from parafuse.engine.verify import verify

    if not job.trial.verbose:
        quiet.hide_loading_bars()
    seed = job.trial.seed or 0
    with Engine.from_pretrained(job.trial.model, job.config, agree_on={"seed": seed, **job.call}) as engine:
        verdicts = verify(engine, seed=seed, **job.call)
        rank = engine.rank
    if rank == 0:
        show(verdicts, job, as_json=job.trial.json)
    wrong = [f"{v.name} by {v.error:.1e}" for v in verdicts if v.error is not None and not v.exact]
    if wrong:
        raise MismatchError(f"{job.trial.model}: differs from one rank in {', '.join(wrong)}; please report it.")


def show(verdicts: list[Verdict], job: TrialJob, *, as_json: bool) -> None:
    """Prints the verdicts to stdout."""
    if as_json:
        rows = [dataclasses.asdict(v) | {"exact": v.exact} for v in verdicts]
        print(json.dumps({"model": job.trial.model, "ranks": job.world_size, "layouts": rows}, indent=2), flush=True)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("layout", "result", "error", "allowed"):
        table.add_column(heading, justify="right" if heading in ("error", "allowed") else "left", overflow="fold")
    for v in verdicts:
        if v.error is None:
            table.add_row(v.name, f"refused: {v.refused}", "", "")
        else:
            table.add_row(v.name, "exact" if v.exact else "DIFFERENT", f"{v.error:.1e}", f"{v.limit:.1e}")
    Console().print(table)
