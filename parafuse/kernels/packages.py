"""Attention backends that packages bring where they are installed: FlashAttention 2, 3 and 4, and SageAttention.

Each is called by the function that its package documents, looked up when it is first needed. Shapes as in backends.py;
the FlashAttention packages want (B, S, H, D).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from parafuse.kernels.fp8 import per_head
from parafuse.kernels.registry import Backend, Facts

Result = tuple[Tensor, Tensor | None]
HOPPER, BLACKWELL = 9, 10
"""Major compute capabilities."""


@cache
def _version(distribution: str) -> tuple[int, ...]:
    """Of an installed package; () where it is not installed."""
    try:
        text = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def _needs(module: str, distribution: str, least: tuple[int, ...] = ()) -> Callable[[str], str]:
    """Why a package cannot be used on a device. `module`: what is imported; nothing is imported to find out."""

    def why_not_here(device: str) -> str:
        if device != "cuda" or not torch.cuda.is_available():
            return "needs a CUDA GPU"
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return f"is not installed (pip install {distribution})"
        if least and _version(distribution) < least:
            return f"needs {distribution} {'.'.join(map(str, least))} or later"
        return ""

    return why_not_here


def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _rows_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def _first_two(found: Any) -> Result:
    """(out (B, H, S, D), lse (B, H, S)) of what a FlashAttention package gave."""
    out, lse = found[0].transpose(1, 2), found[1]
    return out, lse[..., : out.shape[2]].float()  # padded in some versions


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Result:
    """Dao 2023, arXiv:2307.08691."""
    call = _function("flash_attn", "flash_attn_func")
    return _first_two(call(*_rows_first(q, k, v), softmax_scale=scale, causal=is_causal, return_attn_probs=True))


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Result:
    """Shah et al. 2024, arXiv:2407.08608."""
    call = _function("flash_attn_interface", "flash_attn_func")
    return _first_two(call(*_rows_first(q, k, v), softmax_scale=scale, causal=is_causal, return_attn_probs=True))


def flash_attn_3_fp8(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Result:
    """FlashAttention-3 with queries, keys and values in fp8, a scale for each head of each sample."""
    call = _function("flash_attn_interface", "flash_attn_func")
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = (per_head(x) for x in (q, k, v))
    group_size = q.shape[1] // k.shape[1]
    if group_size > 1:  # scales are those of key heads
        q_scale = q_scale.unflatten(1, (-1, group_size)).amax(dim=2)
        q8 = (q.float() / q_scale.repeat_interleave(group_size, 1)[..., None, None]).to(q8.dtype)
    found = call(
        *_rows_first(q8, k8, v8),
        softmax_scale=scale,
        causal=is_causal,
        q_descale=q_scale,
        k_descale=k_scale,
        v_descale=v_scale,
        return_attn_probs=True,
    )
    out, lse = _first_two(found)
    return out.to(q.dtype), lse


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Result:
    call = _function("flash_attn.cute", "flash_attn_func")
    return _first_two(call(*_rows_first(q, k, v), softmax_scale=scale, causal=is_causal, return_lse=True))


def sage(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Result:
    """Zhang et al. 2024, arXiv:2411.10958."""
    call = _function("sageattention", "sageattn")
    out, lse = call(q, k, v, tensor_layout="HND", is_causal=is_causal, sm_scale=scale, return_lse=True)
    return out, lse.float()


def _kernel(facts: Facts, largest: int, majors: tuple[int, ...] = ()) -> str:
    if not facts.is_half:
        return "wants 16 bits"
    if majors and (facts.capability is None or facts.capability[0] not in majors):
        return f"wants compute capability {' or '.join(f'{major}.x' for major in majors)}"
    if facts.head_size != facts.value_size:
        return "wants values of the size of keys"
    if facts.head_size % 8 or facts.head_size > largest:
        return f"wants heads of a multiple of 8, up to {largest}"
    if facts.is_causal and not facts.is_square:
        return "lets the last row see the last key where it is causal; torch lets the first see the first"
    return ""


BACKENDS = (
    Backend(
        name="flash-attn-2",
        about="FlashAttention-2, the package flash-attn",
        has_lse=True,
        takes_masks=False,
        takes_groups=True,
        run=flash_attn_2,
        why_not_here=_needs("flash_attn", "flash-attn", (2, 6)),
        why_not=lambda facts: _kernel(facts, 256),
    ),
    Backend(
        name="flash-attn-3",
        about="FlashAttention-3 for Hopper, the package flash-attn-3",
        has_lse=True,
        takes_masks=False,
        takes_groups=True,
        run=flash_attn_3,
        why_not_here=_needs("flash_attn_interface", "flash-attn-3"),
        why_not=lambda facts: _kernel(facts, 256, (HOPPER,)),
    ),
    Backend(
        name="flash-attn-4",
        about="FlashAttention-4 for Hopper and Blackwell, the package flash-attn-4",
        has_lse=True,
        takes_masks=False,
        takes_groups=True,
        run=flash_attn_4,
        why_not_here=_needs("flash_attn.cute", "flash-attn-4", (4,)),
        why_not=lambda facts: _kernel(facts, 128, (HOPPER, BLACKWELL)),
    ),
    Backend(
        name="sage",
        about="SageAttention 2, products of queries and keys in 8 bits",
        has_lse=True,
        takes_masks=False,
        takes_groups=True,
        lossy="queries and keys in 8 bits",
        run=sage,
        # version 1 takes `return_lse` and ignores it
        why_not_here=_needs("sageattention", "sageattention", (2,)),
        why_not=lambda facts: _kernel(facts, 128),
    ),
    Backend(
        name="fp8",
        about="FlashAttention-3 with queries, keys and values in fp8",
        has_lse=True,
        takes_masks=False,
        takes_groups=True,
        lossy="queries, keys and values in 8 bits",
        run=flash_attn_3_fp8,
        why_not_here=_needs("flash_attn_interface", "flash-attn-3"),
        why_not=lambda facts: _kernel(facts, 256, (HOPPER,)),
    ),
)
