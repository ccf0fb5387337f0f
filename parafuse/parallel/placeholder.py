"""Tensors that are not there yet: what a pipeline does with a denoiser's result is recorded until a value is needed.

Between two calls of the denoiser pipelines slice, cast and combine its results. A `Placeholder` lets them: it shows
shape, dtype and device, and records views and arithmetic. Anything else asks for the value, which settles all that is
open (an exchange that every rank makes at the same point, since all run the same pipeline).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from parafuse.parallel.metadata import METADATA


class Placeholder(Tensor):
    """The value of `make()`, which is called once, when it is first needed."""

    make: Callable[[], Tensor]
    value: Tensor | None

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, make: Callable[[], Tensor]) -> Placeholder:
        self = Tensor._make_wrapper_subclass(cls, like.shape, like.stride(), dtype=like.dtype, device=device)
        self.make, self.value = make, None
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
        return func(*settled(args), **settled(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*settled(args), **settled(kwargs or {}))


def _no_value() -> Tensor:
    """Stands for `make` once the value is there, so that nothing it holds is kept."""
    raise RuntimeError("the value is there already")


def settled(tree: Any) -> Any:
    """The same nest with values in the place of placeholders. Collective where one is open.

    A nest without any is given back as it is: some output classes cannot be made anew from their leaves."""
    if not any(isinstance(x, Placeholder) for x in tree_leaves(tree)):
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
        return func(*settled(args), **settled(kwargs))
    shapes = func(*tree_map(_shape_only, args), **tree_map(_shape_only, kwargs))
    whole: list[Any] = []

    def result() -> Any:
        if not whole:
            whole.append(func(*settled(args), **settled(kwargs)))
        return whole[0]

    if isinstance(shapes, Tensor):
        return Placeholder(shapes, first.device, result)
    return type(shapes)([Placeholder(part, first.device, lambda i=i: result()[i]) for i, part in enumerate(shapes)])


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
