"""Attention that returns its log-sum-exp, for merging blocks of keys.

Shapes: q (B, H, S, D), k and v (B, H, N, D), mask broadcastable to (B, H, S, N), out (B, H, S, D), lse (B, H, S) fp32.
A row whose keys are all masked has lse = -inf and out = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("cpu-flash", "cuda-flash", "cuda-efficient", "math")
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """The other arguments of one scaled-dot-product attention."""

    mask: Tensor | None = None
    """Over the whole sequence in the model's order: broadcastable to (B, H, N, N)."""
    scale: float | None = None
    is_causal: bool = False


def pick(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[str, str]:
    """(backend, reason) for inputs like these. Only backends that return a log-sum-exp are listed."""
    same = q.shape[-1] == v.shape[-1] and q.shape[1] == k.shape[1]
    if not same:
        return "math", "head sizes of keys and values differ, or heads are grouped"
    if q.device.type == "cpu":
        if q.dtype in (torch.float32, *_HALF):
            return "cpu-flash", "flash attention of the CPU build"
        return "math", f"no CPU kernel for {q.dtype}"
    if q.device.type == "cuda" and q.shape[-1] % 8:
        return "math", "head size is not a multiple of 8"
    if q.device.type == "cuda" and q.dtype in _HALF and mask is None and q.shape[-1] <= 256 and _has_flash(q.device):
        return "cuda-flash", "16-bit, no mask"
    if q.device.type == "cuda":
        return "cuda-efficient", "mask or 32-bit"
    return "math", f"no kernel for {q.device.type}"


def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _aligned(bias: Tensor) -> Tensor:
    """The same bias in memory whose rows start at multiples of 16 elements, as the CUDA kernel wants them."""
    columns = bias.shape[-1]
    return torch.nn.functional.pad(bias, (0, -columns % 16))[..., :columns]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True: attend) as zeros and -inf; other masks are cast."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)


def attention_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The reference, in fp32. Heads may be grouped: k and v (B, G, N, D), H a multiple of G."""
    if k.shape[1] != q.shape[1]:
        group_size = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + _additive(mask, torch.float32)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    return (weights @ v.float()).to(q.dtype), lse


def attention_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of softmax(q k^T * scale + mask) v, by the backend that `pick` names."""
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    backend, _ = pick(q, k, v, mask)
    if backend == "math":
        return attention_math(q, k, v, mask, scale)
    aten = torch.ops.aten
    if backend == "cuda-flash":
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        return out, lse
    bias = None if mask is None else _additive(mask, q.dtype)
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if backend == "cuda-efficient":
        bias = None if bias is None else _aligned(bias)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)
        lse = lse[..., : q.shape[2]]
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    if bias is not None:  # kernels differ in what they give for rows without keys
        empty = (bias == -math.inf).all(dim=-1)
        lse = lse.masked_fill(empty, -math.inf)
        out = out.masked_fill(empty.unsqueeze(-1), 0.0)
    return out, lse
