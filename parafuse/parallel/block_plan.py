"""What a block's arguments mean, as data, and one call of it split by that.

An *atom* is the smallest run of tokens that belongs together (a stream, or a part of a joint one), named by a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.parallel.hooks import Forward
from parafuse.parallel.layout import Layout
from parafuse.parallel.shard import SequenceGroup, Sharded

Atoms = tuple[int, ...]

KEPT = -1
"""In place of an atom, at an attention: rows that every rank has, however many there are in a call."""


@dataclass(frozen=True)
class TokenDim:
    """A dim of an argument or result that runs over tokens, and which atoms lie along it, in order."""

    dim: int
    atoms: Atoms


@dataclass(frozen=True)
class Site:
    """One attention call of a block. Keys None: they are on every rank (cross-attention), nothing is exchanged. Atoms
    of either may hold `KEPT` once."""

    queries: Atoms | None
    keys: Atoms | None


@dataclass(frozen=True)
class BlockPlan:
    """How one block is split, for one structure of arguments. No sites that exchange: it runs on whole tensors."""

    arguments: dict[int, TokenDim] = field(default_factory=dict[int, TokenDim])
    """Leaf number -> token dim; leaves not named are replicated."""
    sites: tuple[Site, ...] = ()
    results: dict[int, TokenDim] = field(default_factory=dict[int, TokenDim])
    """Leaf number of the result -> token dim."""
    why_not_local: str = ""
    """Set where the block cannot run on a rank's rows as if they were all: it then runs on Sharded tensors, which show
    it the whole shape, as the model's code between the blocks does."""

    @property
    def splits(self) -> bool:
        return any(site.keys is not None for site in self.sites)


class Prober(Protocol):
    """Finds the plan of a block for real arguments; with `plan`, only sees whether that one holds for them too."""

    def __call__(
        self, block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec, plan: BlockPlan | None = None
    ) -> BlockPlan: ...


Lengths = dict[int, tuple[int, ...]]
SiteLayouts = tuple[Layout | None, Layout | None]
"""Of the queries and of the keys of an attention call; None for what every rank has whole. The length of a kept
segment is known in the call alone (`Layout.with_kept`); here it is 0."""


def bind(plan: BlockPlan, leaves: Sequence[Any]) -> Lengths:
    """Atom -> lengths of its segments, from the arguments at hand; those that arrive split decide first."""
    out: Lengths = {}
    named = [(leaves[i], label) for i, label in plan.arguments.items()]
    named.sort(key=lambda pair: not isinstance(pair[0], Sharded))
    for _ in range(len(named)):
        for leaf, label in named:
            unknown = [atom for atom in label.atoms if atom not in out]
            if len(unknown) != 1:
                continue
            if len(label.atoms) == 1 and isinstance(leaf, Sharded) and leaf.token_dim == label.dim:
                out[unknown[0]] = leaf.tokens.lengths
            else:
                known = sum(sum(out[atom]) for atom in label.atoms if atom in out)
                out[unknown[0]] = (leaf.shape[label.dim] - known,)
    return out


class Bound:
    """One block call, split: local arguments, attention by site, and results that carry their rows."""

    def __init__(
        self, plan: BlockPlan, leaves: list[Any], ranks: SequenceGroup, slices: dict[Any, Any], *, own: bool = False
    ):
        self.plan, self.ranks, self._own = plan, ranks, own
        self.lengths = bind(plan, leaves)
        self._slices = slices
        self.local = [self._local(i, leaf) for i, leaf in enumerate(leaves)]

    def _local(self, index: int, leaf: Any) -> Any:
        label = self.plan.arguments.get(index)
        if label is None:
            return leaf.whole() if isinstance(leaf, Sharded) else leaf
        layout = self.layout(label.atoms)
        if isinstance(leaf, Sharded):
            if leaf.token_dim == label.dim and leaf.tokens == layout:
                return leaf.local
            return self.ranks.take(leaf.whole(), label.dim, layout)
        key = (id(leaf), label.dim, layout)
        # Tables are the same for every block: cut once a call, and again where the model has written into one since
        # (tensors of inference mode do not tell). The leaf is kept alive, so that its id is its own.
        version = None if leaf.is_inference() else leaf._version
        if key not in self._slices or version is None or self._slices[key][1] != version:
            rows = self.ranks.take(leaf, label.dim, layout)
            # A part of a tensor on one rank is one with filler, so another tensor, on another: one graph serves both.
            rows = rows.clone(memory_format=torch.contiguous_format) if self._own and rows._base is not None else rows
            self._slices[key] = (leaf, version, rows)
        return self._slices[key][2]

    def layout(self, atoms: Atoms) -> Layout:
        lengths: list[int] = []
        kept = None
        for atom in atoms:
            if atom == KEPT:
                kept = len(lengths)
            lengths += (0,) if atom == KEPT else self.lengths[atom]
        return Layout(tuple(lengths), self.ranks.degree, kept)

    @property
    def sites(self) -> tuple[SiteLayouts, ...]:
        return tuple(
            (
                None if site.queries is None else self.layout(site.queries),
                None if site.keys is None else self.layout(site.keys),
            )
            for site in self.plan.sites
        )

    def wrap(self, result: Any) -> Any:
        """The block's result with its token tensors as Sharded."""
        leaves, spec = tree_flatten(result)
        for i, label in self.plan.results.items():
            leaves[i] = Sharded(leaves[i], label.dim, self.layout(label.atoms), self.ranks)
        return tree_unflatten(leaves, spec)
