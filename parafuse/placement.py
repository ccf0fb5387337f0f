"""Where the parts of a model are to be, as people ask for it, in diffusers' and accelerate's forms. Frozen, torch-free.

A device is a number, counted within the rank: where each has two, 0 and 1 are the rank's own. `cpu` and `disk` keep
weights that are brought to device 0 when they are used.
"""

# Users pass what they like, so types are checked at run time too.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from parafuse.errors import ConfigError, nearest
from parafuse.offload import Offload

RANK, BALANCED, AUTO, MAP = "rank", "balanced", "auto", "map"
WORDS = (RANK, BALANCED, AUTO)
CPU, DISK, CUDA = "cpu", "disk", "cuda"
_NUMBERED = re.compile(rf"(?:{CUDA}:)?(\d+)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_FORM = (
    "must be 'balanced', 'auto', 'rank', a map such as {'transformer': 0, 'vae': 'cpu'} (as JSON, or the name of a "
    ".json file that holds it), or None"
)
_MEMORY_FORM = "must be {0: '40GiB', 'cpu': '60GiB'}, or as text 0=40GiB,cpu=60GiB"


@dataclass(frozen=True)
class Placement:
    """How parts are placed: `rank` (all of them on the rank's device), `balanced`, `auto`, or `map`."""

    how: str
    homes: tuple[tuple[str, str], ...] = ()
    """Of a map: path of a component or of a module of it, and "0", "1", ..., "cpu" or "disk". The longest path that a
    module's begins with decides; the empty one stands for all of them."""
    device: str = ""
    """cpu or cuda: of a plan, whose devices are there. Empty: as it is asked for."""

    @property
    def is_together(self) -> bool:
        return self.how == RANK

    def __str__(self) -> str:
        """The text that makes it again."""
        return json.dumps(dict(self.homes)) if self.how == MAP else self.how


@dataclass(frozen=True)
class MaxMemory:
    """Bytes of weights that may be kept in each place."""

    devices: tuple[tuple[int, int], ...] = ()
    """(number, bytes). Devices that are not among them are not used; none at all: every one is, as it is."""
    cpu: int | None = None
    """None: what the machine has."""
    disk: int | None = None

    def __str__(self) -> str:
        """The text that makes it again."""
        places = [(str(number), size) for number, size in self.devices]
        places += [(name, size) for name, size in ((CPU, self.cpu), (DISK, self.disk)) if size is not None]
        return ",".join(f"{name}={size}" for name, size in places)


def placement_of(value: Any) -> Placement | None:
    """What a text or a map names, or the value itself; None where parts stay together. Raises ConfigError."""
    if value is None or isinstance(value, Placement):
        return None if value is None or value.is_together else value
    if isinstance(value, str) and value.endswith(".json"):
        value = _read(value)
    elif isinstance(value, str) and value.lstrip().startswith("{"):
        value = _parsed(value, f"placement={value!r}")
    if isinstance(value, str):
        if value not in WORDS:
            raise ConfigError(f"placement={value!r}: {_FORM}{nearest(value, WORDS) or '.'}")
        return None if value == RANK else Placement(value)
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"placement={value!r}: {_FORM}.")
    given = cast("Mapping[Any, Any]", value)
    homes: list[tuple[str, str]] = []
    for path, home in given.items():
        if not isinstance(path, str):
            raise ConfigError(f"placement: key {path!r}: must be the path of a component or module, or '' for all.")
        homes.append((path, home_of(home, f"placement[{path!r}]")))
    return Placement(MAP, tuple(homes))


def home_of(value: Any, where: str) -> str:
    """ "0" for 0, "cuda", "cuda:0" and torch.device("cuda"), and "cpu" and "disk". Raises ConfigError for others."""
    is_device = type(value).__module__ == "torch" and type(value).__name__ == "device"
    text = str(value) if is_device or (isinstance(value, int) and not isinstance(value, bool)) else value
    if isinstance(text, str):
        if text in (CPU, DISK):
            return text
        if text == CUDA:
            return "0"
        if found := _NUMBERED.fullmatch(text):
            return str(int(found.group(1)))
    near = nearest(text, (CPU, DISK, CUDA)) if isinstance(text, str) else ""
    raise ConfigError(
        f"{where}={value!r}: is no device; must be a number (counted within the rank), 'cuda:NUMBER', 'cpu' or "
        f"'disk'{near or '.'}"
    )


