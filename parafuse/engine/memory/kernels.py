"""What a device's kernels take beside their results, and what of parafuse's own operators is looked into.

On fake tensors an operator is its result alone. Here is what the real one allocates as well: copies of inputs in
another dtype or layout, and the buffers that parafuse's operators pack and send.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from parafuse.engine.memory.ledger import Allocator, Body, Ledger
from parafuse.kernels.attention import attention_of
from parafuse.parallel import attention as parallel_attention
from parafuse.parallel import comm

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution.default, aten._convolution.default)
CUDA_BLOCK = 512
"""Bytes to which CUDA's caching allocator rounds a size."""
CUBLAS = 32 << 20
"""Bytes of workspace that torch gives to cuBLAS on Hopper, kept from the first product on; 8 MiB on older GPUs."""
LIBRARIES = {"cuda": CUBLAS}
"""By device: what libraries keep of torch's memory."""


CHANNELS = 16
"""oneDNN's convolutions in fp32 take channels in blocks of so many."""
KEYS_AT_A_TIME = 512


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree if isinstance(x, Tensor)]


class CpuKernels(Allocator):
    """Convolutions copy what they take and give into blocks of channels, or columns; attention has a tile of scores for
    each thread; pointwise operators copy operands of another dtype. Seen in the events of torch 2.13's allocator.
    gloo's threads let go of a buffer when they are scheduled, and ranks share the cores."""

    lets_go_late = True

    def workspace(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        if func in CONVOLUTIONS:
            return _convolution(args, result)
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return _attention(args[0], args[1])
        if isinstance(result, Tensor) and result.is_floating_point() and torch.Tag.pointwise in func.tags:
            return _casts(tensors(args[func is aten.where.self :]), result)
        return 0


def _convolution(args: Any, result: Tensor) -> int:
    """By torch's own choice between oneDNN and plain columns (`use_mkldnn` in ATen/native/Convolution.cpp)."""
    x, weight, stride, dilation, transposed, groups = args[0], args[1], args[3], args[5], args[6], args[8]
    kernel, out = math.prod(weight.shape[2:]), result.nbytes
    half = x.dtype in (torch.bfloat16, torch.float16)
    is_large = groups > 1 or min(weight.shape[-2:]) > 3 or len(x) > 1 or math.prod(x.shape[:4]) > 20480
    is_plain = kernel == 1 and {*stride, *dilation} == {1} and len(x) < 16 and torch.get_num_threads() == 1
    if not half and (is_plain or not is_large):
        return 0 if kernel == 1 or transposed else len(x) * x.shape[1] * kernel * result[0, 0].numel() * x.itemsize
    if _is_channels_last(x) or _is_channels_last(weight):  # as oneDNN has it
        return 0 if _is_channels_last(x) else x.nbytes
    if half:
        return max(x.nbytes + weight.nbytes, 2 * out)

    def blocks(number: int) -> int:
        return -(-number // CHANNELS) * CHANNELS if groups == 1 else number

    # fewer channels than a block are taken as they are
    given = x.nbytes // x.shape[1] * blocks(x.shape[1]) if x.shape[1] >= CHANNELS else 0
    made = out // result.shape[1] * blocks(result.shape[1])
    weights = weight.itemsize * kernel * blocks(weight.shape[0]) * blocks(weight.shape[1])
    return max(given + weights + made - out, made)


def _is_channels_last(x: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return last is not None and x.is_contiguous(memory_format=last) and not x.is_contiguous()


def _attention(q: Tensor, k: Tensor) -> int:
    """Tiles of `cpu_flash_attention` in ATen/native/cpu/FlashAttentionKernel.cpp."""
    rows, size = q.shape[2], q.shape[3]
    tile = min(rows, 256 if rows >= 768 else 64 if rows >= 192 else 32)
    keys = min(k.shape[2], KEYS_AT_A_TIME)
    reduced = 0 if q.dtype == torch.float32 else tile * keys * q.itemsize
    return torch.get_num_threads() * (4 * tile * (keys + 2 + size) + reduced)


class CudaKernels(Allocator):
    """Sizes are rounded up; cuDNN turns half-precision pictures into channels last and back."""

    def size(self, nbytes: int) -> int:
        return -(-nbytes // CUDA_BLOCK) * CUDA_BLOCK

    def workspace(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        if func in CONVOLUTIONS and args[0].dtype in (torch.float16, torch.bfloat16):
            return args[0].nbytes + result.nbytes
        return 0


def _casts(given: list[Tensor], result: Tensor) -> int:
    """Bytes of the copies that a CPU makes of pointwise operands in another dtype than the one it computes in."""
    wide = [x for x in given if x.ndim]
    computed = max((x.dtype for x in wide if x.is_floating_point()), key=lambda d: d.itemsize, default=result.dtype)
    copied = sum(x.numel() * computed.itemsize for x in wide if x.dtype != computed)
    return copied + (result.numel() * computed.itemsize if result.dtype != computed and wide else 0)


class CudaAttention(TorchFunctionMode):
    """Attention as a GPU's kernels allocate it: the result, stored by rows, and a log-sum-exp in fp32; no scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given: dict[str, Any] = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        q, k, v = given["query"], given["key"], given["value"]
        if any(type(x).__torch_function__ is not Tensor.__torch_function__ for x in (q, k, v)):
            return func(*args, **kwargs)
        shape = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]) if k.shape[-3] == q.shape[-3] else q.shape[:-2]
        lse = q.new_empty((*shape, q.shape[-2]), dtype=torch.float32)
        out = q.new_empty((*shape[:-1], q.shape[-2], shape[-1], v.shape[-1])).transpose(-3, -2)
        del lse
        return out


def bodies(ledger: Callable[[], Ledger]) -> dict[Any, Body]:
    """parafuse's operators, each with the function that it runs; what is allocated in it goes between ranks."""

    def exchanging(body: Body) -> Body:
        def run(*args: Any, **kwargs: Any) -> Any:
            with ledger().exchanging():
                return body(*args, **kwargs)

        return run

    found = {op._opoverload: op._init_fn for op in (attention_of,)}
    between = (
        comm.all_gather,
        comm.all_reduce,
        parallel_attention.sequence_attention,
        parallel_attention.attention_after,
    )
    return found | {op._opoverload: exchanging(op._init_fn) for op in between}


def kernels_of(device: str) -> Allocator:
    """Of a plan's device."""
    return CudaKernels() if device == "cuda" else CpuKernels()
