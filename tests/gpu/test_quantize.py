"""Layers in 8 bits on a GPU: what the formulas say, compiled too; the same rows whatever stands beside them."""

from __future__ import annotations

import pytest
import torch

import parafuse
from parafuse.engine.quantize.pack import kernel_works
from parafuse.engine.quantize.settle import settled
from parafuse.errors import ConfigError
from parafuse.quantization import METHODS, Quantize, quantize_of
from tests.models import ODD, build, call, inputs
from tests.quantize.test_pack import by_hand, error, layer, quantized, rows

DEVICE = torch.device("cuda")


def here(text: str) -> Quantize:
    """Settled on this GPU; skips, with the reason, what it has not."""
    method = quantize_of(text)
    assert method is not None
    try:
        return settled(
            method, device="cuda", capability=torch.cuda.get_device_capability(), dtype="bfloat16", world_size=1
        )
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("text", METHODS)
def test_a_layer_computes_what_its_formula_says(text: str) -> None:
    method = here(text)
    assert kernel_works(DEVICE, method) == ""
    one, x = layer().to(DEVICE, torch.bfloat16), rows().to(DEVICE, torch.bfloat16)
    found = quantized(one, method)(x)
    assert error(found, by_hand(x, one, method)) < 1e-2  # of bfloat16
    assert error(found, one(x)) < 0.06


@pytest.mark.parametrize("text", ["fp8", "int8"])
def test_a_row_does_not_depend_on_the_others(text: str) -> None:
    method = here(text)
    x = torch.randn(1, 640, 512, device=DEVICE, dtype=torch.bfloat16)
    one = torch.nn.Linear(512, 512, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    packed = quantized(one, method)
    assert error(packed(x)[:, 64:384], packed(x[:, 64:384])) < 4e-3  # one rounding of bfloat16: tiles may differ


@pytest.mark.parametrize("text", METHODS)
def test_a_model_runs_plain_and_compiled(text: str) -> None:
    method = here(f"{text}:min_features=16")
    values = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in inputs("flux", ODD).items()}
    values = {
        name: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() and "ids" not in name else x
        for name, x in values.items()
    }
    plain = build("flux", heads=4).to(DEVICE, torch.bfloat16)
    want = call(plain, values)
    for compiled in (False, True):
        model = build("flux", heads=4).to(DEVICE, torch.bfloat16)
        with parafuse.apply(model, parafuse.Config(quantize=method, compile=compiled)):
            assert error(call(model, values), want) < 0.2
