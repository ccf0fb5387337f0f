"""Where values come from: which arguments of a call each tensor depends on, seen operator by operator while the model
runs. A dependence is of values, never of shapes alone; what Python decides by a value counts for all that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Sources = frozenset[int]
"""Arguments, by leaf number."""
UNKNOWN: Sources = frozenset({-1})
"""Of what was made unseen."""
_BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_BLANK = (
    "lift_fresh",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
)
"""Operators that look at shapes alone, or make a tensor of numbers."""


@dataclass(frozen=True)
class Op:
    """One operator as it ran."""

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    results: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]


class WritesError(Exception):
    """A call would have written into a tensor that was there before it."""


class Flow(TorchDispatchMode):
    """Follows values through a call with these leaves. `keeps`: whether to keep an operator whose results have such
    sources; what it keeps stays in memory as long as this does. `unseen`: where tensors come from that were there
    before, or were made where this did not look. `may_write`: else a call that would write into one of these ends with
    WritesError before it does."""

    def __init__(
        self,
        leaves: list[Any],
        keeps: Callable[[Sources], bool] = lambda _: False,
        unseen: Sources = frozenset(),
        *,
        may_write: bool = True,
    ):
        super().__init__()
        self._unseen = unseen
        self._may_write = may_write
        self._sources: dict[int, tuple[Sources, StorageWeakRef]] = {}
        """By storage: a weak reference lets its memory go, but not its place, so that no other gets its sources."""
        self.decided: Sources = frozenset()
        """What Python has looked at the values of."""
        self._keeps = keeps
        self.ops: list[Op] = []
        self.leaves = leaves  # alive, so that a storage is its own
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                known = self._sources.get(storage_of(leaf) or 0)
                self.mark([leaf], {number, *(known[0] if known else ())})  # two may be views of one
        self._given = set(self._sources)

    def sources_of(self, x: Tensor) -> Sources:
        """What a value depends on; nothing where it is made of shapes."""
        key = storage_of(x)
        if key is None:
            return UNKNOWN
        return self._sources[key][0] if key in self._sources else self._unseen

    def mark(self, tree: Any, sources: Iterable[int]) -> None:
        """Tells where values come from that were made unseen."""
        for x in tree_leaves(tree):
            if isinstance(x, Tensor):
                self._note(x, frozenset(sources))

    def _was_there(self, x: Tensor) -> bool:
        key = storage_of(x)
        return key is not None and (key in self._given or key not in self._sources)

    def _note(self, x: Tensor, sources: Sources) -> None:
        key = storage_of(x)
        if key is not None:
            known = self._sources.get(key)
            self._sources[key] = (sources, known[1] if known else StorageWeakRef(x.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._may_write and any(self._was_there(x) for x in _written(func, args, kwargs)):
            raise WritesError
        out = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        found: Sources = self.decided
        is_blank = func.overloadpacket.__name__ in _BLANK
        if not is_blank:
            found = found.union(*map(self.sources_of, given))
        if _is_by_value(func, given):
            self.decided |= found
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        there = {storage_of(x) for x in given}
        for x in results:
            key = storage_of(x)
            self._note(x, found | self.sources_of(x) if key in there and not is_blank else found)
        if self._keeps(found):
            self.ops.append(Op(func, args, kwargs, results))
        return out


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator writes into."""
    schema: Any = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = dict(zip((x.name for x in schema.arguments), args, strict=False)) | kwargs
    into = [x.name for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write]
    return [x for x in tree_leaves([named.get(name) for name in into]) if isinstance(x, Tensor)]


def storage_of(x: Tensor) -> int | None:
    """The same for views of one tensor; None for one that wraps others, which must not be asked: tokens that are split
    would be gathered for it."""
    if type(x) not in (Tensor, nn.Parameter):
        return None
    try:
        return int(x.untyped_storage()._cdata)
    except RuntimeError:  # a tensor without storage of its own, such as a sparse one
        return None


def _is_by_value(func: Any, given: list[Tensor]) -> bool:
    """Whether the values of its arguments decide what Python, or a shape, sees."""
    if func.overloadpacket.__name__ in ("index", "index_put", "index_put_"):
        return any(x.dtype in (torch.bool, torch.uint8) for x in given[1:])
    return any(tag in func.tags for tag in _BY_VALUE)


class Slice:
    """The operators that lead to some tensors, to be run again with other arguments. Weights are those that `module`
    has then: offloading puts others in their places. `present`: lets the weights of modules come."""

    def __init__(
        self,
        flow: Flow,
        targets: list[Tensor],
        module: nn.Module,
        present: Callable[[list[nn.Module]], AbstractContextManager[None]] = lambda _: nullcontext(),
    ):
        self._targets, self._present = targets, present
        needed = {storage_of(x) for x in targets}
        self._ops: list[Op] = []
        for op in reversed(flow.ops):
            if any(storage_of(x) in needed for x in op.results):
                self._ops.append(op)
                needed |= {storage_of(x) for x in op.tensors()}
        self._ops.reverse()
        used = {id(x) for op in self._ops for x in op.tensors()}
        given = [(i, x) for i, x in enumerate(flow.leaves) if isinstance(x, Tensor) and id(x) in used]
        self._leaves = {id(x): number for number, x in given}
        self._kept_leaves = [x for _, x in given]  # alive, so that an id is its own
        self._weights = {
            id(x): (holder, name)
            for part in module.modules()
            for holder in (part._parameters, part._buffers)
            for name, x in holder.items()
            if x is not None and id(x) in used
        }
        holders = {id(holder) for holder, _ in self._weights.values()}
        self._parts = [part for part in module.modules() if {id(part._parameters), id(part._buffers)} & holders]
        self.is_pure = self._writes_to_its_own()

    def weights(self) -> AbstractContextManager[None]:
        """Inside, the weights that it reads are there."""
        return self._present(self._parts)

    def _writes_to_its_own(self) -> bool:
        """Whether what is written in place was made by an operator before: not an argument, nor a weight."""
        given = {storage_of(x) for x in self._kept_leaves}
        made: set[int] = set()
        for op in self._ops:
            schema: Any = getattr(op.func, "_schema", None)
            if schema is not None and schema.is_mutable:
                if any(id(x) not in made or storage_of(x) in given for x in op.results):
                    return False
            else:
                made |= {id(x) for x in op.results}
        return True

    def __call__(self, leaves: dict[int, Tensor]) -> list[Tensor]:
        """The tensors, with these leaves in the place of their own."""
        values: dict[int, Tensor] = {i: leaves[number] for i, number in self._leaves.items() if number in leaves}
        for i, (holder, name) in self._weights.items():
            weight = holder.get(name)
            if weight is None:
                raise RuntimeError(f"the weight {name} is gone")
            values[i] = weight

        def now(x: Any) -> Any:
            return values.get(id(x), x) if isinstance(x, Tensor) else x

        for op in self._ops:
            args, kwargs = tree_map(now, (op.args, op.kwargs))
            out = [x for x in tree_leaves(op.func(*args, **kwargs)) if isinstance(x, Tensor)]
            values.update((id(before), x) for before, x in zip(op.results, out, strict=True))
        return [values.get(id(x), x) for x in self._targets]
