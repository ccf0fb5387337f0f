"""All that a block's Python could look at, watched for changes: what was recorded from it holds while that is the same.

Objects are compared by identity, so an equal one that is another counts as a change: it costs a new record, never a
wrong one. Numbers and names are compared by value: a scale that a call sets and puts back is the same, though Python
holds it as another object. What cannot be looked into is named, and nothing is recorded from it.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Iterable
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

ATOMS = (
    bool, int, float, complex, str, bytes, type(None), type(...), range, type, enum.Enum, np.generic, ModuleType,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, FunctionType, BuiltinFunctionType,
)  # fmt: skip
ROUNDING = 1e-12
"""Of a number that was put back by the inverse of what changed it: `x *= s`, then `x /= s`."""
OF_THE_CALL = "_of_the_call"
"""The attribute in which a rewrite keeps what it sets for one call and takes off after it, on a module or on a hook. It
is no change of the module: what is recorded of a call is kept for each of its values (`Held.of_the_call`)."""


class Held:
    """The contents of a block as they were when this was made."""

    def __init__(self, block: nn.Module):
        self.unknown = ""
        """The first thing that cannot be looked into."""
        self._dicts: list[tuple[dict[Any, Any], tuple[Any, ...], tuple[Any, ...]]] = []
        self._turning: list[tuple[dict[Any, Any], tuple[Any, ...], tuple[Any, ...]]] = []
        """Those with something of the call, and what else is in them."""
        self._empty: list[dict[Any, Any]] = []
        self._lists: list[tuple[list[Any], tuple[Any, ...]]] = []
        self._sets: list[tuple[set[Any], frozenset[Any]]] = []
        self._tensors: list[tuple[Tensor, int | None]] = []
        """Those that are no parameters: what was read from them may be fixed in a record."""
        self._packed: list[tuple[Tensor, Tensor, int]] = []
        """Parameters with attributes of their own (scales, say), their data and where it is: some libraries put other
        data, and the attributes elsewhere, when they are first called."""
        self._seen: dict[int, Any] = {}
        self._look(block, type(block).__name__)

    def is_same(self, *, exactly: bool = False, wherever: bool = False) -> bool:
        """Whether nothing has changed; `exactly`: nor a number by rounding, where it may stand in a record. `wherever`:
        weights come and go, and where they are says nothing."""
        equal = _equal if exactly else _equal_but_for_rounding
        return (
            not any(self._empty)  # most of them; a module has seven
            and all(
                len(d) == len(keys)
                and (all(map(is_, map(d.get, keys), values)) or _all_equal(map(d.get, keys), values, equal))
                for d, keys, values in self._dicts
            )
            and all(
                OF_THE_CALL in d and len(d) == len(keys) + 1 and _all_equal(map(d.get, keys), values, equal)
                for d, keys, values in self._turning
            )
            and all(len(x) == len(values) and _all_equal(x, values, equal) for x, values in self._lists)
            and all(x == values for x, values in self._sets)
            and all(_version(x) == version for x, version in self._tensors)
            and (wherever or all(_place(x) == place for x, _, place in self._packed))
        )

    def of_the_call(self) -> tuple[Any, ...]:
        """What rewrites have set for the call at hand: a number for each tensor, which stays while it lives."""
        found = [holder.get(OF_THE_CALL) for holder, _, _ in self._turning]
        return tuple(id(x) if isinstance(x, Tensor) else x for x in found)

    def restore(self) -> None:
        """Puts back what was changed since, but for values of tensors."""
        for holder in filter(None, self._empty):
            holder.clear()
        for holder, keys, values in (*self._dicts, *self._turning):
            if len(holder) - (OF_THE_CALL in holder) == len(keys) and all(map(is_, map(holder.get, keys), values)):
                continue  # some cannot be written to: diffusers' configurations
            for key in [key for key in holder if key not in keys and key != OF_THE_CALL]:
                del holder[key]
            holder.update(zip(keys, values, strict=True))
        for items, values in self._lists:
            items[:] = values
        for members, values in self._sets:
            members.clear()
            members.update(values)
        for x, data, place in self._packed:
            if _place(x) != place:
                x.data = data

    def _look(self, value: Any, name: str) -> None:
        if isinstance(value, ATOMS) or id(value) in self._seen:
            return
        self._seen[id(value)] = value  # kept alive, so that its identity is its own
        if isinstance(value, Tensor):
            self._look_at_tensor(value, name)
        elif isinstance(value, dict):
            items = {key: item for key, item in value.items() if key != OF_THE_CALL}
            if not value:
                self._empty.append(value)
            else:
                holders = self._dicts if len(items) == len(value) else self._turning
                holders.append((value, tuple(items), tuple(items.values())))
            for key, item in items.items():
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

    def _look_at_tensor(self, x: Tensor, name: str) -> None:
        if not isinstance(x, nn.Parameter):
            self._tensors.append((x, _version(x)))
        elif vars(x):
            place = _place(x)
            if place is not None:
                self._packed.append((x, x.data, place))
            self._look(vars(x), name)


def _inside(value: Any) -> Any:
    """What an object is made of; None where it does not show."""
    if isinstance(value, MethodType):
        ours = type(value.__self__).__module__.startswith("parafuse.")  # put on the module, no part of it
        return () if ours else value.__self__
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    return getattr(value, "__dict__", None)


def _all_equal(found: Iterable[Any], values: tuple[Any, ...], equal: Callable[[Any, Any], bool]) -> bool:
    """Whether all are the same objects, or plain values that are equal."""
    return all(a is b or equal(a, b) for a, b in zip(found, values, strict=False))


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, ATOMS) and bool(a == b)


def _equal_but_for_rounding(a: Any, b: Any) -> bool:
    return _equal(a, b) or (type(a) is type(b) is float and math.isclose(a, b, rel_tol=ROUNDING))


def _place(x: Tensor) -> int | None:
    """Where its data is; None for one that wraps others, or has none."""
    if isinstance(x, FakeTensor):
        return None
    try:
        return x.data_ptr()
    except RuntimeError:
        return None


def _version(x: Tensor) -> int | None:
    """Counts changes in place; tensors of inference mode do not tell."""
    return None if x.is_inference() else x._version
