"""Sparse attention of one denoiser: which calls are sparse, which tiles see which, and which rank has which heads.

Legend: B batch, H heads, T tiles, R ranks of the ring.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parafuse.kernels.attention import Call
from parafuse.kernels.block_sparse import BlockSparse, KeyMask, key_mask
from parafuse.kernels.patterns import choose, density, tile_sums
from parafuse.kernels.tiles import Segment, Tiles, tiles_of
from parafuse.parallel.comm import all_reduce
from parafuse.parallel.layout import Layout, head_range
from parafuse.sparse import Shape, Sparse


@dataclass(frozen=True)
class Video:
    """Where a denoiser's video is among the tokens of its attentions."""

    grid: Shape
    first: int
    """Its first token in the stream that it comes in."""
    total: int
    """Tokens of that stream."""
    name: str
    """Of the stream."""
    place: Callable[[int], tuple[int, int] | None] = field(compare=False)
    """Of so many segments the first and the last that are this stream, for attentions in which several are as long."""

    def segments(self, lengths: Sequence[int]) -> list[Segment] | None:
        """Of an attention over these; None where the video is not among them, or it is not known which it is."""
        found = list(_runs(lengths, self.total))
        if len(found) > 1:
            place = self.place(len(lengths))
            found = [run for run in found if run == place]
        if len(found) != 1:
            return None
        first, last = found[0]
        before, after = self.first, self.total - self.first - math.prod(self.grid)
        parts = [Segment(before), Segment(math.prod(self.grid), self.grid), Segment(after)]
        return [
            *(Segment(length) for length in lengths[:first]),
            *(part for part in parts if part.length),
            *(Segment(length) for length in lengths[last + 1 :]),
        ]


def _runs(lengths: Sequence[int], total: int) -> Iterator[tuple[int, int]]:
    """(first, last) of the segments that follow each other and have so many tokens: a stream may come in pieces."""
    for first in range(len(lengths)):
        for last in range(first, len(lengths)):
            if lengths[first] and lengths[last] and sum(lengths[first : last + 1]) == total:
                yield first, last


@dataclass(frozen=True, eq=False)
class TileLayout:
    """The tiles of attentions between the same segments."""

    queries: Tiles
    """On the device."""
    keys: Tiles
    host_queries: Tiles
    host_keys: Tiles
    chosen: Tensor | None
    """(1, 1, Tq, Tk) on the device, of a method that goes by places in the video alone."""
    host_chosen: Tensor | None

    @classmethod
    def of(
        cls, queries: Sequence[Segment], keys: Sequence[Segment], sparse: Sparse, device: torch.device
    ) -> TileLayout:
        host, host_keys = (tiles_of(one, sparse.tile_shape) for one in (queries, keys))
        chosen = None if sparse.needs_content else choose(sparse, host, host_keys)
        on_device = None if chosen is None else chosen.to(device)
        return cls(host.to(device), host_keys.to(device), host, host_keys, on_device, chosen)


