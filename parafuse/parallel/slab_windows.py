"""Rules for what looks at neighbouring rows: convolutions, pools, padding, interpolation.

Each gets the rows at its borders from whoever has them, so that every rank makes its own rows of the result and no
others. Zeros stand beyond the ends of the whole tensor only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from parafuse.parallel.slab import Cut, Range, Slab, empty, refuse
from parafuse.parallel.slab_views import balanced, rows_by_index

aten: Any = torch.ops.aten
MENDED_FROM = 8
"""Values of a rank's rows for each value of a weight from which on rows are mended instead of copied."""


def _per_dim(value: Any, count: int) -> list[int]:
    value = list(value) if isinstance(value, (list, tuple)) else [value]
    return value * count if len(value) == 1 else value


def window_ranges(bounds: Sequence[int], total: int, stride: int, pad: int, reach: int) -> list[Range]:
    """Which rows (beyond the ends too) the windows of each rank cover. `reach`: rows of a window."""
    return [(a * stride - pad, (b - 1) * stride - pad + reach) if b > a else (0, 0) for a, b in pairwise(bounds)]


def _inside(ranges: list[Range], total: int) -> list[Range]:
    return [(min(max(a, 0), total), max(min(b, total), min(max(a, 0), total))) for a, b in ranges]


def _margins(wanted: Range, total: int) -> Range:
    """How many rows of a range are before the first one and behind the last one."""
    start, stop = wanted
    return max(min(stop, 0) - start, 0), max(stop - max(start, total), 0)


