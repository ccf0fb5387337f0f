"""Tensors that a model makes empty and fills piece by piece: split as soon as a slab is written into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from parafuse.parallel.metadata import METADATA
from parafuse.parallel.slab import Slab, refuse


class Blank(Tensor):
    """What `torch.empty` gave, before anything was written. Becomes a slab, or a whole tensor under the same name."""

    filled: Tensor | None

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Blank:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.filled = None
        return self

    def plain(self) -> Tensor:
        """The whole tensor, its memory taken at the first need."""
        if self.filled is None:
            self.filled = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.filled

    def become(self, index: Any, value: Slab) -> None:
        """Turns into a slab (of no values yet) that is split as `value` is, which goes to self[index]."""
        entries = index if isinstance(index, tuple) else (index,)
        dim = self.ndim - (value.ndim - value.cut.dim)
        plain = all(isinstance(i, slice) or i is Ellipsis for i in entries)
        if not plain or value.ndim != self.ndim or self.shape[dim] != value.cut.size or self.filled is not None:
            raise refuse("Tensor.__setitem__", "into a tensor that every rank has whole")
        shape = list(self.shape)
        shape[dim] = value.local.shape[dim]
        local = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.__class__ = Slab  # pyright: ignore[reportAttributeAccessIssue]
        self.local, self.cut, self.ranks, self.is_copy = local, value.cut.at(dim), value.ranks, False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.__setitem__ and isinstance(args[0], Blank) and isinstance(args[2], Slab):
            args[0].become(args[1], args[2])
            return func(*args, **kwargs)
        if func is torch.baddbmm and kwargs.get("beta") == 0:  # what is added has no say
            args = (args[1].new_zeros(()).expand(args[0].shape), *args[1:])
        args, kwargs = tree_map_only(Blank, Blank.plain, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Blank, Blank.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


class Blanks(TorchFunctionMode):
    """Inside, `torch.empty` gives blanks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.empty or not set(kwargs) <= {"dtype", "device", "size"}:
            return func(*args, **kwargs)
        shape = func(*args, **kwargs | {"device": "meta"})
        device = kwargs.get("device")
        return Blank(shape.shape, shape.dtype, torch.get_default_device() if device is None else torch.device(device))
