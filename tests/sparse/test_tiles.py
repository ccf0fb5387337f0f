"""Tiles of tokens: each token in one, none across segments, boxes as they are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parafuse.errors import UnsupportedError
from parafuse.kernels.tiles import RUN, Segment, Tiles, tiles_of

SIZE = st.integers(1, 7)
GRID = st.tuples(SIZE, SIZE, SIZE)
SEGMENT = st.one_of(st.integers(0, 300).map(Segment), GRID.map(lambda grid: Segment(grid[0] * grid[1] * grid[2], grid)))


def test_a_video_between_texts() -> None:
    tiles = tiles_of([Segment(3), Segment(12, (2, 2, 3)), Segment(200)], (1, 2, 2))
    assert tiles.tile_of.tolist()[:15] == [0, 0, 0, 1, 1, 2, 1, 1, 2, 3, 3, 4, 3, 3, 4]
    assert tiles.sizes.tolist() == [3, 4, 2, 4, 2, RUN, 72]
    assert tiles.first.tolist()[1:5] == [[0, 0, 0], [0, 0, 2], [1, 0, 0], [1, 0, 2]]
    assert tiles.last.tolist()[1:5] == [[0, 1, 1], [0, 1, 2], [1, 1, 1], [1, 1, 2]]
    assert tiles.video.tolist() == [-1, 0, 0, 0, 0, -1, -1]
    assert tiles.grids == ((2, 2, 3),)
    assert tiles.order.tolist()[3:9] == [3, 4, 6, 7, 5, 8]


@given(st.lists(SEGMENT, min_size=1, max_size=4).filter(lambda s: any(x.length for x in s)), st.none() | GRID)
def test_tiles_hold_every_token_once(segments: list[Segment], tile: tuple[int, int, int] | None) -> None:
    tiles = tiles_of(segments, tile)
    assert tiles.num_tokens == sum(s.length for s in segments)
    assert torch.equal(torch.bincount(tiles.tile_of, minlength=tiles.num_tiles), tiles.sizes)
    assert int(tiles.sizes.min()) > 0
    assert torch.equal(tiles.tile_of[tiles.order], tiles.tile_of.sort().values)
    start, seen = 0, set[int]()
    for segment in segments:
        own = tiles.tile_of[start : start + segment.length].tolist()
        assert not seen & set(own), "a tile has tokens of two segments"
        seen |= set(own)
        for token, place in zip(own, _places(segment), strict=True):
            first, last = tiles.first[token].tolist(), tiles.last[token].tolist()
            assert all(a <= b <= c for a, b, c in zip(first, place, last, strict=True))
            assert tile is None or segment.grid is None or _size(first, last) <= tile[0] * tile[1] * tile[2]
        start += segment.length
    boxes = (tiles.last - tiles.first + 1).prod(dim=1)[tiles.video >= 0]
    assert torch.equal(boxes, tiles.sizes[tiles.video >= 0]), "a box has tokens that are not in its tile"


def _places(segment: Segment) -> list[tuple[int, ...]]:
    if segment.grid is None:
        return [(-1, -1, -1)] * segment.length
    return list(itertools.product(*map(range, segment.grid)))


def _size(first: list[int], last: list[int]) -> int:
    out = 1
    for a, b in zip(first, last, strict=True):
        out *= b - a + 1
    return out


def test_videos_of_equal_grids_share_positions() -> None:
    segments = [Segment(12, (2, 2, 3)), Segment(6, (1, 2, 3)), Segment(12, (2, 2, 3))]
    tiles = tiles_of(segments, (1, 2, 2))
    assert tiles.grids == ((2, 2, 3), (1, 2, 3))
    assert tiles.video.tolist() == [0] * 4 + [1] * 2 + [0] * 4


def test_what_is_no_grid_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="13 tokens are no video"):
        Segment(13, (2, 2, 3))
    with pytest.raises(UnsupportedError, match="without tokens"):
        tiles_of([Segment(0)])


def test_tiles_move_as_a_whole() -> None:
    tiles = tiles_of([Segment(3), Segment(12, (2, 2, 3))])
    there = tiles.to("meta")
    assert isinstance(there, Tiles)
    assert {x.device.type for x in (there.tile_of, there.sizes, there.first, there.last, there.video)} == {"meta"}
    assert there.grids == tiles.grids
