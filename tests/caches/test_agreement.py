"""Ranks agree on what a cache skips, it is what one rank skips, and nothing is left of a request. Each safeguard is
switched off once, to see that it is the one that holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import parafuse
from parafuse.cache import FirstBlockCache
from parafuse.engine.caches.skipping import StackSkipping
from parafuse.engine.verify import relative_error
from parafuse.errors import ConfigError
from tests.caches.painted import EVERY_STEP, Stopped, painted, parting, stop_at_4
from tests.dist.ranks import run_ranks
from tests.guided.cells import seeded, tensors
from tests.guided.collect import cases
from tests.models import ODD, build, call, inputs

EXACT = 1e-5
LAYOUTS: dict[str, dict[str, int]] = {
    "cfg 2": dict(cfg=2, ulysses=1),
    "data 2": dict(data=2, ulysses=1),
    "Ulysses 3": dict(ulysses=3),
    "ring 2": dict(ring=2, ulysses=1),
    "cfg 2 x Ulysses 2": dict(cfg=2, ulysses=2),
    "cfg 2 x data 2": dict(cfg=2, data=2, ulysses=1),
}
PIPELINES = {
    "FLUX.1": ("cfg 2", "Ulysses 3", "cfg 2 x Ulysses 2"),  # a call for each branch
    "Stable Diffusion 3: skipped layers": ("data 2", "cfg 2 x data 2"),  # stacked, and a branch that comes and goes
    "Lumina-Image 2.0": ("cfg 2", "ring 2"),  # guidance ends; prompts of different lengths
}


@pytest.mark.parametrize("branches", ["separate", "joint"])
@pytest.mark.parametrize("name", PIPELINES)
def test_every_layout_decides_as_one_rank_does(name: str, branches: str) -> None:
    cache = parting(name, 2, branches=branches)
    want, word = painted(name, cache, prompts=2)
    letters = "".join(letter for calls in word["decisions"].values() for letter in calls)
    assert {"c", "s"} <= set(letters)
    if branches == "separate":
        assert any(len(set(letter)) == 2 for calls in word["decisions"].values() for letter in calls), "samples agree"
    for layout in PIPELINES[name]:
        degrees = LAYOUTS[layout]
        size = 4 if " x " in layout else int(layout[-1])
        for found, said in run_ranks(painted, size, name, cache, degrees, 2, timeout_s=120):
            assert said["decisions"] == word["decisions"], layout
            assert said["hits"] == word["hits"]
            assert relative_error(found, want) <= EXACT, layout


def test_a_sample_decides_in_a_batch_as_it_does_alone() -> None:
    cache = parting("FLUX.1", 2)
    _, together = painted("FLUX.1", cache, prompts=2)
    _, alone = painted("FLUX.1", cache, prompts=1)
    assert [letters[0] for letters in together["decisions"]["transformer"]] == alone["decisions"]["transformer"]


# What each rank sees of a change differs: only the first tokens of the sample move.


def moved(step: int) -> dict[str, Any]:
    values = inputs("flux", ODD)
    values["hidden_states"][:, :6] += 0.3 * step
    return values


def changes(degree: int, alone: bool) -> list[float]:
    """What one rank measures by step and sample; `alone`: of its own tokens."""
    model = build("flux")
    layout = parafuse.Parallel(ulysses=degree)
    config = parafuse.Config(cache=FirstBlockCache(0.0, **EVERY_STEP), parallel=layout)
    with parafuse.apply(model, config) as handle, handle.request() as memories:
        (skipping,) = handle.skipping.values()
        assert isinstance(skipping, StackSkipping)
        skipping.group = None if alone else skipping.group
        for step in range(4):
            call(model, moved(step))
        (memory,) = memories.values()
    return [one.change for samples in memory.decisions.values() for one in samples.values() if one.change is not None]


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_shards_that_see_different_changes_agree(degree: int) -> None:
    want = changes(1, alone=False)
    assert len(want) == 4
    for found in run_ranks(changes, degree, degree, False):
        assert found == pytest.approx(want, rel=1e-5)
    first, *others = run_ranks(changes, degree, degree, True)
    assert all(abs(a - b) / a > 0.1 for other in others for a, b in zip(first, other, strict=True)), (
        "without the sum over ranks they would go different ways"
    )


def with_group_of_all(name: str, cache: FirstBlockCache, degrees: dict[str, int], over_all: bool) -> list[list[float]]:
    """What is measured by call; `over_all`: over all ranks, replicas and branches too."""
    case = cases()[name]
    config = parafuse.Config(cache=cache, parallel=parafuse.Parallel(**degrees))
    with parafuse.Engine.from_pipeline(case.build(), config) as engine:
        (skipping,) = engine.handle.skipping.values()
        assert isinstance(skipping, StackSkipping)
        skipping.group = dist.group.WORLD if over_all else skipping.group
        engine(**seeded(case.call(2) | {"num_inference_steps": 6}))
        return engine.receipt["cache"]["changes"]["transformer"]


def test_replicas_and_branches_do_not_disturb_each_other() -> None:
    cache, degrees = FirstBlockCache(0.0, **EVERY_STEP), LAYOUTS["data 2"]
    _, word = painted("FLUX.1", cache, prompts=2, num_inference_steps=6)
    want = torch.tensor([x for x in word["changes"]["transformer"] if None not in x])
    for over_all in (False, True):
        found, _ = run_ranks(with_group_of_all, 2, "FLUX.1", cache, degrees, over_all)
        error = (torch.tensor([x for x in found if None not in x]) - want).abs().max() / want.abs().max()
        assert (error > 0.01) if over_all else (error < 1e-4)


class Parity:
    """Branches told by counting calls, two to a step."""

    def __init__(self) -> None:
        self.count = self.steps = self.leading = 0
        self.places = [0, 1]
        self.alive = {0, 1}

    def of(self, *_: Any) -> int:
        self.count += 1
        return self.count % 2


def branches_of(counted: bool) -> list[int]:
    """By call, of a run whose guidance ends."""
    case, cache = cases()["Lumina-Image 2.0"], FirstBlockCache(0.0)
    with parafuse.Engine.from_pipeline(case.build(), parafuse.Config(cache=cache)) as engine:
        (skipping,) = engine.handle.skipping.values()
        if counted:
            skipping.branches = Parity  # pyright: ignore[reportAttributeAccessIssue]
        engine(**seeded(case.call(1) | {"num_inference_steps": 8}))
        return engine.receipt["cache"]["branches"]["transformer"]


def test_branches_are_told_by_what_they_are_not_by_counting() -> None:
    """Counted, the branch that stays would go on with what the other one has kept."""
    told, counted = branches_of(False), branches_of(True)
    assert len(told) == len(counted) < 16, "guidance does not end"
    assert len(set(told[-2:])) == 1
    assert told[-1] in told[:-4]
    assert len(set(counted[-2:])) == 2


def test_order_does_not_matter_but_is_one() -> None:
    """A cache and sequence parallel are put on together; one that stands alone is not silently put under the other."""
    model: Any = build("flux")
    with parafuse.apply(model, parafuse.Config(cache="first-block:0.1")):
        message = run_refused(model)
    assert "runs with cache first-block" in message
    model.enable_cache(diffusers_cache())
    with pytest.raises(ConfigError, match="carries diffusers hooks"):
        parafuse.apply(model, parafuse.Config(cache="first-block:0.1"))


def run_refused(model: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parafuse.apply(model, parafuse.Config(cache="interval:2"))
    return str(caught.value)


def diffusers_cache() -> Any:
    from diffusers.hooks import FirstBlockCacheConfig

    return FirstBlockCacheConfig()


@pytest.mark.parametrize("forgets", [True, False])
def test_an_exception_leaves_nothing_behind(forgets: bool) -> None:
    """With the pipeline's own call, after `apply`; `forgets` False: what drops it all at a new loop is switched off."""
    case = cases()["FLUX.1"]
    given = case.call(1) | {"num_inference_steps": 6}
    pipeline = case.build()
    with parafuse.apply(pipeline, parafuse.Config(cache=FirstBlockCache(1e9, **EVERY_STEP))) as handle:
        want = tensors(pipeline(**seeded(given)))
        if not forgets:
            handle.clock.on_start.clear()
        with pytest.raises(Stopped):
            pipeline(**seeded(given), callback_on_step_end=stop_at_4)
        found = tensors(pipeline(**seeded(given)))
        if not forgets:
            (skipping,) = handle.skipping.values()
            handle.clock.on_start.append(skipping.forget)
    assert (relative_error(found, want) == 0) is forgets


