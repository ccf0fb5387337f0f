"""Pieces of a model over what a rank has: a placement, or why there is none, with the numbers. Pure, torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from parafuse.engine.placement.inventory import Inventory, Room, gigabytes
from parafuse.engine.placement.packing import pack
from parafuse.errors import ConfigError
from parafuse.placement import DISK

STAGED = 2
"""Blocks from the host or a disk that are on the main device at once: one runs, the next one arrives."""


class Sized(Protocol):
    """A piece."""

    @property
    def path(self) -> str: ...
    @property
    def component(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...


def balanced(pieces: Sequence[Sized], there: Inventory, asked: str) -> dict[str, str]:
    """A home for each piece, by path. Raises ConfigError with the numbers where they do not fit. `asked`: what the
    message names.

    Where not all of them fit, the main device keeps space for those that come from the host or a disk."""
    homes = _packed(pieces, there.rooms)
    first, *others = there.rooms
    kept_free = 0
    while len(homes) < len(pieces) and kept_free < first.num_bytes:
        needs = _passing(pieces, {piece.path for piece in pieces if piece.path not in homes})
        stays = sum(piece.num_bytes for piece in pieces if homes.get(piece.path) == first.home)
        if stays + needs <= first.num_bytes:
            break
        kept_free = min(first.num_bytes, needs)  # more than before, when that was not enough
        homes = _packed(pieces, [replace(first, num_bytes=first.num_bytes - kept_free), *others])
    for room in there.spare:
        homes |= _packed([piece for piece in pieces if piece.path not in homes], [room])
    left = [piece for piece in pieces if piece.path not in homes]
    if left:
        raise ConfigError(_too_large(asked, pieces, left, there))
    _check_space(pieces, homes, there, f"placement={asked!r}")
    return {piece.path: homes[piece.path] for piece in pieces}


def check_fits(pieces: Sequence[Sized], homes: Mapping[str, str], there: Inventory) -> None:
    """Raises ConfigError for a map that puts more into a place than it has. `pieces`: what it names, and the rest of
    each component."""
    where = {piece.path: _home(piece.path, homes) for piece in pieces}
    for room in (*there.rooms, *there.spare):
        needs = sum(piece.num_bytes for piece in pieces if where[piece.path] == room.home)
        has = _all_of(room)
        if needs > has:
            raise ConfigError(
                f"placement: the map puts {gigabytes(needs)} on {room.name}, which has {gigabytes(has)}"
                f"{' (max_memory)' if room.is_given else ''}; put less there, or use placement='balanced'."
            )
    _check_space(pieces, where, there, "placement")


def _passing(pieces: Sequence[Sized], away: set[str]) -> int:
    """Space on the main device for what comes and goes: one component at a time, of which blocks pass, and the rest
    stays as long as it runs."""
    found = 0
    for component in dict.fromkeys(piece.component for piece in pieces if piece.path in away):
        mine = [piece for piece in pieces if piece.component == component and piece.path in away]
        rest = sum(piece.num_bytes for piece in mine if piece.path == component)
        blocks = sorted((piece.num_bytes for piece in mine if piece.path != component), reverse=True)
        found = max(found, rest + sum(blocks[:STAGED]))
    return found


def _home(path: str, homes: Mapping[str, str]) -> str:
    while path not in homes:
        path = path.rpartition(".")[0]
    return homes[path]


def _all_of(room: Room) -> int:
    return room.num_bytes if room.is_given or not room.there else room.there


def _packed(pieces: Sequence[Sized], rooms: Sequence[Room]) -> dict[str, str]:
    """Those that find a room."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(piece.component for piece in pieces))}
    groups = [numbers[piece.component] for piece in pieces]
    assigned = pack([piece.num_bytes for piece in pieces], groups, [room.num_bytes for room in rooms])
    return {piece.path: rooms[room].home for piece, room in zip(pieces, assigned, strict=True) if room is not None}


def _check_space(pieces: Sequence[Sized], homes: Mapping[str, str], there: Inventory, where: str) -> None:
    """Raises ConfigError where what comes from the host or a disk has no space on the main device to run there."""
    main, spare = there.rooms[0], {room.home for room in there.spare}
    away = {piece.path for piece in pieces if homes[piece.path] in spare}
    stays = sum(piece.num_bytes for piece in pieces if homes[piece.path] == main.home)
    needs = _passing(pieces, away)
    if away and stays + needs > _all_of(main):
        raise ConfigError(
            f"{where}: what is kept on {' and '.join(sorted({homes[path] for path in away}))} comes to {main.name} to "
            f"run, and needs {gigabytes(needs)} there beside the {gigabytes(stays)} that stay; it has "
            f"{gigabytes(_all_of(main))}. Give it more room, or put less on it."
        )


def _too_large(asked: str, pieces: Sequence[Sized], left: Sequence[Sized], there: Inventory) -> str:
    total, over = sum(piece.num_bytes for piece in pieces), sum(piece.num_bytes for piece in left)
    disk = "" if any(room.home == DISK for room in there.spare) else "give offload_folder to keep the rest on a disk, "
    passing = gigabytes(_passing(pieces, {piece.path for piece in pieces}))
    return (
        f"placement={asked!r}: the weights need {gigabytes(total)} of each rank, and {gigabytes(over)} of them, from "
        f"{left[0].path} on, find no room. There is {there}; up to {passing} of {there.rooms[0].name} are for pieces "
        f"that come and go. Use more devices, {disk}quantize, or raise max_memory."
    )