@dataclass(eq=False)
class SparseAttention:
    """The state of one denoiser's sparse attention from call to call. The same on all ranks that share its tokens,
    but for the figures of a rank's own heads."""

    sparse: Sparse
    sequence_group: str = ""
    ulysses: int = 1
    video: Video | None = None
    """Of the call at hand; None: it is computed whole."""
    is_dense: bool = True
    """The step at hand is computed whole."""
    layer: int = 0
    """Attentions with a video so far in the call at hand."""
    counts: Counter[str] = field(default_factory=Counter[str])
    """Attention calls since the request began: sparse ones, and others by why they are not."""
    attended: Tensor | float = 0.0
    """Of all sparse calls together: pairs of a query and a key that this rank's heads attend to, over all pairs."""
    noted: int = 0
    """Those of them in which this rank had something to attend to."""
    balance: tuple[float, float] = (0.0, 0.0)
    """The most that a rank had to do over the mean, with heads spread and with heads in their order: of all denoiser
    calls in which heads differ together."""
    balanced: int = 0
    """Those calls."""
    work: dict[int, dict[int, Tensor]] = field(default_factory=dict[int, dict[int, Tensor]])
    """Layer -> head -> share of the pairs that it attended to on this rank, in the call at hand."""
    _shares: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    """Layer -> the same of every head, on all ranks together, in the call before."""
    _masks: tuple[weakref.ref[Tensor], int, KeyMask] | None = None
    """Of the last mask of all pairs."""
    _layouts: dict[Any, TileLayout | None] = field(default_factory=dict[Any, "TileLayout | None"])
    _planned: dict[int, tuple[int, torch.device]] = field(default_factory=dict[int, tuple[int, torch.device]])
    """Layer -> its heads and device, of the sparse attentions in the call at hand."""
    core: BlockSparse = field(default_factory=BlockSparse)

    def begin(self) -> None:
        """A request begins: counts anew."""
        self.counts.clear()
        self.attended, self.noted = 0.0, 0
        self.balance, self.balanced = (0.0, 0.0), 0
        self._shares.clear()

    def begin_call(self, video: Video | None, step: int) -> None:
        """A call of the denoiser begins."""
        self.video, self.layer, self.is_dense = video, 0, step < self.sparse.dense_steps
        self.work.clear()
        self._planned.clear()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Around a call that is made to learn something."""
        before = Counter(self.counts), self.attended, self.noted
        try:
            yield
        finally:
            self.counts, self.attended, self.noted = before
            self.work.clear()
            self._planned.clear()

    def end_call(self) -> None:
        """Tells all ranks of the sequence what each head had to do, where heads differ. Collective there; waits for the
        device once."""
        if self.ulysses == 1 or not self.sparse.needs_content or not self._planned:
            return
        size = 1 + max(self._planned), max(heads for heads, _ in self._planned.values())
        mine = torch.zeros(size, dtype=torch.float64, device=next(iter(self._planned.values()))[1])
        for layer, own in self.work.items():
            for head, share in own.items():
                mine[layer, head] = share
        everyone: list[list[float]] = all_reduce(mine, self.sequence_group).tolist()
        shares = {layer: everyone[layer][:heads] for layer, (heads, _) in self._planned.items()}
        spread, in_order = self._balance(shares)
        self.balance, self.balanced = (self.balance[0] + spread, self.balance[1] + in_order), self.balanced + 1
        self._shares = shares

    def _balance(self, shares: dict[int, list[float]]) -> tuple[float, float]:
        """(spread as it was, in order): over all layers, the heaviest rank's work over the mean."""
        mean = sum(sum(of_heads) for of_heads in shares.values()) / self.ulysses
        spread = sum(
            max(_loads(of_heads, self.head_order(layer, len(of_heads)), self.ulysses))
            for layer, of_heads in shares.items()
        )
        in_order = sum(max(_loads(of_heads, list(range(len(of_heads))), self.ulysses)) for of_heads in shares.values())
        return (spread / mean, in_order / mean) if mean else (1.0, 1.0)

    def head_order(self, layer: int, num_heads: int) -> list[int]:
        """Heads in the order in which ranks of the Ulysses axis take them: the heaviest first to the rank that has
        least, by what they did in the call before. As many heads for each rank as in their own order."""
        shares = self._shares.get(layer)
        if shares is None or len(shares) != num_heads or len(set(shares)) == 1:
            return list(range(num_heads))
        room = [last - first for first, last in (head_range(num_heads, self.ulysses, r) for r in range(self.ulysses))]
        taken: list[list[int]] = [[] for _ in room]
        for head in sorted(range(num_heads), key=lambda h: (-shares[h], h)):
            rank = min(
                (r for r in range(self.ulysses) if len(taken[r]) < room[r]),
                key=lambda r: (sum(shares[h] for h in taken[r]), room[r] - len(taken[r]), r),
            )
            taken[rank].append(head)
        return [head for own in taken for head in sorted(own)]

    def plan(self, q: Tensor, k: Tensor, queries: Layout, keys: Layout, call: Call) -> LayerPlan | None:
        """How an attention is computed; None: whole. Local. Raises UnsupportedError for masks that it cannot take."""
        layout = self._layout(queries.lengths, keys.lengths, q.device)
        if layout is None:
            self.counts["without the video"] += 1
            return None
        layer, self.layer = self.layer, self.layer + 1
        why = "causal" if call.is_causal else "first steps" if self.is_dense else ""
        why = why or ("first layers" if layer < self.sparse.dense_layers else "")
        if why:
            self.counts[why] += 1
            return None
        mask = self._key_mask(call.mask, queries.total)
        self.counts["sparse"] += 1
        self._planned[layer] = q.shape[1], q.device
        spreads = self.ulysses > 1 and self.sparse.needs_content and q.shape[1] == k.shape[1]
        order = self.head_order(layer, q.shape[1]) if spreads else list(range(q.shape[1]))
        return LayerPlan(self, layer, layout, order, mask)

    def _key_mask(self, mask: Tensor | None, num_queries: int) -> KeyMask:
        """Asks the device once for each mask of all pairs: the blocks of a model share theirs."""
        if mask is None or mask.ndim < 2 or mask.shape[-2] == 1 or mask.stride(-2) == 0:
            return KeyMask(mask, None)
        if mask.is_inference():  # such tensors do not tell whether they were changed
            return key_mask(mask, num_queries)
        known = self._masks
        if known is None or known[0]() is not mask or known[1] != mask._version:
            known = self._masks = weakref.ref(mask), mask._version, key_mask(mask, num_queries)
        return known[2]

    def _layout(self, queries: tuple[int, ...], keys: tuple[int, ...], device: torch.device) -> TileLayout | None:
        """Of an attention between these segments; None where the video is not among both."""
        key = (queries, keys, self.video, device)
        if key not in self._layouts:
            both = [self.video.segments(lengths) if self.video else None for lengths in (queries, keys)]
            found = None
            if both[0] is not None and both[1] is not None:
                found = TileLayout.of(both[0], both[1], self.sparse, device)
            self._layouts = {**self._layouts, key: found} if len(self._layouts) < MOST_SIZES else {key: found}
        return self._layouts[key]

    def line(self) -> str:
        """For what was applied."""
        found = self.report()
        if found is None:
            return self.sparse.brief
        share = "" if found["density"] is None else f", which attend to {found['density']:.1%} of the pairs"
        whole = sum(found["whole_calls"].values())
        return f"{self.sparse.brief}: {found['sparse_calls']} sparse calls{share}, {whole} whole ones"

    def report(self) -> dict[str, Any] | None:
        """For receipts: what was skipped since the request began. Waits for the device. None before the first call."""
        if not self.counts:
            return None
        whole = {why: number for why, number in self.counts.items() if why != "sparse"}
        found: dict[str, Any] = {
            "method": str(self.sparse),
            "sparse_calls": self.counts["sparse"],
            "whole_calls": whole,
            "density": None,
            "work_skipped": 0.0,
        }
        if self.noted:
            mean = float(self.attended) / self.noted
            with_video = self.counts["sparse"] + sum(whole.get(why, 0) for why in WITH_VIDEO)
            found |= {
                "density": round(mean, 4),
                "work_skipped": round((1 - mean) * self.counts["sparse"] / with_video, 4),
            }
        if self.balanced:
            spread, in_order = (one / self.balanced for one in self.balance)
            found["heaviest_rank_over_mean"] = {"heads spread": round(spread, 3), "heads in order": round(in_order, 3)}
        return found


