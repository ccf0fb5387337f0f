"""Tensors that are not there yet: what a pipeline does with a denoiser's result is recorded until a value is needed.

Between two calls of the denoiser pipelines slice, cast and combine its results. A `Placeholder` lets them: it shows
shape, dtype and device, and records views and arithmetic. Anything else asks for the value, which settles all that is
open (an exchange that every rank makes at the same point, since all run the same pipeline).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from parafuse.parallel.metadata import METADATA
from parafuse.parallel.nest import leaves_of

Family = list["weakref.ref[Placeholder]"]


class Placeholder(Tensor):
    """The value of `make()`, which is called once, when it is first needed."""

    make: Callable[[], Tensor]
    value: Tensor | None
    families: list[Family]
    """All that was recorded from the same results: worked out before one of their values may be written into."""

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, make: Callable[[], Tensor]) -> Placeholder:
        self = Tensor._make_wrapper_subclass(cls, like.shape, like.stride(), dtype=like.dtype, device=device)
        self.make, self.value, self.families = make, None, []
        return self

    def needed(self) -> Tensor:
        """The value. Collective while it is open."""
        if self.value is None:
            self.value = self.make()
            self.make = _no_value
        return self.value

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Placeholder({tuple(self.shape)}, {self.dtype})" if self.value is None else repr(self.value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA or func is Tensor.stride:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func.__name__ in _RECORDED and "out" not in kwargs:
            return _record(func, args, kwargs)
        name = func.__name__
        if name.startswith("__i") or name == "__setitem__" or not name.endswith("__"):
            _work_out((args, kwargs))  # it may write into a value
        return func(*settled(args), **settled(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            _work_out((args, kwargs))
        return func(*settled(args), **settled(kwargs or {}))


def _work_out(tree: Any) -> None:
    """Gives their values to all that was recorded with placeholders of a nest. Collective where one is open."""
    for x in tree_leaves(tree):
        for family in x.families if isinstance(x, Placeholder) else ():
            members = [reference() for reference in family]
            family.clear()
            for member in members:
                if member is not None:
                    member.needed()


def _no_value() -> Tensor:
    """Stands for `make` once the value is there, so that nothing it holds is kept."""
    raise RuntimeError("the value is there already")


def settled(tree: Any) -> Any:
    """The same nest with values in the place of placeholders. Collective where one is open.

    A nest without any is given back as it is: some output classes cannot be made anew from their leaves."""
    if not any(isinstance(x, Placeholder) for x in leaves_of(tree)):
        return tree
    return tree_map_only(Placeholder, lambda x: x.needed(), tree)


def is_open(x: Any) -> bool:
    return isinstance(x, Placeholder) and x.value is None


def _record(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` of placeholders and numbers as placeholders; of other tensors, or where nothing is open, its value."""
    leaves = tree_leaves((args, kwargs))
    mixed = any(isinstance(x, Tensor) and not isinstance(x, Placeholder) and x.ndim for x in leaves)
    first = next((x for x in leaves if is_open(x)), None)
    if mixed or first is None:
        _work_out((args, kwargs))  # what it gives may share memory with a value
        return func(*settled(args), **settled(kwargs))
    args, kwargs = tree_map(_fixed, (args, kwargs))
    try:
        shapes = _shapes(func, args, kwargs, first.device)
    except Exception:  # it needs values, or goes to another device
        return func(*settled(args), **settled(kwargs))
    whole: list[Any] = []

    def result() -> Any:
        if not whole:
            whole.append(func(*settled(args), **settled(kwargs)))
        return whole[0]

    if isinstance(shapes, Tensor):
        made = [Placeholder(shapes, first.device, result)]
    else:
        made = [Placeholder(part, first.device, lambda i=i: result()[i]) for i, part in enumerate(shapes)]
    families = {id(f): f for x in leaves if isinstance(x, Placeholder) for f in (x.families or [list[Any]()])}
    for one in made:
        one.families = list(families.values())
    for x in leaves:
        if isinstance(x, Placeholder) and not x.families:
            x.families = list(families.values())
    for family in families.values():
        family += [weakref.ref(one) for one in made]
    return made[0] if isinstance(shapes, Tensor) else type(shapes)(made)


def _shapes(func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
    """The results of `func` without values. Raises where that takes values, or another device."""
    if func.__name__ == "to":
        asked = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, (torch.device, str))]
        if any(torch.device(x).type != device.type or torch.device(x).index not in (None, device.index) for x in asked):
            raise ValueError("another device")
        args = tuple(x for x in args if not isinstance(x, (torch.device, str)))
        kwargs = {name: x for name, x in kwargs.items() if not isinstance(x, (torch.device, str))}
        if len(args) == 1 and not kwargs:
            return _shape_only(args[0])
    return func(*tree_map(_shape_only, args), **tree_map(_shape_only, kwargs))


def _fixed(x: Any) -> Any:
    """A single number as it is now, should it be written into later."""
    return x.clone() if isinstance(x, Tensor) and not isinstance(x, Placeholder) else x


def _shape_only(x: Any) -> Any:
    """A tensor without values in the place of one."""
    if not isinstance(x, Tensor):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")


_RECORDED = {
    *"add sub mul div true_divide neg rsub clone contiguous to float half bfloat16 double type_as".split(),
    *"__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __neg__ __getitem__".split(),
    *"chunk split unbind view reshape flatten unflatten squeeze unsqueeze transpose permute movedim".split(),
    *"select narrow".split(),
}
