"""Concatenation after rotary embedding instead of before it.

Blocks of two streams norm queries and keys of each stream, join them, then turn them by position: so the joined tensor
is written and read once more than if each stream were turned by itself and joined last, which is then no work of its
own. The pass moves a concatenation below the pointwise work that follows it, where every operator on the way works on
each index of the joined dim by itself (`token_dim`), so that every value is the same; tables over the joined dim are
cut. It acts only where the norm's kernels can then do it all: a stream is computed by pointwise work (the output of a
product must be read in any case), and one tensor alone is needed joined.
"""

from __future__ import annotations

import copy
import operator
from typing import Any, cast

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._prims_common import is_contiguous_or_false
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from parafuse.kernels.graph_passes import token_dim
from parafuse.kernels.graph_passes.token_dim import (
    SIZED,
    computes,
    dim_after,
    is_pointwise,
    place_in,
    source_of,
    value,
)

aten = torch.ops.aten
MAX_STREAMS = 8
"""Parts of one concatenation; Inductor writes no more than that into one buffer without copies."""


class RopeOrder(CustomGraphPass):
    """The pass. It has no state but counts; what it does depends on a graph alone."""

    def __init__(self) -> None:
        self.graphs = 0
        """Graphs that it was given. One from torch's cache of compiled code is not given: it holds what was done."""
        self.changed = 0
        """Graphs in which it moved something."""
        self.moved = 0
        """Concatenations that it moved."""
        self.asked = 0
        """How often torch's cache asked for its version; it does so several times for a graph."""

    def __call__(self, graph: Graph) -> None:
        moved = 0
        for node in list(graph.nodes):
            if node.target is aten.cat.default and not node._erased:
                region = _region(node)
                if region is not None:
                    region.rewrite()
                    moved += 1
        self.graphs += 1
        self.changed += moved > 0
        self.moved += moved

    def uuid(self) -> Any:
        """By which torch's cache of compiled code tells versions of this pass."""
        self.asked += 1
        return get_hash_for_files((__file__, token_dim.__file__))


