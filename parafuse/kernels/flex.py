"""Block-sparse attention by torch's flex-attention: block masks made from tiles by small products of counts.

Legend: B batch, H heads, S rows of queries, N rows of keys, D and Dv head sizes, T tiles, Q and K blocks of BLOCK rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

MOST_SIZES = 64
"""Whose compiled code is kept."""
BLOCK = 128
"""Rows of a block of the kernel."""


class Flex:
    """Flex-attention over rows sorted by tile. Holds its compiled form; torch's own is left as it is.

    `compiled`: by Inductor's kernel, which skips blocks; otherwise eagerly, which computes all scores (to check)."""

    def __init__(self, *, compiled: bool):
        self._compiled = compiled
        self._made: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chosen: Tensor,
        q_tiles: Tensor,
        k_tiles: Tensor,
        key_mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) as `block_sparse_attention`. `key_mask` (B or 1, H or 1, N), bool or additive."""
        q_tiles, q_order = torch.sort(q_tiles, stable=True)
        k_tiles, k_order = torch.sort(k_tiles, stable=True)
        q, k, v = q.index_select(2, q_order), k.index_select(2, k_order), v.index_select(2, k_order)
        key_mask = None if key_mask is None else key_mask.index_select(2, k_order)
        live = key_mask if key_mask is not None and key_mask.dtype == torch.bool else None
        bias = key_mask if live is None else None
        blocks = block_mask(chosen, q_tiles, k_tiles, live)
        attend = self._attend_for(q, k, v, chosen, key_mask, scale)
        out, aux = attend(q, k, v, _added(bias), blocks, scale)
        empty = rows_without_keys(chosen, q_tiles, k_tiles, key_mask)
        out, lse = out.masked_fill(empty.unsqueeze(-1), 0.0), aux.lse.float().masked_fill(empty, -math.inf)
        back = torch.argsort(q_order)
        return out.index_select(2, back), lse.index_select(2, back)

    def _attend_for(self, *what: Any) -> Callable[..., Any]:
        """Compiled for such shapes by itself: torch counts graphs by code object, and past some it would compute all
        scores; other users of flex-attention are not counted with it."""
        if not self._compiled:
            return _attend
        key = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in what)
        if key not in self._made:
            if len(self._made) >= MOST_SIZES:
                self._made.clear()
            own = FunctionType(_attend.__code__.replace(co_name=f"flex_{len(self._made)}"), globals())
            self._made[key] = torch.compile(own, dynamic=False, fullgraph=True)
        return self._made[key]


def _attend(q: Tensor, k: Tensor, v: Tensor, score_mod: Any, blocks: BlockMask, scale: float) -> Any:
    return flex_attention(q, k, v, score_mod, blocks, scale, return_aux=AuxRequest(lse=True))


def block_mask(chosen: Tensor, q_tiles: Tensor, k_tiles: Tensor, live: Tensor | None = None) -> BlockMask:
    """The blocks of rows, sorted by tile, that `chosen` (B or 1, H or 1, Tq, Tk) lets attend: whole ones, and those
    that have pairs of tiles that do not, or rows beyond the end. `live` (B or 1, H or 1, N) bool: keys that are seen.

    A block of queries and one of keys have `counts_q @ chosen @ counts_k` pairs that attend; none of the S x N pairs
    is looked at."""
    seen = chosen.float()
    q_counts, k_counts = _counts(q_tiles, chosen.shape[2]), _counts(k_tiles, chosen.shape[3], live)
    pairs = q_counts @ seen @ k_counts.transpose(-1, -2)  # (B, H, Q, K), whole numbers up to BLOCK**2
    full = pairs == BLOCK * BLOCK
    part = (pairs > 0) & ~full

    def attends(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        pair = chosen[b if many_b else 0, h if many_h else 0, q_tiles[row], k_tiles[column]]
        return pair if live is None else pair & live[b if live_b else 0, h if live_h else 0, column]

    many_b, many_h = chosen.shape[0] > 1, chosen.shape[1] > 1
    live_b, live_h = live is not None and live.shape[0] > 1, live is not None and live.shape[1] > 1
    return BlockMask.from_kv_blocks(
        *_listed(part), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=attends, seq_lengths=(len(q_tiles), len(k_tiles)),
        compute_q_blocks=False,
    )  # fmt: skip


def rows_without_keys(chosen: Tensor, q_tiles: Tensor, k_tiles: Tensor, key_mask: Tensor | None) -> Tensor:
    """(B or 1, H or 1, S) bool: queries that see nothing."""
    live = key_mask if key_mask is None or key_mask.dtype == torch.bool else key_mask != -math.inf
    k_counts = _tile_counts(k_tiles, chosen.shape[3], live)  # (B or 1, H or 1, Tk)
    seen = chosen.float() @ k_counts.unsqueeze(-1)  # (B, H, Tq, 1)
    return (seen.squeeze(-1) == 0).index_select(2, q_tiles)


def _tile_counts(tiles: Tensor, num_tiles: int, live: Tensor | None) -> Tensor:
    """(B or 1, H or 1, T) fp32: rows of each tile."""
    rows = torch.ones(1, 1, len(tiles), device=tiles.device) if live is None else live.float()
    counts = torch.zeros(*rows.shape[:2], num_tiles, device=tiles.device)
    return counts.scatter_add_(2, tiles.expand_as(rows), rows)


def _counts(tiles: Tensor, num_tiles: int, live: Tensor | None = None) -> Tensor:
    """(B or 1, H or 1, blocks, T) fp32: rows of each tile in each block."""
    rows = torch.ones(1, 1, len(tiles), device=tiles.device) if live is None else live.float()
    num_blocks = -(-len(tiles) // BLOCK)
    block = torch.arange(len(tiles), device=tiles.device) // BLOCK
    counts = torch.zeros(*rows.shape[:2], num_blocks * num_tiles, device=tiles.device)
    counts.scatter_add_(2, (block * num_tiles + tiles).expand_as(rows), rows)
    return counts.unflatten(2, (num_blocks, num_tiles))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(how many blocks of keys, which: these first) for each block of queries, int32."""
    return blocks.sum(dim=-1, dtype=torch.int32), torch.argsort(
        blocks.byte(), dim=-1, descending=True, stable=True
    ).int()


def _added(bias: Tensor | None) -> Callable[..., Tensor] | None:
    """Adds `bias` (B or 1, H or 1, N) to scores."""
    if bias is None:
        return None
    many_b, many_h = bias.shape[0] > 1, bias.shape[1] > 1

    def add(score: Tensor, b: Tensor, h: Tensor, _: Tensor, column: Tensor) -> Tensor:
        return score + bias[b if many_b else 0, h if many_h else 0, column]

    return add
