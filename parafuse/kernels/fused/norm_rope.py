"""Norm, rotary embedding and the write into a send buffer (or into 8 bits) of q, k and v, as one kernel for a stream.

To Inductor attention is an operator, so that what it fuses ends in tensors that are packed afterwards
(docs/notes/kernels.md).
Twins: the functions of the same names in `parafuse.kernels.norm_rope`.

One program has all heads of some rows of q, k or v. Two elements that turn together are in two tiles, so nothing is
exchanged between threads: neighbours come from one load that is split, halves from two loads.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# (triton need not be there, and what kernels call has no types)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parafuse.errors import UnsupportedError
from parafuse.kernels.fp8 import FP8, FP8_MAX
from parafuse.kernels.norm_rope import NormRope, check

STORE, ROW_SCALES, LARGEST, GIVEN_SCALES = range(4)
"""What is written: values; fp8 values and a scale for each row of each head; the largest value of each head; fp8 values
by scales that are given."""
NORMS = {"none": 0, "head": 1, "width": 2}
ROWS_OF_LARGEST = 16
"""Rows of one program that only looks: fewer atomic operations."""


@triton.jit
def load_pair(pointer, rows, is_row, size, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """fp32 tiles (R, HALF) of the first and the second elements that turn together; `rows`: offsets (R,)."""
    if PAIRS:
        column = tl.arange(0, 2 * HALF)
        inside = is_row[:, None] & (column < size)[None, :]
        x = tl.load(pointer + rows[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
    else:
        column = tl.arange(0, HALF)
        inside = is_row[:, None] & (column < size // 2)[None, :]
        start = pointer + rows[:, None] + column[None, :]
        first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(start + size // 2, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pair(pointer, rows, is_row, first, second, size, HALF: tl.constexpr, PAIRS: tl.constexpr):
    if PAIRS:
        column = tl.arange(0, 2 * HALF)
        inside = is_row[:, None] & (column < size)[None, :]
        x = tl.reshape(tl.join(first, second), (first.shape[0], 2 * HALF))
        tl.store(pointer + rows[:, None] + column[None, :], x.to(pointer.dtype.element_ty), mask=inside)
    else:
        column = tl.arange(0, HALF)
        inside = is_row[:, None] & (column < size // 2)[None, :]
        start = pointer + rows[:, None] + column[None, :]
        tl.store(start, first.to(pointer.dtype.element_ty), mask=inside)
        tl.store(start + size // 2, second.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def norm_pair(first, second, eps, HEADS: tl.constexpr, SIZE: tl.constexpr, NORM: tl.constexpr):
    """Over each head (1), or over all of them (2)."""
    squares = tl.sum(first * first + second * second, axis=1)
    if NORM == 2:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / (HEADS * SIZE) + eps)
        return first * scale, second * scale
    of_head = tl.rsqrt(squares / SIZE + eps)[:, None]
    return first * of_head, second * of_head


@triton.jit
def turn_pair(first, second, cos, sin, is_row, SIZE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    zero = tl.arange(0, 1)
    cos_first, cos_second = load_pair(cos, zero, is_row, SIZE, HALF, PAIRS)
    sin_first, sin_second = load_pair(sin, zero, is_row, SIZE, HALF, PAIRS)
    return first * cos_first - second * sin_first, second * cos_second + first * sin_second


@triton.jit
def norm_rope_kernel(  # noqa: C901, PLR0912, PLR0913, PLR0917 (a kernel's arguments are flat, its branches constant)
    q, k, v, q_weight, k_weight, cos, sin, out, scales, num_rows, batch, eps, heads_of_rank, largest_of_fp8,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, cos_b, cos_s, sin_b, sin_s,
    out_p, out_b, out_s, out_w, out_h, scale_p, scale_b, scale_s, scale_w, scale_h,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, IS_WEIGHTED: tl.constexpr, ROTARY: tl.constexpr, PAIRS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Grid: (rows / ROWS, 3 * batch). `*_b`, `*_s`, ...: strides; `*_w`: from q to k to v; `*_p`: from rank to rank."""
    which, b = tl.program_id(1) // batch, (tl.program_id(1) % batch).to(tl.int64)
    x, weight = q, q_weight
    if which == 1:
        x, weight = k, k_weight
    if which == 2:
        x = v
    # Not by branches: a stride of 1 is a constant there, and of another type.
    stride_b = tl.where(which == 0, q_b, tl.where(which == 1, k_b, v_b))
    stride_s = tl.where(which == 0, q_s, tl.where(which == 1, k_s, v_s))
    stride_h = tl.where(which == 0, q_h, tl.where(which == 1, k_h, v_h))
    head = tl.arange(0, BLOCK_HEADS)
    is_head = head < HEADS
    zero = tl.arange(0, 1)
    to_head = head // heads_of_rank * out_p + head % heads_of_rank * out_h + which * out_w + b * out_b
    to_scale = head // heads_of_rank * scale_p + head % heads_of_rank * scale_h + which * scale_w + b * scale_b
    largest = tl.zeros((BLOCK_HEADS,), tl.float32)
    for i in range(ROWS):
        s = tl.program_id(0).to(tl.int64) * ROWS + i
        is_inside = is_head & (s < num_rows)
        first, second = load_pair(x + b * stride_b + s * stride_s, head * stride_h, is_inside, SIZE, HALF, PAIRS)
        if which < 2:
            if NORM:
                first, second = norm_pair(first, second, eps, HEADS, SIZE, NORM)
            if IS_WEIGHTED:
                if NORM == 2:
                    w_first, w_second = load_pair(weight, head * SIZE, is_head, SIZE, HALF, PAIRS)
                else:
                    w_first, w_second = load_pair(weight, zero, zero == 0, SIZE, HALF, PAIRS)
                first, second = first * w_first, second * w_second
            if ROTARY:
                is_row = (zero == 0) & (s < num_rows)
                cos_row, sin_row = cos + b * cos_b + s * cos_s, sin + b * sin_b + s * sin_s
                first, second = turn_pair(first, second, cos_row, sin_row, is_row, SIZE, HALF, PAIRS)
        if MODE == 1 or MODE == 2:  # noqa: PLR1714 (Triton has no `in`)
            of_row = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
            largest = tl.maximum(largest, of_row)
        if MODE == 1:
            scale = tl.where(of_row > 0, of_row / largest_of_fp8, 1.0)
            tl.store(scales + to_scale + s * scale_s, scale, mask=is_inside)
        if MODE == 3:
            scale = tl.load(scales + to_scale, mask=is_inside, other=1.0)
        if MODE == 1 or MODE == 3:  # noqa: PLR1714
            first = tl.clamp(first / scale[:, None], -largest_of_fp8, largest_of_fp8)
            second = tl.clamp(second / scale[:, None], -largest_of_fp8, largest_of_fp8)
        if MODE != 2:
            store_pair(out + s * out_s, to_head, is_inside, first, second, SIZE, HALF, PAIRS)
    if MODE == 2:
        tl.atomic_max(scales + to_scale, largest, mask=is_head)


