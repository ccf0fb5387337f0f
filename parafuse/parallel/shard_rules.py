"""What torch functions do on a rank's rows alone. A rule either gives exactly what the function gives on the whole
tensors, as rows, or NotImplemented; then the tensors are gathered first.

So no rule decides whether a result is right, only what it costs. `RULES` is by function name, for functions and
methods alike (`torch.reshape`, `Tensor.reshape`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from parafuse.errors import UnsupportedError
from parafuse.parallel.layout import Layout
from parafuse.parallel.shard import Sharded


def _first(args: Any) -> Sharded:
    return next(a for a in args if isinstance(a, Sharded))


class _Mismatch(Exception):
    """Two operands are split differently."""


def _pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise functions with broadcasting: whole operands give this rank's rows of their token dim, and operands
    that are split elsewhere in the same stream are split again."""
    operands = [*args, *kwargs.values()]
    lead = _first(operands)
    from_right = lead.ndim - lead.token_dim

    def rows(x: Any) -> Any:
        if isinstance(x, Sharded):
            if x.ndim - x.token_dim != from_right or x.tokens.total != lead.tokens.total:
                raise _Mismatch
            return x.local if x.tokens == lead.tokens else lead.ranks.take(x.whole(), x.token_dim, lead.tokens)
        if isinstance(x, Tensor) and x.ndim >= from_right and x.shape[-from_right] == lead.tokens.total != 1:
            return lead.ranks.take(x, x.ndim - from_right, lead.tokens)
        return x

    try:
        result = func(*(rows(a) for a in args), **{k: rows(v) for k, v in kwargs.items()})
    except _Mismatch:
        return NotImplemented
    if isinstance(args[0], Sharded) and result is args[0].local:
        return args[0]
    if not isinstance(result, Tensor):
        return result
    return lead.like(result, result.ndim - from_right)


def _like(func: Any, args: Any, kwargs: Any) -> Any:
    """zeros_like and its kind: a tensor of the same rows."""
    return args[0].like(func(args[0].local, *args[1:], **kwargs)) if isinstance(args[0], Sharded) else NotImplemented


def _new(func: Any, args: Any, kwargs: Any) -> Any:
    """new_zeros and its kind: of a tensor that is asked for, only dtype and device count."""
    return func(args[0].local, *args[1:], **kwargs) if isinstance(args[0], Sharded) else NotImplemented


def _last_dims(func: Any, args: Any, kwargs: Any) -> Any:
    """linear and norms over the last dims: row by row as long as the token dim is before them."""
    x = args[0]
    others = [*args[1:], *kwargs.values()]
    normalized = next((len(o) for o in others if isinstance(o, (tuple, list, torch.Size))), 1)
    if not isinstance(x, Sharded) or any(isinstance(o, Sharded) for o in others) or x.token_dim >= x.ndim - normalized:
        return NotImplemented
    return x.like(func(x.local, *args[1:], **kwargs))


def _one_dim(func: Any, args: Any, kwargs: Any) -> Any:
    """softmax, sums and their kind over a dim (or dims) other than the token dim."""
    x = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(x, Sharded) or dims is None or isinstance(dims, Tensor):
        return NotImplemented
    dims = [d % x.ndim for d in (dims if isinstance(dims, (tuple, list)) else (dims,))]
    if x.token_dim in dims:
        return NotImplemented
    result = func(x.local, *args[1:], **kwargs)
    if not isinstance(result, Tensor):
        return NotImplemented
    gone = sum(d < x.token_dim for d in dims) if result.ndim < x.ndim else 0
    return x.like(result, x.token_dim - gone)


def _embedding(func: Any, args: Any, kwargs: Any) -> Any:
    """Rows of a table for token ids."""
    ids = args[0]
    if not isinstance(ids, Sharded) or any(isinstance(a, Sharded) for a in args[1:]):
        return NotImplemented
    return ids.like(func(ids.local, *args[1:], **kwargs))


def _repeat_interleave(func: Any, args: Any, kwargs: Any) -> Any:
    """Heads repeated."""
    x, repeats = args[0], args[1] if len(args) > 1 else kwargs.get("repeats")
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if not isinstance(x, Sharded) or not isinstance(repeats, int) or dim is None or dim % x.ndim == x.token_dim:
        return NotImplemented
    return x.like(func(x.local, *args[1:], **kwargs))


# --- streams one after another ------------------------------------------------------------------------------------


