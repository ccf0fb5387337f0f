"""Block-sparse attention against masked dense attention in fp64."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from parafuse.errors import UnsupportedError
from parafuse.kernels.block_sparse import BACKENDS, BlockSparse, block_sparse_attention
from parafuse.kernels.flex import BLOCK, block_mask
from parafuse.kernels.merge import merge
from parafuse.kernels.patterns import density, window
from parafuse.kernels.tiles import Segment, tiles_of

TILES = tiles_of([Segment(13), Segment(5 * 6 * 9, (5, 6, 9)), Segment(150)], (2, 4, 4))
N, T = TILES.num_tokens, TILES.num_tiles
EXACT = 1e-5


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "flex":
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    return request.param


def _qkv(width: int = 16, value_width: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Batch 2, 3 heads; keys of the second sample's first head 4x larger."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, N, width, generator=generator)
    k[1, 0] *= 4
    return q.to(dtype), k.to(dtype), torch.randn(2, 3, N, value_width, generator=generator).to(dtype)


def _chosen(batch: int = 2, heads: int = 3, share: float = 0.4) -> Tensor:
    """At random; the fourth tile of queries sees nothing, the fifth sees the last tile alone."""
    chosen = torch.rand(batch, heads, T, T, generator=torch.Generator().manual_seed(3)) < share
    chosen[..., 3, :] = False
    chosen[..., 4, :] = False
    chosen[..., 4, -1] = True
    return chosen


def _dense(
    q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) in fp64."""
    scores = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~pairs, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)).exp()
    return weights @ v.double(), lse


def _hold(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], limit: float = EXACT) -> None:
    out, lse = got
    assert lse.dtype == torch.float32
    assert torch.equal(lse == -math.inf, want[1] == -math.inf), "other rows are empty"
    assert float((out - want[0]).abs().max()) <= limit * float(want[0].abs().max())
    seen = want[1] > -math.inf
    assert float((lse - want[1])[seen].abs().max()) <= limit * float(want[1][seen].abs().max())
    assert not out[~seen].any()


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_it_is_masked_dense_attention(backend: str, batch: int, heads: int) -> None:
    q, k, v = _qkv()
    chosen = _chosen(batch, heads)
    pairs = chosen[:, :, TILES.tile_of][..., TILES.tile_of]
    want = _dense(q, k, v, pairs)
    assert bool((want[1] == -math.inf).any()), "some rows are to be empty"
    _hold(block_sparse_attention(q, k, v, chosen, TILES.tile_of, TILES.tile_of, backend=backend), want)


@pytest.mark.parametrize("kind", ["bool", "bool per head", "additive", "one row", "flat"])
def test_masks_of_keys(backend: str, kind: str) -> None:
    q, k, v = _qkv()
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(2, 3 if kind == "bool per head" else 1, 1, N, generator=generator) < 0.7
    mask[1, :, :, 13:200] = False  # whole tiles
    if kind == "additive":
        mask = torch.randn(2, 1, 1, N, generator=generator).masked_fill(~mask, -math.inf)
    mask = mask[0, 0, 0] if kind == "flat" else mask
    given = mask.expand(2, 1, N, N) if kind == "one row" else mask
    chosen = _chosen(1, 3)
    want = _dense(q, k, v, chosen[:, :, TILES.tile_of][..., TILES.tile_of], mask)
    got = block_sparse_attention(q, k, v, chosen, TILES.tile_of, TILES.tile_of, mask=given, backend=backend)
    _hold(got, want)
    without = block_sparse_attention(q, k, v, chosen, TILES.tile_of, TILES.tile_of, backend=backend)
    with pytest.raises(AssertionError):
        _hold(without, want)


