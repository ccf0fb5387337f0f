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

Move = Callable[[Tensor, torch.device], Tensor]


def move(x: Tensor, device: torch.device) -> Tensor:
    """By the streams of both devices: the host does not wait."""
    return x.to(device, non_blocking=x.device.type == device.type)


class Hop:
    """To one device and back."""

    def __init__(self, there: torch.device, move: Move = move):
        self.there, self._move = there, move

    def around(self, original: Forward) -> Forward:
        """The same call, made there."""

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            here = next((x.device for x in tensors if x.dim()), None)
            if here is None or all(x.device == self.there for x in tensors):
                with _on(self.there):
                    return original(*args, **kwargs)
            brought = {id(x): self._move(x, self.there) for x in tensors}
            back = {id(moved): x for x in tensors if (moved := brought[id(x)]) is not x}
            args, kwargs = tree_map(lambda x: brought.get(id(x), x), (args, kwargs))
            with _on(self.there):
                result = original(*args, **kwargs)
            return carried(result, lambda x: back[id(x)] if id(x) in back else self._move(x, here))

        return call

    def bring(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """A pre-hook, for parts that are called by themselves: what they give stays there."""
        return carried((args, kwargs), lambda x: self._move(x, self.there))


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


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels that are not torch's own start on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
