"""Blocks that cannot run on a rank's rows as if they were all: they run on Sharded tensors, which show them the whole
shape, as the model's code between the blocks does. Whatever they do is right; what has no rule gathers."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.errors import UnsupportedError
from parafuse.kernels.attention import Call
from parafuse.parallel.attention import SequenceAttention
from parafuse.parallel.attention_mode import AttentionMode, check_mask, here, own_rows
from parafuse.parallel.block_plan import BlockPlan
from parafuse.parallel.hooks import Forward
from parafuse.parallel.layout import Layout
from parafuse.parallel.shard import SequenceGroup, Sharded, gather_all


class WholeShapes:
    """Runs blocks on Sharded tensors. Collective on the sequence group."""

    def __init__(self, attention: SequenceAttention, ranks: SequenceGroup):
        self.attention, self.ranks = attention, ranks
        self.shortest = sys.maxsize
        """Tokens of the shortest stream that was split, since somebody set this back."""

    def measure(self, plan: BlockPlan, leaves: list[Any]) -> None:
        """Notes how long the streams are that a call splits."""
        lengths = [leaves[i].shape[label.dim] for i, label in plan.arguments.items()]
        self.shortest = min([self.shortest, *lengths])

    def __call__(self, plan: BlockPlan, forward: Forward, leaves: list[Any], spec: TreeSpec) -> Any:
        self.measure(plan, leaves)
        split = list(leaves)
        for i, label in plan.arguments.items():
            split[i] = self._sharded(leaves[i], label.dim)
        args, kwargs = tree_unflatten(split, spec)
        try:
            with AttentionMode(self._attend):
                result = forward(*args, **kwargs)
        except RuntimeError as error:
            if type(error).__module__ != "torch._dynamo.exc":
                raise
            part = "flex_attention" if "flex_attention" in str(error) else "a part of itself"
            raise UnsupportedError(f"a block that compiles {part} cannot be split over tokens") from error
        out, result_spec = tree_flatten(result)
        for i, label in plan.results.items():
            out[i] = self._sharded(out[i], label.dim)
        return tree_unflatten(out, result_spec)

    def _sharded(self, x: Any, dim: int) -> Any:
        if isinstance(x, Sharded) or not isinstance(x, Tensor):
            return x
        layout = Layout((x.shape[dim],), self.ranks.degree)
        rows = self.ranks.take(x, dim, layout)
        rows = rows.clone() if rows.untyped_storage()._cdata == x.untyped_storage()._cdata else rows
        return Sharded(rows, dim, layout, self.ranks).as_borrowed(source=x)

    def _attend(self, site: int, q: Tensor, k: Tensor, v: Tensor, call: Call, given: dict[str, Any]) -> Tensor:
        """Attention of tensors of which some are Sharded."""
        if not any(isinstance(x, Sharded) for x in (q, k, v)):
            return here(gather_all(given), self.attention.choice)
        mask = gather_all(call.mask)
        if isinstance(q, Sharded) and q.ndim in (3, 4):
            tokens = q.ndim - 2
            whole_keys = not isinstance(k, Sharded) and not isinstance(v, Sharded)
            if q.token_dim == tokens and whole_keys:
                whole_call = Call(mask, call.scale, call.is_causal)
                rows = dict(own_rows(self.ranks, q.tokens, whole_call, given | {"attn_mask": mask}))
                rows["query"] = q.local
                return q.like(here(rows, self.attention.choice, of_rows=True), tokens)
            if isinstance(k, Sharded) and isinstance(v, Sharded) and k.token_dim == v.token_dim:
                v = v.split_as(k.tokens)
                if q.token_dim == k.token_dim == v.token_dim == tokens:
                    check_mask(mask, q.tokens, k.tokens)
                    self.ranks.work["attention"] += 1
                    q4, k4, v4 = (x.local if x.ndim == 4 else x.local.unsqueeze(0) for x in (q, k, v))
                    whole_call = Call(mask, call.scale, call.is_causal)
                    out = self.attention(q4, k4, v4, q.tokens, k.tokens, whole_call)
                    return q.like(out if q.ndim == 4 else out.squeeze(0), tokens)
                if q.token_dim == k.token_dim == v.token_dim < q.ndim - 2 and q.tokens == k.tokens:
                    self.ranks.work["attention"] += 1
                    if mask is not None and mask.ndim >= q.ndim - q.token_dim:
                        dim = mask.ndim - (q.ndim - q.token_dim)
                        mask = self.ranks.take(mask, dim, q.tokens) if mask.shape[dim] != 1 else mask
                    local_given: dict[str, Any] = {
                        "query": q.local,
                        "key": k.local,
                        "value": v.local,
                        "attn_mask": mask,
                    }
                    return q.like(here({**given, **local_given}, self.attention.choice))
        self.ranks.causes["attention of tokens that are split in different ways"] += 1
        return here(gather_all(given), self.attention.choice)