def test_a_scale_counts(backend: str) -> None:
    q, k, v = _qkv()
    chosen = _chosen()
    pairs = chosen[:, :, TILES.tile_of][..., TILES.tile_of]
    got = block_sparse_attention(q, k, v, chosen, TILES.tile_of, TILES.tile_of, scale=0.1, backend=backend)
    _hold(got, _dense(q, k, v, pairs, scale=0.1))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_parts_of_tiles_merge_to_the_whole(backend: str, ranks: int) -> None:
    """As in a ring: rows of queries and keys are cut anywhere, in the model's order, and results are merged by lse."""
    q, k, v = _qkv()
    chosen = _chosen()
    want = _dense(q, k, v, chosen[:, :, TILES.tile_of][..., TILES.tile_of])
    cuts = list(torch.arange(N).chunk(ranks))
    outs, lses = [], []
    for own in cuts:
        out, lse = torch.zeros(2, 3, len(own), 16), torch.full((2, 3, len(own)), -math.inf)
        for rows in cuts:
            part = block_sparse_attention(
                q[:, :, own], k[:, :, rows], v[:, :, rows], chosen, TILES.tile_of[own], TILES.tile_of[rows],
                backend=backend,
            )  # fmt: skip
            out, lse = merge(out, lse, *part)
        outs.append(out)
        lses.append(lse)
    _hold((torch.cat(outs, dim=2), torch.cat(lses, dim=2)), want)


