"""k-diffusion's samplers beside diffusers' schedulers, on one denoiser and one noise."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.guided.stable_diffusion import BETAS

SHAPE, SEED = (2, 4, 4, 6), 5
EXAMPLE = Path(__file__).parents[2] / "examples" / "k_samplers.py"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A sampler and the scheduler that takes its steps."""

    sampler: str
    scheduler: str
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    keywords: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of the sampler."""
    noise: str = ""
    """"drawn": by a generator in every step; "tree": a Brownian tree."""
    steps: int = 8


KARRAS: dict[str, Any] = dict(use_karras_sigmas=True)
EXPONENTIAL: dict[str, Any] = dict(use_exponential_sigmas=True)
SDE: dict[str, Any] = dict(algorithm_type="sde-dpmsolver++")
HEUN: dict[str, Any] = dict(solver_type="heun")
TREE: dict[str, Any] = dict(noise_sampler_seed=SEED)
MULTI = "DPMSolverMultistepScheduler"

EQUAL = (
    Pair(sampler="sample_euler", scheduler="EulerDiscreteScheduler"),
    Pair(sampler="sample_euler", scheduler="EulerDiscreteScheduler", config=KARRAS),
    Pair(sampler="sample_euler", scheduler="EulerDiscreteScheduler", config=EXPONENTIAL),
    Pair(sampler="sample_euler_ancestral", scheduler="EulerAncestralDiscreteScheduler", noise="drawn"),
    Pair(sampler="sample_lms", scheduler="LMSDiscreteScheduler"),
    Pair(sampler="sample_lms", scheduler="LMSDiscreteScheduler", config=KARRAS),
    Pair(sampler="sample_heun", scheduler="HeunDiscreteScheduler"),
    Pair(sampler="sample_heun", scheduler="HeunDiscreteScheduler", config=KARRAS),
    Pair(sampler="sample_dpm_2", scheduler="KDPM2DiscreteScheduler"),
    Pair(sampler="sample_dpm_2", scheduler="KDPM2DiscreteScheduler", config=KARRAS),
    Pair(sampler="sample_dpm_2_ancestral", scheduler="KDPM2AncestralDiscreteScheduler", noise="drawn"),
    Pair(sampler="sample_dpm_2_ancestral", scheduler="KDPM2AncestralDiscreteScheduler", config=KARRAS, noise="drawn"),
    Pair(sampler="sample_dpmpp_2m", scheduler=MULTI),
    Pair(sampler="sample_dpmpp_2m", scheduler=MULTI, config=KARRAS),
    Pair(sampler="sample_dpmpp_2m_sde", scheduler=MULTI, config=SDE, noise="drawn"),
    Pair(sampler="sample_dpmpp_2m_sde", scheduler=MULTI, config=SDE | KARRAS, noise="drawn"),
    Pair(
        sampler="sample_dpmpp_2m_sde",
        scheduler=MULTI,
        config=SDE | KARRAS | HEUN,
        keywords=HEUN,
        noise="drawn",
    ),
    Pair(sampler="sample_dpmpp_sde", scheduler="DPMSolverSDEScheduler", config=TREE, noise="tree"),
    Pair(sampler="sample_dpmpp_sde", scheduler="DPMSolverSDEScheduler", config=TREE | KARRAS, noise="tree"),
)

UNEQUAL = {
    "sample_dpm_adaptive": "its steps are chosen from the error of each; a schedule is fixed before",
    "sample_dpm_fast": "steps of order 3, 2 and 1 between places that no scheduler has",
    "sample_dpmpp_2s_ancestral": "no scheduler has its noise; DPMSolverSinglestepScheduler is another method",
    "sample_dpmpp_3m_sde": "diffusers' third order (solver_order=3) has another sign in its last term",
}
"""Samplers that no scheduler takes the steps of: why."""
NEAR = Pair(
    sampler="sample_dpmpp_3m_sde", scheduler=MULTI, config=SDE | KARRAS | dict(solver_order=3, solver_type="heun"),
    noise="drawn", steps=15,
)  # fmt: skip
"""Would be equal, but for a sign."""


def samplers() -> Any:
    """The package's module of samplers. Raises ImportError where it is not installed."""
    spec: Any = importlib.util.spec_from_file_location("k_samplers", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_samplers()


class Noise:
    """Normal noise from a generator of its own, as a scheduler draws it and as a sampler asks for it."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(SEED)

    def __call__(self, *_: Any) -> Tensor:
        return torch.randn(SHAPE, generator=self.generator)


def epsilon(x_BCHW: Tensor) -> Tensor:
    """Noise that is seen in a sample of variance 1."""
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    return torch.tanh(torch.einsum("oc,bchw->bohw", weight, x_BCHW)) + 0.3 * x_BCHW


def denoised(x_BCHW: Tensor, sigma_B: Tensor, **_: Any) -> Tensor:
    """The same as k-diffusion asks for it: of a sample with noise of `sigma_B` added."""
    sigma = sigma_B.view(-1, 1, 1, 1)
    return x_BCHW - sigma * epsilon(x_BCHW / (sigma**2 + 1) ** 0.5)


def made(pair: Pair) -> Any:
    return getattr(diffusers, pair.scheduler)(**BETAS, **pair.config)


def schedule(pair: Pair) -> Tensor:
    """(steps + 1,) sigmas, without those between for schedulers that call the denoiser twice in a step."""
    scheduler = made(pair)
    scheduler.set_timesteps(pair.steps)
    return torch.unique_consecutive(scheduler.sigmas)


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def by_scheduler(pair: Pair) -> Tensor:
    """The last sample, as x + sigma * noise or of variance 1: the last sigma is 0."""
    scheduler, noise = made(pair), Noise()
    scheduler.set_timesteps(pair.steps)
    sigma = scheduler.sigmas[0]
    is_scaled = float(scheduler.init_noise_sigma) > 1.5  # samples are x + sigma * noise
    x = start() * sigma / (1.0 if is_scaled else (sigma**2 + 1) ** 0.5)
    more = {"generator": noise.generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for time in scheduler.timesteps:
        x = scheduler.step(epsilon(scheduler.scale_model_input(x, time)), time, x, **more).prev_sample
    return x


def by_sampler(pair: Pair, sampling: Any) -> Tensor:
    sigmas = schedule(pair)
    x = start() * sigmas[0]
    keywords: dict[str, Any] = dict(pair.keywords)
    if pair.noise == "tree":
        keywords["noise_sampler"] = sampling.BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max(), SEED)
    elif pair.noise:
        keywords["noise_sampler"] = Noise()
    run: Callable[..., Tensor] = getattr(sampling, pair.sampler)
    return run(denoised, x, sigmas, disable=True, **keywords)


def difference(pair: Pair, sampling: Any) -> float:
    """Relative to the largest value."""
    want = by_sampler(pair, sampling)
    return float((by_scheduler(pair) - want).abs().max() / want.abs().max())
