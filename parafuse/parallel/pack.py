"""Rows and heads into send buffers and back, one copy each way. No communication here.

Legend: B batch, H heads, S rows of the local part (all segments, filler included), N true rows, D head size,
P ranks of the exchange, `lengths` true rows per segment, `parts` rows per segment and rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def _pieces(lengths: Sequence[int], parts: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(first true row, local offset, whole ranks, rows on the rank that is partly filled) for each segment."""
    out, row, offset = [], 0, 0
    for length, part in zip(lengths, parts, strict=True):
        whole = length // part if part else 0
        out.append((row, offset, whole, length - whole * part))
        row, offset = row + length, offset + part
    return out


def join_rows(x_PBHSD: Tensor, lengths: Sequence[int], parts: Sequence[int]) -> Tensor:
    """(P, B, H, S, D) -> (B, H, N, D): segments in order, ranks in order, filler dropped. The inverse of split_rows."""
    _, b, h, _, d = x_PBHSD.shape
    x_BHPSD = x_PBHSD.permute(1, 2, 0, 3, 4)
    out = x_PBHSD.new_empty((b, h, sum(lengths), d))
    for (row, offset, whole, rest), part in zip(_pieces(lengths, parts), parts, strict=True):
        if whole:
            target = out[:, :, row : row + whole * part].unflatten(2, (whole, part))
            target.copy_(x_BHPSD[:, :, :whole, offset : offset + part])
        if rest:
            out[:, :, row + whole * part : row + whole * part + rest].copy_(
                x_BHPSD[:, :, whole, offset : offset + rest]
            )
    return out


def split_rows(x_BHND: Tensor, lengths: Sequence[int], parts: Sequence[int], degree: int) -> Tensor:
    """(B, H, N, D) -> (P, B, H, S, D) contiguous: each rank's rows of every segment; filler rows are zero."""
    b, h, _, d = x_BHND.shape
    filled = all(part * degree == length for length, part in zip(lengths, parts, strict=True))
    shape = (degree, b, h, sum(parts), d)
    out = x_BHND.new_empty(shape) if filled else x_BHND.new_zeros(shape)
    out_BHPSD = out.permute(1, 2, 0, 3, 4)
    for (row, offset, whole, rest), part in zip(_pieces(lengths, parts), parts, strict=True):
        if whole:
            source = x_BHND[:, :, row : row + whole * part].unflatten(2, (whole, part))
            out_BHPSD[:, :, :whole, offset : offset + part].copy_(source)
        if rest:
            source = x_BHND[:, :, row + whole * part : row + whole * part + rest]
            out_BHPSD[:, :, whole, offset : offset + rest].copy_(source)
    return out
