"""Guidance parallel: the branches of classifier-free guidance side by side, whatever way a pipeline computes them.

A pipeline that stacks branches in the batch has its batch cut at the denoiser's boundary. One that calls the denoiser
for each branch gets placeholders: of the calls since a value was last needed, the n-th is computed by rank
n mod degree alone, and when a value is needed, one exchange brings all of them. Nothing here knows a pipeline.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.config import Axis
from parafuse.errors import UnsupportedError
from parafuse.parallel.comm import all_gather
from parafuse.parallel.hooks import Forward, override_forward
from parafuse.parallel.layout import head_range
from parafuse.parallel.mesh import Mesh
from parafuse.parallel.placeholder import Placeholder, settled

MAX_ERROR = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of a batch that was cut against the whole one; a batch that is mixed is far above."""


@dataclass
class Branch:
    """One call of the denoiser that is open: shapes of its results, and these on the rank that computed them."""

    shapes: list[Tensor]
    values: list[Tensor] = field(default_factory=list[Tensor])


@dataclass
class Round:
    """The calls since a value was last needed, in order."""

    branches: list[Branch] = field(default_factory=list[Branch])
    is_settled: bool = False


@dataclass(frozen=True)
class Known:
    """The results of calls of one structure and size: leaves without values, where they are tensors."""

    spec: TreeSpec
    leaves: tuple[Any, ...]


@dataclass(frozen=True)
class Cut:
    """Which leaves of a call's arguments, and of its results, have a row (or an item) for each sample."""

    arguments: tuple[bool, ...]
    results: tuple[bool, ...]


