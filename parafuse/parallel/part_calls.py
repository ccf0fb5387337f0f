"""Calls of the parts of a module, found by a rehearsal, computed by the rank that owns them, and given back in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from parafuse.errors import UnsupportedError
from parafuse.parallel.hooks import Forward, override
from parafuse.parallel.rehearsal import Rehearsal, all_without_values, tensors_in

EVERYWHERE = -1
"""The group of a call that every rank makes."""
Inside = Callable[[Forward, str, Any, Any], Any]


@dataclass
class Call:
    """One call of a part, as the rehearsal met it."""

    part: str
    original: Forward
    given: Any
    """Its arguments, in containers of their own: tensors with values, or results of earlier calls of the same group."""
    group: int
    """Calls of one group go to one rank: a later one is given what an earlier one gave, and nobody else looks at it."""
    after: Any = None
    """The result, and the arguments as the call leaves them, whose tensors stand in for what will come."""
    kept: Any = None
    """Of a call that every rank makes: the result."""

    @property
    def size(self) -> int:
        return sum(x.numel() for x in tensors_in(self.given))

    def results(self) -> list[Tensor]:
        return tensors_in(self.after)


class NeededEarly(Exception):  # noqa: N818
    """Calls whose results are worked on before a later call, so that every rank must make them at once."""

    def __init__(self, calls: Iterable[int]):
        super().__init__()
        self.calls = set(calls)


@dataclass
class Met:
    """The parts of a module whose calls are met while this is entered: its children, by all their own methods."""

    module: nn.Module
    handle: Inside
    _undo: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    _busy: bool = False

    def __enter__(self) -> None:
        try:
            for name, child in self.module.named_children():
                for method in _own_methods(child):
                    said = name if method == "forward" else f"{name}.{method}"
                    self._undo.append(override(child, method, self._replaced(said, getattr(child, method))))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _replaced(self, name: str, original: Forward) -> Forward:
        def met(*args: Any, **kwargs: Any) -> Any:
            if self._busy or not tensors_in((args, kwargs)):  # a part's own calls, and questions to it
                return original(*args, **kwargs)
            self._busy = True
            try:
                return self.handle(original, name, args, kwargs)
            finally:
                self._busy = False

        return met


def _own_methods(child: nn.Module) -> list[str]:
    """`forward`, and what else the part's own class offers by name: some are driven by several methods."""
    public = [name for name, one in vars(type(child)).items() if callable(one) and not name.startswith("_")]
    own = [name for name in public if not isinstance(vars(type(child))[name], (classmethod, staticmethod, type))]
    return ["forward", *(name for name in own if name != "forward")]


