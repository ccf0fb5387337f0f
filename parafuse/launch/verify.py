"""`parafuse verify`: does this model give on several ranks what it gives on one? Answered layout by layout."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from parafuse.config import Config, Parallel
from parafuse.errors import ConfigError, MismatchError
from parafuse.launch import quiet
from parafuse.launch.asked import Asked, number_of_ranks
from parafuse.launch.keywords import one_step_call
from parafuse.launch.options import Option, build, given

if TYPE_CHECKING:
    from parafuse.engine.verify import Verdict


@dataclass(frozen=True, kw_only=True)
class Trial(Asked):
    """What to verify."""

    seed: int | None = None
    """Of the noise. (Default: 0)"""
    json: bool = False
    """As one JSON object."""


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """A checked trial."""

    trial: Trial
    config: Config
    world_size: int
    call: dict[str, Any]
    """Keywords for the pipeline's call."""


def prepare(prompt: str | None, trial: Trial, options: list[Option], typed: dict[str, Any]) -> TrialJob:
    """Checks the request, torch-free and without loading weights. Raises ConfigError at the first fault."""
    from parafuse.engine.planner import resolve
    from parafuse.engine.source import locate

    config = build(Config.from_file(trial.config) if trial.config else Config(), given(options, typed))
    if config.parallel != Parallel():
        raise ConfigError(
            f"--config {trial.config!r}: has parallel degrees, but every layout is tried; leave them out."
        )
    world_size = number_of_ranks(trial)
    if world_size == 1:
        raise ConfigError("--ranks 1: one rank has nothing to be compared with; give --ranks 2 or more.")
    source = locate(trial.model, allow_pickle=config.allow_pickle)
    call = one_step_call(trial, source, prompt)
    config = dataclasses.replace(config, parallel=Parallel(ulysses=world_size))
    resolve(config, source, world_size)
    return TrialJob(trial=trial, config=config, world_size=world_size, call=call)


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
