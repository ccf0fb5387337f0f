"""Inputs that several families take, from torch's global generator."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models import Sizes


def legible(sizes: Sizes, *, text: int | None = None, first: bool = True) -> Tensor:
    """(B, T) bool, T the length of the text or `text`: the last sample lacks its last third and (if `first`) the first
    token."""
    tokens = text or sizes.text
    mask = torch.ones(sizes.batch, tokens, dtype=torch.bool)
    mask[-1, tokens - tokens // 3 :] = False
    if first and tokens > 2:
        mask[-1, 0] = False
    return mask


def video(sizes: Sizes, channels: int, patch: int) -> Tensor:
    """(B, C, F, H, W) whose rows and columns are `patch` times those of the grid."""
    frames, rows, columns = sizes.grid
    return torch.randn(sizes.batch, channels, frames, patch * rows, patch * columns)


def picture(sizes: Sizes, channels: int, patch: int) -> Tensor:
    """(B, C, H, W) with the frames of the grid below each other."""
    frames, rows, columns = sizes.grid
    return torch.randn(sizes.batch, channels, patch * frames * rows, patch * columns)
