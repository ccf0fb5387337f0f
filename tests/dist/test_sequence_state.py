"""What `apply` sends, and what it leaves behind: counters, errors in the middle of a call, other models, repetition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import parafuse
from parafuse.engine.stack import block_stack
from parafuse.parallel.comm import Count
from parafuse.parallel.layout import ring_bytes, ulysses_bytes
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import EXACT, Layout, attempt, on_layouts, parallel
from tests.models import EVEN, FAMILIES, ODD, build, call, error, inputs

HEADS = 12
"""Divides by 2, 3 and 4: the formulas are for heads that divide."""
GATHERED = {"flux": 4, "flux2": 4, "sd3": 16, "wan": 16, "wan_ti2v": 16}
"""Features per token that are gathered at the end of a forward."""


def counted(layout: Layout) -> dict[str, dict[str, Count]]:
    """Family -> what this rank sent in the second of two calls."""
    out = {}
    for family in GATHERED:
        model, values = build(family, heads=HEADS), inputs(family, EVEN)
        with parafuse.apply(model, parallel(layout)) as handle:
            call(model, values)
            before = handle.exchanged()
            call(model, values)
            after = handle.exchanged()
        out[family] = {
            name: Count(count.calls - before[name].calls, count.bytes - before[name].bytes)
            for name, count in after.items()
            if count.calls
        }
    return out


def expected(family: str, layout: Layout) -> dict[str, Count]:
    """The formulas of layout.py for one call, batch 2 in fp32."""
    ring, ulysses = layout
    width, item = HEADS * FAMILIES[family].head_size, 4 * EVEN.batch
    rows = FAMILIES[family].attends(EVEN)
    out = {}
    if ulysses > 1:
        sent = sum(ulysses_bytes(rows=n // ring, width=width, item_bytes=item, degree=ulysses) for n in rows)
        out["ulysses.all_to_all"] = Count(2 * len(rows), int(sent))
    if ring > 1:
        sent = sum(ring_bytes(rows=n, width=width // ulysses, item_bytes=item, degree=ring) for n in rows)
        out["ring.ring"] = Count((ring - 1) * len(rows), int(sent))
    name = "sequence" if ring > 1 and ulysses > 1 else "ring" if ring > 1 else "ulysses"
    degree = ring * ulysses
    gathered = EVEN.image // degree * GATHERED[family] * item * (degree - 1)
    return out | {f"{name}.all_gather": Count(1, gathered)}


@on_layouts
def test_what_is_sent_equals_the_formulas(layout: Layout) -> None:
    """Two exchanges for each self-attention, none for cross-attention, one gather at the end."""
    for found in run_ranks(counted, layout[0] * layout[1], layout):
        assert found == {family: expected(family, layout) for family in GATHERED}


class Fault(Exception):
    """Raised on purpose."""


@contextmanager
def broken(module: nn.Module) -> Iterator[None]:
    """The module raises when it is called."""

    def fail(*_: Any) -> None:
        raise Fault

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def fail_and_go_on(layout: Layout) -> list[Any]:
    """Errors of calls after calls that failed before a block, inside one (twice), and after the last."""
    out: list[Any] = []
    for family in ("flux", "wan", "weaver"):
        model, values = build(family), inputs(family, ODD)
        plain = call(model, values)
        with parafuse.apply(model, parallel(layout)):
            last = block_stack(model)[-1]
            for module in (
                last,
                next(m for m in last.modules() if isinstance(m, nn.Linear)),
                list(model.modules())[-1],
            ):
                with broken(module):
                    out.append(attempt(call, model, values))
                out.append(len(_get_current_function_mode_stack()))
                out.append(attempt(lambda model=model, values=values, plain=plain: error(call(model, values), plain)))
    return out


@pytest.mark.parametrize("layout", [(1, 2), (2, 1)], ids=str)
def test_an_error_in_the_middle_leaves_the_model_usable(layout: Layout) -> None:
    for found in run_ranks(fail_and_go_on, 2, layout):
        assert found[0::3] == ["Fault: "] * 9
        assert found[1::3] == [0] * 9
        assert all(value <= EXACT for value in found[2::3])


def beside_each_other() -> dict[str, Any]:
    """A plain model, one on Ulysses and one on ring, all of one class, called in turn."""
    plain, first, second = (build("flux", seed=seed) for seed in (1, 2, 3))
    values, more = inputs("flux", ODD), inputs("flux", EVEN)
    before = [[call(model, v) for v in (values, more)] for model in (plain, first, second)]
    attention = F.scaled_dot_product_attention
    with parafuse.apply(first, parallel((1, 2))), parafuse.apply(second, parallel((2, 1))):
        during = [[call(model, v) for v in (values, more)] for model in (plain, first, second)]
        again = call(plain, values)
    return {
        "plain": torch.equal(again, before[0][0]) and all(map(torch.equal, during[0], before[0])),
        "errors": [error(got, want) for i in (1, 2) for got, want in zip(during[i], before[i], strict=True)],
        "torch": F.scaled_dot_product_attention is attention,
    }


def test_other_models_of_the_class_are_not_touched() -> None:
    for found in run_ranks(beside_each_other, 2):
        assert found["plain"]
        assert found["torch"]
        assert max(found["errors"]) <= EXACT


def repeated() -> list[Any]:
    """apply on what has it already; then take it off, and put another layout on."""
    model, values = build("flux"), inputs("flux", ODD)
    plain = call(model, values)
    handle = parafuse.apply(model, parallel((1, 2)))
    out = [attempt(parafuse.apply, model, parallel((2, 1))), error(call(model, values), plain)]
    handle.remove()
    handle.remove()
    out.append(torch.equal(call(model, values), plain))
    with parafuse.apply(model, parallel((2, 1))) as other:
        out += [error(call(model, values), plain), other.exchanged()["ring.ring"].calls]
    return out


def test_apply_twice_is_refused_and_apply_again_works() -> None:
    for refused, first, restored, second, calls in run_ranks(repeated, 2):
        assert refused.startswith("ConfigError: ")
        assert "FluxTransformer2DModel" in refused
        assert "already; call remove() on" in refused
        assert restored
        assert max(first, second) <= EXACT
        assert calls == 4


def ways_to_call() -> dict[str, Any]:
    """The output under inference_mode, as an object, with gradients on, and of a block that is called by itself."""
    out: dict[str, Any] = {}
    model, values = build("sd3"), inputs("sd3", ODD)
    plain = call(model, values)
    block = block_stack(model)[1]
    tokens = [torch.randn(2, n, 24) for n in (35, 13)] + [torch.randn(2, 24)]
    alone = block(*tokens)
    with parafuse.apply(model, parallel((1, 2))):
        with torch.inference_mode():
            out["inference"] = error(model(**values)[0], plain)
        result = model(**values | {"return_dict": True})
        out["object"] = error(result.sample, plain)
        out["class"] = type(result).__name__
        model.requires_grad_(True)
        out["gradients on"] = error(model(**values)[0].detach(), plain)
        model.requires_grad_(False)
        out["alone"] = is_plain(block(*tokens), alone)
        with broken(block_stack(model)[2]):
            attempt(call, model, values)
        out["alone after an error"] = is_plain(block(*tokens), alone)
    return out


def is_plain(results: Any, expected: Any) -> bool:
    return all(type(x) is torch.Tensor and torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_every_way_to_call() -> None:
    for found in run_ranks(ways_to_call, 2):
        assert found.pop("alone")
        assert found.pop("alone after an error")
        assert found.pop("class") == "Transformer2DModelOutput"
        assert max(found.values()) <= EXACT


def refusals() -> dict[str, Any]:
    """Errors of calls that cannot be run, on this rank; and whether the model is as it was."""
    out: dict[str, Any] = {}
    model, values = build("flux"), inputs("flux", ODD)
    plain = call(model, values)
    config = parafuse.Config(parallel=parafuse.Parallel(ring=3))
    out["degrees"] = attempt(parafuse.apply, model, config)
    out["no blocks"] = attempt(parafuse.apply, nn.Linear(3, 3), parallel((1, 2)))
    out["no module"] = attempt(parafuse.apply, "flux", parallel((1, 2)))
    handle = parafuse.apply(model, parallel((1, 2)))
    ours, model.forward = model.forward, nn.Identity().forward
    out["covered"] = attempt(handle.remove)
    model.forward = ours
    handle.remove()
    out["as it was"] = torch.equal(call(model, values), plain)
    return out


def test_what_cannot_be_applied_is_refused_and_nothing_is_changed() -> None:
    for found in run_ranks(refusals, 2):
        assert found["degrees"].startswith("ConfigError: parallel: ring=3 makes 3 ranks, but there are 2.")
        assert found["no blocks"].startswith("UnsupportedError: Linear: no block stack found")
        assert found["no module"].startswith("ConfigError: target=str: must be a torch module")
        assert found["covered"].startswith("RuntimeError: FluxTransformer2DModel.forward was replaced after parafuse")
        assert found["as it was"]


def test_one_rank_is_left_alone() -> None:
    model, values = build("wan"), inputs("wan", ODD)
    plain = call(model, values)
    with parafuse.apply(model) as handle:
        assert torch.equal(call(model, values), plain)
        assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []
        assert (handle.applied, handle.exchanged()) == ([], {})


def groups_after_each_apply() -> list[int]:
    import torch.distributed as dist

    model, values = build("flux"), inputs("flux", ODD)
    found = []
    for _ in range(4):
        with parafuse.apply(model, parallel((1, 2))) as handle:
            call(model, values)
        handle.remove()  # a second time, which must give nothing back again
        found.append(len(dist.distributed_c10d._world.pg_map))
    with parafuse.apply(model, parallel((1, 2))) as one, parafuse.apply(build("wan"), parallel((1, 2))) as other:
        assert one.mesh is not other.mesh
    return found


def test_groups_are_used_again() -> None:
    for found in run_ranks(groups_after_each_apply, 2):
        assert len(set(found)) == 1
