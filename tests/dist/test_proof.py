"""A plan from one size is held against the serial run at another: small sizes can hide what a block does."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

import parafuse
from parafuse.engine import derive as derive_module
from parafuse.engine import standing as standing_module
from parafuse.engine.verify import relative_error
from parafuse.errors import RankError
from parafuse.parallel.block_plan import BlockPlan
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import EXACT, parallel
from tests.models import Sizes
from tests.zoo.collect import cases, inputs_of, outputs, randomized

NAME = "HunyuanVideoTransformer3DModel: image to video by first frame"
"""Its blocks take the number of the first frame's tokens; of a single frame these are all."""


def believed(*_: Any) -> None:
    """In place of the proof."""


def errors(proven: bool) -> list[float]:
    """Of a call with one frame, and of one with three after it."""
    case = cases()[NAME]
    model = randomized(case.build())
    calls = [inputs_of(case, sizes) for sizes in (Sizes(grid=(1, 3, 5)), case.sizes)]
    plain = [outputs(model, values) for values in calls]
    with (
        patch.object(derive_module, "prove", derive_module.prove if proven else believed),
        parafuse.apply(model, parallel((1, 2))),
    ):
        return [relative_error(outputs(model, values), want) for values, want in zip(calls, plain, strict=True)]


def test_a_plan_that_does_not_hold_is_given_up() -> None:
    for found in run_ranks(errors, 2, True):
        assert max(found) <= EXACT


def test_control_without_the_proof_the_result_is_wrong() -> None:
    for found in run_ranks(errors, 2, False):
        assert found[0] <= EXACT
        assert found[1] > 0.01


def another_plan(*args: Any) -> BlockPlan:
    """As a rank would find whose memory ran out, or whose device rounds otherwise."""
    plan = derive_module.derive(*args)
    return plan if dist.get_rank() == 0 else BlockPlan(plan.arguments, plan.sites, {})


def disagreeing() -> str:
    case = cases()["FluxTransformer2DModel"]
    model = randomized(case.build())
    with patch.object(standing_module, "derive", another_plan), parafuse.apply(model, parallel((1, 2))):
        with pytest.raises(RankError) as refusal:
            outputs(model, inputs_of(case, case.sizes))
        return str(refusal.value)


def test_ranks_that_find_different_plans_say_so_before_they_exchange() -> None:
    for text in run_ranks(disagreeing, 2):
        assert text.startswith("FluxTransformerBlock: the ranks find different ways to split it")
