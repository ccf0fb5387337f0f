"""Which of a block's results goes on from which of its arguments: told by one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.parallel.shard import Sharded

LOUD = 100.0
"""Of a probe's noise, over the size of the argument: what goes on unchanged then outweighs all that is made of it."""
ALIKE = 0.7
"""Least correlation of a result with the noise in the argument that it goes on from."""


@dataclass(frozen=True)
class Blank:
    """A tensor without its values."""

    like: Tensor
    """On the meta device, or with such rows."""
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> Blank:
        local = x.local if isinstance(x, Sharded) else x
        blank = torch.empty_like(local, device="meta")
        return Blank(x.like(blank) if isinstance(x, Sharded) else blank, local.device)

    def narrow(self, samples: int, of: int) -> Blank:
        """The same for fewer samples, where it has rows for each."""
        local = self.like.local if isinstance(self.like, Sharded) else self.like
        if not local.ndim or local.shape[0] % of:
            return self
        fewer = local.new_empty((local.shape[0] // of * samples, *local.shape[1:]))
        return Blank(self.like.like(fewer) if isinstance(self.like, Sharded) else fewer, self.device)

    def zeros(self) -> Tensor:
        """Zeros of its shape, which take no memory."""
        local = self.like.local if isinstance(self.like, Sharded) else self.like
        filled = torch.zeros((), dtype=local.dtype, device=self.device).expand(local.shape)
        return self.like.like(filled) if isinstance(self.like, Sharded) else filled


@dataclass(frozen=True)
class Seen:
    """One call of a unit."""

    unit: nn.Module
    spec: TreeSpec
    """Of its result."""
    sources: dict[int, int | None]
    """Leaf of the result that is a stream -> leaf of the arguments that it goes on from; None: from none of them."""
    others: dict[int, Any]
    """Leaves of the result that are no tensors."""
    blanks: dict[int, Blank]
    """Streams without values."""
    stream_numbers: int
    """Numbers in all streams that go on, over all ranks."""

    def narrow(self, samples: int, of: int) -> Seen:
        """The same for fewer samples."""
        return replace(self, blanks={i: blank.narrow(samples, of) for i, blank in self.blanks.items()})

    @property
    def main(self) -> int:
        """The leaf of the result that belongs to the first argument with one: the picture's stream, by custom."""
        going_on = [leaf for leaf, source in self.sources.items() if source is not None]
        return min(going_on, key=lambda leaf: self.sources[leaf] or 0) if going_on else min(self.sources)

    def main_argument(self, leaves: list[Any]) -> Any:
        """What that goes on from, of the arguments of such a call; None: from nothing."""
        source = self.sources[self.main]
        return None if source is None else leaves[source]


class Observer:
    """Tells what a unit's results go on from; remembers it for units that are alike."""

    def __init__(self) -> None:
        self._known: dict[Any, dict[int, int | None]] = {}

    def see(self, unit: nn.Module, run: Callable[..., Any], leaves: list[Any], spec: TreeSpec, result: Any) -> Seen:
        """`leaves`, `spec`: the arguments that gave `result`. Runs the unit again where shapes do not tell; collective
        then, as the unit is."""
        out, result_spec = tree_flatten(result)
        streams = [i for i, x in enumerate(out) if isinstance(x, Tensor)]
        key = (type(unit), str(spec), *(_fact(x) for x in leaves), *(_fact(x) for x in out))
        if key not in self._known:
            self._known[key] = self._told(run, leaves, spec, out, streams)
        sources = self._known[key]
        numbers = sum(out[i].numel() for i, source in sources.items() if source is not None)
        numbers = numbers or sum(out[i].numel() for i in streams)
        others = {i: x for i, x in enumerate(out) if i not in streams}
        blanks = {i: Blank.of(out[i]) for i in streams}
        return Seen(unit, result_spec, sources, others, blanks, numbers)

    def _told(
        self, run: Callable[..., Any], leaves: list[Any], spec: TreeSpec, out: list[Any], streams: list[int]
    ) -> dict[int, int | None]:
        may_be = {i: [k for k, x in enumerate(leaves) if _are_alike(x, out[i])] for i in streams}
        asked = sorted({k for found in may_be.values() if len(found) > 1 for k in found})
        louder = {k: self._louder(run, leaves, spec, k) for k in asked}
        sources: dict[int, int | None] = {}
        for i, found in may_be.items():
            if len(found) < 2:
                sources[i] = found[0] if found else None
                continue
            scores = {k: _correlation(louder[k][1][i], out[i], louder[k][0]) for k in found}
            best = max(found, key=lambda k: scores[k])
            sources[i] = best if scores[best] >= ALIKE else None
        return sources

    @staticmethod
    def _louder(run: Callable[..., Any], leaves: list[Any], spec: TreeSpec, place: int) -> tuple[Tensor, list[Any]]:
        """(noise, the results with that noise in one argument)."""
        given = leaves[place]
        whole = given.whole() if isinstance(given, Sharded) else given
        generator = torch.Generator("cpu").manual_seed(place)
        noise = torch.randn(whole.shape, generator=generator).to(whole.device, torch.float32)
        noise = noise * (LOUD * whole.float().square().mean().sqrt().clamp_min(1e-6))
        changed = [*leaves[:place], (whole.float() + noise).to(whole.dtype), *leaves[place + 1 :]]
        args, kwargs = tree_unflatten(changed, spec)
        return noise, tree_flatten(run(*args, **kwargs))[0]


def _fact(x: Any) -> Any:
    return (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _are_alike(argument: Any, result: Tensor) -> bool:
    return (
        isinstance(argument, Tensor)
        and argument.is_floating_point()
        and argument.ndim > 1
        and (argument.shape, argument.dtype) == (result.shape, result.dtype)
    )


def _correlation(louder: Tensor, plain: Tensor, noise: Tensor) -> float:
    change = (louder - plain).float()
    change = change.whole() if isinstance(change, Sharded) else change
    size = change.norm() * noise.norm()
    return float((change * noise).sum() / size.clamp_min(1e-30))
