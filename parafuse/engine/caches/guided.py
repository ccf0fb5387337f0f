"""The branches of guidance by their difference from the one that is computed in every step: the second half of
FasterCache (Lv et al. 2024, arXiv:2410.19355), the reuse of the unconditional branch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from parafuse.parallel.batch_cut import rows

Part = tuple[int, int, Hashable]
"""Of a step: (number of the branch, place in a batch of several branches, size of what it is given)."""
LOW = 5
"""A frequency is low within a circle whose radius is the shorter side over so much (as in the method's own code)."""


@dataclass
class Guided:
    """Of one request."""

    differences: dict[tuple[Part, Part], Difference] = field(default_factory=dict[tuple[Part, Part], "Difference"])
    """(leading part, other one) -> what the other one has more."""
    leading: tuple[Part, Any] | None = None
    """Of the step at hand, with its result."""
    waiting: list[tuple[Part, Any]] = field(default_factory=list[tuple[Part, Any]])
    """Other parts of the step that were computed, with their results."""
    _calls: int = 0
    """Of the step at hand."""
    _most: int = 1
    """Calls of one step so far: other ranks' results come with the last one, so that ranks wait for each other once."""

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for one in self.differences.values() for x in one.leaves if x is not None)

    def begin(self, step: int, *, keeps: bool) -> None:
        """A step begins. `keeps`: its other branches may be made from the leading one; else they are computed."""
        if self.waiting:
            self._most = self._calls  # guidance has fewer branches now
        self.leading, self.waiting, self._calls = None, [], 1
        if not keeps:
            self.differences = {pair: one for pair, one in self.differences.items() if one.step == step}

    def is_last(self, other: Part, result: Any) -> bool:
        """Takes the result of another part that was computed; whether all of the step are there."""
        self.waiting.append((other, result))
        self._calls += 1
        self._most = max(self._most, self._calls)
        return self._calls >= self._most

    def knows(self, leading: Part, others: list[Part]) -> bool:
        return all((leading, other) in self.differences for other in others)

    def learn(self, step: int, leading: Part, result: Any, other: Part, others: Any) -> None:
        """Keeps how the result of another part differs from the leading one's, where it is of the same shapes."""
        (ours, spec), (its, other_spec) = tree_flatten(result), tree_flatten(others)
        if spec != other_spec or any(_shape(x) != _shape(y) for x, y in zip(ours, its, strict=True)):
            return
        more = [
            y.float() - x.float() if isinstance(x, Tensor) and x.is_floating_point() else None
            for x, y in zip(ours, its, strict=True)
        ]
        self.differences[leading, other] = Difference(step, more)

    def made(self, leading: Part, result: Any, other: Part, weigh: Callable[[Tensor], Tensor]) -> Any:
        """What stands for the result of another part: the leading one's, and the last difference."""
        leaves, spec = tree_flatten(result)
        differences = self.differences[leading, other].leaves
        made = [
            x if more is None else (x.float() + weigh(more)).to(x.dtype)
            for x, more in zip(leaves, differences, strict=True)
        ]
        return tree_unflatten(made, spec)


@dataclass(frozen=True)
class Difference:
    """Of one part from the leading one."""

    step: int
    """In which both were computed."""
    leaves: list[Tensor | None]
    """By leaf of the result; None for what is no numbers."""


def weighed(difference: Tensor, weight: float, passed: float | None, channels: Sequence[int] = ()) -> Tensor:
    """A difference whose low frequencies count for 1 + `weight` in the first half of the steps, and whose high ones do
    in the second (arXiv:2410.19355, eq. 9 and 10). `passed`: what part of the steps is over; None: not known.
    `channels`: how many the result may have, by which a last dim is told that has them. As it is where the result has
    tokens, not height and width."""
    if not weight or passed is None or difference.ndim < 4:
        return difference
    if difference.shape[-1] in channels and difference.shape[1] not in channels:
        return weighed(difference.movedim(-1, 1), weight, passed).movedim(1, -1)
    height, width = difference.shape[-2:]
    y = torch.fft.fftfreq(height, 1 / height, device=difference.device).view(-1, 1)
    x = torch.fft.fftfreq(width, 1 / width, device=difference.device).view(1, -1)
    is_low = x**2 + y**2 <= (min(height, width) // LOW) ** 2
    weights = torch.where(is_low == (passed < 0.5), 1 + weight, 1.0)
    return torch.fft.ifft2(torch.fft.fft2(difference) * weights).real


def _shape(x: Any) -> Any:
    return (x.shape, x.dtype) if isinstance(x, Tensor) else None


def apart(result: Any, batch: int, parts: int) -> list[Any]:
    """The result of a batch of several branches, by branch; tensors with a row for each sample, or lists of tensors."""
    leaves, spec = tree_flatten(result, is_leaf=lambda x: _is_by_sample(x, batch))
    each = batch // parts
    cut = [[x[i * each : (i + 1) * each] if rows(x) == batch else x for x in leaves] for i in range(parts)]
    return [tree_unflatten(one, spec) for one in cut]


def together(parts: list[Any], each: int) -> Any:
    """The reverse of `apart`."""
    flat = [tree_flatten(part, is_leaf=lambda x: _is_by_sample(x, each)) for part in parts]
    joined = [_joined(list(pieces), each) for pieces in zip(*(leaves for leaves, _ in flat), strict=True)]
    return tree_unflatten(joined, flat[0][1])


def _is_by_sample(x: Any, count: int) -> bool:
    return isinstance(x, list) and len(x) == count and all(isinstance(one, Tensor) for one in x)


def _joined(pieces: list[Any], each: int) -> Any:
    if rows(pieces[0]) != each:
        return pieces[-1]
    return torch.cat(pieces) if isinstance(pieces[0], Tensor) else [x for piece in pieces for x in piece]
