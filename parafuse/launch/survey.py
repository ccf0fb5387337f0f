"""What `parafuse info` tells: hardware, software, backends, and what is missing for what."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass

from parafuse.hardware import Hardware, hardware, torch_cuda_build, versions


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Hardware, software, and what is missing for what."""

    hardware: Hardware
    versions: dict[str, str | None]
    """Package -> installed version, None if it is not installed."""
    cuda_build: str | None
    """CUDA version that torch was built for; None: a CPU build."""
    collectives: dict[str, bool]
    """Collective backends of torch.distributed -> usable."""
    attention: dict[str, bool]
    """Attention implementations -> usable here."""
    missing: list[str]
    """One line each: what is not there, what that prevents, what to do."""


def survey() -> Survey:
    """Everything that `parafuse info` shows. Imports torch if it is installed, and nothing that is larger."""
    facts, packages = hardware(), versions()
    collectives, attention, cuda_build = {}, {}, torch_cuda_build()
    if importlib.util.find_spec("torch") is not None:
        import torch
        import torch.distributed as dist

        there = dist.is_available()
        collectives = {
            "gloo": there and dist.is_gloo_available(),
            "nccl": there and dist.is_nccl_available() and torch.cuda.is_available(),
        }
        gpu = torch.cuda.is_available()
        cuda = torch.backends.cuda
        attention = {
            "torch flash (CPU)": hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"),
            "torch flash (CUDA)": gpu and cuda.is_flash_attention_available(),
            "torch memory-efficient (CUDA)": gpu,
            "cuDNN": gpu and torch.backends.cudnn.is_available(),
        }
        for package in ("flash-attn", "flash-attn-3", "sageattention", "xformers"):
            attention[package] = gpu and packages[package] is not None
    return Survey(
        hardware=facts,
        versions=packages,
        cuda_build=cuda_build,
        collectives=collectives,
        attention=attention,
        missing=missing(facts, packages, cuda_build, compiler=shutil.which("g++") or shutil.which("c++")),
    )


def missing(
    facts: Hardware, packages: dict[str, str | None], cuda_build: str | None, *, compiler: str | None
) -> list[str]:
    """What is not there, what that prevents, and what to do; one line each."""
    needed = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
    lines = [f"{name}: nothing runs without it; pip install {name}" for name in needed if packages[name] is None]
    has_torch = packages["torch"] is not None
    if packages["nvidia-ml-py"] is None:
        lines.append("nvidia-ml-py: GPUs cannot be described; pip install nvidia-ml-py")
    elif not facts.gpus:
        lines.append("NVIDIA GPU: pictures are computed on the CPU, over gloo")
    if facts.gpus and has_torch and cuda_build is None:
        lines.append("CUDA build of torch: the GPUs are not used; install torch from https://pytorch.org for CUDA")
    if facts.gpus and packages["triton"] is None:
        lines.append("triton: no compiled kernels on the GPU; it comes with torch's CUDA build")
    if facts.gpus and packages["flash-attn"] is None and packages["flash-attn-3"] is None:
        lines.append("flash-attn: torch's own attention is used, which is slower on some GPUs; pip install flash-attn")
    if packages["torchao"] is None:
        lines.append("torchao: no fp8 weights; pip install torchao")
    if compiler is None:
        lines.append("C++ compiler (g++): torch.compile does not work on the CPU; install g++")
    return lines
