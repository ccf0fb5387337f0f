"""How often a scheduler makes the host wait for the device in a step, and that its timesteps on the host avoid it."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import diffusers
import pytest
import torch

import parafuse
from parafuse.engine.host_times import LOOKED_UP, host_times
from tests.schedulers.meter import DEVICE, READ, HostMeter
from tests.schedulers.placed import USES, Use
from tests.schedulers.replay import Replay, built, replayed

NOT_METERED = {
    "CosineDPMSolverMultistepScheduler": "torchsde makes a generator on the device",
    "DPMSolverSDEScheduler": "torchsde makes a generator on the device",
    "HeliosScheduler": "it makes a tensor from tensors, each of which is read",
}
READS = {
    "AmusedScheduler": 3,
    "CogVideoXDDIMScheduler": 3,
    "CogVideoXDPMScheduler": 5,
    "DDIMInverseScheduler": 4,
    "DDIMParallelScheduler": 6,
    "DDIMScheduler": 6,
    "DDPMParallelScheduler": 13,
    "DDPMScheduler": 13,
    "DDPMWuerstchenScheduler": 1,
    "FlowMapEulerDiscreteScheduler": 3,
    "FlowMatchHeunDiscreteScheduler": 2,
    "HeliosDMDScheduler": 1,
    "LCMScheduler": 3,
    "LTXEulerAncestralRFScheduler": 1,
    "PNDMScheduler": 3,
    "SASolverScheduler": 4,
    "TCDScheduler": 4,
    "UnCLIPScheduler": 9,
    "UniPCMultistepScheduler": 1,
}
"""Values read from the device in a step after the first, at most, by plain diffusers. All others read none: they keep
their sigmas on the host, or never look at them."""
METERED = [use for use in USES if use.scheduler not in NOT_METERED]


@cache
def plain() -> dict[str, Replay]:
    return {use.name: replayed(use) for use in METERED}


def test_schedulers_read_what_is_known_of_them_in_each_step() -> None:
    most: dict[str, int] = {}
    for use in METERED:
        most[use.scheduler] = max(most.get(use.scheduler, 0), plain()[use.name].most(READ))
    assert {name: reads for name, reads in most.items() if reads} == READS


def test_timesteps_on_the_host_are_read_without_a_wait_and_change_nothing() -> None:
    done = [use for use in METERED if use.scheduler in LOOKED_UP]
    assert {use.scheduler for use in done} == LOOKED_UP
    for use in done:
        found = replayed(use, host_times)
        assert found.most(READ) == 0, use.name
        assert all(map(torch.equal, found.samples, plain()[use.name].samples)), use.name
        assert len(found.samples) > 2, use.name


@pytest.mark.parametrize(
    "use", [use for use in METERED if use.scheduler not in LOOKED_UP][:3], ids=lambda use: use.name
)
def test_other_schedulers_are_left_alone(use: Use) -> None:
    scheduler = use.made()
    before = dict(vars(scheduler))
    with host_times(scheduler) as done:
        assert not done
        assert vars(scheduler) == before


def on_device(scheduler: Any) -> tuple[int, torch.Tensor]:
    """(reads in the second step, what it gives)."""
    with HostMeter() as meter:
        scheduler.set_timesteps(4, device=DEVICE)
        sample = torch.ones(1, 4, 2, 3, device=DEVICE)
        for time in scheduler.timesteps[:2]:
            meter.waits.clear()
            sample = scheduler.step(sample * 0.5, time, sample).prev_sample
    return meter.waits[READ], sample.held  # type: ignore[attr-defined]


def test_it_is_taken_off_and_a_copy_is_a_scheduler_of_its_own() -> None:
    reads, want = on_device(diffusers.DDIMScheduler())
    scheduler = diffusers.DDIMScheduler()
    before = set(vars(scheduler))
    with host_times(scheduler):
        assert "eta" in inspect.signature(scheduler.step).parameters  # pipelines ask
        copied = copy.deepcopy(scheduler)
        found = [on_device(one) for one in (copied, scheduler)]
        assert copied.step.__self__ is copied
    found.append(on_device(scheduler))
    assert [count for count, _ in found] == [0, 0, reads]
    assert all(torch.equal(given, want) for _, given in found)
    assert "step" not in before
    assert set(vars(scheduler)) == before


def test_a_step_that_somebody_replaced_is_kept() -> None:
    scheduler: Any = diffusers.DDIMScheduler()
    scheduler.step = replaced = lambda *_: None
    with host_times(scheduler) as done:
        assert not done
        assert scheduler.step is replaced
    assert scheduler.step is replaced


def test_an_engine_does_so_during_a_request_with_the_scheduler_that_is_there() -> None:
    pipeline = built("Stable Diffusion")
    seen: list[bool] = []

    def watched(pipe: Any, *_: Any) -> dict[str, Any]:
        seen.append("step" in vars(pipe.scheduler))
        return {}

    with parafuse.Engine.from_pipeline(pipeline) as engine:
        for made in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.TCDScheduler):
            engine.pipeline.scheduler = made()
            engine("a cat", height=16, width=16, num_inference_steps=2, output_type="latent", seed=1,
                   callback_on_step_end=watched)  # fmt: skip
            assert "step" not in vars(pipeline.scheduler)
    assert seen == [True, True, False, False, True, True]
