"""Attention in which tiles of queries see chosen tiles of keys, with its log-sum-exp.

Legend: B batch, H heads, S rows of queries, N rows of keys, D and Dv head sizes, T tiles. Rows come in any order and
may be a part of the tokens: `q_tiles` (S,) and `k_tiles` (N,) say which tile each belongs to, `chosen` (B or 1, H or 1,
Tq, Tk) which see which. Two backends: `flex`, torch's flex-attention, for CUDA, and `gather` for the CPU, which copies
the keys that a tile sees together and attends to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from parafuse.errors import UnsupportedError
from parafuse.kernels.attention import attention_lse
from parafuse.kernels.backends import additive
from parafuse.kernels.flex import Flex

BACKENDS = ("gather", "flex")


class BlockSparse:
    """Block-sparse attention by one backend; holds what is compiled for it.

    `backend`: None takes flex on CUDA and gather elsewhere. `compiled`: None compiles flex on CUDA alone."""

    def __init__(self, backend: str | None = None, *, compiled: bool | None = None):
        if backend not in (None, *BACKENDS):
            raise UnsupportedError(f"block-sparse backend {backend!r}: there are {', '.join(BACKENDS)}.")
        self._backend, self._compiled = backend, compiled
        self._flex: Flex | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chosen: Tensor,
        q_tiles: Tensor,
        k_tiles: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `block_sparse_attention`."""
        key_mask = _key_mask(mask, q, k)
        _check(q, k, v, chosen, q_tiles, k_tiles)
        scale = float(q.shape[-1] ** -0.5) if scale is None else scale
        if self.backend_for(q) == "gather":
            return _gathered(q, k, v, chosen, q_tiles, k_tiles, key_mask, scale)
        if self._flex is None:
            self._flex = Flex(compiled=q.device.type == "cuda" if self._compiled is None else self._compiled)
        return self._flex(q, k, v, chosen, q_tiles, k_tiles, key_mask, scale)

    def backend_for(self, q: Tensor) -> str:
        """The backend for queries like these."""
        return self._backend or ("flex" if q.device.type == "cuda" else "gather")


def block_sparse_attention(  # noqa: PLR0913 (tensors of one attention)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    q_tiles: Tensor,
    k_tiles: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, H, S, D), k (B, H, N, D), v (B, H, N, Dv) -> out (B, H, S, Dv), lse (B, H, S) fp32, natural logarithm.

    `mask`: of keys alone, broadcastable to (B, H, 1, N), bool (True: attend) or additive; others are refused by
    UnsupportedError. Rows that see no key have out = 0 and lse = -inf. `BlockSparse` keeps what is compiled."""
    return BlockSparse(backend, compiled=False)(q, k, v, chosen, q_tiles, k_tiles, mask=mask, scale=scale)


def _check(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, q_tiles: Tensor, k_tiles: Tensor) -> None:
    batch, heads = q.shape[:2]
    if k.shape[1] != heads or v.shape[1] != heads:
        raise UnsupportedError(f"block-sparse attention of {heads} heads to {k.shape[1]}: repeat the keys' heads first")
    if tuple(q_tiles.shape) != (q.shape[2],) or tuple(k_tiles.shape) != (k.shape[2],):
        raise UnsupportedError(
            f"block-sparse attention of {q.shape[2]} queries and {k.shape[2]} keys: tiles of {tuple(q_tiles.shape)} "
            f"and {tuple(k_tiles.shape)} rows are given"
        )
    if chosen.ndim != 4 or chosen.shape[0] not in (1, batch) or chosen.shape[1] not in (1, heads):
        raise UnsupportedError(f"tiles chosen as {tuple(chosen.shape)} for a batch of {batch} and {heads} heads")


@dataclass(frozen=True, eq=False)
class KeyMask:
    """A mask of keys, and which rows see any."""

    keys: Tensor | None
    """Broadcastable to (B, H, 1, N), bool or additive."""
    rows: Tensor | None
    """(B or 1, H or 1, S, 1) bool; None: all do."""

    def without_rows(self, out_BHSD: Tensor, rows: Tensor | None) -> Tensor:
        """Rows that see no key are 0. `rows` (S,): those that `out` has; None: all."""
        if self.rows is None:
            return out_BHSD
        return out_BHSD.masked_fill(~(self.rows if rows is None else self.rows.index_select(-2, rows)), 0.0)


def key_mask(mask: Tensor, num_queries: int) -> KeyMask:
    """The mask of keys that a mask (..., S, N) of all pairs amounts to: its rows are equal, but for those that see no
    key (padding). Waits for the device. Raises UnsupportedError for any other mask."""
    if mask.ndim > 2 and mask.shape[-3] > 1:
        raise UnsupportedError(
            f"block-sparse attention with a mask of pairs for each head, of shape {tuple(mask.shape)}: leave "
            "sparse= out for this model"
        )
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    rows = seen.any(dim=-1, keepdim=True)
    first = rows.to(torch.uint8).argmax(dim=-2, keepdim=True)
    keys = mask.gather(-2, first.expand(*first.shape[:-1], mask.shape[-1]))
    if not bool(((mask == keys) | ~rows).all()):
        check_mask(mask, num_queries)
    return KeyMask(keys, rows[(None,) * (4 - rows.ndim)])


def check_mask(mask: Tensor | None, num_queries: int) -> None:
    """Raises UnsupportedError for a mask that is not of keys alone, equal for all queries."""
    if mask is not None and mask.ndim > 1 and mask.shape[-2] != 1 and mask.stride(-2) != 0:
        raise UnsupportedError(
            f"block-sparse attention with a mask of shape {tuple(mask.shape)} for {num_queries} queries: only masks "
            "of keys, equal for all queries, are taken; leave sparse= out for this model"
        )


def _key_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """(B or 1, H or 1, N), of keys alone."""
    if mask is None:
        return None
    check_mask(mask, q.shape[2])
    mask = mask[..., :1, :] if mask.ndim > 1 else mask
    mask = mask[(None,) * (4 - mask.ndim)].squeeze(2)
    if mask.shape[-1] == 1:
        mask = mask.expand(*mask.shape[:2], k.shape[2])
    if mask.shape[-1] != k.shape[2]:
        raise UnsupportedError(f"a mask of {mask.shape[-1]} keys for {k.shape[2]} keys")
    return mask


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    q_tiles: Tensor,
    k_tiles: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Sorts rows by tile. Tiles of queries that see the same keys are taken together; so are samples and heads, where
    one choice is for all of them."""
    q_order, q_edges = _sorted(q_tiles, chosen.shape[2])
    k_order, k_edges = _sorted(k_tiles, chosen.shape[3])
    k, v = k.index_select(2, k_order), v.index_select(2, k_order)
    mask = None if key_mask is None else additive(key_mask, q.dtype).index_select(2, k_order)
    out, lse = q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=torch.float32)
    for samples, heads in _alike(chosen, q.shape[0], q.shape[1]):
        one = chosen[samples.start if chosen.shape[0] > 1 else 0, heads.start if chosen.shape[1] > 1 else 0]
        bias = None if mask is None else mask.expand(q.shape[0], q.shape[1], -1)[samples, heads]
        some_q, some_out, some_lse = q[samples, heads], out[samples, heads], lse[samples, heads]
        room = _Room(k[samples, heads], v[samples, heads])
        for queries, keys in _groups(one, q_edges, k_edges):
            rows = torch.cat([q_order[start:end] for start, end in queries])
            part = _attend(some_q.index_select(2, rows), *room.take(keys), _columns(bias, keys), scale)
            some_out.index_copy_(2, rows, part[0])
            some_lse.index_copy_(2, rows, part[1])
    return out, lse


