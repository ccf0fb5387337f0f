"""Calls of the parts of a module: found by a rehearsal, computed by the rank that owns them, given back in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from parafuse.errors import UnsupportedError
from parafuse.parallel.hooks import Forward, override
from parafuse.parallel.part_state import Place, Snapshot, holding, put, read
from parafuse.parallel.rehearsal import Rehearsal, address, all_without_values, refusing, tensors_in

EVERYWHERE = -1
"""The group of a call that every rank makes."""
Handler = Callable[["Part", Any, Any], Any]
Given = tuple[Any, Any, list[Any]]
"""Arguments, keywords, and attributes that the part keeps from call to call."""


@dataclass
class Part:
    """A method of a child of a module."""

    name: str
    child: nn.Module
    original: Forward
    places: list[Place]
    """Attributes that it keeps from call to call."""

    def run(self, given: Given, call: Forward | None = None) -> tuple[Any, Given]:
        """The result, and what is given as the call leaves it."""
        args, kwargs, state = given
        with holding(self.places, state):
            result = (call or self.original)(*args, **kwargs)
            return result, (args, kwargs, [read(place) for place in self.places])

    def run_with_hooks(self, given: Given) -> tuple[Any, Given]:
        """The same, by a call of the child: hooks of it bring weights that are elsewhere, say."""
        return self.run(given, self.original if "." in self.name else self.child)

    def hand_out(self, after: tuple[Any, Given], args: Any, kwargs: Any) -> Any:
        """The result of a call; lists, dicts and attributes are changed as the call changes them."""
        result, (new_args, new_kwargs, state) = after
        _refill((args, kwargs), (new_args, new_kwargs))
        for place, value in zip(self.places, state, strict=True):
            put(place, value)
        return result


@dataclass
class Call:
    """One call of a part, as the rehearsal met it."""

    part: Part
    given: Any
    """In containers of their own: tensors with values, or results of earlier calls of the same group."""
    group: int
    """Calls of one group go to one rank: a later one is given what an earlier one gave."""
    after: Any = None
    """The result, and what is given as the call leaves it; tensors stand in for what will come."""
    kept: Any = None
    """Of a call that was made at once: the result, and the versions of its tensors."""

    @property
    def size(self) -> int:
        return sum(x.numel() for x in tensors_in(self.given[:2])) if self.given else 0

    def results(self) -> list[Tensor]:
        return tensors_in(self.after)


class NeededEarly(Exception):
    """Calls whose results are worked on before a later call, so that every rank must make them at once."""

    def __init__(self, calls: Iterable[int]):
        super().__init__()
        self.calls = set(calls)


class KeepsMore(Exception):
    """Attributes that a part keeps from call to call, and that were not known."""

    def __init__(self, name: str, places: list[Place]):
        super().__init__()
        self.name, self.places = name, places


@dataclass
class Met:
    """The parts of a module, whose calls are met while this is entered: its children, by all their own methods."""

    module: nn.Module
    places: Mapping[str, list[Place]]
    """What parts keep from call to call, by name."""
    handle: Handler
    _undo: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    _busy: bool = False

    def __enter__(self) -> None:
        try:
            for name, child in self.module.named_children():
                for method in _own_methods(child):
                    said = name if method == "forward" else f"{name}.{method}"
                    part = Part(said, child, getattr(child, method), list(self.places.get(said, ())))
                    self._undo.append(override(child, method, self._replaced(part)))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _replaced(self, part: Part) -> Forward:
        def met(*args: Any, **kwargs: Any) -> Any:
            if self._busy or not tensors_in((args, kwargs)):  # a part's own calls, and questions to it
                return part.original(*args, **kwargs)
            self._busy = True
            try:
                return self.handle(part, args, kwargs)
            finally:
                self._busy = False

        return met


def _own_methods(child: nn.Module) -> list[str]:
    """`forward`, and what else the part's own class offers by name: some are driven by several methods."""
    public = {name: one for name, one in vars(type(child)).items() if not name.startswith("_") and name != "forward"}
    plain = [name for name, one in public.items() if callable(one) and not isinstance(one, (staticmethod, type))]
    return ["forward", *plain]


Known = dict[Any, tuple[list[Any], TreeSpec, list[bool]]]
"""Of calls with arguments of such shapes: what they gave, and which of what they were given they looked at."""


