"""What this machine has: processors, memory, GPUs, installed packages, backends. Gathers facts, decides nothing.

Importing it imports no torch; `survey` does, inside, for what only torch knows.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "torchao",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "sageattention",
    "xformers",
    "nvidia-ml-py",
)
CPU_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd", "bf16")
"""Instruction sets that decide how fast a CPU runs; the last two are ARM's."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, as its driver describes it."""

    name: str
    memory_bytes: int
    capability: str
    """CUDA compute capability, such as "9.0"."""
    nvlinks: int
    """Active NVLink connections."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Facts of one machine."""

    platform: str
    python: str
    cpu: str
    cpu_flags: list[str]
    cores: int
    """Cores that this process may use."""
    machine_cores: int
    memory_bytes: int
    """That this process may use: the machine's, or its container's limit."""
    driver: str | None = None
    """NVIDIA driver version; None without one (or without nvidia-ml-py)."""
    gpus: list[Gpu] = field(default_factory=list)


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


def cores() -> int:
    """Cores that this process may use, at least 1: its affinity, and its container's share rounded up."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        number = min(number, -(-int(quota) // int(period)))
    return max(1, number)


def memory_bytes() -> int:
    """Memory that this process may use; 0 if the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    limit = _read("/sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpu() -> tuple[str, list[str]]:
    facts = dict(line.split(":", 1) for line in _read("/proc/cpuinfo").split("\n\n")[0].splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, [flag for flag in CPU_FLAGS if flag in flags]


def gpus() -> tuple[str | None, list[Gpu]]:
    """(driver version, GPUs) from NVML, which needs neither torch nor CUDA. (None, []) where it cannot be asked."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, or no permission: all mean that NVML knows nothing
        return None, []
    try:
        found = [_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
        return _text(pynvml.nvmlSystemGetDriverVersion()), found
    except pynvml.NVMLError:
        return None, []
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    links = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            links += bool(nvml.nvmlDeviceGetNvLinkState(handle, link))
        except nvml.NVMLError:
            break
    memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    name = _text(nvml.nvmlDeviceGetName(handle))
    return Gpu(name=name, memory_bytes=memory, capability=f"{major}.{minor}", nvlinks=links)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def hardware() -> Hardware:
    """Facts of this machine, without torch."""
    name, flags = _cpu()
    driver, found = gpus()
    return Hardware(
        platform=platform.platform(terse=True),
        python=platform.python_version(),
        cpu=name,
        cpu_flags=flags,
        cores=cores(),
        machine_cores=os.cpu_count() or 1,
        memory_bytes=memory_bytes(),
        driver=driver,
        gpus=found,
    )


def versions() -> dict[str, str | None]:
    """Installed version of each of PACKAGES, without importing it."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def survey() -> Survey:
    """Everything that `parafuse info` shows. Imports torch if it is installed, and nothing that is larger."""
    facts, packages = hardware(), versions()
    cuda_build, collectives, attention = None, {}, {}
    if importlib.util.find_spec("torch") is not None:
        import torch
        import torch.distributed as dist

        cuda_build = torch.version.cuda
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
