"""A tensor of which each rank holds one slab: a range of rows along one dim.

An autoencoder's own code runs on it as written. It shows the global shape; each operator of torch works on the rank's
rows by a rule (`slab_rules.py`), which exchanges just what the result needs: the rows at the borders for a
convolution, sums for a norm. An operator without a rule is refused by its name, on all ranks alike: rules decide by
shapes only. Nothing is ever made whole in silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parafuse.errors import UnsupportedError
from parafuse.parallel.comm import all_gather, all_reduce, all_to_all
from parafuse.parallel.metadata import METADATA

Range = tuple[int, int]
GATHERED_BYTES = 64 << 20
"""A whole tensor is gathered in steps of about this size, straight into its memory."""


@dataclass(frozen=True)
class Cut:
    """Which rows a rank has: dim `dim` is `outer` blocks of `total` rows, and rank r has rows bounds[r]:bounds[r + 1]
    of each block. After dims were merged, `outer` is what stood before the split one (frames of tokens, say)."""

    dim: int
    bounds: tuple[int, ...]
    outer: int = 1

    @property
    def total(self) -> int:
        return self.bounds[-1]

    @property
    def size(self) -> int:
        """Of the dim."""
        return self.outer * self.total

    def range(self, rank: int) -> Range:
        return self.bounds[rank], self.bounds[rank + 1]

    def length(self, rank: int) -> int:
        return self.bounds[rank + 1] - self.bounds[rank]

    @property
    def ranges(self) -> list[Range]:
        return [self.range(rank) for rank in range(len(self.bounds) - 1)]

    def at(self, dim: int) -> Cut:
        """The same rows, of another dim."""
        return Cut(dim, self.bounds, self.outer)

    def rows(self, whole: Tensor, dim: int, rank: int) -> Tensor:
        """A rank's rows of a tensor that every rank has whole, along `dim` of it: a view where there is one."""
        return take(whole, dim, self.outer, self.range(rank))


