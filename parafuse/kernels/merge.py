"""Partial attentions over different keys, merged into one by their log-sum-exp.

Shapes: out (B, H, S, D) fp32, lse (B, H, S) fp32; a block's out in any float dtype, its lse fp32. A row without keys in
a block has lse = -inf and out = 0 there, and keeps what the other blocks give.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of both together, as new tensors."""
    return merge_(out.clone(), lse.clone(), block_out, block_lse)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The same, written into `out` and `lse`.

    The weights come from the difference alone: they sum to 1 however large the scores and however many the blocks."""
    weight = (block_lse - lse).sigmoid_().nan_to_num_(0.0).unsqueeze(-1)
    return out.lerp_(block_out.float(), weight), torch.logaddexp(lse, block_lse, out=lse)
