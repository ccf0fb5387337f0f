"""Weights in 8 bits: torchao's own tensors, which compute by themselves wherever torch does linear algebra on them.

They are made directly. torchao's `quantize_` and its configurations would set options of Inductor for the process,
refuse a CPU, and leave out without a word what does not fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from parafuse.errors import is_out_of_memory
from parafuse.quantization import CALIBRATED, ROW, TENSOR, Fp8, Fp8Weight, Int8, Int8Weight, Quantize

SMALLEST = {torch.float16: 1e-4}
"""Of the largest value of a row: torchao divides by a 448th of it, in the dtype of the row, and a row of zeros would
become no number."""
SMALLEST_OTHERWISE = 1e-12


def packed(weight: Tensor, method: Quantize, largest: float | None = None) -> Tensor:
    """The weight (out, in), fp32 or 16 bits, as a torchao tensor on its device. Local.

    `largest`: of what the layer is given, where its scale is calibrated. Bytes: 1 an element, 4 a row."""
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, PerTensor
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs

    if isinstance(method, (Int8, Int8Weight)):
        given = QuantizeTensorToInt8Kwargs(granularity=PerRow()) if method.computes else None
        return Int8Tensor.from_hp(weight, granularity=PerRow(), act_quant_kwargs=given)
    scale = method.scale if isinstance(method, Fp8) else ""
    if scale == CALIBRATED and not largest:
        raise ValueError("a calibrated scale needs the largest value that the layer is given")
    # Always torch's own products: another library that happens to be there would give another picture.
    kernels, granularity = KernelPreference.TORCH, PerTensor() if scale in (TENSOR, CALIBRATED) else PerRow()
    smallest = SMALLEST.get(weight.dtype, SMALLEST_OTHERWISE)
    least, most = (largest, largest) if scale == CALIBRATED else (smallest, None)
    given = None
    if method.computes:
        given = QuantizeTensorToFloat8Kwargs(
            granularity=granularity, hp_value_lb=least, hp_value_ub=most, kernel_preference=kernels
        )
    return Float8Tensor.from_hp(
        weight,
        granularity=granularity,
        mm_config=_products() if method.computes else None,
        hp_value_lb=smallest,
        kernel_preference=kernels,
        act_quant_kwargs=given,
    )


def _products() -> Any:
    from torchao.float8.inference import Float8MMConfig

    return Float8MMConfig(use_fast_accum=True)


def equivalent(method: Quantize) -> Any:
    """torchao's configuration of the same kind, for files: diffusers and transformers read which library they need
    from it. The tensors in the files say for themselves how they compute."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        PerTensor,
    )

    if isinstance(method, Fp8):
        granularity = PerTensor() if method.scale in (TENSOR, CALIBRATED) else PerRow()
        return Float8DynamicActivationFloat8WeightConfig(granularity=granularity, set_inductor_config=False)
    kinds: dict[type[Quantize], Any] = {
        Fp8Weight: Float8WeightOnlyConfig,
        Int8: Int8DynamicActivationInt8WeightConfig,
        Int8Weight: Int8WeightOnlyConfig,
    }
    return kinds[type(method)](set_inductor_config=False)


def is_packed(weight: Tensor) -> bool:
    """Whether a library has packed it: its elements are not those of a plain tensor."""
    plain = (Tensor, nn.Parameter, FakeTensor)  # fake ones stand for plain ones where only sizes are asked for
    return type(weight.data) not in plain or type(weight) not in plain


def method_of(weight: Tensor) -> Quantize | None:
    """What a torchao tensor computes, whoever made it; None for what is none of the methods here."""
    inner: Any = weight.data if isinstance(weight, nn.Parameter) else weight
    kinds: dict[str, tuple[type[Quantize], type[Quantize]]] = {
        "Float8Tensor": (Fp8, Fp8Weight),
        "Int8Tensor": (Int8, Int8Weight),
    }
    if type(inner).__name__ not in kinds:
        return None
    computes, keeps = kinds[type(inner).__name__]
    given: Any = getattr(inner, "act_quant_kwargs", None)
    if given is None:
        return keeps()
    if computes is not Fp8:
        return computes()
    if type(given.granularity).__name__ == "PerRow":
        return Fp8(scale=ROW)
    is_fixed = given.hp_value_ub is not None and given.hp_value_ub == given.hp_value_lb
    return Fp8(scale=CALIBRATED if is_fixed else TENSOR)


def nbytes(weight: Tensor) -> int:
    """Bytes that a weight takes, packed or not."""
    inner: Any = weight.data
    names = getattr(inner, "tensor_data_names", None)
    return sum(getattr(inner, name).nbytes for name in names) if names else weight.nbytes


def set_weight(layer: nn.Linear, weight: Tensor) -> None:
    """Puts it in the place of the layer's weight, whose memory is free when nobody else holds it."""
    layer.weight = nn.Parameter(weight, requires_grad=False)


def kernel_works(device: torch.device, method: Quantize, dtype: torch.dtype = torch.bfloat16) -> str:
    """Why a small product in this method fails on a device; empty where it works."""
    layer = nn.Linear(32, 32, device=device, dtype=dtype)
    try:
        with torch.no_grad():
            set_weight(layer, packed(layer.weight.data, method, 1.0))
            layer(torch.ones(32, 32, device=device, dtype=dtype))
    except (RuntimeError, AssertionError) as error:  # torch's products raise the one, torchao's checks the other
        if is_out_of_memory(error):
            raise
        return str(error).strip().partition("\n")[0]
    return ""
