"""Regional compile on several ranks: one graph for the blocks of a kind, the same picture, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import parafuse
from parafuse.parallel import traced
from parafuse.parallel.comm import Count, since
from tests.dist.ranks import run_ranks
from tests.dist.test_refused_blocks import Stack
from tests.dist.test_sequence import EXACT, attempt, parallel
from tests.models import EVEN, ODD, build, call, error, inputs
from tests.support.compiled import compiled_of
from tests.unit.test_probe_refusals import D, Good, Mean


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("FluxTransformer2DModel", "Ulysses 3"),  # two kinds of block
        ("LatteTransformer3DModel", "Ulysses 2"),  # blocks in which nothing is split
        ("Lumina2Transformer2DModel", "ring 2"),  # grouped keys, streams of several lengths
        ("SanaTransformer2DModel", "Ulysses 2"),  # linear attention and convolutions, on whole shapes
        ("WanTransformer3DModel", "ring 3"),  # cross-attention
        ("QwenImageTransformer2DModel", "ring 2 x Ulysses 2"),  # masks made in the block, on whole shapes
    ],
)
def test_blocks_compile_to_whole_graphs_once(name: str, column: str) -> None:
    found = compiled_of(name, column)
    assert (found.faults, found.refused) == ([], "")
    assert 0 < found.graphs <= 2 * (found.plain or 0)


def test_with_inductor() -> None:
    found = compiled_of("Flux2Transformer2DModel", "Ulysses 2", "inductor")
    assert (found.faults, found.refused) == ([], "")
    assert found.graphs == found.plain


class Graphs:
    """A backend that counts."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, module: Any, values: Any) -> Any:
        self.made += 1
        return aot_eager(module, values)


def sizes_counters_and_removal() -> dict[str, Any]:
    """One model: other sizes and back again, what is sent, and what is left after remove()."""
    torch.compiler.reset()
    model, graphs, found = build("flux"), Graphs(), dict[str, Any]()
    attributes = [sorted(vars(module)) for module in model.modules()]
    even, odd = inputs("flux", EVEN), inputs("flux", ODD)
    want = {"even": call(model, even), "odd": call(model, odd)}
    with parafuse.apply(model, parallel((1, 2))) as handle:
        call(model, even)
        before = handle.exchanged()
        call(model, even)
        found["sent"] = since(handle.exchanged(), before)
        compiled: Any = model
        compiled.compile_repeated_blocks(fullgraph=True, backend=graphs)
        found["even"] = error(call(model, even), want["even"])
        before = handle.exchanged()
        call(model, even)
        found["sent compiled"] = since(handle.exchanged(), before)
        found["odd"] = error(call(model, odd), want["odd"])
        made = graphs.made
        found["even again"] = error(call(model, even), want["even"])
        found["odd again"] = error(call(model, odd), want["odd"])
        found["made for known sizes"] = graphs.made - made
        found["whole model"] = attempt(model.compile)
    made = graphs.made
    found["after remove"] = error(call(model, even), want["even"])
    found["made after remove"] = graphs.made - made
    found["attributes kept"] = attributes == [sorted(vars(module)) for module in model.modules()]
    return found


def test_other_sizes_what_is_sent_and_removal() -> None:
    for found in run_ranks(sizes_counters_and_removal, 2):
        assert max(found[name] for name in ("even", "odd", "even again", "odd again")) <= EXACT
        assert found["sent compiled"] == found["sent"] != {name: Count() for name in found["sent"]}
        assert found["made for known sizes"] == 0
        assert "compile_repeated_blocks" in found["whole model"]
        assert (found["after remove"], found["made after remove"], found["attributes kept"]) == (0.0, 0, True)


def compile_all(model: Stack, **options: Any) -> None:
    for block in model.blocks:
        block.compile(**options)


class Weighted(Mean):
    """On whole shapes, with numbers and tensors that torch does not know as the module's."""

    def __init__(self, seed: int, size: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(seed)) / 2
        self.bias = nn.Parameter(torch.randn(D, generator=torch.Generator().manual_seed(seed)))
        self.size = size

    def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
        return super().forward(x) * self.size * by + self.bias


def changes_of_a_traced_block() -> dict[str, float]:
    """What the graph of a block must follow: other blocks' tensors, attributes, arguments, weights."""
    torch.compiler.reset()
    plain, model = (Stack(Weighted(1), Weighted(2), Weighted(3, 0.5)) for _ in range(2))
    graphs, kept = Graphs(), traced.MAX_GRAPHS
    x = torch.randn(2, 11, D, generator=torch.Generator().manual_seed(1))
    found = dict[str, float]()

    def compare(name: str, **options: Any) -> None:
        found[name] = error(model(x, **options), plain(x, **options))

    with torch.no_grad(), parafuse.apply(model, parallel((1, 2))):
        compile_all(model, fullgraph=True, backend=graphs)
        compare("first")
        compare("another number", by=0.5)
        for stack in (plain, model):
            first, second, third = (block for block in stack.blocks if isinstance(block, Weighted))
            first.size, second.weight = 3.0, torch.ones_like(second.weight)
            third.bias.fill_(1.0)
        compare("changed")
        made = graphs.made
        compare("again")
        found["made again"] = graphs.made - made
        traced.MAX_GRAPHS = 0
        for number in range(3):
            compare(f"by {number}", by=number / 7)
        found["made above the limit"] = graphs.made - made
    traced.MAX_GRAPHS = kept
    return found


def test_a_traced_block_follows_what_it_was_traced_from() -> None:
    for found in run_ranks(changes_of_a_traced_block, 2):
        assert {name: value for name, value in found.items() if value > EXACT} == {}


class ByValue(Mean):
    """Looks at values: no single graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)


def by_values() -> list[Any]:
    torch.compiler.reset()
    model, x = Stack(ByValue(), Good()), torch.randn(2, 11, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(x)
        with parafuse.apply(model, parallel((1, 2))):
            compile_all(model, fullgraph=True, backend="aot_eager")
            strict = attempt(model, x)
            compile_all(model, backend="aot_eager")
            return [strict, error(model(x), want)]


def test_what_is_no_single_graph_is_refused_or_runs_uncompiled() -> None:
    for strict, loose in run_ranks(by_values, 2):
        assert strict.startswith("UnsupportedError: ByValue: is no single graph")
        assert "without fullgraph=True" in strict
        assert loose <= EXACT
