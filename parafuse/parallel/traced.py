"""A block on Sharded tensors as one graph of what this rank does, rows and exchanges: traced by running the block's
Python once on fake tensors, then compiled. torch.compile alone cannot look through tensors that show another shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.errors import UnsupportedError, is_out_of_memory
from parafuse.log import note
from parafuse.parallel.block_plan import BlockPlan
from parafuse.parallel.held import Held
from parafuse.parallel.hooks import Forward
from parafuse.parallel.layout import Layout
from parafuse.parallel.shard import Sharded
from parafuse.parallel.tiers import Tally
from parafuse.parallel.whole_shapes import WholeShapes

MAX_GRAPHS = 64
"""Sizes and settings whose graphs are kept; the one that was used longest ago goes first."""
LITERALS = (bool, int, float, str, type(None), torch.dtype, torch.device)
"""Arguments whose values may be fixed in a graph, and tell which one it is."""


@dataclass(frozen=True)
class Rows:
    """What makes a Sharded of its local rows."""

    dim: int
    layout: Layout
    borrowed: bool
    source: int | None
    """The argument that it is a copy of, by leaf number."""


@dataclass
class Graph:
    """One compiled graph and what its results are."""

    run: Callable[..., list[Any]]
    spec: TreeSpec
    results: list[Rows | None]


class NotOneGraphError(Exception):
    """Why a block cannot be recorded."""


class TracedBlock:
    """One block: where its tensors stand, what else it holds, and its graphs as long as that is the same."""

    def __init__(self, block: nn.Module):
        self.held = Held(block)
        self.graphs: dict[Any, Graph | None] = {}
        """None: it is no single graph."""
        self._places: list[tuple[dict[str, Any], str]] = [
            (where, name)
            for module in block.modules()
            for where in (module._parameters, module._buffers)
            for name, tensor in where.items()
            if tensor is not None
        ]

    def tensors(self) -> list[Tensor]:
        return [where[name] for where, name in self._places]

    def put(self, tensors: list[Tensor]) -> None:
        for (where, name), tensor in zip(self._places, tensors, strict=True):
            where[name] = tensor


class TracedBlocks:
    """Graphs of one kind of block. Blocks whose records are the same, to the letter, share what is compiled."""

    def __init__(self, name: str, whole: WholeShapes, options: dict[str, Any], tally: Tally | None = None):
        self.name, self.whole, self.options, self.tally = name, whole, options, tally or Tally()
        by_hand = "compile it without fullgraph=True (it then runs uncompiled)"
        self.way_out = by_hand if tally is None else "leave compile=True out"
        self._blocks: dict[nn.Module, TracedBlock] = {}
        self._compiled: dict[Any, dict[Any, Callable[..., list[Any]]]] = {}
        """By sizes and settings, the newest last; then by record."""
        self._said: set[str] = set()

    def __call__(self, block: nn.Module, plan: BlockPlan, forward: Forward, leaves: list[Any], spec: TreeSpec) -> Any:
        traced = self._blocks.get(block)
        if traced is None or not traced.held.is_same(exactly=True):
            traced = self._blocks[block] = TracedBlock(block)
        graph = self._graph(traced, plan, forward, leaves, spec)
        if graph is None:
            return self.whole(plan, forward, leaves, spec)
        self.whole.measure(plan, leaves)
        with torch.no_grad():
            out: list[Any] = list(graph.run(traced.tensors(), _tensors(leaves)))
        for i, rows in enumerate(graph.results):
            if rows is not None:
                out[i] = Sharded(out[i], rows.dim, rows.layout, self.whole.ranks)
                out[i].borrowed = rows.borrowed
                out[i].source = None if rows.source is None else leaves[rows.source]
        return tree_unflatten(out, graph.spec)

    def _graph(
        self, traced: TracedBlock, plan: BlockPlan, forward: Forward, leaves: list[Any], spec: TreeSpec
    ) -> Graph | None:
        try:
            key = (
                str(spec),
                *settings(),
                *traced.held.of_the_call(),
                *_facts(leaves),
                *map(_fact, traced.tensors()),
            )
        except NotOneGraphError as why:
            return self._give_up(str(why))
        self._use(key)
        if key in traced.graphs:
            return traced.graphs[key]
        try:
            traced.graphs[key] = self._trace(traced, plan, forward, leaves, spec, self._compiled[key])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            why = str(error).strip().partition("\n")[0] or type(error).__name__
            traced.graphs[key] = self._give_up(why, error)
        return traced.graphs[key]

    def _use(self, key: Any) -> None:
        """Lets go what was used longest ago where there is too much."""
        self._compiled[key] = self._compiled.pop(key, {})
        while len(self._compiled) > MAX_GRAPHS:
            oldest = next(iter(self._compiled))
            del self._compiled[oldest]
            for block in self._blocks.values():
                block.graphs.pop(oldest, None)

    def _give_up(self, why: str, error: Exception | None = None) -> None:
        if self.options.get("fullgraph"):
            raise UnsupportedError(
                f"{self.name}: is no single graph on split tokens ({why}); {self.way_out}, or run it on one rank."
            ) from error
        if why not in self._said:
            note(f"{self.name}: runs uncompiled ({why})")
        self._said.add(why)

    def _trace(
        self,
        traced: TracedBlock,
        plan: BlockPlan,
        forward: Forward,
        leaves: list[Any],
        spec: TreeSpec,
        compiled: dict[Any, Callable[..., list[Any]]],
    ) -> Graph:
        if traced.held.unknown:
            raise NotOneGraphError(f"{traced.held.unknown} may change unseen")
        out_spec: list[TreeSpec] = []
        results: list[Rows | None] = []
        kept = traced.tensors()

        def run(weights: list[Tensor], tensors: list[Tensor]) -> list[Any]:
            rebuilt = _with_tensors(leaves, tensors)
            traced.put(weights)
            try:
                flat, found = tree_flatten(self.whole(plan, forward, rebuilt, spec))
            finally:
                traced.put(kept)
            out_spec[:], results[:] = [found], [_rows_of(x, rebuilt) for x in flat]
            return [x.local if isinstance(x, Sharded) else x for x in flat]

        trace = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)
        begun = time.perf_counter()
        try:
            with torch.no_grad():
                graph: GraphModule = trace(kept, _tensors(leaves))
            if not traced.held.is_same(exactly=True):
                raise NotOneGraphError("it changes what it holds when it is called")
        finally:
            traced.held.restore()
            self.tally.recorded_s += time.perf_counter() - begun
        constants = tuple(id(getattr(graph, str(n.target))) for n in graph.graph.nodes if n.op == "get_attr")
        inputs = tuple(map(_fact, (*kept, *_tensors(leaves))))
        record = (graph.code, constants, inputs)
        if record not in compiled:
            compiled[record] = torch.compile(graph, **self.options)  # it keeps the constants alive
        return Graph(compiled[record], out_spec[0], results)


def casts() -> tuple[Any, ...]:
    """To what dtypes functions cast by themselves."""
    return tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda"))


def settings() -> tuple[Any, ...]:
    """What else decides which functions run."""
    return (*casts(), torch.get_default_dtype(), torch.is_inference_mode_enabled())


def _tensors(leaves: list[Any]) -> list[Tensor]:
    """The tensors that a graph takes, each once."""
    found = [x.local if isinstance(x, Sharded) else x for x in leaves if isinstance(x, Tensor)]
    return list({id(x): x for x in found}.values())


def _with_tensors(leaves: list[Any], tensors: list[Tensor]) -> list[Any]:
    """The leaves with those tensors in the place of their own."""
    new = dict(zip((id(x) for x in _tensors(leaves)), tensors, strict=True))
    out: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Sharded):
            rows = Sharded(new[id(leaf.local)], leaf.token_dim, leaf.tokens, leaf.ranks)
            rows.borrowed = leaf.borrowed
            out.append(rows)
        else:
            out.append(new[id(leaf)] if isinstance(leaf, Tensor) else leaf)
    return out


def _rows_of(result: Any, leaves: list[Any]) -> Rows | None:
    if not isinstance(result, Sharded):
        return None
    source = next((i for i, leaf in enumerate(leaves) if leaf is result.source), None)
    # A copy of a tensor that nobody else has is nobody's copy.
    borrowed = result.borrowed and (result.source is None or source is not None)
    return Rows(result.token_dim, result.tokens, borrowed, source if borrowed else None)


def _facts(leaves: list[Any]) -> list[Any]:
    """What of the arguments is fixed in a graph: sizes, literals, and which tensors are the same one."""
    places: dict[int, int] = {}
    found: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            local = leaf.local if isinstance(leaf, Sharded) else leaf
            rows = (leaf.token_dim, leaf.tokens, leaf.borrowed) if isinstance(leaf, Sharded) else None
            found.append((rows, places.setdefault(id(local), len(places)), _fact(local)))
        elif isinstance(leaf, LITERALS):
            found.append((type(leaf), leaf))
        else:
            raise NotOneGraphError(f"an argument is a {type(leaf).__name__}, which may change unseen")
    return found


def _fact(x: Tensor) -> Any:
    return (x.shape, x.stride(), x.dtype, x.device)
