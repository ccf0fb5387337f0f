"""Calls of one model as a sampler would make them: the sample goes from one to another at a pace that varies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.models import Inputs
from tests.zoo.case import Case
from tests.zoo.collect import inputs_of, outputs

PACE = (0.0, 0.05, 0.1, 0.12, 0.14, 0.4, 0.42, 0.44, 0.75, 0.77, 0.9)
"""Places between two samples, by step."""


def calls(case: Case) -> list[Inputs]:
    """By step; all arguments but the sample are the same objects in all of them."""
    first, other = inputs_of(case, case.sizes, seed=1), inputs_of(case, case.sizes, seed=2)
    name = next(iter(first))

    def between(a: Any, b: Any, place: float) -> Any:
        if not isinstance(a, Tensor) or a.dtype == torch.bool:
            return a
        if a.is_floating_point():
            return a.lerp(b, place)
        share = torch.linspace(0, 1, a[0].numel()).view(a.shape[1:])  # so many of its classes are the other's
        return torch.where(share < place, b, a)

    return [
        first | {name: tree_map(lambda a, b, place=place: between(a, b, place), first[name], other[name])}
        for place in PACE
    ]


def run(model: nn.Module, steps: list[Inputs]) -> list[Tensor]:
    """The first tensor of each call's result."""
    return [outputs(model, values)[0] for values in steps]
