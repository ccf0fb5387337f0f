"""Lists among the arguments of a call, from which a module may take items (a UNet takes an adapter's features one by
one). It is given copies; what it took is then taken from the caller's own lists, on ranks that did not call it too."""

from __future__ import annotations

from typing import Any

Left = dict[int | str, tuple[int, ...]]
"""By argument, of the lists that were changed: the places of the items that were left."""


class Lent:
    """The arguments of one call, with copies of the lists among them. Local."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._own: dict[int | str, list[Any]] = _lists(args, kwargs)
        self._copies = {key: list(items) for key, items in self._own.items()}
        self.args: tuple[Any, ...] = tuple(self._copies.get(place, value) for place, value in enumerate(args))
        self.kwargs: dict[str, Any] = {name: self._copies.get(name, value) for name, value in kwargs.items()}

    def left(self) -> Left | None:
        """What a call has left of the lists; None where it put something into one."""
        found: Left = {}
        for key, items in self._own.items():
            copy = self._copies[key]
            if len(copy) == len(items) and all(a is b for a, b in zip(copy, items, strict=True)):
                continue
            places = {id(item): place for place, item in enumerate(items)}
            if len(places) < len(items) or any(id(item) not in places for item in copy):
                return None
            found[key] = tuple(places[id(item)] for item in copy)
        return found

    def give_back(self) -> None:
        """Makes the caller's lists what the call made of the copies."""
        for key, items in self._own.items():
            items[:] = self._copies[key]


def take(args: tuple[Any, ...], kwargs: dict[str, Any], left: Left) -> None:
    """Takes from the lists of a call what others like it took."""
    for key, items in _lists(args, kwargs).items():
        if key in left:
            items[:] = [items[place] for place in left[key]]


def _lists(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, list[Any]]:
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {key: value for key, value in named if type(value) is list}
