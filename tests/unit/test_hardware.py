"""Facts of the machine: gathered without torch where possible, and without failing where a source is absent."""

from __future__ import annotations

import builtins
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parafuse import hardware
from parafuse.hardware import PACKAGES, Gpu, Hardware
from parafuse.launch.info import show_info, table

ROOT = Path(__file__).resolve().parents[2]
BARE = Hardware(
    platform="Linux", python="3.11.0", cpu="some CPU", cpu_flags=[], cores=2, machine_cores=4, memory_bytes=2**34
)
H200 = Gpu(name="NVIDIA H200", memory_bytes=141 * 2**30, capability="9.0", nvlinks=18)
ALL: dict[str, str | None] = dict.fromkeys(PACKAGES, "1.0")


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


def test_no_gpus_without_driver_or_package(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setattr(nvml, "nvmlInit", lambda: (_ for _ in ()).throw(nvml.NVMLError()), raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert hardware.gpus() == (None, [])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert hardware.gpus() == (None, [])


@pytest.mark.parametrize(
    ("facts", "lacking", "cuda_build", "compiler", "first_words"),
    [
        (dataclasses.replace(BARE, gpus=[H200]), (), "13.0", "g++", []),
        (BARE, (), None, "g++", ["NVIDIA GPU"]),
        (dataclasses.replace(BARE, gpus=[H200]), ("triton",), None, "g++", ["CUDA build of torch", "triton"]),
        (dataclasses.replace(BARE, gpus=[H200]), ("flash-attn",), "13.0", "g++", []),
        (dataclasses.replace(BARE, gpus=[H200]), ("flash-attn", "flash-attn-3"), "13.0", "g++", ["flash-attn"]),
        (BARE, ("torch", "nvidia-ml-py", "torchao"), None, None, ["torch", "nvidia-ml-py", "torchao", "C++ compiler"]),
    ],
)
def test_missing_says_what_for(
    facts: Hardware, lacking: tuple[str, ...], cuda_build: str | None, compiler: str | None, first_words: list[str]
) -> None:
    lines = hardware.missing(facts, ALL | dict.fromkeys(lacking), cuda_build, compiler=compiler)
    assert len(lines) == len(first_words)
    assert all(line.startswith(word) for line, word in zip(lines, first_words, strict=True))
    assert all(": " in line for line in lines)


def test_hardware_needs_no_torch() -> None:
    code = "from parafuse import hardware as h; import sys; h.hardware(); h.versions(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_info_for_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    show_info(as_json=False)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("cores", "memory", "torch", "diffusers", "gloo", "nccl"))
    show_info(as_json=True)
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(facts) == {"parafuse", "hardware", "versions", "cuda_build", "collectives", "attention", "missing"}
    assert facts["collectives"]["gloo"] is True


def test_info_shows_each_gpu() -> None:
    facts = dataclasses.replace(hardware.survey(), hardware=dataclasses.replace(BARE, gpus=[H200], driver="580.1"))
    cells = [str(cell) for column in table(facts).columns for cell in column.cells]
    assert "NVIDIA H200, 141 GiB, compute capability 9.0, 18 NVLinks" in cells
    assert "580.1" in cells


def test_survey_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = hardware.importlib.util.find_spec
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    imported = builtins.__import__

    def no_torch(name: str, *args: Any, **kwargs: Any) -> Any:
        assert not name.startswith("torch")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    facts = hardware.survey()
    assert (facts.cuda_build, facts.collectives, facts.attention) == (None, {}, {})
