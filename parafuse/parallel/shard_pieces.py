"""Rules of `shard_rules` for tensors one after another and pieces of them: concatenation, padding, slices, splits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from parafuse.errors import UnsupportedError
from parafuse.parallel.layout import Layout
from parafuse.parallel.shard import Sharded


def cat(func: Any, args: Any, kwargs: Any) -> Any:
    """Streams one after another along the token dim, or features side by side."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return join(list(args[0]), dim)


def lead_of(args: Any) -> Sharded:
    """The first split tensor among `args`."""
    return next(a for a in args if isinstance(a, Sharded))


def join(tensors: list[Any], dim: int) -> Any:
    """The concatenation of tensors of which at least one is split, or NotImplemented."""
    lead = lead_of(tensors)
    dim = dim % lead.ndim
    tensors = [t for t in tensors if t.ndim == lead.ndim]  # torch allows an empty 1-d tensor among others
    if any(isinstance(t, Sharded) and t.token_dim != lead.token_dim for t in tensors):
        return NotImplemented
    parts: list[Tensor] = []
    lengths: list[int] = []
    for t in tensors:
        if dim != lead.token_dim and t.shape[lead.token_dim] != lead.tokens.total:
            return NotImplemented
        layout = t.tokens if isinstance(t, Sharded) else Layout((t.shape[lead.token_dim],), lead.tokens.degree)
        if dim != lead.token_dim and layout != lead.tokens:  # cut whole tensors, and others again, as the first one is
            layout = lead.tokens
            parts.append(lead.ranks.take(t.whole() if isinstance(t, Sharded) else t, lead.token_dim, layout))
        else:
            parts.append(t.local if isinstance(t, Sharded) else lead.ranks.take(t, lead.token_dim, layout))
        lengths += layout.lengths
    layout = Layout(tuple(lengths), lead.tokens.degree) if dim == lead.token_dim else lead.tokens
    return Sharded(torch.cat(parts, dim), lead.token_dim, layout, lead.ranks)


