"""Regional compile on several ranks: one graph for the blocks of a kind, the same picture, and nothing left behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parafuse
from parafuse.parallel import traced
from parafuse.parallel.comm import Count, since
from tests.dist.ranks import run_ranks
from tests.dist.test_refused_blocks import Stack
from tests.dist.test_sequence import EXACT, attempt, parallel
from tests.graphs import Graphs
from tests.models import EVEN, ODD, build, call, error, inputs
from tests.support.compiled import compiled_of
from tests.unit.test_probe_refusals import D, Good, Mean


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("FluxTransformer2DModel", "Ulysses 3"),  # two kinds of block
        ("LatteTransformer3DModel", "Ulysses 2"),  # blocks in which nothing is split
        ("SanaTransformer2DModel", "Ulysses 2"),  # linear attention and convolutions, on whole shapes
        ("MochiTransformer3DModel", "Ulysses 2"),  # lengths that only the device knows
    ],
)
def test_blocks_compile_to_whole_graphs_once(name: str, column: str) -> None:
    found = compiled_of(name, column)
    assert (found.faults, found.refused) == ([], "")
    assert 0 < found.graphs <= 2 * (found.plain or 0)


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
    with parafuse.apply(model, parallel((1, 2))):
        made, around = graphs.made, cast(nn.Module, torch.compile(model, backend=graphs))
        found["around"] = error(call(around, even), want["even"])
        found["made around"] = graphs.made - made
    return found


def test_other_sizes_what_is_sent_and_removal() -> None:
    for found in run_ranks(sizes_counters_and_removal, 2):
        assert max(found[name] for name in ("even", "odd", "even again", "odd again")) <= EXACT
        assert found["sent compiled"] == found["sent"] != {name: Count() for name in found["sent"]}
        assert found["made for known sizes"] == 0
        assert "compile_repeated_blocks" in found["whole model"]
        assert (found["around"] <= EXACT, found["made around"]) == (True, 0)
        assert (found["after remove"], found["made after remove"], found["attributes kept"]) == (0.0, 0, True)


def compile_all(model: Stack, **options: Any) -> None:
    for block in model.blocks:
        block.compile(**options)


def act(slope: float) -> Any:
    return lambda x: torch.where(x > 0, x, slope * x)


class Blend(nn.Module):
    """On whole shapes; of parameters alone, so that blocks may share a graph, with all that may differ or change."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.qkv = nn.Parameter(torch.randn(3 * D, D, generator=generator) / math.sqrt(D))
        self.out = nn.Linear(D, D)
        nn.init.constant_(self.out.weight, 0.1)
        nn.init.zeros_(self.out.bias)
        self.size, self.act, self.rounded = 1.0, act(0.1), torch.float32
        self.scaling = {"d": 1.0}
        self.shift: nn.Parameter | None = None

    def forward(self, x: Tensor, other: Tensor | None = None, by: float = 1.0, option: Any = None) -> Tensor:
        heads = F.linear(x + x.mean(1, keepdim=True), self.qkv).unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        seen = self.act(self.out(seen).to(self.rounded).float()) * self.size * self.scaling["d"] * by
        seen = seen * getattr(self, "gain", 1.0) * (1.0 if option is None else option.size)
        seen = seen if self.shift is None else seen + self.shift
        return x + seen + (0.0 if other is None else 2 * other)


def tripled(_module: Any, _args: Any, result: Tensor) -> Tensor:
    return 3 * result


def patched(block: Any) -> None:
    original = block.out.forward
    block.out.forward = lambda x: 3 * original(x)


def wrapped(block: Any) -> None:
    more = nn.Linear(D, D)
    nn.init.constant_(more.weight, 0.5)
    nn.init.ones_(more.bias)
    block.out = nn.Sequential(block.out, more)


CHANGES: dict[str, Any] = {
    "a number": lambda block: setattr(block, "size", 3.0),
    "a function": lambda block: setattr(block, "act", act(0.9)),
    "a dtype": lambda block: setattr(block, "rounded", torch.bfloat16),
    "a hook": lambda block: block.out.register_forward_hook(tripled),
    "a method": patched,
    "a module": wrapped,
    "an item": lambda block: block.scaling.update(d=0.5),
    "a new attribute": lambda block: setattr(block, "gain", 4.0),
    "a parameter": lambda block: setattr(block, "shift", nn.Parameter(torch.ones(D))),
    "its values": lambda block: block.qkv.mul_(2),
    "their dtype": lambda block: setattr(block.out.bias, "data", block.out.bias.data.double().float() + 1),
}