def even_bounds(total: int, degree: int, unit: int = 1) -> tuple[int, ...]:
    """Ends of parts that differ by one unit at most."""
    return (*(total // unit * rank // degree * unit for rank in range(degree)), total)


def take(x: Tensor, dim: int, outer: int, rows: Range) -> Tensor:
    """Rows of each of the `outer` blocks of a dim."""
    start, stop = rows
    if outer == 1:
        return x.narrow(dim, start, stop - start)
    blocks = x.unflatten(dim, (outer, x.shape[dim] // outer))
    return blocks.narrow(dim + 1, start, stop - start).flatten(dim, dim + 1)


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A new dense tensor with dims in memory in the same order (channels last stay last)."""
    order = sorted(range(len(shape)), key=lambda d: (-like.stride(d), d))
    memory = like.new_empty([shape[d] for d in order])
    return memory.permute([order.index(d) for d in range(len(shape))])


def _strides(local: Tensor, shape: Sequence[int]) -> list[int]:
    """Strides of a dense tensor of `shape` in the order of `local`; what is expanded there is expanded here."""
    strides, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda d: (local.stride(d), -d)):
        if local.stride(dim) == 0 and shape[dim] > 1 and local.shape[dim] > 1:
            continue
        strides[dim] = step
        step *= max(shape[dim], 1)
    return strides


class SlabRanks:
    """The ranks that hold the slabs of one tensor."""

    def __init__(self, group: ProcessGroup):
        self.group = group
        self.degree, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def gather(self, x: Tensor) -> Tensor:
        """(...) -> (degree, ...), of the same shape on every rank. Collective."""
        if x.dtype in (torch.bool, torch.complex64, torch.complex128):  # unknown to some backends
            return all_gather(x.contiguous().view(torch.uint8), self.degree, self.group.group_name).view(x.dtype)
        return all_gather(x.contiguous(), self.degree, self.group.group_name)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, in fp32 at least on the way. Collective."""
        wide = x.float() if x.is_floating_point() and x.element_size() < 4 else x
        return all_reduce(wide, self.group.group_name).to(x.dtype)

    def exchange(self, pieces: Sequence[Tensor | None], sizes: Sequence[int], like: Tensor) -> list[Tensor]:
        """Sends piece r to rank r; flat tensors of `sizes` elements come back, by rank. Collective."""
        item = like.element_size()
        flat = [like.new_empty(0) if p is None else p.contiguous().reshape(-1) for p in pieces]
        sent = torch.cat(flat).view(torch.uint8)
        counts = [item * f.numel() for f in flat]
        received = all_to_all(sent, counts, [item * n for n in sizes], self.group.group_name)
        return [part.view(like.dtype) for part in received.split([item * n for n in sizes])]


class Slab(Tensor):
    """A rank's rows of a tensor. Shape, dtype, device and order of dims in memory are those of the whole tensor."""

    local: Tensor
    cut: Cut
    ranks: SlabRanks
    is_copy: bool
    """Its rows were copied where torch would have given a view: a change in place would not reach the original."""

    @staticmethod
    def __new__(cls, local: Tensor, cut: Cut, ranks: SlabRanks) -> Slab:
        if local.shape[cut.dim] != cut.outer * cut.length(ranks.rank):
            raise UnsupportedError(f"{local.shape[cut.dim]} rows along dim {cut.dim}, where {cut} has others")
        shape = list(local.shape)
        shape[cut.dim] = cut.size
        self = Tensor._make_wrapper_subclass(
            cls, shape, strides=_strides(local, shape), dtype=local.dtype, device=local.device
        )
        self.local, self.cut, self.ranks, self.is_copy = local, cut, ranks, False
        return self

    @classmethod
    def of(cls, whole: Tensor, dim: int, ranks: SlabRanks) -> Slab:
        """This rank's slab of a tensor that all ranks have; no communication."""
        cut = Cut(dim, even_bounds(whole.shape[dim], ranks.degree))
        return cls(cut.rows(whole, dim, ranks.rank).clone(), cut, ranks)

    def like(self, local: Tensor, cut: Cut | None = None) -> Slab:
        """Rows that come from this tensor's."""
        return Slab(local, cut or self.cut, self.ranks)

    @property
    def mine(self) -> Range:
        return self.cut.range(self.ranks.rank)

    def fetch(self, wanted: Sequence[Range], margins: Range = (0, 0), value: float = 0.0) -> Tensor:
        """Rows wanted[rank], whoever has them, with margins filled with `value`. Collective, unless all ranks have
        what they want; then it may be a view. `wanted`: of every rank, the same list on all of them."""
        own, rank, dim = self.cut.ranges, self.ranks.rank, self.cut.dim
        common = [[_overlap(have, want) for want in wanted] for have in own]
        stays = all(_length(common[r][r]) == _length(want) for r, want in enumerate(wanted))
        start, stop = wanted[rank]
        if stays and margins == (0, 0):
            return self.own(common[rank][rank])
        shape = list(self.shape)
        shape[dim] = self.cut.outer * (stop - start + sum(margins))
        result = empty(shape, self.local)
        for place, rows in ((0, margins[0]), (margins[0] + stop - start, margins[1])):
            if rows:
                _block(result, dim, self.cut.outer, (place, place + rows)).fill_(value)
        per_row = math.prod(self.shape) // max(self.cut.total, 1)
        sizes = [0 if r == rank else per_row * _length(common[r][rank]) for r in range(self.ranks.degree)]
        parts: list[Tensor] = []
        if not stays:
            pieces = [None if r == rank else self.own(common[rank][r]) for r in range(self.ranks.degree)]
            parts = self.ranks.exchange(pieces, sizes, self.local)
        for r, rows in enumerate(common[k][rank] for k in range(self.ranks.degree)):
            if _length(rows) == 0:
                continue
            place = _block(result, dim, self.cut.outer, tuple(end - start + margins[0] for end in rows))
            if r == rank:
                place.copy_(_block(self.local, dim, self.cut.outer, tuple(end - self.mine[0] for end in rows)))
            else:
                place.copy_(parts[r].view(place.shape))
        return result

    def own(self, rows: Range) -> Tensor:
        """Some of this rank's rows, by their numbers in the whole tensor."""
        start, stop = rows
        if stop <= start:
            return take(self.local, self.cut.dim, self.cut.outer, (0, 0))
        return take(self.local, self.cut.dim, self.cut.outer, (start - self.mine[0], stop - self.mine[0]))

    def recut(self, bounds: tuple[int, ...]) -> Slab:
        """The same tensor with other bounds. Collective, unless they are its own."""
        if bounds == self.cut.bounds:
            return self
        cut = Cut(self.cut.dim, bounds, self.cut.outer)
        out = self.like(self.fetch(cut.ranges), cut)
        out.is_copy = True
        return out

    def unmerged(self) -> Slab:
        """The same tensor cut along the merged dim as a whole, into parts that follow on each other. Collective."""
        cut, dim, rank = self.cut, self.cut.dim, self.ranks.rank
        if cut.outer == 1:
            return self
        flat = Cut(dim, even_bounds(cut.size, self.ranks.degree))

        def rows(source: int, target: int) -> list[Range]:
            """What a rank has of another one's new part, by row of the whole dim."""
            blocks = [
                (cut.total * n + cut.bounds[source], cut.total * n + cut.bounds[source + 1]) for n in range(cut.outer)
            ]
            common = [_overlap(block, flat.range(target)) for block in blocks]
            return [c for c in common if _length(c)]

        def piece(target: int) -> Tensor | None:
            own = [
                self.local.narrow(
                    dim, start // cut.total * cut.length(rank) + start % cut.total - self.mine[0], stop - start
                )
                for start, stop in rows(rank, target)
            ]
            return torch.cat(own, dim) if own else None

        per_row = math.prod(self.shape) // cut.size
        counts = [sum(_length(r) for r in rows(source, rank)) for source in range(self.ranks.degree)]
        pieces = [piece(target) for target in range(self.ranks.degree)]
        parts = self.ranks.exchange(pieces, [per_row * count for count in counts], self.local)
        shape = list(self.shape)
        shape[dim] = flat.length(rank)
        result = empty(shape, self.local)
        for source, (part, count) in enumerate(zip(parts, counts, strict=True)):
            if not count:
                continue
            shape[dim] = count
            lengths = [_length(r) for r in rows(source, rank)]
            for (start, stop), values in zip(rows(source, rank), part.view(shape).split(lengths, dim), strict=True):
                result.narrow(dim, start - flat.bounds[rank], stop - start).copy_(values)
        out = self.like(result, flat)
        out.is_copy = True
        return out

    def whole(self) -> Tensor:
        """The whole tensor, on every rank, gathered straight into its memory. Collective."""
        cut, dim, rank = self.cut, self.cut.dim, self.ranks.rank
        result = empty(self.shape, self.local)
        if not result.numel():
            return result
        most = max(cut.length(r) for r in range(self.ranks.degree))
        others = [d for d in range(self.ndim) if d != dim]
        along = max(others, key=lambda d: self.shape[d]) if others else dim
        steps = 1
        if others:
            steps = min(self.shape[along], math.ceil(result.nbytes / GATHERED_BYTES))
        ends = even_bounds(self.shape[along], steps)
        for start, stop in pairwise(ends):
            mine = self.local.narrow(along, start, stop - start) if others else self.local
            out = result.narrow(along, start, stop - start)
            blocks = mine.unflatten(dim, (cut.outer, cut.length(rank))).movedim(dim + 1, 0)
            sent = mine.new_empty((most, *blocks.shape[1:]))
            sent[: cut.length(rank)] = blocks
            everyone = self.ranks.gather(sent)
            for r, rows in enumerate(cut.ranges):
                place = _block(out, dim, cut.outer, rows).movedim(dim + 1, 0)
                place.copy_(everyone[r, : _length(rows)])
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Slab({tuple(self.shape)}, {self.cut})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        from parafuse.parallel.slab_rules import FUNCTIONS  # they need this class

        rule = None if func in METADATA else FUNCTIONS.get(func)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                if rule is not None:
                    result = rule(func, args, kwargs)
                    if result is not NotImplemented:
                        return result
                return func(*args, **kwargs)
        except UnsupportedError as error:
            error.add_note(f"called as {torch.overrides.resolve_name(func)}")
            raise

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from parafuse.parallel.slab_rules import run  # it needs this class

        return run(func, args, kwargs or {})


def _overlap(a: Range, b: Range) -> Range:
    return max(a[0], b[0]), min(a[1], b[1])


def _length(rows: Range) -> int:
    return max(rows[1] - rows[0], 0)


def _block(x: Tensor, dim: int, outer: int, rows: Sequence[int]) -> Tensor:
    """Rows of each block, as a view in which blocks and rows are dims of their own."""
    return x.unflatten(dim, (outer, x.shape[dim] // outer)).narrow(dim + 1, rows[0], rows[1] - rows[0])


def lead_of(operands: Iterable[Any]) -> Slab:
    """Of the slabs among `operands` the one with the most dims."""
    return max((x for x in operands if isinstance(x, Slab)), key=lambda x: x.ndim)


def refuse(what: str, why: str = "") -> UnsupportedError:
    """The error for an operator that cannot be done on slabs."""
    return UnsupportedError(
        f"the operator {what} cannot run on a tensor that is split over ranks{f' ({why})' if why else ''}. "
        'Run the autoencoder whole on every rank (vae="replicated") or in tiles (vae="tiled").'
    )
