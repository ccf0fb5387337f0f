"""Sparse attention in a ring: each rank gets, of every other rank's keys and values, the tiles that its queries see.

Legend: B batch, h query heads and g key heads of this rank, n true rows of a rank, D and Dv head sizes, R ranks of the
ring, T tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parafuse.kernels.attention import Call
from parafuse.kernels.merge import merge_
from parafuse.parallel.comm import Shift, _resolve, all_reduce
from parafuse.parallel.layout import Layout
from parafuse.parallel.ring import drop_filler, token_index
from parafuse.parallel.sparse import LayerPlan

CPU = torch.device("cpu")
PADDED_ROWS = 1024
"""Rows of keys come in multiples of so many where there are more."""


def sparse_ring_attention(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    call: Call,
    layouts: tuple[Layout, Layout],
    group: str,
    plan: LayerPlan,
    heads: tuple[int, int],
    expand: Callable[[Tensor], Tensor],
) -> Tensor:
    """q (B, h, n, D) true rows, k and v (B, g, rows, D) with filler -> (B, h, n, Dv). Collective on the ring.

    Rank r sends rank s the rows of its tiles that any query of s sees, straight, and no others: all ranks know
    these from what is chosen for all tiles. The next part is sent before the one at hand is attended. `layouts`: of
    queries and of keys. `heads`: [first, last) of this rank's, as `plan.order` has them. `expand`: key heads
    repeated to as many as query heads."""
    shift = Shift(_resolve(group))
    rank, degree = shift.rank, shift.degree
    ulysses, tiles = layouts[0].degree // degree, plan.layout
    queries, positions = ([token_index(layout, r * ulysses, ulysses, CPU) for r in range(degree)] for layout in layouts)
    k, v = (drop_filler(x, layouts[1], rank * ulysses, ulysses) for x in kv)
    host, tile_of = tiles.host_keys.tile_of, tiles.keys.tile_of
    own_queries = queries[rank].to(q.device)
    q_tiles = tiles.queries.tile_of[own_queries]
    chosen = plan.choose(q, expand(k), q_tiles, tile_of[positions[rank].to(q.device)], call, group)
    if len(q_tiles):
        plan.note(chosen, torch.bincount(q_tiles, minlength=tiles.queries.num_tiles), heads)
    wider = F.pad(chosen, (0, 1))  # one more tile, which nothing sees
    seen = _seen_by_ranks(plan, chosen, [tiles.host_queries.tile_of[rows] for rows in queries], group)
    merged: tuple[Tensor, Tensor] | None = None

    def post(step: int) -> _Coming:
        to, source = (rank + step) % degree, (rank - step) % degree
        mine = torch.nonzero(seen[to][host[positions[rank]]]).flatten().to(q.device)
        rows = positions[source][seen[rank][host[positions[source]]]]
        send = torch.cat([x.index_select(2, mine).reshape(-1) for x in (k, v)])
        per_row = q.shape[0] * k.shape[1] * (k.shape[-1] + v.shape[-1])
        return _Coming(rows, send, *shift.post(send, to, len(rows) * per_row, source))

    rows, k_part, v_part, coming = positions[rank], k, v, None
    for step in range(degree):
        if coming is not None:
            rows, k_part, v_part = coming.arrived(k, v)
        coming = post(step + 1) if step + 1 < degree else None
        if len(rows) and len(q_tiles):
            columns = rows.to(q.device)
            mask = call.mask if call.mask is None or call.mask.shape[-1] == 1 else call.mask.index_select(-1, columns)
            few = _Padded.of(expand(k_part), expand(v_part), tile_of[columns], mask, chosen.shape[-1])
            part, part_lse = plan.state.core(
                q, few.k, few.v, wider, q_tiles, few.tiles, mask=few.mask, scale=call.scale
            )
            merged = (part.float(), part_lse) if merged is None else merge_(*merged, part, part_lse)
    if merged is None:
        return q.new_zeros((*q.shape[:3], v.shape[-1]))
    return plan.mask.without_rows(merged[0].to(q.dtype), own_queries)


@dataclass(frozen=True)
class _Padded:
    """Keys and values with rows that nothing sees, up to a multiple of a coarse step: what goes by content differs in
    length from call to call, and a GPU's kernel is compiled for lengths."""

    k: Tensor
    v: Tensor
    tiles: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, k: Tensor, v: Tensor, tiles: Tensor, mask: Tensor | None, unseen: int) -> _Padded:
        more = -len(tiles) % PADDED_ROWS if len(tiles) > PADDED_ROWS else 0
        if not more:
            return cls(k, v, tiles, mask)
        k, v = F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more))
        mask = mask if mask is None or mask.shape[-1] == 1 else F.pad(mask, (0, more))
        return cls(k, v, F.pad(tiles, (0, more), value=unseen), mask)


@dataclass(frozen=True)
class _Coming:
    """Keys and values that are on their way."""

    rows: Tensor
    """Where they are in the whole sequence."""
    sent: Tensor
    """What goes the other way, kept until it has gone."""
    received: Tensor
    works: list[Any]

    def arrived(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Waits; (rows, keys, values) in the shapes of this rank's own."""
        for work in self.works:
            work.wait()
        shape = (k.shape[0], k.shape[1], len(self.rows))
        size = math.prod(shape) * k.shape[-1]
        return self.rows, self.received[:size].view(*shape, k.shape[-1]), self.received[size:].view(*shape, v.shape[-1])


def _seen_by_ranks(plan: LayerPlan, chosen: Tensor, tiles: list[Tensor], group: str) -> Tensor:
    """(R, Tk) bool on the host: which tiles of keys any query of each rank sees. `tiles`: of each rank's queries.

    Collective on the ring where tiles go by content; waits for the device there."""
    there = torch.zeros(len(tiles), plan.layout.host_queries.num_tiles, dtype=torch.bool)
    for r, own in enumerate(tiles):
        there[r, own] = True
    known = plan.layout.host_chosen
    if known is None:  # by content: each rank has computed it, and one rounding would make sizes differ
        anywhere = all_reduce(chosen.flatten(0, 1).any(dim=0).to(torch.uint8), group).cpu().float()
    else:
        anywhere = known[0, 0].float()
    return there.float() @ anywhere > 0
