"""Queries, keys and values in fp8 (e4m3), with a scale for each head of each sample."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""


def per_head(x_BHSD: Tensor) -> tuple[Tensor, Tensor]:
    """(x / scale in fp8 (B, H, S, D), scale (B, H) fp32): the largest value of a head is the largest number of fp8."""
    scale_BH = x_BHSD.abs().amax(dim=(-2, -1)).float().clamp_min(1e-12) / LARGEST
    scaled = (x_BHSD.float() / scale_BH[..., None, None]).clamp(-LARGEST, LARGEST)
    return scaled.to(FP8), scale_BH


def rounded_per_head(x_BHSD: Tensor) -> Tensor:
    """What is left of `x` after it was in fp8; in the dtype of `x`."""
    rounded, scale_BH = per_head(x_BHSD)
    return (rounded.float() * scale_BH[..., None, None]).to(x_BHSD.dtype)
