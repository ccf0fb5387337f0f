"""Guidance parallel: the branches of classifier-free guidance side by side, whatever way a pipeline computes them.

A pipeline that stacks branches in the batch has its batch cut at the denoiser's boundary. One that calls the denoiser
for each branch gets placeholders: of the calls since a value was last needed, the n-th is computed by rank
n mod degree alone (where something is kept from step to step, by the rank that has its branch), and when a value is
needed, one exchange brings all of them. A call that does more than give a result (fills a cache, say) is made on all
ranks. Nothing here knows a pipeline.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.config import Axis
from parafuse.errors import UnsupportedError
from parafuse.parallel.batch_cut import TRIES, BatchCut, rows
from parafuse.parallel.bundle import all_say, exchange, without_values
from parafuse.parallel.call_context import CallContext
from parafuse.parallel.effects import Watched, all_plain
from parafuse.parallel.hooks import Forward, override_forward
from parafuse.parallel.lent import Left, Lent, take
from parafuse.parallel.mesh import Mesh
from parafuse.parallel.on_module import OnModule
from parafuse.parallel.placeholder import Placeholder, settled

MAX_KNOWN = 256
"""Structures of calls whose results are kept in mind."""


@dataclass
class Branch:
    """One call of the denoiser that is open: what its results look like, and these on the rank that computed them."""

    shapes: list[Tensor]
    owner: int
    """The rank that computes it."""
    batch: int = 1
    is_whole: bool = True
    """Other branches of its step are called too, if there are any."""
    values: list[Tensor] = field(default_factory=list[Tensor])
    error: Exception | None = None


@dataclass
class Round:
    """The calls since a value was last needed, in order."""

    branches: list[Branch] = field(default_factory=list[Branch])
    is_settled: bool = False


@dataclass
class Rounds:
    """The round at hand, shared by the denoisers of a pipeline."""

    current: Round = field(default_factory=Round)
    by_all: int = 0
    """Calls that all ranks have made since a round was settled."""

    def forget(self) -> None:
        """Leaves an open round, as at the start of a request: the last one may have failed in it."""
        self.current, self.by_all = Round(), 0


@dataclass(frozen=True)
class Known:
    """The results of calls of one structure and size: leaves without values, where they are tensors."""

    spec: TreeSpec
    leaves: tuple[Any, ...]
    left: Left
    """What such a call leaves of the lists that it is given."""

    def looks_like(self, other: Known) -> bool:
        pairs = list(zip(self.leaves, other.leaves, strict=False))
        return (self.spec, len(self.leaves), self.left) == (other.spec, len(other.leaves), other.left) and all(
            (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) if isinstance(a, Tensor) else a == b
            for a, b in pairs
        )


class GuidanceParallel(OnModule):
    """The guidance branches of one denoiser on the ranks of the `cfg` axis. `install` on every rank of its group; calls
    are collective on it."""

    WORDS = {  # noqa: RUF012
        "cut": "batch cut in {} calls",
        "together": "branches side by side in {} steps",
        "alone": "one branch at a time in {} steps",
        "everywhere": "{} calls on all ranks",
    }

    def __init__(
        self, root: nn.Module, mesh: Mesh, rounds: Rounds | None = None, *, context: CallContext | None = None
    ):
        super().__init__(root)
        self.degree, self.rank = mesh.degree(Axis.CFG), mesh.rank(Axis.CFG)
        self.group = mesh.group_name(Axis.CFG)
        self._fewest = self.degree * mesh.degree(Axis.DATA)
        self._context = context or CallContext()
        self._cut = BatchCut(root, self.degree, self.rank, self.group, self._context)
        self.rounds = rounds or Rounds()
        self._one_call: set[int] = set()
        """Numbers of samples for which a step is one call: its branches are in the batch."""
        self._known: dict[Any, Known | int] = {}
        """By structure and size: what it gives, or how often it did more than that."""
        self._sizes: dict[Any, dict[Any, Known]] = {}
        """By structure and size without whole numbers: what calls with other numbers gave."""

    def install(self) -> None:
        self._undo = override_forward(self.module, self._forward)

    def _forget(self) -> None:
        self._known.clear()
        self._sizes.clear()
        self._cut.forget()

    def _forward(self, original: Forward) -> Forward:
        names = list(inspect.signature(type(self.module).forward).parameters)

        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = settled(args), settled(kwargs)
            self.forget_if(self._parts.have_other_objects())
            samples = args[0] if args else kwargs.get(names[1]) if len(names) > 1 else None
            if self._is_to_cut(rows(samples)) and self._cut.may_cut(args, kwargs, samples):
                was_cut, result = self._cut(original, args, kwargs, samples)
                self.seen["cut" if was_cut else "everywhere"] += 1
                return result
            return self._apart(original, args, kwargs, rows(samples))

        return forward

    def _is_to_cut(self, batch: int) -> bool:
        """Whether to cut a batch, rather than to give a whole call to each rank: where all ranks get as much."""
        if batch < max(2, self._fewest):
            return False
        return batch % self.degree == 0 or batch in self._one_call

    def _apart(self, original: Forward, args: Any, kwargs: Any, batch: int) -> Any:
        """One branch: computed here, or by another rank."""
        leaves, spec = tree_flatten((args, kwargs))
        known = self._foreseen(leaves, spec)
        if isinstance(known, int):
            self.seen["everywhere"] += 1
            self.rounds.by_all += 1
            return self._learn(known, original, args, kwargs)
        if self.rounds.current.is_settled:
            self.rounds.current = Round()
        here = self.rounds.current
        number = len(here.branches)
        owner = self._context.owner([other.owner for other in here.branches], self.degree)
        shapes, is_whole = [x for x in known.leaves if isinstance(x, Tensor)], not self._context.leads_only
        branch = Branch(shapes, owner, batch, is_whole)
        here.branches.append(branch)
        device = next((x.device for x in leaves if isinstance(x, Tensor)), torch.device("cpu"))
        led = self._context.led if self._context.leads else None
        if led is not None:
            led.expect(max(1, batch), owner, self.rank, device)
        if owner == self.rank:
            lent = Lent(args, kwargs)
            self._compute(branch, original, lent.args, lent.kwargs)
            if led is not None:
                led.finish()
        take(args, kwargs, known.left)
        numbers = iter(range(len(branch.shapes)))

        def placeholder(shape: Tensor) -> Placeholder:
            index = next(numbers)
            return Placeholder(shape, device, lambda: self._value(here, number, index, device))

        return tree_unflatten([placeholder(x) if isinstance(x, Tensor) else x for x in known.leaves], known.spec)

    def _foreseen(self, leaves: list[Any], spec: TreeSpec) -> Known | int:
        """What a call will give; or how often calls like it have done more than give a result."""
        known = self._known.get(_key(leaves, spec), 0)
        if isinstance(known, Known):
            return known
        others = self._sizes.get(_key(leaves, spec, numbers=False), {})
        shown = list(others.values())
        if len(shown) >= 2 and all(other.looks_like(shown[0]) for other in shown):  # the numbers did not matter
            return shown[0]
        return known

    def _learn(self, tried: int, original: Forward, args: Any, kwargs: Any) -> Any:
        """A call on all ranks, to see what it gives."""
        if tried >= TRIES:
            return original(*args, **kwargs)
        watched, lent = Watched(self.module, (args, kwargs)), Lent(args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        key = _key(leaves, spec)
        try:
            result = original(*lent.args, **lent.kwargs)
            left, has_changed = lent.left(), watched.has_changed()
        finally:
            lent.give_back()
        found, result_spec = tree_flatten(result)
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
            self._sizes.clear()
        can_be_left_out = all_plain(found) and left is not None and not has_changed
        if not all_say(can_be_left_out, self.module, self.degree, self.group):  # what was run before may differ by rank
            self._known[key] = tried + 1
            return result
        blank = tuple(without_values(x) if isinstance(x, Tensor) else x for x in found)
        known = Known(result_spec, blank, left or {})
        self._known[key] = known
        self._sizes.setdefault(_key(leaves, spec, numbers=False), {})[key] = known
        return result

    def _compute(self, branch: Branch, original: Forward, args: Any, kwargs: Any) -> None:
        """This rank's branch. Its error is told at the exchange, so that nobody waits for what will not come."""
        try:
            branch.values = [x for x in tree_flatten(original(*args, **kwargs))[0] if isinstance(x, Tensor)]
            if [(x.shape, x.dtype) for x in branch.values] != [(x.shape, x.dtype) for x in branch.shapes]:
                raise UnsupportedError(
                    f"{type(self.module).__name__}: its results have other shapes than for such arguments before, so "
                    "guidance parallel cannot foresee them. Run it with cfg=1."
                )
        except Exception as error:
            branch.error = error

    def _value(self, here: Round, number: int, index: int, device: torch.device) -> Tensor:
        if not here.is_settled:
            self._settle(here, device)
        return here.branches[number].values[index]

    def _settle(self, here: Round, device: torch.device) -> None:
        """One exchange that brings every branch of a round to all ranks. Collective on the group."""
        here.is_settled = True
        self.seen["together" if len(here.branches) > 1 else "alone"] += 1
        first = here.branches[0]
        is_all = len(here.branches) == 1 and first.is_whole and not self.rounds.by_all
        if is_all and first.batch >= max(2, self._fewest):
            self._one_call.add(first.batch)
        self.rounds.by_all = 0
        owned = [[branch for branch in here.branches if branch.owner == rank] for rank in range(self.degree)]
        shapes = [[x for branch in branches for x in branch.shapes] for branches in owned]
        mine = [x for branch in owned[self.rank] for x in branch.values]
        error = next((branch.error for branch in owned[self.rank] if branch.error), None)
        for branches, received in zip(owned, exchange(mine, shapes, device, self.group, error), strict=True):
            arrived = iter(received)
            for branch in branches:
                branch.values = branch.values or [next(arrived) for _ in branch.shapes]


def _key(leaves: list[Any], spec: TreeSpec, numbers: bool = True) -> Any:
    """Equal for calls whose results have the same shapes, as far as the arguments tell."""

    def size(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return (leaf.shape, leaf.dtype, leaf.device)
        if isinstance(leaf, int) and not isinstance(leaf, bool):
            return leaf if numbers else int
        return leaf if leaf is None or isinstance(leaf, (bool, str)) else type(leaf).__name__

    return (str(spec), *map(size, leaves))
