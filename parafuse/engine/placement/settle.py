"""From what is asked for to an explicit placement, the same on all ranks, before a weight is loaded. Imports torch only
where something is to be placed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parafuse.config import Config
from parafuse.engine.placement.balance import balanced, check_fits
from parafuse.engine.placement.homes import home_in
from parafuse.engine.placement.inventory import Inventory, gigabytes, inventory
from parafuse.errors import ConfigError
from parafuse.hardware import memory_bytes, num_cuda_devices, visible_gpus
from parafuse.offload import CHANGED, ENDING, PAGE
from parafuse.placement import AUTO, DISK, MAP, max_memory_of, placement_of
from parafuse.quantization import Quantize

if TYPE_CHECKING:
    from parafuse.engine.placement.pieces import Owner
    from parafuse.engine.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What a plan holds."""

    homes: dict[str, str] | None = None
    """Path of a component or of a module of it -> "0", "1", ..., "cpu" or "disk"; the longest path decides. None: all
    together on the rank's device."""
    num_devices: int = 1
    """Devices that each rank has."""
    why: str = ""


def computes_on_host(config: Config) -> bool:
    """Whether a map names no accelerator: then, as with accelerate, ranks compute on the CPU."""
    asked = placement_of(config.placement)
    return asked is not None and asked.how == MAP and not any(home.isdigit() for _, home in asked.homes)


def placed_on(config: Config) -> str:
    """cpu or cuda, of a plan's placement; empty where there is none."""
    asked = placement_of(config.placement)
    return "" if asked is None else asked.device


def here(config: Config, device: str, local: int, *, elsewhere: bool = False) -> Inventory:
    """What each of `local` ranks of this machine has. `elsewhere`: of another one, whose devices are those that
    max_memory names where this one has too few. Raises ConfigError where it names none."""
    number = num_cuda_devices() if device == "cuda" else 0
    limits = max_memory_of(config.max_memory)
    found = [gpu.memory_bytes for gpu in visible_gpus()][:number]
    found += [0] * (number - len(found))
    if elsewhere and device == "cuda" and number < local:
        if limits is None or not limits.devices:
            raise ConfigError(
                f"placement: this machine has {number} GPUs for {local} {'rank' if local == 1 else 'ranks'}; say what "
                "each rank of the other one has: max_memory, such as 0=80GiB or 0=24GiB,1=24GiB."
            )
        found = [dict(limits.devices).get(k, 0) for k in range(limits.devices[-1][0] + 1)] * local
    return inventory(
        device=device,
        gpu_bytes=found,
        host_bytes=memory_bytes(),
        local=local,
        max_memory=limits,
        has_disk=bool(config.offload_folder),
    )


def placed(
    config: Config,
    source: ModelSource,
    *,
    device: str,
    dtype: str,
    quantize: Quantize | None,
    local: int,
    given: Mapping[str, Any] | None = None,
    elsewhere: bool = False,
) -> Placed:
    """Where each piece goes. `local`: ranks of this machine, or of another one (`elsewhere`). Raises ConfigError for
    what does not fit, with the numbers, and for a map that does not fit the model."""
    asked = placement_of(config.placement)
    if asked is None:
        return Placed()
    from parafuse.engine.placement.maps import taken, units
    from parafuse.engine.placement.pieces import owners_of, pieces_of
    from parafuse.engine.placement.unbuilt import unbuilt

    there = here(config, device, local, elsewhere=elsewhere)
    found = unbuilt(source, dtype, given)
    owners = owners_of(found, quantize)
    pieces = pieces_of(owners)
    if asked.how == MAP:
        homes = taken(asked, found, owners, there)
        check_fits(units(owners, homes), homes, there)
    elif asked.how == AUTO and sum(piece.num_bytes for piece in pieces) <= there.rooms[0].num_bytes:
        return Placed(why="all of it fits on one device")
    else:
        homes = balanced(pieces, there, str(asked))
    on_disk = [one for one in owners if home_in(homes, one.block or one.path) == DISK]
    if any(one.num_bytes for one in on_disk) and config.offload_folder:
        check_disk(config.offload_folder, on_disk)
    return Placed(homes=_shortest(homes), num_devices=there.num_devices)


def check_disk(folder: str, owners: Iterable[Owner]) -> None:
    """Raises ConfigError for a folder that cannot be one, or whose disk has too little room for what these own.

    A component needs none where a file of an earlier start has the size of what it has on the disk: that is used again
    if it holds the same, which is known once the weights are loaded. Other files are no room."""
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "is no folder" if not there.is_dir() else "cannot be written"
        raise ConfigError(f"offload_folder={folder!r}: {there} {why}; give another one.")
    parts: dict[str, list[int]] = {}
    for one in owners:
        parts.setdefault(one.component, []).append(one.num_bytes)
    sizes, new, again = _kept(Path(folder)), 0, 0
    for own in parts.values():
        fits = [size for size in sizes if abs(size - sum(own)) <= PAGE * len(own)]  # filled up, and without buffers
        if fits:
            sizes.remove(fits[0])
            again += sum(own)
        else:
            new += sum(own)
    free = shutil.disk_usage(there).free
    if new > free:
        beside = f" beside {gigabytes(again)} that files of an earlier start seem to hold" if again else ""
        raise ConfigError(
            f"offload_folder={folder!r}: needs {gigabytes(new)}{beside}, and the disk has {gigabytes(free)} free; give "
            "another one."
        )


def _kept(folder: Path) -> list[int]:
    """Bytes of the files that stay from start to start."""
    found: list[int] = []
    for file in folder.glob(f"*{ENDING}"):
        with suppress(OSError):  # its process has removed it meanwhile
            if not file.name.endswith(CHANGED):
                found.append(file.stat().st_size)
    return found


def _shortest(homes: Mapping[str, str]) -> dict[str, str]:
    """The same without what is where all around it is."""
    return {
        path: home
        for path, home in homes.items()
        if "." not in path or home != home_in({p: h for p, h in homes.items() if p != path}, path)
    }
