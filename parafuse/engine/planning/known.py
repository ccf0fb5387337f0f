"""What the planner has found out before and keeps: machines that were measured, facts of models, what runs have told.

Files of one folder (`PARAFUSE_CACHE`, or the user's cache folder), each readable JSON; bounded; `forget` empties it.
Torch-free."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parafuse.engine.kept import cache_folder
from parafuse.engine.planning.facts import SCHEMA, Facts
from parafuse.engine.planning.machine import Machine
from parafuse.hardware import hardware, versions, visible_gpus

MOST_FACTS = 200
"""Models and sizes; the oldest go first."""


def folder() -> Path | None:
    """Where it is; None where nothing is kept."""
    where = cache_folder()
    return None if where is None else where / "planner"


def read(name: str) -> Any:
    """A file of the folder; None where it is not there or holds something else."""
    where = folder()
    if where is None:
        return None
    try:
        return json.loads((where / name).read_text())
    except (OSError, ValueError):
        return None


def write(name: str, values: Any) -> Path | None:
    """Writes one, whole or not at all. A folder that cannot be written keeps nothing."""
    where = folder()
    if where is None:
        return None
    target = where / name
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(values) + "\n")
        part.replace(target)
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return target


def forget() -> int:
    """Removes all of it; the number of files."""
    where = folder()
    files = [path for path in where.rglob("*.json") if path.is_file()] if where is not None else []
    for path in files:
        with contextlib.suppress(OSError):
            path.unlink()
    return len(files)


def this_machine(device: str) -> str:
    """What measurements are kept for: processors or GPUs, and the version of torch."""
    there = hardware()
    names = [gpu.name for gpu in visible_gpus()] if device == "cuda" else [there.cpu, str(there.cores)]
    threads = os.environ.get("OMP_NUM_THREADS", "") if device == "cpu" else ""
    return ", ".join([device, *names, f"torch {versions()['torch']}", f"threads {threads or 'auto'}"])


def machine(ranks: int, device: str, dtype: str) -> Machine | None:
    """The machine at hand as it was measured; None where it was not."""
    found = read(_machine_file(ranks, device, dtype))
    try:
        return None if found is None else Machine.from_dict(found)
    except (TypeError, KeyError, ValueError):
        return None


def keep_machine(found: Machine, ranks: int, device: str, dtype: str) -> Path | None:
    return write(_machine_file(ranks, device, dtype), found.to_dict())


def _machine_file(ranks: int, device: str, dtype: str) -> str:
    return f"machines/{_digest(this_machine(device), ranks, dtype)}.json"


def facts(key: str, make: Callable[[], Facts]) -> Facts:
    """Facts of a model and a request that are kept under a key, else made and kept."""
    if (there := kept_facts(key)) is not None:
        return there
    made = make()
    write(_facts_file(key), made.to_dict())
    _bound("facts", MOST_FACTS)
    return made


def kept_facts(key: str) -> Facts | None:
    """Those under a key; None where there are none."""
    found = read(_facts_file(key))
    if isinstance(found, dict) and found.get("schema") == SCHEMA:
        with contextlib.suppress(TypeError, KeyError, ValueError):
            return Facts.from_dict(found)
    return None


def _facts_file(key: str) -> str:
    return f"facts/{key}.json"


def key_of(*parts: Any) -> str:
    """For `facts`: also by what computes them."""
    of_versions = {name: versions()[name] for name in ("torch", "diffusers", "transformers")}
    return _digest(SCHEMA, of_versions, *parts)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _bound(name: str, most: int) -> None:
    where = folder()
    files = sorted((where / name).glob("*.json"), key=lambda path: path.stat().st_mtime) if where else []
    for path in files[: max(0, len(files) - most)]:
        with contextlib.suppress(OSError):
            path.unlink()
