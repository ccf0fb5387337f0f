"""Offload beside everything else: the same results as with all weights in place, nothing computed anew, and no graph
more. On the CPU weights are on a disk; what a GPU is to show is in tests/gpu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import parafuse
from parafuse.engine.caches.skipping import StackSkipping
from parafuse.engine.offload.component import UnitCalls
from parafuse.errors import ConfigError, UnsupportedError
from parafuse.parallel import tiers
from parafuse.parallel.residence import Residence
from tests.caches.steps import later, letters
from tests.caches.test_token_merging import unet, unet_inputs
from tests.dist.ranks import run_ranks
from tests.memory.watch import Watch
from tests.models import EVEN, ODD, build, call, error, inputs

EXACT = 1e-5
STEPS = 7
BLOCKS, LAYERS, WHOLE = "group:to=disk", "group:level=leaf,to=disk", "model:to=disk"

COMBINATIONS: list[tuple[str, dict[str, int], dict[str, Any], str]] = [
    ("flux", {}, {}, "int8"),
    ("flux", {}, {"cache": "first-block:0.3"}, ""),
    ("flux", {}, {"cache": "teacache:0.3"}, ""),
    ("wan", {}, {"cache": "pab:2,2,2"}, ""),
    ("wan", {}, {"cache": "fora:2"}, "int8"),
    ("unet", {}, {"cache": "interval:2"}, ""),
    ("unet", {}, {"cache": "tgate:4"}, ""),
    ("unet", {}, {"cache": "token-merging:0.5"}, ""),
    ("flux", {}, {"attention": "math"}, ""),
    ("flux", dict(ulysses=2), {}, ""),
    ("flux", dict(ulysses=3), {}, ""),
    ("weaver", dict(ulysses=2), {}, ""),
    ("wan", dict(ring=2), {}, "int8"),
    ("flux", dict(ulysses=2, ring=2), {}, ""),
    ("flux", dict(ulysses=2), {"cache": "first-block:0.3"}, ""),
    ("weaver", dict(cfg=2, ulysses=1), {}, ""),
    ("wan", dict(cfg=2, ulysses=1), {"cache": "interval:2"}, ""),
    ("unet", dict(data=2, ulysses=1), {}, ""),
    ("wan", dict(ulysses=2), {"cache": "pab:2,2,2"}, ""),
]
"""Model, layout, what else is asked for, and what else is done to it."""


def config(layout: dict[str, int], **more: Any) -> parafuse.Config:
    return parafuse.Config(parallel=parafuse.Parallel(**layout), **more)


def made(name: str, more: str = "") -> tuple[nn.Module, dict[str, Any]]:
    model, values = (unet(), unet_inputs(2)) if name == "unet" else (build(name), inputs(name, ODD))
    if more == "int8":
        quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    return model, values


def stepping(model: nn.Module, asked: parafuse.Config, values: dict[str, Any]) -> dict[str, Any]:
    """What some steps of one request give, and what is left when parafuse is off."""
    outputs: list[Tensor] = []
    graphs: list[int] = []
    before = [(id(p), p.detach().clone()) for p in model.parameters()]
    with (
        parafuse.apply(model, asked) as handle,
        torch.no_grad(),
        handle.request() as memories,
    ):
        for step in range(STEPS):
            outputs.append(tree_leaves(model(**later(values, step)))[0].clone())
            graphs.append(sum(sum(one.tally.graphs.values()) for one in handle.compiled.values()))
        decisions = [letters(memory) for memory in memories.values()]
        moved = handle.offloading.ledger.report() if handle.offloading else {}
    after = [(id(p), p.detach()) for p in model.parameters()]
    same = all(i == j and _equal(x, y) for (i, x), (j, y) in zip(before, after, strict=True))
    return {"outputs": outputs, "decisions": decisions, "graphs": graphs, "moved": moved, "restored": same}


def _equal(x: Any, y: Any) -> bool:
    if hasattr(x, "tensor_data_names"):
        return all(torch.equal(getattr(x, name), getattr(y, name)) for name in x.tensor_data_names)
    return torch.equal(x, y) and x.stride() == y.stride()


def combination(name: str, layout: dict[str, int], asked: dict[str, Any], more: str, offload: str) -> dict[str, Any]:
    """The same with weights in place and offloaded."""
    torch.compiler.reset()
    with mock.patch.object(tiers, "BACKEND", "eager"):
        model, values = made(name, more)
        plain = stepping(model, config(layout, **asked), values)
        model, values = made(name, more)
        got = stepping(model, config(layout, offload=offload, **asked), values)
    wrong = max(map(error, got["outputs"], plain["outputs"]))
    return got | {"error": wrong, "plain": plain}


def ran(size: int, *given: Any) -> list[dict[str, Any]]:
    return run_ranks(combination, size, *given) if size > 1 else [combination(*given)]


@pytest.mark.sweep(one_in=5)
@pytest.mark.parametrize("offload", [BLOCKS, LAYERS, WHOLE])
@pytest.mark.parametrize(("name", "layout", "asked", "more"), COMBINATIONS)
def test_combined(name: str, layout: dict[str, int], asked: dict[str, Any], more: str, offload: str) -> None:
    for got in ran(math.prod(layout.values()), name, layout, asked, more, offload):
        assert got["error"] <= EXACT
        assert got["decisions"] == got["plain"]["decisions"]
        assert got["moved"]["fetches"] > 0
        assert got["restored"]


COMPILED: list[tuple[str, dict[str, int], dict[str, Any], str]] = [
    ("flux", {}, {}, ""),
    ("flux", {}, {}, "int8"),
    ("unet", {}, {}, ""),
    ("flux", {}, {"cache": "first-block:0.3"}, ""),
    ("wan", {}, {"cache": "pab:2,2,2"}, ""),
    ("flux", dict(ulysses=2), {}, "int8"),
    ("weaver", dict(ulysses=2), {}, ""),
    ("wan", dict(ring=2), {"cache": "interval:2"}, ""),
]


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("offload", [BLOCKS, WHOLE])
@pytest.mark.parametrize(("name", "layout", "asked", "more"), COMPILED)
def test_compiled(name: str, layout: dict[str, int], asked: dict[str, Any], more: str, offload: str) -> None:
    """No graph more than with weights in place, and none once all branches have run."""
    asked = {"compile": True, **asked}
    for got in ran(math.prod(layout.values()), name, layout, asked, more, offload):
        assert got["error"] <= EXACT
        assert got["graphs"] == got["plain"]["graphs"]
        assert got["graphs"][-1] > 0
        assert got["restored"]


# what a cache leaves out does not come


def fetched(cache: str) -> tuple[int, int, str]:
    """(images that came, of these ahead and for nothing, what the cache decided) in some steps."""
    model, values = made("flux")
    with parafuse.apply(model, parafuse.Config(offload=BLOCKS, cache=cache)) as handle, torch.no_grad():
        with handle.request() as memories:
            for step in range(STEPS):
                model(**later(values, step))
            decided = "".join(one[0] for one in letters(next(iter(memories.values()))))
        assert handle.offloading is not None
        return handle.offloading.ledger.fetches, handle.offloading.ledger.wasted, decided


EVERY_SECOND = "interval:2,first_blocks=1,last_blocks=1,warmup_steps=1,final_steps=0"


def test_a_skipped_block_does_not_come() -> None:
    """Four blocks, of which the first and the last always run; one image stays."""
    fetches, wasted, decided = fetched(EVERY_SECOND)
    computed, skipped = decided.count("c"), decided.count("s")
    assert computed + skipped == STEPS
    assert skipped >= 2
    assert wasted <= 1  # what the last step has started for one that did not follow
    assert fetches - wasted == 1 + 4 * computed + 2 * skipped


def test_without_that_blocks_come_for_nothing() -> None:
    with mock.patch.object(StackSkipping, "will_run", return_value=True):
        assert fetched(EVERY_SECOND)[1] > 2


# how much is there at a time


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_at_most_so_many_blocks_are_there(ahead: int) -> None:
    model, values = made("flux")
    with parafuse.apply(model, parafuse.Config(offload=f"{BLOCKS},prefetch={ahead}")) as handle, torch.no_grad():
        found = handle.offloading
        assert found is not None
        units = next(iter(found.turn._members)).units
        watch = Watch(model)
        with handle.request(), watch.on():
            for step in range(3):
                model(**later(values, step))
    rest = sum(unit.image.nbytes for unit in units if unit.stays)
    blocks = sorted((unit.image.nbytes for unit in units if not unit.stays), reverse=True)
    assert len(blocks) == 4
    assert found.ledger.most_bytes <= rest + sum(blocks[: ahead + 1])
    assert found.ledger.resident_bytes == 0
    assert 0 < watch.most_bytes <= rest + blocks[0]  # what has landed: blocks on their way are not in their places yet


def test_sequential_has_a_layer_at_a_time() -> None:
    model, values = made("flux")
    with parafuse.apply(model, parafuse.Config(offload="sequential:to=disk")) as handle, torch.no_grad():
        found = handle.offloading
        assert found is not None
        units = next(iter(found.turn._members)).units
        with handle.request():
            model(**values)
        whole = sum(unit.image.nbytes for unit in units)
        rest = sum(unit.image.nbytes for unit in units if unit.stays)
        layers = [unit.image.nbytes for unit in units if not unit.stays]
        assert found.ledger.most_bytes <= rest + max(layers) < whole / 5


# rewrites and what runs parts of a model by itself


@contextmanager
def nothing_comes(*_: Any) -> Iterator[None]:
    yield


def test_a_cache_that_looks_into_a_block_has_its_weights() -> None:
    cache = {"cache": "teacache:3"}
    got = combination("flux", {}, cache, "", BLOCKS)
    assert got["error"] == 0
    assert got["decisions"] == got["plain"]["decisions"]
    assert any("s" in one for one in got["decisions"][0])
    with mock.patch.object(Residence, "present", nothing_comes):
        got = combination("flux", {}, cache, "", BLOCKS)
    assert got["decisions"] != got["plain"]["decisions"]


def test_calls_of_the_bare_model_have_their_weights() -> None:
    """Sparse attention looks for the video in calls of the model as its class has it."""
    model, values = made("wan")
    values |= inputs("wan", EVEN)

    def found(offload: str | None) -> Tensor:
        asked = parafuse.Config(offload=offload, sparse="window:0,0,1,tile=1x1x2,dense_steps=0,dense_layers=0")
        with parafuse.apply(model, asked) as handle, handle.request():
            return call(model, values)

    want = found(None)
    for offload in (BLOCKS, LAYERS):
        assert error(found(offload), want) == 0


# what cannot be


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(offload="model"), "the device is the CPU, whose memory the weights are in already; use to=disk"),
        (dict(offload="modle"), "did you mean 'model'"),
        (dict(offload="group:levle=leaf"), "did you mean 'level'"),
        (dict(offload="group:level=leave"), "must be one of block, leaf"),
        (dict(offload="group:prefetch=-1"), "must be a whole number of at least 0"),
        (dict(offload="model:to=tape"), "must be one of cpu, disk"),
        (dict(offload="model:folder=/tmp/x"), "give to=disk too"),
        (dict(offload="model:prefetch=2,to=disk"), "unknown key 'prefetch'"),
        (dict(offload=3), "must be a text"),
        (dict(offload="model:to=disk", compile=True, cuda_graphs=True), "not with cuda_graphs=True"),
        (dict(offload=LAYERS, compile=True), "not with compile=True"),
        (dict(offload="sequential:to=disk", compile=True), "use offload='group'"),
        (dict(offload=LAYERS, rewrites="qkv"), "not with rewrites='qkv'"),
    ],
)
def test_refused_before_anything_is_changed(asked: dict[str, Any], words: str) -> None:
    model = build("flux")
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=words):
        parafuse.apply(model, parafuse.Config(**asked))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_a_block_whose_layers_come_one_by_one_is_not_compiled_by_hand() -> None:
    model: Any = build("flux")
    with (
        parafuse.apply(model, parafuse.Config(offload=LAYERS)),
        pytest.raises(UnsupportedError, match="its layers are offloaded one by one"),
    ):
        model.transformer_blocks[0].compile()


class Reads(nn.Module):
    """Reads a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x @ self.out.weight


