"""Whole tensors to a rank's rows and back, and the tensor type that carries rows between blocks.

Between two blocks a model's own code may touch the token tensors: concatenate streams, add a residual, slice the text
away, project, reshape. `Sharded` lets that code run as written: it shows the global shape, does what can be done on a
rank's rows alone (exactly), and gathers before anything else. What is returned to the pipeline is always whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map_only

from parafuse.errors import UnsupportedError
from parafuse.parallel.comm import all_gather
from parafuse.parallel.layout import Layout


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a sequence. `group` is None in simulations, which never gather."""

    degree: int
    rank: int
    group: ProcessGroup | None

    def take(self, whole: Tensor, dim: int, layout: Layout) -> Tensor:
        """This rank's rows of `whole` along `dim`, filler (zeros) included; no communication."""
        rows: list[Tensor] = []
        offset = 0
        for length, part, (start, count) in zip(layout.lengths, layout.parts, layout.spans(self.rank), strict=True):
            rows.append(whole.narrow(dim, offset + start, count))
            if count < part:
                shape = list(whole.shape)
                shape[dim] = part - count
                rows.append(whole.new_zeros(shape))
            offset += length
        return rows[0].contiguous() if len(rows) == 1 else torch.cat(rows, dim)

    def gather(self, local: Tensor, dim: int, layout: Layout) -> Tensor:
        """The whole tensor from every rank's rows. Collective on the sequence group."""
        if self.group is None:
            raise UnsupportedError("a simulated rank cannot gather")
        everyone = all_gather(local, self.degree, self.group.group_name)
        pieces, offset = [], 0
        for length, part in zip(layout.lengths, layout.parts, strict=True):
            piece = everyone.narrow(dim + 1, offset, part).movedim(0, dim).flatten(dim, dim + 1)
            pieces.append(piece.narrow(dim, 0, length))
            offset += part
        return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim)


