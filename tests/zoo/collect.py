"""All cases, and how one is compared with plain diffusers on the ranks at hand."""

from __future__ import annotations

import importlib
import math
import pkgutil
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests import zoo
from tests.models import Inputs, Sizes
from tests.zoo.case import Case

NO_CASES = ("case", "collect", "inputs")


@cache
def cases() -> dict[str, Case]:
    """Name -> case, sorted by name."""
    found: dict[str, Case] = {}
    for module in pkgutil.iter_modules(zoo.__path__):
        if module.name in NO_CASES:
            continue
        for case in importlib.import_module(f"tests.zoo.{module.name}").CASES:
            if case.name in found:
                raise ValueError(f"two cases are named {case.name!r}")
            found[case.name] = case
    return dict(sorted(found.items()))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, equal on all ranks and none zero, so that every path counts."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / math.sqrt(max(1, parameter[0].numel())))
        else:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model


def inputs_of(case: Case, sizes: Sizes, seed: int = 1) -> Inputs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return case.inputs(sizes)


def outputs(model: nn.Module, values: Inputs) -> list[Tensor]:
    """The tensors of the model's result, in order."""
    with torch.no_grad():
        result: Any = model(**values)
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
