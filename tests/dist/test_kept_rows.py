"""Rows that every rank has beside split ones: as many as the values of a mask tell, or kept from an earlier call."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import parafuse
from parafuse.engine import probe as probe_module
from parafuse.engine.verify import relative_error
from parafuse.parallel.comm import since
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import EXACT, parallel
from tests.support.exchanges import gathers
from tests.zoo.collect import cases, inputs_of, outputs, randomized

NAME = "MochiTransformer3DModel"
"""Its blocks take the text tokens that the mask names, of each sample by itself."""
MASKS = {
    "all, then some, then none": ([1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]),
    "none, then some, then all": ([0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]),
    "the first, then the last": ([1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 1]),
}


def mask_of(pattern: list[int], text: int) -> Tensor:
    """(2, text): the second sample has one valid token more than the first, at the end."""
    first = torch.tensor((pattern * text)[:text], dtype=torch.bool)
    second = first.clone()
    second[-1] = True
    return torch.stack([first, second])


def errors(layout: tuple[int, int], order: str, sees_rows_go: bool = True) -> tuple[list[float], int]:
    """Of one call after another, all of the same sizes, with masks of other values; and the gathers of the first."""
    case = cases()[NAME]
    model = randomized(case.build())
    values = inputs_of(case, case.sizes)
    calls = [values | {"encoder_attention_mask": mask_of(pattern, case.sizes.text)} for pattern in MASKS[order]]
    plain = [outputs(model, call) for call in calls]
    blind = patch.object(probe_module, "_rows_gone", probe_module._rows_gone if sees_rows_go else lambda *_: None)
    with blind, parafuse.apply(model, parallel(layout)) as handle:
        found = [relative_error(outputs(model, call), want) for call, want in zip(calls, plain, strict=True)]
        before = handle.exchanged()  # of another call: the first one examines
        outputs(model, calls[0])
        return found, gathers(since(handle.exchanged(), before))


@pytest.mark.parametrize(("layout", "order"), list(zip([(1, 3), (2, 2), (1, 2)], MASKS, strict=True)))
def test_the_values_of_a_mask_may_change_between_calls_of_one_size(layout: tuple[int, int], order: str) -> None:
    for found in run_ranks(errors, layout[0] * layout[1], layout, order):
        assert max(found[0]) <= EXACT
        # The result, and the kept rows of each attention: 3 blocks, 2 samples, the first without text in "none".
        assert found[1] == (4 if order.startswith("none") else 7)


def test_control_rows_that_come_and_go_are_not_seen() -> None:
    """Text that seems to be split like any stream: the simulated ranks show that it cannot be."""
    for found in run_ranks(errors, 2, (1, 2), "all, then some, then none", False):
        assert max(found[0]) <= EXACT
        assert found[1] > 7
