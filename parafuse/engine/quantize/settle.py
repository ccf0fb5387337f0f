"""Whether a quantization can be had on a device and in a layout, and what its "auto" means there. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from parafuse.errors import ConfigError
from parafuse.hardware import visible_gpus
from parafuse.quantization import (
    AUTO,
    CALIBRATED,
    FP8_CAPABILITY,
    INT8_CAPABILITY,
    ROW,
    TENSOR,
    Fp8,
    Int8,
    Int8Weight,
    Quantize,
    quantize_of,
)

if TYPE_CHECKING:
    from parafuse.engine.plan import Plan

TEXT_ENCODERS = (
    "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "prior_text_encoder", "mllm", "llm",
)  # fmt: skip
"""Pipeline components that read the prompt, where they are present."""
Capability = tuple[int, int]
ROW_CAPABILITIES = (8, 9, 10, 12)
"""Major numbers of the capabilities whose fp8 products take a scale for each row: torch's own, on Ada, Hopper and
Blackwell."""


def capability_here() -> Capability | None:
    """The least CUDA compute capability of this machine's GPUs, from the driver; None without one."""
    found = [tuple(map(int, gpu.capability.split("."))) for gpu in visible_gpus()]
    return min(((major, minor) for major, minor in found), default=None)


def settled(
    method: Quantize, *, device: str, capability: Capability | None, dtype: str, world_size: int, saved: bool = False
) -> Quantize:
    """The same with nothing left to be told. Raises ConfigError for what cannot be had here, with the way out.

    `saved`: the weights are quantized in files, with the scales that belong to them."""
    encoders = method.for_text_encoders()
    if encoders is not None:
        try:
            settled(encoders, device=device, capability=capability, dtype=dtype, world_size=world_size)
        except ConfigError as error:
            raise ConfigError(f"quantize {method.method}: text_encoders={method.text_encoders}: {error}") from error
    where = f"quantize {method.method}"
    if device == "cpu":
        _check_cpu(method, where)
    elif capability is not None:
        _check_gpu(method, where, capability)
    if isinstance(method, (Int8, Int8Weight)) and dtype == "float16":
        raise ConfigError(
            f"{where}: dtype='float16': products are added up before they are scaled, beyond what float16 holds; use "
            "dtype=bfloat16, or fp8-weight."
        )
    if not isinstance(method, Fp8):
        return method
    if device != "cpu" and dtype != "bfloat16":
        raise ConfigError(f"{where}: dtype={dtype!r}: fp8 products give bfloat16; use dtype=bfloat16, or fp8-weight.")
    has_rows = device == "cpu" or capability is None or capability[0] in ROW_CAPABILITIES
    scale = method.scale if method.scale != AUTO else ROW if has_rows else TENSOR
    name = f"{where}: scale={scale}"
    if scale == ROW and not has_rows and capability:
        raise ConfigError(
            f"{name}: compute capability {_shown(capability)} has no fp8 products with a scale for each row; use "
            f"scale={CALIBRATED} (parafuse quantize measures it), or scale={TENSOR} on one rank."
        )
    if scale == TENSOR and world_size > 1:
        raise ConfigError(
            f"{name}: each of {world_size} ranks would take the largest value of its own part, and another picture "
            f"would come of it; use scale={ROW}, or scale={CALIBRATED} (parafuse quantize measures it)."
        )
    if scale == CALIBRATED and not saved:
        raise ConfigError(
            f"{name}: must be measured; parafuse quantize --quantize {method.method}:scale={CALIBRATED} --out DIR "
            "does, and DIR is then the model."
        )
    return replace(method, scale=scale)


def _check_cpu(method: Quantize, where: str) -> None:
    if isinstance(method, Fp8) and not method.reference:
        raise ConfigError(
            f"{where}: a CPU has no fp8 matrix products (GPUs of compute capability 8.9 and later have: Ada, Hopper, "
            "Blackwell). Use int8, or fp8-weight to save memory, or fp8:reference=true to compute what a GPU would, "
            "many times slower."
        )


def _check_gpu(method: Quantize, where: str, capability: Capability) -> None:
    if isinstance(method, Fp8) and method.reference:
        raise ConfigError(f"{where}: reference=true: is for a CPU; the GPU has the products itself, leave it out.")
    needed = FP8_CAPABILITY if isinstance(method, Fp8) else INT8_CAPABILITY if method.computes else (0, 0)
    if capability < needed:
        others = "int8, or fp8-weight" if needed == FP8_CAPABILITY else "int8-weight"
        raise ConfigError(
            f"{where}: needs CUDA compute capability {_shown(needed)} or later, this machine's is "
            f"{_shown(capability)}; use {others} to save memory."
        )


def _shown(capability: Capability) -> str:
    return ".".join(map(str, capability))


def check_settled(plan: Plan, saved: Mapping[str, Quantize]) -> None:
    """Raises ConfigError for a plan, made elsewhere, whose quantization cannot be had here. `saved`: of a folder."""
    method = quantize_of(plan.quantize or None)
    if method is not None:
        settled(
            method,
            device=plan.device,
            capability=capability_here() if plan.device == "cuda" else None,
            dtype=plan.dtype,
            world_size=plan.world_size,
            saved=any(part not in TEXT_ENCODERS for part in saved),
        )