def test_a_request_within_a_request_changes_neither() -> None:
    case = cases()["FLUX.1"]
    given = case.call(1) | {"num_inference_steps": 6}
    other = case.call(1) | {"num_inference_steps": 4}
    with parafuse.Engine.from_pipeline(case.build(), parafuse.Config(cache=parting("FLUX.1"))) as engine:
        want, want_inner = tensors(engine(**seeded(given))), tensors(engine(**seeded(other)))
    inner = list[list[Tensor]]()
    pipeline = case.build()
    with parafuse.apply(pipeline, parafuse.Config(cache=parting("FLUX.1"))) as handle:
        (skipping,) = handle.skipping.values()
        assert isinstance(skipping, StackSkipping)

        def paint_another(outer: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step == 3:
                kept = pipeline.scheduler
                pipeline.scheduler = type(kept).from_config(kept.config)
                try:
                    with handle.request():
                        inner.append(tensors(pipeline(**seeded(other))))
                finally:
                    pipeline.scheduler = kept
            return values

        with handle.request():
            found = tensors(pipeline(**seeded(given), callback_on_step_end=paint_another))
    assert relative_error(inner[0], want_inner) == 0
    assert relative_error(found, want) == 0


def again(name: str, replay: dict[str, list[str]], cache: FirstBlockCache, degrees: dict[str, int]) -> Any:
    """A run that is to decide as another did, with a threshold at which it would not."""
    case = cases()[name]
    from dataclasses import replace

    other = replace(cache, threshold=0.0)
    with parafuse.Engine.from_pipeline(
        case.build(), parafuse.Config(cache=other, parallel=parafuse.Parallel(**degrees))
    ) as engine:
        engine.plan = replace(engine.plan, replay=replay)
        output = tensors(engine(**seeded(case.call(1) | {"num_inference_steps": 8})))
        with pytest.raises(ConfigError, match=r"plan\.replay: has (no decision|decisions)"):
            engine(**seeded(case.call(1) | {"num_inference_steps": 5}))
        return output, engine.receipt["cache"]["decisions"]


def test_decisions_of_a_receipt_are_made_again() -> None:
    cache = parting("FLUX.1")
    want, word = painted("FLUX.1", cache)
    for degrees in ({}, LAYOUTS["cfg 2"]):
        size = 2 if degrees else 1
        runs = run_ranks(again, size, "FLUX.1", word["decisions"], cache, degrees) if degrees else None
        for found, said in runs or [again("FLUX.1", word["decisions"], cache, degrees)]:
            assert said == word["decisions"]
            assert relative_error(found, want) <= EXACT


def state_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """All attributes, but for what pipelines of diffusers themselves put on a model when they run."""
    parts = module.named_modules()
    return {name: {k: v for k, v in vars(part).items() if k != "_diffusers_hook"} for name, part in parts}


def test_a_threshold_of_zero_and_remove_are_bitwise() -> None:
    case = cases()["FLUX.1"]
    given = case.call(2) | {"num_inference_steps": 6}
    want = tensors(case.build()(**seeded(given)))
    found, _ = painted("FLUX.1", FirstBlockCache(0.0), prompts=2, num_inference_steps=6)
    assert relative_error(found, want) == 0
    pipeline = case.build()
    before = state_of(pipeline.transformer)
    with parafuse.apply(pipeline, parafuse.Config(cache=FirstBlockCache(1e9, **EVERY_STEP))):
        assert relative_error(tensors(pipeline(**seeded(given))), want) > 1e-4, "nothing was skipped"
    assert state_of(pipeline.transformer) == before
    assert not {"step", "set_timesteps"} & vars(pipeline.scheduler).keys()
    assert relative_error(tensors(pipeline(**seeded(given))), want) == 0


def test_what_is_kept_is_one_residual_for_each_stream_and_branch_and_the_host_waits_once_a_call() -> None:
    cache = parting("FLUX.1")
    _, word = painted("FLUX.1", cache)
    transformer = cases()["FLUX.1"].build().transformer
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    image, text = 8 * 12 // 4 // 4, 9
    one_branch = (image + text) * width + image * width  # the stack's residual, and the first block's
    assert word["bytes"] == [2 * 4 * one_branch]
    assert word["waits"][0] <= len(word["decisions"]["transformer"])


def graphs_by_step(name: str, degrees: dict[str, int]) -> list[int]:
    """Graphs made so far, after each step, of blocks compiled in full."""
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    case = cases()[name]
    config = parafuse.Config(
        cache=FirstBlockCache(1e9, max_consecutive_skips=1, **EVERY_STEP), parallel=parafuse.Parallel(**degrees)
    )
    seen: list[int] = []

    def count(_: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(graphs)
        return values

    with parafuse.Engine.from_pipeline(case.build(), config) as engine:
        torch._dynamo.reset()
        engine.pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        given = case.call(1) | {"num_inference_steps": 8, "callback_on_step_end": count}
        engine(**seeded(given))
        assert any("s" in letters for letters in engine.receipt["cache"]["decisions"]["transformer"])
    return seen


@pytest.mark.parametrize("degrees", [{}, dict(ulysses=2), dict(cfg=2, ulysses=2)])
def test_blocks_stay_compiled_in_full_and_no_skip_makes_a_graph(degrees: dict[str, int]) -> None:
    size = 4 if "cfg" in degrees else 2
    ranks = run_ranks(graphs_by_step, size, "FLUX.1", degrees, timeout_s=180) if degrees else None
    for seen in ranks or [graphs_by_step("FLUX.1", {})]:
        assert 0 < seen[-1] <= 8
        assert seen[3] == seen[-1]


def test_a_cache_for_another_kind_of_model_is_refused_with_those_that_it_can_have() -> None:
    with pytest.raises(ConfigError, match=r"unet, which can have first-block, .*interval"):
        painted("Stable Diffusion", parafuse.TaylorSeerCache(3))
    with pytest.raises(ConfigError, match="nothing is left to skip"):
        parafuse.apply(build("wan"), parafuse.Config(cache="first-block:0.1,first_blocks=2"))
