"""A stream inside of a stack that may be skipped: its value, beside what it would be had the blocks passed it on.

Between two blocks a model's own code joins, cuts and adds to its streams. It does the same to both sides here, so that
at the end of the stack `value - base` is what the blocks alone have added, whatever the code between them does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from parafuse.errors import UnsupportedError
from parafuse.parallel.metadata import METADATA


class Twin(Tensor):
    """Shape, dtype and device are those of the value. Either side may be split over ranks."""

    holds_streams = True
    value: Tensor
    base: Tensor

    @staticmethod
    def __new__(cls, value: Tensor, base: Tensor) -> Twin:
        self = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)
        self.value, self.base = value, base
        return self

    @classmethod
    def lent(cls, x: Tensor) -> Twin:
        """A stream where the blocks are left out: both sides are one. A change in place must not reach `x`, which may
        be a block's argument that the model uses again, or have all of its numbers at one place of the memory."""
        return cls(x, x)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Twin(value={self.value!r}, base={self.base!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = func.__name__
        is_in_place = (
            (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
        )
        if is_in_place:
            _own(args[0], name)
        found = func(*values(args), **values(kwargs))
        if not is_in_place and not any(isinstance(x, Tensor) for x in tree_leaves(found)):
            return found
        twins = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Twin)]
        is_lent = all(twin.value is twin.base for twin in twins)
        based = found if is_lent else func(*bases(args), **bases(kwargs))

        def joined(value: Any, base: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            same = next((twin for twin in twins if twin.value is value and twin.base is base), None)
            return Twin(value, base) if same is None else same

        return tree_map(joined, found, based)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*values(args), **values(kwargs or {}))


def _own(target: Any, name: str) -> None:
    """Before a change in place: the base may be a block's own argument, and so may a value that no block has made."""
    if not isinstance(target, Twin):
        raise UnsupportedError(
            f"the model writes a stream into another tensor by {name!r}, where what its blocks have added is lost to a "
            "cache; run it without one."
        )
    is_lent = target.value is target.base
    target.base = target.base.clone()
    if is_lent:
        target.value = target.base


def values(tree: Any) -> Any:
    """The same nest with the values of all twins."""
    if type(tree) is list and not any(isinstance(x, (list, tuple, dict)) for x in tree):  # pytree takes its time
        return [x.value if isinstance(x, Twin) else x for x in tree]
    return tree_map_only(Twin, lambda x: x.value, tree)


def bases(tree: Any) -> Any:
    """The same nest with the bases of all twins."""
    return tree_map_only(Twin, lambda x: x.base, tree)
