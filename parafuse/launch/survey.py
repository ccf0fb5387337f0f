"""What `parafuse info` tells: hardware, software, backends, and what is missing for what."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass

from parafuse.attention import EXACT
from parafuse.hardware import Hardware, hardware, torch_cuda_build, versions


@dataclass(frozen=True, kw_only=True)
class AttentionBackend:
    """What computes attention: `--attention NAME`."""

    name: str
    about: str
    why_not: str
    """Empty where it can be used."""
    has_lse: bool
    """Whether it gives the log-sum-exp that a ring needs."""
    takes_masks: bool
    lossy: str
    """What it loses; empty: nothing but the order of sums."""


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
    attention: list[AttentionBackend]
    """All that parafuse knows."""
    tuned: str | None
    """What attention=auto goes by, where `parafuse tune attention` has timed something."""
    missing: list[str]
    """One line each: what is not there, what that prevents, what to do."""


def survey() -> Survey:
    """Everything that `parafuse info` shows. Imports torch if it is installed, and nothing that is larger."""
    facts, packages = hardware(), versions()
    collectives, attention, cuda_build = {}, list[AttentionBackend](), torch_cuda_build()
    device = "cpu"
    if importlib.util.find_spec("torch") is not None:
        import torch
        import torch.distributed as dist

        there = dist.is_available()
        collectives = {
            "gloo": there and dist.is_gloo_available(),
            "nccl": there and dist.is_nccl_available() and torch.cuda.is_available(),
        }
        device = "cuda" if torch.cuda.is_available() else "cpu"
        attention = attention_backends(device)
    return Survey(
        hardware=facts,
        versions=packages,
        cuda_build=cuda_build,
        collectives=collectives,
        attention=attention,
        tuned=tuned(device) if attention else None,
        missing=missing(facts, packages, cuda_build, compiler=shutil.which("g++") or shutil.which("c++")),
    )


def attention_backends(device: str) -> list[AttentionBackend]:
    """What each is, and why it cannot be used on such a device. Imports torch."""
    from parafuse.kernels.backends import BACKENDS

    return [
        AttentionBackend(
            name=one.name,
            about=one.about,
            why_not=one.why_not_here(device),
            has_lse=one.has_lse,
            takes_masks=one.takes_masks,
            lossy=one.lossy,
        )
        for one in BACKENDS
    ]


def tuned(device: str) -> str | None:
    """What was timed on this machine, in a line."""
    from parafuse.engine.timings import load

    timings = load(device)
    if timings is None:
        return None
    exact = [{name: one for name, one in row.seconds.items() if name in EXACT} for row in timings.rows]
    fastest = {min(seconds, key=seconds.__getitem__) for seconds in exact if seconds}
    return f"{len(timings.rows)} shapes timed; of the exact ones fastest: {', '.join(sorted(fastest))}"


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
