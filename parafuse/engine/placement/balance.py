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
"""Pieces from the host or a disk that are on the main device at once: one runs, the next one arrives."""


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
    largest = max((piece.num_bytes for piece in pieces), default=0)
    homes = _packed(pieces, there.rooms)
    if len(homes) < len(pieces):
        first, *others = there.rooms
        smaller = replace(first, num_bytes=max(0, first.num_bytes - STAGED * largest))
        homes = _packed(pieces, [smaller, *others])
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
    away = [piece for piece in pieces if homes[piece.path] in spare]
    largest = max(away, key=lambda piece: piece.num_bytes, default=None)
    stays = sum(piece.num_bytes for piece in pieces if homes[piece.path] == main.home)
    if largest is not None and stays + largest.num_bytes > _all_of(main):
        raise ConfigError(
            f"{where}: {largest.path} ({gigabytes(largest.num_bytes)}) is kept on {homes[largest.path]} and runs on "
            f"{main.name}, where {gigabytes(stays)} stay and {gigabytes(_all_of(main))} are to be had; give that more "
            "room, or put less on it."
        )


def _too_large(asked: str, pieces: Sequence[Sized], left: Sequence[Sized], there: Inventory) -> str:
    total, over = sum(piece.num_bytes for piece in pieces), sum(piece.num_bytes for piece in left)
    disk = "" if any(room.home == DISK for room in there.spare) else "give offload_folder to keep the rest on a disk, "
    staged = gigabytes(STAGED * max(piece.num_bytes for piece in pieces))
    return (
        f"placement={asked!r}: the weights need {gigabytes(total)} of each rank, and {gigabytes(over)} of them, from "
        f"{left[0].path} on, find no room. There is {there}; {staged} of {there.rooms[0].name} are for pieces that "
        f"come and go. Use more devices, {disk}quantize, or raise max_memory."
    )
