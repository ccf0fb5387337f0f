"""Kernels build for an H100 without one: Triton's compiler makes the binary, and says what shared memory it needs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.kernels.interpreter import HAS_TRITON

SHARED_BYTES = 227 * 1024
needs_triton = pytest.mark.skipif(
    not HAS_TRITON, reason="triton is not installed, so nothing is built: pip install triton"
)
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float8_e4m3fn: "*fp8e4nv"}


def build(kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int = 4) -> Any:
    """The compiled kernel; arguments that are not named are 32-bit integers that 16 divides, as strides are."""
    triton: Any = importlib.import_module("triton")
    compiler: Any = importlib.import_module("triton.compiler")
    target: Any = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name] != "constexpr"}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=dict(num_warps=num_warps))


@needs_triton
@pytest.mark.parametrize("width", [64, 72, 128])
def test_merge(width: int) -> None:
    from parafuse.kernels.fused.merge import TILE, merge_kernel

    types = dict(out="*fp32", lse="*fp32", block="*bf16", block_lse="*fp32")
    size = 64 if width == 64 else 128
    built = build(merge_kernel, types, dict(width=width, ROWS=TILE // size, WIDTH=size))
    assert built.metadata.shared <= SHARED_BYTES
    assert "ld.global.v4.b32" in built.asm["ptx"]  # 16 bytes a thread, or it would not reach the memory's speed


NORM_ROPE = {  # heads, size, norm, weights, rotary, pairs
    "FLUX": (24, 128, 1, True, True, True),
    "Wan": (40, 128, 2, True, True, True),
    "halves": (24, 128, 1, True, True, False),
    "Stable Diffusion 3.5": (38, 64, 1, True, False, True),
    "head size 72": (16, 72, 0, False, True, True),
}


@needs_triton
@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize("name", NORM_ROPE)
def test_norm_rope(name: str, mode: int) -> None:
    from parafuse.kernels.fused.norm_rope import norm_rope_kernel, tiles

    heads, size, norm, is_weighted, is_rotary, pairs = NORM_ROPE[name]
    types = dict.fromkeys(("q", "k", "v", "q_weight", "k_weight"), "*bf16")
    types |= dict(cos="*fp32", sin="*fp32", scales="*fp32", eps="fp32", largest_of_fp8="fp32")
    types["out"] = "*fp8e4nv" if mode else "*bf16"
    block_heads, half, rows, num_warps = tiles(heads, size, mode)
    built = build(
        norm_rope_kernel, types,
        dict(HEADS=heads, SIZE=size, BLOCK_HEADS=block_heads, HALF=half, ROWS=rows, NORM=norm, IS_WEIGHTED=is_weighted,
             ROTARY=is_rotary, PAIRS=pairs, MODE=mode), num_warps,
    )  # fmt: skip
    assert built.metadata.shared <= SHARED_BYTES
    assert ".v4.b32" in built.asm["ptx"] or ".v2.b32" in built.asm["ptx"]


def test_nothing_imports_triton_before_it_is_used() -> None:
    code = (
        "import sys, pkgutil, importlib, parafuse.kernels as k\n"
        "import parafuse, parafuse.parallel.attention, parafuse.kernels.merge, parafuse.kernels.norm_rope\n"
        "from parafuse.kernels.fused import missing\n"
        "import torch; assert missing(torch.device('cpu'))\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'triton'], 'triton'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