def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    """Streams one after another along the token dim, or features side by side."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return join(list(args[0]), dim)


def join(tensors: list[Any], dim: int) -> Any:
    """The concatenation of tensors of which at least one is split, or NotImplemented."""
    lead = _first(tensors)
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


def _stack(func: Any, args: Any, kwargs: Any) -> Any:
    """Tensors of the same rows side by side in a new dim."""
    tensors = list(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    lead = _first(tensors)
    dim = dim % (lead.ndim + 1)
    if not all(isinstance(t, Sharded) and (t.token_dim, t.tokens) == (lead.token_dim, lead.tokens) for t in tensors):
        return NotImplemented
    return lead.like(torch.stack([t.local for t in tensors], dim), lead.token_dim + (dim <= lead.token_dim))


def _pad(func: Any, args: Any, kwargs: Any) -> Any:
    """Padding of features; along the tokens, constant rows before and after."""
    given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    x, pad = given["input"], list(given["pad"])
    at = 2 * (x.ndim - 1 - x.token_dim)
    before, after = (pad[at], pad[at + 1]) if len(pad) > at else (0, 0)
    if given.get("mode", "constant") != "constant" or before < 0 or after < 0:
        return NotImplemented
    value = given.get("value") or 0
    if len(pad) > at:
        pad[at] = pad[at + 1] = 0
    padded = x.like(torch.nn.functional.pad(x.local, pad, value=value)) if any(pad) else x

    def rows(count: int) -> list[Tensor]:
        shape = [count if d == x.token_dim else size for d, size in enumerate(padded.shape)]
        return [padded.local.new_full(shape, value)] if count else []

    pieces = [*rows(before), padded, *rows(after)]
    return join(pieces, x.token_dim) if len(pieces) > 1 else padded


# --- pieces -------------------------------------------------------------------------------------------------------


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


def _getitem(func: Any, args: Any, kwargs: Any) -> Any:
    """Slices along the token dim; slices, numbers, None and Ellipsis along the others."""
    x, index = args
    found = _indices(x, index)
    if found is None:
        return NotImplemented
    entries, tokens, token_dim = found
    start, stop, step = tokens.indices(x.tokens.total)
    if step != 1:
        return NotImplemented
    split, layout, local = _part(x, start, max(start, stop))
    return Sharded(split.local[tuple(local if e is tokens else e for e in entries)], token_dim, layout, x.ranks)


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


def _setitem(func: Any, args: Any, kwargs: Any) -> Any:
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


def _split(func: Any, args: Any, kwargs: Any) -> Any:
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
    return tuple(_getitem(func, (x, (*index, slice(a, b))), {}) for a, b in pairwise(bounds))


def _unbind(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % args[0].ndim
    if dim == x.token_dim:
        return NotImplemented
    return tuple(x.like(part, x.token_dim - (dim < x.token_dim)) for part in x.local.unbind(dim))


# --- other shapes of the same values ------------------------------------------------------------------------------


def _follow(x: Sharded, func: Any, args: Any, kwargs: Any) -> tuple[list[int], int] | None:
    """(shape of the result, its token dim) of a function that only moves dims; None where tokens do not stay one dim.

    The function runs on a tensor without data in which only a step along the tokens moves in memory."""
    if x.tokens.total == 1:
        return None
    strides = [int(d == x.token_dim) for d in range(x.ndim)]
    empty = torch.empty_strided(x.shape, strides, device="meta", dtype=x.dtype)
    try:
        found = func(empty, *args, **kwargs)
    except RuntimeError:  # `view` of what cannot be viewed
        return None
    if found.untyped_storage()._cdata != empty.untyped_storage()._cdata or found.dtype != x.dtype:
        return None
    moving = [d for d in range(found.ndim) if found.stride(d) and found.shape[d] > 1]
    if len(moving) != 1 or found.shape[moving[0]] != x.tokens.total:
        return None
    return list(found.shape), moving[0]


def _reshape(func: Any, args: Any, kwargs: Any) -> Any:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: no dim changes places."""
    x = args[0]
    followed = _follow(x, func, args[1:], kwargs) if isinstance(x, Sharded) else None
    if followed is None:
        return NotImplemented
    shape, dim = followed
    shape[dim] = x.local.shape[x.token_dim]
    return x.like(x.local.reshape(shape), dim)


