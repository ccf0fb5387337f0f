"""Where values come from, operator by operator, and running again what leads to some of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from parafuse.engine.rewrites.flow import UNKNOWN, Flow, Slice

A, B = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
WEIGHT = torch.ones(3)


def written(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(2, 3)
    out[0] = a
    out[1].add_(b)
    return out[0]  # of one memory


def decided(a: Tensor, b: Tensor) -> Tensor:
    return torch.ones(3) if bool(a.sum() > 0) else torch.zeros(3)


def chosen(a: Tensor, b: Tensor) -> Tensor:
    return torch.zeros(len(b[a > 1]))


def reused(a: Tensor, b: Tensor) -> Tensor:
    """Memory that is let go may be given to another."""
    fresh = WEIGHT
    for _ in range(50):
        lost = a * 2
        del lost
        fresh = torch.tensor([7.0, 8.0, 9.0])
    return fresh


@pytest.mark.parametrize(
    ("function", "sources"),
    [
        (lambda a, b: a * WEIGHT, {0}),
        (lambda a, b: a[None].expand(2, -1).t() @ b[:2], {0, 1}),
        (lambda a, b: torch.zeros_like(a) + b, {1}),  # a shape is no value
        (lambda a, b: torch.arange(len(a)) + WEIGHT, set[int]()),
        (written, {0, 1}),
        (decided, {0}),
        (chosen, {0, 1}),
        (reused, set[int]()),
    ],
)
def test_sources(function: Callable[[Tensor, Tensor], Tensor], sources: set[int]) -> None:
    with torch.no_grad(), Flow([A.clone(), B.clone()]) as flow:
        out = function(*flow.leaves)
    assert flow.sources_of(out) == sources


def test_what_was_not_seen() -> None:
    made = torch.ones(3)
    with torch.no_grad(), Flow([A], unseen=UNKNOWN) as flow:
        assert flow.sources_of(A * made) == {0} | UNKNOWN
        flow.mark(made, ())
        assert flow.sources_of(A * made) == {0}


def test_a_slice_runs_again_with_other_arguments_and_the_weights_of_then() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)

    def run(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        kept = a.clone().add_(1.0)
        return layer(kept.sin()), kept * b

    with torch.no_grad():
        with Flow([A, B], keeps=lambda sources: 1 not in sources) as flow:
            target, _ = run(A, B)
        again = Slice(flow, [target], layer)
        assert again.is_pure
        other = torch.rand(3)
        assert torch.equal(again({0: other})[0], run(other, B)[0])
        assert torch.equal(again({0: A})[0], target)
        stacked = torch.func.vmap(lambda a: again({0: a})[0])(torch.stack([A, other]))
        assert torch.allclose(stacked[1], run(other, B)[0])
        layer.weight = nn.Parameter(2 * layer.weight)
        assert torch.equal(again({0: other})[0], run(other, B)[0])


def test_a_slice_that_writes_into_its_arguments_is_not_run_again() -> None:
    with torch.no_grad():
        with Flow([A.clone()], keeps=lambda _: True) as flow:
            target = flow.leaves[0].add_(1.0) * 2
        assert not Slice(flow, [target], nn.Module()).is_pure
