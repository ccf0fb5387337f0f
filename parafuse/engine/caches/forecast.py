"""What the skipped part of a stack would add, from what it added in the steps that were computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parafuse.errors import UnsupportedError
from parafuse.parallel.shard import Sharded


def local_of(x: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return x.local if isinstance(x, Sharded) else x


def with_local(x: Tensor, local: Tensor) -> Tensor:
    """A tensor like `x`, of which this rank holds `local`."""
    return x.like(local) if isinstance(x, Sharded) else local


def sample_dim(x: Tensor, samples: int) -> int:
    """The dim of a stream along which its samples lie, or several rows of each: the first one; the second one where a
    model has its tokens first. Raises UnsupportedError where there is none."""
    tokens_first = isinstance(x, Sharded) and x.token_dim == 0
    if x.ndim and not tokens_first and x.shape[0] == samples:
        return 0
    if x.ndim > 2 and x.shape[1] == samples:
        return 1
    if x.ndim and not tokens_first and x.shape[0] % samples == 0:
        return 0
    if samples == 1:
        return 1 if tokens_first else 0
    raise UnsupportedError(
        f"a cache cannot tell the {samples} samples of a batch apart in a stream of shape {tuple(x.shape)}; ask for "
        "one picture at a time."
    )


def tells_apart(x: Tensor, samples: int) -> bool:
    try:
        return sample_dim(x, samples) >= 0
    except UnsupportedError:
        return False


def by_samples(x: Tensor, samples: int) -> Tensor:
    """(samples, n): what this rank holds of each."""
    dim = sample_dim(x, samples)
    return local_of(x).movedim(dim, 0).reshape(samples, -1)


def chosen(x: Tensor, rows: list[int], of: int) -> Tensor:
    """Of `of` samples, these."""
    dim, local = sample_dim(x, of), local_of(x)
    picked = local.movedim(dim, 0).unflatten(0, (of, -1))[rows].flatten(0, 1).movedim(0, dim)
    return with_local(x, picked.contiguous())


def spread(x: Tensor, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """A value for each sample, so that it broadcasts against what this rank holds of a stream."""
    dim, local = sample_dim(x, len(values)), local_of(x)
    each = torch.tensor(list(values), device=local.device, dtype=dtype)
    each = each.repeat_interleave(local.shape[dim] // len(values))
    return each.view([-1 if d == dim else 1 for d in range(local.ndim)])


def mixed(x: Tensor, other: Tensor, mine: list[bool]) -> Tensor:
    """`x` for the samples that are marked, `other` for the rest; held as `x` is."""
    if all(mine):
        return x
    return with_local(x, torch.where(spread(x, mine, torch.bool), local_of(x), local_of(other)))


@dataclass
class Residual:
    """Of one stream: the last residual and its divided differences over steps, by sample. Held as the stream is: each
    rank has its own rows."""

    order: int
    terms: list[Tensor] = field(default_factory=list[Tensor])
    """The residual at the last computed step; from order 1 on its first (and second) difference quotient."""
    steps: list[int] = field(default_factory=list[int])
    """By sample: the last computed step."""
    known: list[int] = field(default_factory=list[int])
    """By sample: how many terms it has; the others are zero."""

    def learn(self, new: Tensor, step: int, computed: list[bool]) -> None:
        """Takes in what the stack added at `step`, for the samples that were computed."""
        if not self.terms:
            self.terms, self.steps, self.known = [new], [step] * len(computed), [1] * len(computed)
            return
        fresh = [new]
        passed = [max(1, step - last) for last in self.steps]
        for k, old in enumerate(self.terms[: self.order], 1):
            slope = with_local(new, (local_of(fresh[-1]) - local_of(old)) / _by_sample(new, passed))
            fresh.append(mixed(slope, _zeros(new), [count >= k for count in self.known]))
        kept = [*self.terms, *[_zeros(new)] * (len(fresh) - len(self.terms))]
        self.terms = [mixed(one, other, computed) for one, other in zip(fresh, kept, strict=True)]
        self.known = [
            min(count + 1, self.order + 1) if mine else count for mine, count in zip(computed, self.known, strict=True)
        ]
        self.steps = [step if mine else last for mine, last in zip(computed, self.steps, strict=True)]

    def at(self, step: int) -> Tensor:
        """What the stack would add at `step`, along the Taylor series."""
        first = self.terms[0]
        total = local_of(first)
        for k, term in enumerate(self.terms[1:], 1):
            weights = [(step - last) ** k / math.factorial(k) for last in self.steps]
            total = total + local_of(term) * _by_sample(first, weights)
        return with_local(first, total)

    def narrow(self, rows: list[int], of: int) -> None:
        """Keeps some of `of` samples."""
        self.terms = [chosen(term, rows, of) for term in self.terms]
        self.steps = [self.steps[row] for row in rows]
        self.known = [self.known[row] for row in rows]

    @property
    def nbytes(self) -> int:
        return sum(local_of(term).nbytes for term in self.terms)


def _by_sample(x: Tensor, numbers: list[float] | list[int]) -> Tensor | float:
    """A number, or where samples differ, what broadcasts against what this rank holds of a stream."""
    return numbers[0] if len(set(numbers)) == 1 else spread(x, numbers, local_of(x).dtype)


def _zeros(x: Tensor) -> Tensor:
    return with_local(x, torch.zeros_like(local_of(x)))