def _sorted(tiles: Tensor, num_tiles: int) -> tuple[Tensor, list[int]]:
    """(rows tile by tile, where each tile begins among them and where the last one ends)."""
    ordered, order = torch.sort(tiles, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(num_tiles + 1, device=tiles.device)).tolist()


def _alike(chosen: Tensor, batch: int, heads: int) -> list[tuple[slice, slice]]:
    """The (samples, heads) that choose alike by shape, for all of the batch and of the heads."""
    samples = [slice(0, batch)] if chosen.shape[0] == 1 else [slice(i, i + 1) for i in range(batch)]
    return [
        (sample, head)
        for sample in samples
        for head in ([slice(0, heads)] if chosen.shape[1] == 1 else [slice(i, i + 1) for i in range(heads)])
    ]


Runs = list[tuple[int, int]]
"""(start, end) of rows that follow each other."""


def _groups(chosen: Tensor, q_edges: list[int], k_edges: list[int]) -> list[tuple[Runs, Runs]]:
    """(queries, keys) of each set of tiles of queries that see the same keys, or none."""
    patterns, of_tile = torch.unique(chosen, dim=0, return_inverse=True)
    tiles: list[list[int]] = [[] for _ in range(len(patterns))]
    for tile, pattern in enumerate(of_tile.tolist()):
        tiles[pattern].append(tile)
    pairs = [
        (_runs(some, q_edges), _runs(torch.nonzero(pattern).flatten().tolist(), k_edges))
        for some, pattern in zip(tiles, patterns, strict=True)
    ]
    return [(queries, keys) for queries, keys in pairs if queries]


def _runs(tiles: list[int], edges: list[int]) -> Runs:
    """The rows of these tiles; tiles that follow each other make one run."""
    runs: Runs = []
    for tile in tiles:
        start, end = edges[tile], edges[tile + 1]
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        elif start < end:
            runs.append((start, end))
    return runs


def _take(x: Tensor, runs: Runs) -> Tensor:
    """Rows of x (b, h, rows, D): a view where they follow each other."""
    parts = [x[:, :, start:end] for start, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) if parts else x[:, :, :0]


def _columns(bias: Tensor | None, runs: Runs) -> Tensor | None:
    """(b, h, 1, keys) of the keys' (b, h, N)."""
    if bias is None or not runs:
        return None
    return torch.cat([bias[..., start:end] for start, end in runs], dim=-1).unsqueeze(2)


class _Room:
    """Memory for the keys and values of one group of queries, used again for the next."""

    def __init__(self, k: Tensor, v: Tensor):
        self._both = k, v
        self._room: tuple[Tensor, Tensor] | None = None

    def take(self, runs: Runs) -> tuple[Tensor, Tensor]:
        """Keys and values (b, h, rows, D); valid until the next call."""
        k, v = self._both
        if len(runs) < 2:
            return _take(k, runs), _take(v, runs)
        rows = sum(end - start for start, end in runs)
        if self._room is None or self._room[0].numel() < k[:, :, :rows].numel():
            self._room = k.new_empty(k[:, :, :rows].numel()), v.new_empty(v[:, :, :rows].numel())
        taken: list[Tensor] = []
        for x, room in zip(self._both, self._room, strict=True):
            shape = (*x.shape[:2], rows, x.shape[3])
            into = room[: math.prod(shape)].view(shape)
            taken.append(torch.cat([x[:, :, start:end] for start, end in runs], dim=2, out=into))
        return taken[0], taken[1]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of these queries over all of these keys. `bias` (b, h, 1, keys): additive."""
    if not k.shape[2]:
        return q.new_zeros((*q.shape[:3], v.shape[-1])), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    return attention_lse(q, k, v, bias, scale=scale)
