"""Token merging around a UNet's self-attention: tokens that are alike attend as one (Bolya and Hoffman 2023,
arXiv:2303.17604). Each sample merges for itself and nothing is kept from step to step, so every layout gives the same.

Shapes: B samples, N tokens, C channels; of each 2 x 2 tokens one is a target (D in all), the others may be merged into
the target that is most like them (S in all), of which the M most alike are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parafuse.cache import TokenMerging
from parafuse.engine.caches.caching import Caching
from parafuse.engine.caches.clock import Clock
from parafuse.engine.caches.hosts import merging_hosts
from parafuse.engine.caches.memory import Decision
from parafuse.errors import UnsupportedError
from parafuse.parallel.call_context import CallContext
from parafuse.parallel.hooks import Forward, override, override_forward


@dataclass(frozen=True)
class Grid:
    """Which tokens of a grid are targets."""

    sources_S: Tensor
    targets_D: Tensor
    back_N: Tensor
    """Where each token is among sources and targets, one after the other."""


def grid_of(rows: int, columns: int, device: torch.device) -> Grid:
    """One token of each 2 x 2, drawn by a generator of its own: the same on every rank and in every step."""
    half = (rows // 2, columns // 2)
    drawn = torch.randint(4, half, generator=torch.Generator("cpu").manual_seed(0))
    row = 2 * torch.arange(half[0])[:, None] + drawn // 2
    column = 2 * torch.arange(half[1])[None, :] + drawn % 2
    targets = (row * columns + column).flatten()
    is_source = torch.ones(rows * columns, dtype=torch.bool)
    is_source[targets] = False
    sources = is_source.nonzero().flatten()
    back = torch.cat([sources, targets]).argsort()
    return Grid(*(x.to(device) for x in (sources, targets, back)))


def merge(x_BNC: Tensor, grid: Grid, num_merged: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """((B, N - M, C), what makes (B, N, C) again of a result for these)."""
    channels = x_BNC.shape[-1]
    x_BSC, x_BDC = x_BNC[:, grid.sources_S], x_BNC[:, grid.targets_D]
    alike_BSD = F.normalize(x_BSC, dim=-1) @ F.normalize(x_BDC, dim=-1).transpose(1, 2)
    best_BS, nearest_BS = alike_BSD.max(-1)
    order_BS = best_BS.argsort(dim=-1, descending=True, stable=True)
    merged_BM, kept_BK = order_BS[:, :num_merged], order_BS[:, num_merged:]
    into_BM = nearest_BS.gather(1, merged_BM)

    def wide(index: Tensor) -> Tensor:
        return index.unsqueeze(-1).expand(-1, -1, channels)

    means_BDC = x_BDC.scatter_reduce(1, wide(into_BM), x_BSC.gather(1, wide(merged_BM)), "mean", include_self=True)

    def back(y: Tensor) -> Tensor:
        y_BKC, y_BDC = y.split([kept_BK.shape[1], means_BDC.shape[1]], dim=1)
        y_BSC = y.new_empty(x_BSC.shape)
        y_BSC = y_BSC.scatter(1, wide(kept_BK), y_BKC).scatter(1, wide(merged_BM), y_BDC.gather(1, wide(into_BM)))
        return torch.cat([y_BSC, y_BDC], dim=1)[:, grid.back_N]

    return torch.cat([x_BSC.gather(1, wide(kept_BK)), means_BDC], dim=1), back


@dataclass(eq=False)
class Site:
    """The self-attention of one block, and what it is to do in the call at hand."""

    block: nn.Module
    attention: nn.Module
    grid: Grid | None = None
    num_merged: int = 0

    def merging(self, original: Forward) -> Forward:
        """What stands for the forward of the attention. torch.compile looks into it."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            others = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if self.grid is None or others:  # a mask, or other keys than the tokens themselves
                return original(x, *args, **kwargs)
            merged, back = merge(x, self.grid, self.num_merged)
            return back(original(merged, *args, **kwargs))

        return forward


class Merging(Caching):
    """Token merging of one UNet. No communication."""

    def __init__(self, root: nn.Module, cache: TokenMerging, *, clock: Clock, context: CallContext):
        super().__init__(root, clock, context)
        self.cache = cache
        self.sites = [Site(block, block.attn1) for block in merging_hosts(root).values()]  # pyright: ignore[reportArgumentType]
        self._size: tuple[int, int] | None = None
        """Rows and columns of the latents of the call at hand."""
        self._has_merged = False
        self._grids: dict[Any, Grid] = {}

    def install(self) -> None:
        super().install()
        for site in self.sites:
            replacement: Any = site.merging(site.attention.forward)
            replacement.parafuse_part = True
            self._undo.append(override(site.attention, "forward", replacement))
            self._undo.append(override_forward(site.block, lambda original, site=site: self._block(site, original)))

    def _root(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            latents: Any = args[0] if args else kwargs.get(self._first)
            before, self._size, self._has_merged = self._size, tuple(latents.shape[-2:]), False
            try:
                result = original(*args, **kwargs)
            finally:
                self._size = before
            self._commit(self.rows_of(args, kwargs))
            return result

        return forward

    def _commit(self, rows: tuple[int, ...]) -> None:
        """All samples are computed, with fewer tokens."""
        if not self._has_merged and self.cache.ratio:
            raise UnsupportedError(
                f"{type(self.root).__name__}: cache {self.cache}: no self-attention on latents that are made smaller "
                f"by up to {self.cache.max_downsample}; ask for a larger max_downsample, or run it without this cache."
            )
        if not self.context.is_trial:
            self.memory.steps[self.context.number] = self.clock.step
            self.memory.decisions[self.context.number] = dict.fromkeys(rows, Decision(False))

    def _block(self, site: Site, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x: Any = args[0] if args else kwargs.get("hidden_states")
            site.grid = self._grid(x) if self._size and isinstance(x, Tensor) else None
            site.num_merged = min(int(x.shape[1] * self.cache.ratio), len(site.grid.sources_S)) if site.grid else 0
            try:
                return original(*args, **kwargs)
            finally:
                site.grid = None

        return forward

    def _grid(self, x: Tensor) -> Grid | None:
        """Of the tokens of one block; None where it is not to merge."""
        rows, columns = self._size or (0, 0)
        smaller = math.ceil(math.sqrt(rows * columns / x.shape[1]))
        size = (math.ceil(rows / smaller), math.ceil(columns / smaller))
        if smaller > self.cache.max_downsample or size[0] * size[1] != x.shape[1] or not self.cache.ratio:
            return None
        self._has_merged = True
        key = (*size, x.device)
        if key not in self._grids:
            self._grids[key] = grid_of(*size, x.device)
        return self._grids[key]
