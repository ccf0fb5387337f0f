"""Whole tensors to a rank's rows and back, and the tensor type that carries rows between blocks.

Between two blocks a model's own code may touch the token tensors: concatenate streams, add a residual, slice the text
away, project, reshape. `Sharded` lets that code run as written: it shows the global shape, does what can be done on a
rank's rows alone (exactly), and gathers before anything else. What is returned to the pipeline is always whole.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves, tree_map_only

from parafuse.errors import UnsupportedError
from parafuse.parallel.comm import all_gather, all_reduce
from parafuse.parallel.layout import Layout
from parafuse.parallel.metadata import METADATA


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a sequence. `group` is None in simulations, which never gather."""

    degree: int
    rank: int
    group: ProcessGroup | None
    causes: Counter[str] = field(default_factory=Counter[str], compare=False)
    """What made tensors whole, by function name."""
    work: Counter[str] = field(default_factory=Counter[str], compare=False)
    """What mixed tokens while they were split, by kind."""

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
        if self.degree == 1:
            return local
        if self.group is None:
            raise UnsupportedError("a simulated rank cannot gather")
        everyone = all_gather(local, self.degree, self.group.group_name)
        pieces, offset = [], 0
        for length, part in zip(layout.lengths, layout.parts, strict=True):
            piece = everyone.narrow(dim + 1, offset, part).movedim(0, dim).flatten(dim, dim + 1)
            pieces.append(piece.narrow(dim, 0, length))
            offset += part
        return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, in fp32 on the way. Collective on the sequence group."""
        if self.degree == 1:
            return x
        if self.group is None:
            raise UnsupportedError("a simulated rank cannot sum")
        return all_reduce(x.float(), self.group.group_name).to(x.dtype)


class Sharded(Tensor):
    """A token tensor of which each rank holds its rows. Shape, dtype and device are those of the whole tensor."""

    local: Tensor
    token_dim: int
    tokens: Layout
    ranks: SequenceGroup
    borrowed: bool
    """Its rows are a copy of those of another tensor that the model has a name for: a change in place must reach it."""
    source: Tensor | None
    """That tensor, where it is whole and of the same shape."""

    @staticmethod
    def __new__(cls, local: Tensor, dim: int, layout: Layout, ranks: SequenceGroup) -> Sharded:
        if local.shape[dim] != layout.local:
            raise UnsupportedError(f"{local.shape[dim]} rows along dim {dim}, where {layout} has {layout.local}")
        shape = list(local.shape)
        shape[dim] = layout.total
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        self.local, self.token_dim, self.tokens, self.ranks = local, dim, layout, ranks
        self.borrowed, self.source = False, None
        return self

    def like(self, local: Tensor, dim: int | None = None) -> Sharded:
        """The same rows with other values, or a view of them; `dim` where the number of dims changed."""
        return self.part(local, self.token_dim if dim is None else dim, self.tokens)

    def part(self, local: Tensor, dim: int, layout: Layout) -> Sharded:
        """Rows of `layout` that come from this tensor; borrowed as it is where they share its memory."""
        out = Sharded(local, dim, layout, self.ranks)
        out.borrowed = self.borrowed and local.untyped_storage()._cdata == self.local.untyped_storage()._cdata
        return out

    def whole(self) -> Tensor:
        """Gathers. Collective on the sequence group."""
        return self.ranks.gather(self.local, self.token_dim, self.tokens)

    def resplit(self, bounds: tuple[int, ...]) -> Sharded:
        """The same tensor with segments that end at `bounds` too. Collective on the sequence group."""
        ends, end = set(bounds) | {0}, 0
        for length in self.tokens.lengths:
            end += length
            ends.add(end)
        ordered = sorted(ends)
        return self.split_as(Layout(tuple(b - a for a, b in pairwise(ordered)), self.tokens.degree))

    def split_as(self, layout: Layout) -> Sharded:
        """The same tensor with other segments of the same tokens. Collective, unless they are its own."""
        if layout == self.tokens:
            return self
        self.ranks.causes["tokens that are split in another way"] += 1
        rows = self.ranks.take(self.whole(), self.token_dim, layout)
        return Sharded(rows, self.token_dim, layout, self.ranks).as_borrowed()

    def as_borrowed(self, source: Tensor | None = None) -> Sharded:
        """This tensor, marked as a copy of a part of another one, or of the whole of `source`."""
        self.borrowed, self.source = True, source
        return self

    def true_rows(self) -> Tensor:
        """`local` with filler rows set to zero."""
        filled, offset = self.local, 0
        for part, (_, count) in zip(self.tokens.parts, self.tokens.spans(self.ranks.rank), strict=True):
            if count < part:
                filled = filled.clone() if filled is self.local else filled
                filled.narrow(self.token_dim, offset + count, part - count).zero_()
            offset += part
        return filled

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Sharded(local={tuple(self.local.shape)}, dim={self.token_dim}, {self.tokens})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(getattr(kind, "holds_streams", False) for kind in types):
            return NotImplemented  # a kind of tensor that has split ones inside decides what is done to these
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = func.__name__
        target = kwargs.get("out")
        if args and ((name.endswith("_") and not name.startswith("__")) or name == "__setitem__"):
            target = args[0]
        if isinstance(target, Sharded) and target.borrowed:
            return _through(target, name, func, args, kwargs)
        into_whole = target is not None and not isinstance(target, Sharded)  # it stays whole, under all its names
        from parafuse.parallel.shard_rules import RULES  # it needs this class

        rule = RULES.get(name)
        if rule is not None and args and not into_whole and "out" not in kwargs:
            others = any(kind is not cls for kind in types)  # weights in a form of their own, say, as torchao's
            with torch._C.DisableTorchFunctionSubclass():
                result = rule(_with_subclasses(func) if others else func, args, kwargs)
            if result is not NotImplemented:
                return result
        _note(name, (args, kwargs))
        if isinstance(target, Sharded):
            return _in_place(target, func, args, kwargs)
        args, kwargs = gather_all((args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = gather_all((args, kwargs or {}))
        return func(*args, **kwargs)


def _with_subclasses(func: Any) -> Any:
    """`func`, with what other tensor types make of it: a rule runs while all of that is off."""

    @functools.wraps(func)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._EnableTorchFunction():
            return func(*args, **kwargs)

    return run


def _through(target: Sharded, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """A change in place of rows that are a copy: made, and written to what they are a copy of. Collective."""
    source = target.source
    if source is None:
        raise UnsupportedError(
            f"the model changes a part of a split tensor in place by {name!r}, which the whole would not see. "
            "Run it on one rank."
        )
    target.borrowed = False
    try:
        result = func(*args, **kwargs)
    finally:
        target.borrowed = True
    source.copy_(target.whole())
    return result


def _in_place(target: Sharded, func: Any, args: Any, kwargs: Any) -> Any:
    """Changes the whole tensor, and writes this rank's rows of it back into `target`. Collective."""
    whole = target.whole()
    changed = tree_map_only(Sharded, lambda x: whole if x is target else x.whole(), (args, kwargs))
    result = func(*changed[0], **changed[1])
    if whole.shape != target.shape:
        raise UnsupportedError(f"the model changes the shape of a split tensor in place by {func.__name__!r}")
    target.local.copy_(target.ranks.take(whole, target.token_dim, target.tokens))
    return target if result is whole else result


def gather_all(tree: Any) -> Any:
    """The same nest with every Sharded made whole. Collective where there is one."""
    return tree_map_only(Sharded, lambda x: x.whole(), tree)


def _note(name: str, tree: Any) -> None:
    """Counts `name` as a cause of gathering."""
    found = next(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Sharded))
    found.ranks.causes[name] += 1
