"""A block on Sharded tensors as one graph of what this rank does, rows and exchanges: traced by running the block's
Python once on fake tensors, then compiled. torch.compile alone cannot look through tensors that show another shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.errors import UnsupportedError
from parafuse.log import note
from parafuse.parallel.block_plan import BlockPlan
from parafuse.parallel.fingerprint import attributes
from parafuse.parallel.hooks import Forward
from parafuse.parallel.layout import Layout
from parafuse.parallel.shard import Sharded
from parafuse.parallel.whole_shapes import WholeShapes

MAX_GRAPHS = 64
"""Sizes and settings of one kind of block whose graphs are kept; further ones run uncompiled."""


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
    shared: bool
    """Whether it holds no tensor of the block it was traced from, so that others like it may use it."""


class BlockState:
    """Where a block keeps its tensors, and what else it holds: a graph is right as long as that is the same."""

    def __init__(self, block: nn.Module):
        self.places: list[tuple[dict[str, Any], str]] = [
            (where, name)
            for module in block.modules()
            for where in (module._parameters, module._buffers)
            for name, tensor in where.items()
            if tensor is not None
        ]
        self._held = [*attributes(block), *((m._modules, n, v) for m in block.modules() for n, v in m._modules.items())]

    def tensors(self) -> list[Tensor]:
        return [where[name] for where, name in self.places]

    def put(self, tensors: list[Tensor]) -> None:
        for (where, name), tensor in zip(self.places, tensors, strict=True):
            where[name] = tensor

    def is_same(self) -> bool:
        return all(where.get(name) is value for where, name, value in self._held)


class TracedBlocks:
    """Graphs of one kind of block, by sizes and settings."""

    def __init__(self, name: str, whole: WholeShapes, options: dict[str, Any]):
        self.name, self.whole, self.options = name, whole, options
        self._graphs: dict[Any, Graph | None] = {}
        self._states: dict[nn.Module, BlockState] = {}
        self._is_full = False

    def __call__(self, block: nn.Module, plan: BlockPlan, forward: Forward, leaves: list[Any], spec: TreeSpec) -> Any:
        state = self._states.get(block)
        if state is None:
            state = self._states[block] = BlockState(block)
        elif not state.is_same():
            for key in [key for key in self._graphs if key[0] is block]:
                del self._graphs[key]
            state = self._states[block] = BlockState(block)
        graph = self._graph(block, state, plan, forward, leaves, spec)
        if graph is None:
            return self.whole(plan, forward, leaves, spec)
        self.whole.measure(plan, leaves)
        out: list[Any] = list(graph.run(state.tensors(), _tensors(leaves)))
        for i, rows in enumerate(graph.results):
            if rows is not None:
                out[i] = Sharded(out[i], rows.dim, rows.layout, self.whole.ranks)
                out[i].borrowed = rows.borrowed
                out[i].source = None if rows.source is None else leaves[rows.source]
        return tree_unflatten(out, graph.spec)

    def _graph(
        self, block: nn.Module, state: BlockState, plan: BlockPlan, forward: Forward, leaves: list[Any], spec: TreeSpec
    ) -> Graph | None:
        key = (str(spec), *_settings(), *map(_fact, leaves))
        for owner in (None, block):
            if (owner, key) in self._graphs:
                return self._graphs[owner, key]
        if len(self._graphs) >= MAX_GRAPHS:
            if not self._is_full:
                note(f"{self.name}: more than {MAX_GRAPHS} sizes or settings; new ones run uncompiled")
            self._is_full = True
            return None
        graph = None
        try:
            graph = self._trace(state, plan, forward, leaves, spec)
        except UnsupportedError:
            raise
        except Exception as error:
            self._not_one_graph(error)
        self._graphs[None if graph is not None and graph.shared else block, key] = graph
        return graph

    def _not_one_graph(self, error: Exception) -> None:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        if self.options.get("fullgraph"):
            raise UnsupportedError(
                f"{self.name}: is no single graph on split tokens ({why}); compile it without fullgraph=True (it then "
                "runs uncompiled), or run it on one rank."
            ) from error
        note(f"{self.name}: runs uncompiled ({why})")

    def _trace(self, state: BlockState, plan: BlockPlan, forward: Forward, leaves: list[Any], spec: TreeSpec) -> Graph:
        out_spec: list[TreeSpec] = []
        results: list[Rows | None] = []
        kept = state.tensors()

        def run(weights: list[Tensor], tensors: list[Tensor]) -> list[Any]:
            rebuilt = _with_tensors(leaves, tensors)
            state.put(weights)
            try:
                flat, found = tree_flatten(self.whole(plan, forward, rebuilt, spec))
            finally:
                state.put(kept)
            out_spec[:], results[:] = [found], [_rows_of(x, rebuilt) for x in flat]
            return [x.local if isinstance(x, Sharded) else x for x in flat]

        trace = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)
        with torch.no_grad():
            graph: GraphModule = trace(kept, _tensors(leaves))
        constants = any(node.op == "get_attr" for node in graph.graph.nodes)
        return Graph(torch.compile(graph, **self.options), out_spec[0], results, shared=not constants)


def _settings() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


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
            rows.borrowed, rows.source = leaf.borrowed, None
            out.append(rows)
        else:
            out.append(new[id(leaf)] if isinstance(leaf, Tensor) else leaf)
    return out


def _rows_of(result: Any, leaves: list[Any]) -> Rows | None:
    if not isinstance(result, Sharded):
        return None
    source = next((i for i, leaf in enumerate(leaves) if leaf is result.source), None)
    return Rows(result.token_dim, result.tokens, result.borrowed, source if result.source is not None else None)


def _fact(leaf: Any) -> Any:
    """What of an argument is fixed in a graph."""
    if isinstance(leaf, Sharded):
        return (leaf.token_dim, leaf.tokens, leaf.borrowed, _fact(leaf.local))
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    return (type(leaf), leaf)
