"""A model under `apply` gives what plain diffusers gives, for every family and layout, whatever the lengths.

How a block is split does not depend on the layout, and what attention exchanges does not depend on the family: so each
family is in every second layout, and neighbours in this order in the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import parafuse
from parafuse.engine import standing as standing_module
from tests.dist.ranks import run_ranks
from tests.models import EQUAL, EVEN, FAMILIES, ODD, ONE, SINGLE, TINY, Sizes, build, call, error, inputs

Layout = tuple[int, int]
LAYOUTS: list[Layout] = [(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (2, 2)]
"""(ring, ulysses)"""
EXACT = 1e-5
CASES = {
    "odd": ODD,
    "the same again": ODD,
    "even": EVEN,
    "text as long as image": EQUAL,
    "fewer than ranks": TINY,
    "one image token": Sizes(grid=(1, 1, 1)),
    "one text token": Sizes(text=1),
    "one token each": ONE,
    "batch 1": SINGLE,
    "one of everything": Sizes(grid=(1, 1, 1), text=1, batch=1),
}
FIRST = {
    "text as long as image": EQUAL,
    "fewer than ranks": TINY,
    "two and two": Sizes(grid=(1, 1, 2), text=2),
    "as many tokens as batch": Sizes(grid=(1, 1, 3), text=3, batch=3),
    "as many tokens as features": Sizes(grid=(1, 6, 8), text=24),
    "no text": Sizes(text=0),
}
"""Calls that could mislead the examination of a block, which happens once and then serves other lengths."""

on_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "ring{}-ulysses{}".format(*layout))
PAIRS = [(f, layout) for i, f in enumerate(FAMILIES) for j, layout in enumerate(LAYOUTS) if (i + j) % 2 == 0]


def parallel(layout: Layout) -> parafuse.Config:
    return parafuse.Config(parallel=parafuse.Parallel(ring=layout[0], ulysses=layout[1]))


def attempt(function: Any, *args: Any) -> Any:
    """What `function` gives, or its error as text: a rank that raises would end the processes of all tests."""
    try:
        return function(*args)
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"


def wrong(found: dict[str, Any]) -> dict[str, Any]:
    """The cases that failed or are not exact."""
    return {name: value for name, value in found.items() if isinstance(value, str) or not value <= EXACT}


def compare(family: str, layout: Layout, cases: dict[str, Sizes]) -> dict[str, Any]:
    """Errors against the plain model by case, what was applied, and whether `remove` brought the plain model back."""
    model = build(family)
    forwards = {name: type(module).forward for name, module in model.named_modules()}
    calls = {name: inputs(family, sizes) for name, sizes in cases.items()}
    plain = {name: call(model, values) for name, values in calls.items()}
    with parafuse.apply(model, parallel(layout)) as handle:
        errors = {
            name: attempt(lambda name=name, values=values: error(call(model, values), plain[name]))
            for name, values in calls.items()
        }
        applied, exchanged = list(handle.applied), {n for n, count in handle.exchanged().items() if count.calls}
    return {
        "errors": errors,
        "applied": applied,
        "exchanged": exchanged,
        "restored": all(torch.equal(call(model, values), plain[name]) for name, values in calls.items()),
        "left": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "classes": all(type(module).forward is forwards[name] for name, module in model.named_modules()),
    }


@pytest.mark.parametrize(("family", "layout"), PAIRS, ids=str)
def test_the_output_is_that_of_one_rank(family: str, layout: Layout) -> None:
    ring, ulysses = layout
    kinds = {"ring.ring"} if ring > 1 else set()
    kinds |= {"ulysses.all_to_all"} if ulysses > 1 else set()
    gathers = "sequence" if ring > 1 and ulysses > 1 else "ring" if ring > 1 else "ulysses"
    axes = " x ".join(f"{axis} {degree}" for axis, degree in (("ring", ring), ("ulysses", ulysses)) if degree > 1)
    for found in run_ranks(compare, ring * ulysses, family, layout, CASES):
        assert wrong(found["errors"]) == {}
        assert len(found["errors"]) == len(CASES)
        assert found["exchanged"] == {*kinds, f"{gathers}.all_gather"}
        assert found["applied"][0].startswith(f"sequence parallel ({axes}) on ")
        assert (found["restored"], found["left"], found["classes"]) == (True, [], True)


def from_each_first_call(family: str, layout: Layout) -> dict[str, Any]:
    """The errors of calls of other lengths, after a first call of each kind."""
    out: dict[str, Any] = {}
    for first, sizes in FIRST.items():
        found = compare(family, layout, {"first": sizes, "odd": ODD, "equal": EQUAL, "tiny": TINY})
        out |= {f"{first}, then {name}": value for name, value in found["errors"].items()}
    return out


@pytest.mark.parametrize(("family", "layout"), zip(FAMILIES, [(1, 3), (2, 2)] * 4, strict=False), ids=str)
def test_the_first_call_may_have_any_lengths(family: str, layout: Layout) -> None:
    for found in run_ranks(from_each_first_call, layout[0] * layout[1], family, layout):
        assert wrong(found) == {}
        assert len(found) == 4 * len(FIRST)


def count_examinations(family: str) -> tuple[list[int], list[float]]:
    """How many blocks had been examined after each of four calls; and the errors."""
    examined: list[str] = []
    derive = standing_module.derive
    model = build(family)
    calls = [inputs(family, sizes) for sizes in (ODD, EVEN, EQUAL, TINY)]
    plain = [call(model, values) for values in calls]

    def counted(block: Any, forward: Any, leaves: Any, spec: Any, plan: Any = None) -> Any:
        examined.extend([type(block).__name__] if plan is None else [])
        return derive(block, forward, leaves, spec, plan)

    standing_module.derive = counted
    try:
        counts, errors = [], []
        with parafuse.apply(model, parallel((1, 2))):
            for values, want in zip(calls, plain, strict=True):
                errors.append(error(call(model, values), want))
                counts.append(len(examined))
    finally:
        standing_module.derive = derive
    return counts, errors


@pytest.mark.parametrize(
    ("family", "kinds"), {"flux": 2, "flux2": 2, "sd3": 3, "wan": 1, "wan_ti2v": 1, "weaver": 1}.items()
)
def test_each_kind_of_block_is_examined_once(family: str, kinds: int) -> None:
    for counts, errors in run_ranks(count_examinations, 2, family):
        assert counts == [kinds] * 4
        assert max(errors) <= EXACT


def in_bfloat16(layout: Layout) -> dict[str, tuple[float, float]]:
    """Family -> largest and mean error against fp32: (parallel, plain) pairs as ratios to be bounded."""
    out = {}
    for family in FAMILIES:
        truth = call(build(family), inputs(family, ODD))
        model = build(family).to(torch.bfloat16)
        values = inputs(family, ODD, dtype=torch.bfloat16)
        plain = call(model, values)
        with parafuse.apply(model, parallel(layout)):
            got = call(model, values)
        assert got.dtype == torch.bfloat16
        out[family] = (error(got, truth), error(plain, truth))
    return out


@pytest.mark.parametrize("layout", [(1, 2), (3, 1), (2, 2)], ids=str)
def test_bfloat16_is_no_further_from_fp32_than_twice_plain(layout: Layout) -> None:
    for found in run_ranks(in_bfloat16, layout[0] * layout[1], layout):
        assert {family: pair for family, pair in found.items() if not 0 < pair[0] <= 2 * pair[1]} == {}
        assert found.keys() == FAMILIES.keys()
