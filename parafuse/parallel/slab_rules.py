"""What each operator of torch does with slabs: the table of rules, and the rules of elementwise operators.

Rules are by operator of `torch.ops.aten`, so that every spelling of it (function, method, module, einsum) is met once.
Each gives exactly what the operator gives on whole tensors. What has no rule and is no composition of operators is
refused; which operator it is depends on the model and the shapes alone, so all ranks refuse it alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from parafuse.parallel.slab import Slab, empty, lead_of, refuse
from parafuse.parallel.slab_sums import SUMS, attention, linear
from parafuse.parallel.slab_views import VIEWS
from parafuse.parallel.slab_windows import WINDOWS, stft


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator with a slab among its arguments."""
    name = func.overloadpacket.__name__ if func.namespace == "aten" else ""
    rule = RULES.get(name)
    if any(argument.is_out for argument in func._schema.arguments):
        raise refuse(str(func.overloadpacket), "with out=")
    if rule is None and torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags:
        rule = pointwise
    if rule is not None:
        return rule(func, args, kwargs)
    result = func.decompose(*args, **kwargs)
    if result is NotImplemented:
        raise refuse(str(func.overloadpacket))
    return result


class _OneRow(Exception):
    """A slab of a single row meets a longer tensor."""


def pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise operators with broadcasting, in place or not: of whole tensors each rank takes its rows."""
    operands = [*args, *kwargs.values()]
    target = args[0] if func._schema.is_mutable else None
    if target is not None and not isinstance(target, Slab):
        raise refuse(str(func.overloadpacket), "in place of a tensor that every rank has whole")
    if target is not None and target.is_copy:
        raise refuse(str(func.overloadpacket), "in place of rows that had to be copied")
    lead = target if target is not None else lead_of(operands)
    from_right = lead.ndim - lead.cut.dim
    sizes = [x.shape[-from_right] for x in operands if isinstance(x, Tensor) and x.ndim >= from_right]
    if lead.cut.size == 1 and max(sizes) > 1:
        return func(*(x.whole() if x is lead else x for x in args), **kwargs)

    def rows(x: Any) -> Any:
        if isinstance(x, Slab):
            return _rows_like(x, lead, func)
        if isinstance(x, Tensor) and x.ndim >= from_right and x.shape[-from_right] == lead.cut.size != 1:
            return lead.cut.rows(x, x.ndim - from_right, lead.ranks.rank)
        return x

    result = func(*(rows(a) for a in args), **{k: rows(v) for k, v in kwargs.items()})
    if target is not None:
        return target
    if isinstance(result, Tensor):
        return lead.like(result, lead.cut.at(result.ndim - from_right))
    return tuple(lead.like(r, lead.cut.at(r.ndim - from_right)) for r in result)


def _rows_like(x: Slab, lead: Slab, func: Any) -> Tensor:
    if x is lead:
        return x.local
    if x.cut.size == 1:
        return x.whole()
    same = x.ndim - x.cut.dim == lead.ndim - lead.cut.dim
    if not same or (x.cut.outer, x.cut.total) != (lead.cut.outer, lead.cut.total):
        raise refuse(str(func.overloadpacket), f"on tensors that are split as {lead.cut} and as {x.cut}")
    return x.recut(lead.cut.bounds).local


def unary(func: Any, args: Any, kwargs: Any) -> Any:
    """Copies and casts, and new tensors of the same shape."""
    x, *rest = args
    return x.like(func(x.local, *rest, **kwargs))


def alias(func: Any, args: Any, kwargs: Any) -> Any:
    out = unary(func, args, kwargs)
    out.is_copy = args[0].is_copy
    return out


def new(func: Any, args: Any, kwargs: Any) -> Any:
    """new_zeros and its kind: every rank has them whole."""
    return func(args[0].local, *args[1:], **kwargs)


def drawn(func: Any, args: Any, kwargs: Any) -> Any:
    """Random numbers, drawn for the whole tensor as one device would, then cut."""
    x, *rest = args
    whole = func(empty(x.shape, x.local), *rest, **kwargs)
    rows = x.cut.rows(whole, x.cut.dim, x.ranks.rank)
    if not func._schema.is_mutable:
        return x.like(rows.clone())
    if x.is_copy:
        raise refuse(str(func.overloadpacket), "in place of rows that had to be copied")
    x.local.copy_(rows)
    return x


def assign(func: Any, args: Any, kwargs: Any) -> Any:
    """x[index] = value. A row of the split dim by its number would be a copy of it on other ranks."""
    x, index, _ = args
    if not isinstance(x, Slab):
        raise refuse("Tensor.__setitem__", "into a tensor that every rank has whole")
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, (Tensor, list)) for i in entries):
        raise refuse("Tensor.__setitem__", "by a mask or a list of numbers")
    taken = sum(i is not None and i is not Ellipsis for i in entries)
    dim = 0
    for entry in entries:
        if entry is Ellipsis:
            dim += x.ndim - taken
        elif entry is not None:
            if dim == x.cut.dim and not isinstance(entry, slice):
                raise refuse("Tensor.__setitem__", "at one row of the split dim")
            dim += 1
    return NotImplemented


RULES: dict[str, Any] = {**VIEWS, **WINDOWS, **SUMS}
RULES |= dict.fromkeys("clone _to_copy empty_like zeros_like ones_like full_like contiguous".split(), unary)
RULES |= dict.fromkeys("detach alias lift_fresh view_as_real view_as_complex".split(), alias)
RULES |= dict.fromkeys("new_empty new_zeros new_ones new_full new_empty_strided".split(), new)
RULES |= dict.fromkeys("rand_like randn_like randint_like normal_ uniform_ exponential_ bernoulli_".split(), drawn)
RULES |= dict.fromkeys("copy_ fill_ zero_".split(), pointwise)

FUNCTIONS: dict[Any, Any] = {
    functional.linear: linear,
    functional.scaled_dot_product_attention: attention,
    Tensor.__setitem__: assign,
    torch.stft: stft,
}
"""Functions that are met before torch takes them apart."""
