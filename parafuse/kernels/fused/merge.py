"""The merge of two partial attentions as one kernel: reads a block once, in its own dtype, and updates in place.

Twin: `parafuse.kernels.merge.merge_`."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
# (triton need not be there, and what kernels call has no types)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parafuse.errors import UnsupportedError
from parafuse.kernels.merge import check

TILE = 4096
"""Elements of one program."""


@triton.jit
def merge_kernel(  # noqa: PLR0913, PLR0917 (a kernel's arguments are flat)
    out, lse, block, block_lse, size_1, size_2, rows, width: tl.constexpr,
    out_0, out_1, out_2, lse_0, lse_1, lse_2, block_0, block_1, block_2, block_lse_0, block_lse_1, block_lse_2,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of three dims (`*_0`, `*_1`, `*_2`: strides), each `width` elements side by side."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    i, j, k = row // size_2 // size_1, row // size_2 % size_1, row % size_2
    lse += i * lse_0 + j * lse_1 + k * lse_2
    a = tl.load(lse, mask=is_row, other=0.0)
    b = tl.load(block_lse + i * block_lse_0 + j * block_lse_1 + k * block_lse_2, mask=is_row, other=0.0)
    difference = b - a
    # Both -inf: no key in either, so nothing is taken from the block.
    weight = tl.where(difference == difference, 1 / (1 + tl.exp(-difference)), 0.0)  # noqa: PLR0124 (nan)
    more = tl.where(difference == difference, tl.log(1 + tl.exp(-tl.abs(difference))), 0.0)  # noqa: PLR0124
    tl.store(lse, tl.maximum(a, b) + more, mask=is_row)
    column = tl.arange(0, WIDTH)
    inside = is_row[:, None] & (column < width)[None, :]
    out += (i * out_0 + j * out_1 + k * out_2)[:, None] + column[None, :]
    block += (i * block_0 + j * block_1 + k * block_2)[:, None] + column[None, :]
    old = tl.load(out, mask=inside, other=0.0)
    new = tl.load(block, mask=inside, other=0.0).to(tl.float32)
    weight = weight[:, None]
    tl.store(out, tl.where(weight > 0, old + weight * (new - old), old), mask=inside)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """As the twin: (B, H, S, D) fp32 and (B, H, S) fp32, changed in place and returned. One launch.

    Moves 8 bytes of each element of `out`, and those of `block_out`."""
    check(out, lse, block_out, block_lse)
    if out.stride(3) != 1 or block_out.stride(3) != 1:
        raise UnsupportedError("merge: elements of a row must lie side by side")
    rows = lse.numel()
    if not rows or not out.shape[3]:
        return out, lse
    # Programs go through rows in the order in which the result lies in memory.
    order = sorted(range(3), key=out.stride, reverse=True)
    sizes = [out.shape[dim] for dim in order]
    strides = [x.stride(dim) for x in (out, lse, block_out, block_lse) for dim in order]
    width = 1 << (out.shape[3] - 1).bit_length()
    tile = max(1, TILE // width)
    kernel: Any = merge_kernel
    with torch.cuda.device_of(out):
        kernel[(-(-rows // tile),)](
            out, lse, block_out, block_lse, sizes[1], sizes[2], rows, out.shape[3], *strides, ROWS=tile, WIDTH=width
        )
    return out, lse
