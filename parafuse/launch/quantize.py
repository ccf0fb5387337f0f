"""`parafuse quantize`: what 8 bits lose on a model's own calls, group by group, and a folder with the result."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from parafuse.config import Config, Parallel
from parafuse.errors import ConfigError
from parafuse.launch import quiet
from parafuse.launch.asked import PLACING, Asked, refuse_extras
from parafuse.launch.keywords import call_for_prompts
from parafuse.launch.options import Option, build, given
from parafuse.launch.prompts import prompts_of
from parafuse.quantization import AUTO, CALIBRATED, ROW, Fp8, Quantize, quantize_of

if TYPE_CHECKING:
    from parafuse.engine.quantize.offline import Outcome


@dataclass(frozen=True, kw_only=True)
class Packing(Asked):
    """What to quantize."""

    seed: int | None = None
    """Of the first prompt's noise; the others have the numbers after it. (Default: 0)"""
    prompts: str | None = None
    """A file with a prompt in each line. Not given: the model's own set, or a general one."""
    first: int | None = None
    """Only so many of the prompts. (Default: 1, or 4 for calibrated scales)"""
    limit: float | None = None
    """Leave groups of layers as they are that alone change the model's output by more than this, relatively."""
    out: str | None = None
    """Folder for the quantized model. Not given: only measure."""
    json: bool = False
    """As one JSON object, with every layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first is not None and self.first < 1:
            raise ConfigError(f"--first {self.first}: must be at least 1.")
        if self.limit is not None and not 0 < self.limit < float("inf"):
            raise ConfigError(f"--limit {self.limit}: must be a number above 0.")


@dataclass(frozen=True, kw_only=True)
class PackingJob:
    """A checked request."""

    packing: Packing
    config: Config
    """Without the quantization: everything is measured as it is."""
    method: Quantize
    prompts: tuple[str, ...]
    call: dict[str, Any]
    defaults: dict[str, Any]
    """The model's own keywords of the call, which its folder keeps."""


def prepare(prompt: str | None, packing: Packing, options: list[Option], typed: dict[str, Any]) -> PackingJob:
    """Checks the request, torch-free and without loading weights. Raises ConfigError at the first fault."""
    from parafuse.engine.planner import resolve
    from parafuse.engine.quantize.saved import saved_by
    from parafuse.engine.source import locate

    config = build(Config.from_file(packing.config) if packing.config else Config(), given(options, typed))
    method = quantize_of(config.quantize)
    if method is None:
        raise ConfigError("--quantize: say what to quantize with: fp8, fp8-weight, int8 or int8-weight.")
    way_out = "everything is measured as it is; leave it out."
    names = ("cache", "compile", "cuda_graphs", "rewrites", "attention", "sparse", "offload", *PLACING)
    refuse_extras("quantize", config, names, way_out)
    if "RANK" in os.environ or config.parallel != Parallel():
        raise ConfigError("quantize: runs on one rank; leave launcher and degrees out.")
    out = Path(packing.out) if packing.out else None
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {packing.out!r}: is there already; give a new folder.")
    source = locate(packing.model, allow_pickle=config.allow_pickle)
    saved = saved_by(source)
    if saved:
        part, first = next(iter(saved.items()))
        raise ConfigError(f"model={source.name!r}: {part} is saved in {first.method} already; give it as it was.")
    if method.keep_originals:
        raise ConfigError("--quantize: keep_originals=true: is for a model in memory; leave it out.")
    plan = resolve(dataclasses.replace(config, quantize=_resolvable(method)), source, 1)
    if isinstance(method, Fp8) and method.scale == AUTO:
        method = dataclasses.replace(method, scale=getattr(quantize_of(plan.quantize), "scale", ROW))
    if packing.prompts is not None and prompt is not None:
        raise ConfigError(f"--prompts {packing.prompts!r}: a prompt is given too; leave one out.")
    is_calibrated = isinstance(method, Fp8) and method.scale == CALIBRATED
    prompts = prompts_of(source, prompt, packing.prompts, packing.first or (4 if is_calibrated else 1))
    return PackingJob(
        packing=packing,
        config=dataclasses.replace(config, quantize=None),
        method=method,
        prompts=prompts,
        call=call_for_prompts(packing, source, prompts),
        defaults=source.defaults,
    )


def _resolvable(method: Quantize) -> Quantize:
    """The same for the planner, which wants calibrated scales to have been measured."""
    is_calibrated = isinstance(method, Fp8) and method.scale == CALIBRATED
    return dataclasses.replace(method, scale=AUTO) if is_calibrated else method


def run(job: PackingJob) -> None:
    """Measures, quantizes and writes, on one rank."""
    from parafuse.engine.engine import Engine
    from parafuse.engine.quantize.offline import quantize_measured, save
    from parafuse.engine.targets import weighty

    packing = job.packing
    if not packing.verbose:
        quiet.hide_loading_bars()
    with Engine.from_pretrained(packing.model, job.config, alone=True) as engine:
        turns = iter(range(len(job.prompts)))

        def paint() -> None:
            number = next(turns)
            engine(**job.call, prompt=job.prompts[number], seed=(packing.seed or 0) + number)

        outcome = quantize_measured(
            *weighty(engine.pipeline),
            job.method,
            paint,
            limit=packing.limit,
            requests=len(job.prompts),
        )
        if packing.out:
            save(Path(packing.out), engine.pipeline, outcome.done, job.defaults)
    if packing.json:
        print(json.dumps({"model": packing.model, **outcome.to_dict()}, indent=2), flush=True)
    elif not packing.quiet:
        show(outcome, packing.out)


def show(outcome: Outcome, out: str | None) -> None:
    """Prints the table to stdout."""
    table = Table(box=None, pad_edge=False)
    for heading in ("layers, * for a number", "how many", "error alone", "largest input", ""):
        justify = "left" if heading in ("layers, * for a number", "") else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    for group in outcome.groups:
        left = "left as it is" if group in outcome.over else ""
        name = f"{group.component}.{group.pattern}"
        table.add_row(name, str(group.layers), f"{group.error:.2e}", f"{group.largest:.3g}", left)
    console = Console(soft_wrap=True)
    console.print(table)
    for component, error in outcome.errors.items():
        console.print(f"{component}: error {error:.2e} with all that are quantized", highlight=False)
    before, after = outcome.bytes_before / 1e6, outcome.bytes_after / 1e6
    console.print(f"weights: {before:.1f} MB -> {after:.1f} MB" + (f", in {out}" if out else ""), highlight=False)
