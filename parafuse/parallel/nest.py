"""The arguments of a call by leaf, as torch's pytree gives them, but quick for those that blocks mostly get: its own
way takes as long as a small kernel, once for each block of each step."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

_ATOMS = (Tensor, type(None), bool, int, float, str)


class Flattener:
    """Remembers the specs of the structures that it has met. One for each owner: their number stays small."""

    def __init__(self) -> None:
        self._specs: dict[Any, TreeSpec] = {}

    def __call__(self, tree: Any) -> tuple[list[Any], TreeSpec]:
        """(leaves, spec), as `tree_flatten` gives them."""
        leaves: list[Any] = []
        shape: list[Any] = []
        if not _walk(tree, leaves, shape):
            return tree_flatten(tree)
        key = tuple(shape)
        if key not in self._specs:
            self._specs[key] = tree_flatten(tree)[1]
        return leaves, self._specs[key]


def leaves_of(tree: Any) -> list[Any]:
    """As `tree_leaves` gives them."""
    leaves: list[Any] = []
    return leaves if _walk(tree, leaves, []) else tree_leaves(tree)


def _walk(x: Any, leaves: list[Any], shape: list[Any]) -> bool:
    """Adds the leaves of a nest, and what its structure is; False where it has something else in it."""
    if isinstance(x, _ATOMS):
        leaves.append(x)
        shape.append(None)
        return True
    kind = type(x)
    if kind is tuple or kind is list:
        shape.append((kind, len(x)))
        parts = x
    elif kind is dict:
        shape.append((kind, *x))
        parts = x.values()
    else:
        return False
    for part in parts:  # noqa: SIM110 - a loop is quicker here
        if not _walk(part, leaves, shape):
            return False
    return True
