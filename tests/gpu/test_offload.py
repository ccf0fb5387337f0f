"""Offload on a GPU: weights in the host's memory, and what is on the device meanwhile. Speed: tools/time_offload.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parafuse
from tests.models import ODD, build, call, inputs

DEVICE = torch.device("cuda")
TEXTS = ("model", "group", "group:prefetch=2", "group:to=disk", "group:level=leaf", "sequential", "model:to=disk")


def flux(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    values = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in inputs("flux", ODD, dtype=dtype).items()}
    return build("flux", heads=4).to(dtype), values


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("is_there", [False, True], ids=["from the host", "from the device"])
def test_the_same_result_from_wherever_the_weights_were(text: str, is_there: bool) -> None:
    model, values = flux()
    want = call(build("flux", heads=4).to(DEVICE), values)
    model.to(DEVICE if is_there else "cpu")
    was = next(model.parameters()).device
    with parafuse.apply(model, parafuse.Config(offload=text)) as handle, handle.request():
        assert {p.device.type for p in model.parameters()} == {"cuda"}  # what stands for them
        for _ in range(3):
            assert torch.equal(call(model, values), want)
    assert {p.device for p in model.parameters()} == {was}
    assert torch.equal(call(model.to(DEVICE), values), want)


@pytest.mark.parametrize("quantize", [None, "fp8:min_features=16", "int8-weight:min_features=16"])
def test_compiled_blocks(quantize: str | None) -> None:
    outputs: list[Tensor] = []
    for offload in (None, "group"):
        model, values = flux(torch.bfloat16)
        model.to(DEVICE)
        config = parafuse.Config(offload=offload, compile=True, quantize=quantize)
        with parafuse.apply(model, config):
            outputs += [call(model, values) for _ in range(2)]
    assert all(torch.equal(x, outputs[0]) for x in outputs)


class Wide(nn.Module):
    """Blocks of 64 MB each."""

    def __init__(self, count: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4096, 4096, bias=False)) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            for _ in range(8):
                x = block(x)
        return x


def wide() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Wide().requires_grad_(False), torch.randn(4096, 4096, device=DEVICE)


def test_memory_is_that_of_the_blocks_that_are_there() -> None:
    """The host is far ahead of the device: without memory that is used again every block would have its own."""
    model, x = wide()
    with parafuse.apply(model, parafuse.Config(offload="group:prefetch=1")), torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before <= 3 * 4 * 4096**2 + 3 * x.nbytes
