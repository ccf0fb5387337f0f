"""A call with a batch of independent samples, cut between ranks: which arguments have a row for each is tried on the
first call of a structure, and held against the whole batch. Nothing here knows a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.errors import is_out_of_memory
from parafuse.parallel.bundle import all_say, exchange, with_strides_of, without_values
from parafuse.parallel.call_context import CallContext
from parafuse.parallel.effects import Watched, all_plain
from parafuse.parallel.hooks import Forward
from parafuse.parallel.layout import head_range
from parafuse.parallel.lent import Left, Lent, take

MAX_ERROR = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of a batch that was cut against the whole one; a batch that is mixed is far above."""
TRIES = 3
"""Calls after which a structure that cannot be cut is tried no more. What a model fills once is no effect of a call."""


@dataclass(frozen=True)
class Dim:
    """The dim of an argument that runs over samples, and how many rows there are of each (frames of a video, say)."""

    dim: int
    each: int = 1


@dataclass(frozen=True)
class Cut:
    """What has a row (or an item) for each sample."""

    as_lists: bool
    """Lists of as many tensors are cut as they are."""
    arguments: tuple[Dim | None, ...]
    """By leaf: where the samples are, or None."""
    results: tuple[Any, ...]
    """By leaf: one sample (its rows of all stacks) without values, where there is a row for each, else None."""
    layout: tuple[Tensor | None, ...]
    """By leaf: the whole result without values, where it is a tensor of rows."""
    stacks: int = 1
    """The batch is so many batches on top of each other (branches), and a part has its samples of each: for models that
    take the batch apart themselves."""
    left: Left = field(default_factory=Left)
    """What such a call leaves of the lists that it is given."""


