"""Exported plans: with them, diffusers' own context parallel gives what the plain model gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from parafuse.engine.export import ExportedPlan, export_plan
from parafuse.engine.verify import relative_error
from parafuse.errors import UnsupportedError
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import EXACT
from tests.models import Inputs, Sizes
from tests.zoo.collect import cases, inputs_of, outputs, randomized

BY_BLOCKS = [
    "ChronoEditTransformer3DModel",
    "GlmImageTransformer2DModel",
    "MiniMaxH3Transformer3DModel",
    "SkyReelsV2Transformer3DModel",
    "WanTransformer3DModel",
]
AS_A_WHOLE = [
    "BriaTransformer2DModel",
    "Flux2Transformer2DModel",
    "Flux3Transformer2DModel",
    "FluxTransformer2DModel",
    "LongCatImageTransformer2DModel",
    "OvisImageTransformer2DModel",
]


def inputs(name: str, sizes: Sizes) -> Inputs:
    return inputs_of(cases()[name], sizes) | {"return_dict": False}  # as pipelines call; diffusers' hooks need it


def even(name: str) -> Sizes:
    """Lengths that divide by 2 and 3: diffusers cuts no others (gloo gathers no unequal parts)."""
    given = cases()[name].sizes
    return replace(given, grid=(2, 6, 6), text=given.text if given.text == 512 else 24)


def exported(name: str) -> ExportedPlan:
    """From lengths that do not divide, so that it holds for others than those it was made from."""
    model = randomized(cases()[name].build())
    return export_plan(model, (), inputs(name, cases()[name].sizes))


def under_diffusers(name: str) -> float:
    """Relative error of diffusers' context parallel with the exported plan."""
    from diffusers import ContextParallelConfig

    model: Any = randomized(cases()[name].build())
    plain = outputs(model, inputs(name, even(name)))
    plan = exported(name).as_diffusers()
    config = ContextParallelConfig(ulysses_degree=dist.get_world_size())
    with patch.object(torch.accelerator, "device_count", lambda: 1):  # it asks for an accelerator's number
        model.enable_parallelism(config=config, cp_plan=plan)
    return relative_error(outputs(model, inputs(name, even(name))), plain)


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("name", BY_BLOCKS + AS_A_WHOLE)
def test_diffusers_is_exact_with_it(name: str) -> None:
    for found in run_ranks(under_diffusers, 3, name):
        assert found <= EXACT


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Flux2Transformer2DModel"])
def test_it_is_the_plan_that_was_written_by_hand(name: str) -> None:
    by_hand: Any = cases()[name].build()._cp_plan
    assert exported(name).as_diffusers() == by_hand


def without_a_cut(name: str) -> float | str:
    """The control: the plan lacks one input."""
    original = ExportedPlan.as_diffusers

    def lacking(self: ExportedPlan) -> Any:
        plan = original(self)
        del next(iter(plan.values()))["img_ids"]
        return plan

    with patch.object(ExportedPlan, "as_diffusers", lacking):
        try:
            return under_diffusers(name)
        except RuntimeError as failure:
            return str(failure)


def test_control_a_missing_cut_shows() -> None:
    for found in run_ranks(without_a_cut, 3, "FluxTransformer2DModel"):
        assert isinstance(found, str) or found > 100 * EXACT


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ChromaTransformer2DModel", "attention 0 has a mask"),
        ("SD3Transformer2DModel", "its processor does not exchange at attention 0"),
        ("AceStepTransformer1DModel", "GQA is not yet supported"),
        ("SanaTransformer2DModel", "the rows of attention 0 are not the tokens of any argument"),
    ],
)
def test_what_the_form_cannot_say_is_refused(name: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match="diffusers' form cannot say") as refusal:
        exported(name)
    assert why in str(refusal.value)


def test_the_source_is_the_plan(tmp_path: Path) -> None:
    plan = exported("WanTransformer3DModel")
    names: dict[str, Any] = {}
    exec(compile(plan.source(), "plan.py", "exec"), names)
    assert names["_cp_plan"] == plan.as_diffusers()
    assert "WanTransformer3DModel" in names["__doc__"]
    assert list(names["_cp_plan"]) == ["blocks.0", "blocks.*", "blocks.1"]


def test_the_model_is_left_as_it_was() -> None:
    model = randomized(cases()["WanTransformer3DModel"].build())
    values = inputs("WanTransformer3DModel", cases()["WanTransformer3DModel"].sizes)
    before = outputs(model, values)
    export_plan(model, (), values)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, values), before, strict=True))
    assert not any("_parallel_config" in vars(m.processor) for m in model.modules() if hasattr(m, "processor"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