def max_memory_of(value: Any) -> MaxMemory | None:
    """What a text or a map says, or the value itself; None: what the machine has. Raises ConfigError."""
    if value is None or isinstance(value, MaxMemory):
        return value
    if isinstance(value, str):
        value = _pairs(value)
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"max_memory={value!r}: {_MEMORY_FORM}.")
    places: dict[str, int] = {}
    for key, size in cast("Mapping[Any, Any]", value).items():
        place = home_of(key, "max_memory: key")
        if place in places:
            raise ConfigError(f"max_memory: {place} is given twice.")
        places[place] = size_of(size, f"max_memory[{key!r}]")
    devices = sorted((int(place), size) for place, size in places.items() if place.isdigit())
    return MaxMemory(tuple(devices), places.get(CPU), places.get(DISK))


def size_of(value: Any, where: str) -> int:
    """Bytes of a whole number, or of a text such as 40GiB, 40GB, 512MB. Raises ConfigError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ConfigError(f"{where}={value!r}: must be a number of bytes, or a size such as '40GiB' or '40GB'.")
    number, unit = found.groups()
    if unit.endswith("b"):
        raise ConfigError(
            f"{where}={value!r}: {unit!r} may be bits (accelerate takes it so) or bytes; write {unit[:-1].upper()}B."
        )
    base = 1024 if "I" in unit.upper() else 1000
    return int(float(number) * base ** _UNITS[unit.upper().rstrip("B").rstrip("I")] if unit else float(number))


def _pairs(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in text.split(","):
        place, is_named, size = item.partition("=")
        if not is_named:
            raise ConfigError(f"max_memory={text!r}: {item!r} names no device; {_MEMORY_FORM}.")
        if place.strip() in found:
            raise ConfigError(f"max_memory={text!r}: {place.strip()} is given twice.")
        found[place.strip()] = size
    return found


def _read(name: str) -> Any:
    try:
        return _parsed(Path(name).read_text(encoding="utf-8"), f"placement={name!r}")
    except OSError as error:
        raise ConfigError(f"placement={name!r}: cannot be read ({error.strerror}).") from error


def _parsed(text: str, where: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_unique(where))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must hold one JSON object.")
    return cast("Any", value)


def _unique(where: str) -> Any:
    """Of an object's pairs; JSON would take the last of two that have one name."""

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"{where}: {twice!r} is given twice.")
        return dict(pairs)

    return checked


@dataclass(frozen=True)
class PlacedWeights(Offload):
    """What a resolved map makes of weights, put on like an offload: those on the host or a disk come and go."""

    method: ClassVar[str] = "placement"

    homes: tuple[tuple[str, str], ...] = dataclasses.field(default=(), kw_only=True)
    """As in a `Placement`, resolved: the longest path decides."""

    @property
    def brief(self) -> str:
        return self.method

    @property
    def ahead(self) -> int:
        return 1

    @property
    def said(self) -> str:
        return "the placement"

    @property
    def is_together(self) -> bool:
        """Whether all weights are on the main device."""
        return {home for _, home in self.homes} <= {CPU if self.device == CPU else "0"}


def placed_weights(placement: Placement | None, folder: str | None, device: str) -> PlacedWeights | None:
    """For a map on a device of this type. Raises ConfigError for a placement that is not resolved."""
    if placement is None:
        return None
    if placement.how != MAP or not placement.device:
        raise ConfigError(
            f"placement={str(placement)!r}: is held against the machine before weights are moved; use parafuse.Engine "
            "(Engine.from_pipeline takes a pipeline that is loaded)."
        )
    has_disk = any(home == DISK for _, home in placement.homes)
    if has_disk and folder is None:
        raise ConfigError("placement: 'disk' needs a folder; give offload_folder.")
    return PlacedWeights(
        to=DISK if has_disk else CPU, folder=folder if has_disk else None, device=device, homes=placement.homes
    )
