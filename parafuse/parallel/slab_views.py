"""Rules for views and pieces of slabs: other shapes of the same values, slices, indices, and joining.

Which dim is split is followed through every view, never guessed from sizes. A view that would cut the split dim at a
place where no rank ends moves rows between ranks first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from parafuse.parallel.slab import Cut, Slab, even_bounds, lead_of, refuse

UNBALANCED = 1.25
"""Bounds are renewed where the longest part is longer than an even one by this factor and a row."""


def balanced(bounds: Sequence[int]) -> tuple[int, ...]:
    """These bounds, or even ones where a rank would have far more than the others."""
    degree = len(bounds) - 1
    most = max(b - a for a, b in pairwise(bounds))
    if most > UNBALANCED * math.ceil(bounds[-1] / degree) + 1:
        return even_bounds(bounds[-1], degree)
    return tuple(bounds)


def view(func: Any, args: Any, kwargs: Any) -> Any:
    """view, and reshape where it copies."""
    x, size = args
    if isinstance(size, torch.dtype):
        raise refuse("view as another dtype")
    size = list(size)
    if -1 in size:
        size[size.index(-1)] = x.numel() // max(-math.prod(size), 1)
    if x.numel() == 0:
        return x.local.new_empty(size)
    dim, outer, rows, unit = _place(x, size)
    if unit:  # the dim becomes (rows / unit, unit): the first of both is split
        bounds = _multiples(x.cut.bounds, unit)
        moved = x.recut(bounds)
        cut = Cut(dim, tuple(end // unit for end in bounds), outer)
    else:
        moved, cut = x, Cut(dim, tuple(end * rows for end in x.cut.bounds), outer)
    local = list(size)
    local[dim] = outer * cut.length(x.ranks.rank)
    result = moved.local.reshape(local)
    out = x.like(result, cut)
    shared = result.untyped_storage()._cdata == x.local.untyped_storage()._cdata
    out.is_copy = func is torch.ops.aten.view.default and (x.is_copy or not shared)
    return out


def _multiples(bounds: tuple[int, ...], unit: int) -> tuple[int, ...]:
    """The nearest bounds that divide by `unit`."""
    return (*(round(end / unit) * unit for end in bounds[:-1]), bounds[-1])


def _place(x: Slab, size: list[int]) -> tuple[int, int, int, int]:
    """Where the split rows are in another shape: the dim, the blocks before them, and either how many rows of the new
    dim one old row makes, or how many old rows make a new one (else 0)."""
    before = math.prod(x.shape[: x.cut.dim]) * x.cut.outer
    total = x.cut.total
    a = 1
    for dim, length in enumerate(size):
        b = a * length
        if (length == 1 and not (total == 1 and a == before)) or (b <= before and not (total == 1 and a == before)):
            a = b
            continue
        if before % a == 0:
            outer = before // a
            if b % (before * total) == 0:
                return dim, outer, b // (before * total), 0
            if b % before == 0 and total % (b // before) == 0:
                return dim, outer, 0, total // (b // before)
        raise refuse("view", f"{tuple(x.shape)} as {tuple(size)} cuts dim {x.cut.dim} of it at odd places")
    return len(size) - 1, size[-1], 1, 0  # one row, and nothing after it


class Row(Tensor):
    """Rows of the split dim that every rank got: copies. The model's own would be a view, so a change in place is
    refused; all else gives plain tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = (name.endswith("_") and not name.startswith("__")) or name == "__setitem__" or name[:3] == "__i"
        if in_place and args and isinstance(args[0], Row):
            raise refuse(f"Tensor.{name}", "in place of one row of the split dim")
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map_only(Row, lambda x: x.as_subclass(Tensor), (args, kwargs or {}))
        return func(*args, **kwargs)


def permute(func: Any, args: Any, kwargs: Any) -> Any:
    x, dims = args
    dims = [d % x.ndim for d in dims]
    return _view_of(x, x.local.permute(dims), x.cut.at(dims.index(x.cut.dim)))


def transpose(func: Any, args: Any, kwargs: Any) -> Any:
    x, *dims = args
    a, b = (d % x.ndim for d in dims) if dims else (0, 1)
    cut = x.cut.at({a: b, b: a}.get(x.cut.dim, x.cut.dim))
    return _view_of(x, x.local.transpose(a, b) if x.ndim > 1 else x.local, cut)


