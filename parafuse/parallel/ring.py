"""Ring attention: blocks of keys travel around the ring while each rank attends; partial results merge by their LSE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from parafuse.kernels.attention import Call
from parafuse.kernels.merge import merge_
from parafuse.parallel.comm import Rotation, _resolve
from parafuse.parallel.layout import Layout

AttendBlock = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]
"""(q (B, h, n, D), k and v (B, g, m, D), mask) -> (out, lse)."""


def token_index(layout: Layout, first: int, count: int, device: torch.device) -> Tensor:
    """Positions, in the model's order, of the true rows that `count` ranks from `first` on hold."""
    pieces, offset = [], 0
    for length, (start, number) in zip(layout.lengths, layout.spans(first, count), strict=True):
        pieces.append(torch.arange(offset + start, offset + start + number, device=device))
        offset += length
    return torch.cat(pieces)


def drop_filler(x_BHND: Tensor, layout: Layout, first: int, count: int) -> Tensor:
    """The true rows of a chunk that holds `count * part` rows of each segment."""
    pieces, offset = [], 0
    for part, (_, number) in zip(layout.parts, layout.spans(first, count), strict=True):
        pieces.append(x_BHND.narrow(2, offset, number))
        offset += part * count
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def block_mask(call: Call, rows: Tensor, columns: Tensor) -> Tensor | None:
    """The part of a mask over the whole sequence that belongs to these query rows and these keys."""
    mask = call.mask
    if mask is not None:
        mask = mask.index_select(-1, columns) if mask.shape[-1] != 1 else mask
        return mask.index_select(-2, rows) if mask.ndim > 1 and mask.shape[-2] != 1 else mask
    return rows[:, None] >= columns[None, :] if call.is_causal else None


def expand_keys(x_BGND: Tensor, key_of_head: Sequence[int]) -> Tensor:
    """Key heads repeated, so that each query head has its own: (B, g, N, D) -> (B, h, N, D)."""
    if not key_of_head:
        return x_BGND
    runs = [(key, len(list(heads))) for key, heads in groupby(key_of_head)]
    return torch.cat([x_BGND[:, key : key + 1].expand(-1, count, -1, -1) for key, count in runs], dim=1)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    queries: Layout,
    keys: Layout,
    group: str,
    attend: AttendBlock,
) -> Tensor:
    """q (B, h, n, D) true rows, k and v (B, g, m, D) with filler -> (B, h, n, Dv). Collective on the ring.

    Keys and values go round in one packed buffer; the next send is posted before the attention over the block at hand.
    `attend`: (out, lse) of q over one block. Liu et al. 2023, arXiv:2310.01889."""
    rotation = Rotation(_resolve(group))
    degree = rotation.degree
    ulysses = keys.degree // degree
    is_masked = call.mask is not None or call.is_causal
    rows = token_index(queries, rotation.rank * ulysses, ulysses, q.device) if is_masked else None
    packed = k.new_empty(k.numel() + v.numel())
    packed[: k.numel()].view(k.shape).copy_(k)
    packed[k.numel() :].view(v.shape).copy_(v)
    merged: tuple[Tensor, Tensor] | None = None
    for step in range(degree):
        received, pending = rotation.post(packed, step) if step < degree - 1 else (packed, [])
        source = (rotation.rank - step) % degree * ulysses
        if q.shape[2] and any(number for _, number in keys.spans(source, ulysses)):
            rotation.attending(step)
            k_block = drop_filler(packed[: k.numel()].view(k.shape), keys, source, ulysses)
            v_block = drop_filler(packed[k.numel() :].view(v.shape), keys, source, ulysses)
            mask = None if rows is None else block_mask(call, rows, token_index(keys, source, ulysses, q.device))
            part, part_lse = attend(q, k_block, v_block, mask)
            merged = (part.float(), part_lse) if merged is None else merge_(*merged, part, part_lse)
        for work in pending:
            work.wait()
        packed = received
    return q.new_zeros((*q.shape[:3], v.shape[-1])) if merged is None else merged[0].to(q.dtype)
