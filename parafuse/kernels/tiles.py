"""The tokens of one attention in tiles: boxes of a video's tokens, and runs of all others.

Sparse patterns are said in tiles. They follow from lengths and grids alone, so that every rank has the same ones.
Legend: N tokens of the attention in the model's order, T tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from parafuse.errors import UnsupportedError
from parafuse.sparse import Shape, tile_for

RUN = 128
"""Tokens of a tile outside of videos."""


@dataclass(frozen=True)
class Segment:
    """Tokens that follow each other in an attention."""

    length: int
    grid: Shape | None = None
    """Frames, rows and columns of a video's tokens, row-major; None: they are something else (text, sound)."""

    def __post_init__(self) -> None:
        if self.length < 0 or (self.grid and math.prod(self.grid) != self.length):
            raise UnsupportedError(f"{self.length} tokens are no video of {self.grid} frames, rows and columns")


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles in the order of segments, in a video in the order of their first tokens. All tensors on one device."""

    tile_of: Tensor
    """(N,) int64: the tile of each token."""
    sizes: Tensor
    """(T,) int64: tokens of each tile; none is empty."""
    first: Tensor
    """(T, 3) int64: frame, row and column of a tile's first token; -1 where it is no video's."""
    last: Tensor
    """(T, 3) int64: of its last token, inclusive; -1 where it is no video's."""
    video: Tensor
    """(T,) int64: which of `grids` the tile belongs to; -1: none."""
    grids: tuple[Shape, ...]
    """Different grids of the videos. Videos of equal grids are compared by position, as if one lay on the other."""

    @property
    def num_tokens(self) -> int:
        return len(self.tile_of)

    @property
    def num_tiles(self) -> int:
        return len(self.sizes)

    @cached_property
    def order(self) -> Tensor:
        """(N,) int64: the tokens tile by tile, in their own order inside of each."""
        return torch.argsort(self.tile_of, stable=True)

    def to(self, device: torch.device | str) -> Tiles:
        tile_of, sizes, first, last, video = (
            x.to(device) for x in (self.tile_of, self.sizes, self.first, self.last, self.video)
        )
        return Tiles(tile_of, sizes, first, last, video, self.grids)


def tiles_of(segments: Sequence[Segment], tile: Shape | None = None) -> Tiles:
    """The tiles of an attention over these segments, on the CPU. `tile`: None goes by each grid (`tile_for`).

    No tile holds tokens of two segments. Tiles at the ends of a video are what is left there."""
    ids, sizes, first, last, video = [], [], [], [], []
    grids = tuple(dict.fromkeys(segment.grid for segment in segments if segment.grid))
    start = 0
    for segment in segments:
        if not segment.length:
            continue
        if segment.grid:
            own, low, high = _boxes(segment.grid, tile or tile_for(segment.grid))
            video.append(torch.full((len(low),), grids.index(segment.grid)))
        else:
            own = torch.arange(segment.length) // RUN
            low = high = torch.full((int(own[-1]) + 1, 3), -1)
            video.append(torch.full((len(low),), -1))
        ids.append(own + start)
        sizes.append(torch.bincount(own, minlength=len(low)))
        first.append(low)
        last.append(high)
        start += len(low)
    if not ids:
        raise UnsupportedError("attention without tokens has no tiles")
    return Tiles(torch.cat(ids), torch.cat(sizes), torch.cat(first), torch.cat(last), torch.cat(video), grids)


def _boxes(grid: Shape, tile: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """(tile of each token, first, last) of one video, row-major in tokens and in tiles."""
    counts = [-(-size // edge) for size, edge in zip(grid, tile, strict=True)]
    places = [torch.arange(size) // edge for size, edge in zip(grid, tile, strict=True)]
    frames, rows, columns = torch.meshgrid(*places, indexing="ij")
    ids = ((frames * counts[1] + rows) * counts[2] + columns).flatten()
    low = torch.cartesian_prod(*(torch.arange(count) * edge for count, edge in zip(counts, tile, strict=True))).reshape(
        -1, 3
    )
    high = torch.minimum(low + torch.tensor(tile), torch.tensor(grid)) - 1
    return ids, low, high
