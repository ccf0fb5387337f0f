"""Facts of the machine: gathered without torch where possible, and without failing where a source is absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from parafuse import hardware
from parafuse.hardware import Gpu

ROOT = Path(__file__).resolve().parents[2]
H200 = Gpu(name="NVIDIA H200", memory_bytes=141 * 2**30, capability="9.0", nvlinks=18)


def files(monkeypatch: pytest.MonkeyPatch, **contents: str) -> None:
    monkeypatch.setattr(hardware, "_read", lambda path: contents.get(path.rsplit("/", 1)[1].replace(".", "_"), ""))


def test_cores_follow_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    files(monkeypatch)
    assert hardware.cores() == 8
    files(monkeypatch, cpu_max="max 100000")
    assert hardware.cores() == 8
    files(monkeypatch, cpu_max="250000 100000")
    assert hardware.cores() == 3
    files(monkeypatch, cpu_max="1000 100000")
    assert hardware.cores() == 1


def test_memory_follows_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch, memory_max="max")
    machine = hardware.memory_bytes()
    assert machine > 0
    files(monkeypatch, memory_max="1000000")
    assert hardware.memory_bytes() == 1_000_000


def test_cpu_without_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch)
    assert hardware.hardware().cpu
    files(monkeypatch, cpuinfo="processor : 0\nmodel name\t: Fast: One\nflags\t: avx2 sse amx_bf16\n\nprocessor : 1")
    facts = hardware.hardware()
    assert (facts.cpu, facts.cpu_flags) == ("Fast: One", ["amx_bf16", "avx2"])


class FakeNvml:
    """Two GPUs, the second without NVLink."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_NVLINK_MAX_LINKS = 18

    def __init__(self) -> None:
        self.shut = False

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None:
        self.shut = True

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"GPU {handle}"

    def nvmlDeviceGetMemoryInfo(self, _handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=80 * 2**30)

    def nvmlDeviceGetCudaComputeCapability(self, _handle: int) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if handle == 1:
            raise self.NVMLError
        return int(link < 4)


def test_gpus_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    driver, found = hardware.gpus()
    assert driver == "580.1"
    assert [gpu.nvlinks for gpu in found] == [4, 0]
    assert found[0] == Gpu(name="GPU 0", memory_bytes=80 * 2**30, capability="9.0", nvlinks=4)
    assert nvml.shut


@pytest.mark.parametrize(
    ("visible", "number"),
    [(None, 2), ("", 0), ("0", 1), ("1,0", 2), ("0,-1,1", 1), ("7", 0), ("GPU-8932f937,MIG-1", 2)],
)
def test_devices_that_torch_could_use(monkeypatch: pytest.MonkeyPatch, visible: str | None, number: int) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: ("580.1", [H200, H200]))
    monkeypatch.setattr(hardware, "torch_cuda_build", lambda: "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.num_cuda_devices() == number
    monkeypatch.setattr(hardware, "torch_cuda_build", lambda: None)
    assert hardware.num_cuda_devices() == 0


def test_cuda_build_is_read_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert hardware.torch_cuda_build() == torch.version.cuda
    files(monkeypatch, version_py="__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None")
    assert hardware.torch_cuda_build() == "13.0"
    files(monkeypatch, version_py="cuda = None\nhip = '6'")
    assert hardware.torch_cuda_build() is None


def test_no_gpus_without_driver_or_package(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setattr(nvml, "nvmlInit", lambda: (_ for _ in ()).throw(nvml.NVMLError()), raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert hardware.gpus() == (None, [])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert hardware.gpus() == (None, [])


def test_hardware_needs_no_torch() -> None:
    code = "from parafuse import hardware as h; import sys; h.hardware(); h.versions(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
