"""Sequence parallel on a block stack: tokens are split where a block is entered, and only attention communicates.

What a block's arguments mean is data (`BlockPlan`), found by a *prober* that is passed in; this file knows no model.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.errors import RankError, UnsupportedError
from parafuse.kernels.attention import Choice
from parafuse.parallel.attention import SequenceAttention
from parafuse.parallel.attention_mode import run_on_rows, with_choice
from parafuse.parallel.block_plan import BlockPlan, Bound, Prober
from parafuse.parallel.comm import all_gather
from parafuse.parallel.compiled import CompiledBlocks, refuse_compile
from parafuse.parallel.effects import Parts
from parafuse.parallel.fingerprint import fingerprint, hooks_in, signature, size_of
from parafuse.parallel.hooks import Forward, override, override_forward
from parafuse.parallel.mesh import Mesh
from parafuse.parallel.reused import NothingReused, Reused
from parafuse.parallel.shard import SequenceGroup, gather_all
from parafuse.parallel.whole_shapes import WholeShapes

MAX_PROVEN = 4096
"""Sizes that are kept in mind; more are proven again."""


class SequenceParallel:
    """Split tokens in the blocks of one model. `install` on every rank of the sequence group; calls are collective."""

    def __init__(
        self,
        root: nn.Module,
        blocks: Iterable[nn.Module],
        mesh: Mesh,
        prober: Prober,
        reused: Reused | None = None,
        choice: Choice | None = None,
    ):
        """`choice`: what computes attention."""
        self.root, self.blocks, self.prober = root, list(blocks), prober
        self._reused: Reused = reused or NothingReused()
        self.attention = SequenceAttention(mesh, choice)
        self.ranks = SequenceGroup(mesh.sequence_degree, mesh.sequence_rank, mesh.sequence)
        self.plans: dict[Any, BlockPlan] = {}
        self._slices: dict[Any, Any] | None = None
        self._proven: dict[Any, BlockPlan] = {}
        """The plan by structure and sizes, where it has been held against the serial run."""
        self.whole = WholeShapes(self.attention, self.ranks)
        self.compiled = CompiledBlocks(self.whole)
        self._undo: list[Callable[[], None]] = []
        self.renew()

    def renew(self) -> None:
        """Looks anew at what the model is made of. Plans are kept by what a block is, so one that was changed gets its
        own, and gets the old one back when the change is taken back."""
        self._parts = Parts(self.root)
        self._kinds = {block: fingerprint(block) for block in self.blocks}
        self._inner = {block: list(block.modules())[1:] for block in self.blocks}

    def kind_of(self, block: nn.Module) -> str:
        """What it is made of: the first part of the keys of `plans`."""
        return self._kinds[block]

    def has_changed(self) -> bool:
        """Whether the model is no longer what it was; some milliseconds for a large one."""
        return self._parts.have_changed()

    def install(self) -> None:
        self._undo.append(override_forward(self.root, self._root_forward))
        self._undo.append(refuse_compile(self.root))
        for block in self.blocks:
            compile = self.compiled.compile_method(block, self._kinds[block])
            self._undo.append(override(block, "compile", compile))
            self._undo.append(
                override_forward(block, lambda original, block=block: self._block_forward(block, original))
            )

    def remove(self) -> None:
        """Puts every forward back as it was. No communication."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self.compiled.forget()

    def _root_forward(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._parts.have_other_objects():
                self.renew()
            self._slices = {}
            self.whole.shortest = sys.maxsize
            try:
                result = gather_all(original(*args, **kwargs))
            finally:
                self._slices = None
            self._refuse_nothing_split()
            return result

        return forward

    def _refuse_nothing_split(self) -> None:
        """Raises UnsupportedError where every block ran whole: several ranks would do the work of one."""
        if (
            self.ranks.degree == 1
            or not self.plans
            or self.ranks.work
            or any(plan.sites for plan in self.plans.values())
        ):
            return
        if self.whole.shortest <= self.ranks.degree:
            return  # a stream of a token for each rank, at most, says nothing of longer calls
        whole = [f"{name} ({count} times)" for name, count in self.ranks.causes.most_common(3)]
        raise UnsupportedError(
            f"{type(self.root).__name__}: none of its blocks can be split over tokens: "
            + (f"they need whole tokens for {', '.join(whole)}" if whole else "they mix none")
            + ". Run it on one rank (or set its attention backend to native, if it is another one)."
        )

    def _block_forward(self, block: nn.Module, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._slices is None:  # called by itself, outside of the model's own forward
                return original(*args, **kwargs)
            leaves, spec = tree_flatten((args, kwargs))
            key = (self._kinds[block], hooks_in(self._inner[block]), str(spec), tuple(map(signature, leaves)))
            plan = self._plan_for(key, block, original, leaves, spec)
            compiled = self.compiled.get(block)
            if plan.why_not_local:
                if compiled is not None:
                    call = self._reused.explicit(block, original, leaves, spec)
                    return call.finish(compiled.on_whole_shapes(block, plan, call.forward, call.leaves, call.spec))
                return self.whole(plan, original, leaves, spec)
            if not plan.splits:
                run = original
                if compiled is not None:
                    run = partial(compiled.call, self._reused.variant(block), original)
                return with_choice(run, self.attention.choice)(*gather_all(args), **gather_all(kwargs))
            bound = Bound(plan, leaves, self.ranks, self._slices, own=compiled is not None)
            local_args, local_kwargs = tree_unflatten(bound.local, spec)
            run: Any = run_on_rows
            if compiled is not None:
                run = partial(compiled.run_on_rows, self._reused.variant(block))
            left_out = self._reused.left_out(block)
            sites = tuple(site for number, site in enumerate(bound.sites) if number not in left_out)
            result, calls = run(original, local_args, local_kwargs, sites, self.attention, self.ranks)
            if calls != len(sites):
                raise UnsupportedError(
                    f"{type(block).__name__}: made {calls} attention calls through torch's "
                    f"scaled_dot_product_attention, {len(sites)} when it was examined; was its processor "
                    "or attention backend changed? remove() parafuse, then apply it again."
                )
            return bound.wrap(result)

        return forward

    def _plan_for(self, key: Any, block: nn.Module, original: Forward, leaves: list[Any], spec: TreeSpec) -> BlockPlan:
        """The plan for arguments of this structure, held against the serial run at sizes that are new. Collective at
        these: ranks that find different plans would wait for each other."""
        sizes = (key, tuple(map(size_of, leaves)))
        plan = self._proven.get(sizes)
        if plan is not None:
            return plan
        known = self.plans.get(key)
        if known is None or known.splits:
            whole = gather_all(leaves)
            plan = self.prober(block, original, whole, spec, known)
            self._agree(block, plan, whole)
        else:
            plan = known
        self.plans.setdefault(key, plan)
        if len(self._proven) >= MAX_PROVEN:
            self._proven.clear()
        self._proven[sizes] = plan
        return plan

    def _agree(self, block: nn.Module, plan: BlockPlan, leaves: list[Any]) -> None:
        """Raises RankError on all ranks unless they have found the same plan. Collective; waits for the device."""
        if self.ranks.group is None:
            return
        device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), None)
        facts = repr((plan.arguments, plan.sites, plan.results, bool(plan.why_not_local)))  # the reason has figures
        mine = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:7])
        found = all_gather(torch.tensor([mine], device=device), self.ranks.degree, self.ranks.group.group_name)
        if len(set(found.flatten().tolist())) > 1:
            raise RankError(
                f"{type(block).__name__}: the ranks find different ways to split it (are their devices or weights "
                "different, or the plans they kept? PARAFUSE_CACHE= keeps none); run it on one rank."
            )