class BatchCut:
    """Cuts the calls of one module between the ranks of a group. Collective on the group, once a call is known."""

    STACKS: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def __init__(self, module: nn.Module, degree: int, rank: int, group: str, context: CallContext | None = None):
        self.module, self.degree, self.rank, self.group = module, degree, rank, group
        self.context = context or CallContext()
        self._cuts: dict[Any, Cut | int] = {}
        """By structure: how it is cut, or how often it was tried in vain."""

    def forget(self) -> None:
        """Learns anew: the module was changed."""
        self._cuts.clear()

    def may_cut(self, args: Any, kwargs: Any, samples: Any) -> bool:
        """Whether such a call can be cut, or has not been tried enough."""
        cut = self._cuts.get(_key(args, kwargs, rows(samples)), 0)
        return isinstance(cut, Cut) or cut < TRIES

    def knows(self, args: Any, kwargs: Any, samples: Any) -> bool:
        """Whether it is known how to cut such a call."""
        return isinstance(self._cuts.get(_key(args, kwargs, rows(samples))), Cut)

    def __call__(self, original: Forward, args: Any, kwargs: Any, samples: Any) -> tuple[bool, Any]:
        """(whether the batch was cut, result). The first call of a structure is computed whole."""
        batch = rows(samples)
        key = _key(args, kwargs, batch)
        cut = self._cuts.get(key, 0)
        if isinstance(cut, int):
            return False, self._learn(key, cut, original, args, kwargs, samples)
        call = _Call(original, args, kwargs, batch, cut.as_lists)
        part, error = None, None
        mine = self._range(batch // cut.stacks)
        try:
            with self.context.part(self.group, batch, *mine, cut.stacks):
                part = call.part(cut, *mine)
        except Exception as failure:
            error = failure
        result = self._join(call, cut, part, error)
        take(args, kwargs, cut.left)
        return True, result

    def _learn(self, key: Any, tried: int, original: Forward, args: Any, kwargs: Any, samples: Any) -> Any:
        """The whole result, computed here; on the way, how to cut such calls."""
        if tried >= TRIES:
            return original(*args, **kwargs)
        watched, lent = Watched(self.module, (args, kwargs)), Lent(args, kwargs)
        try:
            whole = original(*lent.args, **lent.kwargs)
            left = lent.left()
            if not self._all_say(left is not None and not watched.has_changed()):  # what was run before may differ
                self._cuts[key] = tried + 1
                return whole
            with self.context.trying():
                found = self._found(original, args, kwargs, samples, whole)
            self._cuts[key] = TRIES if found is None else replace(found, left=left or {})
            return whole
        finally:
            lent.give_back()

    def _found(self, original: Forward, args: Any, kwargs: Any, samples: Any, whole: Any) -> Cut | None:
        """How to cut such calls, samples by rows or in lists. Collective on the group."""
        for as_lists in (isinstance(samples, list), not isinstance(samples, list)):
            call = _Call(original, args, kwargs, rows(samples), as_lists)
            found = self._cut_of(call, whole) if all_plain(tree_flatten(whole)[0]) else None
            if found is not None:
                return found
        return None

    def _range(self, batch: int) -> tuple[int, int]:
        """The samples that this rank computes; a rank that is left over does the last one again."""
        first, last = self._ranges(batch)[self.rank]
        return (first, last) if last > first else (batch - 1, batch)

    def _ranges(self, batch: int) -> list[tuple[int, int]]:
        """The samples of each part."""
        return [head_range(batch, self.degree, rank) for rank in range(self.degree)]

    def _everyones(
        self, mine: list[Tensor], shapes: list[list[Tensor]], call: _Call, cut: Cut, error: Exception | None
    ) -> list[list[Tensor]]:
        """The samples of all parts, by part. Collective on the group."""
        return exchange(mine, shapes, call.device, self.group, error)

    def _join(self, call: _Call, cut: Cut, part: Any, error: Exception | None = None) -> Any:
        """The whole result from every rank's part. Collective on the group."""
        samples = call.batch // cut.stacks
        counts = [last - first for first, last in self._ranges(samples)]
        own = len(range(*self._range(samples)))
        leaves, spec = call.flat(part, own) if error is None else ([], None)
        cut_leaves = [(i, like) for i, like in enumerate(cut.results) if like is not None]
        shapes = [[like for _, like in cut_leaves for _ in range(count)] for count in counts]
        mine = [x for i, _ in cut_leaves if error is None for x in _samples(leaves[i], own, cut)[: counts[self.rank]]]
        out: dict[int, list[Tensor]] = {i: [] for i, _ in cut_leaves}
        everyone = self._everyones(mine, shapes, call, cut, error)
        for count, tensors in zip(counts, everyone, strict=True):
            for number, (i, _) in enumerate(cut_leaves):
                out[i] += tensors[number * count : (number + 1) * count]
        for i, pieces in out.items():
            like = cut.layout[i]
            leaves[i] = pieces if like is None else with_strides_of(_rows_together(pieces, cut), like)
        if spec is None:
            raise RuntimeError("an exchange of a failed part returned")
        return tree_unflatten(leaves, spec)

    def _cut_of(self, call: _Call, whole: Any) -> Cut | None:
        """Which arguments to cut, so that the parts give the whole; None: there is no way. Collective on the group."""
        dims = tuple(_sample_dim(x, call.batch) for x in call.leaves)
        several = sum(dim is not None for dim in dims) > 1
        trials = [_told_apart(call, dims, with_numbers) for with_numbers in (True, False)] if several else []
        for trial in [*trials, call]:  # rows that are equal by chance tell nothing
            try:
                want = whole if trial is call else trial.original(*trial.args, **trial.kwargs)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                continue
            found = (self._first_that_holds(trial, dims, want, stacks) for stacks in self.STACKS)
            return next((cut for cut in found if cut is not None), None)
        return None

    def _first_that_holds(self, call: _Call, dims: tuple[Dim | None, ...], want: Any, stacks: int) -> Cut | None:
        samples = call.batch // stacks
        if stacks > 1 and (call.as_lists or call.batch % stacks or samples < 2):
            return None
        leaves = call.flat(want, call.batch)[0]
        blank = Cut(call.as_lists, (), (), (), stacks)
        results = tuple(
            without_values(_samples(x, samples, blank)[0]) if rows(x) == call.batch else None for x in leaves
        )
        layout = tuple(
            without_values(x) if like is not None and isinstance(x, Tensor) else None
            for x, like in zip(leaves, results, strict=True)
        )
        if not any(like is not None for like in results):
            return None
        for arguments in _candidates(dims):
            cut, part = Cut(call.as_lists, arguments, results, layout, stacks), None
            try:
                part = call.part(cut, *self._range(samples))
                fits = _has_rows(call, cut, part, len(range(*self._range(samples))))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                fits = False
            if self._all_say(fits) and self._all_say(_is_same(self._join(call, cut, part), want)):
                return cut
        return None

    def _all_say(self, yes: bool) -> bool:
        return all_say(yes, self.module, self.degree, self.group)


class _Call:
    """A call with several samples, by leaves."""

    def __init__(self, original: Forward, args: Any, kwargs: Any, batch: int, as_lists: bool):
        self.original, self.args, self.kwargs, self.batch, self.as_lists = original, args, kwargs, batch, as_lists
        self.leaves, self.spec = self.flat((args, kwargs), batch)
        first = next((x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)), None)
        self.device = torch.device("cpu") if first is None else first.device

    def flat(self, tree: Any, count: int) -> tuple[list[Any], TreeSpec]:
        """Leaves of arguments or results; lists of so many tensors are leaves where samples come in lists."""

        def is_leaf(x: Any) -> bool:
            return self.as_lists and isinstance(x, list) and len(x) == count and all(isinstance(y, Tensor) for y in x)

        return tree_flatten(tree, is_leaf=is_leaf)

    def with_leaves(self, leaves: list[Any]) -> _Call:
        args, kwargs = tree_unflatten(leaves, self.spec)
        return _Call(self.original, args, kwargs, self.batch, self.as_lists)

    def part(self, cut: Cut, first: int, last: int) -> Any:
        """What is given for samples [first, last)."""
        leaves = [
            x if at is None else x[first:last] if isinstance(x, list) else _rows_of(x, at, first, last, cut.stacks)
            for x, at in zip(self.leaves, cut.arguments, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.original(*args, **kwargs)


def _key(args: Any, kwargs: Any, batch: int) -> Any:
    """Equal for calls that are cut alike."""
    leaves, spec = tree_flatten((args, kwargs))
    return (str(spec), batch, *((x.shape, x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in leaves))


def _rows_of(x: Tensor, at: Dim, first: int, last: int, stacks: int) -> Tensor:
    if stacks == 1:
        return x.narrow(at.dim, first * at.each, (last - first) * at.each)
    apart = x.unflatten(at.dim, (stacks, -1))
    return apart.narrow(at.dim + 1, first * at.each, (last - first) * at.each).flatten(at.dim, at.dim + 1)


def _samples(x: Any, count: int, cut: Cut) -> list[Any]:
    """The rows of a result, by sample."""
    return list(x) if cut.stacks == 1 else list(x.unflatten(0, (cut.stacks, count)).unbind(1))


def _rows_together(pieces: list[Tensor], cut: Cut) -> Tensor:
    return torch.stack(pieces) if cut.stacks == 1 else torch.stack(pieces, 1).flatten(0, 1)


def _sample_dim(x: Any, batch: int) -> Dim | None:
    """Where the samples may be: the first dim of a tensor, or the second one, or several rows each in the first one; a
    list of as many."""
    count = rows(x)
    if count == batch:
        return Dim(0)
    if isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == batch:
        return Dim(1)
    return Dim(0, count // batch) if isinstance(x, Tensor) and count and count % batch == 0 else None


def _candidates(dims: tuple[Dim | None, ...]) -> Iterator[tuple[Dim | None, ...]]:
    """All leaves that may be, the plain ones first; then without one of these, which may fit by chance."""
    plain = tuple(at if at == Dim(0) else None for at in dims)
    no_multiples = tuple(at if at and at.each == 1 else None for at in dims)
    no_second = tuple(at if at and at.dim == 0 else None for at in dims)
    tried = [plain, no_multiples, no_second, dims]
    for base in (plain, no_multiples, no_second):
        named = [i for i, at in enumerate(base) if at is not None]
        tried += [(*base[:i], None, *base[i + 1 :]) for i in named[1:]]
    return iter(dict.fromkeys(tried))


def _told_apart(call: _Call, dims: tuple[Dim | None, ...], with_numbers: bool) -> _Call:
    """The call with rows that differ from each other; whole numbers too, which the model may not like."""

    def spread(x: Any, at: Dim | None) -> Any:
        if at is None or not isinstance(x, Tensor) or x.dtype == torch.bool:
            return x
        steps = torch.arange(x.shape[at.dim], device=x.device).view([-1 if d == at.dim else 1 for d in range(x.ndim)])
        if x.is_floating_point():
            return (x * (1 + 0.1 * steps) + 0.05 * steps).to(x.dtype)
        return x - steps.to(x.dtype) if with_numbers and x.ndim == 1 and not x.is_complex() else x

    return call.with_leaves([spread(x, dim) for x, dim in zip(call.leaves, dims, strict=True)])


def rows(x: Any) -> int:
    """Samples of a tensor or list; 0 for what has none."""
    return len(x) if (isinstance(x, Tensor) and x.ndim) or isinstance(x, list) else 0


def _has_rows(call: _Call, cut: Cut, part: Any, count: int) -> bool:
    leaves = call.flat(part, count)[0]
    if len(leaves) != len(cut.results):
        return False
    for x, like in zip(leaves, cut.results, strict=True):
        if like is not None:
            if rows(x) != count * cut.stacks:
                return False
            first = _samples(x, count, cut)[0]
            if (first.shape, first.dtype) != (like.shape, like.dtype):
                return False
    return True


def _is_same(found: Any, whole: Any) -> bool:
    for a, b in zip(tree_flatten(found)[0], tree_flatten(whole)[0], strict=True):
        if isinstance(b, Tensor) and b.is_floating_point() and b.numel():
            if a.shape != b.shape:
                return False
            error = (a - b).abs().max() / b.abs().max().clamp_min(1e-30)
            if not error <= MAX_ERROR.get(b.dtype, 1e-4):
                return False
    return True
