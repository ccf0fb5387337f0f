"""k-diffusion's samplers: which scheduler of diffusers takes the same steps, and on a denoiser of two ranks."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import parafuse
from tests.dist.ranks import run_ranks
from tests.guided import flux
from tests.models import error
from tests.schedulers.k_diffusion import EQUAL, EXAMPLE, NEAR, UNEQUAL, Pair, difference, samplers

PAGE = Path(__file__).parents[2] / "docs" / "schedulers.md"
EXACT = 1e-5
SAMPLERS = ("euler", "heun", "dpmpp_2m")


@cache
def sampling() -> Any:
    try:
        return samplers()
    except ImportError as missing:
        pytest.skip(f"k-diffusion's samplers cannot be imported: {missing}")


@pytest.mark.parametrize("pair", EQUAL, ids=lambda pair: f"{pair.sampler}, {pair.scheduler}, {dict(pair.config)}")
def test_the_scheduler_takes_the_steps_of_the_sampler(pair: Pair) -> None:
    assert difference(pair, sampling()) <= EXACT


def test_another_scheduler_does_not() -> None:
    pair = Pair(sampler="sample_heun", scheduler="KDPM2DiscreteScheduler")
    assert difference(pair, sampling()) > 1e-3
    assert difference(NEAR, sampling()) > 1e-1  # where this fails, diffusers has changed: move it to EQUAL


def test_every_sampler_is_placed() -> None:
    there = {name for name in dir(sampling()) if name.startswith("sample_")}
    assert there == {pair.sampler for pair in EQUAL} | set(UNEQUAL)
    assert not {pair.sampler for pair in EQUAL} & set(UNEQUAL)


def test_the_page_has_every_sampler_and_what_it_is_equal_to() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `sample_")]
    for pair in EQUAL:
        said = [row for row in rows if row.startswith(f"| `{pair.sampler}`")]
        assert any(f"`{pair.scheduler}`" in row for row in said), pair
    for sampler in UNEQUAL:
        assert any(re.match(rf"\| `{sampler}` .*\| none", row) for row in rows), sampler


def on_all_ranks() -> list[tuple[float, float]]:
    """By sampler: (error against one rank, difference that one step more makes)."""
    spec: Any = importlib.util.spec_from_file_location("k_samplers", EXAMPLE)
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.SIZE = 20  # 25 tokens, which two ranks share as 13 and 12
    pipeline = flux.build("FluxPipeline")

    def painted(sampler: str, steps: int = 3) -> Tensor:
        return example.latents(pipeline, sampler, "a red apple", steps=steps, seed=7)

    alone = {sampler: (painted(sampler), painted(sampler, 4)) for sampler in SAMPLERS}
    with parafuse.apply(pipeline, parafuse.Config(parallel=parafuse.Parallel(ulysses=2))) as handle:
        found = [(error(painted(name), want), error(more, want)) for name, (want, more) in alone.items()]
        assert handle.exchanged()["ulysses.all_to_all"].calls > 0
    return found


def test_samplers_paint_on_two_ranks_what_they_paint_on_one() -> None:
    sampling()
    for found in run_ranks(on_all_ranks, 2):
        assert len(found) == len(SAMPLERS)
        for wrong, another in found:
            assert wrong <= EXACT
            assert another > 1e-3