def stack(func: Any, args: Any, kwargs: Any) -> Any:
    """Tensors of the same rows side by side in a new dim."""
    tensors = list(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    lead = lead_of(tensors)
    dim = dim % (lead.ndim + 1)
    if not all(isinstance(t, Sharded) and (t.token_dim, t.tokens) == (lead.token_dim, lead.tokens) for t in tensors):
        return NotImplemented
    return lead.like(torch.stack([t.local for t in tensors], dim), lead.token_dim + (dim <= lead.token_dim))


def pad(func: Any, args: Any, kwargs: Any) -> Any:
    """Padding of features; along the tokens, constant rows before and after."""
    given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    x, widths = given["input"], list(given["pad"])
    at = 2 * (x.ndim - 1 - x.token_dim)
    before, after = (widths[at], widths[at + 1]) if len(widths) > at else (0, 0)
    if given.get("mode", "constant") != "constant" or before < 0 or after < 0:
        return NotImplemented
    value = given.get("value") or 0
    if len(widths) > at:
        widths[at] = widths[at + 1] = 0
    padded = x.like(torch.nn.functional.pad(x.local, widths, value=value)) if any(widths) else x

    def rows(count: int) -> list[Tensor]:
        shape = [count if d == x.token_dim else size for d, size in enumerate(padded.shape)]
        return [padded.local.new_full(shape, value)] if count else []

    pieces = [*rows(before), padded, *rows(after)]
    return join(pieces, x.token_dim) if len(pieces) > 1 else padded


def _part(x: Sharded, start: int, stop: int) -> tuple[Sharded, Layout, slice]:
    """(a tensor of the same values, layout and local slice of tokens [start, stop)): as `x` is split, if both bounds
    are those of segments; else gathered and split anew with bounds there."""
    found = x.tokens.select(start, stop)
    if found is None:
        x = x.resplit((start, stop))
        found = x.tokens.select(start, stop)
    if found is None:
        raise UnsupportedError(f"tokens {start} to {stop} of {x.tokens}")
    layout, first, rows = found
    return x, layout, slice(first, first + rows)


def getitem(func: Any, args: Any, kwargs: Any) -> Any:
    """Slices along the token dim; slices, numbers, None and Ellipsis along the others."""
    x, index = args
    found = _indices(x, index)
    if found is None:
        return NotImplemented
    entries, tokens, token_dim = found
    start, stop, step = tokens.indices(x.tokens.total)
    if step != 1:
        return NotImplemented
    source, layout, local = _part(x, start, max(start, stop))
    return source.part(source.local[tuple(local if e is tokens else e for e in entries)], token_dim, layout)


def _indices(x: Any, index: Any) -> tuple[list[Any], slice, int] | None:
    """(an entry for every dim and None, the entry of the token dim, the token dim of the result), or None."""
    index = list(index) if isinstance(index, tuple) else [index]
    plain = all(i is None or i is Ellipsis or type(i) in (int, slice) for i in index)
    if not isinstance(x, Sharded) or not plain:
        return None
    taken = sum(i is not None and i is not Ellipsis for i in index)
    at = next((n for n, i in enumerate(index) if i is Ellipsis), len(index))
    index[at : at + 1] = [slice(None) for _ in range(x.ndim - taken)]
    dim = place = 0
    for n, entry in enumerate(index):
        if entry is not None and dim == x.token_dim:
            if not isinstance(entry, slice):
                return None
            index[n] = tokens = slice(entry.start, entry.stop, entry.step)  # a slice of its own, told by identity
            return index, tokens, place
        dim += entry is not None
        place += not isinstance(entry, int)
    return None


def setitem(func: Any, args: Any, kwargs: Any) -> Any:
    """Values written into whole segments: in place, on this rank's rows."""
    x, index, value = args
    found = _indices(x, index)
    if found is None:
        return NotImplemented
    entries, tokens, token_dim = found
    start, stop, step = tokens.indices(x.tokens.total)
    stop = max(start, stop)
    selected = x.tokens.select(start, stop) if step == 1 else None
    if selected is None:
        return NotImplemented
    layout, first, rows = selected
    if isinstance(value, Tensor):
        from_right = sum(not isinstance(e, int) for e in entries) - token_dim
        if isinstance(value, Sharded):
            if value.ndim - value.token_dim != from_right or value.tokens.total != layout.total:
                return NotImplemented
            value = value.local if value.tokens == layout else x.ranks.take(value.whole(), value.token_dim, layout)
        elif value.ndim >= from_right and value.shape[-from_right] == layout.total != 1:
            value = x.ranks.take(value, value.ndim - from_right, layout)
    local = slice(first, first + rows)
    x.local[tuple(local if e is tokens else e for e in entries)] = value
    return None


def split(func: Any, args: Any, kwargs: Any) -> Any:
    """split / chunk along the token dim or another one."""
    x, how = args[0], args[1] if len(args) > 1 else next(v for name, v in kwargs.items() if name != "dim")
    if not isinstance(x, Sharded):
        return NotImplemented
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.ndim
    if dim != x.token_dim:
        return tuple(x.like(part) for part in func(x.local, how, dim))
    sizes = [len(part) for part in func(torch.empty(x.tokens.total, device="meta"), how)]
    bounds = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    if any(x.tokens.select(a, b) is None for a, b in pairwise(bounds)):
        x = x.resplit(tuple(sorted(set(bounds))))  # one gather for all parts
    index = [slice(None)] * dim
    return tuple(getitem(func, (x, (*index, slice(a, b))), {}) for a, b in pairwise(bounds))


def unbind(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % args[0].ndim
    if dim == x.token_dim:
        return NotImplemented
    return tuple(x.like(part, x.token_dim - (dim < x.token_dim)) for part in x.local.unbind(dim))
