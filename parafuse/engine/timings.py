"""How fast attention backends were on this machine, kept from `parafuse tune attention` on. Torch-free."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from parafuse.attention import AUTO, TIMED, TORCH, Attention, Timings
from parafuse.engine.kept import cache_folder
from parafuse.errors import ConfigError
from parafuse.hardware import hardware, visible_gpus
from parafuse.log import note

PACKAGES = ("torch", "flash-attn", "flash-attn-3", "flash-attn-4", "sageattention")
"""Whose versions decide how fast a backend is."""


def device_name(device: str) -> str:
    """What timings are kept for: the kind of device, and the versions of what computes on it."""
    found = visible_gpus() if device == "cuda" else []
    name = found[0].name if found else device if device == "cuda" else f"{hardware().cpu} ({hardware().cores} cores)"
    versions: list[str] = []
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join([name, *versions])


def file() -> Path | None:
    """Where they are kept; None where nothing is."""
    where = cache_folder()
    return None if where is None else where / "attention.json"


def load(device: str) -> Timings | None:
    """What was timed on this kind of device; None where nothing was. Raises ConfigError for an entry that holds
    something else."""
    name = device_name(device)
    found = next((one for one in _all() if one.get("device") == name), None)
    timings = None if found is None else Timings.from_dict(found, str(file()))
    return timings if timings is not None and timings.rows else None


def save(timings: Timings) -> Path:
    """Keeps them, in the place of what was known of that device. Raises ConfigError where nothing can be kept."""
    where = file()
    if where is None:
        raise ConfigError("PARAFUSE_CACHE='': nothing is kept, so timings would be lost; name a folder, or unset it.")
    kept = [one for one in _all() if one.get("device") != timings.device]
    part = where.with_name(f"{where.name}.{os.getpid()}.part")
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps([*kept, timings.to_dict()], indent=1) + "\n")
        part.replace(where)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be written ({error}); name another folder by PARAFUSE_CACHE.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return where


def _all() -> list[dict[str, Any]]:
    """The entries of all devices, as they are."""
    where = file()
    if where is None or not where.is_file():
        return []
    try:
        values: Any = json.loads(where.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read as JSON ({error}); remove it.") from error
    if not isinstance(values, list) or not all(isinstance(one, dict) for one in values):
        raise ConfigError(f"{where}: holds no timings of attention; remove it.")
    return values


def resolved(attention: Attention, device: str) -> Attention:
    """The same with nothing left to be told: an "auto" is what was timed on this machine, else torch's own choice."""
    if attention.backend != AUTO:
        return attention
    try:
        timings = load(device)
    except ConfigError as error:  # a default must not fail by what some other process has left
        note(f"attention=auto: torch's own choice: {error}")
        timings = None
    return Attention(TORCH) if timings is None else Attention(TIMED, timings)
