"""`parafuse bench`, `bench report`, `bench compare`: what is asked, checked before torch is imported."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from parafuse.config import Config
from parafuse.errors import ConfigError
from parafuse.launch import quiet
from parafuse.launch.asked import number_of_ranks
from parafuse.launch.bench.case import PACKAGES, Case, load_case
from parafuse.launch.bench.compare import compared
from parafuse.launch.bench.record import FOLDER, commit, load, save
from parafuse.launch.bench.starts import measure_starts, read_starts
from parafuse.launch.keywords import refuse_unknown
from parafuse.launch.options import Option, build, given
from parafuse.launch.prompts import first_prompts
from parafuse.log import note

NEEDED = ("torchmetrics", "matplotlib", "psutil", "jinja2")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to measure."""

    case: str = "emoji"
    """A case by name, or a TOML file of one's own."""
    variant: tuple[str, ...] = ()
    """Only this one and the baseline. May be repeated. Not given: all that the ranks allow."""
    ranks: int | None = None
    """Processes to start on this machine, one for each GPU. Not given: 1, or torchrun's."""
    rounds: int | None = None
    """How often each variant is timed, in turns. Not given: as the case says, mostly 5. Of a case whose rounds have
    prompts of their own: the first so many."""
    out: str = FOLDER
    """Folder for the record (JSON)."""
    dirty: bool = False
    """Write a record although the source has changes since its commit; its name says so."""
    starts: bool = False
    """Also time the first picture of each variant in processes of its own, with empty and with filled caches."""
    tiny: bool = False
    """For a case of a model random:NAME: with tiny parts, to try the case where there is no GPU."""
    budget_s: float | None = None
    """No variant is begun later than this and, after two rounds, none is timed. Not given: no limit."""
    first_picture: bool = False
    """Paint one picture with the one --variant, and tell when it was there; nothing is recorded."""
    quiet: bool = False
    """No table; errors only."""
    verbose: bool = False
    """Show the warnings and logs of the libraries underneath."""

    def __post_init__(self) -> None:
        if self.ranks is not None and self.ranks < 1:
            raise ConfigError(f"--ranks {self.ranks}: must be at least 1.")
        if self.rounds is not None and self.rounds < 2:
            raise ConfigError(f"--rounds {self.rounds}: must be at least 2, or there is no spread.")
        if self.budget_s is not None and self.budget_s <= 0:
            raise ConfigError(f"--budget {self.budget_s}: must be above 0 seconds.")
        if self.first_picture and len(self.variant) != 1:
            raise ConfigError("--first-picture: needs one --variant.")


@dataclass(frozen=True, kw_only=True)
class BenchJob:
    """A checked measurement."""

    bench: Bench
    case: Case
    config: Config
    world_size: int


def prepare(bench: Bench, options: list[Option], typed: dict[str, object]) -> BenchJob:
    """Checks the request without loading weights. Raises ConfigError at the first fault."""
    from parafuse.engine.memory.check import check_memory
    from parafuse.engine.source import locate

    check_packages("bench")
    config = build(Config(), given(options, typed))
    world_size = number_of_ranks(bench)  # pyright: ignore[reportArgumentType]
    case = load_case(bench.case).only(bench.variant)
    if bench.tiny:
        case = case.tiny()
    if bench.first_picture:
        chosen = tuple(v for v in case.variants if v.name == bench.variant[0])
        case = dataclasses.replace(case, variants=chosen, baseline=bench.variant[0])
    lacking = [v.name for v in case.variants if v.needs_ranks > world_size]
    if lacking and (bench.variant or len(lacking) == len(case.variants)):
        raise ConfigError(f"--variant {lacking[0]!r}: needs more ranks than {world_size}; give --ranks 2 or more.")
    if lacking and "RANK" not in os.environ:
        note(f"left out, they need more ranks: {', '.join(lacking)}")
    case = _installed(case.without(lacking), bench.variant)
    _check_layouts(case, world_size)
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=case.dtype)
    source = locate(case.model, allow_pickle=config.allow_pickle)
    check_memory(source, config, world_size)
    for variant in case.variants:
        refuse_unknown(source, case.call | variant.call)
    first_prompts(source, case.prompts)
    if 0 < case.prompts < (bench.rounds or 0):
        raise ConfigError(
            f"--rounds {bench.rounds}: case {case.name!r} has {case.prompts} prompts, one for each round."
        )
    number, changed = commit()
    if changed and not (bench.dirty or bench.first_picture):
        raise ConfigError(f"--out {bench.out!r}: the source has changes since {number}; commit them, or give --dirty.")
    return BenchJob(bench=bench, case=case, config=config, world_size=world_size)


