"""Attention over tokens that are spread over ranks: Ulysses, ring, and ring outside Ulysses, as one path.

Legend: B batch, H query heads, G key heads, S local rows (filler included), N rows seen by attention, D head size,
P = R x U ranks of the sequence = ring degree x Ulysses degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parafuse.config import Axis
from parafuse.errors import UnsupportedError
from parafuse.kernels.attention import Call, Choice, attention, attention_lse, choice_of
from parafuse.parallel.comm import all_to_all, keeps_order, rank_and_degree
from parafuse.parallel.kept_rows import own_part, with_everyone
from parafuse.parallel.layout import Layout, head_range, key_head_range
from parafuse.parallel.mesh import Mesh
from parafuse.parallel.pack import Streams, join_rows, pack_heads, split_rows, unpack_heads, unpack_result
from parafuse.parallel.ring import expand_keys, ring_attention
from parafuse.parallel.sparse import LayerPlan, SparseAttention
from parafuse.parallel.sparse_ring import sparse_ring_attention


class SequenceAttention:
    """Scaled-dot-product attention for local rows. Collective on the sequence group, all ranks in the same order."""

    def __init__(self, mesh: Mesh, choice: Choice | None = None):
        """`choice`: the backend that computes it; torch's own where there is none."""
        self.choice = choice or Choice()
        self.ulysses_group, self.ring_group = mesh.group_name(Axis.ULYSSES), mesh.group_name(Axis.RING)
        self.sequence_group = "" if mesh.sequence is None else mesh.sequence.group_name

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, call: Call) -> Tensor:
        """As `in_order`, for graphs that may differ by rank: no compiler may drop or move it."""
        return sequence_attention(q, k, v, *self._facts(queries, keys, call))

    def in_order(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, call: Call, after: Tensor | None
    ) -> Tensor:
        """q (B, H, S, D), k (B, G, S', D), v (B, G, S', Dv) -> (B, H, S, Dv); filler rows of the result are zero.

        Bytes sent: `layout.ulysses_bytes` inside the Ulysses group, `layout.ring_bytes` of the heads held around the
        ring; for kept rows of the queries, one gather of them beside that. Ulysses: Jacobs et al. 2023,
        arXiv:2309.14509; ring: Liu et al. 2023, arXiv:2310.01889; both together: Fang and Zhao 2024,
        arXiv:2405.07719. `after`: what the attention before it gave, so that all ranks meet in the same order."""
        return attention_after(q, k, v, *self._facts(queries, keys, call), after)

    def _facts(self, queries: Layout, keys: Layout, call: Call) -> tuple[Any, ...]:
        groups = self.ulysses_group, self.ring_group, self.sequence_group
        lengths = list(queries.lengths), list(keys.lengths)
        return (call.mask, *lengths, queries.kept, keys.kept, *groups, call.scale, call.is_causal, self.choice.key)


def _attend(  # noqa: PLR0913, PLR0917 (an operator's arguments are flat)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    kept_queries: int | None,
    kept_keys: int | None,
    ulysses_group: str,
    ring_group: str,
    sequence_group: str,
    scale: float | None,
    is_causal: bool,
    choice: str,
    after: Tensor | None = None,
) -> Tensor:
    """`SequenceAttention` as one operator: what is packed, sent and attended does not enter a traced graph, where
    lengths that are symbols would make it slow to compile."""
    here = RankAttention(ulysses_group, ring_group, choice_of(choice))
    degree = here.ulysses * here.ring
    queries, keys = Layout(tuple(query_lengths), degree, kept_queries), Layout(tuple(key_lengths), degree, kept_keys)
    for what, x, layout in (("queries", q, queries), ("keys", k, keys)):
        if x.shape[2] != layout.local:
            raise UnsupportedError(f"{x.shape[2]} rows of {what}, where {layout} has {layout.local}")
    rank = here.ring_rank * here.ulysses + here.ulysses_rank
    q, k, v = own_part(q, queries, rank), own_part(k, keys, rank), own_part(v, keys, rank)
    out = here(q, k, v, queries.spread, keys.spread, Call(mask, scale, is_causal))
    return with_everyone(out, queries, sequence_group)


