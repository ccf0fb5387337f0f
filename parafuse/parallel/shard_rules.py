"""What torch functions do on a rank's rows alone. A rule either gives exactly what the function gives on the whole
tensors, as rows, or NotImplemented; then the tensors are gathered first.

So no rule decides whether a result is right, only what it costs. `RULES` is by function name, for functions and
methods alike (`torch.reshape`, `Tensor.reshape`). Rules of pieces and views stand in files of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parafuse.parallel import shard_pieces as pieces
from parafuse.parallel import shard_views as views
from parafuse.parallel.shard import Sharded


class _Mismatch(Exception):
    """Two operands are split differently."""


def _pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise functions with broadcasting: whole operands give this rank's rows of their token dim, and operands
    that are split elsewhere in the same stream are split again."""
    operands = [*args, *kwargs.values()]
    lead = pieces.lead_of(operands)
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


def _cast(func: Any, args: Any, kwargs: Any) -> Any:
    """to and type_as: of a tensor that is given second, only dtype and device count."""
    x, *others = args
    others = [other.local if isinstance(other, Sharded) else other for other in others]
    if not isinstance(x, Sharded):
        return func(x, *others, **kwargs)
    result = func(x.local, *others, **kwargs)
    return x if result is x.local else x.like(result)


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


def _baddbmm(func: Any, args: Any, kwargs: Any) -> Any:
    """beta * x + alpha * (a @ b): scores of attention that is written out."""
    if len(args) != 3 or not any(isinstance(a, Sharded) for a in args[1:]):
        return NotImplemented
    product = _matmul(torch.matmul, args[1:], {})
    if not isinstance(product, Sharded):
        return NotImplemented
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    scaled = _pointwise(torch.mul, (product, alpha), {})
    return scaled if beta == 0 else _pointwise(torch.add, (scaled, args[0]), {"alpha": beta})


_POINTWISE = (
    "add sub mul div true_divide neg abs exp log pow square sqrt rsqrt reciprocal sigmoid tanh silu relu gelu "
    "leaky_relu clip clamp where lerp addcmul nan_to_num dropout float half bfloat16 double bool long int type "
    "contiguous clone detach sin cos erf softplus hardtanh relu6 maximum minimum masked_fill rsub "
    "logical_and logical_or logical_not eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ "
    "__invert__ __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ __neg__ __pow__ "
    "__rpow__ __iadd__ __imul__ __isub__ __itruediv__ add_ mul_ sub_ div_ silu_ relu_ clamp_ real imag"
).split()
RULES: dict[str, Any] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(("to", "type_as"), _cast),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like"), _like),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"), _new),
    **dict.fromkeys(("linear", "layer_norm", "rms_norm"), _last_dims),
    **dict.fromkeys(("softmax", "log_softmax", "sum", "mean", "amax", "amin"), _one_dim),
    "embedding": _embedding,
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("cat", "concat", "concatenate"), pieces.cat),
    "stack": pieces.stack,
    "pad": pieces.pad,
    "__getitem__": pieces.getitem,
    "__setitem__": pieces.setitem,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), pieces.split),
    "unbind": pieces.unbind,
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), views.reshape),
    **dict.fromkeys(("expand", "expand_as"), views.expand),
    **dict.fromkeys(("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint"), views.permute),
    **dict.fromkeys(("view_as_complex", "view_as_real"), views.complex_pairs),
    "repeat": views.repeat,
    **dict.fromkeys(("matmul", "__matmul__", "bmm"), _matmul),
    "baddbmm": _baddbmm,
}
