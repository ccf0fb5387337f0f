"""Streams are turned by position before they are joined: the same values, fewer kernels, and only where that is so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.fx.node import map_arg

import parafuse
from parafuse.engine.rewrites.rope import PLACE, JoinedLast, compile_options, lines_of, pass_in
from parafuse.errors import ConfigError
from parafuse.kernels.graph_passes import rope_order
from parafuse.kernels.graph_passes.rope_order import RopeOrder
from parafuse.parallel.attention import sequence_attention
from tests.models import ODD, build, call, error, inputs

aten = torch.ops.aten
EXACT = 1e-5
FAMILIES = {"flux": 2, "sd3": 0}
"""Concatenations that are moved in the first block of each kind."""


class Seen:
    """A backend that runs each graph as it is and as the pass leaves it."""

    def __init__(self) -> None:
        self.one = RopeOrder()
        self.same: list[bool] = []
        self.before: list[GraphModule] = []
        self.after: list[GraphModule] = []

    def __call__(self, graph: GraphModule, values: list[Any]) -> Any:
        changed: Any = self._changed
        return aot_module_simplified(
            graph, values, fw_compiler=changed, inference_compiler=changed, decompositions=select_decomp_table()
        )

    def _changed(self, graph: GraphModule, _: Any) -> Any:
        after = _copied(graph)
        self.one(after.graph)
        after.graph.lint()
        after.recompile()
        self.before.append(graph)
        self.after.append(after)

        def run(*args: Any) -> Any:
            want, got = graph(*args), after(*args)
            self.same.append(all(torch.equal(a, b) and a.stride() == b.stride() for a, b in _pairs(want, got)))
            return got

        return make_boxed_func(run)


def _copied(graph: GraphModule) -> GraphModule:
    """With what is known of each node."""
    new = torch.fx.Graph()
    known: dict[Any, Any] = {}
    for node in graph.graph.nodes:
        known[node] = new.node_copy(node, lambda n: known[n])
    return GraphModule(graph, new)


def _pairs(want: Any, got: Any) -> list[tuple[Tensor, Tensor]]:
    return [(a, b) for a, b in zip(want, got, strict=True) if isinstance(a, Tensor)]


def compiled(model: Any, seen: Seen) -> None:
    """Its first block, and the first of one stream."""
    torch._dynamo.reset()
    for name in ("transformer_blocks", "single_transformer_blocks", "blocks"):
        for block in getattr(model, name, ())[:1]:
            block.compile(fullgraph=True, backend=seen, dynamic=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_the_same_bits(family: str) -> None:
    model, seen = build(family), Seen()
    want = call(model, inputs(family, ODD))
    compiled(model, seen)
    assert error(call(model, inputs(family, ODD)), want) <= EXACT
    assert seen.same == [True] * len(seen.before)
    assert seen.one.moved == FAMILIES[family]
    assert seen.one.changed == (1 if seen.one.moved else 0)
    unchanged = [a.code == b.code for a, b in zip(seen.before, seen.after, strict=True)]
    assert unchanged == ([False, True] if family == "flux" else [True])


@pytest.mark.parametrize("name", ["pairs", "heads and features in one"])
def test_lengths_may_be_symbols(name: str) -> None:
    seen = Seen()
    torch._dynamo.reset()
    function = torch.compile(MOVED[name], fullgraph=True, backend=seen)
    for image, text in ((35, 13), (35, 35), (15, 4)):
        values = (torch.randn(2, image, 3, 8), torch.randn(2, text, 3, 8), torch.randn(image + text, 8))
        for x, dim in zip(values, (1, 1, 0), strict=True):
            torch._dynamo.mark_dynamic(x, dim)
        assert error(function(*values), MOVED[name](*values)) <= EXACT
    assert seen.same == [True] * 3
    assert seen.one.moved == len(seen.before) == 1


def test_it_acts_in_front_of_the_attention_of_several_ranks() -> None:
    """There attention is one operator, and each rank has its own rows."""
    seen = Seen()

    def joined(q: Tensor, k: Tensor, v: Tensor, text: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        q, k = (turned(torch.cat([torch.sin(text), torch.cos(x)], 1), tables) for x in (q, k))
        rows = [x.transpose(1, 2) for x in (q, k, torch.cat([text, v], 1))]
        return sequence_attention(*rows, None, [12], [12], None, None, "", "", "", None, False, "")

    q, k, v, text = (torch.randn(2, size, 3, 8) for size in (7, 7, 7, 5))
    tables = (torch.randn(12, 8), torch.randn(12, 8))
    with torch.no_grad():
        want = joined(q, k, v, text, tables)
        got = torch.compile(joined, fullgraph=True, backend=seen)(q, k, v, text, tables)
    assert error(got, want) <= EXACT
    assert seen.one.moved == 2
    assert seen.same == [True]


def turned(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """As diffusers does it: by pairs."""
    cos, sin = (table[None, :, None] for table in tables)
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return x * cos + torch.stack([-imaginary, real], dim=-1).flatten(3) * sin


def halves(x: Tensor, table: Tensor) -> Tensor:
    """As others do it: by halves."""
    first, second = x.chunk(2, dim=-1)
    return x * table[:, None] + torch.cat([-second, first], dim=-1) * table[:, None].square()


MOVED: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "pairs": lambda a, b, t: turned(torch.cat([a.sin(), b.cos()], 1), (t, t)),
    "halves": lambda a, b, t: halves(torch.cat([a.sin(), b.cos()], 1), t),
    "heads come first": lambda a, b, t: torch.cat([a.sin(), b.cos()], 1).transpose(1, 2) * t,
    "three streams": lambda a, b, t: torch.cat([a[:, :2].sin(), a[:, 2:].cos(), b.exp()], 1) * 2 + t[:, None],
    "heads and features in one": lambda a, b, t: torch.cat([a.sin(), b.cos()], 1).flatten(2) * t.repeat(1, 3),
}
LEFT: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "nothing follows": lambda a, b, t: torch.cat([a.sin(), b.cos()], 1),
    "a view alone follows": lambda a, b, t: torch.cat([a.sin(), b.cos()], 1).transpose(1, 2),
    "it is needed joined as well": lambda a, b, t: (x := torch.cat([a.sin(), b.cos()], 1), x * 2)[0:2],
    "two are needed joined": lambda a, b, t: (x := torch.cat([a.sin(), b.cos()], 1)) is None or (x * 2, x * 3),
    "streams are mixed": lambda a, b, t: torch.cat([a.sin(), b.cos()], 1).softmax(1),
    "rows are turned round": lambda a, b, t: torch.cat([a.sin(), b.cos()], 1).roll(1, dims=1).sum(1) * 2,
    "streams are folded": lambda a, b, t: torch.cat([a.sin(), b.cos()], 1).reshape(2, 6, 2, 3, 8).sum(2) * 2,
    "a table is no work": lambda a, b, t: torch.cat([a, b], 1) * t[:, None],
}


def moved(function: Callable[..., Any]) -> tuple[Seen, bool]:
    seen, values = Seen(), (torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(12, 8))
    torch._dynamo.reset()
    with torch.no_grad():
        want = function(*values)
        got = torch.compile(function, fullgraph=True, backend=seen)(*values)
    both = [x if isinstance(x, tuple) else (x,) for x in (want, got)]
    return seen, all(error(a, b) <= EXACT for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("name", MOVED)
def test_what_is_moved(name: str) -> None:
    seen, is_right = moved(MOVED[name])
    assert (seen.one.moved, is_right, seen.same) == (1, True, [True])
    last = [node for node in seen.after[0].graph.nodes if node.op == "call_function"]
    work = [i for i, node in enumerate(last) if rope_order.computes(node)]
    joined = [i for i, node in enumerate(last) if node.target is aten.cat.default]
    assert max(joined) > max(work)  # last of all


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_as_it_is(name: str) -> None:
    seen, is_right = moved(LEFT[name])
    assert seen.one.moved == 0
    assert is_right
    assert seen.before[0].code == seen.after[0].code


def test_a_wrong_rule_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison by bits fails where tables are cut at the wrong rows."""
    original = rope_order._Region._cut
    monkeypatch.setattr(rope_order._Region, "_cut", lambda self, table, dim: original(self, table, dim)[::-1])
    with pytest.raises(Exception, match=r"size|shape"):
        moved(MOVED["pairs"])
    monkeypatch.setattr(rope_order._Region, "_cut", original)

    def function(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return torch.cat([a.sin(), b[:, :5].cos()], 1) * t[:10, None]

    assert moved(function)[0].same == [True]
    monkeypatch.setattr(rope_order._Region, "_cut", lambda self, table, dim: original(self, table, dim)[::-1])
    assert moved(function)[0].same == [False]


def test_nothing_is_moved_over_a_write() -> None:
    graph = torch.fx.Graph()
    mode = torch._subclasses.FakeTensorMode()
    a, b, t = (graph.placeholder(name) for name in "abt")

    def made(target: Any, *args: Any) -> Any:
        node = graph.call_function(target, args)
        with mode:
            node.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]))
        return node

    with mode:
        for node, rows in ((a, 5), (b, 7), (t, 12)):
            node.meta["val"] = torch.empty(2, rows, 8)
    joined = made(aten.cat.default, [made(aten.sin.default, a), made(aten.cos.default, b)], 1)
    write = made(aten.add_.Tensor, t, 1.0)
    graph.output(made(aten.mul.Tensor, joined, t))
    one = RopeOrder()
    one(graph)
    assert one.moved == 0
    graph.erase_node(write)
    one(graph)
    assert one.moved == 1


