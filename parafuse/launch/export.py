"""`parafuse export-plan`: how a model's tokens are split, for those who stay with diffusers' own context parallel."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parafuse.config import Config, Parallel
from parafuse.errors import ConfigError
from parafuse.launch import quiet
from parafuse.launch.asked import PLACING, Asked, refuse_extras
from parafuse.launch.generate import check_writable
from parafuse.launch.keywords import one_step_call
from parafuse.launch.options import Option, build, given


@dataclass(frozen=True, kw_only=True)
class Export(Asked):
    """What to export."""

    seed: int | None = None
    """Of the noise. (Default: 0)"""
    out: str | None = None
    """Python file to write. Not given: printed."""


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """A checked export."""

    export: Export
    config: Config
    call: dict[str, Any]
    """Keywords for the pipeline's call."""


def prepare(prompt: str | None, export: Export, options: list[Option], typed: dict[str, Any]) -> ExportJob:
    """Checks the request, torch-free and without loading weights. Raises ConfigError at the first fault."""
    from parafuse.engine.planner import resolve
    from parafuse.engine.source import locate

    config = build(Config.from_file(export.config) if export.config else Config(), given(options, typed))
    names = ("cache", "quantize", "compile", "cuda_graphs", "rewrites", "attention", "sparse", "offload", *PLACING)
    refuse_extras("export-plan", config, names, "no exported plan can have it; leave it out.")
    if "RANK" in os.environ or config.parallel != Parallel():
        raise ConfigError("export-plan: runs on one rank, whatever the plan is for; leave launcher and degrees out.")
    source = locate(export.model, allow_pickle=config.allow_pickle)
    call = one_step_call(export, source, prompt)
    if export.out is not None:
        check_writable("--out", Path(export.out), (".py",))
    resolve(config, source, 1)
    return ExportJob(export=export, config=config, call=call)


def run(job: ExportJob) -> None:
    """Derives the plan from one denoising step and writes it. Raises UnsupportedError where the form cannot say it."""
    from parafuse.engine.engine import Engine
    from parafuse.engine.export import export_plan
    from parafuse.engine.verify import record

    if not job.export.verbose:
        quiet.hide_loading_bars()
    with Engine.from_pretrained(job.export.model, job.config) as engine:
        first = record(engine, job.export.seed or 0, job.call)[0]
        text = export_plan(first.module, first.args, first.kwargs).source()
    if job.export.out is None:
        print(text, end="", flush=True)
        return
    Path(job.export.out).write_text(text)
    if not job.export.quiet:
        print(job.export.out, flush=True)
