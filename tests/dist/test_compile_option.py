"""`Config(compile=True)`: at most two graphs for a class of blocks, whatever varies from call to call, and the same
results in every combination."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import parafuse
from parafuse.parallel import tiers
from tests.dist.ranks import run_ranks
from tests.models import EVEN, ODD, Sizes, build, call, error, inputs

EXACT = 1e-5
SIZES = {
    "first": ODD,
    "again": ODD,
    "other picture": Sizes(grid=(1, 4, 7)),
    "other prompt": Sizes(text=9),
    "third picture": EVEN,
    "third prompt": Sizes(text=21),
    "few tokens": Sizes(grid=(1, 1, 5), text=4),
}


def config(layout: dict[str, int], **more: Any) -> parafuse.Config:
    return parafuse.Config(parallel=parafuse.Parallel(**layout), compile=True, **more)


def tally(handle: parafuse.Handle) -> Counter[str]:
    """Graphs by class."""
    return sum((one.tally.graphs for one in handle.compiled.values()), Counter[str]())


def over_sizes(family: str, layout: dict[str, int], batch: int = 2, backend: str = "aot_eager") -> tuple[dict[str, float], Counter[str]]:
    torch.compiler.reset()
    model = build(family)
    calls = {name: inputs(family, replace(sizes, batch=batch)) for name, sizes in SIZES.items()}
    want = {name: call(model, values) for name, values in calls.items()}
    with mock.patch.object(tiers, "BACKEND", backend), parafuse.apply(model, config(layout)) as handle:
        found = {name: error(call(model, values), want[name]) for name, values in calls.items()}
        return found, tally(handle)


def adapter(model: nn.Module, *, seed: int, rank: int = 4) -> dict[str, Tensor]:
    """A LoRA for the blocks' projections, in peft's format."""
    generator, found = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, part in model.named_modules():
        name = name.replace(".base_layer", "")
        if isinstance(part, nn.Linear) and ".lora_" not in name and name.endswith(("to_q", "to_v", "proj_out")):
            found[f"{name}.lora_A.weight"] = 0.3 * torch.randn(rank, part.in_features, generator=generator)
            found[f"{name}.lora_B.weight"] = 0.3 * torch.randn(part.out_features, rank, generator=generator)
    return found


ADAPTERS: dict[str, Any] = {
    "loaded": lambda model: model.load_lora_adapter(adapter(model, seed=1), adapter_name="a", prefix=None),
    "scaled": lambda model: model.set_adapters("a", 0.3),
    "scaled again": lambda model: model.set_adapters("a", 2.5),
    "other weights": lambda model: [
        x.mul_(1.5) for name, x in model.named_parameters() if ".lora_B." in name
    ],
    "replaced": lambda model: [
        model.delete_adapters("a"),
        model.load_lora_adapter(adapter(model, seed=2), adapter_name="a", prefix=None),
    ],
    "taken off": lambda model: model.unload_lora(),
}


def with_adapters(layout: dict[str, int]) -> dict[str, tuple[float, float, int]]:
    """Change -> (error, how much the result moved, graphs made for it) of a model that is compiled before it gets any."""
    torch.compiler.reset()
    plain, model = build("flux"), build("flux")
    values, other = inputs("flux", ODD), inputs("flux", EVEN)
    found = {}
    with mock.patch.object(tiers, "BACKEND", "aot_eager"), parafuse.apply(model, config(layout)) as handle, torch.no_grad():
        call(model, values)
        before, made = call(plain, values), tally(handle).total()
        for name, change in ADAPTERS.items():
            change(plain)
            change(model)
            want = call(plain, values)
            wrong = max(error(call(model, values), want), error(call(model, other), call(plain, other)))
            found[name] = (wrong, error(want, before), tally(handle).total() - made)
            before, made = want, tally(handle).total()
    return found
