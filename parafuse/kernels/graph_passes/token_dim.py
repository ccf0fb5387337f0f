"""Where one dim of a tensor is after an operator that works on each of its indices by itself: the rules by which a
concatenation may be done after an operator instead of before it, with the same values."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
SIZED = (*VIEWS, aten.expand.default)
"""Operators whose second argument has the sizes of the result."""
COPIES = (aten.clone.default,)

Dims = Mapping[Node, int]
"""Node -> the dim that is looked at."""


def value(node: Node) -> Any:
    """What a node gives, as a fake tensor (or several); None where that is not known."""
    return node.meta.get("val")


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same at every length that the graph is for."""
    return bool(statically_known_true(a == b))


def is_pointwise(node: Node) -> bool:
    """Whether it computes each element of its result from the elements at the same place."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.pointwise in target.tags
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not target._schema.is_mutable
        and isinstance(value(node), Tensor)
    )


def computes(node: Node) -> bool:
    """Whether it is work: no view, and no copy of one."""
    return is_pointwise(node) and node.target not in COPIES


def dim_after(node: Node, dims: Dims) -> int | None:
    """The dim of `node`'s result that goes on from that dim of its inputs, each index by itself; None where it is not
    so, or not known. At least one input must be among `dims`."""
    if node.op != "call_function":
        return None
    if is_pointwise(node):
        return _after_pointwise(node, dims)
    rule = _RULES.get(node.target)
    if rule is None or not _is_known(node):
        return None
    if node.target is aten.cat.default:
        return _after_cat(node, dims)
    source = node.args[0]
    return rule(node, source, dims[source]) if isinstance(source, Node) and source in dims else None


def place_in(other: Node, node: Node, dim: int) -> int | None:
    """The dim of an operand that stands under dim `dim` of a pointwise result; None where it has none there, or one of
    size 1."""
    x = value(other)
    place = x.ndim - (value(node).ndim - dim)
    return None if place < 0 or same(x.shape[place], 1) else place


def source_of(node: Node) -> Node:
    """What a view is a view of, in the end."""
    while node.target in _RULES and node.target is not aten.cat.default:
        source = node.args[0]
        if not isinstance(source, Node):
            break
        node = source
    return node


def _is_known(node: Node) -> bool:
    return value(node) is not None and all(value(source) is not None for source in node.all_input_nodes)


def _after_pointwise(node: Node, dims: Dims) -> int | None:
    if not _is_known(node):
        return None
    found = {value(node).ndim - value(x).ndim + dims[x] for x in node.all_input_nodes if x in dims}
    if len(found) != 1:
        return None
    dim = found.pop()
    length = value(node).shape[dim]
    tensors = [x for x in node.all_input_nodes if isinstance(value(x), Tensor)]
    places = [(x, place_in(x, node, dim)) for x in tensors]
    fits = all(place is None or same(value(x).shape[place], length) for x, place in places)
    return dim if fits and all(place is not None for x, place in places if x in dims) else None


def _after_cat(node: Node, dims: Dims) -> int | None:
    """Along another dim, of parts that all go on from it."""
    parts = cast("list[Node]", node.args[0])
    along = _dim_of(node, 1, value(node).ndim)
    found = {dims.get(part) for part in parts}
    dim = found.pop()
    return dim if not found and dim != along else None


def _after_view(node: Node, source: Node, dim: int) -> int | None:
    """Where as many elements come before it as did, it is the same dim."""
    old, new = value(source).shape, value(node).shape
    before = math.prod(old[:dim])
    for place, size in enumerate(new):
        if same(size, old[dim]) and same(math.prod(new[:place]), before):
            return place
    return None


def _after_expand(node: Node, source: Node, dim: int) -> int | None:
    place = dim + value(node).ndim - value(source).ndim
    return place if same(value(node).shape[place], value(source).shape[dim]) else None


def _after_unsqueeze(node: Node, source: Node, dim: int) -> int | None:
    return dim + (_dim_of(node, 1, value(node).ndim) <= dim)


def _after_permute(node: Node, source: Node, dim: int) -> int | None:
    order = [place % value(source).ndim for place in cast("list[int]", node.args[1])]
    return order.index(dim)


def _after_taking(node: Node, source: Node, dim: int) -> int | None:
    """One index of another dim, or each of them."""
    taken = _dim_of(node, 1, value(source).ndim)
    return None if taken == dim else dim - (taken < dim)


def _after_cutting(index: int) -> Callable[[Node, Node, int], int | None]:
    """Of another dim, which is argument `index`."""

    def rule(node: Node, source: Node, dim: int) -> int | None:
        return dim if _dim_of(node, index, value(source).ndim) != dim else None

    return rule


def _after_item(node: Node, source: Node, dim: int) -> int | None:
    return dim  # of a tuple of tensors that are alike


def _dim_of(node: Node, index: int, ndim: int) -> int:
    given = node.args[index] if len(node.args) > index else node.kwargs.get("dim", 0)
    return cast("int", given) % ndim


_RULES: dict[Any, Callable[[Node, Node, int], int | None]] = {
    **dict.fromkeys(VIEWS, _after_view),
    aten.expand.default: _after_expand,
    aten.unsqueeze.default: _after_unsqueeze,
    aten.permute.default: _after_permute,
    aten.unbind.int: _after_taking,
    aten.select.int: _after_taking,
    aten.slice.Tensor: _after_cutting(1),
    aten.split.Tensor: _after_cutting(2),
    aten.split_with_sizes.default: _after_cutting(2),
    aten.cat.default: _after_item,
    operator.getitem: _after_item,
}
