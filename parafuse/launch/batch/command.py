"""`parafuse batch`: a file of prompts, spread over engines by Ray Data. What was done stays done."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parafuse.config import Config
from parafuse.errors import ConfigError, ParafuseError
from parafuse.launch.cluster import missing, room_for, start_ray
from parafuse.launch.options import Option, build, given

if TYPE_CHECKING:
    from parafuse.launch.batch.lines import Place

CHUNK = 16
"""Lines that a replica is given at once, at most: few, so that all end at about the same time."""
SHOWN = 20
"""Lines that are reported one by one; of the others their number is told."""
NEEDED = ("ray", "pyarrow", "pandas", "msgspec", "structlog", "fastapi", "multipart", "prometheus_client")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What to paint with, and how often beside each other."""

    model: str = "emoji"
    """The built-in emoji, a diffusers folder, a single-file checkpoint, a hub id, or an architecture without weights:
    random:flux.1-dev, or tiny:flux.1-dev for a CPU."""
    out: str = "batch"
    """Folder for pictures and results, which all machines see. The same command goes on with what is missing there."""
    replicas: int = 1
    """Engines that paint at the same time, wherever Ray has room."""
    ranks: int = 1
    """Processes of each engine, on one machine, one for each GPU."""
    ray_address: str | None = None
    """Of a cluster: HOST:PORT, or auto. Not given: RAY_ADDRESS, or Ray on this machine alone."""
    loras: str | None = None
    """Folder of LoRA files that lines may name, which all machines see."""
    config: str | None = None
    """JSON file with a configuration; options given beside it win."""
    verbose: bool = False
    """Show the warnings and logs of the libraries underneath."""

    def __post_init__(self) -> None:
        for name in ("replicas", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checked batch."""

    batch: Batch
    file: Path
    config: Config
    device: str
    devices_per_replica: int


def prepare(file: str, batch: Batch, options: list[Option], typed: dict[str, Any]) -> Prepared:
    """Checks everything but the lines, without torch. Raises ConfigError at the first fault."""
    check_packages()
    from parafuse.engine.planner import resolve
    from parafuse.launch.serve.card import card_of

    if "RANK" in os.environ:
        raise ConfigError("batch: starts its ranks itself; start it without torchrun, once.")
    config = build(Config.from_file(batch.config) if batch.config else Config(), given(options, typed))
    config.parallel.degrees(batch.ranks)
    card = card_of(batch.model, allow_pickle=config.allow_pickle)
    plan = resolve(config, card.source, batch.ranks)
    if batch.loras is not None and not Path(batch.loras).is_dir():
        raise ConfigError(f"--loras {batch.loras!r}: is no folder.")
    if not Path(file).is_file():
        raise ConfigError(f"{file!r}: is no file; give one with a JSON object in each line.")
    return Prepared(
        batch=batch,
        file=Path(file).resolve(),
        config=config,
        device=plan.device,
        devices_per_replica=batch.ranks * plan.devices_per_rank,
    )


def check_packages() -> None:
    """Raises ConfigError where what a batch needs is not installed."""
    if not_there := missing(NEEDED):
        raise ConfigError(f"batch: needs {', '.join(not_there)}; pip install 'parafuse[batch]'.")


def run(prepared: Prepared) -> int:
    """Paints what is not done yet. 0 where every line is done then; 1 where some are wrong or have failed, each of
    which is told with its number. Raises ConfigError before anything is painted."""
    from parafuse.launch.batch.lines import places
    from parafuse.launch.batch.results import Results

    batch, results = prepared.batch, Results(Path(prepared.batch.out).resolve())
    with results.held({"model": batch.model, "config": prepared.config.to_dict()}):
        done = results.done()
        number, left = 0, []
        for place in places(prepared.file):
            number += 1
            if place.stem not in done:
                left.append(place)
        if not number:
            raise ConfigError(f"{str(prepared.file)!r}: has no lines.")
        _tell(f"{number} lines, {number - len(left)} of them done already")
        told = _spread(prepared, results.folder, left) if left else Counter[str]()
        there = results.gather(places(prepared.file))
    others = ", ".join(f"{count} {status}" for status, count in sorted(told.items()) if status != "done")
    _tell(f"{there} of {number} lines done{f' ({others})' if others else ''}: {results.folder / 'results.jsonl'}")
    return 0 if there == number else 1


def _spread(prepared: Prepared, out: Path, left: list[Place]) -> Counter[str]:
    """Has the lines painted; how many there were of each status. Raises ParafuseError where no replica can paint."""
    import ray
    import ray.data
    from ray.exceptions import RayError

    from parafuse.launch.batch.replica import BatchJob, Replica

    batch = prepared.batch
    loras = None if batch.loras is None else str(Path(batch.loras).resolve())
    model = str(Path(batch.model).resolve()) if Path(batch.model).exists() else batch.model
    job = BatchJob(
        file=str(prepared.file), out=str(out), model=model, config=prepared.config.to_dict(), ranks=batch.ranks,
        loras=loras,
    )  # fmt: skip
    start_ray(batch.ray_address, verbose=batch.verbose)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = batch.verbose
    if not batch.verbose:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        each = prepared.devices_per_replica
        room: dict[str, Any] = room_for(prepared.device, each, replicas=batch.replicas, ranks=batch.ranks)
        size = max(1, min(CHUNK, len(left) // (4 * batch.replicas)))
        chunks = [_chunk(left[begin : begin + size]) for begin in range(0, len(left), size)]
        pool = ray.data.ActorPoolStrategy(size=min(batch.replicas, len(chunks)))
        data = ray.data.from_items(chunks).map_batches(
            Replica, fn_constructor_args=(asdict(job),), batch_size=1, compute=pool, **room
        )
        return _watch(iter(data.iter_rows()), len(left))
    except RayError as error:
        raise ParafuseError(f"batch: Ray gave up: {str(error).strip().splitlines()[-1]}") from error
    finally:
        ray.shutdown()


def _chunk(places: list[Place]) -> dict[str, list[Any]]:
    return {
        "numbers": [one.number for one in places],
        "offsets": [one.offset for one in places],
        "digests": [one.digest for one in places],
    }


def _watch(rows: Iterator[dict[str, Any]], number: int) -> Counter[str]:
    """Shows how it goes, and says of each line that is not done why."""
    from rich.console import Console
    from rich.progress import Progress

    from parafuse.launch.batch.replica import DONE, LOST

    told: Counter[str] = Counter()
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as shown:
        task = shown.add_task("lines", total=number)
        for row in rows:
            told[row["status"]] += 1
            shown.advance(task)
            if row["status"] == LOST:
                raise ParafuseError(f"batch: a replica cannot paint: {row['message']}")
            bad = told.total() - told[DONE]
            if row["status"] != DONE and bad <= SHOWN:
                console.print(f"parafuse: line {row['number']}: {row['message']}", markup=False, soft_wrap=True)
            elif row["status"] != DONE and bad == SHOWN + 1:
                console.print("parafuse: more lines are not done; the last line tells how many.", markup=False)
    return told


def _tell(text: str) -> None:
    print(f"parafuse: {text}", file=sys.stderr, flush=True)
