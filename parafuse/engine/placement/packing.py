"""Pieces of a model into rooms: as few bytes as possible left over, then the fullest room as empty as it can be, then
few cuts. Pure, in whole numbers and in one order, so that every rank finds the same. Torch-free.

Both first wishes are hard problems (many knapsacks; makespans on machines of several speeds). Small ones are searched
through; of larger ones what a search of so many steps has found is taken, which lies close to the bound by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from parafuse.engine.placement.runs import few_cuts

STEPS = 60_000
"""Of the search; the time it takes is under a second."""
SLACK = 1.05
"""How much fuller than it could be the fullest room may be, where that saves cuts."""
NEAR = 1.01
"""What is as near to the bound is not searched for any more."""
UNITS = 1 << 15
"""Into which a room is divided where it is filled."""
Assigned = list[int | None]
"""For each piece the number of its room, None for what is left over."""


def pack(sizes: Sequence[int], groups: Sequence[int], rooms: Sequence[int]) -> Assigned:
    """The room of each piece. `groups`: pieces of one component have one number, and stand in order of execution."""
    if not sizes:
        return []
    best, is_best = _balanced(sizes, rooms)
    left = sum(size for size, room in zip(sizes, best, strict=True) if room is None)
    fullest = _fullest(sizes, best, rooms)
    bound = fullest if is_best else _bound(sum(sizes) - left, rooms)
    limit = min(1.0, max(fullest, SLACK * bound))
    found = few_cuts(sizes, groups, [min(room, int(limit * room)) for room in rooms], left)
    return min((_in_order(sizes, best, groups), *([found] if found else [])), key=lambda one: cuts(one, groups))


def cuts(assigned: Assigned, groups: Sequence[int]) -> int:
    """How often a component goes on in another room."""
    pairs = zip(assigned, assigned[1:], groups, groups[1:], strict=False)
    return sum(one != other for one, other, group, next_group in pairs if group == next_group)


def _in_order(sizes: Sequence[int], assigned: Assigned, groups: Sequence[int]) -> Assigned:
    """The same where pieces of one component and size stand in order of their rooms."""
    found = list(assigned)
    for kind in dict.fromkeys(zip(groups, sizes, strict=True)):
        places = [i for i, one in enumerate(zip(groups, sizes, strict=True)) if one == kind]
        rooms = sorted((assigned[i] for i in places), key=lambda room: (room is None, room))
        for i, room in zip(places, rooms, strict=True):
            found[i] = room
    return found


def _balanced(sizes: Sequence[int], rooms: Sequence[int]) -> tuple[Assigned, bool]:
    """Without a look at cuts; and whether it is known to be the best."""
    if not any(rooms):
        return [None] * len(sizes), True
    found = [_emptiest_first(sizes, rooms), _filled(sizes, rooms, rooms), _filled(sizes, rooms, rooms[::-1])]
    found = [_improved(sizes, one, rooms) for one in found]
    best = min(found, key=lambda one: _worth(sizes, one, rooms))
    search = _Search.of(sizes, best, rooms)
    if not search.is_near():
        search.look(0, 0)
    return search.found(), search.is_near() or search.steps <= STEPS


def _worth(sizes: Sequence[int], assigned: Assigned, rooms: Sequence[int]) -> tuple[int, float]:
    left = sum(size for size, room in zip(sizes, assigned, strict=True) if room is None)
    return left, _fullest(sizes, assigned, rooms)


def _fullest(sizes: Sequence[int], assigned: Assigned, rooms: Sequence[int]) -> float:
    return max(
        (load / room for load, room in zip(_loads(sizes, assigned, rooms), rooms, strict=True) if room), default=0
    )


def _loads(sizes: Sequence[int], assigned: Assigned, rooms: Sequence[int]) -> list[int]:
    loads = [0] * len(rooms)
    for size, room in zip(sizes, assigned, strict=True):
        if room is not None:
            loads[room] += size
    return loads


def _bound(placed: int, rooms: Sequence[int]) -> float:
    """The fullest room cannot be emptier."""
    return placed / max(1, sum(rooms))


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))


def _emptiest_first(sizes: Sequence[int], rooms: Sequence[int]) -> Assigned:
    """Largest pieces first, each to the room that is emptiest with it."""
    loads, assigned = [0] * len(rooms), list[int | None]([None] * len(sizes))
    for i in _largest_first(sizes):
        fitting = [r for r, room in enumerate(rooms) if room and loads[r] + sizes[i] <= room]
        if fitting:
            room = min(fitting, key=lambda r: ((loads[r] + sizes[i]) / rooms[r], r))
            loads[room] += sizes[i]
            assigned[i] = room
    return assigned


def _filled(sizes: Sequence[int], rooms: Sequence[int], order: Sequence[int]) -> Assigned:
    """One room after the other as full as can be, the smallest first or last: sums that can be had, as bits."""
    assigned = list[int | None]([None] * len(sizes))
    ascending = order is rooms
    for room in sorted(range(len(rooms)), key=lambda r: (rooms[r] if ascending else -rooms[r], r)):
        left = [i for i in _largest_first(sizes) if assigned[i] is None]
        for i in _best_sum(sizes, left, rooms[room]):
            assigned[i] = room
    return assigned


def _best_sum(sizes: Sequence[int], left: list[int], room: int) -> list[int]:
    unit = -(-room // UNITS) or 1
    steps = [-(-sizes[i] // unit) for i in left]
    mask = (1 << (room // unit + 1)) - 1
    reached = [1]
    for step in steps:
        reached.append((reached[-1] | reached[-1] << step) & mask)
    total, chosen = reached[-1].bit_length() - 1, list[int]()
    for place in range(len(left) - 1, -1, -1):
        if not reached[place] >> total & 1:
            total -= steps[place]
            chosen.append(left[place])
    return chosen


def _improved(sizes: Sequence[int], assigned: Assigned, rooms: Sequence[int]) -> Assigned:
    """Moves and exchanges of pieces, as long as one makes it better."""
    assigned = list(assigned)
    loads = _loads(sizes, assigned, rooms)
    while _take_in(sizes, assigned, loads, rooms) or _relieve(sizes, assigned, loads, rooms):
        pass
    return assigned


def _take_in(sizes: Sequence[int], assigned: Assigned, loads: list[int], rooms: Sequence[int]) -> bool:
    """Brings a piece in that is left over, also in the place of a smaller one."""
    for i in _largest_first(sizes):
        if assigned[i] is not None:
            continue
        for room in range(len(rooms)):
            free = rooms[room] - loads[room]
            out = [j for j, there in enumerate(assigned) if there == room and sizes[i] - free <= sizes[j] < sizes[i]]
            if sizes[i] <= free or out:
                if sizes[i] > free:
                    smallest = min(out, key=lambda j: (sizes[j], j))
                    assigned[smallest], loads[room] = None, loads[room] - sizes[smallest]
                assigned[i], loads[room] = room, loads[room] + sizes[i]
                return True
    return False


def _relieve(sizes: Sequence[int], assigned: Assigned, loads: list[int], rooms: Sequence[int]) -> bool:
    """Takes something out of the fullest room, alone or for something smaller, so that both are emptier than it was."""
    used = [r for r in range(len(rooms)) if rooms[r]]
    full = max(used, key=lambda r: (loads[r] / rooms[r], -r), default=None)
    if full is None:
        return False
    best, move = loads[full] / rooms[full], None
    mine = {sizes[i]: i for i in range(len(sizes) - 1, -1, -1) if assigned[i] == full}
    for other in used:
        if other == full:
            continue
        theirs = {0: -1} | {sizes[j]: j for j in range(len(sizes) - 1, -1, -1) if assigned[j] == other}
        for size, i in mine.items():
            for smaller, j in theirs.items():
                if smaller >= size or loads[other] + size - smaller > rooms[other]:
                    continue
                both = max((loads[full] - size + smaller) / rooms[full], (loads[other] + size - smaller) / rooms[other])
                if both < best:
                    best, move = both, (i, j, other)
    if move is None:
        return False
    i, j, other = move
    change = sizes[i] - (sizes[j] if j >= 0 else 0)
    assigned[i], loads[full], loads[other] = other, loads[full] - change, loads[other] + change
    if j >= 0:
        assigned[j] = full
    return True


@dataclass
class _Search:
    """All ways, largest piece first; what cannot become better than what is known is left out."""

    sizes: list[int]
    """Largest first."""
    rooms: Sequence[int]
    order: list[int]
    """Place here -> piece."""
    best: Assigned
    """By place."""
    worth: tuple[int, float]
    left_at_least: int
    steps: int = 0
    loads: list[int] = field(default_factory=list[int])
    current: Assigned = field(default_factory=list[int | None])
    after: list[int] = field(default_factory=list[int])
    """Bytes of this place and all later ones."""

    @classmethod
    def of(cls, sizes: Sequence[int], known: Assigned, rooms: Sequence[int]) -> _Search:
        order = _largest_first(sizes)
        ordered = [sizes[i] for i in order]
        after = [0]
        for size in reversed(ordered):
            after.insert(0, after[0] + size)
        return cls(
            ordered,
            rooms,
            order,
            [known[i] for i in order],
            _worth(sizes, known, rooms),
            max(0, sum(sizes) - sum(rooms)),
            loads=[0] * len(rooms),
            current=[None] * len(sizes),
            after=after,
        )

    def is_near(self) -> bool:
        left, fullest = self.worth
        bound = max(_bound(self.after[0] - left, self.rooms), self._largest_alone() if not left else 0.0)
        return left == self.left_at_least and fullest <= NEAR * bound

    def _largest_alone(self) -> float:
        return self.sizes[0] / max(self.rooms)

    def found(self) -> Assigned:
        assigned = list[int | None]([None] * len(self.order))
        for place, piece in enumerate(self.order):
            assigned[piece] = self.best[place]
        return assigned

    def look(self, place: int, left: int) -> None:
        """`left`: bytes that are left over already."""
        self.steps += 1
        if self.steps > STEPS or self.is_near():
            return
        fullest = max(load / room for load, room in zip(self.loads, self.rooms, strict=True) if room)
        if place == len(self.sizes):
            if (left, fullest) < self.worth:
                self.worth, self.best = (left, fullest), list(self.current)
            return
        size = self.sizes[place]
        free = [room - load for room, load in zip(self.rooms, self.loads, strict=True)]
        least_left = left + max(0, self.after[place] - sum(space for space in free if space >= self.sizes[-1]))
        stays = sum(self.rooms) - sum(free) + self.after[place] - (least_left - left)
        if (least_left, max(fullest, _bound(stays, self.rooms))) >= self.worth:
            return
        is_repeated = place > 0 and self.sizes[place - 1] == size
        before = self.current[place - 1] if is_repeated else 0
        seen: set[tuple[int, int]] = set()
        able = [r for r in range(len(self.rooms)) if size <= free[r] and before is not None and r >= before]
        for room in sorted(able, key=lambda r: ((self.loads[r] + size) / self.rooms[r], r)):
            kind = (self.loads[room], self.rooms[room])
            if kind in seen and not is_repeated:
                continue
            seen.add(kind)
            self.loads[room] += size
            self.current[place] = room
            self.look(place + 1, left)
            self.loads[room] -= size
        self.current[place] = None
        self.look(place + 1, left + size)
