"""A model under `apply` gives what plain diffusers gives, for every family and layout, whatever the lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import parafuse
from parafuse.config import Axis
from parafuse.engine import apply as apply_module
from parafuse.engine.stack import block_stack
from parafuse.parallel.layout import ring_bytes, ulysses_bytes
from tests import models
from tests.dist.ranks import run_ranks
from tests.models import EQUAL, EVEN, FAMILIES, ODD, ONE, SINGLE, TINY, Sizes, build, call, error, inputs

Layout = tuple[int, int]
LAYOUTS: list[Layout] = [(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (2, 2)]
"""(ring, ulysses)"""
NAMES = [f"ring{ring}-ulysses{ulysses}" for ring, ulysses in LAYOUTS]
CASES = {"odd": ODD, "again": ODD, "even": EVEN, "text as long as image": EQUAL, "fewer than ranks": TINY,
         "one token": ONE, "batch 1": SINGLE}  # fmt: skip
EXACT = 1e-5

on_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
on_families = pytest.mark.parametrize("family", FAMILIES)


def parallel(layout: Layout) -> parafuse.Config:
    return parafuse.Config(parallel=parafuse.Parallel(ring=layout[0], ulysses=layout[1]))


def attempt(function: Any, *args: Any) -> Any:
    """What `function` gives, or its error as text: a rank that raises would end the processes of all tests."""
    try:
        return function(*args)
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"


def compare(family: str, layout: Layout, cases: dict[str, Sizes]) -> dict[str, Any]:
    """Case -> error against the plain model; and whether `remove` brought the plain model back."""
    model = build(family)
    calls = {name: inputs(family, sizes) for name, sizes in cases.items()}
    plain = {name: call(model, values) for name, values in calls.items()}
    with parafuse.apply(model, parallel(layout)) as handle:
        found = {
            name: attempt(lambda name=name, values=values: error(call(model, values), plain[name]))
            for name, values in calls.items()
        }
        found["applied"] = list(handle.applied)
    again = {name: call(model, values) for name, values in calls.items()}
    found["restored"] = all(torch.equal(again[name], plain[name]) for name in calls)
    return found


@on_layouts
@on_families
def test_the_output_is_that_of_one_rank(family: str, layout: Layout) -> None:
    ring, ulysses = layout
    for rank, found in enumerate(run_ranks(compare, ring * ulysses, family, layout, CASES)):
        applied = found.pop("applied")
        assert found.pop("restored"), f"rank {rank}"
        wrong = {name: value for name, value in found.items() if isinstance(value, str) or not value <= EXACT}
        assert not wrong, f"rank {rank}"
        assert len(found) == len(CASES)
        axes = " x ".join(f"{axis} {n}" for axis, n in (("ring", ring), ("ulysses", ulysses)) if n > 1)
        assert applied[0].startswith(f"sequence parallel ({axes}) on ")
