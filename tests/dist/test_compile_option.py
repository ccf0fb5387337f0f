"""`Config(compile=True)`: at most two graphs for a class of blocks, whatever varies from call to call, and the same
results in every combination."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import parafuse
from parafuse.engine.devices import remove_offload
from parafuse.parallel import tiers
from tests.caches.steps import later, letters
from tests.caches.test_token_merging import unet, unet_inputs
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


STEPS = 7
COMBINATIONS: list[tuple[str, dict[str, int], str, str]] = [
    ("flux", {}, "", ""),
    ("flux", dict(ulysses=2), "", ""),
    ("wan", dict(ring=2), "", ""),
    ("weaver", dict(cfg=2, ulysses=1), "", ""),
    ("unet", dict(data=2, ulysses=1), "", ""),
    ("flux", {}, "interval:2", ""),
    ("flux", dict(ulysses=2), "first-block:0.3", ""),
    ("wan", dict(cfg=2, ulysses=1), "interval:2", ""),
    ("wan", {}, "pab:2,2,2", ""),
    ("wan", dict(ulysses=2), "fora:2", ""),
    ("unet", {}, "interval:2", ""),
    ("unet", {}, "tgate:4", ""),
    ("unet", {}, "token-merging:0.5", ""),
    ("flux", dict(ulysses=2), "", "int8"),
    ("flux", {}, "interval:2", "int8"),
    ("unet", {}, "", "group offload"),
    ("flux", {}, "", "group offload"),
    ("weaver", dict(ulysses=2), "", "group offload"),
]
"""Model, layout, cache, and what else is done to it."""


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "unet":
        return unet(), unet_inputs(2)
    return build(name), inputs(name, ODD)


def stepping(model: nn.Module, asked: parafuse.Config, values: dict[str, Any], more: str = "") -> dict[str, Any]:
    """What some steps of one request give."""
    graphs: list[int] = []
    with parafuse.apply(model, asked) as handle, torch.no_grad(), handle.request() as memories:
        if more == "group offload":
            cpu = torch.device("cpu")
            apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        outputs: list[Tensor] = []
        for step in range(STEPS):
            outputs.append(tree_leaves(model(**later(values, step)))[0].clone())
            graphs.append(tally(handle).total())
        decisions = [letters(memory) for memory in memories.values()]
        found = {"outputs": outputs, "decisions": decisions, "graphs": graphs, "classes": tally(handle)}
        if more == "group offload":
            remove_offload(model)
    return found


def combination(name: str, layout: dict[str, int], cache: str, more: str, backend: str) -> tuple[float, list[int], Any]:
    """(difference from the same uncompiled, graphs after each step, what the cache decided in both)."""
    torch.compiler.reset()
    found: list[dict[str, Any]] = []
    for compiled in (False, True):
        model, values = made(name)
        if more == "int8":
            quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
        asked = replace(config(layout, cache=cache or None), compile=compiled)
        with mock.patch.object(tiers, "BACKEND", backend):
            found.append(stepping(model, asked, values, more))
    plain, got = found
    wrong = max(map(error, got["outputs"], plain["outputs"]))
    return wrong, got["graphs"], (plain["decisions"], got["decisions"])


@pytest.mark.parametrize(("name", "layout", "cache", "more"), COMBINATIONS)
def test_combined(name: str, layout: dict[str, int], cache: str, more: str) -> None:
    size = max(1, math.prod(layout.values()))
    given = (name, layout, cache, more, "eager")
    for wrong, graphs, (plain, got) in run_ranks(combination, size, *given) if size > 1 else [combination(*given)]:
        assert wrong <= EXACT
        assert graphs[-1] > 0
        assert graphs[-1] == graphs[4]
        assert got == plain
