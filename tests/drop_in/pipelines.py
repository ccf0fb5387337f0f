"""The three pipelines most used, tiny, with a call of two prompts; and the layout in which each runs on two ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers

import parafuse
from tests.guided import flux, sdxl, wan

BASE = "DiffusionPipeline"
CLASSES = (BASE, "FluxPipeline", "StableDiffusionXLPipeline", "WanPipeline")
STEPS = {"num_inference_steps": 2}
CALLS: dict[str, dict[str, Any]] = {
    "FluxPipeline": flux.call(2) | STEPS | dict(true_cfg_scale=1.0),
    "StableDiffusionXLPipeline": sdxl.call_text(2) | STEPS,
    "WanPipeline": wan.call(2) | STEPS,
}
BUILDERS: dict[str, Callable[[], Any]] = {
    BASE: functools.partial(flux.build, "FluxPipeline"),
    "FluxPipeline": functools.partial(flux.build, "FluxPipeline"),
    "StableDiffusionXLPipeline": sdxl.build,
    "WanPipeline": wan.build,
}
ON_TWO = {
    BASE: parafuse.Parallel(ulysses=2),
    "FluxPipeline": parafuse.Parallel(ulysses=2),
    "StableDiffusionXLPipeline": parafuse.Parallel(cfg=2, ulysses=1),
    "WanPipeline": parafuse.Parallel(ulysses=2),
}


def members(name: str) -> list[str]:
    """Public methods and properties of a class; of the pipelines, those that not every pipeline has."""
    own = {member for member in dir(getattr(diffusers, name)) if not member.startswith("_")}
    return sorted(own if name == BASE else own - set(members(BASE)))
