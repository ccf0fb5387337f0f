"""Which guidance branch a call of the denoiser is, over the steps of a request: what a cache keeps belongs to one.

A branch is known by its arguments other than the latents: by where they stand in memory, and by their contents where
that is new. What takes a new value from step to step and never an old one again (the timestep, residuals of a control
network) tells nothing and is left out, once it has changed twice; what differs between calls on the same latents always
counts. So the number of calls says nothing: guidance may start or end in mid-run, and a branch may be told from another
by its `skip_layers`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path

from parafuse.parallel.nest import Flattener

NEEDED_CHANGES = 2
"""New values, each in a step of its own, after which an argument is left out."""
MAX_CONTENTS = 8
"""Tensors of one argument whose contents are kept in mind."""
_LATENTS = ""
"""Stands for their name."""


@dataclass(frozen=True)
class Given:
    """An argument as it was in one call."""

    value: Any
    place: Hashable
    content: Hashable = None
    """None where it was not looked at."""


class Branches:
    """Numbers for the branches of one denoiser in one request. Local: no communication.

    Waits for the device where an argument is a tensor that it has not met, and in the first steps for the latents."""

    def __init__(self, denoiser: nn.Module):
        self._parameters = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._flatten = Flattener()
        self._spec: TreeSpec | None = None
        self._names: list[str] = []
        """Of leaves, in the last call."""
        self._contents: dict[str, dict[Hashable, tuple[Any, Hashable]]] = {}
        """Argument -> where a tensor stands -> that tensor, so that its place is not another's, and its content."""
        self._known: dict[str, set[Hashable]] = {}
        """Argument -> its contents so far."""
        self._changes: Counter[str] = Counter()
        """New values of an argument that came with a step."""
        self._telling: set[str] = set()
        """Arguments that tell branches apart, for certain."""
        self._left_out: set[str] = set()
        self._renewed: Counter[str] = Counter()
        """Steps in a row in which an argument that tells branches apart had a value that it never had before."""
        self._of_the_step: set[str] = set()
        """Arguments that differ between branches, but are new in every step (residuals of a control network for each
        branch): others tell."""
        self._latents = Given(None, None)
        self._last: dict[str, Given] = {}
        """The arguments of the last call."""
        self.steps = 0
        """Changes of the latents from call to call."""
        self._numbers: dict[frozenset[tuple[str, Hashable]], int] = {}
        self._count = 0
        self._calls = 0
        """On the latents at hand."""
        self.places: dict[int, int] = {}
        """Number of a branch -> its place among the calls of the step in which it came first."""
        self.leading = 0
        """Number of the branch that was the first one on the latents at hand."""

    @property
    def alive(self) -> set[int]:
        """Numbers that a call may still get."""
        return set(self._numbers.values())

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The branch of a call. Calls of one number are of one branch; one branch may have several numbers in the
        first steps."""
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
        latents = self._given_latents(arguments.pop(self._parameters[0], None))
        leaves = dict(zip(*self._flat(arguments), strict=True))
        is_first = not self._numbers
        is_same_step = not is_first and self._are_same(latents, self._latents)
        self._calls = self._calls + 1 if is_same_step else 0
        if is_same_step:
            self._tell_apart(leaves)
        given = {name: self._given(name, leaf) for name, leaf in leaves.items()}
        if not is_first and not is_same_step:
            self._next_step(given)
        for name, one in given.items():
            self._known.setdefault(name, set()).add(one.content)
        self._latents, self._last = latents, given
        key = self._key({name: one.content for name, one in given.items()})
        if key not in self._numbers:
            self._numbers[key] = self._count
            self.places[self._count] = self._calls
            self._count += 1
        if self._calls == 0:
            self.leading = self._numbers[key]
        return self._numbers[key]

    def _flat(self, arguments: dict[str, Any]) -> tuple[list[str], list[Any]]:
        """(names of leaves, leaves)."""
        leaves, spec = self._flatten(arguments)
        if self._spec is not spec:
            self._spec, self._names = spec, [keystr(path) for path, _ in tree_flatten_with_path(arguments)[0]]
        return self._names, leaves

    def _tell_apart(self, leaves: dict[str, Any]) -> None:
        """Another call on the same latents: what differs from the last one tells them apart."""
        for name in (leaves.keys() | self._last.keys()) - self._of_the_step:
            if name not in self._telling and not self._is_unchanged(name, leaves):
                self._telling.add(name)
                self._left_out.discard(name)

    def _is_unchanged(self, name: str, leaves: dict[str, Any]) -> bool:
        last = self._last.get(name)
        if last is None or name not in leaves:
            return False
        place = place_of(leaves[name])
        if place is not None and place == last.place:
            return True
        before = last.content
        if before is None:  # it was not looked at then
            if place_of(last.value) != last.place:
                return False
            before = self._content(name, last.value)
        return before == self._content(name, leaves[name])

    def _next_step(self, given: dict[str, Given]) -> None:
        """A call on other latents: what it changed may be a matter of the step."""
        self.steps += 1
        for name in given.keys() | self._last.keys():
            if name in self._telling and name in given:
                self._renewed[name] = 0 if given[name].content in self._known[name] else self._renewed[name] + 1
            if name in self._telling or name in self._left_out:
                continue
            new, last = given.get(name), self._last.get(name)
            if new is None or last is None:
                self._telling.add(name)
            elif new.content != last.content:
                if new.content in self._known[name]:
                    self._telling.add(name)
                else:
                    self._changes[name] += 1
        renewed = {name for name in self._telling if self._renewed[name] > NEEDED_CHANGES}
        if any(name in self._renewed and name not in renewed for name in self._telling):  # others tell them apart
            self._telling -= renewed
            self._of_the_step |= renewed
        more = {name for name, count in self._changes.items() if count >= NEEDED_CHANGES} | self._of_the_step
        more -= self._telling
        if more - self._left_out:
            self._left_out |= more
            for name in (*more, _LATENTS):  # no need to keep their tensors any longer
                self._contents.pop(name, None)
            self._numbers = {self._key(dict(key)): number for key, number in self._numbers.items()}

    def _key(self, contents: dict[str, Hashable]) -> frozenset[tuple[str, Hashable]]:
        return frozenset((name, content) for name, content in contents.items() if name not in self._left_out)

    def _given(self, name: str, leaf: Any) -> Given:
        return Given(leaf, place_of(leaf), None if name in self._left_out else self._content(name, leaf))

    def _given_latents(self, value: Any) -> Given:
        """Contents of latents matter until it is learned what to leave out."""
        leaves = tuple(tree_flatten(value)[0])
        places = tuple(map(place_of, leaves))
        is_told = self._left_out and None not in places  # those of inference mode do not tell
        return Given(leaves, places, None if is_told else tuple(self._content(_LATENTS, leaf) for leaf in leaves))

    @staticmethod
    def _are_same(a: Given, b: Given) -> bool:
        if a.content is not None and b.content is not None:
            return a.content == b.content
        return a.place == b.place and None not in a.place  # pyright: ignore[reportOperatorIssue]

    def _content(self, name: str, value: Any) -> Hashable:
        """Equal for equal values of one argument; never None."""
        if isinstance(value, np.ndarray):
            return _digest(torch.from_numpy(value))
        if not isinstance(value, Tensor):
            return ("value", value if isinstance(value, Hashable) else repr(value))
        place = place_of(value)
        if place is None:
            return _digest(value)
        contents = self._contents.setdefault(name, {})
        if place not in contents:
            if len(contents) >= MAX_CONTENTS:
                contents.clear()
            contents[place] = (value, _digest(value))
        return contents[place][1]


def place_of(x: Any) -> Hashable:
    """Where a tensor stands, and how often it was written to; None where that is not told."""
    if not isinstance(x, Tensor) or x.is_inference():
        return None
    return (x.data_ptr(), x._version, x.shape, x.stride(), x.dtype)


def _digest(x: Tensor) -> Hashable:
    """Its contents in short; waits for the device."""
    raw = x.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return (x.shape, x.dtype, hashlib.blake2b(raw.numpy().tobytes(), digest_size=16).digest())