def unsqueeze(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args
    dim %= x.ndim + 1
    return _view_of(x, x.local.unsqueeze(dim), x.cut.at(x.cut.dim + (dim <= x.cut.dim)))


def squeeze(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    dims = args[1] if len(args) > 1 else range(x.ndim)
    dims = [d % x.ndim for d in (dims if isinstance(dims, (tuple, list, range)) else (dims,))]
    gone = [d for d in dims if x.shape[d] == 1]
    if x.cut.dim in gone:
        return x.whole().squeeze(gone).as_subclass(Row)
    cut = x.cut.at(x.cut.dim - sum(d < x.cut.dim for d in gone))
    return _view_of(x, x.local.squeeze(gone), cut)


def expand(func: Any, args: Any, kwargs: Any) -> Any:
    x, size = args[0], list(args[1])
    dim = x.cut.dim + len(size) - x.ndim
    if size[dim] not in (-1, x.cut.size):
        return x.whole().expand(size)  # one row
    size[dim] = x.local.shape[x.cut.dim]
    return _view_of(x, x.local.expand(size), x.cut.at(dim))


def _view_of(x: Slab, local: Tensor, cut: Cut) -> Slab:
    out = x.like(local, cut)
    out.is_copy = x.is_copy
    return out


def repeat(func: Any, args: Any, kwargs: Any) -> Any:
    x, times = args
    dim = x.cut.dim + len(times) - x.ndim
    return x.like(x.local.repeat(times), Cut(dim, x.cut.bounds, x.cut.outer * times[dim]))


def slice_(func: Any, args: Any, kwargs: Any) -> Any:
    given: Any = (*args, *(0, None, None, 1)[len(args) - 1 :])
    x, dim, start, stop, step = given
    dim %= x.ndim
    cut = x.cut
    if dim != cut.dim:
        return _view_of(x, func(x.local, dim, start, stop, step), cut)
    start, stop, step = slice(start, stop, step).indices(x.shape[dim])
    stop = max(start, stop)
    if (start, stop, step) == (0, x.shape[dim], 1):
        return _view_of(x, x.local.view_as(x.local), cut)
    if cut.outer > 1:
        if step != 1 or start % cut.total or stop % cut.total:
            return slice_(func, (x.unmerged(), dim, start, stop, step), {})
        each = cut.length(x.ranks.rank)
        rows = (start // cut.total * each, stop // cut.total * each)
        return _view_of(
            x, x.local[(slice(None),) * dim + (slice(*rows),)], Cut(dim, cut.bounds, rows_of(start, stop, cut))
        )
    ends = tuple(math.ceil((min(max(end, start), stop) - start) / step) for end in cut.bounds)
    ends = (0, *ends[1:-1], math.ceil((stop - start) / step))
    mine, rank = x.mine[0], x.ranks.rank
    first = start + ends[rank] * step - mine
    last = start + (ends[rank + 1] - 1) * step - mine + 1
    if ends[rank + 1] == ends[rank]:
        first = last = 0
    return _view_of(x, x.local[(slice(None),) * dim + (slice(first, last, step),)], Cut(dim, ends))


def rows_of(start: int, stop: int, cut: Cut) -> int:
    """Blocks between two rows that begin blocks."""
    return (stop - start) // cut.total


def select(func: Any, args: Any, kwargs: Any) -> Any:
    """One index: a view, or where the split dim is meant one row, which every rank gets."""
    x, dim, index = args
    dim %= x.ndim
    if dim != x.cut.dim:
        return _view_of(x, x.local.select(dim, index), x.cut.at(x.cut.dim - (dim < x.cut.dim)))
    block, row = divmod(index % x.shape[dim], x.cut.total)
    return x.fetch([(row, row + 1)] * x.ranks.degree).select(dim, block).as_subclass(Row)


def split(func: Any, args: Any, kwargs: Any) -> Any:
    """split.Tensor and split_with_sizes."""
    x, how = args[:2]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.ndim
    length = x.shape[dim]
    if isinstance(how, int):
        how = [min(how, length - n) for n in range(0, length, how)]
    ends = [sum(how[:n]) for n in range(len(how) + 1)]
    cut = torch.ops.aten.slice.Tensor
    return tuple(slice_(cut, (x, dim, a, b, 1), {}) for a, b in pairwise(ends))


def unbind(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], (args[1] if len(args) > 1 else 0) % args[0].ndim
    if dim == x.cut.dim:
        return tuple(row.as_subclass(Row) for row in x.whole().unbind(dim))
    return tuple(_view_of(x, part, x.cut.at(x.cut.dim - (dim < x.cut.dim))) for part in x.local.unbind(dim))


def rows_as(x: Any, dim: int, cut: Cut, lead: Slab) -> Any:
    """The local rows of an operand as `cut`, along `dim` of it: of a whole tensor its part, of a slab its own."""
    if not isinstance(x, Slab):
        return cut.rows(x, dim, lead.ranks.rank)
    if x.cut.dim != dim or x.cut.outer != cut.outer or x.cut.total != cut.total:
        raise refuse("on several tensors", f"split as {x.cut} and as {cut.at(dim)}")
    return x.recut(cut.bounds).local


def cat(func: Any, args: Any, kwargs: Any) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    tensors = [x for x in args[0] if x.shape != (0,)]
    lead = max((x for x in tensors if isinstance(x, Slab)), key=lambda x: x.cut.total)
    dim %= lead.ndim
    cut = lead.cut
    if dim != cut.dim:
        return lead.like(torch.cat([rows_as(x, cut.dim, cut, lead) for x in tensors], dim))
    if cut.outer > 1 and any(x.shape[dim] % cut.total for x in tensors):
        return cat(func, ([x.unmerged() if isinstance(x, Slab) else x for x in tensors], dim), {})
    if cut.outer > 1:
        rows = [rows_as(x, dim, Cut(dim, cut.bounds, x.shape[dim] // cut.total), lead) for x in tensors]
        blocks = sum(x.shape[dim] for x in tensors) // cut.total
        return lead.like(torch.cat(rows, dim), Cut(dim, cut.bounds, blocks))
    ends = [sum(x.shape[dim] for x in tensors[:n]) for n in range(len(tensors) + 1)]
    shift = next(end for x, end in zip(tensors, ends, strict=False) if x is lead)
    bounds = balanced((0, *(shift + end for end in cut.bounds[1:-1]), ends[-1]))
    pieces: list[Tensor] = []
    for x, (begin, end) in zip(tensors, pairwise(ends), strict=True):
        wanted = [(min(max(a, begin), end) - begin, min(max(b, begin), end) - begin) for a, b in pairwise(bounds)]
        if isinstance(x, Slab):
            if x.cut.dim != dim or x.cut.outer != 1:
                raise refuse("cat", f"of tensors that are split as {x.cut} and as {cut}")
            pieces.append(x.fetch(wanted))
        else:
            start, stop = wanted[lead.ranks.rank]
            pieces.append(x.narrow(dim, start, stop - start))
    return lead.like(torch.cat(pieces, dim), Cut(dim, bounds))


def stack(func: Any, args: Any, kwargs: Any) -> Any:
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    dim %= tensors[0].ndim + 1
    return cat(func, ([x.unsqueeze(dim) for x in tensors], dim), {})


def rows_by_index(x: Slab, index: Sequence[int], bounds: tuple[int, ...]) -> Slab:
    """Rows by number, in any order, repeated or not; `bounds` of the result. Collective: a rank gets the range between
    the first and the last row that it needs."""
    spans = [(min(index[a:b]), max(index[a:b]) + 1) if b > a else (0, 0) for a, b in pairwise(bounds)]
    rank = x.ranks.rank
    here, (first, last) = index[bounds[rank] : bounds[rank + 1]], spans[rank]
    rows = x.fetch(spans)
    if list(here) != list(range(first, last)):
        rows = rows.index_select(x.cut.dim, torch.tensor([n - first for n in here], device=x.device, dtype=torch.long))
    return x.like(rows, Cut(x.cut.dim, bounds))


def index_select(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim, index = args
    if not isinstance(x, Slab) or isinstance(index, Slab):
        raise refuse("index_select", "by a split index")
    if dim % x.ndim != x.cut.dim:
        return x.like(x.local.index_select(dim, index))
    return rows_by_index(x.unmerged(), index.tolist(), even_bounds(len(index), x.ranks.degree))


def index(func: Any, args: Any, kwargs: Any) -> Any:
    """Indexing by tensors: along other dims, or by one list of numbers along the split one."""
    x, indices = args
    given = [n for n, i in enumerate(indices) if i is not None]
    tensors = [indices[n] for n in given]
    if not isinstance(x, Slab):
        if len(given) != 1 or tensors[0].dtype == torch.bool:
            raise refuse("index", "by several split tensors")
        ids = tensors[0]
        return ids.like(func(x, [None] * given[0] + [ids.local]), ids.cut.at(ids.cut.dim + given[0]))
    if any(isinstance(i, Slab) or i.dtype == torch.bool for i in tensors):
        raise refuse("index", "by a mask or a split tensor")
    if x.cut.dim in given:
        if len(given) > 1 or tensors[0].ndim != 1:
            raise refuse("index", "by several tensors")
        numbers = [n % x.shape[x.cut.dim] for n in tensors[0].tolist()]
        return rows_by_index(x.unmerged(), numbers, even_bounds(len(numbers), x.ranks.degree))
    result = func(x.local, indices)
    num_new = max(i.ndim for i in tensors)
    adjacent = given == list(range(given[0], given[-1] + 1))
    before = sum(n < x.cut.dim for n in given)
    added = num_new if not adjacent or given[0] < x.cut.dim else 0
    return x.like(result, x.cut.at(x.cut.dim - before + added))


def flip(func: Any, args: Any, kwargs: Any) -> Any:
    x, dims = args
    dims = [d % x.ndim for d in dims]
    others = [d for d in dims if d != x.cut.dim]
    out = x.like(x.local.flip(others))
    if len(others) < len(dims):
        out = out.unmerged()
        out = rows_by_index(out, range(out.cut.total)[::-1], out.cut.bounds)
    return out


def embedding(func: Any, args: Any, kwargs: Any) -> Any:
    """Rows of a whole table by split numbers."""
    table, ids, *rest = args
    if not isinstance(ids, Slab) or isinstance(table, Slab):
        raise refuse("embedding", "of a split table")
    return ids.like(func(table, ids.local, *rest, **kwargs))


def gather(func: Any, args: Any, kwargs: Any) -> Any:
    """Values by number along another dim."""
    lead = lead_of(args)
    x, dim, numbers = args
    if dim % lead.ndim == lead.cut.dim or x.shape[lead.cut.dim] != numbers.shape[lead.cut.dim]:
        raise refuse("gather", "along the split dim")
    rows = [rows_as(t, lead.cut.dim, lead.cut, lead) for t in (x, numbers)]
    return lead.like(func(rows[0], dim, rows[1], **kwargs))


def pixel_shuffle(func: Any, args: Any, kwargs: Any) -> Any:
    x, r = args
    *batch, channels, height, width = x.shape
    n = len(batch)
    if x.cut.dim != n and x.cut.outer == 1 and all(a < b for a, b in x.cut.ranges):  # torch's is wrong for no rows
        times = r if x.cut.dim > n else 1
        return x.like(func(x.local, r), Cut(x.cut.dim, tuple(end * times for end in x.cut.bounds)))
    y = x.reshape(*batch, channels // (r * r), r, r, height, width)
    order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    return y.permute(order).reshape(*batch, channels // (r * r), height * r, width * r)


def pixel_unshuffle(func: Any, args: Any, kwargs: Any) -> Any:
    x, r = args
    *batch, channels, height, width = x.shape
    n = len(batch)
    if x.cut.dim > n and x.cut.outer == 1 and height % r == width % r == 0:
        x = x.recut(_multiples(x.cut.bounds, r))
        if x.local.numel() == 0:  # of no rows torch's own has other channels
            shape = (*batch, channels * r * r, *(size // r for size in x.local.shape[n + 1 :]))
            return x.like(x.local.new_empty(shape), Cut(x.cut.dim, tuple(end // r for end in x.cut.bounds)))
        return x.like(func(x.local, r), Cut(x.cut.dim, tuple(end // r for end in x.cut.bounds)))
    y = x.reshape(*batch, channels, height // r, r, width // r, r)
    order = [*range(n), n, n + 2, n + 4, n + 1, n + 3]
    return y.permute(order).reshape(*batch, channels * r * r, height // r, width // r)


def roll(func: Any, args: Any, kwargs: Any) -> Any:
    """Rolled along other dims only: along the split one a rank would need rows of both ends."""
    given: Any = (*args, [])[:3]
    x, shifts, dims = given
    if not dims or x.cut.dim in [d % x.ndim for d in dims]:
        raise refuse("roll", "along the split dim")
    return x.like(x.local.roll(shifts, dims))


VIEWS: dict[str, Any] = {
    "view": view, "_unsafe_view": view, "_reshape_alias": lambda f, a, k: view(f, a[:2], k), "permute": permute,
    "transpose": transpose, "t": transpose, "unsqueeze": unsqueeze, "squeeze": squeeze, "expand": expand,
    "repeat": repeat, "slice": slice_, "select": select, "split": split, "split_with_sizes": split, "unbind": unbind,
    "cat": cat, "stack": stack, "index_select": index_select, "index": index, "flip": flip, "embedding": embedding,
    "gather": gather, "pixel_shuffle": pixel_shuffle, "pixel_unshuffle": pixel_unshuffle,
    "roll": roll,
}  # fmt: skip
