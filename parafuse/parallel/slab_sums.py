"""Rules for what sums over rows: reductions, norms, softmax, products of matrices, attention.

A sum over the split dim is a sum of each rank's part and one exchange; statistics are (count, mean, sum of squared
deviations), merged in fp64 (Chan et al. 1979), so that a mean far from zero loses nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from parafuse.parallel.slab import Cut, Slab, lead_of, refuse

aten: Any = torch.ops.aten


def _dims(x: Tensor, dims: Any) -> list[int]:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(x.ndim))
    return [d % x.ndim for d in (dims if isinstance(dims, (list, tuple)) else (dims,))]


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments by name."""
    names = func._schema.arguments
    given = {a.name: a.default_value for a in names if a.has_default_value()}
    return given | {a.name: value for a, value in zip(names, args, strict=False)} | kwargs


def _off(x: Slab, dims: list[int], keepdim: bool) -> Cut:
    """The cut of what is left after other dims were reduced."""
    return x.cut if keepdim else x.cut.at(x.cut.dim - sum(d < x.cut.dim for d in dims))


def reduce(func: Any, args: Any, kwargs: Any) -> Any:
    """Sums, means, extremes and norms over some dims."""
    named = _arguments(func, args, kwargs)
    x, keepdim = named.get("self", args[0]), bool(named.get("keepdim", False))
    dims = _dims(x, named.get("dim"))
    if x.cut.dim not in dims:
        result = func(*(x.local if a is x else a for a in args), **kwargs)
        one = result[0] if isinstance(result, (tuple, list)) else result
        cut = _off(x, dims, one.ndim == x.ndim)
        return tuple(x.like(r, cut) for r in result) if isinstance(result, (tuple, list)) else x.like(result, cut)
    name = func.overloadpacket.__name__
    if name in ("sum", "mean"):
        wide = named.get("dtype") or (x.dtype if x.is_floating_point() else torch.int64)
        part = x.local.sum(
            dims, keepdim=keepdim, dtype=torch.promote_types(wide, torch.float32) if wide.is_floating_point else wide
        )
        total = x.ranks.sum(part)
        return (total / math.prod(x.shape[d] for d in dims) if name == "mean" else total).to(wide)
    if name in ("amax", "amin", "max", "min", "any", "all") and len(func._schema.returns) == 1:
        least = name in ("amin", "min", "all")
        local = x.local
        if local.numel() == 0:  # of no rows the least is the greatest number
            shape = [1 if d == x.cut.dim else size for d, size in enumerate(x.shape)]
            kind = None if x.dtype == torch.bool else (torch.finfo if x.is_floating_point() else torch.iinfo)(x.dtype)
            local = x.local.new_full(shape, (least if kind is None else kind.max if least else kind.min))
        everyone = x.ranks.gather((local.amin if least else local.amax)(dims, keepdim=keepdim))
        return everyone.amin(0) if least else everyone.amax(0)
    if name == "linalg_vector_norm" and named["ord"] == 2:
        part = x.local.float().square().sum(dims, keepdim=keepdim)
        return x.ranks.sum(part).sqrt().to(named.get("dtype") or x.dtype)
    raise refuse(name, "over the split dim")


def variance(func: Any, args: Any, kwargs: Any) -> Any:
    """var, std and var_mean."""
    named = _arguments(func, args, kwargs)
    x, dims, keepdim = args[0], _dims(args[0], named.get("dim")), bool(named.get("keepdim", False))
    name = func.overloadpacket.__name__
    if x.cut.dim not in dims:
        result, cut = func(x.local, *args[1:], **kwargs), _off(x, dims, keepdim)
        return tuple(x.like(r, cut) for r in result) if isinstance(result, tuple) else x.like(result, cut)
    correction = named.get("correction")
    if correction is None:
        correction = 1 if named.get("unbiased", True) else 0
    local = x.local.double()
    mean = local.mean(dims, keepdim=True).nan_to_num()
    squares = (local - mean).square().sum(dims, keepdim=True)
    total, mean = _merged(x, mean, squares)
    count = math.prod(x.shape[d] for d in dims)
    var = total / max(count - correction, 0)
    if not keepdim:
        var, mean = var.squeeze(dims), mean.squeeze(dims)
    var = (var.sqrt() if name.startswith("std") else var).to(x.dtype)
    return (var, mean.to(x.dtype)) if name.endswith("_mean") else var


