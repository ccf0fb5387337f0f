"""Calls of a module whose weights are on another device: what it is given is brought there, and what it gives back to
where that came from. So whoever calls it need not know where it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from parafuse.parallel.hooks import Forward, override


class Hop:
    """To one device and back."""

    def __init__(self, there: torch.device):
        self.there = there

    def around(self, original: Forward) -> Forward:
        """The same call, made there."""

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            here = next((self.where(x) for x in tensors.values() if x.dim()), self.there)
            brought = {key: self.move(x, self.there) for key, x in tensors.items()}
            unchanged = {id(moved): tensors[key] for key, moved in brought.items()}
            args, kwargs = tree_map(lambda x: brought.get(id(x), x), (args, kwargs))
            with self.on():
                result = original(*args, **kwargs)
            return carried(result, lambda x: unchanged[id(x)] if id(x) in unchanged else self.move(x, here))

        return call

    def bring(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """A pre-hook, for parts that are called by themselves: what they give stays there."""
        return carried((args, kwargs), lambda x: self.move(x, self.there))

    def where(self, x: Tensor) -> torch.device:
        return x.device

    def move(self, x: Tensor, device: torch.device) -> Tensor:
        """Itself where it is there. By the streams of both devices: the host does not wait."""
        return x.to(device, non_blocking=x.device.type == device.type)

    def on(self) -> AbstractContextManager[Any]:
        """Kernels that are not torch's own start on the current device."""
        return torch.cuda.device(self.there) if self.there.type == "cuda" else nullcontext()


def carried(tree: Any, moved: Callable[[Tensor], Tensor]) -> Any:
    """A nest with all its tensors moved, also those of plain objects in it (distributions of latents)."""

    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor):
            return moved(x)
        state = getattr(x, "__dict__", None)
        inner = {name: value for name, value in (state or {}).items() if isinstance(value, Tensor)}
        if not inner or isinstance(x, nn.Module):
            return x
        other = copy.copy(x)
        for name, value in inner.items():
            setattr(other, name, moved(value))
        return other

    return tree_map(leaf, tree)


class Hops:
    """On methods of one module, by name."""

    def __init__(self, module: nn.Module, names: Iterable[str], hop: Hop):
        self._module, self._hop = module, hop
        self._names = [name for name in names if callable(getattr(module, name, None))]
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        for name in self._names:
            replacement: Any = torch.compiler.disable(self._hop.around(getattr(self._module, name)))
            replacement.parafuse_weights = True
            self._undo.append(override(self._module, name, replacement))

    def remove(self) -> None:
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
