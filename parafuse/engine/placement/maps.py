"""A map that the user gives, held against the model and the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from parafuse.engine.placement.homes import Homes, home_in, with_above
from parafuse.engine.placement.inventory import Inventory
from parafuse.engine.placement.pieces import Owner, Piece
from parafuse.engine.placement.unbuilt import Unbuilt
from parafuse.errors import ConfigError, nearest
from parafuse.placement import CPU, DISK, Placement


def taken(placement: Placement, found: Unbuilt, owners: Sequence[Owner], there: Inventory) -> Homes:
    """Path of each component, and of each module that is elsewhere -> its home. Raises ConfigError for modules or
    devices that are not there, for what is left out, and for what runs as one and is in several places."""
    given = dict(placement.homes)
    names = _names(found, owners)
    for path, home in given.items():
        _check_path(path, names, owners)
        _check_home(path, home, there)
    homes: Homes = {}
    for component in dict.fromkeys(one.component for one in owners):
        mine = [one for one in owners if one.component == component]
        homes |= _of_component(component, mine, given, names)
    return homes


def units(owners: Sequence[Owner], homes: Mapping[str, str]) -> list[Piece]:
    """What a map makes of a model: blocks, the modules that it names, and the rest of each component."""
    sizes: dict[str, tuple[str, int]] = {}
    for one in owners:
        path = one.block or next(above for above in with_above(one.path) if above in homes)
        sizes[path] = (one.component, sizes.get(path, ("", 0))[1] + one.num_bytes)
    return [Piece(path=path, component=component, num_bytes=size) for path, (component, size) in sizes.items()]


def _of_component(
    component: str, owners: Sequence[Owner], given: Mapping[str, str], names: Mapping[str, bool]
) -> Homes:
    blocks: Homes = {}
    others: Homes = {}
    for one in owners:
        found = {weight: _home_of_weight(weight, component, given) for weight in one.weights}
        place = one.block or one.path
        known = blocks if one.block else others
        other = next(((weight, home) for weight, home in found.items() if home != known.setdefault(place, home)), None)
        if other is not None:
            raise ConfigError(
                f"placement: {place} runs as one, but {other[0]} is on {_shown(other[1])} and what comes before it on "
                f"{_shown(known[place])}; give {place!r} one place."
            )
    numbered = (home for home in (*others.values(), *blocks.values()) if home.isdigit())
    main = others.get(component) or home_in(given, component) or next(numbered, next(iter((others | blocks).values())))
    homes = {component: main}
    for path, home in given.items():
        holds = any(f"{other}.".startswith(f"{path}.") for other in others)
        if path.startswith(f"{component}.") and names[path] and holds:
            homes[path] = home
    for path, home in (others | blocks).items():
        if home_in(homes, path) != home:
            homes[path] = home
    return homes


def _home_of_weight(path: str, component: str, given: Mapping[str, str]) -> str:
    home = home_in(given, path)
    if home is None:
        out = next(
            above for above in reversed(with_above(path)) if not any(f"{p}.".startswith(f"{above}.") for p in given)
        )
        raise ConfigError(f"placement: leaves out {out}; give {component!r} a place, or '' for all that is not named.")
    return home


def _names(found: Unbuilt, owners: Sequence[Owner]) -> dict[str, bool]:
    """Path of every module and weight -> whether it is a module."""
    names = {weight: False for one in owners for weight in one.weights}
    for component, model in found.modules.items():
        names |= {path: True for path, _ in model.named_modules(prefix=component)}
    return names | dict.fromkeys(found.others, True)


def _check_path(path: str, names: Mapping[str, bool], owners: Sequence[Owner]) -> None:
    if not path or path in names:
        return
    component = path.partition(".")[0]
    known = list(dict.fromkeys(one.component for one in owners))
    if component not in known:
        hint = nearest(component, known) or f"; there are {', '.join(known)}."
        raise ConfigError(f"placement: {path!r}: the model has no component {component!r} with weights{hint}")
    inside = [name for name in names if name.startswith(f"{component}.")]
    if not inside:
        raise ConfigError(
            f"placement: {path!r}: the modules of {component} are known only after loading; give {component!r} itself."
        )
    deepest = next(above for above in with_above(path) if above in names)
    hint = nearest(path, inside) or f"; {deepest} is the last of it that is there."
    raise ConfigError(f"placement: {path!r}: {component} has no such module{hint}")


def _check_home(path: str, home: str, there: Inventory) -> None:
    if home in there.homes:
        return
    where = f"placement[{path!r}]={home!r}"
    if home == DISK:
        raise ConfigError(f"{where}: needs a folder; give offload_folder (--offload-folder DIR).")
    numbers = [room.home for room in there.rooms if room.home != CPU]
    if not numbers:
        raise ConfigError(f"{where}: ranks compute on the CPU here, and have no devices with numbers; give 'cpu'.")
    listed = f"devices {', '.join(numbers)}" if len(numbers) > 1 else f"device {numbers[0]} alone"
    raise ConfigError(f"{where}: each rank has {listed}, counted within the rank.")


def _shown(home: str) -> str:
    return f"device {home}" if home.isdigit() else home
