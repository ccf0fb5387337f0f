"""The rows of all steps of a request, for each of its branches, and which of them a call is given."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from parafuse.engine.rewrites.rows import by_dtype
from parafuse.engine.rewrites.step_layers import Learned, shapes_of
from parafuse.parallel.branches import place_of

MAX_TABLES = 4
"""Branches of a request that have rows at a time."""
MAX_LOOKS = 8
"""Times that an argument in a new tensor is looked at by the host, which waits for the device; on a CPU, always."""


@dataclass(eq=False)
class Table:
    """The rows of all steps for one branch of a request."""

    learned: Learned
    times_N: Tensor
    """What timesteps are foreseen, in the form that they are given."""
    rows: list[Tensor]
    """(N, values of all layers) for each dtype."""
    held: dict[int, tuple[Any, Tensor, Tensor]]
    """Leaf -> (place, tensor, copy) of what stays the same."""
    seen: list[Tensor]
    """Timesteps that were looked at."""
    looks: Counter[int] = field(default_factory=Counter[int])
    """Leaves that came in a new tensor with the same values, and how often."""

    def is_known(self, leaves: list[Any]) -> bool:
        """Whether what stays the same stands where it did. Does not wait for the device."""
        return all(
            place is not None and place_of(leaves[number]) == place for number, (place, _, _) in self.held.items()
        )

    def holds(self, leaves: list[Any], *, is_host_free: bool) -> bool | Tensor:
        """Whether what stays the same is the same as when the table was made; a tensor where that is not to be waited
        for. Waits for the device where a tensor is new, some times."""
        unseen: Tensor | None = None
        for number, (place, _, copy) in self.held.items():
            x = leaves[number]
            now = place_of(x)
            if now is not None and now == place:
                continue
            if self.looks[number] >= MAX_LOOKS and not (x.device.type == "cpu" and is_host_free):
                same = (x == copy).all()
                unseen = same if unseen is None else unseen & same
            elif torch.equal(x, copy):
                self.looks[number] += 1
                self.held[number] = (now, x, copy)
            else:
                return False
        return True if unseen is None else unseen


Match = tuple[Table, Tensor | None]
"""A table, and whether it is the one for a call; None: it is."""


class Tables:
    """Those of one request."""

    def __init__(self) -> None:
        self.all: list[Table] = []
        self.made = 0
        """In this request."""

    def __len__(self) -> int:
        return len(self.all)

    def clear(self) -> None:
        self.all.clear()

    def start(self) -> None:
        """A request begins."""
        self.clear()
        self.made = 0

    def add(self, learned: Learned, times_N: Tensor, leaves: list[Any], seen: list[Tensor]) -> Table:
        """One more, of a branch with these arguments; the oldest goes where there are many."""
        held = {i: leaves[i] for i in learned.uses if i not in learned.times}
        results = learned.of_all_steps(held, times_N, leaves)
        rows = [torch.cat([results[layer].flatten(1) for layer in group], 1) for group in by_dtype(learned.like)]
        kept = {i: (place_of(x), x, x.detach().clone()) for i, x in held.items()}
        self.all.append(Table(learned, times_N, rows, kept, seen))
        if len(self.all) > MAX_TABLES:
            self.all.pop(0)
        return self.all[-1]

    def of(self, leaves: list[Any], spec: TreeSpec, *, is_host_free: bool) -> list[Match]:
        """Which serve a call: one, or those of which the device has to choose."""
        fit = [one for one in self.all if shapes_of(leaves) in one.learned.proven and one.learned.fits(leaves, spec)]
        known = next((one for one in fit if one.is_known(leaves)), None)
        if known is not None:
            return [(known, None)]
        found: list[Match] = []
        for one in fit:
            holds = one.holds(leaves, is_host_free=is_host_free)
            if holds is True:
                return [(one, None)]
            if isinstance(holds, Tensor):
                found.append((one, holds))
        return [match for match in found if match[0].learned is found[0][0].learned]


def given_times(table: Table, leaves: list[Any]) -> Tensor:
    """The timesteps of a call."""
    return torch.cat([leaves[i].reshape(-1) for i in table.learned.times])


@dataclass(frozen=True)
class Found:
    """What a call finds in its tables. On the device: nothing is waited for."""

    values: list[Tensor]
    """For each dtype, of all layers; not numbers where nothing is found."""
    is_found: Tensor
    is_same: Tensor
    """Whether one of the tables is of this branch."""


def rows_of(matches: list[Match], leaves: list[Any]) -> Found:
    """The row of this step, of that table which is the call's."""
    given = given_times(matches[0][0], leaves)
    yes = torch.ones((), dtype=torch.bool, device=given.device)
    is_found, is_same = ~yes, ~yes
    values = [rows.new_full(rows.shape[1:], torch.nan) for rows in matches[0][0].rows]
    for table, holds in matches:
        found_N = (table.times_N[:, None] == given).all(1)
        own = yes if holds is None else holds
        here = found_N.any() & own
        place = found_N.to(torch.uint8).argmax().reshape(1)
        values = [
            torch.where(here, rows.index_select(0, place)[0], value)
            for rows, value in zip(table.rows, values, strict=True)
        ]
        is_found, is_same = is_found | here, is_same | own
    return Found(values, is_found, is_same)
