"""Reused parts of blocks on several ranks: the pictures and the decisions of one rank, sharded, with compile too."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch

import parafuse
from parafuse.engine import standing
from parafuse.engine.derive import derive
from parafuse.engine.stack import block_stack
from tests.caches.steps import Run, later, painted, steps_of
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import EXACT
from tests.graphs import Graphs
from tests.models import ODD, Inputs, build, error, inputs
from tests.zoo.collect import cases, inputs_of, randomized

STEPS = 9


def on_ranks(family: str, layout: tuple[int, int], cache: str) -> tuple[Run, int]:
    """(what the cache did, how often a block was examined) on this rank."""
    examined = 0

    def counted(*args: Any) -> Any:
        nonlocal examined
        examined += 1
        return derive(*args)

    ring, ulysses = layout
    with patch.object(standing, "derive", counted):
        parallel = parafuse.Parallel(ring=ring, ulysses=ulysses)
        return steps_of(build(family), cache, [inputs(family, ODD)], STEPS, parallel=parallel), examined


@pytest.mark.parametrize(
    ("family", "layout", "kinds", "caches"),
    [
        ("flux", (1, 3), 2, ["pab:2", "fora:3,feed_forward=2"]),
        ("flux", (2, 1), 2, ["pab:2", "fastercache:2"]),
        ("sd3", (1, 2), 3, ["fora:2"]),
        ("wan", (1, 2), 1, ["pab:2,2,3", "tgate:4"]),
        ("wan", (2, 1), 1, ["pab:2,2,3"]),
    ],
)
def test_several_ranks_give_what_one_gives(family: str, layout: tuple[int, int], kinds: int, caches: list[str]) -> None:
    plain = steps_of(build(family), "", [inputs(family, ODD)], STEPS)
    for cache in caches:
        want = steps_of(build(family), cache, [inputs(family, ODD)], STEPS)
        reused = [i for i, letters in enumerate(want.decisions) if "s" in letters]
        assert {"cc", "ss"} == set(want.decisions) or cache.startswith("tgate")
        assert error(want.outputs[reused[-1]], plain.outputs[reused[-1]]) > 100 * EXACT  # what is reused shows
        for got, examined in run_ranks(on_ranks, math.prod(layout), family, layout, cache):
            assert examined == kinds  # what stands on parts does not make blocks look different
            assert got.decisions == want.decisions
            assert max(map(error, got.outputs, want.outputs)) <= EXACT
            assert got.most_bytes < 0.75 * want.most_bytes


def from_the_first_call(layout: tuple[int, int]) -> Run:
    """What the first call gives, in which blocks are examined, is reused in the second."""
    ring, ulysses = layout
    parallel = parafuse.Parallel(ring=ring, ulysses=ulysses)
    cache = "pab:2,2,2,warmup_steps=1"
    return steps_of(build("wan"), cache, [inputs("wan", ODD)], 4, parallel=parallel, move=other_latents)


def other_latents(values: Inputs, step: int) -> Inputs:
    return values | dict(hidden_states=later(values, step)["hidden_states"])


def test_examining_blocks_leaves_nothing_to_reuse() -> None:
    want = from_the_first_call((1, 1))
    assert want.decisions == ["cc", "ss", "cc", "ss"]
    for got in run_ranks(from_the_first_call, 2, (1, 2)):
        assert got.decisions == want.decisions
        assert max(map(error, got.outputs, want.outputs)) <= EXACT


def compiled(name: str, cache: str, ulysses: int) -> tuple[Run, Run, int]:
    """(uncompiled, compiled, graphs of the same blocks without a cache) of one case."""
    case = cases()[name]
    parallel = parafuse.Parallel(ulysses=ulysses)
    values = [inputs_of(case, case.sizes)]

    def run(asked: str, graphs: Graphs | None) -> Run:
        torch.compiler.reset()
        model = randomized(case.build()).eval()

        def compile() -> None:
            for block in block_stack(model) if graphs else ():
                block.compile(fullgraph=True, backend=graphs)

        return steps_of(
            model, asked, values, STEPS, parallel=parallel, graphs=lambda: graphs.made if graphs else 0, prepare=compile
        )

    return run(cache, None), run(cache, Graphs()), run("interval:1000", Graphs()).graphs[-1]


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize(
    ("name", "cache", "kinds"),
    [
        ("FluxTransformer2DModel", "pab:2,2,2", 2),
        ("WanTransformer3DModel", "fora:2", 2),
        ("SanaTransformer2DModel", "fora:2", 2),  # on whole shapes
        ("WanTransformer3DModel", "pab:2,2,3", 4),  # self and cross, each computed or not
    ],
)
def test_blocks_compile_once_for_each_way_to_run_them(name: str, cache: str, kinds: int) -> None:
    for plain, got, graphs in run_ranks(compiled, 2, name, cache, 2, timeout_s=200):
        assert max(map(error, got.outputs, plain.outputs)) <= EXACT
        assert got.decisions == plain.decisions
        assert {"cc", "ss"} == set(got.decisions)
        assert graphs < got.graphs[-1] <= kinds * graphs
        assert got.graphs[-1] == got.graphs[6]  # nothing is compiled anew


@pytest.mark.parametrize(
    ("name", "cache", "degrees", "prompts"),
    [
        ("Stable Diffusion", "tgate:4", dict(cfg=2, ulysses=1), 1),  # branches in the batch
        ("Stable Diffusion XL", "token-merging:0.5,max_downsample=2", dict(cfg=2, ulysses=1), 1),
        ("Wan 2.1", "pab:2,2,3", dict(cfg=2, ulysses=1), 1),  # a call for each branch
        ("Wan 2.1", "fora:2", dict(data=2, ulysses=1), 2),
        ("Stable Diffusion 3", "fastercache:2", dict(cfg=2, ulysses=1), 2),
        ("Stable Diffusion 3", "pab:2", dict(cfg=2, ulysses=2), 1),
    ],
)
def test_branches_and_samples_apart_give_what_they_give_together(
    name: str, cache: str, degrees: dict[str, int], prompts: int
) -> None:
    want = painted(name, cache, {}, prompts, 8)
    plain = painted(name, "", {}, prompts, 8)
    everyone = run_ranks(painted, math.prod(degrees.values()), name, cache, degrees, prompts, 8, timeout_s=120)
    for request, one in enumerate(want):
        assert error(one.outputs[0], plain[request].outputs[0]) > 100 * EXACT
        letters = {letter for samples in one.calls.values() for letter in samples.values()}
        assert letters == {"c"} if cache.startswith("token") else {"c", "s"}
        merged: dict[int, dict[int, str]] = {}
        for got in everyone:
            assert error(got[request].outputs[0], one.outputs[0]) <= EXACT
            for number, samples in got[request].calls.items():
                mine = merged.setdefault(number, {})
                assert all(mine.get(row, letter) == letter for row, letter in samples.items())
                mine |= samples
        assert merged == one.calls