def check_packages(command: str) -> None:
    """Raises ConfigError where what measuring needs is not installed."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        raise ConfigError(f"{command}: needs {', '.join(lacking)}; pip install 'parafuse[bench]'.")


def _installed(case: Case, chosen: tuple[str, ...]) -> Case:
    """Without other engines that are not here, unless they were asked for by name: then they are rows that say so."""
    lacking = [v for v in case.variants if v.name not in chosen and v.way in PACKAGES]
    lacking = [v for v in lacking if importlib.util.find_spec(PACKAGES[v.way]) is None]
    if lacking and "RANK" not in os.environ:
        note(f"left out, they are not installed: {', '.join(v.name for v in lacking)}")
    return case.without([v.name for v in lacking])


def _check_layouts(case: Case, world_size: int) -> None:
    """Raises ConfigError for degrees that do not fit the ranks, and for shares on several of them."""
    for variant in case.variants:
        if variant.share_of > 1:
            if world_size > 1 or "RANK" in os.environ:
                raise ConfigError(
                    f"--ranks {world_size}: variant {variant.name!r} is a share, measured in one process without a "
                    "launcher; leave --ranks out, or name other variants."
                )
            variant.config(variant.share_of)
        elif variant.way == "parafuse" and variant.ranks(world_size) > 1:
            variant.config(world_size)


def starts_for(job: BenchJob) -> str:
    """Measures first pictures, if they are asked for; the name of a file that has them."""
    if not job.bench.starts:
        return ""
    options = ["--case", job.bench.case, "--device", job.config.device, "--dtype", job.config.dtype]
    found = measure_starts(job.case, job.world_size, [*options, *(["--tiny"] if job.bench.tiny else [])])
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(found, file)
    return file.name


def run(job: BenchJob) -> None:
    """Measures on the ranks of this world. Collective; rank 0 writes and tells."""
    from parafuse.launch.bench.model import load as load_model
    from parafuse.launch.bench.run import Run

    if not job.bench.verbose:
        quiet.hide_loading_bars()
    measuring = Run(
        job.case,
        load_model(job.case.model, job.config),
        job.bench.rounds or job.case.prompts or job.case.rounds,
        job.config,
        job.bench.budget_s,
    )
    if job.bench.first_picture:
        measuring.first_picture()
        if measuring.rank == 0:
            print(json.dumps({"first_picture": time.time()}), flush=True)
        return
    record = measuring.measure(read_starts())
    if measuring.rank == 0:
        path = save(record, Path(job.bench.out))
        if not job.bench.quiet:
            from parafuse.launch.bench.report import markdown

            print(markdown(record), flush=True)
        print(path, flush=True)


def report(paths: Sequence[str], out: str, page: str | None) -> None:
    """Writes a page for each record, and plots of all; puts ladders into a page that has marks for their cases."""
    from parafuse.launch.bench.plots import plots
    from parafuse.launch.bench.report import into_page, markdown

    records = [load(Path(path)) for path in paths]
    if page is not None:
        for record, path in zip(records, paths, strict=True):
            link = os.path.relpath(path, Path(page).parent)
            into_page(Path(page), record, Path(link).as_posix())
        print(page, flush=True)
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        written = folder / f"{record.name}.md"
        written.write_text(markdown(record))
        print(written, flush=True)
    for path in plots(records, folder):
        print(path, flush=True)


def compare(first: str, second: str) -> None:
    """Prints what moved between two records of one case."""
    table = Table(box=None, pad_edge=False)
    for heading in ("variant", "times as fast", "and then", "verdict"):
        table.add_column(heading, overflow="fold")
    for name, one, two, verdict in compared(load(Path(first)), load(Path(second))):
        shown = [f"{x.median:.2f} ({x.low:.2f} to {x.high:.2f})" if x else "" for x in (one, two)]
        table.add_row(name, *shown, verdict)
    Console().print(table)
