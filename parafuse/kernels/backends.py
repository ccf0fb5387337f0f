"""The attention backends that torch brings, and the table of all of them.

Shapes: q (B, H, S, D), k and v (B, G, N, D) with G = H unless a backend takes groups, mask broadcastable to
(B, H, S, N), out (B, H, S, Dv), lse (B, H, S) fp32. Kernels are called by their operators, so that nothing is set for
the process (`torch.nn.attention.sdpa_kernel` sets flags that other threads see).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parafuse.kernels import packages
from parafuse.kernels.fp8 import rounded_per_head
from parafuse.kernels.registry import HALF, Backend, Facts, Registry

Result = tuple[Tensor, Tensor | None]
aten: Any = torch.ops.aten


def _on_cuda(device: str) -> str:
    return "" if device == "cuda" and torch.cuda.is_available() else "needs a CUDA GPU"


def _on_cpu(device: str) -> str:
    return "" if device == "cpu" else "is for the CPU"


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True: attend) as zeros and -inf; other masks are cast."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)


def _bias(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    return None if mask is None else additive(mask, q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _aligned(bias: Tensor | None) -> Tensor | None:
    """The same bias in memory whose rows start at multiples of 16 elements, as the CUDA kernel wants them."""
    return None if bias is None else F.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]]


def _without_keys(out: Tensor, lse: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Kernels differ in what they give for rows without keys; here it is 0 and -inf."""
    if bias is None:
        return out, lse
    empty = (bias == -math.inf).all(dim=-1)
    return out.masked_fill(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, -math.inf)


def torch_chooses(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Result:
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return out, None


def torch_choice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> str:
    """The kernel that torch takes for a call."""
    grouped = q.shape[1] != k.shape[1]
    number = torch._fused_sdp_choice(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped)
    return {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}.get(int(number), "another kernel")


def attention_math(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """The reference, in fp32. Heads may be grouped: k and v (B, G, N, D), H a multiple of G."""
    if k.shape[1] != q.shape[1]:
        group_size = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + additive(mask, torch.float32)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    return (weights @ v.float()).to(q.dtype), lse


def cpu_flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Result:
    bias = _bias(q, k, mask)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=is_causal, attn_mask=bias, scale=scale
    )
    return _without_keys(out, lse, bias)


def flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Result:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, is_causal=is_causal, scale=scale)
    return out, lse


def efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Result:
    bias = _aligned(_bias(q, k, mask))
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, is_causal=is_causal, scale=scale)
    return _without_keys(out, lse[..., : q.shape[2]], bias)


def cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Result:
    q, k, v = (x.contiguous() for x in (q, k, v))  # wrong results otherwise, as diffusers notes beside its own call
    bias = _aligned(_bias(q, k, mask))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, is_causal=is_causal, scale=scale)
    return _without_keys(out, lse.view(q.shape[:3]), bias)  # (B, H, S, 1) since torch 2.9


def fp8_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Result:
    """What fp8 does to queries, keys and values, with products in fp32."""
    q8, k8, v8 = (rounded_per_head(x).float() for x in (q, k, v))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
    out, lse = torch_chooses(q8, k8, v8, mask, scale, is_causal)
    return out.to(q.dtype), lse


def _plain(facts: Facts) -> str:
    """What every kernel but `math` wants."""
    if facts.value_size != facts.head_size:
        return "wants values of the size of keys"
    if facts.is_causal and not facts.is_square:
        return "wants as many rows as keys where it is causal"
    return ""


def _cpu_kernel(facts: Facts) -> str:
    return _plain(facts) or ("" if facts.dtype in (torch.float32, *HALF) else f"has no kernel for {facts.dtype}")


def _half_of_eight(facts: Facts, largest: int) -> str:
    if not facts.is_half:
        return "wants 16 bits"
    if facts.head_size % 8 or facts.head_size > largest:
        return f"wants heads of a multiple of 8, up to {largest}"
    return _plain(facts)


def _flash_kernel(facts: Facts) -> str:
    if facts.capability is None or facts.capability < (8, 0):
        return "wants compute capability 8.0"
    return _half_of_eight(facts, 256)


def _cudnn_kernel(facts: Facts) -> str:
    if facts.capability is None or facts.capability < (8, 0):
        return "wants compute capability 8.0"
    if facts.is_causal and facts.mask:
        return "takes no mask where it is causal"
    return _half_of_eight(facts, 128)


def _efficient_kernel(facts: Facts) -> str:
    if facts.dtype not in (torch.float32, *HALF):
        return f"has no kernel for {facts.dtype}"
    return "wants heads of a multiple of 8" if facts.head_size % 8 else _plain(facts)


def _mask_or_causal(facts: Facts) -> str:
    return "takes no mask where it is causal" if facts.is_causal and facts.mask else ""


BACKENDS = (
    Backend(
        name="torch",
        about="scaled_dot_product_attention as torch dispatches it",
        has_lse=False,
        takes_masks=True,
        takes_groups=True,
        run=torch_chooses,
        why_not=_mask_or_causal,
    ),
    Backend(
        name="cpu-flash",
        about="flash attention of torch's CPU build",
        has_lse=True,
        takes_masks=True,
        run=cpu_flash,
        why_not_here=_on_cpu,
        why_not=lambda facts: _cpu_kernel(facts) or _mask_or_causal(facts),
    ),
    Backend(
        name="flash",
        about="FlashAttention-2 in torch",
        has_lse=True,
        takes_masks=False,
        run=flash,
        why_not_here=_on_cuda,
        why_not=_flash_kernel,
    ),
    Backend(
        name="cudnn",
        about="cuDNN's attention in torch",
        has_lse=True,
        takes_masks=True,
        run=cudnn,
        why_not_here=_on_cuda,
        why_not=_cudnn_kernel,
    ),
    Backend(
        name="efficient",
        about="memory-efficient attention in torch",
        has_lse=True,
        takes_masks=True,
        run=efficient,
        why_not_here=_on_cuda,
        why_not=_efficient_kernel,
    ),
    *packages.BACKENDS,
    Backend(
        name="fp8-reference",
        about="what fp8 does to queries, keys and values, computed in fp32: to see what it loses",
        has_lse=False,
        takes_masks=True,
        takes_groups=True,
        lossy="queries, keys and values in 8 bits",
        run=fp8_reference,
        why_not=_mask_or_causal,
    ),
    Backend(
        name="math",
        about="products and softmax one by one, in fp32",
        has_lse=True,
        takes_masks=True,
        takes_groups=True,
        run=attention_math,
    ),
)
REGISTRY = Registry(BACKENDS, own=("cpu-flash", "flash", "efficient", "math"))
