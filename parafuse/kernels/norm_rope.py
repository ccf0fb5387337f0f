"""Root-mean-square norm and rotary embedding of queries and keys, written where attention takes them from: a send
buffer, in the model's dtype or in 8 bits, or 8-bit tensors for attention in fp8. All arithmetic is fp32, rounded once.

These are the twins, in torch, of the kernels in `parafuse.kernels.fused.norm_rope`, with the same arguments.

Legend: B batch, S rows, H heads, D head size, P ranks of an exchange, h = H / P. q, k and v have the same shape.
A send buffer is (P, B, S, 3, h, D): for each rank, each row's heads of q, k and v, as `parallel.pack` sends them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from parafuse.errors import UnsupportedError
from parafuse.kernels.fp8 import FP8, FP8_MAX, scale_of


@dataclass(frozen=True, kw_only=True, eq=False)
class NormRope:
    """What is done to queries and keys; values stay as they are."""

    norm: Literal["none", "head", "width"] = "none"
    """Over the elements of one head (FLUX), or of all heads together (Wan)."""
    weights: tuple[Tensor | None, Tensor | None] = (None, None)
    """Of the norms of queries and keys: (D,) or (H * D,)."""
    eps: float = 1e-6
    rotary: Literal["none", "pairs", "halves"] = "none"
    """Which two elements turn together: neighbours, or those that are half a head apart."""
    tables: tuple[Tensor, Tensor] | None = None
    """Cosines and sines, (S, D) or (B, S, D) fp32, as diffusers gives them."""


def pack_qkv(qkv: tuple[Tensor, Tensor, Tensor], how: NormRope, out_PBS3hD: Tensor) -> None:
    """(B, S, H, D) each -> the rows of a send buffer that belong to this stream."""
    check(qkv, how, out_PBS3hD)
    for which, x in enumerate(_ready(qkv, how)):
        out_PBS3hD[:, :, :, which].copy_(_by_rank(x, out_PBS3hD.shape[0]))


def pack_qkv_fp8(
    qkv: tuple[Tensor, Tensor, Tensor], how: NormRope, values_PBS3hD: Tensor, scales_PBS3h: Tensor
) -> None:
    """The same in 8 bits, with a scale (fp32) for each row of each head: value = fp8 * scale."""
    check(qkv, how, values_PBS3hD, FP8)
    for which, x in enumerate(_ready(qkv, how)):
        scale = scale_of(x.abs().amax(-1))
        values = (x / scale.unsqueeze(-1)).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
        _bytes(values_PBS3hD)[:, :, :, which].copy_(_bytes(_by_rank(values, values_PBS3hD.shape[0])))
        scales_PBS3h[:, :, :, which].copy_(_by_rank(scale, values_PBS3hD.shape[0]))


def cast_qkv_fp8(qkv: tuple[Tensor, Tensor, Tensor], how: NormRope) -> tuple[Tensor, Tensor]:
    """(values (B, S, 3, H, D) fp8, scales (3, B, H) fp32): one scale for each head of each sample, as attention in fp8
    wants them (`q_descale`, `k_descale`, `v_descale`). A batch of none or of no rows has scale 1."""
    check(qkv, how, None)
    b, s, h, d = qkv[0].shape
    values, scales = qkv[0].new_empty((b, s, 3, h, d), dtype=FP8), qkv[0].new_ones((3, b, h), dtype=torch.float32)
    for which, x in enumerate(_ready(qkv, how)):
        if s:
            scales[which] = scale_of(x.abs().amax((1, 3)))
        scaled = x / scales[which, :, None, :, None]
        _bytes(values)[:, :, which].copy_(_bytes(scaled.clamp_(-FP8_MAX, FP8_MAX).to(FP8)))
    return values, scales


def fp8_buffer(
    shape_PBS3hD: tuple[int, int, int, int, int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(flat bytes to send, fp8 values, fp32 scales): one buffer, in which each rank's scales follow its values.

    gloo has no fp8, so bytes are what travels: (D + 4) / (2 * D) of those of 16 bits."""
    p, b, s, _, h, d = shape_PBS3hD
    if d % 4:
        raise UnsupportedError(f"8 bits in a send buffer: head size {d} is not a multiple of 4, so scales do not fit")
    number = b * s * 3 * h
    flat = torch.empty(p * number * (d + 4), dtype=torch.uint8, device=device)
    return flat, *fp8_views(flat, shape_PBS3hD)