def test_options_go_with_others_and_are_one_call_s() -> None:
    before = config.get_config_copy()
    assert compile_options(("qkv",)) == {}
    assert compile_options((), {"epilogue_fusion": False}) == {"epilogue_fusion": False}
    own = compile_options(("qkv", "rope"), {"epilogue_fusion": False}, mode="max-autotune-no-cudagraphs")
    assert own["max_autotune"] is True
    assert own["epilogue_fusion"] is False
    theirs: list[int] = []
    both = compile_options(("rope",), {PLACE: lambda graph: theirs.append(len(graph.nodes))})
    assert isinstance(pass_in(both), RopeOrder)
    assert compile_options(("rope",), both) == both
    function = torch.compile(MOVED["pairs"], options=both)
    values = (torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(12, 8))
    with torch.no_grad():
        assert error(function(*values), MOVED["pairs"](*values)) <= EXACT
    assert len(theirs) == 1
    assert lines_of(both) == ["rewrite rope: 1 of 1 graphs changed, 1 concatenations moved"]
    assert config.get_config_copy() == before


def test_torch_s_cache_knows_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    values = (torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(12, 8))

    def run(names: tuple[str, ...]) -> list[str]:
        torch._dynamo.reset()
        options = compile_options(names)
        function = torch.compile(MOVED["halves"], options=options or None)
        with torch.no_grad():
            assert error(function(*values), MOVED["halves"](*values)) <= EXACT
        return lines_of(options)

    assert run(()) == []
    assert run(("rope",)) == ["rewrite rope: 1 of 1 graphs changed, 1 concatenations moved"]  # not the graph without it
    assert run(("rope",)) == ["rewrite rope: graphs are from torch's cache of compiled code, where it was done"]


def test_it_needs_compile() -> None:
    with pytest.raises(ConfigError, match=r"rewrites='qkv,rope': rope changes .* but compile=False; give compile=True"):
        parafuse.Config(rewrites="qkv,rope")
    assert parafuse.Config(rewrites="rope", compile=True).rewrites == "rope"
    one = JoinedLast(nn.Identity())
    one.install()
    assert isinstance(pass_in(one.options), RopeOrder)
    assert one.lines() == ["rewrite rope: 0 of 0 graphs changed, 0 concatenations moved"]
    one.remove()
