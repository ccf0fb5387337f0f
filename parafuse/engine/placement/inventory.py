"""What each rank has room for: its devices, the host, a disk. Pure, torch-free; the same on every rank.

The k-th device of a rank is as small as the smallest k-th device of all ranks of a node: one placement fits them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from parafuse.errors import ConfigError
from parafuse.placement import CPU, DISK, MaxMemory

ACTIVATIONS = 0.15
"""Part of a device's memory that is kept free of weights: for activations, exchanges, and what libraries take."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """One place for weights."""

    home: str
    """"0", "1", ..., "cpu" or "disk"."""
    num_bytes: int
    """For weights."""
    there: int
    """What it has in all; 0: not known."""
    is_given: bool = False
    """Whether max_memory says so."""

    @property
    def name(self) -> str:
        return f"device {self.home}" if self.home.isdigit() else self.home

    def __str__(self) -> str:
        if self.home == DISK and not self.is_given:
            return "disk: no limit"
        if not self.is_given and not self.there:
            return f"{self.name}: of unknown size"
        why = "max_memory" if self.is_given else f"of {gigabytes(self.there)}, the rest for activations"
        return f"{self.name}: room for {gigabytes(self.num_bytes)} ({why})"


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Of one rank."""

    device: str
    """cpu or cuda: where it computes."""
    num_devices: int
    """Devices that each rank has."""
    rooms: tuple[Room, ...]
    """Where weights stay that are computed with at once: the first is the rank's main device."""
    spare: tuple[Room, ...] = field(default=())
    """Last resorts, the fastest first."""

    @property
    def homes(self) -> list[str]:
        return [room.home for room in (*self.rooms, *self.spare)]

    def __str__(self) -> str:
        return "; ".join(map(str, (*self.rooms, *self.spare)))


def inventory(
    *,
    device: str,
    gpu_bytes: Sequence[int],
    host_bytes: int,
    local: int,
    max_memory: MaxMemory | None = None,
    has_disk: bool = False,
) -> Inventory:
    """Of each of `local` ranks of a node with these GPUs. `gpu_bytes`: 0 for one of unknown size. Raises ConfigError
    for memory given for a device that a rank has not."""
    limit = max_memory or MaxMemory()
    host = _room(CPU, host_bytes // local, limit.cpu)
    disk = (Room(home=DISK, num_bytes=_NO_LIMIT if limit.disk is None else limit.disk, there=0,
                 is_given=limit.disk is not None),) if has_disk else ()  # fmt: skip
    if device == CPU:
        if limit.devices:
            raise ConfigError(
                f"max_memory[{limit.devices[0][0]}]: ranks compute on the CPU here, and have no devices with numbers; "
                "give 'cpu'."
            )
        return Inventory(device=CPU, num_devices=1, rooms=(host,), spare=disk)
    each = len(gpu_bytes) // local
    smallest = [min(gpu_bytes[rank * each + k] for rank in range(local)) for k in range(each)]
    given = dict(limit.devices)
    unknown = next((number for number in given if number >= each), None)
    if unknown is not None:
        raise ConfigError(
            f"max_memory[{unknown}]: each rank has {_counted(each)} here ({len(gpu_bytes)} on this machine for "
            f"{local} {'rank' if local == 1 else 'ranks'}), counted from 0 within the rank."
        )
    if given and 0 not in given:
        raise ConfigError(
            f"max_memory: names device {min(given)} and not 0, where each rank computes what belongs to no other; give "
            "it as well (0: 0 keeps no weights there)."
        )
    used = [k for k in range(each) if not given or k in given]
    rooms = tuple(_room(str(k), smallest[k], given.get(k)) for k in used)
    return Inventory(device="cuda", num_devices=each, rooms=rooms, spare=(host, *disk))


def _room(home: str, there: int, given: int | None) -> Room:
    free = int(there * (1 - ACTIVATIONS)) if there else _NO_LIMIT
    if given is None:
        return Room(home=home, num_bytes=free, there=there)
    return Room(home=home, num_bytes=min(given, there or given), there=there, is_given=True)


_NO_LIMIT = 1 << 62


def _counted(number: int) -> str:
    return "1 device" if number == 1 else f"{number} devices"


def gigabytes(num_bytes: int) -> str:
    """In three figures."""
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:.3g} MB"
    return f"{num_bytes / 1e9:.3g} GB"
