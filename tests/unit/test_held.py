"""What counts as a change of a module, and what is put back after one: all of it, or it would be another model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from parafuse.parallel.fingerprint import fingerprint
from parafuse.parallel.held import Held


class Scaled(nn.Module):
    """As an adapter's layer: scales by name, and a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling, self.order, self.calls = {"a": 0.7, "b": float("inf")}, [0.5], 10**6


def test_a_number_that_is_put_back_is_no_change() -> None:
    module = Scaled()
    held, name = Held(module), fingerprint(module)
    module.scaling["a"] *= 0.1
    assert not held.is_same()
    assert fingerprint(module) != name
    module.scaling["a"] /= 0.1
    assert module.scaling["a"] != 0.7, "control: it comes back with rounding"
    assert held.is_same()
    assert not held.is_same(exactly=True)
    assert fingerprint(module) == name
    module.scaling["a"], module.order[0] = 7 / 10, 5 / 10
    assert held.is_same(exactly=True), "an equal number may be another object"


def test_other_numbers_are_changes() -> None:
    module = Scaled()
    for name, value in (("calls", 10**6 + 1), ("calls", float(10**6)), ("order", [0.5]), ("scaling", {})):
        held, before = Held(module), getattr(module, name)
        setattr(module, name, value)
        assert not held.is_same(), name
        held.restore()
        assert getattr(module, name) is before
        assert held.is_same()


class Packed(nn.Module):
    """Takes the scale off its weight, and puts other data into that, when it is first called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 2), 3.0), requires_grad=False)
        self.weight.scale = 2.0  # type: ignore[attr-defined]
        self.state: dict[str, float] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.scale is not None:  # type: ignore[attr-defined]
            self.state["scale"], self.weight.scale = self.weight.scale, None  # type: ignore[attr-defined]
            self.weight.data = self.weight.data.t() + 1
        return (x @ self.weight) * self.state.get("scale", 100.0)


def test_what_has_not_changed_is_not_written_to() -> None:
    """Configurations of diffusers let nobody."""
    module: Any = nn.Linear(2, 2)
    module.config, module.none = FrozenDict(width=2), FrozenDict()
    held = Held(module)
    module.more = 3
    held.restore()
    assert held.is_same(exactly=True)
    assert not hasattr(module, "more")


def test_attributes_and_data_of_a_parameter_are_put_back() -> None:
    block, x = Packed(), torch.ones(1, 2)
    expected = Packed()(x)
    held = Held(block)
    assert held.is_same()
    block(x)
    assert not held.is_same()
    held.restore()
    assert held.is_same()
    assert torch.equal(block(x), expected)
    assert torch.equal(block(x), expected)


def test_weights_without_memory_are_not_asked_where_they_are(recwarn: pytest.WarningsRecorder) -> None:
    with FakeTensorMode():
        module = Packed()
    held = Held(module)
    assert held.is_same()
    held.restore()
    assert module.weight.scale == 2.0  # type: ignore[attr-defined]
    assert not [one for one in recwarn if "data pointer" in str(one.message)]