def _shape_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    kept_queries: int | None,
    *_: object,
) -> Tensor:
    batch, heads, rows, width = *q.shape[:3], v.shape[-1]
    if kept_queries is None:  # stored (B, S, H, D): what follows flattens heads, which then costs nothing
        return q.new_empty((batch, rows, heads, width)).transpose(1, 2)
    return q.new_empty((batch, heads, rows, width))


sequence_attention = keeps_order(torch.library.custom_op("parafuse::sequence_attention", _attend, mutates_args=()))
sequence_attention.register_fake(_shape_of)


attention_after = torch.library.custom_op("parafuse::attention_after", _attend, mutates_args=())
"""For graphs that are equal on all ranks: what comes `after` what orders it. Torch keeps no graph with an ordered
effect for a later process."""
attention_after.register_fake(_shape_of)


class RankAttention:
    """What one rank does of an attention: packs, sends, attends."""

    def __init__(self, ulysses_group: str, ring_group: str, choice: Choice):
        self.ulysses_group, self.ring_group, self.choice = ulysses_group, ring_group, choice
        self.ulysses_rank, self.ulysses = rank_and_degree(ulysses_group)
        self.ring_rank, self.ring = rank_and_degree(ring_group)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, call: Call) -> Tensor:
        sparse: SparseAttention | None = self.choice.sparse
        plan = sparse.plan(q, k, queries, keys, call) if sparse is not None else None
        if plan is None:
            return self._attended(q, k, v, queries, keys, call, None)
        mask = plan.mask.keys
        if not plan.moves_heads:
            return self._attended(q, k, v, queries, keys, Call(mask, call.scale), plan)
        order = torch.tensor(plan.order, device=q.device)
        if mask is not None and mask.ndim > 2 and mask.shape[-3] == len(order):
            mask = mask.index_select(-3, order)
        q, k, v = (x.index_select(1, order) for x in (q, k, v))
        out = self._attended(q, k, v, queries, keys, Call(mask, call.scale), plan)
        return out.transpose(1, 2).index_select(2, order.argsort()).transpose(1, 2)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, call: Call, plan: LayerPlan | None
    ) -> Tensor:
        heads = head_range(q.shape[1], self.ulysses, self.ulysses_rank)
        if self.ulysses > 1:
            qkv = self._scatter_heads(q, k, v, queries, keys)
        else:
            rows, key_rows = self._chunk(queries, self.ring_rank, True), self._chunk(keys, self.ring_rank, False)
            qkv = tuple(
                join_rows(x.transpose(1, 2).unsqueeze(0), *chunk).transpose(1, 2)
                for x, chunk in ((q, rows), (k, key_rows), (v, key_rows))
            )
        call = Call(_slice_heads(call.mask, heads, q.shape[1]), call.scale, call.is_causal)
        if heads[0] == heads[1]:
            out = qkv[0].new_empty((*qkv[0].shape[:3], v.shape[-1]))
        else:
            key_of_head = _key_of_head(heads, q.shape[1] // k.shape[1])
            if plan is not None:
                out = self._attend_sparsely(qkv, (queries, keys), call, key_of_head, plan, heads)
            else:
                out = self._attend(qkv[0], qkv[1], qkv[2], queries, keys, call, key_of_head)
        return self._gather_heads(out, q.shape[1], queries)

    def _chunk(self, layout: Layout, ring_rank: int, true_rows: bool) -> tuple[list[int], tuple[int, ...]]:
        """(rows per segment, parts) of what one ring rank holds: its true rows, or filler included."""
        if true_rows or self.ring == 1:
            spans = layout.spans(ring_rank * self.ulysses, self.ulysses)
            return [count for _, count in spans], layout.parts
        return [part * self.ulysses for part in layout.parts], layout.parts

    def _scatter_heads(self, q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout) -> tuple[Tensor, ...]:
        """All-to-all: all heads of the local rows -> this rank's heads of the ring chunk's rows. One exchange."""
        ranges = tuple(head_range(q.shape[1], self.ulysses, r) for r in range(self.ulysses))
        key_ranges = tuple(key_head_range(r, q.shape[1] // k.shape[1]) for r in ranges)
        chunks = [self._chunk(queries, self.ring_rank, True), self._chunk(keys, self.ring_rank, False)]
        if chunks[0] == chunks[1]:
            streams, chunks = [Streams((q, k, v), (ranges, key_ranges, key_ranges))], chunks[:1]
        else:
            streams = [Streams((q,), (ranges,)), Streams((k, v), (key_ranges, key_ranges))]
        send, send_sizes = pack_heads(streams)
        received = self._exchange(send, send_sizes, [send_sizes[self.ulysses_rank]] * self.ulysses)
        return tuple(unpack_heads(received, streams, self.ulysses_rank, chunks))

    def _gather_heads(self, out: Tensor, num_heads: int, queries: Layout) -> Tensor:
        """The way back: (B, h, N, Dv) of this rank's heads -> (B, H, S, Dv) of the local rows. One exchange."""
        lengths, parts = self._chunk(queries, self.ring_rank, True)
        send_PBShD = split_rows(out.transpose(1, 2), lengths, parts, self.ulysses)
        if self.ulysses == 1:
            return send_PBShD.squeeze(0).transpose(1, 2)
        b, rows, _, d = send_PBShD.shape[1:]
        ranges = [head_range(num_heads, self.ulysses, r) for r in range(self.ulysses)]
        send_sizes = [send_PBShD[0].numel()] * self.ulysses
        receive_sizes = [b * (last - first) * rows * d for first, last in ranges]
        received = self._exchange(send_PBShD.view(-1), send_sizes, receive_sizes)
        return unpack_result(received, ranges, (b, rows, num_heads, d))

    def _exchange(self, send_N: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        return all_to_all(send_N, send_sizes, receive_sizes, self.ulysses_group)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, call: Call, key_of_head: list[int]
    ) -> Tensor:
        """Attention of this rank's heads and query rows over all keys."""
        if self.ring == 1:
            k, v = expand_keys(k, key_of_head), expand_keys(v, key_of_head)
            # Lossy backends compute attention of as many queries as keys alone, as on one rank (`attention_mode.here`).
            fits = not self.choice.is_lossy or queries.total == keys.total
            return attention(q, k, v, call, self.choice if fits else Choice())

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            k, v = expand_keys(k, key_of_head), expand_keys(v, key_of_head)
            return attention_lse(q, k, v, mask, scale=call.scale, choice=self.choice)

        return ring_attention(q, k, v, call, queries, keys, self.ring_group, attend)

    def _attend_sparsely(
        self,
        qkv: tuple[Tensor, ...],
        layouts: tuple[Layout, Layout],
        call: Call,
        key_of_head: list[int],
        plan: LayerPlan,
        heads: tuple[int, int],
    ) -> Tensor:
        def expand(x: Tensor) -> Tensor:
            return expand_keys(x, key_of_head)

        q, k, v = qkv
        if self.ring == 1:
            return plan.attend(q, expand(k), expand(v), call, heads)
        return sparse_ring_attention(q, (k, v), call, layouts, self.ring_group, plan, heads, expand)


def _key_of_head(heads: tuple[int, int], group_size: int) -> list[int]:
    """The local key head of each local query head; empty where each query head has its own."""
    if group_size == 1:
        return []
    return [head // group_size - heads[0] // group_size for head in range(*heads)]


def _slice_heads(mask: Tensor | None, heads: tuple[int, int], num_heads: int) -> Tensor | None:
    """A per-head mask cut to the local heads; others as they are."""
    if mask is None or mask.ndim < 3 or mask.shape[-3] == 1:
        return mask
    if mask.shape[-3] != num_heads:
        raise UnsupportedError(f"attention mask of shape {tuple(mask.shape)} for {num_heads} heads")
    return mask[..., heads[0] : heads[1], :, :]