def _expand(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if isinstance(x, Sharded) and len(args) == 2 and isinstance(args[1], Tensor):  # expand_as
        func, args = Tensor.expand, (x, args[1].shape)
    followed = _follow(x, func, args[1:], kwargs) if isinstance(x, Sharded) else None
    if followed is None:
        return NotImplemented
    shape, dim = followed
    shape[dim] = x.local.shape[x.token_dim]
    return x.like(x.local.expand(shape), dim)


def _permute(func: Any, args: Any, kwargs: Any) -> Any:
    """transpose, permute, movedim and their kind."""
    x = args[0]
    strides = [int(d == x.token_dim) for d in range(x.ndim)]
    found = func(torch.empty_strided([2] * x.ndim, strides, device="meta"), *args[1:], **kwargs)
    return x.like(func(x.local, *args[1:], **kwargs), next(d for d in range(x.ndim) if found.stride(d)))


def _complex(func: Any, args: Any, kwargs: Any) -> Any:
    """Pairs of the last dim as complex numbers, and back."""
    x = args[0]
    return x.like(func(x.local)) if x.token_dim < x.ndim - (func.__name__ == "view_as_complex") else NotImplemented


def _repeat(func: Any, args: Any, kwargs: Any) -> Any:
    """Copies along other dims than the tokens'."""
    x = args[0]
    times = list(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else list(args[1:])
    new = len(times) - x.ndim
    if kwargs or new < 0 or times[new + x.token_dim] != 1:
        return NotImplemented
    return x.like(x.local.repeat(times), new + x.token_dim)


# --- products -----------------------------------------------------------------------------------------------------


def _matmul(func: Any, args: Any, kwargs: Any) -> Any:
    """(..., M, K) @ (..., K, N): tokens in M or N stay split; in K the ranks' sums are added; in a batch dim they must
    be the same on both sides. Rows against split columns gather the columns."""
    if len(args) != 2 or kwargs or not all(isinstance(a, Tensor) and a.ndim >= 2 for a in args):
        return NotImplemented
    a, b = args
    if isinstance(a, Sharded) and isinstance(b, Sharded):
        a_right, b_right = a.ndim - a.token_dim, b.ndim - b.token_dim
        if a_right == b_right > 2 and a.tokens == b.tokens:
            result = a.local @ b.local
            return a.like(result, result.ndim - a_right)
        if (a_right, b_right) == (1, 2) and a.tokens == b.tokens:
            a.ranks.work["sum over tokens"] += 1
            return a.ranks.sum(a.true_rows() @ b.true_rows())  # filler may be no number
        if a_right == 2 and b_right < 3:
            a.ranks.work["rows times gathered tokens"] += 1
            result = a.local @ b.whole()
            return a.like(result, result.ndim - 2)
        return NotImplemented
    split, from_right = (a, a.ndim - a.token_dim) if isinstance(a, Sharded) else (b, b.ndim - b.token_dim)
    if (split is a and from_right == 2) or (split is b and from_right == 1):
        result = (a.local if split is a else a) @ (b.local if split is b else b)
        return split.like(result, result.ndim - from_right)
    whole = b if split is a else a
    if from_right > 2 and (whole.ndim < from_right or whole.shape[-from_right] == 1):
        result = (a.local if split is a else a) @ (b.local if split is b else b)
        return split.like(result, result.ndim - from_right)
    return NotImplemented


_POINTWISE = (
    "add sub mul div true_divide neg abs exp log pow square sqrt rsqrt reciprocal sigmoid tanh silu relu gelu "
    "leaky_relu clip clamp where lerp addcmul nan_to_num dropout float half bfloat16 double bool long int to type "
    "type_as contiguous clone detach sin cos erf softplus hardtanh relu6 maximum minimum masked_fill rsub "
    "logical_and logical_or logical_not eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ "
    "__invert__ __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ __neg__ __pow__ "
    "__rpow__ __iadd__ __imul__ __isub__ __itruediv__ add_ mul_ sub_ div_ silu_ relu_ clamp_ real imag"
).split()
RULES: dict[str, Any] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like"), _like),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"), _new),
    **dict.fromkeys(("linear", "layer_norm", "rms_norm"), _last_dims),
    **dict.fromkeys(("softmax", "log_softmax", "sum", "mean", "amax", "amin"), _one_dim),
    "embedding": _embedding,
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    "pad": _pad,
    "__getitem__": _getitem,
    "__setitem__": _setitem,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    "unbind": _unbind,
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("expand", "expand_as"), _expand),
    **dict.fromkeys(("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint"), _permute),
    **dict.fromkeys(("view_as_complex", "view_as_real"), _complex),
    "repeat": _repeat,
    **dict.fromkeys(("matmul", "__matmul__", "bmm"), _matmul),
}
