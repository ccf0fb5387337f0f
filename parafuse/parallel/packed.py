"""Weights of quantizers that are made of other tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def has_values(x: Tensor) -> bool:
    """Whether it has memory: not so a fake one, by which a request is followed before anything is loaded."""
    return not isinstance(x, FakeTensor)


def inside(weight: Tensor) -> list[Tensor]:
    """The tensors that have a weight's data: itself, or what is inside of one that wraps others (torchao's and
    quanto's; such a one's own `is_meta` and storage say nothing)."""
    if type(weight) in (Tensor, nn.Parameter, FakeTensor) or not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    packed: Any = weight
    names, _ = packed.__tensor_flatten__()
    return [piece for name in names for piece in inside(getattr(packed, name))]
