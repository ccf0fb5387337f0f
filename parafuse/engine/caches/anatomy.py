"""What parts a block has: found by one run of it with attention replaced by zeros, so that no model is known here.

A part is a module with two weight matrices or more. It is attention where one of torch's scaled-dot-product attentions
runs in it, and in no such module inside of it; it is feed-forward where it stands beside attention, runs none, and maps
one tensor to one of the same shape. Cross-attention has no argument that reaches both its queries and its values.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from parafuse.engine.caches.schedules import CROSS, FEED_FORWARD, SELF, TEMPORAL
from parafuse.engine.probe import owned
from parafuse.kernels.attention import Call
from parafuse.parallel.attention_mode import AttentionMode
from parafuse.parallel.held import Held
from parafuse.parallel.hooks import Forward

TIME = re.compile(r"temp|motion")
"""In the name of a module whose self-attention runs over frames."""
_CROSS = re.compile(r"cross|attn2")


@dataclass(frozen=True)
class Part:
    """One part of a block."""

    number: int
    """Its place among the candidates."""
    kind: str
    sites: tuple[int, ...]
    """The attention calls of the block that are made in it."""
    is_written: bool
    """The block writes into what the part gives."""


@dataclass
class Visit:
    """One call of a candidate."""

    number: int
    args: Any
    kwargs: Any
    parent: Visit | None
    sites: list[int] = field(default_factory=list[int])
    """Attention calls in it, and in no candidate inside of it."""
    all_sites: list[int] = field(default_factory=list[int])
    result: Any = None
    version: int | None = None


class Inspected(Protocol):
    """A block."""

    path: str
    block: nn.Module
    plain: Forward
    """Its forward without what parafuse puts on it."""
    modules: dict[str, nn.Module]
    """Its candidates."""


def candidates(block: nn.Module) -> dict[str, nn.Module]:
    """Name -> module that may be a part, in order."""
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        matrices = sum(p.ndim > 1 for p in module.parameters()) if name else 0
        if matrices > 1 and type(module).forward is not nn.Module.forward and _is_callable(module):
            found[name] = module
    return found


def may_have(kind: str, block: nn.Module) -> bool:
    """Whether a block may have parts of a kind, as far as its modules' names and settings tell before a call."""
    named = candidates(block)
    if kind != CROSS:
        return bool(named)
    for name, module in named.items():
        said: Any = getattr(module, "is_cross_attention", None)
        if said or (said is None and _CROSS.search(f"{name} {type(module).__name__}".lower())):
            return True
    return False


def parts_of(host: Inspected, leaves: list[Any], spec: TreeSpec) -> tuple[Part, ...]:
    """The parts of a block that is called with these (whole) arguments. Local: no communication; the block runs once,
    each attention a few times more. What the block changes in itself is put back."""
    held = Held(host.block)
    modules = list(host.modules.items())
    try:
        with torch.no_grad():
            visits = _visits([module for _, module in modules], host.plain, leaves, spec)
            found = []
            for visit in visits:
                name, module = modules[visit.number]
                kind = _kind(visit, visits, module)
                if kind == SELF and TIME.search(f"{host.path}.{name}"):
                    kind = TEMPORAL
                if kind and _is_plain(visit.result):
                    found.append((visit, kind))
    finally:
        held.restore()
    numbers = dict.fromkeys(visit.number for visit, _ in found)
    parts = []
    for number in numbers:
        own = [(visit, kind) for visit, kind in found if visit.number == number]
        sites = tuple(site for visit, _ in own for site in visit.sites)
        parts.append(Part(number, own[0][1], sites, any(_is_written(visit) for visit, _ in own)))
    return tuple(parts)


