"""Rules of `shard_rules` for other shapes of the same values: reshapes, permutations, expansions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parafuse.parallel.shard import Sharded


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


def _as_followed(func: Any, args: Any, kwargs: Any, apply: Any) -> Any:
    """`apply(rows, shape)` with the shape that `func` gives, where tokens stay one dim."""
    x = args[0]
    followed = _follow(x, func, args[1:], kwargs) if isinstance(x, Sharded) else None
    if followed is None:
        return NotImplemented
    shape, dim = followed
    shape[dim] = x.local.shape[x.token_dim]
    return x.like(apply(x.local, shape), dim)


def reshape(func: Any, args: Any, kwargs: Any) -> Any:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: no dim changes places."""
    return _as_followed(func, args, kwargs, Tensor.reshape)


def expand(func: Any, args: Any, kwargs: Any) -> Any:
    """expand, expand_as."""
    if len(args) == 2 and isinstance(args[1], Tensor):
        func, args = Tensor.expand, (args[0], args[1].shape)
    return _as_followed(func, args, kwargs, Tensor.expand)


def permute(func: Any, args: Any, kwargs: Any) -> Any:
    """transpose, permute, movedim and their kind."""
    x = args[0]
    strides = [int(d == x.token_dim) for d in range(x.ndim)]
    found = func(torch.empty_strided([2] * x.ndim, strides, device="meta"), *args[1:], **kwargs)
    return x.like(func(x.local, *args[1:], **kwargs), next(d for d in range(x.ndim) if found.stride(d)))


def complex_pairs(func: Any, args: Any, kwargs: Any) -> Any:
    """Pairs of the last dim as complex numbers, and back."""
    x = args[0]
    to_complex = func.__name__ == "view_as_complex"
    if x.token_dim >= x.ndim - to_complex:
        return NotImplemented
    return x.like(func(x.local.contiguous() if to_complex else x.local))


def repeat(func: Any, args: Any, kwargs: Any) -> Any:
    """Copies along other dims than the tokens'."""
    x = args[0]
    times = list(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else list(args[1:])
    new = len(times) - x.ndim
    if kwargs or new < 0 or times[new + x.token_dim] != 1:
        return NotImplemented
    return x.like(x.local.repeat(times), new + x.token_dim)
