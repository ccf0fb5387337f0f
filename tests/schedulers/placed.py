"""Every scheduler that diffusers exports: the pipeline that it is tried in, or why there is none."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers

from tests.guided.stable_diffusion import BETAS
from tests.schedulers.hosts import HOSTS

SD, SD3, WAN, COGVIDEOX = "Stable Diffusion", "Stable Diffusion 3", "Wan", "CogVideoX"

PUBLISHED: dict[str, Any] = BETAS | dict(clip_sample=False, clip_denoised=False)
"""Clipping would hide differences."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """A scheduler in a pipeline."""

    scheduler: str
    host: str = SD
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Beside what is published with Stable Diffusion, where the scheduler knows it."""
    call: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What is different in the call."""
    draws: str = ""
    """Where `step` takes noise from: "generator", that of the call; "its seed", a generator of its own with that seed;
    "global", torch's own though the call has one; "": it takes none."""

    @property
    def name(self) -> str:
        more = ", ".join(f"{key} {value}" for key, value in {**self.config, **self.call}.items())
        return f"{self.scheduler.removesuffix('Scheduler')} in {self.host}" + (f", {more}" if more else "")

    def made(self) -> Any:
        """A new instance."""
        cls = getattr(diffusers, self.scheduler)
        known = inspect.signature(cls.__init__).parameters
        published = {key: value for key, value in PUBLISHED.items() if key in known and self.host in (SD, COGVIDEOX)}
        return cls(**{**published, **self.config})

    def keywords(self) -> dict[str, Any]:
        return HOSTS[self.host].call() | dict(self.call)


def exported() -> list[str]:
    """Names of diffusers' schedulers. One whose package is missing cannot be looked at, and counts."""
    return [name for name in sorted(dir(diffusers)) if "Scheduler" in name and _can_be_set(name)]


def _can_be_set(name: str) -> bool:
    try:
        return hasattr(getattr(diffusers, name), "set_timesteps")
    except ImportError:
        return True


FLOW: dict[str, Any] = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
DRAWS: dict[str, Any] = dict(draws="generator")

USES = (
    Use(scheduler="AmusedScheduler", host="aMUSEd", config=dict(mask_token_id=31), **DRAWS),
    Use(scheduler="CMStochasticIterativeScheduler", **DRAWS),
    Use(scheduler="CogVideoXDDIMScheduler", host=COGVIDEOX),
    Use(scheduler="CogVideoXDPMScheduler", host=COGVIDEOX, **DRAWS),
    Use(scheduler="CosineDPMSolverMultistepScheduler", draws="its seed"),
    Use(scheduler="DDIMInverseScheduler"),
    Use(scheduler="DDIMParallelScheduler"),
    Use(scheduler="DDIMScheduler"),
    Use(scheduler="DDIMScheduler", call=dict(eta=0.7), **DRAWS),
    Use(scheduler="DDIMScheduler", config=dict(rescale_betas_zero_snr=True, prediction_type="v_prediction")),
    Use(scheduler="DDPMParallelScheduler", **DRAWS),
    Use(scheduler="DDPMScheduler", **DRAWS),
    Use(scheduler="DDPMWuerstchenScheduler", host="Stable Cascade decoder", **DRAWS),
    Use(scheduler="DEISMultistepScheduler"),
    Use(scheduler="DPMSolverMultistepInverseScheduler"),
    Use(scheduler="DPMSolverMultistepScheduler", config=dict(use_karras_sigmas=True)),
    Use(scheduler="DPMSolverMultistepScheduler", config=dict(algorithm_type="sde-dpmsolver++"), **DRAWS),
    Use(scheduler="DPMSolverMultistepScheduler", config=dict(solver_order=3), call=dict(num_inference_steps=5)),
    Use(scheduler="DPMSolverMultistepScheduler", host=WAN, config=FLOW),
    Use(scheduler="DPMSolverSDEScheduler", draws="global"),
    Use(scheduler="DPMSolverSinglestepScheduler"),
    Use(scheduler="EDMDPMSolverMultistepScheduler"),
    Use(scheduler="EDMEulerScheduler"),
    Use(scheduler="EulerAncestralDiscreteScheduler", **DRAWS),
    Use(scheduler="EulerDiscreteScheduler", config=dict(use_karras_sigmas=True)),
    Use(scheduler="FlowMapEulerDiscreteScheduler", host=SD3),
    Use(scheduler="FlowMatchEulerDiscreteScheduler", host=SD3, config=dict(shift=3.0)),
    Use(scheduler="FlowMatchEulerDiscreteScheduler", host=SD3, config=dict(stochastic_sampling=True), draws="global"),
    Use(scheduler="FlowMatchEulerDiscreteScheduler", host=WAN, config=dict(shift=3.0)),
    Use(scheduler="FlowMatchHeunDiscreteScheduler", host=SD3),
    Use(scheduler="FlowMatchHeunDiscreteScheduler", host=WAN),
    Use(scheduler="FlowMatchLCMScheduler", host=SD3, draws="global"),
    Use(scheduler="HeliosDMDScheduler", host="Helios, distilled", config=dict(gamma=0.25)),
    Use(scheduler="HeliosScheduler", host="Helios", config=dict(gamma=0.25)),
    Use(scheduler="HeunDiscreteScheduler"),
    Use(scheduler="IPNDMScheduler"),
    Use(scheduler="KDPM2AncestralDiscreteScheduler", **DRAWS),
    Use(scheduler="KDPM2DiscreteScheduler"),
    Use(scheduler="LCMScheduler", **DRAWS),
    Use(scheduler="LMSDiscreteScheduler"),
    Use(scheduler="LTXEulerAncestralRFScheduler", host=SD3, draws="global"),
    Use(scheduler="MiniMaxH3Scheduler", host=SD3),
    Use(scheduler="PNDMScheduler", call=dict(num_inference_steps=4)),
    Use(scheduler="PNDMScheduler", config=dict(skip_prk_steps=True)),
    Use(scheduler="SASolverScheduler", **DRAWS),
    Use(scheduler="SCMScheduler", host="SANA-Sprint", **DRAWS),
    Use(scheduler="TCDScheduler", call=dict(eta=0.3), **DRAWS),
    Use(scheduler="UnCLIPScheduler", host="Kandinsky 2.2 prior", **DRAWS),
    Use(scheduler="UniPCMultistepScheduler"),
    Use(scheduler="UniPCMultistepScheduler", host=WAN, config=FLOW),
)

NOWHERE = {
    "BlockRefinementScheduler": "unmasks words: LLaDA 2 and DiffusionGemma, which write text",
    "DiscreteDDIMScheduler": "steps over words: DiffusionGemma, which writes text",
    "EntropyBoundScheduler": "unmasks words: DiffusionGemma, which writes text",
    "KarrasVeScheduler": "its step takes three samples: a pipeline without text, which is deprecated",
    "PiflowScheduler": "takes a policy of several velocities, channels last, from a transformer distilled for it: "
    "Kandinsky 6 alone, whose pipeline needs weights of a video, an audio and two text models",
    "RFD4ProteinaScheduler": "moves atoms of proteins: no picture",
    "RePaintScheduler": "its step takes a picture and a mask: a pipeline without text, which is deprecated",
    "ScoreSdeVeScheduler": "has no `step`, but a prediction and a correction: a pipeline without text, deprecated",
    "VQDiffusionScheduler": "steps over the codes of a deprecated pipeline, whose transformer gives logits of them",
}
"""Schedulers that no pipeline for text to image or video takes: why."""
