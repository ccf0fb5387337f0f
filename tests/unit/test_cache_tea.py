"""What TeaCache measures: the modulated input of the first block of the stack, step by step, for each sample."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import parafuse
from parafuse.engine.caches.clock import Clock
from parafuse.engine.caches.measure import modulated_input, own_share, relative_changes, relative_sizes
from parafuse.errors import UnsupportedError
from tests.models import ODD, build, inputs

TEA = "teacache:{},warmup_steps=0,final_steps=0"


class Block(nn.Module):
    """Modulates, then joins two streams, or none."""

    def __init__(self, linear: bool = True, joins: bool = False):
        super().__init__()
        self.layer = nn.Linear(4, 4) if linear else nn.Identity()
        self.modulation = nn.Linear(4, 4)
        self.joins = joins

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        modulated = x * (1 + self.modulation(time))[:, None]
        joined = torch.cat([text, modulated], 1) if self.joins else modulated
        return x + self.layer(joined)[:, -x.shape[1] :]


def met(block: Block, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
    leaves, spec = tree_flatten(((x, text, time), {}))
    return modulated_input(block, leaves, spec, x, x.numel() + text.numel())


@torch.no_grad()
def test_it_is_what_the_first_linear_layer_over_the_tokens_is_given() -> None:
    torch.manual_seed(0)
    x, text, time = torch.randn(2, 5, 4), torch.randn(2, 3, 4), torch.randn(2, 4)
    for joins in (False, True):
        block = Block(joins=joins)
        want = x * (1 + block.modulation(time))[:, None]
        assert torch.equal(met(block, x, text, time), torch.cat([text, want], 1) if joins else want)
    with pytest.raises(UnsupportedError, match="Block: applies no linear layer to the tokens of its stream"):
        met(Block(linear=False), x, text, time)


def test_changes_and_sizes_are_by_sample() -> None:
    old = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[4.0, 0.0], [0.0, 4.0]]])
    new = old * torch.tensor([1.5, 0.5])[:, None, None]
    assert relative_changes(own_share(new, 2, None), own_share(old, 2, None), None) == pytest.approx([0.5, 0.5])
    assert relative_sizes(new, old, 2, None) == pytest.approx([1.5, 0.5])
    assert relative_sizes(new, torch.zeros_like(old), 2, None) == [float("inf")] * 2


def levels(cache: str, factors: list[tuple[float, float]], compiled: bool = False) -> tuple[list[str], list[Any]]:
    """(decisions, levels) by step, where a step's two samples have their times moved by a factor."""
    with torch.no_grad(), patch.object(Clock, "counts", True):
        model: Any = build("flux")
        with parafuse.apply(model, parafuse.Config(cache=cache)) as handle, handle.request() as memories:
            for block in model.transformer_blocks if compiled else ():
                block.compile(backend="eager", fullgraph=True)
            for handle.clock.step, factor in enumerate(factors):
                given = inputs("flux", ODD)
                model(**given | {"hidden_states": given["hidden_states"] * torch.tensor(factor)[:, None, None]})
            calls = next(iter(memories.values())).decisions.values()
            letters = ["".join("s" if one.skipped else "c" for one in samples.values()) for samples in calls]
            return letters, [[one.change for one in samples.values()] for samples in calls]


MOVES = [(1.0, 1.0), (1.1, 1.0), (1.2, 1.0), (1.3, 1.4), (1.4, 1.4), (1.5, 1.4)]
"""The first sample drifts in every step, the second one in one step."""


def test_samples_accumulate_and_decide_for_themselves() -> None:
    letters, free = levels(TEA.format("1e9"), MOVES)
    assert letters == ["cc", "cc", "ss", "ss", "ss", "ss"]
    assert free[1] == [None, None]
    first, second = ([one[sample] for one in free[2:]] for sample in (0, 1))
    assert all(a < b for a, b in pairwise(first))
    assert second[0] == 0.0
    assert second[1] == second[2] == second[3] > 0.0  # each step against the one before, not the last computed one
    between = (first[1] + first[2]) / 2
    assert second[1] > between  # so that the threshold below parts them
    letters, held = levels(TEA.format(between), MOVES)
    assert letters == ["cc", "cc", "ss", "sc", "cs", "ss"]
    assert held[5] == pytest.approx([first[3] - first[2], 0.0], abs=1e-6)  # anew since the computed step


def test_beside_compiled_blocks_it_measures_the_same() -> None:
    assert levels(TEA.format("1e9"), MOVES, compiled=True) == levels(TEA.format("1e9"), MOVES)


def test_threshold_zero_skips_nothing() -> None:
    letters, _ = levels(TEA.format("0"), [(1.0, 1.0)] * 4)
    assert letters == ["cc"] * 4