def test_weights_that_are_read_past_their_layer_are_no_number_and_said() -> None:
    model, x = Reads().eval().requires_grad_(False), torch.randn(2, 8)
    want = model(x)
    with (
        parafuse.apply(model, parafuse.Config(offload=LAYERS)),
        pytest.raises(UnsupportedError, match="reads weights of a layer without calling that layer"),
    ):
        model(x)
    with parafuse.apply(model, parafuse.Config(offload=BLOCKS)):
        assert torch.equal(model(x), want)


def test_what_stands_on_units_is_what_lets_them_come() -> None:
    """The comparison would see weights that did not come."""
    model, values = made("flux")
    with (
        mock.patch.object(UnitCalls, "around", lambda self, module, original: original),
        parafuse.apply(model, parafuse.Config(offload=BLOCKS)),
    ):
        assert bool(call(model, values).isnan().any())


def test_another_offload_of_the_same_model_is_refused() -> None:
    model = build("flux")
    with parafuse.apply(model, parafuse.Config(offload=BLOCKS)), pytest.raises(ConfigError, match="offload group"):
        parafuse.apply(model, parafuse.Config(offload=WHOLE))


def test_weights_are_written_by_hand_at_home() -> None:
    model, values = made("flux")
    other, _ = made("flux")
    with parafuse.apply(model, parafuse.Config(offload=BLOCKS)) as handle:
        with pytest.raises(RuntimeError, match="more than one element"):
            model.get_parameter("proj_out.weight").mul_(2)
        with handle.at_home():
            for one in (model, other):
                one.get_parameter("proj_out.weight").mul_(2)
        assert error(call(model, values), call(other, values)) == 0


def test_plans_say_it_and_are_explicit() -> None:
    with parafuse.Engine.from_pretrained("emoji", parafuse.Config(offload=BLOCKS)) as engine:
        plan = engine.plan
    assert "device=cpu" in plan.offload
    assert "offload group" in plan.one_line()
    assert parafuse.Plan.from_dict(plan.to_dict()) == plan
    with pytest.raises(ConfigError, match="must be the plan's"):
        replace(plan, offload="group:to=disk")