def _merged(x: Slab, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squared deviations and mean over all ranks, from those of each. One exchange."""
    lengths = [x.cut.length(r) for r in range(x.ranks.degree)]
    share = torch.tensor(lengths, dtype=torch.float64, device=mean.device).view(-1, *[1] * mean.ndim)
    per_row = x.numel() / x.cut.total / mean.numel()  # values of one row in each statistic
    means, sums = x.ranks.gather(torch.stack([mean, squares])).double().unbind(1)
    whole = (means * share).sum(0) / sum(lengths)
    return (sums + share * per_row * (means - whole).square()).sum(0), whole


def group_norm(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias, n, c, _, groups, eps = args
    if x.cut.dim == 0:
        each = x.local.shape[0]
        result = func(x.local, weight, bias, each, c, x.local.numel() // max(each * c, 1), groups, eps)
        rows = Cut(0, x.cut.bounds, x.cut.outer)
        return tuple(x.like(r, rows) for r in result)
    if x.cut.dim == 1:
        raise refuse("group_norm", "over split channels")
    local = _dense(x.local)
    mean, squares = _channel_statistics(local, n, c)
    # channels of a group have the same count
    per_group = mean.view(n, groups, -1)
    group_mean = per_group.mean(-1)
    count = local.numel() // max(n * c, 1)
    spread = squares.view(n, groups, -1).sum(-1) + count * (per_group - group_mean[..., None]).square().sum(-1)
    total, group_mean = _merged(x, group_mean, spread)
    var = total / (x.numel() // (n * groups))
    wide = torch.promote_types(x.dtype, torch.float32)
    means, variances = (s.to(wide).repeat_interleave(c // groups, 1) for s in (group_mean, var))
    affine = [None if p is None else p.to(wide) for p in (weight, bias)]
    out = _normalized(local, means, variances, affine, eps)
    return x.like(out), group_mean.to(x.dtype), (var + eps).rsqrt().to(x.dtype)


def _dense(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.is_contiguous() or (x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])):
        return x
    return x.contiguous()


def _samples(x: Tensor) -> list[Tensor]:
    """(1, channels, ...) views in which statistics of channels are those of each sample and channel."""
    if x.is_contiguous():
        return [x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])]
    return list(x.split(1))


def _channel_statistics(x: Tensor, n: int, c: int) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each sample and channel, (n, c) in fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        return x.new_zeros((n, c), dtype=torch.float64), x.new_zeros((n, c), dtype=torch.float64)
    count, means, squares = x.numel() // (n * c), [], []
    for sample in _samples(x):
        zeros = x.new_zeros(sample.shape[1], dtype=wide)
        mean, var = torch.batch_norm_update_stats(sample, zeros, torch.ones_like(zeros), 0.0)
        means.append(mean.double())
        squares.append(var.double() * count)
    return torch.cat(means).view(n, c), torch.cat(squares).view(n, c)


def _normalized(x: Tensor, means: Tensor, variances: Tensor, affine: list[Tensor | None], eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias with statistics (n, c) in fp32, rounded once."""
    if x.numel() == 0:
        return x
    samples, out = _samples(x), []
    for n, sample in enumerate(samples):
        these = [s.reshape(-1) if len(samples) == 1 else s[n] for s in (means, variances)]
        repeats = sample.shape[1] // means.shape[1]
        weight, bias = (None if p is None else p.repeat(repeats) for p in affine)
        out.append(torch.nn.functional.batch_norm(sample, these[0], these[1], weight, bias, False, 0.0, eps))
    return out[0].view(x.shape) if len(out) == 1 else torch.cat(out)


def last_dims_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """layer_norm and rms_norm."""
    x, shape = args[0], args[1]
    if x.cut.dim >= x.ndim - len(shape):
        raise refuse(func.__name__, "over the split dim")
    result = func(x.local, *args[1:], **kwargs)
    return tuple(x.like(r) if r.ndim == x.ndim else r for r in result) if isinstance(result, tuple) else x.like(result)


def batch_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """With the statistics that the module has."""
    x, training = args[0], args[5] if "no_training" not in func.__name__ else False
    if training or x.cut.dim == 1:
        raise refuse("batch_norm", "with statistics of the batch")
    result = func(x.local, *args[1:], **kwargs)
    return x.like(result[0]), *result[1:]


def softmax(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], args[1] % args[0].ndim
    if dim != x.cut.dim:
        return x.like(func(x.local, *args[1:], **kwargs))
    if "log" in func.__name__ or x.cut.outer > 1:
        raise refuse(func.__name__, "over the split dim")
    local = x.local.float() if x.element_size() < 4 else x.local
    if local.shape[dim]:
        top = local.amax(dim, keepdim=True)
        part = (local - top).exp()
        total = part.sum(dim, keepdim=True)
    else:
        shape = [1 if d == dim else s for d, s in enumerate(x.shape)]
        part, top, total = local, local.new_full(shape, float("-inf")), local.new_zeros(shape)
    tops, totals = x.ranks.gather(torch.stack([top, total])).unbind(1)
    highest = tops.amax(0)
    total = (totals * (tops - highest).exp()).sum(0)
    return x.like((part * ((top - highest).exp() / total)).to(x.dtype))


def product(func: Any, args: Any, kwargs: Any) -> Any:
    """mm, bmm, mv-like products (..., M, K) @ (..., K, N)."""
    left, right = args
    lead = lead_of(args)
    first = left.ndim - 2
    roles = [x.cut.dim - first if isinstance(x, Slab) else None for x in args]
    l_role, r_role = ({-1: "batch", 0: "row", 1: "column"}[r] if r is not None else "" for r in roles)
    rank = lead.ranks.rank
    if "batch" in (l_role, r_role):
        a, b = (_batch_rows(x, lead, role) for x, role in ((left, l_role), (right, r_role)))
        return lead.like(func(a, b))
    if l_role == "row":
        return left.like(func(left.local, right.whole() if r_role else right))
    if r_role == "column":
        return right.like(func(left.whole() if l_role else left, right.local))
    cut = lead.cut  # the contracted dim
    a = left.local if left is lead else _contracted(left, first + 1, cut, rank)
    b = right.local if right is lead else _contracted(right, first, cut, rank)
    return lead.ranks.sum(func(a, b))


def _contracted(x: Any, dim: int, cut: Cut, rank: int) -> Tensor:
    if not isinstance(x, Slab):
        return cut.rows(x, dim, rank)
    if (x.cut.outer, x.cut.total) != (cut.outer, cut.total):
        raise refuse("matmul", f"over a dim that is split as {cut} and as {x.cut}")
    return x.recut(cut.bounds).local


def _batch_rows(x: Any, lead: Slab, role: str) -> Tensor:
    if role not in ("", "batch"):
        raise refuse("bmm", "of matrices split in the batch and in a dim of the matrices")
    if not role:
        return lead.cut.rows(x, 0, lead.ranks.rank)
    if (x.cut.outer, x.cut.total) != (lead.cut.outer, lead.cut.total):
        raise refuse("bmm", f"of batches that are split as {lead.cut} and as {x.cut}")
    return x.recut(lead.cut.bounds).local


def add_product(func: Any, args: Any, kwargs: Any) -> Any:
    """addmm and baddbmm."""
    first, left, right = args
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    result = product(aten.mm if left.ndim == 2 else aten.bmm, (left, right), {})
    result = result if alpha == 1 else result * alpha
    return result if beta == 0 else result + (first if beta == 1 else first * beta)


def linear(func: Any, args: Any, kwargs: Any) -> Any:
    """A projection of the last dim: row by row."""
    x = args[0] if args else kwargs.get("input")
    if not args or not isinstance(x, Slab) or x.cut.dim == x.ndim - 1:
        return NotImplemented
    with torch._C._EnableTorchFunction():  # weights in a form of their own, say, as torchao's
        return x.like(func(x.local, *args[1:], **kwargs))


def attention(func: Any, args: Any, kwargs: Any) -> Any:
    """scaled_dot_product_attention: each rank's queries see all keys."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    named = dict(zip(names, args, strict=False)) | kwargs
    q, k, v, mask = (named.pop(name, None) for name in names[:4])
    if named.get("dropout_p"):
        raise refuse("scaled_dot_product_attention", "with dropout")
    lead: Slab = q if isinstance(q, Slab) else lead_of((k, v))
    if isinstance(mask, Slab):
        mask = mask.whole()
    if lead.cut.dim < lead.ndim - 2:
        q, k, v, mask = (_of_batch(x, lead) for x in (q, k, v, mask))
        if q.numel() == 0:
            return lead.like(q.new_empty((*q.shape[:-1], v.shape[-1])))
        return lead.like(func(q, k, v, mask, **named))
    if any(isinstance(x, Slab) and x.cut.dim != x.ndim - 2 for x in (q, k, v)):
        raise refuse("scaled_dot_product_attention", "split over heads' channels")
    k, v = _keys(k, v)
    if not isinstance(q, Slab):
        return func(q, k, v, mask, **named)
    if named.pop("is_causal", False):
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.shape[-2] != 1:
        mask = q.cut.rows(mask, mask.ndim - 2, q.ranks.rank)
    cut = q.cut
    if q.local.shape[-2] == 0:
        return q.like(q.local.new_empty((*q.local.shape[:-1], v.shape[-1])), cut)
    return q.like(func(q.local, k, v, mask, **named), cut)


def _keys(k: Any, v: Any) -> tuple[Tensor, Tensor]:
    """Whole keys and values, by one exchange where both are split alike."""
    if isinstance(k, Slab) and isinstance(v, Slab) and k.cut == v.cut and k.shape[:-1] == v.shape[:-1]:
        both = k.like(torch.cat((k.local, v.local), -1)).whole()
        return both[..., : k.shape[-1]], both[..., k.shape[-1] :]
    return tuple(x.whole() if isinstance(x, Slab) else x for x in (k, v))  # type: ignore[return-value]


def _of_batch(x: Any, lead: Slab) -> Any:
    """The rows of an operand of attention that is split over samples, frames or heads."""
    if x is None:
        return None
    dim = x.ndim - (lead.ndim - lead.cut.dim)
    if isinstance(x, Slab):
        if x.cut.dim != dim or (x.cut.outer, x.cut.total) != (lead.cut.outer, lead.cut.total):
            raise refuse("scaled_dot_product_attention", f"of tensors split as {lead.cut} and as {x.cut}")
        return x.recut(lead.cut.bounds).local
    return x if dim < 0 or x.shape[dim] == 1 else lead.cut.rows(x, dim, lead.ranks.rank)


def distances(func: Any, args: Any, kwargs: Any) -> Any:
    """cdist to a whole table."""
    x, table, *rest = args
    if not isinstance(x, Slab) or isinstance(table, Slab) or x.cut.dim == x.ndim - 1:
        raise refuse("cdist", "to a split table")
    return x.like(func(x.local, table, *rest))


SUMS: dict[str, Any] = {
    "_euclidean_dist": distances, "_cdist_forward": distances,
    "native_group_norm": group_norm, "native_layer_norm": last_dims_norm, "_fused_rms_norm": last_dims_norm,
    "rms_norm": last_dims_norm, "_softmax": softmax, "_log_softmax": softmax, "mm": product, "bmm": product,
    "addmm": add_product, "baddbmm": add_product,
}  # fmt: skip
SUMS |= dict.fromkeys(
    "sum mean amax amin max min any all linalg_vector_norm argmax argmin prod norm logsumexp sort topk cumsum".split(),
    reduce,
)
SUMS |= dict.fromkeys("var std var_mean std_mean".split(), variance)
SUMS |= dict.fromkeys(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm".split(),
    batch_norm,
)