class Finder:
    """Meets the calls of a rehearsal."""

    def __init__(self, mode: Rehearsal, early: set[int], known: Known):
        """`early`: numbers of calls that every rank makes at once."""
        self.calls: list[Call] = []
        self._mode, self._early, self._known = mode, early, known
        self._maker: dict[int, int] = {}
        """For each result, by `id`, the call that gives it."""
        self._joined: list[int] = []
        """For each group one that it is part of."""
        self._before: dict[int, Snapshot] = {}

    def groups(self) -> int:
        """Numbers the groups of all calls from 0, once all calls are met; how many there are."""
        numbers: dict[int, int] = {}
        for call in self.calls:
            if call.group != EVERYWHERE:
                call.group = numbers.setdefault(self._root(call.group), len(numbers))
        return len(numbers)

    def __call__(self, part: Part, args: Any, kwargs: Any) -> Any:
        number = len(self.calls)
        self._look_at(part)
        if number in self._early:
            result = part.original(*args, **kwargs)
            kept = (result, [(x, x._version) for x in tensors_in(result)])
            self.calls.append(Call(part, None, EVERYWHERE, kept=kept))
            return result
        given: Given = tree_map(lambda x: x, (args, kwargs, [read(place) for place in part.places]))
        leaves, spec, looked_at = self._gives(part, given)
        group = self._group([x for x, looks in zip(tree_flatten(given)[0], looked_at, strict=True) if looks])
        after = tree_unflatten([self._mode.stand_in(x, number) if isinstance(x, Tensor) else x for x in leaves], spec)
        call = Call(part, None if group == EVERYWHERE else given, group, after)
        self._maker |= {id(x): number for x in call.results()}
        self.calls.append(call)
        return part.hand_out(after, args, kwargs)

    def _look_at(self, part: Part) -> None:
        """Raises KeepsMore for attributes that were changed between calls (flags, say) and are not known."""
        before = self._before.setdefault(id(part.child), Snapshot(part.child))
        known = {(id(one), name) for one, name in part.places}
        if more := [place for place in before.others() if (id(place[0]), place[1]) not in known]:
            raise KeepsMore(part.name, more)

    def _root(self, group: int) -> int:
        while self._joined[group] != group:
            group = self._joined[group]
        return group

    def _group(self, looked_at: list[Any]) -> int:
        """Raises NeededEarly where it takes what was made from results of one group, by other means than parts."""
        makers: set[int] = set()
        worked_on: set[int] = set()
        unknown = False
        for x in looked_at:
            if not isinstance(x, Tensor):
                continue
            if id(x) in self._maker:
                makers.add(self._maker[id(x)])
            elif (lineage := self._mode.lineage(x)) is not None:
                worked_on |= lineage
                unknown = unknown or not lineage
        groups = {self._root(g) if g != EVERYWHERE else g for g in (self.calls[i].group for i in makers)}
        others = {self._root(g) if g != EVERYWHERE else g for g in (self.calls[i].group for i in worked_on)}
        if len(others) == 1 and EVERYWHERE not in others and not groups:
            (one,) = others
            raise NeededEarly(i for i, c in enumerate(self.calls) if c.group >= 0 and self._root(c.group) == one)
        if worked_on or unknown or EVERYWHERE in groups:
            self._mode.use(x for x in looked_at if isinstance(x, Tensor))
            return EVERYWHERE
        if not groups:
            self._joined.append(len(self._joined))
            return self._joined[-1]
        first = min(groups)
        for group in groups:
            self._joined[group] = first
        return first

    def _gives(self, part: Part, given: Given) -> tuple[list[Any], TreeSpec, list[bool]]:
        """Result and arguments after the call, without values; and which of what is given is looked at."""
        leaves, spec = tree_flatten(given)
        facts = tuple((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else _name(x) for x in leaves)
        key = (part.name, facts, str(spec))
        if key not in self._known:
            self._known[key] = self._tried(part, all_without_values(given))
        return self._known[key]

    def _tried(self, part: Part, given: Given) -> tuple[list[Any], TreeSpec, list[bool]]:
        before, leaves = Snapshot(part.child), tree_flatten(given)[0]
        try:
            with refusing(f"{part.name}: does not run without values"), self._mode.part() as touched:
                after = part.run(given)
            known = {(id(one), name) for one, name in part.places}
            if more := [place for place in before.others() if (id(place[0]), place[1]) not in known]:
                raise KeepsMore(part.name, more)
        finally:
            before.restore()
        found, spec = tree_flatten(after)
        passed_on = {id(x) for x in found}
        looked_at = [isinstance(x, Tensor) and (address(x) in touched or id(x) in passed_on) for x in leaves]
        return found, spec, looked_at


def _name(x: Any) -> Any:
    return x if x is None or isinstance(x, (bool, int, float, str, tuple, torch.dtype)) else id(x)


def _refill(into: Any, source: Any) -> None:
    """Changes lists and dicts as those of `source` are."""
    if isinstance(into, tuple):
        for one, other in zip(into, source, strict=True):
            _refill(one, other)
    elif isinstance(into, dict):
        for name in [name for name in into if name not in source]:
            del into[name]
        for name, value in source.items():
            if isinstance(into.get(name), (list, dict, tuple)) and isinstance(value, (list, dict, tuple)):
                _refill(into[name], value)
            else:
                into[name] = value
    elif isinstance(into, list):
        into[:] = source


def compute(calls: Iterable[Call]) -> dict[int, Tensor]:
    """Makes calls of whole groups; the values of their results, by `id` of what stands in for them."""
    values: dict[int, Tensor] = {}

    def known(x: Any) -> Any:
        return values.get(id(x), x) if isinstance(x, Tensor) else x

    for call in calls:
        given = tree_map(known, call.given)
        found, like = tensors_in(call.part.run_with_hooks(given)), call.results()
        if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in like]:
            raise UnsupportedError(f"{call.part.name}: gave other shapes than on tensors without values")
        values |= {id(one): x for one, x in zip(like, found, strict=True)}
    return values


class Player:
    """Gives the results of calls back, in the order in which the rehearsal met them."""

    def __init__(self, calls: list[Call], values: Mapping[int, Tensor]):
        self._calls, self._values = calls, values
        self._place = 0

    def __call__(self, part: Part, args: Any, kwargs: Any) -> Any:
        call = self._calls[self._place] if self._place < len(self._calls) else None
        self._place += 1
        if call is None or call.part.name != part.name:
            raise UnsupportedError(f"{part.name}: is called in another order than on tensors without values")
        if call.kept is not None:
            result, versions = call.kept
            return result if all(x._version == v for x, v in versions) else part.original(*args, **kwargs)
        if call.group == EVERYWHERE:
            return part.original(*args, **kwargs)
        after = tree_map(lambda x: self._values.get(id(x), x) if isinstance(x, Tensor) else x, call.after)
        return part.hand_out(after, args, kwargs)