def test_rows_in_any_order(backend: str) -> None:
    q, k, v = _qkv()
    chosen = _chosen()
    rows, columns = (torch.randperm(N, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    want = _dense(q, k, v, chosen[:, :, TILES.tile_of][..., TILES.tile_of])
    got = block_sparse_attention(
        q[:, :, rows], k[:, :, columns], v[:, :, columns], chosen, TILES.tile_of[rows], TILES.tile_of[columns],
        backend=backend,
    )  # fmt: skip
    _hold(got, (want[0][:, :, rows], want[1][:, :, rows]))


def test_dense_choices_are_dense_attention(backend: str) -> None:
    q, k, v = _qkv()
    every = torch.ones(1, 1, T, T, dtype=torch.bool)
    got = block_sparse_attention(q, k, v, every, TILES.tile_of, TILES.tile_of, backend=backend)
    _hold(got, _dense(q, k, v, torch.ones(N, N, dtype=torch.bool)))


def test_values_of_another_size() -> None:
    q, k, v = _qkv(16, 24)
    chosen = _chosen()
    got = block_sparse_attention(q, k, v, chosen, TILES.tile_of, TILES.tile_of)
    _hold(got, _dense(q, k, v, chosen[:, :, TILES.tile_of][..., TILES.tile_of]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_dense(dtype: torch.dtype) -> None:
    q, k, v = _qkv(dtype=dtype)
    chosen = _chosen()
    pairs = chosen[:, :, TILES.tile_of][..., TILES.tile_of]
    want = _dense(q, k, v, pairs)
    bias = torch.zeros(2, 3, N, N, dtype=dtype).masked_fill_(~pairs, -math.inf)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).nan_to_num()
    error = float((plain - want[0]).abs().max())
    out, _ = block_sparse_attention(q, k, v, chosen, TILES.tile_of, TILES.tile_of)
    assert out.dtype == dtype
    assert float((out - want[0]).abs().max()) <= 2 * error


def test_skipped_work_is_not_done() -> None:
    """The twin's operators count as many products as the chosen pairs have, and no more."""
    q, k, v = _qkv()
    chosen = window(TILES, TILES, (0, 0, 0))
    share = float(density(chosen, TILES.sizes, TILES.sizes))
    assert share < 0.9

    def flops(choice: Tensor) -> int:
        counter = FlopCounterMode(display=False, custom_mapping={
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
                lambda q, k, v, *_, out_shape=None, **__: 4 * math.prod(q[:3]) * k[2] * q[3]
        })  # fmt: skip
        with counter:
            block_sparse_attention(q, k, v, choice, TILES.tile_of, TILES.tile_of)
        return counter.get_total_flops()

    every = flops(torch.ones_like(chosen))
    assert every == 4 * 2 * 3 * N * N * 16
    assert flops(chosen) == pytest.approx(share * every)


def test_blocks_that_nobody_needs_are_not_listed() -> None:
    """Flex: blocks of two sorted rows of tiles of BLOCK tokens are whole ones or none; others are partial."""
    tiles = tiles_of([Segment(4 * BLOCK + 60)])
    chosen = torch.eye(tiles.num_tiles, dtype=torch.bool)[None, None].clone()
    chosen[0, 0, 0, 4] = True
    blocks = block_mask(chosen, tiles.tile_of, tiles.tile_of)
    assert blocks.full_kv_num_blocks is not None
    assert blocks.full_kv_indices is not None
    assert blocks.full_kv_num_blocks[0, 0].tolist() == [1, 1, 1, 1, 0]
    assert blocks.kv_num_blocks[0, 0].tolist() == [1, 0, 0, 0, 1], "beyond the end there are no rows"
    assert [int(blocks.full_kv_indices[0, 0, i, 0]) for i in range(4)] == [0, 1, 2, 3]
    assert int(blocks.kv_indices[0, 0, 0, 0]) == 4
    dead = torch.ones(2, 1, tiles.num_tokens, dtype=torch.bool)
    dead[1, :, :BLOCK] = False
    dead[0, :, 5] = False
    masked = block_mask(chosen, tiles.tile_of, tiles.tile_of, dead)
    assert masked.full_kv_num_blocks is not None
    assert masked.full_kv_num_blocks[:, 0, 0].tolist() == [0, 0]
    assert masked.kv_num_blocks[:, 0, 0].tolist() == [2, 1]


def test_the_order_of_tiles_in_blocks_may_straddle(backend: str) -> None:
    """Tiles of 32 tokens: several in a block, some seen and some not."""
    tiles = tiles_of([Segment(8 * 8 * 8, (8, 8, 8))], (2, 4, 4))
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 512, 16, generator=generator)
    chosen = window(tiles, tiles, (0, 1, 0))
    got = block_sparse_attention(q, k, v, chosen, tiles.tile_of, tiles.tile_of, backend=backend)
    _hold(got, _dense(q, k, v, chosen[:, :, tiles.tile_of][..., tiles.tile_of]))


def test_what_cannot_be_taken_is_refused() -> None:
    q, k, v = _qkv()
    chosen, of = _chosen(), TILES.tile_of
    rows = torch.ones(N, N, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match="only masks of keys"):
        block_sparse_attention(q, k, v, chosen, of, of, mask=rows)
    with pytest.raises(UnsupportedError, match="a mask of 7 keys"):
        block_sparse_attention(q, k, v, chosen, of, of, mask=rows[:1, :7])
    with pytest.raises(UnsupportedError, match="3 heads to 1"):
        block_sparse_attention(q, k[:, :1], v[:, :1], chosen, of, of)
    with pytest.raises(UnsupportedError, match="tiles of"):
        block_sparse_attention(q, k, v, chosen, of[1:], of)
    with pytest.raises(UnsupportedError, match="tiles chosen as"):
        block_sparse_attention(q, k, v, chosen[:, :2], of, of)
    with pytest.raises(UnsupportedError, match="there are gather, flex"):
        BlockSparse("triton")


def test_the_backend_goes_by_the_device() -> None:
    q = torch.zeros(1)
    assert BlockSparse().backend_for(q) == "gather"
    assert BlockSparse("flex").backend_for(q) == "flex"
    assert BlockSparse().backend_for(_OnCuda()) == "flex"  # pyright: ignore[reportArgumentType]


class _OnCuda:
    """A tensor's device alone."""

    device = torch.device("cuda")


def test_flex_is_compiled_once_for_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other choices, tiles and masks of the same sizes make no new graph, and none ends in torch's limit of graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, real = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend=counter, **options))
    attend = BlockSparse("flex", compiled=True)
    q, k, v = _qkv()
    for length in (N, N, *range(N - 9, N)):
        rows = TILES.tile_of[:length]
        for reach in ((0, 0, 0), (0, 1, 1)):
            chosen = window(TILES, TILES, reach)
            some = q[:, :, :length], k[:, :, :length], v[:, :, :length]
            got = attend(*some, chosen, rows, rows)
            _hold(got, _dense(*some, chosen[:, :, rows][..., rows]))
    assert counter.frame_count == 10
    assert torch._dynamo.config.recompile_limit < 10, "more graphs than torch makes of one code"
