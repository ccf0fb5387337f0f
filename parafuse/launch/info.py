"""`parafuse info`: hardware, versions, backends, and what is missing for what."""

from __future__ import annotations

import dataclasses
import json

from rich.console import Console
from rich.table import Table

import parafuse
from parafuse.launch.survey import AttentionBackend, Survey, survey

GIB = 2**30


def show_info(*, as_json: bool) -> None:
    """Prints the survey of this machine to stdout, for people or as one JSON object."""
    facts = survey()
    if as_json:
        print(json.dumps({"parafuse": parafuse.__version__, **dataclasses.asdict(facts)}, indent=2))
        return
    console = Console()
    console.print(table(facts))
    if facts.missing:
        console.print("\n[bold]Missing[/bold]")
        for line in facts.missing:
            console.print(f"  {line}", highlight=False, markup=False)
    else:
        console.print("\nNothing is missing.")


def table(facts: Survey) -> Table:
    """The survey as rows of name and value."""
    machine = facts.hardware
    rows = Table(box=None, show_header=False, pad_edge=False)
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(overflow="fold")
    rows.add_row("parafuse", f"{parafuse.__version__} on Python {machine.python}, {machine.platform}")
    flags = f" ({', '.join(machine.cpu_flags)})" if machine.cpu_flags else ""
    rows.add_row("CPU", f"{machine.cpu}{flags}")
    rows.add_row("cores", f"{machine.cores} of {machine.machine_cores} may be used")
    rows.add_row("memory", f"{machine.memory_bytes / GIB:.1f} GiB")
    for index, gpu in enumerate(machine.gpus):
        links = f", {gpu.nvlinks} NVLinks" if gpu.nvlinks else ""
        value = f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB, compute capability {gpu.capability}{links}"
        rows.add_row(f"GPU {index}", value)
    if not machine.gpus:
        rows.add_row("GPUs", "none")
    if machine.driver:
        rows.add_row("driver", machine.driver)
    for package, version in facts.versions.items():
        build = f" (CUDA {facts.cuda_build})" if facts.cuda_build else " (CPU build)"
        shown = version + (build if package == "torch" else "") if version else "[dim]not installed[/dim]"
        rows.add_row(package, shown)
    rows.add_row("collectives", _usable(facts.collectives))
    for i, one in enumerate(facts.attention):
        rows.add_row("" if i else "attention", _backend(one))
    if facts.attention:
        rows.add_row(
            "", facts.tuned or "none timed here (parafuse tune attention): attention=auto is torch's own choice"
        )
    return rows


def _backend(one: AttentionBackend) -> str:
    """One line of a backend of attention."""
    if one.why_not:
        return f"[dim]{one.name}: {one.why_not}[/dim]"
    can = [what for what, there in (("log-sum-exp", one.has_lse), ("masks", one.takes_masks)) if there]
    lossy = [f"lossy: {one.lossy}"] if one.lossy else []
    return f"{one.name}: {'; '.join([one.about, ', '.join(can) or 'neither log-sum-exp nor masks', *lossy])}"


def _usable(backends: dict[str, bool]) -> str:
    return ", ".join(name if there else f"[dim]no {name}[/dim]" for name, there in backends.items()) or "unknown"