class Sharded(Tensor):
    """A token tensor of which each rank holds its rows. Shape, dtype and device are those of the whole tensor."""

    local: Tensor
    token_dim: int
    tokens: Layout
    ranks: SequenceGroup

    @staticmethod
    def __new__(cls, local: Tensor, dim: int, layout: Layout, ranks: SequenceGroup) -> Sharded:
        if local.shape[dim] != layout.local:
            raise UnsupportedError(f"{local.shape[dim]} rows along dim {dim}, where {layout} has {layout.local}")
        shape = list(local.shape)
        shape[dim] = layout.total
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        self.local, self.token_dim, self.tokens, self.ranks = local, dim, layout, ranks
        return self

    def like(self, local: Tensor, dim: int | None = None) -> Sharded:
        """The same rows with other values; `dim` where the number of dims changed."""
        return Sharded(local, self.token_dim if dim is None else dim, self.tokens, self.ranks)

    def whole(self) -> Tensor:
        """Gathers. Collective on the sequence group."""
        return self.ranks.gather(self.local, self.token_dim, self.tokens)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Sharded(local={tuple(self.local.shape)}, dim={self.token_dim}, {self.tokens})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = func.__name__
        target = kwargs.get("out")
        if args and ((name.endswith("_") and not name.startswith("__")) or name == "__setitem__"):
            target = args[0]
        into_whole = target is not None and not isinstance(target, Sharded)  # it stays whole, under all its names
        rule = _RULES.get(name)
        if rule is not None and args and not into_whole and "out" not in kwargs:
            with torch._C.DisableTorchFunctionSubclass():
                result = rule(func, args, kwargs)
            if result is not NotImplemented:
                return result
        if isinstance(target, Sharded):
            raise UnsupportedError(f"between blocks, the model changes token rows in place by {name!r}")
        args, kwargs = gather_all((args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = gather_all((args, kwargs or {}))
        return func(*args, **kwargs)


def gather_all(tree: Any) -> Any:
    """The same nest with every Sharded made whole. Collective where there is one."""
    return tree_map_only(Sharded, lambda x: x.whole(), tree)


def _first(args: Any) -> Sharded:
    return next(a for a in args if isinstance(a, Sharded))


def _pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise functions with broadcasting: whole operands give this rank's rows of their token dim."""
    operands = [*args, *kwargs.values()]
    lead = _first(operands)
    from_right = lead.ndim - lead.token_dim

    def rows(x: Any) -> Any:
        if isinstance(x, Sharded):
            if x.tokens != lead.tokens or x.ndim - x.token_dim != from_right:
                raise _Mismatch
            return x.local
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


class _Mismatch(Exception):
    """Two operands are split differently."""


def _last_dims(func: Any, args: Any, kwargs: Any) -> Any:
    """linear and norms over the last dims: row by row as long as the token dim is before them."""
    x = args[0]
    others = [*args[1:], *kwargs.values()]
    normalized = next((len(o) for o in others if isinstance(o, (tuple, list, torch.Size))), 1)
    if not isinstance(x, Sharded) or any(isinstance(o, Sharded) for o in others) or x.token_dim >= x.ndim - normalized:
        return NotImplemented
    return x.like(func(x.local, *args[1:], **kwargs))


def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    """Streams one after another along the token dim, or features side by side."""
    tensors = list(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    lead = _first(tensors)
    dim = dim % lead.ndim
    if any(isinstance(t, Sharded) and t.token_dim != lead.token_dim for t in tensors):
        return NotImplemented
    parts: list[Tensor] = []
    lengths: list[int] = []
    for t in tensors:
        layout = t.tokens if isinstance(t, Sharded) else Layout((t.shape[lead.token_dim],), lead.tokens.degree)
        if dim != lead.token_dim and layout != lead.tokens:
            return NotImplemented
        parts.append(t.local if isinstance(t, Sharded) else lead.ranks.take(t, lead.token_dim, layout))
        lengths += layout.lengths
    layout = Layout(tuple(lengths), lead.tokens.degree) if dim == lead.token_dim else lead.tokens
    return Sharded(torch.cat(parts, dim), lead.token_dim, layout, lead.ranks)


def _getitem(func: Any, args: Any, kwargs: Any) -> Any:
    """Plain slices: whole segments along the token dim, anything along the others."""
    x, index = args
    index = index if isinstance(index, tuple) else (index,)
    if not isinstance(x, Sharded) or not all(i is Ellipsis or isinstance(i, slice) for i in index):
        return NotImplemented
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (x.ndim - len(index) + 1), *index[at + 1 :])
    slices = list(index) + [slice(None)] * (x.ndim - len(index))
    start, stop, step = slices[x.token_dim].indices(x.tokens.total)
    found = x.tokens.select(start, stop) if step == 1 else None
    if found is None:
        return NotImplemented
    layout, first, rows = found
    slices[x.token_dim] = slice(first, first + rows)
    return Sharded(x.local[tuple(slices)], x.token_dim, layout, x.ranks)


def _split(func: Any, args: Any, kwargs: Any) -> Any:
    """split / chunk: by whole segments along the token dim (given sizes), or along another dim."""
    x, how = args[0], args[1] if len(args) > 1 else next(v for name, v in kwargs.items() if name != "dim")
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.ndim
    if dim != x.token_dim:
        return tuple(x.like(part) for part in func(x.local, how, dim))
    if isinstance(how, int):
        return NotImplemented
    out, start = [], 0
    for size in how:
        out.append(_getitem(func, (x, (*[slice(None)] * x.token_dim, slice(start, start + size))), kwargs))
        start += size
    return NotImplemented if any(part is NotImplemented for part in out) else tuple(out)


_ATTRIBUTES = "shape dtype device ndim requires_grad is_cuda is_meta layout is_quantized grad_fn is_sparse is_leaf"
_METADATA = {
    *(vars(torch._C.TensorBase)[name].__get__ for name in _ATTRIBUTES.split()),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.__len__, Tensor.get_device, Tensor.__hash__, Tensor.element_size),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
_POINTWISE = (
    "add sub mul div true_divide neg abs exp log pow square sqrt rsqrt reciprocal sigmoid tanh silu relu gelu "
    "leaky_relu clip clamp where lerp addcmul nan_to_num dropout float half bfloat16 to type type_as "
    "contiguous clone detach "
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __neg__ __pow__ __iadd__ __imul__ "
    "__isub__ __itruediv__ add_ mul_ sub_ div_ silu_ relu_ clamp_"
).split()
_RULES: dict[str, Any] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(("linear", "layer_norm", "rms_norm"), _last_dims),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "__getitem__": _getitem,
}
