"""How a block is split, told from shapes alone, is how the probe finds it by values."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from parafuse.engine.derive import derive
from parafuse.engine.memory import by_shape
from parafuse.engine.probe import _noise
from parafuse.engine.stack import block_stack
from parafuse.parallel.block_plan import BlockPlan
from tests.models import ODD, build, call, inputs


def block_calls(model: nn.Module, values: dict[str, Any]) -> list[tuple[nn.Module, list[Any], Any]]:
    """The first call of each kind of block."""
    found: dict[type, tuple[nn.Module, list[Any], Any]] = {}
    hooks = []
    for block in block_stack(model):

        def seen(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(type(module), (module, *tree_flatten((args, kwargs))))

        hooks.append(block.register_forward_pre_hook(seen, with_kwargs=True))
    call(model, values)
    for hook in hooks:
        hook.remove()
    return list(found.values())


def facts(plan: BlockPlan) -> Any:
    dims = {leaf: label.dim for leaf, label in plan.arguments.items()}
    sites = [(bool(site.queries), bool(site.keys)) for site in plan.sites]
    return dims, sites, set(plan.results)


@pytest.mark.parametrize("family", ["flux", "flux2", "sd3", "wan", "weaver", "weaver_gqa"])
def test_it_is_what_the_probe_finds(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAFUSE_CACHE", "")
    monkeypatch.setattr(by_shape, "blank", _noise)  # values here, so that both are held against them
    model = build(family)
    prober = by_shape.ByShape(nullcontext, nullcontext)
    calls = block_calls(model, inputs(family, ODD))
    assert calls
    with torch.no_grad():
        for block, leaves, spec in calls:
            found = prober(block, block.forward, leaves, spec)
            assert facts(found) == facts(derive(block, block.forward, leaves, spec))


def test_a_wrong_cut_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the candidates for tables of positions no plan holds, and it is told as whole shapes."""
    monkeypatch.setenv("PARAFUSE_CACHE", "")
    monkeypatch.setattr(by_shape, "blank", _noise)
    monkeypatch.setattr(by_shape, "_dims", lambda x, lengths: [])
    block, leaves, spec = block_calls(build("flux"), inputs("flux", ODD))[0]
    with torch.no_grad():
        assert by_shape.ByShape(nullcontext, nullcontext)(block, block.forward, leaves, spec).why_not_local