def _visits(modules: list[nn.Module], forward: Forward, leaves: list[Any], spec: TreeSpec) -> list[Visit]:
    """One run of a block: the calls of its candidates, in the order in which they end."""
    inside: list[Visit] = []
    ended: list[Visit] = []

    def enters(number: int) -> Callable[..., None]:
        def told(module: nn.Module, args: Any, kwargs: Any) -> None:
            inside.append(Visit(number, args, kwargs, inside[-1] if inside else None))

        return told

    def leaves_it(module: nn.Module, args: Any, result: Any) -> None:
        visit = inside.pop()
        visit.result, visit.version = result, _version(result)
        ended.append(visit)

    def attend(site: int, q: Tensor, k: Tensor, v: Tensor, call: Call, given: dict[str, Any]) -> Tensor:
        if inside:
            inside[-1].sites.append(site)
        for visit in inside:
            visit.all_sites.append(site)
        return _nothing(q, v)

    hooks = [m.register_forward_pre_hook(enters(i), with_kwargs=True) for i, m in enumerate(modules)]
    hooks += [m.register_forward_hook(leaves_it) for m in modules]
    args, kwargs = tree_unflatten([owned(leaf) for leaf in leaves], spec)
    try:
        with AttentionMode(attend):
            forward(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return ended


def _kind(visit: Visit, visits: list[Visit], module: nn.Module) -> str:
    """Of a candidate's call; empty where it is no part."""
    if visit.sites:
        return SELF if _attends_to_itself(visit, module) else CROSS
    if visit.all_sites or "norm" in type(module).__name__.lower():
        return ""
    has_attention_beside = any(other.parent is visit.parent and other.sites for other in visits)
    tensors = [x for x in tree_leaves((visit.args, visit.kwargs)) if isinstance(x, Tensor)]
    is_map = isinstance(visit.result, Tensor) and [x.shape for x in tensors] == [visit.result.shape]
    return FEED_FORWARD if has_attention_beside and is_map else ""


def _attends_to_itself(visit: Visit, module: nn.Module) -> bool:
    """Whether an argument reaches both queries and values. Positions reach queries and keys, never values."""
    leaves, spec = tree_flatten((visit.args, visit.kwargs))
    base = _queries_and_values(module, leaves, spec)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.ndim < 2:
            continue
        noise = torch.randn(leaf.shape, generator=torch.Generator("cpu").manual_seed(i)).to(leaf.device, leaf.dtype)
        given = [leaf + noise if other is leaf else other for other in leaves]  # some are given a stream twice
        changed = _queries_and_values(module, given, spec)
        if len(changed) == len(base) and any(
            not torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])
            for a, b in zip(base, changed, strict=True)
            if a[0].shape == b[0].shape and a[1].shape == b[1].shape
        ):
            return True
    return False


def _queries_and_values(module: nn.Module, leaves: list[Any], spec: TreeSpec) -> list[tuple[Tensor, Tensor]]:
    """Of each attention in one run of a part."""
    seen: list[tuple[Tensor, Tensor]] = []

    def attend(site: int, q: Tensor, k: Tensor, v: Tensor, call: Call, given: dict[str, Any]) -> Tensor:
        seen.append((q.clone(), v.clone()))
        return _nothing(q, v)

    args, kwargs = tree_unflatten([owned(leaf) for leaf in leaves], spec)
    with AttentionMode(attend):
        module(*args, **kwargs)
    return seen


def _nothing(q: Tensor, v: Tensor) -> Tensor:
    """Stands for the result of an attention."""
    return q.new_zeros((*q.shape[:-1], v.shape[-1]))


def _is_plain(result: Any) -> bool:
    """A tensor, or a tuple of tensors and what is missing."""
    items = result if isinstance(result, tuple) else (result,)
    return any(isinstance(x, Tensor) for x in items) and all(x is None or isinstance(x, Tensor) for x in items)


def _version(result: Any) -> int | None:
    """Counts changes in place; None where tensors do not tell (of inference mode)."""
    tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    return None if any(x.is_inference() for x in tensors) else sum(x._version for x in tensors)


def _is_written(visit: Visit) -> bool:
    return visit.version is None or _version(visit.result) != visit.version


def _is_callable(module: nn.Module) -> bool:
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict))