def pack_qkv(qkv: tuple[Tensor, Tensor, Tensor], how: NormRope, out_PBS3hD: Tensor) -> None:
    """As the twin: (B, S, H, D) each -> the rows of a send buffer that belong to this stream. One launch."""
    check(qkv, how, out_PBS3hD)
    _launch(STORE, qkv, how, out_PBS3hD, out_PBS3hD[..., 0])


def pack_qkv_fp8(
    qkv: tuple[Tensor, Tensor, Tensor], how: NormRope, values_PBS3hD: Tensor, scales_PBS3h: Tensor
) -> None:
    """As the twin: the same in 8 bits, with a scale for each row of each head. One launch."""
    check(qkv, how, values_PBS3hD, FP8)
    _launch(ROW_SCALES, qkv, how, values_PBS3hD, scales_PBS3h)


def cast_qkv_fp8(qkv: tuple[Tensor, Tensor, Tensor], how: NormRope) -> tuple[Tensor, Tensor]:
    """As the twin: (values (B, S, 3, H, D) fp8, scales (3, B, H) fp32).

    Reads q, k and v twice and writes no other copy: 5 bytes an element of 16 bits. Four launches, two of them small."""
    check(qkv, how, None)
    b, s, h, d = qkv[0].shape
    values = qkv[0].new_empty((b, s, 3, h, d), dtype=FP8)
    scales = qkv[0].new_zeros((3, b, h), dtype=torch.float32)
    by_rank = scales.permute(1, 0, 2)[None, :, None].expand(1, b, s, 3, h)
    _launch(LARGEST, qkv, how, values[None], by_rank)
    scales.div_(FP8_MAX)
    scales.masked_fill_(scales == 0, 1.0)
    _launch(GIVEN_SCALES, qkv, how, values[None], by_rank)
    return values, scales


def tiles(heads: int, size: int, mode: int) -> tuple[int, int, int, int]:
    """(heads, half a head) of a program's tiles, as powers of 2, the rows that it does, and its warps."""
    block_heads, half = (1 << (number - 1).bit_length() for number in (heads, size // 2))
    return block_heads, half, ROWS_OF_LARGEST if mode == LARGEST else 1, 8 if block_heads * half > 2048 else 4


def _launch(mode: int, qkv: tuple[Tensor, Tensor, Tensor], how: NormRope, out: Tensor, scales: Tensor) -> None:
    (b, s, h, d), pairs = qkv[0].shape, how.rotary != "halves" and qkv[0].shape[3] % 2 == 0
    if d % 2:
        raise UnsupportedError(f"norm and rotary embedding as a kernel: an odd head size, {d}")
    if any(x.stride(-1) != 1 for x in (*qkv, out)):
        raise UnsupportedError("norm and rotary embedding: elements of a head must lie side by side")
    if (how.weights[0] is None) != (how.weights[1] is None):
        raise UnsupportedError("norm and rotary embedding: a weight for queries or keys alone")
    if not qkv[0].numel():
        return
    weights = [x if weight is None else weight.contiguous() for x, weight in zip(qkv, how.weights, strict=False)]
    tables = [table.expand(b, s, d) for table in how.tables or (qkv[0][:, :, 0],) * 2]
    block_heads, half, rows, num_warps = tiles(h, d, mode)
    settings: dict[str, Any] = dict(
        HEADS=h, SIZE=d, BLOCK_HEADS=block_heads, HALF=half, ROWS=rows, NORM=NORMS[how.norm],
        IS_WEIGHTED=how.weights[0] is not None, ROTARY=how.tables is not None, PAIRS=pairs, MODE=mode,
        num_warps=num_warps,
    )  # fmt: skip
    kernel: Any = norm_rope_kernel
    with torch.cuda.device_of(out):
        kernel[(-(-s // rows), 3 * b)](
            *qkv, *weights, *tables, out, scales, s, b, how.eps, h // out.shape[0], FP8_MAX,
            *(stride for x in qkv for stride in x.stride()[:3]),
            *(stride for table in tables for stride in table.stride()[:2]),
            *out.stride()[:5], *scales.stride(), **settings,
        )  # fmt: skip
