"""Which token rows belong together: intervals seen by the probe, refined until they agree, and named as atoms."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Node:
    """A dim that carries rows: of an argument ("argument"), or of an attention result ("attention")."""

    kind: str
    index: int
    dim: int


@dataclass(frozen=True)
class Place:
    """A dim in which rows appear: queries "q" or keys "k" of a site, or a "result"."""

    kind: str
    index: int
    dim: int


@dataclass(frozen=True)
class Interval:
    """Rows [offset, offset + length) of `node` appear at rows [start, start + length) of `place`."""

    place: Place
    start: int
    node: Node
    length: int
    offset: int = 0


Atoms = dict[Node | Place, list[int | None]]
"""Atom numbers along each node and place, in order."""


class Alignment:
    """Collects intervals; `solve` cuts all of them at common places and names the pieces that coincide."""

    def __init__(self, sizes: dict[Place, int]) -> None:
        """`sizes`: rows of every place, so that rows that nothing accounts for are seen too."""
        self.sizes = sizes
        self.intervals: list[Interval] = []
        self.unsteady: dict[Place, list[tuple[int, int]]] = {}
        """Runs of rows, empty ones too, that come or go with the values of an argument."""
        self.doubtful: list[Interval] = []
        """Places of a single row that a single row changes: it may be that row's token, or conditioning."""

    def add(self, interval: Interval) -> None:
        if interval not in self.intervals:
            self.intervals.append(interval)

    def settle_doubtful(self) -> None:
        """Takes those whose node carries one row of several elsewhere: it is a token there, so it is one here."""
        tokens = {i.node for i in self.intervals if self.sizes.get(i.place, 1) > 1}
        for interval in self.doubtful:
            if interval.node in tokens:
                self.add(interval)

    def cuts(self) -> dict[Node | Place, set[int]]:
        """Cut positions of every node and place, carried back and forth until nothing new appears."""
        cuts: dict[Node | Place, set[int]] = {place: {0, size} for place, size in self.sizes.items()}
        for i in self.intervals:
            cuts.setdefault(i.node, set()).update((0, i.offset, i.offset + i.length))
            cuts.setdefault(i.place, set()).update((i.start, i.start + i.length))
        changed = True
        while changed:
            changed = False
            for i in self.intervals:
                shift = i.start - i.offset
                inside = range(i.start, i.start + i.length + 1)
                down = {c + shift for c in cuts[i.node] if c + shift in inside} - cuts[i.place]
                up = {c - shift for c in cuts[i.place] if c in inside} - cuts[i.node]
                cuts[i.place] |= down
                cuts[i.node] |= up
                changed |= bool(down or up)
        return cuts

    def solve(self) -> Atoms:
        """Atom numbers along every node and place, in order; None for a run of rows that nothing accounts for."""
        cuts = self.cuts()
        parent: dict[tuple[Node | Place, int], tuple[Node | Place, int]] = {}

        def find(x: tuple[Node | Place, int]) -> tuple[Node | Place, int]:
            while parent.setdefault(x, x) != x:
                x = parent[x]
            return x

        for i in self.intervals:
            for c in cuts[i.node]:
                if i.offset <= c < i.offset + i.length:
                    parent[find((i.node, c))] = find((i.place, i.start + c - i.offset))
        known = set(parent)
        numbers: dict[tuple[Node | Place, int], int] = {}
        out: Atoms = {}
        for key, positions in cuts.items():
            ordered = sorted(positions)
            out[key] = [
                numbers.setdefault(find((key, c)), len(numbers)) if (key, c) in known else None for c in ordered[:-1]
            ]
        return self._without_unsteady(out, cuts)

    def _without_unsteady(self, atoms: Atoms, cuts: dict[Node | Place, set[int]]) -> Atoms:
        """Rows that come and go belong to no atom; where they may come between two atoms, a None stands."""
        gone: set[int | None] = set()
        for place, runs in self.unsteady.items():
            for atom, (start, stop) in zip(atoms[place], pairwise(sorted(cuts[place])), strict=True):
                if any(first < stop and last > start for first, last in runs):
                    gone.add(atom)
        out = {key: [None if atom in gone else atom for atom in pieces] for key, pieces in atoms.items()}
        for place, runs in self.unsteady.items():
            bounds = sorted(cuts[place])
            for bound in sorted({first for first, last in runs if first == last and first in bounds}, reverse=True):
                out[place].insert(bounds.index(bound), None)
        return out
