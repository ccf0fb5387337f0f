"""Weights in 8 bits compute what they should, row by row, and leave the process as it was."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parafuse.engine.quantize.pack import equivalent, is_packed, method_of, nbytes, packed, set_weight
from parafuse.quantization import METHODS, Fp8, Quantize, quantize_of

E4M3 = torch.finfo(torch.float8_e4m3fn).max
ALL = [*METHODS, "fp8:scale=tensor", "fp8:scale=calibrated"]


def layer(outputs: int = 48, inputs: int = 64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs).requires_grad_(False)


def rows(seed: int = 1) -> Tensor:
    """(2, 7, 64), rows of different size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 7, 64, generator=generator) * torch.logspace(-2, 2, 7)[:, None]


def quantized(one: nn.Linear, method: Quantize, largest: float | None = None) -> nn.Linear:
    new = nn.Linear(one.in_features, one.out_features)
    new.bias = one.bias
    set_weight(new, packed(one.weight.data, method, largest))
    return new


def _to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-E4M3, E4M3).to(torch.float8_e4m3fn).double() * scale


def _to_int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127).double() * scale


def by_hand(x: Tensor, one: nn.Linear, method: Quantize) -> Tensor:
    """In double precision, of what is quantized as the method's formula says."""
    weight = one.weight
    if method.method.startswith("int8"):
        w, given = _to_int8(weight), _to_int8(x) if method.computes else x.double()
    elif isinstance(method, Fp8) and method.scale != "auto":
        w, given = _to_fp8(weight, weight.abs().max() / E4M3), _to_fp8(x, x.abs().max() / E4M3)
    else:
        w = _to_fp8(weight, weight.abs().amax(-1, keepdim=True) / E4M3)
        given = _to_fp8(x, x.abs().amax(-1, keepdim=True) / E4M3) if method.computes else x.double()
    return F.linear(given, w, one.bias.double())


def error(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("text", ALL)
def test_a_layer_computes_what_its_formula_says(text: str) -> None:
    method, one, x = quantize_of(text), layer(), rows()
    assert method is not None
    found = quantized(one, method, float(x.abs().max()))(x)
    assert error(found, by_hand(x, one, method)) < (1e-6 if text.startswith("fp8") else 1e-3)
    assert 1e-3 < error(found, one(x)) < 0.06, "control: something was quantized, and is near"


@pytest.mark.parametrize("text", ALL)
def test_a_weight_says_what_it_is(text: str) -> None:
    method, one = quantize_of(text), layer()
    assert method is not None
    weight = quantized(one, method, 1.0).weight
    assert (is_packed(weight), is_packed(one.weight)) == (True, False)
    found = method_of(weight)
    assert found is not None
    assert found.method == method.method
    assert getattr(found, "scale", "") in ("", "row", getattr(method, "scale", ""))
    assert nbytes(weight) <= one.weight.numel() + 4 * 48 < nbytes(one.weight)


@pytest.mark.parametrize("text", ["fp8", "int8"])
def test_a_row_does_not_depend_on_the_others(text: str) -> None:
    """So tokens may be split over ranks, and pictures over batches."""
    method, x = quantize_of(text), rows()
    assert method is not None
    one = quantized(layer(), method)
    assert torch.equal(one(x)[:, 2:5], one(x[:, 2:5]))
    whole = quantized(layer(), Fp8(scale="tensor"))
    assert error(whole(x)[:, 2:5], whole(x[:, 2:5])) > 1e-3, "control: with one scale for all it does"
    calibrated = quantized(layer(), Fp8(scale="calibrated"), float(x.abs().max()))
    assert torch.equal(calibrated(x)[:, 2:5], calibrated(x[:, 2:5]))


@pytest.mark.parametrize("text", [*METHODS, "fp8:scale=tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_stay_numbers(text: str, dtype: torch.dtype) -> None:
    """Padding is often zero; so are rows of weights that a model was pruned of."""
    method, one, x = quantize_of(text), layer().to(dtype), rows().to(dtype)
    assert method is not None
    x[0, 3] = 0
    one.weight[5] = 0
    found = quantized(one, method)(x)
    if dtype is not torch.float16 or text.startswith("fp8"):  # int8 in float16 is refused: sums go beyond it
        assert found.isfinite().all()
        assert error(found, one(x)) < 0.06
    assert torch.allclose(found[0, 3], one.bias, atol=1e-6)
    assert torch.allclose(found[..., 5], one.bias[5], atol=1e-6)
    nothing = quantized(one, method)(torch.zeros_like(x))
    assert torch.allclose(nothing, one.bias.expand_as(nothing), atol=1e-6)


def test_without_the_smallest_scale_they_would_not() -> None:
    from torchao.quantization import Float8Tensor, PerRow

    weight = torch.cat([torch.zeros(1, 64), torch.ones(1, 64)])
    assert Float8Tensor.from_hp(weight, granularity=PerRow()).dequantize().isnan().any()


def test_a_calibrated_scale_needs_its_maximum() -> None:
    for largest in (None, 0.0):
        with pytest.raises(ValueError, match="needs the largest value"):
            packed(layer().weight.data, Fp8(scale="calibrated"), largest)


def test_nothing_that_is_written_asks_for_settings_of_the_process() -> None:
    for text in ALL:
        method = quantize_of(text)
        assert method is not None
        assert equivalent(method).set_inductor_config is False


SIDE_EFFECTS = """
import json, sys, torch, logging
import torch._inductor.config as inductor
import torchao
from torch import nn
def settings():
    return {name: repr(value) for name, value in inductor.get_config_copy().items()} | {
        "matmul": torch.get_float32_matmul_precision(), "level": logging.getLogger().level}
model = nn.Module()
model.blocks = nn.ModuleList([nn.Sequential(nn.ReLU(), nn.Linear(64, 64))])
model.forward = model.blocks[0].forward
before = settings()
if sys.argv[1] == "torchao":
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    quantize_(model, Int8WeightOnlyConfig())
else:
    import parafuse
    parafuse.apply(model, parafuse.Config(quantize=sys.argv[1]))
    assert type(model.blocks[0][1].weight).__name__ != "Parameter"
after = settings()
print(json.dumps([name for name in after if after[name] != before[name]]))
"""


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("text", [f"{name}:min_features=16" for name in METHODS])
def test_the_process_stays_as_it_was(text: str) -> None:
    text += ",reference=true" if text.startswith("fp8:") else ""
    assert _changed(text) == []


def test_as_it_does_not_with_torchaos_own_call() -> None:
    assert "coordinate_descent_tuning" in _changed("torchao")


def _changed(argument: str) -> list[str]:
    command = [sys.executable, "-c", SIDE_EFFECTS, argument]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return json.loads(done.stdout.strip().splitlines()[-1])
