"""All that a block's Python could look at, watched for changes: what was recorded from it holds while that is the same.

Everything is compared by identity, so an equal value that is another object counts as a change: it costs a new record,
never a wrong one. What cannot be looked into is named, and nothing is recorded from it.
"""

from __future__ import annotations

import enum
import functools
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ATOMS = (
    bool, int, float, complex, str, bytes, type(None), type(...), range, type, enum.Enum, np.generic, ModuleType,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, FunctionType, BuiltinFunctionType,
)  # fmt: skip


class Held:
    """The contents of a block as they were when this was made."""

    def __init__(self, block: nn.Module):
        self.unknown = ""
        """The first thing that cannot be looked into."""
        self._dicts: list[tuple[dict[Any, Any], tuple[Any, ...], tuple[Any, ...]]] = []
        self._lists: list[tuple[list[Any], tuple[Any, ...]]] = []
        self._sets: list[tuple[set[Any], frozenset[Any]]] = []
        self._tensors: list[tuple[Tensor, int | None]] = []
        """Those that are no parameters: what was read from them may be fixed in a record."""
        self._seen: dict[int, Any] = {}
        self._look(block, type(block).__name__)

    def is_same(self) -> bool:
        return (
            all(len(d) == len(keys) and all(map(is_, map(d.get, keys), values)) for d, keys, values in self._dicts)
            and all(len(x) == len(values) and all(map(is_, x, values)) for x, values in self._lists)
            and all(x == values for x, values in self._sets)
            and all(_version(x) == version for x, version in self._tensors)
        )

    def restore(self) -> None:
        """Puts back what was changed since, but for values of tensors."""
        for holder, keys, values in self._dicts:
            for key in [key for key in holder if key not in keys]:
                del holder[key]
            holder.update(zip(keys, values, strict=True))
        for items, values in self._lists:
            items[:] = values
        for members, values in self._sets:
            members.clear()
            members.update(values)

    def _look(self, value: Any, name: str) -> None:
        if isinstance(value, ATOMS) or id(value) in self._seen:
            return
        self._seen[id(value)] = value  # kept alive, so that its identity is its own
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                self._tensors.append((value, _version(value)))
        elif isinstance(value, dict):
            self._dicts.append((value, tuple(value), tuple(value.values())))
            for key, item in value.items():
                self._look(item, f"{name}.{key}")
        elif isinstance(value, (list, tuple, set, frozenset)):
            if isinstance(value, list):
                self._lists.append((value, tuple(value)))
            elif isinstance(value, set):
                self._sets.append((value, frozenset(value)))
            for index, item in enumerate(value):
                self._look(item, f"{name}.{index}")
        else:
            inner = _inside(value)
            if inner is None:
                self.unknown = self.unknown or f"{name} ({type(value).__name__})"
            self._look(inner, name)


def _inside(value: Any) -> Any:
    """What an object is made of; None where it does not show."""
    if isinstance(value, MethodType):
        ours = type(value.__self__).__module__.startswith("parafuse.")  # put on the module, no part of it
        return () if ours else value.__self__
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    return getattr(value, "__dict__", None)


def _version(x: Tensor) -> int | None:
    """Counts changes in place; tensors of inference mode do not tell."""
    return None if x.is_inference() else x._version