MOST_SIZES = 64
"""Of attentions, whose tiles are kept."""
WITH_VIDEO = ("causal", "first steps", "first layers")
"""Why an attention with the video is computed whole."""


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One sparse attention."""

    state: SparseAttention
    layer: int
    layout: TileLayout
    order: list[int]
    """Heads, as ranks take them."""
    mask: KeyMask
    """In the place of the call's own."""

    @property
    def moves_heads(self) -> bool:
        return self.order != list(range(len(self.order)))

    def choose(self, q: Tensor, k: Tensor, q_tiles: Tensor, k_tiles: Tensor, call: Call, ring_group: str) -> Tensor:
        """(B or 1, H or 1, T, T) for all tiles, of these heads. q and k (B, H, rows, D) are this rank's true rows;
        collective on the ring where the method goes by their content."""
        if self.layout.chosen is not None:
            return self.layout.chosen
        queries, keys = self.layout.queries, self.layout.keys
        sums = torch.cat([tile_sums(q, q_tiles, queries.num_tiles), tile_sums(k, k_tiles, keys.num_tiles)], dim=2)
        sums = all_reduce(sums, ring_group) if ring_group else sums
        means = (sums / torch.cat([queries.sizes, keys.sizes])[:, None]).float()
        q_means, k_means = means.split([queries.num_tiles, keys.num_tiles], dim=2)
        return choose(self.state.sparse, queries, keys, q_means, k_means, call.scale)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call, heads: tuple[int, int]) -> Tensor:
        """All tokens are here: q, k, v (B, H, N, D) of these heads, in the order of `order`."""
        of, of_keys = self.layout.queries.tile_of, self.layout.keys.tile_of
        chosen = self.choose(q, k, of, of_keys, call, "")
        self.note(chosen, self.layout.queries.sizes, heads)
        out = self.state.core(q, k, v, chosen, of, of_keys, mask=call.mask, scale=call.scale)[0]
        return self.mask.without_rows(out, None)

    def note(self, chosen: Tensor, q_sizes: Tensor, heads: tuple[int, int]) -> None:
        """Counts the pairs that this rank attends to. `q_sizes` (Tq,): queries of each tile that are here."""
        here = density(chosen, q_sizes, self.layout.keys.sizes)
        self.state.attended = self.state.attended + here.mean()
        self.state.noted += 1
        if self.state.sparse.needs_content:
            shares = here.mean(dim=0) * (q_sizes.sum() / self.layout.queries.num_tokens)
            self.state.work[self.layer] = {self.order[heads[0] + i]: share for i, share in enumerate(shares.unbind())}


def _loads(shares: list[float], order: list[int], ranks: int) -> list[float]:
    """What each rank of the Ulysses axis has to do."""
    ranges = (head_range(len(order), ranks, rank) for rank in range(ranks))
    return [sum(shares[head] for head in order[first:last]) for first, last in ranges]