class _Region:
    """A concatenation and the work that it is moved below."""

    def __init__(self, cat: Node, dims: dict[Node, int], last: Node):
        self.cat, self.dims, self.last = cat, dims, last
        self.graph: Graph = cat.graph
        self._parts: dict[Node, list[Node]] = {cat: list(cast("list[Node]", cat.args[0]))}
        self._cuts: dict[tuple[Node, int], list[Node]] = {}
        self._lengths: list[Any] = []

    def rewrite(self) -> None:
        for user in list(self.cat.users):
            if _measures(user):
                self._measure_streams(user)
        with self.graph.inserting_before(self.last):
            self._lengths = [self._size(part, self.dims[self.cat]) for part in self._parts[self.cat]]
            for node in self.dims:
                if node is not self.cat:
                    self._parts[node] = [self._copy(node, stream) for stream in range(len(self._lengths))]
            joined = self._joined()
        self.last.replace_all_uses_with(joined)
        for node in reversed(self.dims):
            self.graph.erase_node(node)

    def _joined(self) -> Node:
        """The streams as one, laid out as the last result was."""
        streams, dim, order = self._parts[self.last], self.dims[self.last], _order(value(self.last)) or []
        if order == sorted(order):
            return self._call(self.last, aten.cat.default, (streams, dim), {})
        laid_out = [self._call(self.last, aten.permute.default, (stream, order), {}) for stream in streams]
        joined = self._call(self.last, aten.cat.default, (laid_out, order.index(dim)), {})
        back = [order.index(place) for place in range(len(order))]
        return self._call(self.last, aten.permute.default, (joined, back), {})

    def _measure_streams(self, measure: Node) -> None:
        """A size of what was joined, from those of the streams."""
        dim = cast("int", measure.args[1]) % value(self.cat).ndim
        streams = self._parts[self.cat]
        with self.graph.inserting_before(measure):
            size = self._size(streams[0], dim)
            if dim == self.dims[self.cat]:
                for stream in streams[1:]:
                    size = self._call(measure, operator.add, (size, self._size(stream, dim)), {})
        measure.replace_all_uses_with(cast("Node", size))
        self.graph.erase_node(measure)

    def _size(self, part: Node, dim: int) -> int | Node:
        """A number, or a node of the graph where it is a symbol."""
        size = value(part).shape[dim]
        return size if isinstance(size, int) else self._call(part, aten.sym_size.int, (part, dim), {})

    def _copy(self, node: Node, stream: int) -> Node:
        """The same work on one stream."""
        dim = self.dims[node]

        def of_stream(source: Node) -> Node:
            if source in self._parts:
                return self._parts[source][stream]
            place = place_in(source, node, dim) if is_pointwise(node) and isinstance(value(source), Tensor) else None
            return source if place is None else self._cut(source, place)[stream]

        args: Any = map_arg(node.args, of_stream)
        if node.target in SIZED:
            sizes = list(cast("list[Any]", args[1]))
            sizes[dim] = self._lengths[stream]
            args = (args[0], sizes)
        return self._call(node, node.target, args, map_arg(node.kwargs, of_stream))

    def _cut(self, table: Node, dim: int) -> list[Node]:
        if (table, dim) not in self._cuts:
            cut = self._call(table, aten.split_with_sizes.default, (table, list(self._lengths), dim), {})
            items = [self._call(table, operator.getitem, (cut, i), {}) for i in range(len(self._lengths))]
            self._cuts[table, dim] = items
        return self._cuts[table, dim]

    def _call(self, like: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """A new node with what is known of `like`, and the value that it gives."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta = copy.copy(like.meta)
        with value(self.cat).fake_mode:
            node.meta["val"] = target(*map_arg(args, value), **map_arg(kwargs, value))
        return node


def _region(cat: Node) -> _Region | None:
    """What follows a concatenation and may be done before it; None where that changes a value, or saves nothing."""
    if not _is_fit(cat):
        return None
    streams = cast("list[Node]", cat.args[0])
    along = cast("int", cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)) % value(cat).ndim
    dims = {cat: along}
    node = cat.next
    while node.op != "root":
        if any(source in dims for source in node.all_input_nodes):
            dim = dim_after(node, dims)
            if dim is not None:
                dims[node] = dim
        node = node.next
    _drop_views_at_the_end(dims)
    needed = [node for node in dims if any(user not in dims and not _measures(user, cat) for user in node.users)]
    if len(needed) != 1 or needed[0] is cat or not any(map(_is_computed, streams)):
        return None
    last = needed[0]
    if _order(value(last)) is None or _writes_between(cat, last):
        return None
    return _Region(cat, dims, last)


def _is_fit(cat: Node) -> bool:
    """A concatenation of several tensors whose sizes are known, as numbers or as symbols of the inputs."""
    streams = cast("list[Node]", cat.args[0])
    values = [value(one) for one in (cat, *streams)]
    if not 1 < len(streams) <= MAX_STREAMS or not all(isinstance(x, Tensor) for x in values):
        return False
    return all(x.ndim == values[0].ndim and x.dtype == values[0].dtype for x in values)


def _order(x: Tensor) -> list[int] | None:
    """The order of dims in which it lies in memory without gaps; None where there is none."""
    dims = list(range(x.ndim))
    if is_contiguous_or_false(x):
        return dims
    if not all(isinstance(stride, int) for stride in x.stride()):
        return None
    dims.sort(key=lambda dim: (x.stride(dim), x.shape[dim]), reverse=True)
    return dims if is_contiguous_or_false(x.permute(dims)) else None


def _drop_views_at_the_end(dims: dict[Node, int]) -> None:
    """Leaves what work comes after: a view of what was joined costs nothing."""
    kept: set[Node] = set()
    for node in reversed(dims):
        if computes(node) or any(user in kept for user in node.users):
            kept.add(node)
    for node in [node for node in dims if node not in kept]:
        del dims[node]


def _measures(user: Node, cat: Node | None = None) -> bool:
    """Whether it takes a size (of that node)."""
    return user.target is aten.sym_size.int and (cat is None or user.args[0] is cat)


def _is_computed(stream: Node) -> bool:
    """Whether its own kernel can write it into its place of the joined tensor."""
    return computes(source_of(stream))


def _writes_between(first: Node, last: Node) -> bool:
    """Whether a node changes a tensor in place: what is read later may be another value."""
    node = first.next
    while node is not last:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return True
        node = node.next
    return False
