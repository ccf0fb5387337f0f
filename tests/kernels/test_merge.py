"""The merge of partial attentions: twin and kernel against fp64."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from parafuse.errors import UnsupportedError
from parafuse.kernels.merge import merge, merge_
from tests.kernels.interpreter import Interpreter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(2, 3, 17, 64), (2, 3, 17, 72), (1, 2, 5, 128), (2, 1, 1, 40)]


def blocks(shape: tuple[int, ...], dtype: torch.dtype, *, heads_first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, block's out, block's lse): some rows have no keys in one, in the other, or in both."""
    b, h, s, d = shape
    generator = torch.Generator().manual_seed(0)
    stored = (b, h, s, d) if heads_first else (b, s, h, d)

    def rows(dtype: torch.dtype) -> Tensor:
        x = torch.randn(stored, generator=generator).to(dtype)
        return x if heads_first else x.transpose(1, 2)

    out, block = rows(torch.float32), rows(dtype)
    lse, block_lse = (5 * torch.randn(b, h, s, generator=generator) for _ in range(2))
    block_lse[:, :, ::4] += 40.0  # weights of 0 and 1
    for empty, x, of in ((slice(1, None, 5), out, lse), (slice(2, None, 5), block, block_lse)):
        x[:, :, empty], of[:, :, empty] = 0.0, -math.inf
    for x, of in ((out, lse), (block, block_lse)):
        x[:, :, 3::7], of[:, :, 3::7] = 0.0, -math.inf
    return out, lse, block, block_lse


def exact(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """In fp64, as the definition has it."""
    both = torch.stack((lse, block_lse)).double()
    weights = torch.softmax(both, 0).nan_to_num(0.0).unsqueeze(-1)
    return weights[0] * out.double() + weights[1] * block.double(), torch.logsumexp(both, 0)


def distance(got: Tensor, want: Tensor) -> float:
    """Largest difference; what is not finite must be the same."""
    finite = want.isfinite()
    assert torch.equal(got[~finite].double(), want[~finite])
    return float((got[finite].double() - want[finite]).abs().max()) if bool(finite.any()) else 0.0


def errors_of_kernel(
    shape: tuple[int, ...], dtype: torch.dtype, heads_first: bool, device: str = "cpu"
) -> tuple[float, ...]:
    """(out, lse) of the kernel against fp64, then of the twin."""
    from parafuse.kernels.fused.merge import merge_ as kernel

    out, lse, block, block_lse = blocks(shape, dtype, heads_first=heads_first)
    given = out.to(device), lse.to(device), block.to(device), block_lse.to(device)
    want = exact(*given)
    found = [distance(got, of) for got, of in zip(merge(*given), want, strict=True)]
    mine = given[0].clone(), given[1].clone(), given[2], given[3]
    assert kernel(*mine)[0] is mine[0]
    return (*(distance(got, of) for got, of in zip(mine, want, strict=False)), *found)


@pytest.mark.parametrize(("shape", "dtype"), [*product(SIZES, DTYPES)], ids=str)
def test_the_kernel_is_as_exact_as_the_twin(
    interpreted: Interpreter, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for heads_first in (True, False):
        out, lse, twin_out, twin_lse = interpreted(errors_of_kernel, shape, dtype, heads_first)
        assert out <= max(2 * twin_out, 1e-6)
        assert lse <= max(2 * twin_lse, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_equals_fp64(dtype: torch.dtype) -> None:
    given = blocks((2, 3, 17, 64), dtype, heads_first=False)
    want = exact(*given)
    out, lse = merge(*given)
    assert distance(out, want[0]) < 1e-6
    assert distance(lse, want[1]) < 1e-5


def test_in_place_is_what_it_says() -> None:
    given = blocks((2, 3, 17, 64), torch.bfloat16, heads_first=True)
    before = [x.clone() for x in given]
    want = merge(*given)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    got = merge_(*given)
    assert got[0] is given[0]
    assert got[1] is given[1]
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("which", [0, 1, 3])
def test_half_precision_accumulators_are_refused(which: int) -> None:
    given = list(blocks((2, 3, 17, 64), torch.bfloat16, heads_first=True))
    given[which] = given[which].bfloat16()
    with pytest.raises(UnsupportedError, match="float32"):
        merge(*given)


def test_shapes_that_would_broadcast_are_refused() -> None:
    out, lse, block, block_lse = blocks((2, 3, 17, 64), torch.bfloat16, heads_first=True)
    with pytest.raises(UnsupportedError, match="shapes"):
        merge(out, lse, block, block_lse[:1])
