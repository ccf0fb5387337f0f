"""ComfyUI's pictures and masks: tensors of floats from 0 to 1, [B, H, W, C] and [B, H, W]."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image


def to_png(picture: torch.Tensor) -> bytes:
    """One picture [H, W, C], or mask [H, W], as PNG."""
    pixels = (picture.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def from_files(files: Sequence[bytes]) -> torch.Tensor:
    """[B, H, W, 3] of pictures of one size."""
    return torch.stack([torch.from_numpy(_pixels(data)) for data in files])


def as_picture(data: bytes) -> Image.Image:
    """A preview."""
    picture = Image.open(io.BytesIO(data), formats=["PNG"])
    picture.load()
    return picture.convert("RGB")


def _pixels(data: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