def fp8_views(flat: Tensor, shape_PBS3hD: tuple[int, int, int, int, int, int]) -> tuple[Tensor, Tensor]:
    """(fp8 values (P, B, S, 3, h, D), fp32 scales (P, B, S, 3, h)) of such a buffer, sent or received."""
    p, b, s, _, h, d = shape_PBS3hD
    number = b * s * 3 * h
    if not number:
        return flat.new_empty(shape_PBS3hD, dtype=FP8), flat.new_empty(shape_PBS3hD[:-1], dtype=torch.float32)
    blocks = flat.view(p, number * (d + 4))
    values = blocks[:, : number * d].view(FP8).unflatten(1, (b, s, 3, h, d))
    return values, blocks[:, number * d :].view(torch.float32).unflatten(1, (b, s, 3, h))


def check(
    qkv: tuple[Tensor, Tensor, Tensor], how: NormRope, out_PBS3hD: Tensor | None, dtype: torch.dtype | None = None
) -> None:
    """Refuses shapes that do not fit together."""
    b, s, h, d = qkv[0].shape
    if any(x.shape != qkv[0].shape or x.dtype != qkv[0].dtype for x in qkv):
        raise UnsupportedError(f"norm and rotary embedding: q, k and v differ: {[tuple(x.shape) for x in qkv]}")
    if d % 2 and how.rotary != "none":
        raise UnsupportedError(f"rotary embedding: an odd head size, {d}")
    size = {"none": 0, "head": d, "width": h * d}[how.norm]
    for weight in how.weights:
        if weight is not None and weight.numel() != size:
            raise UnsupportedError(f"norm={how.norm!r}: a weight of {weight.numel()} elements, wanted {size}")
    if (how.rotary != "none") != (how.tables is not None):
        raise UnsupportedError(f"rotary={how.rotary!r} with tables={'given' if how.tables else 'None'}")
    for table in how.tables or ():
        if table.shape not in {(s, d), (b, s, d)}:
            raise UnsupportedError(f"rotary tables of shape {tuple(table.shape)}; wanted {(s, d)} or {(b, s, d)}")
    if out_PBS3hD is not None:
        p = out_PBS3hD.shape[0]
        if h % p or out_PBS3hD.shape != (p, b, s, 3, h // p, d) or out_PBS3hD.dtype != (dtype or qkv[0].dtype):
            shapes = f"{tuple(out_PBS3hD.shape)} of {out_PBS3hD.dtype} for q of {tuple(qkv[0].shape)}, {qkv[0].dtype}"
            raise UnsupportedError(f"send buffer {shapes}; wanted (P, B, S, 3, H / P, D)")


def ready(x_BSHD: Tensor, weight: Tensor | None, how: NormRope) -> Tensor:
    """Queries or keys after norm and rotary embedding, in fp32."""
    x = x_BSHD.float()
    if how.norm == "head":
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + how.eps)
    elif how.norm == "width":
        x = x * torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + how.eps)
    if weight is not None:
        x = x * weight.float().view((-1, x.shape[-1]) if how.norm == "width" else (-1,))
    if how.tables is None:
        return x
    cos, sin = (table.float().unsqueeze(-2) for table in how.tables)
    if how.rotary == "pairs":
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-b, a), dim=-1).flatten(-2)
    else:
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat((-b, a), dim=-1)
    return x * cos + turned * sin


def _ready(qkv: tuple[Tensor, Tensor, Tensor], how: NormRope) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv
    return ready(q, how.weights[0], how), ready(k, how.weights[1], how), v.float()


def _bytes(x: Tensor) -> Tensor:
    """fp8 as bytes: Inductor cannot write a part of an fp8 tensor."""
    return x.view(torch.uint8)


def _by_rank(x_BSH: Tensor, degree: int) -> Tensor:
    """(B, S, H, ...) -> (P, B, S, h, ...)."""
    return x_BSH.unflatten(2, (degree, -1)).movedim(2, 0)
