"""Whether a call of a module did more than give a result: then it must not be left out, nor made with a part of it."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from parafuse.parallel.fingerprint import SCALES
from parafuse.parallel.held import ATOMS, ROUNDING, Held
from parafuse.parallel.nest import leaves_of

PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, np.generic, enum.Enum)


class Watched:
    """A module and the arguments of one call, as they are before it. Local."""

    def __init__(self, module: nn.Module, tree: Any):
        self._module, self._tree = Held(module), tree
        self._leaves, self._spec = tree_flatten(tree)
        self._versions = [_state(x) for x in self._leaves]
        self._noise = _noise_states()

    def has_changed(self) -> bool:
        """Whether the call has left something in the module, in an argument, or where it cannot be seen."""
        leaves, spec = tree_flatten(self._tree)
        same = spec == self._spec and len(leaves) == len(self._leaves)
        same = same and all(a is b for a, b in zip(leaves, self._leaves, strict=True))
        return (
            not same
            or any(is_opaque(x) for x in leaves)
            or any(not _equal(_state(x), before) for x, before in zip(leaves, self._versions, strict=True))
            or not all(map(torch.equal, _noise_states(), self._noise))
            or not self._module.is_same()
        )

    def undo(self) -> None:
        """Puts back what can be: all of the module but values of tensors, and where generators of noise stood."""
        self._module.restore()
        for x, before in zip(self._leaves, self._versions, strict=True):
            if isinstance(x, torch.Generator):
                x.set_state(before)
        for generator, before in zip(_generators(), self._noise, strict=True):
            generator.set_state(before)


class Handed:
    """Objects among the arguments of a call that it may write into: a cache of keys, say. Local."""

    def __init__(self, tree: Any):
        self._held = [Held(x) for x in leaves_of(tree) if is_opaque(x)]

    def have_changed(self) -> bool:
        """Whether one of them was written to, or cannot be looked into."""
        return any(held.unknown or not held.is_same() for held in self._held)


class Parts:
    """What a module is made of, so that what was learned of it is forgotten when that is another. Local."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._held = Held(module)
        self._objects = [
            (vars(part), name, value)
            for part in module.modules()
            for name, value in vars(part).items()
            if not name.startswith("_") and name != "forward" and not isinstance(value, ATOMS)  # hooks come and go
        ]
        self._children = [(part._modules, tuple(part._modules.values())) for part in module.modules() if part._modules]

    def have_other_objects(self) -> bool:
        """A quick look at what modules are made of and hold: submodules (adapters wrap them), attention processors."""
        return any(holder.get(name) is not value for holder, name, value in self._objects) or any(
            len(holder) != len(parts) or not all(map(is_, holder.values(), parts)) for holder, parts in self._children
        )

    def have_changed(self) -> bool:
        """A look at everything; some milliseconds for a large model."""
        return not self._held.is_same()


class Adapters:
    """What the adapters of a module are set to: their scales, which are active, switched off or merged. A quick look at
    numbers alone: that modules were replaced is seen by `Parts`. Local."""

    def __init__(self, module: nn.Module):
        states = [vars(part) for part in module.modules() if "_disable_adapters" in vars(part)]  # peft's layers
        self._was = [(state, {name: _copy(state.get(name)) for name in _SET_ON_ADAPTERS}) for state in states]

    def have_changed(self) -> bool:
        return any(not _alike(state.get(name), was[name]) for state, was in self._was for name in was)


_SET_ON_ADAPTERS = (*SCALES, "_active_adapter", "_disable_adapters", "merged_adapters")


def _copy(x: Any) -> Any:
    return x.copy() if isinstance(x, (dict, list)) else x


def _alike(a: Any, b: Any) -> bool:
    """Equal but for what multiplying by a scale, and dividing by it, leaves."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=ROUNDING)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(map(_alike, a.values(), map(b.get, a)))
    return bool(a == b)


def is_opaque(x: Any) -> bool:
    """Whether it may hold what a call changes, unseen: a cache, say."""
    return not isinstance(x, (Tensor, torch.Generator, *PLAIN))


def all_plain(results: Sequence[Any]) -> bool:
    """Whether results are tensors and what never changes, so that another rank's can stand for them."""
    return all(isinstance(x, (Tensor, bool, str, type(None))) for x in results)


def _state(x: Any) -> Any:
    if isinstance(x, Tensor):
        return None if x.is_inference() else x._version
    return x.get_state() if isinstance(x, torch.Generator) else None


def _noise_states() -> list[Tensor]:
    return [generator.get_state() for generator in _generators()]


def _generators() -> list[torch.Generator]:
    """torch's own."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    generators = [torch.default_generator]
    if on_gpu:
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return generators


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b