class GuidanceParallel:
    """The guidance branches of one denoiser on the ranks of the `cfg` axis. `install` on every rank of its group; calls
    are collective on it."""

    def __init__(self, root: nn.Module, mesh: Mesh):
        self.root = root
        self.degree, self.rank = mesh.degree(Axis.CFG), mesh.rank(Axis.CFG)
        self.group = mesh.group_name(Axis.CFG)
        self.seen: Counter[str] = Counter()
        """Calls whose batch was cut, rounds of several branches, and rounds of one."""
        self._round = Round()
        self._known: dict[Any, Known] = {}
        self._cuts: dict[Any, Cut] = {}
        self._undo: Callable[[], None] | None = None

    def install(self) -> None:
        self._undo = override_forward(self.root, self._forward)

    def remove(self) -> None:
        """Puts the forward back as it was. No communication."""
        if self._undo:
            self._undo()
            self._undo = None

    def report(self) -> str:
        """One line on what the branches of the calls so far did; empty without calls."""
        cut, together, alone = self.seen["cut"], self.seen["together"], self.seen["alone"]
        parts = [f"batch cut in {cut} calls"] if cut else []
        parts += [f"branches side by side in {together} steps"] if together else []
        parts += [f"one branch at a time in {alone} steps"] if alone else []
        return ", ".join(parts)

    def _forward(self, original: Forward) -> Forward:
        names = list(inspect.signature(type(self.root).forward).parameters)

        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = settled(args), settled(kwargs)
            samples = args[0] if args else kwargs.get(names[1]) if len(names) > 1 else None
            if _rows(samples) > 1:
                return self._stacked(original, args, kwargs, samples)
            return self._apart(original, args, kwargs)

        return forward

    def _apart(self, original: Forward, args: Any, kwargs: Any) -> Any:
        """One branch: computed here, or by another rank."""
        leaves, spec = tree_flatten((args, kwargs))
        key = (str(spec), *map(_size, leaves))
        known = self._known.get(key)
        if known is None:  # what it gives has to be seen once
            result = original(*args, **kwargs)
            found, result_spec = tree_flatten(result)
            self._known[key] = Known(result_spec, tuple(_without_values(x) for x in found))
            return result
        if self._round.is_settled:
            self._round = Round()
        here, number = self._round, len(self._round.branches)
        branch = Branch([x for x in known.leaves if isinstance(x, Tensor)])
        if number % self.degree == self.rank:
            branch.values = [x for x in tree_flatten(original(*args, **kwargs))[0] if isinstance(x, Tensor)]
            if [(x.shape, x.dtype) for x in branch.values] != [(x.shape, x.dtype) for x in branch.shapes]:
                raise UnsupportedError(
                    f"{type(self.root).__name__}: its results have other shapes than for such arguments before, so "
                    "guidance parallel cannot foresee them. Run it with cfg=1."
                )
        here.branches.append(branch)
        device = next((x.device for x in leaves if isinstance(x, Tensor)), torch.device("cpu"))
        numbers = iter(range(len(branch.shapes)))

        def placeholder(shape: Tensor) -> Placeholder:
            index = next(numbers)
            return Placeholder(shape, device, lambda: self._value(here, number, index, device))

        return tree_unflatten([placeholder(x) if isinstance(x, Tensor) else x for x in known.leaves], known.spec)

    def _value(self, here: Round, number: int, index: int, device: torch.device) -> Tensor:
        if not here.is_settled:
            self._settle(here, device)
        return here.branches[number].values[index]

    def _settle(self, here: Round, device: torch.device) -> None:
        """One exchange that brings every branch of a round to all ranks. Collective on the group."""
        here.is_settled = True
        self.seen["together" if len(here.branches) > 1 else "alone"] += 1
        owned = [here.branches[rank :: self.degree] for rank in range(self.degree)]
        shapes = [[x for branch in branches for x in branch.shapes] for branches in owned]
        mine = [x for branch in owned[self.rank] for x in branch.values]
        for branches, received in zip(owned, self._exchange(mine, shapes, device), strict=True):
            for branch in branches:
                branch.values = branch.values or [next(received) for _ in branch.shapes]

    def _stacked(self, original: Forward, args: Any, kwargs: Any, samples: Any) -> Any:
        """A batch of several: each rank computes its part, and one exchange brings all."""
        batch = _rows(samples)
        call = _Stacked(original, args, kwargs, batch, isinstance(samples, list))
        key = (str(call.spec), *(_rows(x) == batch for x in call.leaves))
        cut = self._cuts.get(key)
        if cut is None:
            whole = original(*args, **kwargs)
            cut = self._cuts[key] = self._cut_of(call, whole)
            return whole
        self.seen["cut"] += 1
        return self._join(call, cut, call.part(cut, *self._range(batch)))

    def _range(self, batch: int) -> tuple[int, int]:
        """The samples that this rank computes; a rank that is left over does the last one again."""
        first, last = head_range(batch, self.degree, self.rank)
        return (first, last) if last > first else (batch - 1, batch)

    def _join(self, call: _Stacked, cut: Cut, part: Any) -> Any:
        """The whole result from every rank's part. Collective on the group."""
        leaves, spec = call.flat(part, len(range(*self._range(call.batch))))
        counts = [last - first for first, last in (head_range(call.batch, self.degree, r) for r in range(self.degree))]
        rows = [(i, x[0]) for i, x in enumerate(leaves) if cut.results[i]]
        shapes = [[x for _, x in rows for _ in range(count)] for count in counts]
        mine = [x for i, _ in rows for x in list(leaves[i])[: counts[self.rank]]]
        out: dict[int, list[Tensor]] = {i: [] for i, _ in rows}
        device = rows[0][1].device if rows else torch.device("cpu")
        for count, received in zip(counts, self._exchange(mine, shapes, device), strict=True):
            for i, _ in rows:
                out[i] += [next(received) for _ in range(count)]
        for i, pieces in out.items():
            leaves[i] = pieces if isinstance(leaves[i], list) else torch.stack(pieces)
        return tree_unflatten(leaves, spec)

    def _cut_of(self, call: _Stacked, whole: Any) -> Cut:
        """Which arguments to cut, so that the parts give the whole. Collective on the group."""
        results = tuple(_rows(x) == call.batch for x in call.flat(whole, call.batch)[0])
        for arguments in _candidates(tuple(_rows(x) == call.batch for x in call.leaves)):
            cut, part = Cut(arguments, results), None
            try:
                part = call.part(cut, *self._range(call.batch))
            except (RuntimeError, ValueError, LookupError, TypeError, AssertionError):
                part = None
            if self._all_say(part is not None) and self._all_say(_is_same(self._join(call, cut, part), whole)):
                return cut
        raise UnsupportedError(
            f"{type(self.root).__name__}: a batch of {call.batch} gives something else when it is cut, so its samples "
            "are not independent. Run it with cfg=1."
        )

    def _all_say(self, yes: bool) -> bool:
        said = all_gather(torch.tensor([yes], device=_device_of(self.root)), self.degree, self.group)
        return bool(said.all())

    def _exchange(
        self, mine: list[Tensor], shapes: list[list[Tensor]], device: torch.device
    ) -> Iterator[Iterator[Tensor]]:
        """For each rank the tensors it gave, from one exchange; `shapes` are those of every rank's tensors."""
        longest = max(sum(x.numel() * x.element_size() for x in each) for each in shapes)
        send = torch.zeros(longest, dtype=torch.uint8, device=device)
        offset = 0
        for x in mine:
            flat = x.contiguous().view(-1).view(torch.uint8)
            send[offset : offset + flat.numel()] = flat
            offset += flat.numel()
        received = all_gather(send, self.degree, self.group)

        def tensors(rank: int) -> Iterator[Tensor]:
            offset = 0
            for shape in shapes[rank]:
                size = shape.numel() * shape.element_size()
                piece = received[rank, offset : offset + size].clone()  # a copy starts where its dtype may be read
                yield piece.view(shape.dtype).view(shape.shape)
                offset += size

        return (tensors(rank) for rank in range(self.degree))


