"""ComfyUI's pictures and masks: tensors of floats from 0 to 1, [B, H, W, C] and [B, H, W]; and those of autoencoders,
from -1 to 1, [B, C, H, W], of videos [B, C, F, H, W]."""

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


def to_pixels(pictures: torch.Tensor, as_video: bool) -> torch.Tensor:
    """Of pictures [B, H, W, C] what an autoencoder encodes; `as_video`: they are the frames of one video."""
    pixels = (pictures[..., :3].detach().cpu().float() * 2 - 1).permute(0, 3, 1, 2)
    return pixels.permute(1, 0, 2, 3)[None] if as_video else pixels


def from_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """[B, H, W, 3] of what an autoencoder has decoded; of videos all frames, one after the other."""
    x = (pixels.float() * 0.5 + 0.5).clamp(0, 1)
    x = x.permute(0, 2, 1, 3, 4).flatten(0, 1) if x.ndim == 5 else x
    return x.permute(0, 2, 3, 1).contiguous()


def to_bytes(x: torch.Tensor) -> bytes:
    """The values of a float32 tensor."""
    return x.detach().cpu().float().contiguous().numpy().tobytes()


def from_bytes(data: bytes, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """The other way round; `dtype`: its name."""
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).reshape(list(shape))


def as_picture(data: bytes) -> Image.Image:
    """A preview."""
    picture = Image.open(io.BytesIO(data), formats=["PNG"])
    picture.load()
    return picture.convert("RGB")


def _pixels(data: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
