"""A call made without its work: what the parts of a module would be given is found, their results stand in by shape.

An operator that is given a stand-in gives one (a tensor on the meta device), and what would be written into a tensor
from a stand-in is not written: from then on that tensor is taken for a stand-in too. So the code between the parts runs
as it is, at the price of looking at its operators.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (operators have no types)

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from parafuse.errors import UnsupportedError

Lineage = frozenset[int]
"""Numbers of the calls whose results a stand-in was made from."""
UNKNOWN: Lineage = frozenset()


def without_values(x: Tensor) -> Tensor:
    """Shape, strides and dtype of a tensor."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def all_without_values(tree: Any) -> Any:
    """Containers anew, with tensors that have no values."""
    return tree_map(lambda x: without_values(x) if isinstance(x, Tensor) else x, tree)


def tensors_in(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Raises UnsupportedError for what torch raises where values are asked of the meta device, known by its words
    alone. Other errors are the code's own, and stay."""
    try:
        yield
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if "meta" not in str(error).lower():
            raise
        raise UnsupportedError(f"{what} ({error})") from error


class Rehearsal(TorchDispatchMode):
    """While it is entered, operators on stand-ins give stand-ins."""

    def __init__(self) -> None:
        super().__init__()
        self._lineages: dict[int, Lineage] = {}
        self._held: list[Any] = []
        """Storages whose addresses are keys."""
        self.used: set[int] = set()
        """Results of calls, by `id`, that an operator was given: their values are needed."""
        self.has_drawn = False
        """Whether noise was drawn, as it will be again."""
        self._results: dict[int, Tensor] = {}
        self._in_part = False
        self._touched: set[int] = set()

    def stand_in(self, like: Tensor, call: int) -> Tensor:
        """For a result of a call."""
        found = without_values(like)
        self._mark(found, frozenset([call]))
        self._results[id(found)] = found
        return found

    def use(self, xs: Iterable[Tensor]) -> None:
        """The values of those of them that are results are needed."""
        self.used.update(id(x) for x in xs if id(x) in self._results)

    def lineage(self, x: Tensor) -> Lineage | None:
        """None for a tensor with values."""
        known = self._lineages.get(address(x))
        return known if known is not None else UNKNOWN if x.is_meta else None

    @contextmanager
    def part(self) -> Any:
        """Context in which a part is run on tensors without values; gives the addresses of what it looks at. What it
        draws would be other noise on each rank."""
        self._in_part, self._touched = True, set()
        try:
            yield self._touched
        finally:
            self._in_part = False

    def _mark(self, x: Tensor, lineage: Lineage) -> None:
        self._lineages[address(x)] = lineage
        self._held.append(x.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._in_part and _draws(func):
            raise UnsupportedError(f"{func}: draws noise inside of a tile, where each rank would draw its own")
        self.has_drawn |= _draws(func)
        given = tensors_in((args, kwargs))
        found = [lineage for x in given if (lineage := self.lineage(x)) is not None]
        if not found:
            return func(*args, **kwargs)
        lineage = UNKNOWN if self._in_part else UNKNOWN.union(*found)
        if self._in_part:
            self._touched.update(map(address, given))
        else:
            self.use(given)
        if all(not x.is_meta for x in given) and _is_view(func):
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        if any(not x.is_meta for x in written):
            for x in written:
                self._mark(x, lineage | (self.lineage(x) or UNKNOWN))
            return written[0] if len(written) == 1 else tuple(written)
        with refusing(f"{func}: needs the values of a tile before all tiles are known"):
            result = func(*_meta(args), **_meta(kwargs))
        if not self._in_part:
            for x in tensors_in(result):
                self._mark(x, lineage | (self._lineages.get(address(x)) or UNKNOWN))
        return result


def address(x: Tensor) -> int:
    """The same for tensors that share memory."""
    return x.untyped_storage()._cdata


def _meta(tree: Any) -> Any:
    def one(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x if x.is_meta else without_values(x)
        return torch.device("meta") if isinstance(x, torch.device) else x

    return tree_map(one, tree)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    if not func._schema.is_mutable:
        return []
    named = zip(func._schema.arguments, args, strict=False)
    chosen: Iterable[Any] = [x for argument, x in named if argument.is_write]
    more = [kwargs[a.name] for a in func._schema.arguments if a.is_write and a.name in kwargs]
    return [x for x in (*chosen, *more) if isinstance(x, Tensor)]


def _is_view(func: Any) -> bool:
    """Whether results share memory with what is given, and nothing is written."""
    schema = func._schema
    return not schema.is_mutable and any(a.alias_info is not None for a in schema.returns)


def _draws(func: Any) -> bool:
    """Attention has dropout, and so the tag; at a rate of zero it draws nothing."""
    return torch.Tag.nondeterministic_seeded in func.tags and "attention" not in str(func)
