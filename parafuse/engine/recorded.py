"""Calls of a denoiser as a pipeline made them, to be made again in another way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from parafuse.engine.probe import owned


@dataclass
class RecordedCall:
    """One call of a module: its arguments, and the tensors that it returned alone."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    plain: list[Tensor]
    truth: list[Tensor]
    """The same in fp32; `plain` itself where the model is fp32."""

    def again(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The tensors of this call, made anew; with floating point arguments in `dtype`, if one is given."""
        args, kwargs = tree_map(owned, (self.args, self.kwargs))
        if dtype is not None:
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs))
        with torch.no_grad():
            return tensors_of(self.module(*args, **kwargs))


@contextmanager
def recording(module: nn.Module, into: list[RecordedCall], keep: int | None = None) -> Iterator[None]:
    """Notes every call of `module`: arguments as they were before it. Of more than `keep`, the last is replaced."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args, kwargs = tree_map(owned, (args, kwargs))
        if keep is not None and len(into) >= keep:
            into.pop()
        into.append(RecordedCall(module, args, kwargs, [], []))

    def after(_module: nn.Module, _args: Any, result: Any) -> None:
        into[-1].plain = into[-1].truth = [x.detach().clone() for x in tensors_of(result)]

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
