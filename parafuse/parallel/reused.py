"""What a cache tells sequence parallel of a block whose parts it reuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.utils._pytree import TreeSpec

from parafuse.parallel.hooks import Forward


@dataclass(frozen=True)
class Explicit:
    """A call of a block with all that passes through it as arguments and results."""

    forward: Forward
    leaves: list[Any]
    """The block's own first."""
    spec: TreeSpec
    finish: Callable[[Any], Any]
    """Makes the block's own result of what the call gives."""


class Reused(Protocol):
    """Of the call at hand."""

    def left_out(self, block: nn.Module) -> frozenset[int]:
        """The attention calls that the block does not make."""
        ...

    def variant(self, block: nn.Module) -> Any:
        """What the call reuses, as a key: it is another graph for each."""
        ...

    def explicit(self, block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec) -> Explicit:
        """The same call for what records a block without a look at the objects that it uses."""
        ...


class NothingReused:
    """Where there is no such cache."""

    def left_out(self, block: nn.Module) -> frozenset[int]:
        return frozenset()

    def variant(self, block: nn.Module) -> Any:
        return None

    def explicit(self, block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec) -> Explicit:
        return Explicit(forward, leaves, spec, lambda result: result)