def changes_of_one_block(when: str) -> dict[str, tuple[float, float, int]]:
    """Change -> (error, what it changes, graphs made) where one of three like blocks differs: at once, or later."""
    found = {}
    x = torch.randn(2, 11, D, generator=torch.Generator().manual_seed(1))
    for name, change in CHANGES.items():
        torch.compiler.reset()
        graphs = Graphs()
        plain, model = (Stack(*(Blend(seed) for seed in range(4))) for _ in range(2))
        with torch.no_grad():
            before = plain(x)
            change(plain.blocks[2])
            want = plain(x)
            if when == "at once":
                change(model.blocks[2])
            with parafuse.apply(model, parallel((1, 2))):
                compile_all(model, fullgraph=True, backend=graphs)
                if when == "later":
                    model(x)
                    change(model.blocks[2])
                found[name] = error(model(x), want), error(want, before), graphs.made
    return found


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_traced_block_follows_what_it_was_traced_from(when: str) -> None:
    for found in run_ranks(changes_of_one_block, 2, when):
        for name, (wrong, change, made) in found.items():
            assert wrong <= EXACT, name
            assert change > 1e-4, name
            assert made <= 4, name  # of the first block, of those like it, and of the one that differs


@dataclass
class Option:
    size: float = 2.0


class Counting(Blend):
    """Changes what it holds."""

    step, last = 0, None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.step += 1
        self.last = x
        return super().forward(x) * self.step


def other_arguments() -> dict[str, Any]:
    """Errors where arguments are the same tensor, other numbers, objects, and where the block counts its calls."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(1)
    x, z = (torch.randn(2, 11, D, generator=generator) for _ in range(2))
    graphs, found = Graphs(), dict[str, Any]()
    plain, model = (Stack(*(Blend(seed) for seed in range(3))) for _ in range(2))

    def compare(name: str, *args: Any, **kwargs: Any) -> None:
        want = plain(*args, **kwargs)
        found[name] = attempt(lambda: error(model(*args, **kwargs), want))

    with torch.no_grad(), parafuse.apply(model, parallel((1, 2))):
        compile_all(model, fullgraph=True, backend=graphs)
        for name, other in (("same", x), ("another", z), ("same again", x), ("none", None)):
            compare(name, x, other)
        made = graphs.made
        compare("another again", x, z)
        found["made again"] = graphs.made - made
        kept, traced.MAX_GRAPHS = traced.MAX_GRAPHS, 4  # the first block of three has another kind of argument
        found["made where two are kept"] = dict[str, int]()
        for turn, number in enumerate((1, 2, 3, 2, 1, 1)):
            made = graphs.made
            compare(f"by {number}, {turn}", x, None, number / 7)
            found["made where two are kept"][f"{number}, {turn}"] = graphs.made - made
        traced.MAX_GRAPHS = kept
        compare("refused", x, None, 1.0, Option())
        compile_all(model, backend=graphs)
        option = Option()
        compare("object", x, None, 1.0, option)
        option.size = 5.0
        compare("object changed", x, None, 1.0, option)
    counting, counted = Stack(Counting()), Stack(Counting())
    with torch.no_grad(), parafuse.apply(counted, parallel((1, 2))):
        compile_all(counted, backend=graphs)
        for step in range(3):
            want = counting(x)
            found[f"step {step}"] = error(counted(x), want)
        last: Any = counted.blocks[0]
        found["fake tensors left"] = float(type(last.last).__name__ == "FakeTensor")
    return found


def test_a_traced_block_is_called_with_other_arguments() -> None:
    for found in run_ranks(other_arguments, 2):
        refused = found.pop("refused")
        assert "an argument is a Option, which may change unseen" in refused
        made = found.pop("made where two are kept")
        assert made == {"1, 0": 2, "2, 1": 2, "3, 2": 2, "2, 3": 0, "1, 4": 2, "1, 5": 0}
        assert {name: value for name, value in found.items() if isinstance(value, str) or value > EXACT} == {}


class Flipped(Blend):
    """Ends with whole tensors, some of which a rank whose part is all filler does not use."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x).flip(1)


def on_filler(backend: str) -> tuple[float, dict[str, int], dict[str, int]]:
    """(error, exchanges of an uncompiled call, of a compiled one); 4 tokens on 3 ranks leave the last one none."""
    torch.compiler.reset()
    model, x = Stack(Flipped(0), Flipped(1)), torch.randn(1, 4, D, generator=torch.Generator().manual_seed(1))

    def counted(handle: parafuse.Handle) -> dict[str, int]:
        before = handle.exchanged()
        model(x)
        return {name: count.calls for name, count in since(handle.exchanged(), before).items()}

    with torch.no_grad():
        want = model(x)
        with parafuse.apply(model, parallel((1, 3))) as handle:
            model(x)
            plain = counted(handle)
            compile_all(model, fullgraph=True, backend=backend)
            found = error(model(x), want)
            return found, plain, counted(handle)


def test_ranks_exchange_alike_also_where_one_has_filler_alone() -> None:
    """With inductor, which takes out what is not used."""
    for wrong, plain, compiled in run_ranks(on_filler, 3, "inductor"):
        assert wrong <= EXACT
        assert compiled == plain


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
