"""The best packing of a small instance, by trying all ways: what the packing of placements is held against."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instance:
    """Pieces, their components, and rooms."""

    sizes: tuple[int, ...]
    groups: tuple[int, ...]
    rooms: tuple[int, ...]


def best(one: Instance) -> tuple[int, float, int]:
    """(bytes left over, share of the fullest room, cuts), each the least that the ones before it allow."""
    found: list[tuple[int, float, int]] = []

    def place(i: int, loads: tuple[int, ...], left: int, before: tuple[int | None, ...]) -> None:
        if found and left > found[0][0]:
            return
        if i == len(one.sizes):
            worth = (left, *worth_of(one, before)[1:])
            found[:] = [min([worth, *found])]
            return
        for room, load in enumerate(loads):
            if load + one.sizes[i] <= one.rooms[room]:
                more = (*loads[:room], load + one.sizes[i], *loads[room + 1 :])
                place(i + 1, more, left, (*before, room))
        place(i + 1, loads, left + one.sizes[i], (*before, None))

    place(0, (0,) * len(one.rooms), 0, ())
    return found[0]


def worth_of(one: Instance, assigned: Sequence[int | None]) -> tuple[int, float, int]:
    """(bytes left over, share of the fullest room, cuts) of a packing. Raises AssertionError for one that is none."""
    assert len(assigned) == len(one.sizes)
    loads = [
        sum(size for size, at in zip(one.sizes, assigned, strict=True) if at == room) for room in range(len(one.rooms))
    ]
    assert all(load <= room for load, room in zip(loads, one.rooms, strict=True))
    fullest = max((round(load / room, 12) for load, room in zip(loads, one.rooms, strict=True) if room), default=0.0)
    cuts = sum(assigned[i] != assigned[i + 1] and one.groups[i] == one.groups[i + 1] for i in range(len(one.sizes) - 1))
    left = sum(size for size, at in zip(one.sizes, assigned, strict=True) if at is None)
    return left, fullest, cuts


def instance(seed: int, *, most_pieces: int = 8, most_rooms: int = 3) -> Instance:
    """A random one: components of one piece and of several, equal and unequal; rooms from too small to ample."""
    rnd = random.Random(seed)
    sizes: list[int] = []
    groups: list[int] = []
    number = rnd.randint(1, most_pieces)
    while len(sizes) < number:
        usual, component = rnd.randint(1, 50), len(set(groups))
        for _ in range(rnd.choice((1, 1, 2, 3, 5))):
            sizes.append(usual if rnd.random() < 0.7 else rnd.randint(1, 50))
            groups.append(component)
    sizes, groups = sizes[:number], groups[:number]
    shares = [rnd.random() + 0.1 for _ in range(rnd.randint(1, most_rooms))]
    ample = rnd.choice((0.5, 0.9, 1.0, 1.0, 1.05, 1.2, 2.0, 4.0))
    rooms = [int(ample * sum(sizes) * share / sum(shares)) for share in shares]
    return Instance(tuple(sizes), tuple(groups), tuple(rooms))


def tight(seed: int) -> Instance:
    """An adversarial one: rooms that are filled to the last byte, if the one way to do so is found."""
    rnd = random.Random(seed)
    rooms: list[int] = []
    pieces: list[tuple[int, int]] = []
    for room in range(rnd.randint(2, 3)):
        inside = [rnd.randint(5, 40) for _ in range(rnd.randint(2, 3))]
        rooms.append(sum(inside))
        pieces += [(size, room) for size in inside]
    rnd.shuffle(pieces)
    width = rnd.choice((1, 2, 3))
    groups = [i // width for i in range(len(pieces))]
    return Instance(tuple(size for size, _ in pieces), tuple(groups), tuple(rooms))
