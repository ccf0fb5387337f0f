"""Every scheduler of diffusers, swapped between requests of one engine: the latents are those of plain diffusers."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import parafuse
from parafuse.engine.verify import relative_error
from tests.dist.ranks import run_ranks
from tests.guided.cells import tensors
from tests.schedulers.hosts import HOSTS
from tests.schedulers.placed import NOWHERE, USES, Use, exported

EXACT = 1e-5
SEED = 5


def uses_of(host: str) -> list[Use]:
    return [use for use in USES if use.host == host]


def painted(
    target: Any, use: Use, scheduler: Any = None, *, seed: int | None = SEED, own_seed: int = SEED
) -> list[Tensor]:
    """Latents of one request of a pipeline or an engine with a generator of this seed, or with none; torch's own
    generator is at `own_seed`."""
    pipeline = getattr(target, "pipeline", target)
    pipeline.scheduler = use.made() if scheduler is None else scheduler
    torch.manual_seed(own_seed)
    given = {} if seed is None else {"generator": torch.Generator("cpu").manual_seed(seed)}
    return tensors(target(**use.keywords(), **given))


def swapped(host: str) -> dict[str, float]:
    """What was asked for -> its error, on this rank of two: with a generator and, where noise is drawn, without."""
    plain, pipeline = HOSTS[host].build(), HOSTS[host].build()
    config = parafuse.Config(parallel=parafuse.Parallel(**HOSTS[host].degrees))
    swaps = [(use, use.made(), painted(plain, use)) for use in uses_of(host)]
    found: dict[str, float] = {}
    with parafuse.Engine.from_pipeline(pipeline, config) as engine:
        for use, scheduler, want in swaps:
            found[f"{use.name}: engine"] = relative_error(painted(engine, use, scheduler), want)
            if use.draws:  # rank 0's own generator is everybody's, and the seed that was drawn is in the receipt
                got = painted(engine, use, scheduler, seed=None, own_seed=SEED + dist.get_rank())
                drawn = painted(plain, use, seed=engine.receipt["seed"])
                found[f"{use.name}: engine, no generator"] = relative_error(got, drawn)
        shared = engine.handle.guidance
        assert engine.handle.applied
        assert not shared or sum(one.seen["cut"] + one.seen["together"] for one in shared.values()) > 0
    with parafuse.apply(pipeline, config):  # instances that have been used, in another order
        for use, scheduler, want in reversed(swaps):
            found[f"{use.name}: apply"] = relative_error(painted(pipeline, use, scheduler), want)
            if use.draws:
                drawn = painted(plain, use, seed=None)
                found[f"{use.name}: apply, no generator"] = relative_error(
                    painted(pipeline, use, scheduler, seed=None), drawn
                )
    return found


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("host", HOSTS)
def test_two_ranks_paint_what_one_paints_whatever_scheduler_is_swapped_in(host: str) -> None:
    found = run_ranks(swapped, 2, host, timeout_s=240)
    assert len(found[0]) >= 2 * len(uses_of(host)) > 0
    wrong = {name: error for one in found for name, error in one.items() if not error <= EXACT}
    assert not wrong


@pytest.mark.parametrize("host", HOSTS)
def test_one_rank_is_bitwise_plain_diffusers(host: str) -> None:
    plain = HOSTS[host].build()
    with parafuse.Engine.from_pipeline(HOSTS[host].build()) as engine:
        for use in uses_of(host):
            got, want = painted(engine, use), painted(plain, use)
            assert all(map(torch.equal, got, want)), use.name


def differing(host: str) -> float:
    """Rank 1 has another scheduler than rank 0."""
    use = uses_of(host)[dist.get_rank()]
    plain, pipeline = HOSTS[host].build(), HOSTS[host].build()
    want = painted(plain, uses_of(host)[0])
    config = parafuse.Config(parallel=parafuse.Parallel(**HOSTS[host].degrees))
    with parafuse.apply(pipeline, config):
        return relative_error(painted(pipeline, use), want)


@pytest.mark.parametrize("host", ["Stable Diffusion 3", "Wan"])
def test_ranks_with_different_schedulers_show(host: str) -> None:
    assert max(run_ranks(differing, 2, host)) > 1e-2


def test_every_exported_scheduler_is_placed_or_named_with_a_reason() -> None:
    placed = {use.scheduler for use in USES}
    assert sorted(placed | set(NOWHERE)) == exported()
    assert not placed & set(NOWHERE)


@cache
def built(host: str) -> Any:
    return HOSTS[host].build()


def drawn(use: Use) -> set[str]:
    """The generators whose state `step` changed."""
    pipeline, found = built(use.host), set[str]()
    pipeline.scheduler = scheduler = use.made()
    generators = {"generator": torch.Generator("cpu").manual_seed(SEED), "global": torch.default_generator}
    step = scheduler.step

    @wraps(step)  # pipelines look at its arguments
    def watched(*args: Any, **kwargs: Any) -> Any:
        before = {name: one.get_state() for name, one in generators.items()}
        given = step(*args, **kwargs)
        found.update(name for name, one in generators.items() if not torch.equal(one.get_state(), before[name]))
        return given

    scheduler.step = watched
    pipeline(**use.keywords(), generator=generators["generator"])
    return found


def test_noise_is_drawn_where_the_data_says() -> None:
    for use in USES:
        assert drawn(use) == {use.draws} - {"", "its seed"}, use.name


def test_schedulers_with_two_calls_in_a_step_are_among_them() -> None:
    two = {use.scheduler for use in USES if getattr(use.made(), "order", 1) > 1}
    assert two == {
        "DPMSolverSDEScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
    }


def taken_off() -> list[bool]:
    """Whether `apply` is on a scheduler's `step`: before, while it is on, and after."""
    pipeline = HOSTS["Stable Diffusion"].build()
    found = ["step" in vars(pipeline.scheduler)]
    with parafuse.apply(pipeline, parafuse.Config(parallel=parafuse.Parallel(**HOSTS["Stable Diffusion"].degrees))):
        found.append("step" in vars(pipeline.scheduler))
    return [*found, "step" in vars(pipeline.scheduler)]


def test_apply_keeps_the_timesteps_of_the_scheduler_on_the_host_until_it_is_removed() -> None:
    assert run_ranks(taken_off, 2) == [[False, True, False]] * 2
