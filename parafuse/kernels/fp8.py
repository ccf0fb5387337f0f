"""Queries, keys and values in fp8 (e4m3), with a scale for each head of each sample."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest number of e4m3."""


def scale_of(largest: Tensor) -> Tensor:
    """The scale by which the largest value becomes the largest number of fp8, fp32; 1 where there is nothing but 0."""
    return torch.where(largest > 0, largest.float() / FP8_MAX, 1.0)


def per_head(x_BHSD: Tensor) -> tuple[Tensor, Tensor]:
    """(x / scale in fp8 (B, H, S, D), scale (B, H) fp32): the largest value of a head is the largest number of fp8."""
    scale_BH = scale_of(x_BHSD.abs().amax(dim=(-2, -1)))
    scaled = (x_BHSD.float() / scale_BH[..., None, None]).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(FP8), scale_BH


def rounded_per_head(x_BHSD: Tensor) -> Tensor:
    """What is left of `x` after it was in fp8; in the dtype of `x`."""
    rounded, scale_BH = per_head(x_BHSD)
    return (rounded.float() * scale_BH[..., None, None]).to(x_BHSD.dtype)
