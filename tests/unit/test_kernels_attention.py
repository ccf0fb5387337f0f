"""Attention with its log-sum-exp against fp64, and the merge of blocks of keys against the whole."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parafuse.kernels.attention import attention_lse, attention_math
from parafuse.kernels.merge import merge

B, H, S, N, D = 2, 6, 13, 35, 8


def tensors(*, key_heads: int = H, value_size: int = D, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v; the keys of the second fifth are 4x larger."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, S, D, generator=generator)
    k = torch.randn(B, key_heads, N, D, generator=generator)
    v = torch.randn(B, key_heads, N, value_size, generator=generator)
    k[:, :, 7:14] *= 4.0
    return q, k, v


def make_mask(kind: str) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(B, H, S, N, generator=generator) < 0.5
    keep[..., 3] = True
    empty = keep[:, :1].clone()
    empty[:, :, 2::5] = False
    bias = 3 * torch.randn(B, H, S, N, generator=generator)
    return {
        "none": None,
        "keys": keep[:, :1, :1],
        "full": keep[:, :1],
        "two dims": keep[0, 0],
        "heads": keep,
        "bias": bias[:, :1],
        "bias for each head": bias[:1],
        "bias of keys": bias[:, :1, :1],
        "bias and -inf": bias[:, :1].masked_fill(~keep[:, :1], -math.inf),
        "empty rows": empty,
        "empty rows as -inf": torch.zeros(B, 1, S, N).masked_fill(~empty, -math.inf),
        "nothing": torch.zeros(1, 1, 1, N, dtype=torch.bool),
    }[kind]


MASKS = [
    "none", "keys", "full", "heads", "bias", "nothing",
    "two dims", "bias for each head", "bias of keys", "bias and -inf", "empty rows", "empty rows as -inf",
]  # fmt: skip


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) in fp64, row by row as the definition has it; rows without keys: 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("bhsd,bhnd->bhsn", q.double(), k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v, torch.logsumexp(scores, -1)


def distance(got: Tensor, want: Tensor) -> float:
    """Largest difference where `want` is finite; elsewhere they must be equal."""
    finite = want.isfinite()
    assert torch.equal(got[~finite].double(), want[~finite])
    return float((got[finite].double() - want[finite]).abs().max()) if bool(finite.any()) else 0.0


@pytest.mark.parametrize("scale", [None, 0.9])
@pytest.mark.parametrize("kind", MASKS)
def test_equals_fp64(kind: str, scale: float | None) -> None:
    q, k, v = tensors()
    mask = make_mask(kind)
    want, want_lse = exact(q, k, v, mask, scale or D**-0.5)
    for out, lse in (
        attention_lse(q, k, v, mask, scale=scale),
        attention_math(q, k, v, mask, scale or D**-0.5),
    ):
        assert (out.dtype, lse.dtype, lse.shape) == (torch.float32, torch.float32, (B, H, S))
        assert distance(out, want) < 5e-6
        assert distance(lse, want_lse) < 2e-5


def test_masks_matter() -> None:
    q, k, v = tensors()
    plain = attention_lse(q, k, v)[0]
    assert all(distance(attention_lse(q, k, v, make_mask(kind))[0], plain.double()) > 0.1 for kind in MASKS[1:])


@pytest.mark.parametrize("key_heads", [1, 2, 3])
@pytest.mark.parametrize("kind", ["none", "heads", "bias"])
def test_grouped_heads(kind: str, key_heads: int) -> None:
    q, k, v = tensors(key_heads=key_heads)
    want, want_lse = exact(q, k, v, make_mask(kind), D**-0.5)
    out, lse = attention_lse(q, k, v, make_mask(kind))
    assert distance(out, want) < 5e-6
    assert distance(lse, want_lse) < 2e-5


@pytest.mark.parametrize("value_size", [4, 12])
def test_values_of_another_size(value_size: int) -> None:
    q, k, v = tensors(value_size=value_size)
    want, want_lse = exact(q, k, v, make_mask("full"), D**-0.5)
    out, lse = attention_lse(q, k, v, make_mask("full"))
    assert out.shape == (B, H, S, value_size)
    assert distance(out, want) < 5e-6
    assert distance(lse, want_lse) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "keys", "heads", "bias", "empty rows"])
def test_half_precision_error_is_at_most_twice_that_of_torch(kind: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors())
    mask = make_mask(kind)
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    want, _ = exact(q, k, v, mask, D**-0.5)
    out, lse = attention_lse(q, k, v, mask)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert 0 < distance(out, want) <= 2 * distance(plain, want)


def in_blocks(bounds: list[int], *, blind: bool = False, kind: str = "none") -> tuple[Tensor, Tensor]:
    """Attention block by block of keys, merged."""
    q, k, v = tensors()
    mask = make_mask(kind)
    out, lse = torch.zeros(B, H, S, D), torch.full((B, H, S), -math.inf)
    for start, stop in pairwise(bounds):
        part = mask if mask is None or mask.shape[-1] == 1 else mask[..., start:stop]
        block, block_lse = attention_lse(q, k[:, :, start:stop], v[:, :, start:stop], part)
        out, lse = merge(out, lse, block, torch.zeros_like(block_lse) if blind else block_lse)
    return out, lse


BOUNDS = [[0, N], [0, 17, N], [0, 7, 14, N], [0, 1, 2, 20, N - 1, N], list(range(N + 1))]


@pytest.mark.parametrize("bounds", BOUNDS, ids=lambda bounds: f"{len(bounds) - 1} blocks")
@pytest.mark.parametrize("kind", MASKS)
def test_merged_blocks_equal_the_whole(kind: str, bounds: list[int]) -> None:
    q, k, v = tensors()
    want, want_lse = exact(q, k, v, make_mask(kind), D**-0.5)
    out, lse = in_blocks(bounds, kind=kind)
    assert distance(out, want) < 3e-6  # does not grow with the number of blocks
    assert distance(lse, want_lse) < 2e-5


def test_a_blind_merge_does_not() -> None:
    q, k, v = tensors()
    want, _ = exact(q, k, v, None, D**-0.5)
    assert distance(in_blocks([0, 7, 14, N], blind=True)[0], want) > 0.1


def test_blocks_without_keys_change_nothing() -> None:
    q, k, v = tensors()
    out, lse = attention_lse(q, k, v)
    nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for merged in (merge(out, lse, *nothing), merge(*nothing, out, lse)):
        assert torch.equal(merged[0], out)
        assert torch.equal(merged[1], lse)
    empty = merge(*nothing, *nothing)
    assert torch.equal(empty[0], nothing[0])
    assert torch.equal(empty[1], nothing[1])


@pytest.mark.parametrize("size", [100.0, -100.0, 1000.0, -10000.0])
def test_merging_is_exact_where_all_scores_are_large(size: float) -> None:
    """A bias for all keys alike changes no weight: so it must be with scores that leave fp32 few digits."""
    q, k, v = tensors()
    want, _ = exact(q, k, v, None, D**-0.5)
    whole = attention_lse(q, k, v, torch.full((1, 1, 1, N), size))[0]
    out, lse = torch.zeros(B, H, S, D), torch.full((B, H, S), -math.inf)
    for start, stop in ((0, 7), (7, 14), (14, N)):
        bias = torch.full((1, 1, 1, stop - start), size)
        out, lse = merge(out, lse, *attention_lse(q, k[:, :, start:stop], v[:, :, start:stop], bias))
    assert distance(out, want) <= max(5e-6, 2 * distance(whole, want))