class Finder:
    """Meets the calls of a rehearsal."""

    def __init__(self, module: nn.Module, mode: Rehearsal, early: set[int]):
        """`early`: numbers of calls that every rank makes at once."""
        self.calls: list[Call] = []
        self.num_groups = 0
        self._module, self._mode, self._early = module, mode, early
        self._maker: dict[int, int] = {}
        """For each result, by `id`, the call that gives it."""
        self._known: dict[Any, tuple[Any, TreeSpec]] = {}
        """What calls with arguments of such shapes gave before."""

    def __call__(self, original: Forward, name: str, args: Any, kwargs: Any) -> Any:
        number = len(self.calls)
        given = tree_map(lambda x: x, (args, kwargs))
        if number in self._early:
            result = original(*args, **kwargs)
            kept = (result, [(x, x._version) for x in tensors_in(result)])
            self.calls.append(Call(name, original, None, EVERYWHERE, kept=kept))
            return result
        group = self._group(given)
        call = Call(name, original, given, group)
        call.after = tree_map(
            lambda x: self._mode.stand_in(x, number) if isinstance(x, Tensor) else x, self._gives(call)
        )
        if group == EVERYWHERE:
            call.given = None  # it is made when the others' results are there
        self._maker |= {id(x): number for x in call.results()}
        self.calls.append(call)
        return hand_out(call.after, (args, kwargs))

    def _group(self, given: Any) -> int:
        """Raises NeededEarly where it takes what was made from results of one group, by other means than parts."""
        makers: set[int] = set()
        worked_on: set[int] = set()
        for x in tensors_in(given):
            if id(x) in self._maker:
                makers.add(self._maker[id(x)])
            elif (lineage := self._mode.lineage(x)) is not None:
                worked_on |= lineage or {-1}
        groups = {self.calls[i].group for i in makers if i >= 0}
        from_others = {self.calls[i].group for i in worked_on if i >= 0}
        if worked_on and len(from_others - {EVERYWHERE}) == 1 and not groups:
            raise NeededEarly(i for i, call in enumerate(self.calls) if call.group in from_others)
        if worked_on or len(groups) > 1 or EVERYWHERE in groups:
            self._mode.use(tensors_in(given))
            return EVERYWHERE
        if groups:
            return groups.pop()
        self.num_groups += 1
        return self.num_groups - 1

    def _gives(self, call: Call) -> Any:
        """Result and arguments after the call, without values."""
        leaves, spec = tree_flatten(call.given)
        facts = tuple((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else _name(x) for x in leaves)
        key = (call.part, facts, str(spec))
        if key not in self._known:
            args, kwargs = all_without_values(call.given)
            before = _state(self._module)
            try:
                with self._mode.part():
                    result = call.original(*args, **kwargs)
            finally:
                changed = _restore(self._module, before)
            if changed:
                raise UnsupportedError(f"{call.part}: keeps {changed} from call to call, which no other rank would have")
            self._known[key] = tree_flatten((result, (args, kwargs)))
        leaves, spec = self._known[key]
        return tree_unflatten(leaves, spec)


def _name(x: Any) -> Any:
    return x if x is None or isinstance(x, (bool, int, float, str, torch.dtype)) else id(x)


def _state(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    return [(one, dict(vars(one))) for one in module.modules()]


def _restore(module: nn.Module, before: list[tuple[nn.Module, dict[str, Any]]]) -> str:
    """Puts attributes back, and names the first that was another."""
    found = ""
    for one, attributes in before:
        now = vars(one)
        others = [name for name in {*now, *attributes} if now.get(name) is not attributes.get(name)]
        for name in others:
            found = found or f"{type(one).__name__}.{name}"
            if name in attributes:
                now[name] = attributes[name]
            else:
                del now[name]
    return found


def hand_out(after: Any, given: Any) -> Any:
    """The result of a call, with its arguments' lists and dicts changed as the call changes them."""
    result, arguments = after
    _refill(given, arguments)
    return result


def _refill(into: Any, source: Any) -> None:
    if isinstance(into, (list, dict)):
        old = dict(enumerate(into)) if isinstance(into, list) else dict(into)
        new = dict(enumerate(source)) if isinstance(source, list) else dict(source)
        for name, value in new.items():
            if isinstance(old.get(name), (list, dict)):
                _refill(old[name], value)
                new[name] = old[name]
            elif isinstance(value, Tensor) and isinstance(old.get(name), Tensor) and not value.is_meta:
                new[name] = value
        if isinstance(into, list):
            into[:] = list(new.values())
        else:
            into.clear()
            into.update(new)
    elif isinstance(into, tuple):
        for one, other in zip(into, source, strict=True):
            _refill(one, other)


def compute(calls: Iterable[Call]) -> dict[int, Tensor]:
    """Makes calls of whole groups; the values of their results, by `id` of what stands in for them."""
    values: dict[int, Tensor] = {}
    for call in calls:
        args, kwargs = tree_map(lambda x: values.get(id(x), x) if isinstance(x, Tensor) else x, call.given)
        result = call.original(*args, **kwargs)
        found = tensors_in((result, (args, kwargs)))
        like = call.results()
        if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in like]:
            raise UnsupportedError(f"{call.part}: gave other shapes than on tensors without values")
        values |= {id(one): x for one, x in zip(like, found, strict=True)}
    return values


class Player:
    """Gives the results of calls back, in the order in which the rehearsal met them."""

    def __init__(self, calls: list[Call], values: Mapping[int, Tensor]):
        self._calls, self._values = calls, values
        self.place = 0

    def __call__(self, original: Forward, name: str, args: Any, kwargs: Any) -> Any:
        call = self._calls[self.place] if self.place < len(self._calls) else None
        self.place += 1
        if call is None or call.part != name:
            raise UnsupportedError(f"{name}: is called in another order than on tensors without values")
        if call.kept is not None:
            result, versions = call.kept
            return result if all(x._version == v for x, v in versions) else original(*args, **kwargs)
        if call.group == EVERYWHERE:
            return original(*args, **kwargs)
        after = tree_map(lambda x: self._values.get(id(x), x) if isinstance(x, Tensor) else x, call.after)
        return hand_out(after, (args, kwargs))
