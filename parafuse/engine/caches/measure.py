"""What is measured of streams: each of a sample's own numbers, on the ranks that share them and no others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_unflatten

from parafuse.engine.caches.forecast import by_samples, with_local
from parafuse.errors import UnsupportedError
from parafuse.parallel.comm import all_reduce
from parafuse.parallel.shard import Sharded


class _Met(BaseException):
    """Ends a block's forward early; a model that catches errors must not catch it."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens


class _UntilLinear(TorchFunctionMode):
    """Ends what runs inside at the first linear layer over a stream's tokens."""

    def __init__(self, stream: Tensor, numbers: int):
        self.width, self.numbers = stream.shape[-1], (stream.numel(), numbers)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x = args[0] if args else kwargs["input"]
            # some blocks take the tokens apart first, by frames say, and some join all streams
            if x.ndim > 2 and x.shape[-1] == self.width and x.numel() in self.numbers:
                raise _Met(x)
        return func(*args, **kwargs)


def modulated_input(block: nn.Module, leaves: list[Any], spec: TreeSpec, stream: Tensor, numbers: int) -> Tensor:
    """What the block's first linear layer over the tokens of `stream`, one of its arguments, is given; or over those of
    all its streams, which are so many numbers.

    Runs the block's own forward up to there: past what is compiled, and past what splits its attention, as streams
    that are split compute by rows. Raises UnsupportedError for a block without such a layer."""
    args, kwargs = tree_unflatten(leaves, spec)
    try:
        with torch.no_grad(), _UntilLinear(stream, numbers):
            type(block).forward(block, *args, **kwargs)
    except _Met as met:
        return met.tokens
    raise UnsupportedError(
        f"{type(block).__name__}: applies no linear layer to the tokens of its stream, so teacache finds no modulated "
        "input to measure; use first-block, magcache or interval."
    )


def own_share(x: Tensor, samples: int, group: ProcessGroup | None) -> Tensor:
    """(samples, n) of a stream's numbers, which this rank is to count: where every rank has all of them, a part."""
    if isinstance(x, Sharded):
        return by_samples(x.like(x.true_rows()), samples)
    numbers = by_samples(x, samples)
    if group is None:
        return numbers
    return numbers.tensor_split(group.size(), 1)[group.rank()].contiguous()


def relative_changes(new: Tensor, old: Tensor, group: ProcessGroup | None) -> list[float]:
    """By sample: sum|new - old| / sum|old| over all ranks' shares. One small exchange; the host waits once."""
    parts = [(new - old).abs(), old.abs()]
    return _ratios(torch.stack([x.sum(1, dtype=torch.float32) for x in parts]), group)


def relative_sizes(new: Tensor, old: Tensor, samples: int, group: ProcessGroup | None) -> list[float]:
    """By sample: the mean over tokens of |new| / |old|, norms over the last dim. One small exchange, one wait."""
    above, below = (by_samples(_norms(x), samples) for x in (new, old))
    counts = below > 0  # rows that fill up a rank's share have none
    ratios = torch.where(counts, above / below.clamp_min(1e-30), 0)
    return _ratios(torch.stack([ratios.sum(1), counts.sum(1, dtype=torch.float32)]), group)


def _norms(x: Tensor) -> Tensor:
    rows = x.true_rows() if isinstance(x, Sharded) else x
    return with_local(x, rows.float().norm(dim=-1, keepdim=True))


def _ratios(sums: Tensor, group: ProcessGroup | None) -> list[float]:
    if group is not None:
        sums = all_reduce(sums, group.group_name)
    numerators, denominators = sums.tolist()
    return [a / b if b else float("inf") for a, b in zip(numerators, denominators, strict=True)]
