"""Which step a call is, whose state it finds, and when that is dropped: odd ways in which pipelines and users call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parafuse
from parafuse.cache import FirstBlockCache
from parafuse.engine.caches.memory import Decision
from parafuse.engine.caches.report import report
from parafuse.engine.verify import relative_error
from parafuse.errors import ConfigError, RankError, UnsupportedError
from parafuse.parallel.branches import Branches
from tests.caches.painted import EVERY_STEP, Stopped, stop_at_4
from tests.guided.cells import seeded, tensors
from tests.guided.collect import cases

ALWAYS = parafuse.Config(cache=FirstBlockCache(1e9, **EVERY_STEP))


def given(name: str = "FLUX.1", steps: int = 6) -> dict[str, Any]:
    return seeded(cases()[name].call(1) | {"num_inference_steps": steps})


def test_a_scheduler_that_is_replaced_after_a_run_was_stopped_starts_anew() -> None:
    pipeline = cases()["FLUX.1"].build()
    with parafuse.apply(pipeline, ALWAYS) as handle:
        want = tensors(pipeline(**given()))
        with pytest.raises(Stopped):
            pipeline(**given(), callback_on_step_end=stop_at_4)
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        assert relative_error(tensors(pipeline(**given())), want) == 0
        (caching,) = handle.skipping.values()
        assert not caching.memory.branches, "kept beyond the last step"


def test_a_handle_that_leaves_takes_nothing_from_another() -> None:
    pipeline = cases()["FLUX.1"].build()
    first, second = parafuse.apply(pipeline, ALWAYS), parafuse.apply(pipeline, ALWAYS)
    want = tensors(pipeline(**given()))
    first.remove()
    for _ in range(2):
        assert relative_error(tensors(pipeline(**given())), want) == 0
    second.remove()
    assert not {"step", "set_timesteps"} & vars(pipeline.scheduler).keys()
    assert relative_error(tensors(pipeline(**given())), want) > 1e-4


def test_pipelines_with_models_of_their_own_share_a_scheduler() -> None:
    one, other = cases()["FLUX.1"].build(), cases()["FLUX.1"].build()
    other.scheduler = one.scheduler
    first, second = parafuse.apply(one, ALWAYS), parafuse.apply(other, ALWAYS)
    want = tensors(other(**given()))
    first.remove()
    assert relative_error(tensors(other(**given())), want) == 0
    second.remove()
    assert not {"step", "set_timesteps"} & vars(one.scheduler).keys()


def test_pipelines_of_other_lengths_share_a_model() -> None:
    """Each counts by its own number of steps."""
    one = cases()["FLUX.1"].build()
    other = type(one)(**{**one.components, "scheduler": type(one.scheduler).from_config(one.scheduler.config)})
    with parafuse.apply(one, ALWAYS) as handle, parafuse.apply(other, ALWAYS):
        want = tensors(one(**given(steps=8)))
        other(**given(steps=3))
        assert handle.clock.total == 3
        assert relative_error(tensors(one(**given(steps=8))), want) == 0
        assert handle.clock.total == 8


def test_a_scheduler_that_steps_twice_with_one_result_counts_once() -> None:
    case = cases()["Cosmos"]
    with parafuse.Engine.from_pipeline(case.build(), ALWAYS) as engine:
        engine(**given("Cosmos", 8))
        assert len(engine.receipt["cache"]["hits"]) == 8
        assert any("s" in letters for letters in engine.receipt["cache"]["decisions"]["transformer"])


class Denoiser(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, words: Tensor, control: Tensor | None = None) -> Tensor:
        return sample


def test_residuals_of_a_control_network_for_each_branch_do_not_make_new_branches() -> None:
    branches, words = Branches(Denoiser()), {name: torch.full((1, 2), float(i)) for i, name in enumerate("pn")}
    found: list[list[int]] = []
    for step in range(8):
        latents, time = torch.full((1, 2), float(step)), torch.tensor([float(step)])
        found.append([branches.of((latents, time, words[name]), {"control": torch.randn(1, 2)}) for name in "pn"])
    assert found[-1] == found[-2] == found[-3]
    assert len(set(found[-1])) == 2
    assert sum(len(kept) for kept in branches._contents.values()) <= 8


def test_in_inference_mode_a_step_is_still_one_step() -> None:
    branches, words = Branches(Denoiser()), {name: torch.full((1, 2), float(i)) for i, name in enumerate("pn")}
    numbers: list[int] = []
    with torch.inference_mode():
        for step in range(6):
            latents, time = torch.full((1, 2), float(step)), torch.tensor([float(step)])
            numbers = [branches.of((latents.clone(), time, words[name]), {}) for name in "pn"]
    assert branches.steps == 5
    assert len(set(numbers)) == 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, stream: Tensor, before: Tensor | None = None) -> Tensor:
        return stream + self.layer(stream if before is None else stream + before)


class Bridged(nn.Module):
    """Its last block takes what its second one gave; or its blocks run in another order."""

    def __init__(self, is_bridged: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.is_bridged, self.is_turned = is_bridged, False

    def forward(self, stream: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for block in reversed(self.blocks) if self.is_turned else self.blocks:
            stream = block(stream, seen[1] if self.is_bridged and len(seen) == 4 else None)
            seen.append(stream)
        return stream


def test_a_bridge_into_the_last_blocks_is_refused() -> None:
    model = Bridged(True).requires_grad_(False)
    cache = FirstBlockCache(1e9, last_blocks=1, **EVERY_STEP)
    with parafuse.apply(model, parafuse.Config(cache=cache)) as handle, handle.request():
        model(torch.zeros(1, 3, 4))
        with pytest.raises(UnsupportedError, match="ask for fewer last_blocks"):
            model(torch.ones(1, 3, 4))
    with parafuse.apply(model, ALWAYS) as handle, handle.request() as memories:
        for step in range(4):
            model(torch.full((1, 3, 4), 1.0 + 1e-3 * step))
    (memory,) = memories.values()
    assert memory.decisions[3][0].skipped


def test_blocks_in_another_order_are_learned_anew() -> None:
    model = Bridged(False).requires_grad_(False)
    with parafuse.apply(model, ALWAYS) as handle, handle.request() as memories:
        (memory,) = memories.values()
        for step in range(8):
            model.is_turned = step >= 2
            stream = torch.full((1, 3, 4), 1.0 + 1e-3 * step)
            found = model(stream)
            if not memory.decisions[step][0].skipped:
                with torch.no_grad():
                    want = stream
                    for block in reversed(model.blocks) if model.is_turned else model.blocks:
                        want = want + block.layer(want)  # pyright: ignore[reportCallIssue]
                assert torch.equal(found, want)
    assert [memory.decisions[step][0].skipped for step in range(8)][:3] == [False] * 3
    assert memory.decisions[7][0].skipped


def test_tokens_first_samples_second() -> None:
    """As ERNIE-Image has them: what one sample does must not count for another."""
    model = Bridged(False).requires_grad_(False)
    with parafuse.apply(model, parafuse.Config(cache=FirstBlockCache(0.05, **EVERY_STEP))) as handle:
        with handle.request() as memories:
            for step in range(4):
                stream = torch.ones(6, 2, 4)  # (tokens, samples, width), and the sample is told by the first dim
                stream[:, 1] += step
                handle.skipping["Bridged"].context.rows = (0, 1)
                model(stream)
        (memory,) = memories.values()
    assert [memory.decisions[3][row].skipped for row in (0, 1)] == [True, False]


class Elsewhere:
    """What another rank says."""

    def everyone(self, topic: str, text: str) -> list[str]:
        return [text, text.replace("[true,", "[false,")]


def test_ranks_that_decided_differently_fail_the_request() -> None:
    with parafuse.apply(Bridged(False), ALWAYS) as handle, handle.request() as memories:
        (memory,) = memories.values()
        memory.decisions[0], memory.steps[0] = {0: Decision(True)}, 0
        world: Any = Elsewhere()
        with pytest.raises(RankError, match="ranks decided differently whether to skip call 1"):
            report(handle.cache, memories, world)


def test_branches_of_a_bare_model_cannot_decide_together() -> None:
    cache = replace(FirstBlockCache(), branches="joint")
    with pytest.raises(ConfigError, match="needs a pipeline, whose scheduler tells"):
        parafuse.apply(Bridged(False), parafuse.Config(cache=cache))
