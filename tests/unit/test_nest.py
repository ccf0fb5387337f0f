"""Arguments by leaf, as torch's pytree gives them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from parafuse.parallel.nest import Flattener

X = torch.zeros(2)


@pytest.mark.parametrize(
    "tree",
    [
        ((X, None), dict(a=X, b=(X, X), c={}, d=[1, "two"])),
        ((X,), dict(a=dict(b=dict(c=X)), d=())),
        X,
        (X, [X, (3.0, True)]),
        ((), OrderedDict(a=X)),  # not of the quick kinds
        ((torch.Size([1, 2]),), {}),
        ((object(),), {}),
    ],
)
def test_leaves_and_structure_are_those_of_torch(tree: Any) -> None:
    flatten = Flattener()
    for _ in range(2):
        leaves, spec = flatten(tree)
        want, want_spec = tree_flatten(tree)
        assert len(leaves) == len(want)
        assert all(a is b for a, b in zip(leaves, want, strict=True))
        assert spec == want_spec
    assert type(tree_unflatten(leaves, spec)) is type(tree)  # pyright: ignore[reportPossiblyUnboundVariable]


def test_structures_that_differ_have_specs_of_their_own() -> None:
    flatten = Flattener()
    trees: list[Any] = [
        ((X, X), {}), ((X,), dict(a=X)), ((X,), dict(b=X)), (((X,), X), {}), (([X], X), {}), ((X, (X,)), {}),
        ((dict(a=X),), {}), ((dict(b=X),), {}), ((X,), dict(a=X, b=())), ((X,), dict(a=X, b={})),
    ]  # fmt: skip
    for tree in trees:
        assert flatten(tree)[1] == tree_flatten(tree)[1]
    assert len({str(flatten(tree)[1]) for tree in trees}) == len(trees)
