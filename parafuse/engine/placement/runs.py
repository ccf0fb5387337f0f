"""Few cuts: each component in as few runs of neighbours as the rooms allow. Pure, torch-free."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

STEPS = 2_000
"""Of the search for each number of cuts."""
ALL_STEPS = 12_000
"""Of all of them."""
FEW = 14
"""Pieces up to which every length of a run is tried; with more of them only the longest ones."""
TRIED = 3
"""How many lengths otherwise."""
MOST = 2
"""Cuts for each room that are looked for at most."""


def few_cuts(sizes: Sequence[int], groups: Sequence[int], limits: Sequence[int], left: int) -> list[int | None] | None:
    """A way to put pieces into rooms of these limits, with `left` bytes left over at most, that has few cuts. None
    where no way was found in so many steps.

    A search for no cuts, for one, and so on: the first way found is taken."""
    places = [*limits, left]
    by_group: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        by_group.setdefault(group, []).append(i)
    order = sorted(by_group.values(), key=lambda one: (-sum(sizes[i] for i in one), one[0]))
    runs = _Runs(sizes, order, places, is_small=len(sizes) <= FEW)
    for number in range(min(len(sizes) - len(order), MOST * len(places)) + 1):
        if runs.search(number):
            return [None if room == len(limits) else room for room in runs.assigned]
        if runs.all_steps > ALL_STEPS:
            break
    return None


@dataclass
class _Runs:
    sizes: Sequence[int]
    components: list[list[int]]
    """Pieces of each, the largest component first."""
    free: list[int]
    """Of each room; the last one is for what is left over."""
    is_small: bool
    assigned: list[int] = field(default_factory=list[int])
    steps: int = 0
    all_steps: int = 0
    _up_to: list[list[int]] = field(default_factory=list[list[int]])
    """Bytes of each component's first pieces: of none, of one, and so on."""
    _after: list[int] = field(default_factory=list[int])
    """Bytes of all components after each."""
    _smallest: int = 0
    _failed: set[tuple[int, ...]] = field(default_factory=set[tuple[int, ...]])

    def __post_init__(self) -> None:
        self.assigned = [0] * len(self.sizes)
        self._smallest = min(self.sizes)
        self._up_to = [list(accumulate((self.sizes[i] for i in one), initial=0)) for one in self.components]
        self._after = [sum(one[-1] for one in self._up_to[number + 1 :]) for number in range(len(self.components))]

    def search(self, num_cuts: int) -> bool:
        self.steps = 0
        self._failed.clear()
        is_found = self.look(0, 0, None, num_cuts)
        self.all_steps += self.steps
        return is_found

    def look(self, number: int, start: int, before: int | None, num_cuts: int) -> bool:
        """Places what is left from piece `start` of component `number` on, with so many cuts at most. `before`: the
        room of the piece before."""
        if number == len(self.components):
            return True
        total = self._up_to[number][-1] - self._up_to[number][start]
        state = self._state(number, start, before, num_cuts)
        if self.steps >= STEPS or state in self._failed or self._is_hopeless(number, total, num_cuts):
            return False
        self.steps += 1
        self._failed.add(state)
        seen: set[int] = set()
        for room in self._order(total):
            is_last = room == len(self.free) - 1
            if room == before or (not is_last and self.free[room] in seen):
                continue
            seen.update(() if is_last else (self.free[room],))
            for length in self._lengths(number, start, self.free[room]):
                if self._try(number, start, room, length, num_cuts):
                    return True
        return False

    def _try(self, number: int, start: int, room: int, length: int, num_cuts: int) -> bool:
        pieces = self.components[number]
        goes_on = start + length < len(pieces)
        if goes_on and not num_cuts:
            return False
        total = self._up_to[number][start + length] - self._up_to[number][start]
        self.free[room] -= total
        for i in pieces[start : start + length]:
            self.assigned[i] = room
        step = (number, start + length, room, num_cuts - 1) if goes_on else (number + 1, 0, None, num_cuts)
        if self.look(*step):
            return True
        self.free[room] += total
        return False

    def _state(self, number: int, start: int, before: int | None, num_cuts: int) -> tuple[int, ...]:
        """What decides whether it can go on from here; rooms with the same space are one like the other."""
        there = -1 if before is None else self.free[before] if before < len(self.free) - 1 else -2
        return number, start, there, num_cuts, self.free[-1], *sorted(self.free[:-1])

    def _is_hopeless(self, number: int, total: int, num_cuts: int) -> bool:
        """Whether all that is left needs more space, or more cuts, than there is."""
        largest = max(self.free)
        if sum(space for space in self.free if space >= self._smallest) < total + self._after[number] or not largest:
            return True
        needed = -(-total // largest) - 1
        for later in range(number + 1, len(self.components)):
            if needed > num_cuts or self._up_to[later][-1] <= largest:  # the largest come first
                break
            needed += -(-self._up_to[later][-1] // largest) - 1
        return needed > num_cuts

    def _order(self, total: int) -> list[int]:
        """Rooms that take all of it first, the tightest of them first; then those with the most space."""
        return sorted(range(len(self.free)), key=lambda r: (self.free[r] < total, abs(self.free[r] - total), r))

    def _lengths(self, number: int, start: int, space: int) -> list[int]:
        up_to = self._up_to[number]
        longest = bisect_right(up_to, up_to[start] + space) - 1 - start
        fewest = 1 if self.is_small else max(1, longest - TRIED + 1)
        return list(range(longest, fewest - 1, -1))
