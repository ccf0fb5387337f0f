"""Partial attentions over different keys, merged into one by their log-sum-exp.

Shapes: out (B, H, S, D) fp32, lse (B, H, S) fp32; a block's out in any float dtype, its lse fp32. A row without keys in
a block has lse = -inf and out = 0 there, and keeps what the other blocks give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parafuse.errors import UnsupportedError


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of both together, as new tensors."""
    return merge_(out.clone(), lse.clone(), block_out, block_lse)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The same, written into `out` and `lse`. Six launches; `parafuse.kernels.fused.merge` has it as one.

    The weights come from the difference alone: they sum to 1 however large the scores and however many the blocks."""
    check(out, lse, block_out, block_lse)
    weight = (block_lse - lse).sigmoid_().nan_to_num_(0.0).unsqueeze(-1)
    return out.lerp_(block_out.float(), weight), torch.logaddexp(lse, block_lse, out=lse)


def check(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Refuses what would lose digits or be spread over other rows in silence."""
    if {out.dtype, lse.dtype, block_lse.dtype} != {torch.float32}:
        raise UnsupportedError(
            f"merge: out is {out.dtype}, lse {lse.dtype}, the block's lse {block_lse.dtype}; all must be float32"
        )
    if out.shape != block_out.shape or not out.shape[:3] == lse.shape == block_lse.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (out, lse, block_out, block_lse))
        raise UnsupportedError(f"merge: shapes {shapes}; wanted (B, H, S, D), (B, H, S), (B, H, S, D), (B, H, S)")
