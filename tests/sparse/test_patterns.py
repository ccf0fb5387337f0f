"""Which tiles see which: held against what it means for pairs of tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from parafuse.errors import UnsupportedError
from parafuse.kernels.patterns import choose, content, density, radial, seen_by, tile_sums, window
from parafuse.kernels.tiles import Segment, Tiles, tiles_of
from parafuse.sparse import Content, Radial, Window

GRID = (5, 6, 7)
TEXT = 11
TILES = tiles_of([Segment(TEXT), Segment(5 * 6 * 7, GRID)], (2, 2, 3))


def _pairs(tiles: Tiles, near: Tensor) -> Tensor:
    """(T, T) bool: tiles that have a pair of tokens (N, N) among them."""
    one_hot = torch.nn.functional.one_hot(tiles.tile_of, tiles.num_tiles).float()
    return (one_hot.T @ near.float() @ one_hot) > 0


def _places() -> Tensor:
    return torch.tensor(list(itertools.product(*map(range, GRID))))


@pytest.mark.parametrize("reach", [(0, 0, 0), (1, 2, 2), (0, 6, 0), (4, 1, 3), (9, 9, 9)])
def test_a_window_has_all_tiles_with_a_pair_of_tokens_in_reach(reach: tuple[int, int, int]) -> None:
    chosen = window(TILES, TILES, reach)
    assert chosen.shape == (1, 1, TILES.num_tiles, TILES.num_tiles)
    distance = (_places().unsqueeze(1) - _places()).abs()
    near = torch.ones(TILES.num_tokens, TILES.num_tokens, dtype=torch.bool)
    near[TEXT:, TEXT:] = (distance <= torch.tensor(reach)).all(dim=-1)
    assert torch.equal(chosen[0, 0], _pairs(TILES, near))
    assert bool(chosen.all()) == (reach == (9, 9, 9))


def test_text_sees_all_and_is_seen_by_all() -> None:
    for chosen in (window(TILES, TILES, (0, 0, 0)), radial(TILES, TILES, 0.01)):
        assert chosen[0, 0, 0].all()
        assert chosen[0, 0, :, 0].all()


def test_sinks_are_seen_by_all() -> None:
    chosen = window(TILES, TILES, (0, 0, 0), sink_frames=1)[0, 0]
    early = TILES.first[:, 0] == 0
    assert chosen[:, early].all()
    assert not window(TILES, TILES, (0, 0, 0))[0, 0][:, early].all()
    assert torch.equal(window(TILES, TILES, (0, 0, 0), sink_frames=5), window(TILES, TILES, (0, 0, 0)))


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_the_reach_of_radial_halves_as_the_distance_in_time_doubles(decay: float) -> None:
    grid = (16, 8, 12)
    tiles = tiles_of([Segment(math.prod(grid), grid)], (1, 1, 1))  # tiles are tokens
    chosen = radial(tiles, tiles, 0.5, decay=decay, sink_frames=0)[0, 0].view(*grid, *grid)
    for frames in range(16):
        reach = 0.5 / 2 ** (decay * math.floor(math.log2(max(frames, 1))))
        rows = [r for r in range(8) if chosen[0, 0, 0, frames, r, 0]]
        columns = [c for c in range(12) if chosen[0, 0, 0, frames, 0, c]]
        assert rows == list(range(math.floor(reach * 8) + 1))
        assert columns == list(range(math.floor(reach * 12) + 1))
        assert chosen[0, 3, 3, frames, 3, 3], "a token's own place is seen in every frame"


def test_radial_is_sparser_the_more_it_decays() -> None:
    grid = (16, 8, 12)
    tiles = tiles_of([Segment(math.prod(grid), grid)], (2, 2, 2))
    shares = [float(density(radial(tiles, tiles, 0.5, decay=d), tiles.sizes, tiles.sizes)) for d in (0, 0.5, 1, 2)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.6 * shares[0]


def _means(x: Tensor) -> Tensor:
    return tile_sums(x, TILES.tile_of, TILES.num_tiles) / TILES.sizes.unsqueeze(-1)


def _content(**options: float) -> tuple[Tensor, Tensor]:
    """(chosen, weights of the video's tiles) for random queries and keys."""
    generator = torch.Generator().manual_seed(0)
    q, k = 3 * torch.randn(2, 2, 3, TILES.num_tokens, 16, generator=generator)
    chosen = content(TILES, TILES, _means(q), _means(k), **options)
    logits = _means(q) @ _means(k).mT / 4 + TILES.sizes.log()
    return chosen, logits[..., 1:].softmax(dim=-1)


@pytest.mark.parametrize("mass", [0.3, 0.9, 1.0])
def test_content_takes_the_fewest_tiles_with_the_mass(mass: float) -> None:
    chosen, weights = _content(mass=mass)
    assert chosen.shape == (2, 3, TILES.num_tiles, TILES.num_tiles)
    assert chosen[:, :, 0].all()
    assert chosen[..., 0].all()
    for b, h, tile in itertools.product(range(2), range(3), range(1, TILES.num_tiles)):
        row, taken = weights[b, h, tile], chosen[b, h, tile, 1:].clone()
        fewest = 1 + int((row.sort(descending=True).values.cumsum(0) < mass).sum())
        best = row.sort(descending=True).indices[:fewest].tolist()
        assert set(torch.nonzero(taken).flatten().tolist()) == {*best, tile - 1} or mass == 1.0
        assert float(row[taken].sum()) >= mass - 1e-6


def test_content_takes_a_part_in_any_case() -> None:
    chosen, weights = _content(mass=0.01, least=0.3)
    assert torch.equal(chosen, _content(keep=0.3)[0])
    more, _ = _content(mass=0.9, least=0.3)
    assert torch.equal(more, chosen | _content(mass=0.9)[0])
    assert bool((chosen & ~_content(mass=0.9)[0]).any()), "the part is to be more than the mass somewhere"
    assert weights.shape[-1] == TILES.num_tiles - 1


@pytest.mark.parametrize("keep", [0.01, 0.3, 1.0])
def test_content_keeps_a_part(keep: float) -> None:
    chosen, weights = _content(keep=keep)
    count = math.ceil(keep * weights.shape[-1])
    counts = chosen[:, :, 1:, 1:].sum(dim=-1)
    assert set(counts.unique().tolist()) <= {count, count + 1}, "one more where its own tile is not among them"
    assert chosen[:, :, 1:, 1:].diagonal(dim1=-2, dim2=-1).all()


def test_equal_weights_go_by_order() -> None:
    even = tiles_of([Segment(64, (4, 4, 4))], (2, 2, 2))
    zeros = torch.zeros(1, 1, even.num_tiles, 8)
    chosen = content(even, even, zeros, zeros, keep=0.25)[0, 0]
    assert chosen[:2].tolist() == [[True, True] + [False] * 6] * 2
    assert chosen[5].tolist() == [True, True, False, False, False, True, False, False]


def test_heads_choose_for_themselves() -> None:
    chosen, _ = _content(mass=0.5)
    assert len({tuple(chosen[b, h].flatten().tolist()) for b in range(2) for h in range(3)}) == 6


def test_sums_of_parts_add_up_to_the_whole() -> None:
    x = torch.randn(2, 3, TILES.num_tokens, 8)
    whole = tile_sums(x, TILES.tile_of, TILES.num_tiles)
    want = torch.zeros_like(whole).index_add_(2, TILES.tile_of, x.double())
    torch.testing.assert_close(whole, want)
    mixed = torch.randperm(TILES.num_tokens, generator=torch.Generator().manual_seed(1))
    parts = [tile_sums(x[:, :, rows], TILES.tile_of[rows], TILES.num_tiles) for rows in mixed.chunk(3)]
    torch.testing.assert_close(sum(parts[1:], parts[0]), whole)
    assert torch.equal(
        tile_sums(x.bfloat16(), TILES.tile_of, TILES.num_tiles),
        tile_sums(x.bfloat16().float(), TILES.tile_of, TILES.num_tiles),
    )
    assert torch.equal(tile_sums(x[:, :, :0], TILES.tile_of[:0], TILES.num_tiles), torch.zeros_like(whole))


def test_density_counts_pairs_of_tokens() -> None:
    chosen, _ = _content(mass=0.5)
    pairs = chosen[:, :, TILES.tile_of][..., TILES.tile_of]
    want = pairs.double().mean(dim=(-2, -1))
    torch.testing.assert_close(density(chosen, TILES.sizes, TILES.sizes), want)


def test_two_videos() -> None:
    """Of equal grids they are compared by position; of different ones each sees all of the other."""
    reference, own, other = Segment(8, (2, 2, 2)), Segment(8, (2, 2, 2)), Segment(4, (1, 2, 2))
    keys, queries = tiles_of([reference, own, other], (1, 1, 1)), tiles_of([own], (1, 1, 1))
    chosen = window(queries, keys, (0, 0, 0))[0, 0]
    assert torch.equal(chosen[:, :8], torch.eye(8, dtype=torch.bool))
    assert torch.equal(chosen[:, 8:16], torch.eye(8, dtype=torch.bool))
    assert chosen[:, 16:].all()


def test_choose_goes_by_the_method() -> None:
    assert torch.equal(choose(Window(1, 2, 2), TILES, TILES), window(TILES, TILES, (1, 2, 2)))
    assert torch.equal(choose(Radial(0.3, decay=0.5), TILES, TILES), radial(TILES, TILES, 0.3, decay=0.5))
    means = torch.randn(1, 2, TILES.num_tiles, 8)
    want = content(TILES, TILES, means, means, mass=0.4, least=0.1, scale=0.1)
    assert torch.equal(choose(Content(0.4), TILES, TILES, means, means, 0.1), want)
    with pytest.raises(UnsupportedError, match="means of queries and keys"):
        choose(Content(), TILES, TILES)


def test_what_nobody_of_some_rows_sees() -> None:
    grid = (8, 4, 4)
    tiles = tiles_of([Segment(128, grid)], (1, 4, 4))  # tiles are frames
    chosen = window(tiles, tiles, (1, 0, 0))
    assert seen_by(chosen, tiles.tile_of[:20]).tolist() == [True] * 3 + [False] * 5
    assert seen_by(chosen, tiles.tile_of[100:]).tolist() == [False] * 5 + [True] * 3
    heads = torch.cat([chosen, torch.zeros_like(chosen)], dim=1)
    heads[0, 1, 0, 7] = True
    assert seen_by(heads, tiles.tile_of[:3]).tolist() == [True, True, *[False] * 5, True]
    assert not seen_by(heads, tiles.tile_of[:0]).any()
