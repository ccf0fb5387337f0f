"""What of a denoiser's call the layers inside must know: which branch it is, and which rows of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from torch import nn

from parafuse.parallel.led import Led


@dataclass
class CallContext:
    """One for each module, shared by all that stands on it: the outermost sets it, the inner ones read it."""

    branch: int = 0
    """Which branch of guidance, over the steps of a request."""
    place: int = 0
    """Of the branch among the calls of a step."""
    number: int = 0
    """Which call of the request, counted on every rank, also where another rank makes it."""
    rows: tuple[int, ...] | None = None
    """The rows of the whole batch that are at hand here; None: all."""
    is_trial: bool = False
    """The call is made to learn something, not for its result."""
    owners: dict[int, int] | None = field(default=None)
    """Branch -> the rank of the `cfg` axis that makes its calls, where it must be the same in all steps."""
    leads: bool = True
    """It is the first call of its step."""
    follows: bool = False
    """It is on the same latents as the call before, and of another branch than the first one on these."""
    led: Led | None = None
    """What the first call of the step decided, where the others follow it."""
    leading: tuple[int, ...] | None = None
    """The samples, as places in the whole batch, of the branch from which others may be made in some steps; None: no
    branch is ever made from another."""
    is_whole: bool = True
    """All branches are computed in this step."""
    groups: tuple[str, ...] = ()
    """Groups whose ranks make parts of this very call."""
    batch: int | None = None
    """Rows of the whole batch, where only some are at hand."""
    present: Callable[[Iterable[nn.Module]], AbstractContextManager[None]] = lambda modules: nullcontext()
    """Inside of it the weights of some parts are there: where they are offloaded, they are away between calls."""

    @property
    def leads_only(self) -> bool:
        """Whether the branches of this step but one are made from that one."""
        return self.leading is not None and not self.is_whole

    def owner(self, busy: list[int], degree: int) -> int:
        """The rank that makes a call: by its place in the step, where `busy` ranks make those before it. Where branches
        have owners, the branch's own; for a new one the least busy rank, then the one that has the fewest."""
        if self.owners is None:
            return len(busy) % degree
        if self.branch not in self.owners:
            owned = list(self.owners.values())
            self.owners[self.branch] = min(range(degree), key=lambda rank: (busy.count(rank), owned.count(rank), rank))
        return self.owners[self.branch]

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Around calls that are made to learn something."""
        before, self.is_trial = self.is_trial, True
        try:
            yield
        finally:
            self.is_trial = before

    @contextmanager
    def part(self, group: str, batch: int, first: int, last: int, stacks: int = 1) -> Iterator[None]:
        """Around a call with samples [first, last) of a batch, of each stack; ranks of a `group` make the rest."""
        before, each = (self.rows, self.groups, self.batch), batch // stacks
        whole = self.rows if self.rows is not None else tuple(range(batch))
        self.rows = tuple(whole[stack * each + i] for stack in range(stacks) for i in range(first, last))
        self.groups, self.batch = (*self.groups, group) if group else self.groups, self.batch or batch
        try:
            yield
        finally:
            self.rows, self.groups, self.batch = before
