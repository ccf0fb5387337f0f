"""What modules keep from call to call in attributes of their own (caches over time, flags, counters), so that a call
can be made on its own, with what earlier calls left, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

ABSENT = "<no such attribute>"
"""The value of an attribute that is not there."""
Place = tuple[nn.Module, str]
"""An attribute of a module."""


class Snapshot:
    """Attributes of a module and all modules below it. Local."""

    def __init__(self, module: nn.Module):
        self._was = [(one, dict(vars(one))) for one in module.modules()]

    def others(self) -> list[Place]:
        """Attributes that are other objects by now."""
        found: list[Place] = []
        for one, was in self._was:
            now = vars(one)
            found += [(one, name) for name in was if not _same(now.get(name, ABSENT), was[name])]
            if len(now) != len(was):
                found += [(one, name) for name in now if name not in was]
        return found

    def restore(self, places: Iterable[Place] | None = None) -> None:
        """Puts those attributes back, or all."""
        was = {id(one): attributes for one, attributes in self._was}
        for one, name in self.others() if places is None else places:
            put((one, name), was[id(one)].get(name, ABSENT))

    def restore_without_values(self) -> None:
        """Puts back what holds tensors without values."""
        without = [place for place in self.others() if any(_without_values(x) for x in tree_leaves(read(place)))]
        self.restore(without)


def read(place: Place) -> Any:
    return vars(place[0]).get(place[1], ABSENT)


def put(place: Place, value: Any) -> None:
    module, name = place
    if isinstance(value, str) and value == ABSENT:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value


@contextmanager
def holding(places: list[Place], values: list[Any]) -> Iterator[None]:
    """Context in which attributes have these values."""
    before = [read(place) for place in places]
    try:
        for place, value in zip(places, values, strict=True):
            put(place, value)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            put(place, value)


def named(place: Place) -> str:
    return f"{type(place[0]).__name__}.{place[1]}"


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, (bool, int, float, str, tuple)) and type(a) is type(b) and a == b)


def _without_values(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_meta
