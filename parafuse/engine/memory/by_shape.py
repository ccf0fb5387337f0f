"""How a block is split, told from shapes: for tensors that have no values, where the probe cannot look.

Enough to know sizes, and never used to compute: arguments that come back as results are streams, and what is as long as
the rows of an attention is theirs. What is found is held against the block like any plan (`engine/probe.py: prove`),
where only shapes can disagree; so examining a block takes here the memory that it takes with values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import chain, combinations, islice, permutations, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec

from parafuse.engine.derive import Failures, on_whole_shapes
from parafuse.engine.plan_store import key_of, load_plan
from parafuse.engine.probe import Examined, argument_ends, prove
from parafuse.errors import UnsupportedError, is_out_of_memory
from parafuse.parallel.block_plan import BlockPlan, Site, TokenDim
from parafuse.parallel.hooks import Forward

MOST_TRIED = 64
"""Ways to cut the arguments beside the streams."""


def blank(shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    """What stands for the noise that the probe draws in fp32."""
    return like.new_empty(shape, dtype=torch.float32).to(like.dtype)


class ByShape:
    """A prober (`parallel.block_plan.Prober`) for fake tensors.

    `trying`: a context in which nothing is counted; `agreeing`: one in which comparisons find no difference. `kept`:
    where plans are kept, if the memory that examining takes is not asked for: then a block is examined once."""

    def __init__(
        self,
        trying: Callable[[], AbstractContextManager[None]],
        agreeing: Callable[[], Any],
        kept: dict[str, BlockPlan] | None = None,
    ):
        self.trying, self.agreeing, self.kept = trying, agreeing, kept

    def __call__(
        self, block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec, plan: BlockPlan | None = None
    ) -> BlockPlan:
        key = key_of(block, leaves, spec)
        if self.kept is None:
            return self._examined(block, forward, leaves, spec, plan or load_plan(key))
        if key not in self.kept:
            with self.trying():
                self.kept[key] = self._examined(block, forward, leaves, spec, load_plan(key))
        return self.kept[key]

    def _examined(
        self, block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec, known: BlockPlan | None
    ) -> BlockPlan:
        """The plan that is known, or one that is found, held against the block."""
        with self.agreeing():
            try:
                is_new = known is None
                if known is None:
                    known = self._found(block, forward, leaves, spec)
                    if known.sites and self.kept is None:
                        _disturb(block, forward, leaves, spec)
                if known.sites:
                    if self.kept is None or not is_new:
                        prove(known, block, forward, leaves, spec, blank)
                    return known
                why = "no attention of torch's was seen"
            except Failures as failure:
                if is_out_of_memory(failure):
                    raise
                why = str(failure).partition("\n")[0]
            return on_whole_shapes(type(block).__name__, forward, leaves, spec, why)

    def _found(self, block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec) -> BlockPlan:
        """The first way to cut it that holds. Raises UnsupportedError where none does."""
        with self.trying():
            examined = Examined(block, forward, leaves, spec, blank)
            last: Exception | None = None
            for plan in islice(plans(examined), MOST_TRIED):
                if not plan.splits:
                    return plan
                try:
                    prove(plan, block, forward, leaves, spec, blank)
                except Failures as failure:
                    last = failure
                    continue
                return plan
            raise UnsupportedError(f"{examined.name}: cannot be split by the shapes of its arguments ({last})")


def _disturb(block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec) -> None:
    """Takes the memory of a probe at its height: the largest argument changed along each of its dims."""
    examined = Examined(block, forward, leaves, spec, blank)
    largest = max(range(len(leaves)), key=lambda i: leaves[i].nbytes if isinstance(leaves[i], Tensor) else -1)
    for ends in argument_ends(examined, largest):
        for seen in ends.seen:
            for base, other in zip(chain(*examined.base.sites), chain(*seen.sites), strict=True):
                _ = (base != other) & ~(base.isnan() & other.isnan())


def plans(examined: Examined) -> Iterator[BlockPlan]:
    """Every way to cut a block that its shapes allow, the likeliest first."""
    leaves, base = examined.leaves, examined.base
    if not base.sites:
        yield BlockPlan()
        return
    arguments: dict[int, TokenDim] = {}
    results: dict[int, TokenDim] = {}
    for number, result in enumerate(base.results):
        if not _is_stream(result):
            continue
        same = [i for i, x in enumerate(leaves) if _is_stream(x) and x.shape == result.shape and i not in arguments]
        if same:
            arguments[same[0]] = results[number] = TokenDim(_token_dim(result), (len(arguments),))
    _add_read(arguments, examined)
    lengths = {dim.atoms[0]: leaves[i].shape[dim.dim] for i, dim in arguments.items()}
    for order in permutations(lengths):
        yield from _plans(examined, arguments, results, {atom: lengths[atom] for atom in order})


def _plans(
    examined: Examined, arguments: dict[int, TokenDim], results: dict[int, TokenDim], lengths: dict[int, int]
) -> Iterator[BlockPlan]:
    """Those with the streams in this order."""
    leaves, base = examined.leaves, examined.base
    sites: list[Site] = []
    for q, k, _ in base.sites:
        queries, keys = _atoms(q.shape[2], lengths), _atoms(k.shape[2], lengths)
        sites.append(Site(queries, keys if queries else None))
    if not any(site.keys for site in sites):
        yield BlockPlan()
        return
    masks = {tuple(call.mask.shape) for call in base.calls if call.mask is not None}
    others = [i for i, x in enumerate(leaves) if i not in arguments and _may_run_over_tokens(x, masks)]
    ways = [[*_dims(leaves[i], lengths), None] for i in others]
    for chosen in product(*ways):
        cut = {i: dim for i, dim in zip(others, chosen, strict=True) if dim is not None}
        yield BlockPlan(arguments | cut, tuple(sites), results)


def _add_read(arguments: dict[int, TokenDim], examined: Examined) -> None:
    """Streams that a block reads and does not give back, as the last joint one does with its text: where queries have
    more rows than the others tell."""
    leaves = examined.leaves
    widths = {leaves[i].shape[-1] for i in arguments}
    read = [i for i, x in enumerate(leaves) if i not in arguments and _is_stream(x) and x.shape[-1] in widths]
    for q, _, _ in examined.base.sites:
        lengths = {dim.atoms[0]: leaves[i].shape[dim.dim] for i, dim in arguments.items()}
        if _atoms(q.shape[2], lengths) is None and read:
            arguments[read[0]] = TokenDim(_token_dim(leaves[read[0]]), (len(arguments),))
            read.pop(0)


def _atoms(rows: int, lengths: dict[int, int]) -> tuple[int, ...] | None:
    """The streams whose rows these are: all of them, or fewer."""
    for number in range(len(lengths), 0, -1):
        for atoms in combinations(lengths, number):
            if sum(lengths[atom] for atom in atoms) == rows:
                return atoms
    return None


def _dims(x: Tensor, lengths: dict[int, int]) -> list[TokenDim]:
    found = ((dim, _atoms(size, lengths)) for dim, size in enumerate(x.shape))
    return [TokenDim(dim, atoms) for dim, atoms in found if atoms is not None]


def _may_run_over_tokens(x: Any, masks: set[tuple[int, ...]]) -> bool:
    """A mask is over the whole sequence on every rank."""
    return isinstance(x, Tensor) and x.dtype != torch.bool and x.ndim > 1 and tuple(x.shape) not in masks


def _is_stream(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 3 and x.numel() > 0


def _token_dim(x: Tensor) -> int:
    """The longest dim between the first and the last."""
    return max(range(1, x.ndim - 1), key=lambda dim: x.shape[dim])