class _Stacked:
    """A call of the denoiser with several samples, cut by leaves."""

    def __init__(self, original: Forward, args: Any, kwargs: Any, batch: int, lists: bool):
        self.original, self.batch, self.lists = original, batch, lists
        self.leaves, self.spec = self.flat((args, kwargs), batch)

    def flat(self, tree: Any, rows: int) -> tuple[list[Any], TreeSpec]:
        """Leaves of arguments or results; where samples come as a list, lists of as many items are leaves."""
        return tree_flatten(tree, is_leaf=lambda x: self.lists and isinstance(x, list) and len(x) == rows)

    def part(self, cut: Cut, first: int, last: int) -> Any:
        """What the denoiser gives for samples [first, last)."""
        leaves = [x[first:last] if is_cut else x for x, is_cut in zip(self.leaves, cut.arguments, strict=True)]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.original(*args, **kwargs)


def _candidates(rows: tuple[bool, ...]) -> Iterator[tuple[bool, ...]]:
    """All leaves of as many rows as samples; then all but one, which may have as many by chance."""
    yield rows
    for i in [i for i, has in enumerate(rows) if has][1:]:
        yield (*rows[:i], False, *rows[i + 1 :])


def _rows(x: Any) -> int:
    """Samples of a tensor or list; 0 for what has none."""
    return len(x) if (isinstance(x, Tensor) and x.ndim) or isinstance(x, list) else 0


def _is_same(found: Any, whole: Any) -> bool:
    for a, b in zip(tree_flatten(found)[0], tree_flatten(whole)[0], strict=True):
        if isinstance(b, Tensor) and b.is_floating_point() and b.numel():
            if a.shape != b.shape:
                return False
            error = (a - b).abs().max() / b.abs().max().clamp_min(1e-30)
            if not error <= MAX_ERROR.get(b.dtype, 1e-4):
                return False
    return True


def _size(leaf: Any) -> Any:
    """What of an argument decides the shapes of the results."""
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device)
    return leaf if leaf is None or isinstance(leaf, (bool, int, str)) else type(leaf).__name__


def _without_values(x: Any) -> Any:
    return torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x


def _device_of(root: nn.Module) -> torch.device:
    return next((p.device for p in root.parameters()), torch.device("cpu"))
