"""What this machine has: processors, memory, GPUs, packages. Gathers facts, decides nothing, needs no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import time
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
    "flash-attn-4",
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


def process_age_s() -> float | None:
    """Seconds since this process began; None where the system does not tell."""
    try:
        begun = int(_read("/proc/self/stat").rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - begun
    except (OSError, ValueError, IndexError, AttributeError):
        return None


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


def processor() -> str:
    """Equal for processors that run the same instructions: compilers make code for the one at hand."""
    first = _read("/proc/cpuinfo").split("\n\n")[0]
    lines = [line for line in first.splitlines() if line.startswith(("model name", "flags", "Features", "CPU "))]
    said = "\n".join(lines) or f"{platform.processor()} {platform.machine()}"
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def torch_cuda_build() -> str | None:
    """CUDA version that torch was built for, read without importing torch; None: a CPU build, or no torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", _read(str(Path(spec.origin).with_name("version.py"))), re.MULTILINE)
    return found.group(1) if found else None


def num_cuda_devices() -> int:
    """GPUs that torch could use here, without importing it or touching the GPUs: 0 with a CPU build of torch.

    CUDA_VISIBLE_DEVICES is followed as CUDA does: the list ends at the first entry that is no device."""
    if torch_cuda_build() is None:
        return 0
    return len(_visible(len(gpus()[1])))


def visible_gpus() -> list[Gpu]:
    """Those of CUDA_VISIBLE_DEVICES; all of them where it names some by their identity, which is not looked up."""
    found = gpus()[1]
    places = _visible(len(found))
    return found if None in places else [found[place] for place in places if place is not None]


def _visible(number: int) -> list[int | None]:
    """Places of the devices that CUDA shows, of so many; None for one that is named by its identity."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(range(number))
    places: list[int | None] = []
    for entry in visible.split(","):
        name = entry.strip()
        is_index = name.isdigit() and int(name) < number
        if not is_index and not name.startswith(("GPU-", "MIG-")):
            break
        places.append(int(name) if is_index else None)
    return places


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