def _windowed_bounds(cut: Cut, length: int, stride: int, pad: int, reach: int) -> tuple[int, ...]:
    """Bounds of a result whose windows are centred in each rank's own rows."""
    ends = [-(-(end + pad - reach // 2) // stride) for end in cut.bounds[1:-1]]
    return balanced((0, *(min(max(end, 0), length) for end in ends), length))


def convolution(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    if not isinstance(x, Slab) or isinstance(weight, Slab):
        raise refuse("convolution", "with a split weight")
    if x.cut.dim == 0:
        return x.like(func(x.local, *args[1:]))
    if x.cut.dim == 1:
        raise refuse("convolution", "over split channels")
    x = x.unmerged()
    count, at = x.ndim - 2, x.cut.dim - 2
    stride, padding, dilation = (_per_dim(v, count) for v in (stride, padding, dilation))
    if transposed:
        return _transposed(func, x, (weight, bias, stride, padding, dilation, _per_dim(output_padding, count), groups))
    reach = dilation[at] * (weight.shape[x.cut.dim] - 1) + 1
    length = (x.cut.total + 2 * padding[at] - reach) // stride[at] + 1
    bounds = _windowed_bounds(x.cut, length, stride[at], padding[at], reach)
    if _keeps_rows(x, weight, stride[at], padding[at], reach):
        return _mended(func, x, (weight, bias, stride, padding, dilation, groups))
    rows = _windows(x, bounds, stride[at], padding[at], reach)
    cut, padding = Cut(x.cut.dim, bounds), [0 if n == at else p for n, p in enumerate(padding)]
    if cut.length(x.ranks.rank) == 0:
        shape = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(rows.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
        ]
        shape[at] = 0
        return x.like(x.local.new_empty((x.shape[0], weight.shape[0], *shape)), cut)
    return x.like(func(rows, weight, bias, stride, padding, dilation, False, output_padding, groups), cut)


def _keeps_rows(x: Slab, weight: Tensor, stride: int, pad: int, reach: int) -> bool:
    """Whether a rank can convolve its own rows as they are and mend the outer ones: each result is in the middle of its
    window, and rows are so many that another small convolution costs less than a copy of all of them."""
    is_centred = stride == 1 and pad > 0 and 2 * pad == reach - 1
    is_long = all(b - a >= 2 * pad for a, b in x.cut.ranges)
    return is_centred and is_long and x.numel() // x.ranks.degree > MENDED_FROM * weight.numel()


def _mended(func: Any, x: Slab, how: Any) -> Slab:
    """A convolution of own rows as if nothing was beyond them; then the rows at inner borders once more, from a strip
    of three times their number. So nothing large is copied."""
    weight, bias, stride, padding, dilation, groups = how
    dim, pad, rank = x.cut.dim, padding[x.cut.dim - 2], x.ranks.rank
    ends = {rank - 1: (x.mine[0], x.mine[0] + pad), rank + 1: (x.mine[1] - pad, x.mine[1])}  # what neighbours need
    pieces = [x.own(ends[r]) if r in ends else None for r in range(x.ranks.degree)]
    size = x.numel() // x.cut.total * pad
    parts = x.ranks.exchange(pieces, [size if r in ends else 0 for r in range(x.ranks.degree)], x.local)
    result = func(x.local, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)
    padding = [0 if n == dim - 2 else p for n, p in enumerate(padding)]
    length = x.mine[1] - x.mine[0]
    for r, place, theirs, own in ((rank - 1, 0, 0, pad), (rank + 1, length - pad, 2 * pad, 0)):
        if not 0 <= r < x.ranks.degree:
            continue
        shape = [3 * pad if d == dim else size for d, size in enumerate(x.shape)]
        strip = empty(shape, x.local)
        strip.narrow(dim, own, 2 * pad).copy_(x.local.narrow(dim, 0 if r < rank else length - 2 * pad, 2 * pad))
        border = strip.narrow(dim, theirs, pad)
        border.copy_(parts[r].view(border.shape))
        mended = func(strip, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)
        result.narrow(dim, place, pad).copy_(mended)
    return x.like(result)


def _windows(x: Slab, bounds: tuple[int, ...], stride: int, pad: int, reach: int, value: float = 0.0) -> Tensor:
    """The rows that this rank's windows cover, with `value` beyond the ends."""
    ranges = window_ranges(bounds, x.cut.total, stride, pad, reach)
    inside = _inside(ranges, x.cut.total)
    rank = x.ranks.rank
    return x.fetch(inside, _margins(ranges[rank], x.cut.total), value)


def _transposed(func: Any, x: Slab, how: Any) -> Slab:
    weight, bias, stride, padding, dilation, output_padding, groups = how
    at, total = x.cut.dim - 2, x.cut.total
    s, pad, reach = stride[at], padding[at], dilation[at] * (weight.shape[x.cut.dim] - 1)
    length = (total - 1) * s - 2 * pad + reach + output_padding[at] + 1
    bounds = balanced((0, *(min(max(end * s, 0), length) for end in x.cut.bounds[1:-1]), length))
    wanted: list[Range] = []
    for a, b in pairwise(bounds):
        first = min(-(-(a + pad - reach) // s), (a + pad) // s)  # the second where no row reaches the first place
        first = min(max(first, 0), total - 1)
        last = min(max((b - 1 + pad) // s, first), total - 1)
        wanted.append((first, last + 1) if b > a else (0, 0))
    rows, rank = x.fetch(wanted), x.ranks.rank
    cut = Cut(x.cut.dim, bounds)
    is_empty = cut.length(rank) == 0
    if is_empty:  # of one row the shape of the other dims is learned
        shape = list(x.shape)
        shape[x.cut.dim] = 1
        rows = x.local.new_zeros(shape)
    padding = [0 if n == at else p for n, p in enumerate(padding)]
    result = func(rows, weight, bias, stride, padding, dilation, True, output_padding, groups)
    begin = bounds[rank] + pad - wanted[rank][0] * s
    if is_empty:
        begin = 0
    return x.like(result.narrow(cut.dim, begin, cut.length(rank)), cut)


def pool(func: Any, args: Any, kwargs: Any) -> Any:
    """avg_pool and max_pool over spatial dims."""
    is_max, spatial = "max" in func.__name__, 3 if "pool3d" in func.__name__ else 2
    given: Any = (*args, *((None, [], 0)[len(args) - 1 :]))
    x, kernel, stride, padding, *rest = given
    at = x.cut.dim - (x.ndim - spatial)
    if at < 0:
        result = func(x.local, *args[1:], **kwargs)
        return tuple(x.like(r) for r in result) if isinstance(result, tuple) else x.like(result)
    kernel, padding = _per_dim(kernel, spatial), _per_dim(padding, spatial)
    stride = _per_dim(stride, spatial) if stride else kernel
    dilation = _per_dim(rest[0], spatial) if is_max and rest else [1] * spatial
    ceil_mode = rest[1 if is_max else 0] if len(rest) > is_max else False
    counts_padding = rest[1] if not is_max and len(rest) > 1 else True
    divisor = rest[2] if not is_max and len(rest) > 2 else None
    x = x.unmerged()
    if ceil_mode or (padding[at] and not is_max and not counts_padding):
        raise refuse(func.__name__, "with a rounded-up size or uncounted padding")
    reach = dilation[at] * (kernel[at] - 1) + 1
    length = (x.cut.total + 2 * padding[at] - reach) // stride[at] + 1
    bounds = _windowed_bounds(x.cut, length, stride[at], padding[at], reach)
    value = float("-inf") if is_max else 0.0
    rows = _windows(x, bounds, stride[at], padding[at], reach, value)
    cut, padding = Cut(x.cut.dim, bounds), [0 if n == at else p for n, p in enumerate(padding)]
    last = (dilation, ceil_mode) if is_max else (ceil_mode, counts_padding, divisor)
    if cut.length(x.ranks.rank) == 0:
        shape = list(x.shape)
        shape[cut.dim] = reach
        rows = x.local.new_zeros(shape)
    result = func(rows, kernel, stride, padding, *last)
    if not is_max:
        return x.like(result.narrow(cut.dim, 0, cut.length(x.ranks.rank)), cut)
    # the second are places in the whole tensor, which are wrong here: nothing has a rule that takes them
    return tuple(x.like(r.narrow(cut.dim, 0, cut.length(x.ranks.rank)), cut) for r in result)


def adaptive_pool(func: Any, args: Any, kwargs: Any) -> Any:
    """Only to a single value, or along dims that are not split."""
    x, size = args
    first = x.ndim - len(size)
    if x.cut.dim < first:
        return x.like(func(x.local, size))
    if any(n != 1 for n in size) or "avg" not in func.__name__:
        raise refuse(func.__name__)
    return x.mean(dim=list(range(first, x.ndim)), keepdim=True)


def _pads(pad: Sequence[int], x: Slab) -> tuple[list[int], int, int]:
    """The padding with none along the split dim, and that of the split dim."""
    pad = list(pad)
    at = 2 * (x.ndim - 1 - x.cut.dim)
    if at >= len(pad):
        return pad, 0, 0
    left, right = pad[at], pad[at + 1]
    pad[at] = pad[at + 1] = 0
    return pad, left, right


def constant_pad(func: Any, args: Any, kwargs: Any) -> Any:
    given: Any = (*args, 0)[:3]
    x, pad, value = given
    others, left, right = _pads(pad, x)
    if not left and not right:
        return x.like(func(x.local, others, value))
    x = x.unmerged()
    cut, rank = x.cut, x.ranks.rank
    ends = _padded_bounds(cut, left, right)
    ranges = [(a - left, b - left) if b > a else (0, 0) for a, b in pairwise(ends)]
    inside = _inside(ranges, cut.total)
    margins = _margins(ranges[rank], cut.total)
    rows = x.fetch(inside)
    at = 2 * (x.ndim - 1 - cut.dim)
    others[at], others[at + 1] = margins
    return x.like(func(rows, others, value), Cut(cut.dim, ends))


def _padded_bounds(cut: Cut, left: int, right: int) -> tuple[int, ...]:
    length = cut.total + left + right
    return balanced((0, *(min(max(end + left, 0), length) for end in cut.bounds[1:-1]), length))


def mirrored_pad(func: Any, args: Any, kwargs: Any) -> Any:
    """reflection_pad and replication_pad."""
    x, pad = args
    others, left, right = _pads(pad, x)
    if left or right:
        x = x.unmerged()
        one_dim = aten.reflection_pad1d if "reflection" in func.__name__ else aten.replication_pad1d
        index = one_dim(torch.arange(x.cut.total, dtype=torch.float64)[None], [left, right])[0].long().tolist()
        x = rows_by_index(x, index, _padded_bounds(x.cut, left, right))
    if not any(others):
        return x
    if x.local.numel() == 0:
        return x.like(functional.pad(x.local, others), x.cut)
    return x.like(func(x.local, others), x.cut)


def nearest(func: Any, args: Any, kwargs: Any) -> Any:
    """upsample_nearest and _upsample_nearest_exact: rows by number."""
    x, size, *scales = args
    scales = [scales[n] if n < len(scales) else None for n in range(len(size))]
    at = x.cut.dim - 2
    if at < 0:
        return x.like(func(x.local, *args[1:], **kwargs))
    x = x.unmerged()
    one_dim = aten._upsample_nearest_exact1d if "exact" in func.__name__ else aten.upsample_nearest1d
    line = torch.arange(x.cut.total, dtype=torch.float64, device=x.device)[None, None]
    index = one_dim(line, [size[at]], scales[at])[0, 0].long().tolist()
    bounds = (*(bisect_left(index, end) for end in x.cut.bounds[:-1]), size[at])
    times, rest = divmod(size[at], x.cut.total)
    simple = not rest and index == [n // times for n in range(size[at])]
    if not simple:
        x = rows_by_index(x, index, balanced(bounds))
        bounds, scales[at] = x.cut.bounds, 1.0
    cut = Cut(x.cut.dim, bounds)
    local = [cut.length(x.ranks.rank) if n == at else length for n, length in enumerate(size)]
    if 0 in local:
        return x.like(x.local.new_empty((*x.shape[:2], *local)), cut)
    return x.like(func(x.local, local, *scales), cut)


def smooth(func: Any, args: Any, kwargs: Any) -> Any:
    """Linear, cubic and antialiased interpolation: along the split dim a weighted sum of a few rows, with weights that
    the operator itself gives for single rows."""
    x, size, corners, *scales = args
    scales = [scales[n] if n < len(scales) else None for n in range(len(size))]
    at = x.cut.dim - 2
    if at < 0:
        return x.like(func(x.local, *args[1:], **kwargs))
    x = x.unmerged()
    cut = x.cut
    alone = [2] * len(size)  # with one column torch's antialiased kernels give something else
    alone[at] = cut.total
    eye = torch.eye(cut.total, device=x.device).view(
        1, cut.total, *(cut.total if n == at else 1 for n in range(len(size)))
    )
    eye = eye.expand(1, cut.total, *alone).contiguous()
    alone[at] = size[at]
    weights = func(eye, alone, corners, *(s if n == at else None for n, s in enumerate(scales)))
    weights = weights.movedim(at + 2, 2)[0].reshape(cut.total, size[at], -1)[..., 0]
    columns = [column.nonzero().flatten().tolist() or [0] for column in weights.T.cpu()]
    bounds = balanced((*(round(end * size[at] / cut.total) for end in cut.bounds[:-1]), size[at]))
    spans = [
        (min(c[0] for c in columns[a:b]), max(c[-1] for c in columns[a:b]) + 1) if b > a else (0, 0)
        for a, b in pairwise(bounds)
    ]
    rank = x.ranks.rank
    rows, (first, last), here = x.fetch(spans), spans[rank], columns[bounds[rank] : bounds[rank + 1]]
    local = [last - first if n == at else length for n, length in enumerate(size)]
    if not here:
        return x.like(
            x.local.new_empty((*x.shape[:2], *(0 if n == at else s for n, s in enumerate(size)))), Cut(cut.dim, bounds)
        )
    rows = func(rows, local, corners, *(None if n == at else s for n, s in enumerate(scales)))
    rows = rows.movedim(cut.dim, -1).to(torch.promote_types(rows.dtype, torch.float32))
    mix = weights[first:last, bounds[rank] : bounds[rank + 1]].to(rows.dtype)
    result = (rows @ mix).to(x.dtype).movedim(-1, cut.dim)
    return x.like(result.contiguous(), Cut(cut.dim, bounds))


def unfold(func: Any, args: Any, kwargs: Any) -> Any:
    """Windows of a dim, in a new last dim."""
    x, dim, size, step = args
    if dim % x.ndim != x.cut.dim:
        return x.like(x.local.unfold(dim, size, step))
    x = x.unmerged()
    bounds = _windowed_bounds(x.cut, (x.cut.total - size) // step + 1, step, 0, size)
    rows, cut = _windows(x, bounds, step, 0, size), Cut(x.cut.dim, bounds)
    if cut.length(x.ranks.rank) == 0:
        return x.like(rows.new_empty((*rows.shape, size)), cut)
    return x.like(rows.unfold(dim, size, step), cut)


def stft(func: Any, args: Any, kwargs: Any) -> Any:
    """Spectra of windows of samples: each rank those of its own."""
    names = ("input", "n_fft", "hop_length", "win_length", "window", "center", "pad_mode")
    named = dict(zip(names, args, strict=False)) | kwargs
    x: Any = named.pop("input")
    size = named["n_fft"]
    if not isinstance(x, Slab) or x.cut.dim != x.ndim - 1:
        return NotImplemented
    step = named.get("hop_length") or size // 4
    if named.pop("center", True):
        mode = named.pop("pad_mode", "reflect")
        x = functional.pad(x.view(1, -1, x.shape[-1]), (size // 2, size // 2), mode).view(*x.shape[:-1], -1)
    named.pop("pad_mode", None)
    bounds = _windowed_bounds(x.cut, (x.cut.total - size) // step + 1, step, 0, size)
    rows, cut = _windows(x, bounds, step, 0, size), Cut(x.ndim, bounds)
    is_empty = cut.length(x.ranks.rank) == 0
    if is_empty:  # the other dims are learned of one window
        rows = rows.new_zeros((*rows.shape[:-1], size))
    result = func(rows, center=False, **named)
    if result.ndim != x.ndim + 1:
        raise refuse("stft", "as real numbers")
    return x.like(result[..., :0] if is_empty else result, cut)


WINDOWS: dict[str, Any] = {"unfold": unfold, "convolution": convolution, "constant_pad_nd": constant_pad}
WINDOWS |= {f"{kind}_pad{n}d": mirrored_pad for kind in ("reflection", "replication") for n in (1, 2, 3)}
WINDOWS |= {f"{kind}{n}d": nearest for kind in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)}
WINDOWS |= dict.fromkeys(
    "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa".split(),
    smooth,
)
WINDOWS |= dict.fromkeys("avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices".split(), pool)
WINDOWS |= dict.fromkeys("_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d".split(), adaptive_pool)
