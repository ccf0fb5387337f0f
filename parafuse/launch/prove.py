"""`parafuse prove`: one report for someone who owns the machine, to believe us by, or not. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parafuse.cache import Cache, cache_of
from parafuse.config import Axis, Config
from parafuse.errors import ConfigError
from parafuse.launch import quiet
from parafuse.launch.asked import PLACING, Asked, number_of_ranks, refuse_extras
from parafuse.launch.bench.case import ALONE, REPLICATED, WAYS, Case, Variant
from parafuse.launch.bench.command import check_packages
from parafuse.launch.bench.record import save_beside
from parafuse.launch.keywords import call_for_prompts
from parafuse.launch.options import Option, build, given
from parafuse.launch.prompts import prompts_of
from parafuse.quantization import Quantize, quantize_of

BASELINE = Variant(name="plain", way="plain")
OURS = "parafuse"


@dataclass(frozen=True, kw_only=True)
class Proof(Asked):
    """What to prove."""

    seed: int | None = None
    """Of the noise. (Default: 0)"""
    peers: bool = False
    """Other engines too, each with its defaults; one that is not installed, or fails, is a row that says so."""
    prompts: str | None = None
    """A file with a prompt in each line. Not given: the model's own set, or a general one."""
    first: int = 2
    """Only so many of the prompts; the first is timed, all are compared."""
    rounds: int = 3
    """How often each way is timed, in turns."""
    out: str = "out/prove"
    """Folder for the report: one HTML file with everything in it, and its figures as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("first", 1), ("rounds", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be at least {least}.")


@dataclass(frozen=True, kw_only=True)
class ProofJob:
    """A checked proof."""

    proof: Proof
    case: Case
    config: Config
    world_size: int
    prompts: tuple[str, ...]


def prepare(prompt: str | None, proof: Proof, options: list[Option], typed: dict[str, Any]) -> ProofJob:
    """Checks the request, torch-free and without loading weights. Raises ConfigError at the first fault."""
    from parafuse.engine.planner import resolve
    from parafuse.engine.source import locate

    check_packages("prove")
    config = build(Config.from_file(proof.config) if proof.config else Config(), given(options, typed))
    refuse_extras("prove", config, ("compile",), "ways with compiled blocks are timed beside the others; leave it out.")
    refuse_extras(
        "prove",
        config,
        ("cuda_graphs", "rewrites", "attention", "sparse", "offload", *PLACING),
        "is not timed here; leave it out.",
    )
    world_size = number_of_ranks(proof)
    source = locate(proof.model, allow_pickle=config.allow_pickle)
    plan = resolve(config, source, world_size)
    prompts = prompts_of(source, prompt, proof.prompts, proof.first)
    call = call_for_prompts(proof, source, prompts)
    case = Case(
        name="prove",
        theme=f"prove-{Path(proof.model).name}",
        model=proof.model,
        baseline=BASELINE.name,
        variants=_variants(plan.degrees, world_size, proof.peers, cache_of(config.cache), quantize_of(config.quantize)),
        call=call | {"prompt": prompts[0]},
        seed=proof.seed or 0,
        rounds=proof.rounds,
        warm_ups=1,
    )
    return ProofJob(proof=proof, case=case, config=config, world_size=world_size, prompts=prompts)


def _variants(
    degrees: dict[str, int], ranks: int, peers: bool, cache: Cache | None = None, method: Quantize | None = None
) -> tuple[Variant, ...]:
    """Plain diffusers, the plan that parafuse chose, both compiled, the plan with a cache, and what others offer."""
    found = [BASELINE, Variant(name="plain + compile", way="plain", compile=True, may_fail=True)]
    if ranks == 1:
        found.append(Variant(name=OURS))
    else:
        chosen: dict[str, int | str] = {str(axis): degrees[axis] for axis in Axis if degrees[axis] > 1}
        chosen.setdefault(Axis.ULYSSES, 1)
        for extra, compiled in (("", False), (" + compile", True)):
            name = f"{OURS} ({_said(degrees)}){extra}"
            found.append(Variant(name=name, parallel=chosen, compile=compiled, needs_ranks=ranks, may_fail=compiled))
    if cache is not None:
        name = f"{OURS} ({', '.join(part for part in (_said(degrees), f'cache {cache.brief}') if part)})"
        found.append(dataclasses.replace(found[2], name=name, cache=str(cache), may_fail=True))
    if method is not None:
        name = f"{OURS} ({', '.join(part for part in (_said(degrees), f'quantize {method.brief}') if part)})"
        found.append(dataclasses.replace(found[2], name=name, quantize=str(method), may_fail=True))
    if peers:
        ways = [way for way in WAYS if way not in ("plain", OURS)]
        found += [Variant(name=way, way=way) for way in ways if way in (*ALONE, *REPLICATED) or ranks > 1]
    return tuple(found)


def _said(degrees: dict[str, int]) -> str:
    return ", ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1)


def run(job: ProofJob) -> None:
    """Proves on the ranks of this world. Collective; rank 0 writes and tells."""
    from parafuse.launch.bench.html import page
    from parafuse.launch.bench.model import load
    from parafuse.launch.bench.paintings import Paintings
    from parafuse.launch.bench.run import Run

    if not job.proof.verbose:
        quiet.hide_loading_bars()
    measuring = Run(job.case, load(job.proof.model, job.config), job.case.rounds, job.config)
    paintings = Paintings(job.prompts, job.case.seed)
    record = measuring.measure({}, paintings.paint)
    if measuring.rank == 0:
        files = {
            ".html": page(record, paintings),
            ".json": json.dumps({"record": asdict(record), "pictures": paintings.to_list()}, indent=1) + "\n",
        }
        for path in save_beside(record.name, Path(job.proof.out), files):
            print(path, flush=True)
